"""Figures of docs/results/comparison.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import fmean

from documents import Claim, Given
from measured import (
    COLA,
    STORIES,
    STSB,
    all_series,
    best_rate,
    differences,
    lead,
    mean,
    mean_sd,
    recorded,
    scores,
    scores_at,
    seeds_ahead,
    standing,
    time_to_lora,
)

from benchmarks.compare.difference import interval, verdict

PAGE, TODAY = "docs/results/comparison.md", "input_sides"
DYNAMIC, PAPERS_MEPROP, WIDE = "sparsegrad-dynamic", "meprop-paper", "sparsegrad, basis identity"


def claim(template: str, values: Callable[[], Iterable[object]]) -> Claim:
    """A sentence of the page."""
    return Claim(PAGE, template, values)


def by(task: str, label: str, other: str, file: str = "comparison") -> float:
    """The loss that a method has less than another, the mean over the seeds."""
    return lead(task, label, other, file)[0]


def without_the_worst_of_lora() -> list[float]:
    """LoRA's worst loss on STS-B, and the means of SparseGrad and LoRA without that seed."""
    lora, own = scores(STSB, "lora"), scores(STSB, "sparsegrad")
    worst = max(lora, key=lora.__getitem__)
    return [lora[worst], *(fmean(each[seed] for seed in lora if seed != worst) for each in (own, lora))]


def after_the_warm_up() -> str:
    """`level` if the interval of LoRA's loss with more steps, less SparseGrad's, has 0 in it."""
    longer, own = scores(STORIES, "lora", file="lora_longer"), scores(STORIES, "sparsegrad")
    return verdict(*interval([longer[seed] - own[seed] for seed in own]), False)


def metrics(task: str, *labels: str) -> list[float]:
    """Means of the metric."""
    return [mean(task, label, "metric") for label in labels]


def short(rate: float) -> str:
    """A learning rate as in 3e-4."""
    return f"{rate:.0e}".replace("e-0", "e-")


def longer(label: str) -> list[float]:
    """Loss and correlation on CoLA after three epochs, with deviations."""
    return [*mean_sd(COLA, label, file="cola_longer"), *mean_sd(COLA, label, "metric", "cola_longer")]


def at_a_higher_rate(score: str) -> float:
    """SparseGrad's mean score after three epochs of CoLA at 1e-3."""
    return fmean(scores_at(1e-3, COLA, "sparsegrad", score, "cola_longer").values())


def times_the_file() -> float:
    """Bytes of the file with a dynamic support as a ratio to the default's."""
    return recorded(STORIES, DYNAMIC, "adapter_bytes") / recorded(STORIES, "sparsegrad", "adapter_bytes")


def gradient_of_the_core(task: str) -> float:
    """Megabytes of the core's gradient, which has an entry for each value of a dynamic support."""
    return recorded(task, DYNAMIC, "trained_parameters") * 4 / 1e6


def times_the_values() -> float:
    """Values that train with a dynamic support, as a ratio to the default's."""
    return recorded(STORIES, DYNAMIC, "trained_parameters") / recorded(STORIES, "sparsegrad", "trained_parameters")


def labels() -> set[str]:
    """The methods of the comparison, with their settings."""
    return {label for _, label in all_series("comparison")}


def lead_of_todays_default() -> list[object]:
    """Where the default stands to LoRA with a warm-up of 8 passes, and its lead: mean and interval."""
    own, lora = scores(STORIES, "sparsegrad", file="shorter_warmup"), scores(STORIES, "lora")
    ahead = [lora[seed] - own[seed] for seed in own]
    low, high = interval(ahead)
    return [verdict(low, high, True), fmean(ahead), f"{low:.3f}".replace("-", "−"), high, len(ahead)]


def row_of_today(label: str, less: str, file: str = "comparison") -> Claim:
    """A row of the table of today's default: the difference to it, mean and interval, and where it stands."""

    def cells(task: str) -> list[object]:
        own, others = scores(task, "sparsegrad", file=TODAY), scores(task, less, file=file)
        ahead = [others[seed] - own[seed] for seed in own if seed in others]
        low, high = interval(ahead)
        return [fmean(ahead), low, high, {"better": "ahead", "worse": "behind"}.get(v := verdict(low, high, True), v)]

    return claim(
        f"| {label} | " + " | ".join(3 * ["{:+.3f} ({:+.3f} to {:+.3f}), {}"]) + " |",
        lambda: [each for task in (STORIES, STSB, COLA) for each in cells(task)],
    )


CLAIMS = [
    claim(
        "| today's default | {:.3f} ± {:.3f} | {:.3f} ± {:.3f} | {:.3f} ± {:.3f} |",
        lambda: [each for task in (STORIES, STSB, COLA) for each in mean_sd(task, "sparsegrad", file=TODAY)],
    ),
    row_of_today("LoRA has more by", "lora"),
    row_of_today("the earlier default, 64 passes, has more by", "sparsegrad"),
    claim(
        "with 8 passes too, has {:+.4f} on the instructions",
        lambda: [mean(STORIES, "sparsegrad", file="shorter_warmup") - mean(STORIES, "sparsegrad", file=TODAY)],
    ),
    claim(
        "8 passes it is {} there**: {:.3f} ahead of LoRA (95% interval {} to {:.3f}), {} seeds at the same rate",
        lead_of_todays_default,
    ),
    claim(
        "SparseGrad is {} of LoRA**, by {:.3f} in dev loss (95% interval {:.3f} to {:.3f}, ahead in {} seeds)",
        lambda: [
            standing(STORIES, "sparsegrad", "lora"),
            *lead(STORIES, "sparsegrad", "lora"),
            seeds_ahead(STORIES, "sparsegrad", "lora"),
        ],
    ),
    claim(
        "it is ahead by {:.3f} and {:.3f}.",
        lambda: [-differences(STORIES, "sparsegrad", "lora")[seed] for seed in (3, 4)],
    ),
    claim("If LoRA trains on for what the warm-up costs, it is {}.**", lambda: [after_the_warm_up()]),
    claim(
        "LoRA with {} steps is at {:.4f} ± {:.4f} ([lora_longer.jsonl](lora_longer.jsonl)) against SparseGrad's "
        "{:.4f} ± {:.4f} with {}",
        lambda: [
            recorded(STORIES, "lora", "steps", "lora_longer"),
            *mean_sd(STORIES, "lora", file="lora_longer"),
            *mean_sd(STORIES, "sparsegrad"),
            recorded(STORIES, "sparsegrad", "steps"),
        ],
    ),
    claim(
        "**STS-B: {} with LoRA.** SparseGrad is ahead in the mean ({:.3f} against {:.3f} in loss, {:.3f} against "
        "{:.3f} in correlation), but one of LoRA's five runs ended badly ({:.3f}), and without that seed the means "
        "are {:.3f} and {:.3f}.",
        lambda: [
            standing(STSB, "sparsegrad", "lora"),
            mean(STSB, "sparsegrad"),
            mean(STSB, "lora"),
            *metrics(STSB, "sparsegrad", "lora"),
            *without_the_worst_of_lora(),
        ],
    ),
    claim(
        "static MeProp is {} of SparseGrad** in {} seeds, by {:.3f} (95% interval {:.3f} to {:.3f}), and {} with "
        "LoRA.",
        lambda: [
            standing(STSB, "meprop", "sparsegrad"),
            seeds_ahead(STSB, "meprop", "sparsegrad"),
            *lead(STSB, "meprop", "sparsegrad"),
            standing(STSB, "meprop", "lora"),
        ],
    ),
    claim(
        "takes {:.2f} times LoRA's in float32, {:.2f} (BERT) and {:.2f} (LLaMA)",
        lambda: [
            time_to_lora("bert", "meprop"),
            time_to_lora("bert", "meprop, delta on the output", "bench_bert_4096"),
            time_to_lora("llama", "meprop, delta on the output", "bench_llama_4096"),
        ],
    ),
    claim(
        "On the language model it is {} SparseGrad and LoRA.",
        lambda: {standing(STORIES, "meprop", other) for other in ("sparsegrad", "lora")},
    ),
    claim(
        "{} with the default on STS-B ({:.3f} ahead) and on CoLA ({:.3f} behind), and ahead by {:.3f} on the language",
        lambda: [
            *{standing(task, WIDE, "sparsegrad") for task in (STSB, COLA)},
            by(STSB, WIDE, "sparsegrad"),
            -by(COLA, WIDE, "sparsegrad"),
            by(STORIES, WIDE, "sparsegrad", "ablation"),
        ],
    ),
    claim(
        "is at {:.3f}, Super-Tuning at {:.3f} and SHiRA at {:.3f}, behind SparseGrad in {} seeds and in {}.",
        lambda: [
            *(mean(STSB, label) for label in ("full", "supertuning", "shira")),
            *(seeds_ahead(STSB, "sparsegrad", other) for other in ("supertuning", "shira")),
        ],
    ),
    claim(
        "SparseGrad is {} of LoRA in dev loss**, by {:.3f} (95% interval {:.3f} to {:.3f}), and of static MeProp, by "
        "{:.3f} ({:.3f} to {:.3f}); {} with SHiRA and Super-Tuning ({:.3f} behind each); full fine-tuning is ahead "
        "by {:.3f}.",
        lambda: [
            standing(COLA, "sparsegrad", "lora"),
            *lead(COLA, "sparsegrad", "lora"),
            *lead(COLA, "sparsegrad", "meprop"),
            *{standing(COLA, "sparsegrad", other) for other in ("shira", "supertuning")},
            *{round(by(COLA, other, "sparsegrad"), 3) for other in ("shira", "supertuning")},
            by(COLA, "full", "sparsegrad"),
        ],
    ),
    claim(
        "By Matthews correlation it is {} with LoRA: all are near the majority class still ({:.3f} against {:.3f}, "
        "SHiRA {:.3f}, full {:.3f}).",
        lambda: [
            standing(COLA, "sparsegrad", "lora", "metric"),
            *metrics(COLA, "sparsegrad", "lora", "shira", "full"),
        ],
    ),
    claim(
        "**CoLA, {:,} steps (three epochs), 3 seeds: {}.** SparseGrad {:.3f} ± {:.3f} in dev loss and {:.3f} ± "
        "{:.3f} in Matthews correlation, LoRA {:.3f} ± {:.3f} and {:.3f} ± {:.3f}. Best rates {} (the lowest of "
        "three tried) and {}",
        lambda: [
            recorded(COLA, "sparsegrad", "steps", "cola_longer"),
            standing(COLA, "sparsegrad", "lora", file="cola_longer"),
            *longer("sparsegrad"),
            *longer("lora"),
            short(best_rate(COLA, "sparsegrad", "cola_longer")),
            short(best_rate(COLA, "lora", "cola_longer")),
        ],
    ),
    claim(
        "SparseGrad's dev loss is at {:.3f} and its correlation at {:.3f} (",
        lambda: map(at_a_higher_rate, ("loss", "metric")),
    ),
    claim(
        "(SparseGrad {:.3f} against {:.3f}, MeProp {:.3f} against {:.3f})",
        lambda: [mean(STORIES, label) for label in (DYNAMIC, "sparsegrad", PAPERS_MEPROP, "meprop")],
    ),
    claim(
        "dynamic SparseGrad is {} static by {:.3f} (95% interval {:.3f} to {:.3f}), on CoLA {} ({:.3f} behind); "
        "MeProp as published is {:.3f} and {:.3f} behind static MeProp, {}.",
        lambda: [
            standing(STSB, DYNAMIC, "sparsegrad"),
            *lead(STSB, "sparsegrad", DYNAMIC),
            standing(COLA, DYNAMIC, "sparsegrad"),
            by(COLA, "sparsegrad", DYNAMIC),
            *(by(task, "meprop", PAPERS_MEPROP) for task in (STSB, COLA)),
            *{standing(task, PAPERS_MEPROP, "meprop") for task in (STSB, COLA)},
        ],
    ),
    claim("whole core, {:.0f} times as many values for SparseGrad, ", lambda: [times_the_values()]),
    claim("its file is {:.1f} times as large.", lambda: [times_the_file()]),
    claim(
        "it is ahead of dynamic SparseGrad on STS-B (by {:.3f}) and behind on CoLA (by {:.3f}).",
        lambda: [by(STSB, PAPERS_MEPROP, DYNAMIC), by(COLA, DYNAMIC, PAPERS_MEPROP)],
    ),
    claim("Full fine-tuning of the language model's weights is at {:.3f}.", lambda: [mean(STORIES, "full")]),
    claim("as published, `paper`, has {} run here", lambda: ["a" if "paper" in labels() else "no"]),
    claim(
        "missed then: {:.1f} MB on `stories260k`, {:.1f} MB on MiniLM.",
        lambda: map(gradient_of_the_core, (STORIES, STSB)),
    ),
]


SETTINGS = (
    "(95% interval",
    "with 95% intervals",
    "at 1e-3 whatever",
    "With 1e-3 and two",
    "decay 0.01",
    "after 6% of",
    "Density 0.0215",
    "at rate 2e-2",
)
GIVEN = [Given(PAGE, words, "setting") for words in SETTINGS]
