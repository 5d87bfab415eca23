"""Figures of docs/results/sparsegrad.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from claims_cards import MANY, SHAPES, paper_to_ours
from documents import Claim, Given
from measured import RESULTS, STORIES, bench, mean, memory_to_lora, scores, step, time_to_lora

PAGE = "docs/results/sparsegrad.md"
LEAN = "bench_checkpointed"
ON_OUTPUT = "{}, delta on the output"
ROWS = {
    "frozen model, the floor": "frozen",
    "SparseGrad": "sparsegrad",
    "MeProp, static": "meprop",
    "SparseGrad, dynamic, regular product": "sparsegrad-dynamic",
    "SparseGrad, dynamic, sparse-by-dense": "sparsegrad-dynamic, sparse-by-dense",
    "literal paper layer": "paper layer",
    "full fine-tuning of the same weights": "full",
}


def claim(template: str, values: Callable[[], Iterable[object]]) -> Claim:
    """A sentence of the page."""
    return Claim(PAGE, template, values)


def spread(shape: str, contender: str, file: str = "bench") -> list[float]:
    """Median, least and greatest of the ratios to LoRA's time."""
    ratio = step(shape, contender, file)["to_lora"]
    return [ratio["median"], ratio["min"], ratio["max"]]


def memory(shape: str, contender: str, file: str = "bench") -> list[float]:
    """Bytes kept and at the peak, as ratios to LoRA's."""
    return [memory_to_lora(shape, contender, kind, file) for kind in ("kept", "peak")]


def row(shape: str, label: str) -> Claim:
    """A row of the table of a shape."""

    def values() -> list[float]:
        one = step(shape, ROWS[label])
        return [one["trained"], *spread(shape, ROWS[label]), one["cpu_to_lora"]["median"], *memory(shape, ROWS[label])]

    return claim(f"| {label} | {{:,}} | {{:.2f}} ({{:.2f}}–{{:.2f}}) | {{:.2f}} | {{:.2f}} | {{:.2f}} |", values)


def row_of_many_tokens(label: str, contender: str, template: str) -> Claim:
    """A row of the table with 4,096 tokens, which has both shapes."""
    pair = list(zip(SHAPES, MANY, strict=True))
    cells = " | ".join(2 * [f"{template} ({{:.2f}}–{{:.2f}}) | {{:.2f}}, {{:.2f}}"])
    return claim(
        f"| {label} | {cells} |",
        lambda: [each for s, file in pair for each in (*spread(s, contender, file), *memory(s, contender, file))],
    )


def many(contender: str) -> list[float]:
    """The ratio to LoRA's time with 4,096 tokens, at both shapes."""
    return [time_to_lora(shape, contender, file) for shape, file in zip(SHAPES, MANY, strict=True)]


def few(contender: str, batch: str = "full batch") -> list[float]:
    """The ratio to LoRA's time with 1,024 and 512 tokens."""
    return [time_to_lora(shape, contender, batch=batch) for shape in SHAPES]


def half_padding() -> list[float]:
    """The ratios of the sparse-by-dense and of the regular product, for each shape."""
    products = [
        few(ROWS[f"SparseGrad, dynamic, {name}"], "half padding") for name in ("sparse-by-dense", "regular product")
    ]
    return [ratio for shape in zip(*products, strict=True) for ratio in shape]


def compiled() -> list[float]:
    """The ratio to LoRA's time with and without `torch.compile`, at both shapes."""
    names = ("sparsegrad, compiled", "sparsegrad")
    return [time_to_lora(shape, name, "bench_compiled") for shape in SHAPES for name in names]


def short(angle: float) -> str:
    """An angle as in 4.0e-5."""
    return f"{angle:.1e}".replace("e-0", "e-")


def row_of_warm_up(name: str, label: str) -> Claim:
    """A row of the table of warm-ups."""

    def values() -> list[object]:
        one = bench()["warmup"]["methods"][name]
        angle = short(max(one["angle_in"], one["angle_out"]))
        held = [held / 1e6 for held in one["held_bytes"].values()]
        return [one["speed_ratio"], one["sweeps"], *held, one["peak_bytes"] / 1e6, angle, one["energy"]]

    return claim(f"| {label} | {{:.1f}} × | {{}} | {{:.1f}} / {{:.1f}} MB | {{:.0f}} MB | {{}} | {{:.2%}} |", values)


def of_three_svds() -> list[float]:
    """Megabytes at the peak, and share of the energy."""
    one = bench()["warmup"]["methods"]["stacked SVD"]
    return [one["peak_bytes"] / 1e6, one["energy"]]


def two_bases() -> list[float]:
    """Mean losses with two narrow bases and of the default, on seeds 0 to 2."""
    default = scores(STORIES, "sparsegrad", file="ablation")
    return [mean(STORIES, "sparsegrad, rank 19", file="ablation"), sum(default[seed] for seed in range(3)) / 3]


def row_of_checkpointed(label: str, contender: str, template: str = "{:.2f}") -> Claim:
    """A row of the table with columns and gradient checkpointing, which has both shapes."""
    cells = " | ".join(2 * [f"{template} ({{:.2f}}–{{:.2f}}) | {{:.2f}}, {{:.2f}}"])
    return claim(
        f"| {label} | {cells} |",
        lambda: [each for s in SHAPES for each in (*spread(s, contender, LEAN), *memory(s, contender, LEAN))],
    )


def peaks_checkpointed(contender: str) -> list[float]:
    """The peak as a ratio to LoRA's, both with gradient checkpointing, at both shapes."""
    names = [f"{name}, gradient checkpointing" for name in (contender, "lora")]
    pairs = [[step(shape, name, LEAN)["peak_bytes"] for name in names] for shape in SHAPES]
    return [own / lora for own, lora in pairs]


def on_mpnet(name: str, method: str = "SparseGrad 1%") -> float:
    """What a method takes on CoLA as a share of what LoRA of rank 8 does."""
    return cost_on_mpnet(method)[name] / cost_on_mpnet("LoRA r=8")[name]


def cost_on_mpnet(method: str) -> dict[str, Any]:
    """The costs of a method on CoLA."""
    lines = map(json.loads, (RESULTS / "frontier_costs_mpnet.jsonl").read_text("utf-8").splitlines())
    return next(line for line in lines if (line["task"], line["method"]) == ("cola", method))


def readings(shape: str) -> list[float]:
    """The default's step as a ratio to LoRA's with few tokens, in each of the benchmarks that timed it."""
    return [time_to_lora(shape, "sparsegrad", file) for file in ("bench", LEAN, "bench_variants", "bench_compiled")]


CHECKPOINTED = [
    ("**`sparsegrad`**", "sparsegrad", "**{:.2f}**"),
    ("**`columns`**", "columns", "**{:.2f}**"),
    ("LoRA, checkpointed", "lora, gradient checkpointing"),
    ("`sparsegrad`, checkpointed", "sparsegrad, gradient checkpointing"),
    ("`columns`, checkpointed", "columns, gradient checkpointing"),
]
SAYS = [
    claim(
        "- **The default keeps {:.2f} and {:.2f} of LoRA's bytes** (the target is 0.85), at {:.2f} and {:.2f} "
        "of its peak.",
        lambda: [*(memory(shape, "sparsegrad")[kind] for kind in (0, 1) for shape in SHAPES)],
    ),
    claim(
        "- **Its step is LoRA's, a few percent more or less**: {:.2f} and {:.2f} of it here, and in the other "
        "tables and files of this page {:.2f}, {:.2f} and {:.2f} at BERT's shape, {:.2f}, {:.2f} and {:.2f} at "
        "LLaMA's. The target is 1.",
        lambda: [
            *(readings(shape)[0] for shape in SHAPES),
            *(each for shape in SHAPES for each in readings(shape)[1:]),
        ],
    ),
    claim(
        "- **With 4,096 tokens it takes {:.2f} and {:.2f} of LoRA's time**, keeps {:.2f} and {:.2f} of the "
        "bytes, and its peak is {:.2f} and {:.2f} of LoRA's. In 16 bits no weight is written out, and the "
        "delta stays on the output.",
        lambda: [
            *many("sparsegrad"),
            *(
                memory(shape, "sparsegrad", file)[kind]
                for kind in (0, 1)
                for shape, file in zip(SHAPES, MANY, strict=True)
            ),
        ],
    ),
    claim(
        "- On mpnet with CoLA's batches of 32, in bfloat16, its step takes {:.2f} of LoRA's of rank 8, and it "
        "keeps {:.2f}, at {:.2f} of the peak ([file](frontier_costs_mpnet.jsonl)).",
        lambda: [on_mpnet(name) for name in ("seconds_per_step", "kept_memory", "peak_memory")],
    ),
    claim(
        "- **`columns` keeps as much and steps a little faster**: {:.2f} and {:.2f} of LoRA's step, and {:.2f} "
        "on mpnet.",
        lambda: [
            *(time_to_lora(shape, "columns", LEAN) for shape in SHAPES),
            on_mpnet("seconds_per_step", "SparseGrad columns 1%"),
        ],
    ),
    claim(
        "- **What both save are activations. With gradient checkpointing nothing much is left to save**: the "
        "peak of the default is {:.2f} and {:.2f} of LoRA's there, that of `columns` {:.2f} and {:.2f}.",
        lambda: [*peaks_checkpointed("sparsegrad"), *peaks_checkpointed("columns")],
    ),
    claim(
        "- **A core as wide as the weight is affordable in float32**: MeProp's step takes {:.2f} and {:.2f} of "
        "LoRA's with 4,096 tokens, and {:.2f} and {:.2f} where the delta stays on the output.",
        lambda: [*many("meprop"), *many(ON_OUTPUT.format("meprop"))],
    ),
    claim(
        "- **The literal paper layer takes {:.1f} and {:.1f} times the default's step**; on the LLaMA shape "
        "the target of 3 is missed.",
        lambda: map(paper_to_ours, SHAPES),
    ),
    claim(
        "- The paper's gain from the sparse-by-dense product (table 3: five times faster) is not there for us: "
        "in a narrow core that product is a small part. On batches of which half is padding it was no faster "
        "either ({:.2f} against {:.2f}, {:.2f} against {:.2f}). `delta_product(..., skip_zeros=True)` keeps "
        "it; the layer does not use it.",
        half_padding,
    ),
]
COMPILED_SAYS = [
    claim("BERT {:.2f} of LoRA's step with and {:.2f} without, LLaMA {:.2f} and {:.2f};", compiled),
    claim(
        "LoRA itself takes {:.2f} and {:.2f} of it with.",
        lambda: [time_to_lora(shape, "lora, compiled", "bench_compiled") for shape in SHAPES],
    ),
]
CLAIMS = [
    *(row_of_checkpointed(*cells) for cells in CHECKPOINTED),
    *SAYS,
    *COMPILED_SAYS,
    *(claim("| LoRA | {:,} | 1 |", lambda s=shape: [step(s, "lora")["trained"]]) for shape in SHAPES),
    *(row(shape, label) for shape in SHAPES for label in ROWS),
    row_of_many_tokens("**SparseGrad**", "sparsegrad", "**{:.2f}**"),
    row_of_many_tokens("MeProp, static", "meprop", "{:.2f}"),
    *(
        row_of_many_tokens("the same, delta on the output", ON_OUTPUT.format(name), "{:.2f}")
        for name in ("sparsegrad", "meprop")
    ),
    claim("| three SVDs | 1 | | | {:.0f} MB | | {:.2%} |", of_three_svds),
    row_of_warm_up("exact", "exact Gram matrices"),
    row_of_warm_up("sketch", "sketch"),
    claim(
        "the sketch captures {:.0%}, {:.0%}, {:.0%}, {:.0%}, {:.0%} and {:.0%} of",
        lambda: bench()["warmup"]["flat spectrum"]["sketch_share_by_sweep"],
    ),
    claim("`stories260k` ({:.3f} against {:.3f}, both renewed", two_bases),
]
SETTINGS = ("Density 1%", "(the target is 0.85)", "4,096 tokens", "adds less than 0.5%")
GIVEN = [Given(PAGE, words, "setting") for words in SETTINGS]
