"""Figures of docs/results/graddrop.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from claims_cards import SHAPES
from documents import Claim, Given
from measured import STSB, bench, graddrop, mean, recorded, scores

PAGE = "docs/results/graddrop.md"
OFF = "graddrop-off"
RANDOM = [
    "graddrop",
    "layer-graddrop",
    "anneal-graddrop",
    "anneal-layer-graddrop",
    "graddrop-epoch",
    "graddrop-epoch-toggle",
    "graddrop-epoch-reset",
]
MASKED = ("graddrop", "graddrop-epoch")


def claim(template: str, values: Callable[[], Iterable[object]]) -> Claim:
    """A sentence of the page."""
    return Claim(PAGE, template, values)


def behind(label: str) -> float:
    """The correlation on STS-B by which a variant's mean is behind plain fine-tuning's."""
    return mean(STSB, OFF, "metric", "graddrop") - mean(STSB, label, "metric", "graddrop")


def largest_gaps() -> list[str]:
    """The largest distance of a random variant's mean to plain fine-tuning's, and the same without `graddrop`."""
    gaps = {label: abs(behind(label)) for label in RANDOM}
    assert max(gap for label, gap in gaps.items() if label != "graddrop") <= 0.01
    return [f"{max(gaps.values()):.3f}", "0.01"]


def worst_seed() -> list[float]:
    """The correlation of `graddrop` in its worst seed, and plain fine-tuning's there."""
    own, plain = (scores(STSB, label, "metric", "graddrop") for label in ("graddrop", OFF))
    seed = min(own, key=own.__getitem__)
    return [own[seed], plain[seed]]


def spread(shape: str, name: str) -> list[float]:
    """Median, least and greatest of the ratios to plain fine-tuning's step."""
    ratio = graddrop(shape, name)["to_full"]
    return [ratio["median"], ratio["min"], ratio["max"]]


def row(label: str, name: str) -> Claim:
    """A row of the table of steps."""
    cell = "{:.2f} ({:.2f}–{:.2f})"
    return claim(f"| {label} | {cell} | {cell} |", lambda: [each for shape in SHAPES for each in spread(shape, name)])


def row_of_masks(name: str, note: str) -> Claim:
    """A row of the table of steps, with the ratio to the deltas without masks as well."""
    cell = "{:.2f} ({:.2f}–{:.2f}), {:.2f}"
    return claim(
        f"| `{name}` | {cell}{note} | {cell} |",
        lambda: [v for s in SHAPES for v in (*spread(s, name), graddrop(s, name)["to_off"]["median"])],
    )


def megabytes(shape: str, kind: str, *names: str) -> list[float]:
    """Bytes of the contenders, in MB."""
    return [graddrop(shape, name)[f"{kind}_bytes"] / 1e6 for name in names]


def memory_row(label: str, kind: str, *names: str) -> Claim:
    """A row of the table of steps about memory."""
    cell = " / ".join(["{:.0f}"] * len(names)) + " MB"
    return claim(f"{label} | {cell} | {cell} |", lambda: [v for s in SHAPES for v in megabytes(s, kind, *names)])


def skipped(name: str) -> list[float]:
    """Share of the entries that did not train, at both shapes."""
    return [graddrop(shape, name)["skipped"] for shape in SHAPES]


def share_of_masks(kind: str) -> list[float]:
    """Least and greatest share of a step by which masked ones are longer."""
    ratios = [graddrop(shape, name)[f"to_{kind}"]["median"] - 1 for shape in SHAPES for name in MASKED]
    return [100 * min(ratios), 100 * max(ratios)]


def row_of_files(label: str, name: str, unit: str = "") -> Claim:
    """A row of the table of files."""

    def values() -> list[object]:
        one = bench("graddrop_bench")["graddrop bytes"][name]
        first, second, third = (size / 1e6 for size in one["after_epoch"])
        ends = [f"{one['after_epoch'][i] / one['entries']:.2f}" for i in (0, 2)]
        return [first, second, third, "–".join(dict.fromkeys(ends)).replace("0.00–", "0–")]

    return claim(f"| {label} | {{:.1f}}{unit} | {{:.1f}} | {{:.1f}} | {{}} |", values)


def largest() -> list[float]:
    """Megabytes of a file with the largest 1%, and bytes an entry."""
    one = bench("graddrop_bench")["graddrop bytes"]["graddrop"]
    return [one["largest_1%"] / 1e6, one["largest_1%"] / one["entries"]]


CLAIMS = [
    claim("blocks trains ({:,} parameters)", lambda: [recorded(STSB, OFF, "trained_parameters", "graddrop")]),
    claim("are within {} of its correlation, all but `graddrop`'s within {}:", largest_gaps),
    claim("one seed ({:.3f} against {:.3f})", worst_seed),
    claim(
        "its means are {:.3f} and, toggled, {:.3f} behind from the top, and {:.3f} behind from the bottom",
        lambda: map(behind, ("gradfreeze-topdown", "gradfreeze-toggle-topdown", "gradfreeze-bottomup")),
    ),
    row("frozen, backward pass to the first layer", "frozen"),
    row("`graddrop-off`: deltas, nothing masked", OFF),
    row_of_masks("graddrop", " to `graddrop-off`"),
    row_of_masks("graddrop-epoch", ""),
    *(
        claim(f"`{name}` ({{:.0%}}{{}}", lambda n=name, f=form: [skipped(n)[0], f.format(*skipped(n)[1:])])
        for name, form in {"layer-graddrop": " and {:.0%} skipped)", "anneal-layer-graddrop": ", {:.0%})"}.items()
    ),
    claim("`gradfreeze-topdown` ({:.0%})", lambda: set(skipped("gradfreeze-topdown"))),
    row("`layer-graddrop` (4% and 17% skipped)", "layer-graddrop"),
    row("`anneal-layer-graddrop` (92%, 83%)", "anneal-layer-graddrop"),
    row("`gradfreeze-topdown` (50%)", "gradfreeze-topdown"),
    memory_row("`full` / `graddrop` / `anneal-layer`", "kept", "full", "graddrop", "anneal-layer-graddrop"),
    memory_row(
        "`full` / `graddrop` / `graddrop-epoch` / `anneal-layer`", "peak", "full", *MASKED, "anneal-layer-graddrop"
    ),
    claim("**Masks cost {:.0f} to {:.0f}% of a step here**", lambda: share_of_masks("off")),
    claim("against plain fine-tuning {:.0f} to {:.0f}%", lambda: share_of_masks("full")),
    claim(
        "{:.2f} and {:.2f} times: in these steps it skipped {:.0%} and {:.0%}",
        lambda: [*(spread(shape, "layer-graddrop")[0] for shape in SHAPES), *skipped("layer-graddrop")],
    ),
    claim(
        "takes {:.2f} and {:.2f} of what skipping",
        lambda: [graddrop(shape, "gradfreeze-topdown")["to_proportion"]["median"] for shape in SHAPES],
    ),
    claim("BERT above, {:,} entries", lambda: [bench("graddrop_bench")["graddrop bytes"]["graddrop"]["entries"]]),
    row_of_files("`graddrop`", "graddrop", " MB"),
    *(
        row_of_files(f"`{name}`", name)
        for name in ("layer-graddrop", "anneal-graddrop", "anneal-layer-graddrop", "graddrop-epoch-reset")
    ),
    row_of_files("`graddrop-epoch`, `graddrop-epoch-toggle`", "graddrop-epoch"),
    row_of_files("`gradfreeze-topdown`, `-bottomup`, `-toggle-topdown`", "gradfreeze-topdown"),
    claim("| any, `save_density=0.01` | | | {:.1f} | {:.2f} |", largest),
]
SETTINGS = ("decay 0.01", "after 6% of", "2e-4 on STS-B", "1e-4 on CoLA", "p = 0.9 where annealed", "than these 1,024")
GIVEN = [Given(PAGE, words, "setting") for words in SETTINGS]
