"""Figures of the guides and of the READMEs of the examples."""

from __future__ import annotations

import json
from functools import cache
from math import log2
from statistics import fmean
from typing import Any

from claims_frontier import EIGHT, WIDER, less
from documents import Claim, Given
from measured import RESULTS, STORIES, scores
from transformers import LlamaConfig

from benchmarks.rank_memory import llama_7b
from peft_sparsegrad import SparseGradConfig
from peft_sparsegrad.functional import packed_support_size
from peft_sparsegrad.functional.core_size import core_ranks, num_trained_values

CHAT, GLUE, DENSITY = "examples/llama2_chat/README.md", "examples/glue/README.md", "docs/guides/density-and-rank.md"
NOTES = "docs/design-notes.md"
GPUS = "docs/guides/many-gpus.md"
LLAMA = LlamaConfig()  # 7B
VALUES = 22 * 100_000  # up and down projections of every third block
NF4 = (4 + 8 / 64 + 32 / 64 / 256) / 8  # bytes of a weight, with scales of 64 that are quantised themselves


def support_bytes() -> tuple[float, float]:
    """Bytes a value of a support in the default slack, and the least that any exact form can have on average."""
    slack, k = SparseGradConfig().slack, 100_000
    entropy = slack * (-log2(1 / slack) / slack - (1 - 1 / slack) * log2(1 - 1 / slack))
    return packed_support_size(int(slack * k), k) / k, entropy / 8


@cache
def parameters() -> tuple[int, int]:
    """Parameters of LLaMA-2 7B, and those in the linear layers of its blocks."""
    model = llama_7b()
    linear = [p.numel() for name, p in model.named_parameters() if name.endswith("proj.weight")]
    return sum(p.numel() for p in model.parameters()), sum(linear)


def billions(count: float) -> float:
    """A number of parameters or bytes, in 10⁹."""
    return count / 1e9


def in_16_bits() -> list[float]:
    """Billions of weights, and their gigabytes."""
    return [billions(parameters()[0]), billions(2 * parameters()[0])]


def in_4_bits() -> list[float]:
    """Billions of quantised weights, bytes of each, billions of others, and gigabytes of all."""
    whole, linear = parameters()
    return [billions(linear), NF4, billions(whole - linear), billions(linear * NF4 + 2 * (whole - linear))]


def all_weights() -> list[float]:
    """Billions of the weights that train in full fine-tuning, billions of the others, and gigabytes with AdamW."""
    trained = 22 * LLAMA.hidden_size * LLAMA.intermediate_size
    rest = parameters()[0] - trained
    return [billions(trained), billions(rest), billions(16 * trained + 2 * rest)]


def less_the_default(label: str, file: str = "input_sides") -> float:
    """Dev loss on the small language model less the default's, the mean over seeds 0 to 2."""
    own, default = scores(STORIES, label, file=file), scores(STORIES, "sparsegrad", file="input_sides")
    return fmean(own[seed] - default[seed] for seed in range(3))


def row_of_table_6(label: str, method: str) -> Claim:
    """A row of table 6 on SmolLM2: trained parameters, their share, validation loss, and bytes."""

    def values() -> list[float]:
        run = runs_of_table_6()[method]
        trained, sizes = run["trainable_parameters"], [run[name] / 1e6 for name in ("peak_step_bytes", "saved_bytes")]
        return [trained, trained / run["model_parameters"], run["validation_loss_after"], *sizes]

    return Claim(CHAT, f"| {label} | {{:,}} | {{:.2%}} | {{:.3f}} | {{:,.0f}} | {{:,.1f}} |", values)


@cache
def runs_of_table_6() -> dict[str, dict[str, Any]]:
    """What `compare` has written of SmolLM2, by method."""
    runs = map(json.loads, (RESULTS / "table6_smollm2.jsonl").read_text("utf-8").splitlines())
    return {run["settings"]["method"]: run for run in runs}


def rank_of_bert() -> int:
    """Columns of the largest transition matrix of an MLP layer of BERT base, with the default settings."""
    k, slack = num_trained_values(3072, 768, 0.01), SparseGradConfig().slack
    ranks = [*core_ranks(3072, 768, k, "auto", slack), *core_ranks(768, 3072, k, "auto", slack)]
    return max(r for r in ranks if r is not None)


CLAIMS = [
    row_of_table_6("regular fine-tuning", "full"),
    row_of_table_6("LoRA, rank 32", "lora"),
    *(row_of_table_6(f"`{name}`", name) for name in ("paper", "meprop-paper", "sparsegrad")),
    Claim(
        CHAT,
        "validation loss, before {:.3f}",
        lambda: {run["validation_loss_before"] for run in runs_of_table_6().values()},
    ),
    Claim(NOTES, "{:.2f} bytes a value, where no exact form can have less than {:.2f} on average", support_bytes),
    Claim(CHAT, "alone, for {:.2f} billion parameters of which {:.2f} are", lambda: map(billions, parameters())),
    Claim(CHAT, "| weights in bf16 | {:.2f}e9 × 2 | {:.1f} |", in_16_bits),
    Claim(CHAT, "head in bf16 | {:.2f}e9 × {:.3f} + {:.2f}e9 × 2 | {:.1f} |", in_4_bits),
    Claim(CHAT, "moments, float32 | {:.1f}e6 × 16 | {:.2f} |", lambda: [VALUES / 1e6, billions(16 * VALUES)]),
    Claim(CHAT, "float32 | {:.1f}e6 × 4 × 4 | {:.2f} |", lambda: [VALUES / 1e6, billions(16 * VALUES)]),
    Claim(CHAT, "32 × 2048 × 4096 × 2 | {:.2f} |", lambda: [billions(32 * 2048 * LLAMA.hidden_size * 2)]),
    Claim(CHAT, "of them, float32 | {:.2f}e9 × 16 + {:.2f}e9 × 2 | {:.1f} |", all_weights),
    Claim(
        DENSITY,
        "12 entries a value −{:.3f}, columns +{:.3f}, LoRA +{:.3f}",
        lambda: [
            -less_the_default("sparsegrad, slack 12"),
            less_the_default("columns"),
            less_the_default("lora", "comparison"),
        ],
    ),
    Claim(DENSITY, "12 in place of 4 took off {:.3f}", lambda: [-fmean(less(EIGHT, WIDER))]),
    Claim("docs/guides/serving.md", "{} for BERT base at 1%", lambda: [rank_of_bert()]),
]
TABLE_6 = "tests/examples/llama2_chat/test_llama2_table6.py"
PAPER_6 = "table 6 of the SparseGrad paper"
PAPER_5 = "section 5 of the SparseGrad paper"
ENGINES = "tests/distributed/test_engines.py"
PICTURE = "setting of docs/pictures.py"
GIVEN = [
    *(
        Given(CHAT, words, "setting")
        for words in ("One 24 GB GPU", "80 of 100 message trees", "in 20 steps and the other 20")
    ),
    Given(CHAT, "paper's rate of 9e-4", PAPER_5),
    Given(CHAT, "should fit in 24 GB", "setting"),
    Given(CHAT, "100,000 values in each, learning rate 9e-4 and one epoch", PAPER_5),
    Given(CHAT, "100,000 in each layer", PAPER_5),
    Given(CHAT, "22 × 100,000 values", PAPER_5),
    *(Given(CHAT, words, PAPER_6) for words in ("| 22% |", "| 0.5% |", "the table's 22%")),
    *(Given(CHAT, words, TABLE_6) for words in ("14.7%; 22.1%", "| 0.16% |", "| 0.03% |", "0.46%")),
    Given(CHAT, "within 1e-5 of one process", "tests/distributed/test_accelerate_fsdp2.py"),
    Given(GLUE, "from 1e-6 to 1e-1", PAPER_5),
    Given(GLUE, "an MLP layer 0.03 mln", "tests/examples/glue/test_glue_model.py"),
    Given(GLUE, "are 2.36 mln", "tests/examples/glue/test_glue_table.py"),
    Given("examples/xglue/README.md", "linear decay after 6% of the steps", "setting"),
    Given("examples/xglue/README.md", "and 0.2 for", "the GradDrop paper's rate, section IV"),
    Given(GLUE, "in the first 6% of the steps", "setting, experiments/training.py"),
    Given(GLUE, "their whole core, 2.36 mln a layer", "tests/examples/glue/test_glue_model.py"),
    Given(GLUE, "a step moves 1%", "setting"),
    Given(GLUE, "the paper's 0.03 mln", "the SparseGrad paper, table 4"),
    Given(DENSITY, "at 0.8%, the least", "tables 11 and 12 of the SparseGrad paper"),
    Given(DENSITY, "runs use 100,000", PAPER_5),
    *(
        Given("docs/guides/many-gpus.md", words, ENGINES)
        for words in ("within 1e-5 of", "at most 5%", "within 30% of")
    ),
    Given("docs/guides/many-gpus.md", "to within 1e-5 of the uninterrupted run", "tests/distributed/test_dcp.py"),
    Given(GPUS, "keeps 1.2 GiB", "tests/figures/test_printed_tables.py"),
    Given("docs/guides/resume.md", "safetensors 0.8 and later", "pyproject.toml"),
    Given("docs/guides/serving.md", "BERT base at 1%", "setting"),
    Given("docs/guides/serving.md", "keeps the largest 1% of each tensor", "setting"),
    Given("docs/how-graddrop-works.md", "![GradDrop: 80% of", PICTURE),
    Given("docs/how-graddrop-works.md", "from 10% to 100%", PICTURE),
    Given("docs/how-sparsegrad-works.md", "the largest 1% hold", "setting"),
    Given("docs/how-sparsegrad-works.md", "that hold 99% of the energy", "peft_sparsegrad/plots/nonzero_shares.py"),
    Given("docs/how-sparsegrad-works.md", "the smallest 30% of the values", "setting"),
    Given("docs/index.md", "trains about 1% of each", "setting"),
    Given("docs/programs.md", "100,000 values each", PAPER_5),
    Given(NOTES, "below 1e-5", "tests/integration/test_distributed.py"),
    Given(NOTES, "step is seen, 4,096 entries", "setting"),
    Given(NOTES, "1% of a 20 × 2 layer", "setting"),
    Given(NOTES, "a table of 65,536 quantiles", "setting"),
    Given("docs/quickstart.md", "That is 1% of", "setting"),
]
