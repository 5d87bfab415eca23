"""Figures of the method cards."""

from __future__ import annotations

import itertools
import math

from documents import Claim, Given
from measured import (
    COLA,
    STORIES,
    STSB,
    differences,
    graddrop,
    lead,
    mean,
    recorded,
    seeds_ahead,
    standing,
    step,
)

from peft_sparsegrad.functional.delta_linear import writing_out_pays

SPARSEGRAD, GRADDROP = (f"peft_sparsegrad/{method}/README.md" for method in ("sparsegrad", "graddrop"))
SHAPES = ("bert", "llama")
MANY = ("bench_bert_4096", "bench_llama_4096")
FULL_BASES, WIDE = "sparsegrad, rank full", "sparsegrad, basis identity"


def means(task: str) -> list[float]:
    """The mean dev losses of the table in the README."""
    return [mean(task, label) for label in ("sparsegrad", "lora", "meprop")]


def standings(task: str) -> list[str]:
    """Where SparseGrad stands to LoRA and to static MeProp."""
    return [standing(task, "sparsegrad", other) for other in ("lora", "meprop")]


def paper_to_ours(shape: str) -> float:
    """The literal paper layer's step as a ratio to the default's."""
    return step(shape, "paper layer")["to_sparsegrad"]["median"]


def tokens_from_which_the_weight_is_written_out() -> int:
    """Least tokens of a batch, to hundreds, at BERT base's `intermediate.dense` with the rank that it has at 1%."""
    tokens = next(n for n in itertools.count(1) if writing_out_pays(n, (3072, 768), (None, 32)))
    return round(tokens, -2)


def of_two_benches(contender: str, what, *arguments: str) -> list[float]:
    """A ratio at BERT's and LLaMA's shape with 4,096 tokens, then with few."""
    many = [what(shape, contender, *arguments, file) for shape, file in zip(SHAPES, MANY, strict=True)]
    return many + [what(shape, contender, *arguments) for shape in SHAPES]


def file_to_default(label: str, file: str) -> float:
    """Bytes of an adapter file on the language model as a ratio to the default's."""
    return recorded(STORIES, label, "adapter_bytes", file) / recorded(STORIES, "sparsegrad", "adapter_bytes")


def correlation(label: str) -> float:
    """Mean correlation on STS-B, of GradDrop's runs."""
    return mean(STSB, label, "metric", "graddrop")


CLAIMS = [
    Claim(SPARSEGRAD, "from about {:,} ", lambda: [tokens_from_which_the_weight_is_written_out()]),
    Claim(
        SPARSEGRAD,
        "default in {} seeds, {:.4f} against {:.4f},",
        lambda: [
            seeds_ahead(STORIES, FULL_BASES, "sparsegrad", "ablation"),
            mean(STORIES, FULL_BASES, file="ablation"),
            mean(STORIES, FULL_BASES, file="ablation")
            - sum(differences(STORIES, FULL_BASES, "sparsegrad", file="ablation").values()) / 3,
        ],
    ),
    Claim(
        SPARSEGRAD,
        '(`"sparsegrad-dynamic"`) in {}, {:.4f} against {:.4f}.',
        lambda: [
            seeds_ahead(STORIES, "sparsegrad-dynamic", "sparsegrad"),
            mean(STORIES, "sparsegrad-dynamic"),
            mean(STORIES, "sparsegrad"),
        ],
    ),
    Claim(
        SPARSEGRAD,
        "On STS-B a dynamic support is {}, by {:.3f}, and on CoLA {}.",
        lambda: [
            standing(STSB, "sparsegrad-dynamic", "sparsegrad"),
            lead(STSB, "sparsegrad", "sparsegrad-dynamic")[0],
            standing(COLA, "sparsegrad-dynamic", "sparsegrad"),
        ],
    ),
    Claim(
        SPARSEGRAD,
        "Full bases make the file {:.1f} times as large there, a dynamic support {:.1f} times",
        lambda: [
            file_to_default(FULL_BASES, "ablation"),
            file_to_default("sparsegrad-dynamic", "comparison"),
        ],
    ),
    Claim(SPARSEGRAD, "takes {:.1f} and {:.1f} times the default's step", lambda: map(paper_to_ours, SHAPES)),
    Claim(
        GRADDROP,
        "takes as long as plain fine-tuning's, {:.2f} and {:.2f} times",
        lambda: [graddrop(shape, "layer-graddrop")["to_full"]["median"] for shape in SHAPES],
    ),
    Claim(
        GRADDROP,
        "times the plain one: {:.2f} times at `p=0.2`, {:.2f} at `p=0.9`",
        lambda: [1 / math.sqrt(1 - p) for p in (0.2, 0.9)],
    ),
]
TABLE_X = "table X of the GradDrop paper"
GIVEN = [
    Given(SPARSEGRAD, "0.9 GiB for a 7B model", "tests/figures/test_printed_tables.py"),
    Given(SPARSEGRAD, "Trains about 1% of each", "setting"),
    Given(SPARSEGRAD, "the smallest 30% of the values", "setting"),
    Given(SPARSEGRAD, "| 0.01 | the paper's; at 0.8%,", "tables 11 and 12 of the SparseGrad paper"),
    Given(SPARSEGRAD, "averages are 0.7 (BERT) and 0.2 (RoBERTa) lower", "tables 11 and 12 of the SparseGrad paper"),
    Given(GRADDROP, "plain fine-tuning has 77.45", TABLE_X),
    *(Given(GRADDROP, f"| a step | {score} |", TABLE_X) for score in ("78.17", "**78.77**", "77.98", "78.52")),
    *(Given(GRADDROP, f"| an epoch | {score} |", TABLE_X) for score in ("78.64", "77.02", "74.40")),
    *(Given(GRADDROP, words, "setting") for words in ("probability 0.8", "probability 0.1", "| 0.2; 0.9 where")),
    Given(GRADDROP, "keeps the largest 1% of each tensor", "setting"),
]
