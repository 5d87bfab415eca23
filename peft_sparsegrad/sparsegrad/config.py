"""Settings of SparseGrad."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

from ..common.registration import add_peft_type
from ..common.setting_types import check_expressions
from ..common.targeted_config import TargetedConfig
from ..functional import SUPPORT_SCORES
from .variants import VARIANTS

NAMED_RANKS = ("auto", "full", "narrower")


@dataclass
class SparseGradConfig(TargetedConfig):
    """Settings of a [`SparseGradModel`]: about 1% of each MLP weight trains, in the basis of its warm-up gradients.

    Method: Chekalina et al., *SparseGrad: A Selective Method for Efficient Fine-tuning of MLP Layers* (EMNLP 2024,
    2024.emnlp-main.831). With `S` the trained core and `U`, `V` the transition matrices of a group of layers,

        y = base(x) + ((x U) Sᵀ) Vᵀ

    `from_variant` returns settings by name: `"paper"` is the method as published, and the default is `"sparsegrad"`.

    Learning rate of the values, with AdamW: 4e-4 and 1e-3 were best for a language model of 135M parameters, by two
    sets of rows, and 4e-4 to 2.5e-3 for an encoder of 110M, where 2.5e-3 ruined some runs (README.md, "Settings"). A
    small model takes more. Begin with 1e-3 and search both ways, as for LoRA.

    Args:
        target_modules: Names or a regular expression of the linear layers to adapt, `"all-linear"`, or None for the
            MLP layers of a known model type (`up_proj` and `down_proj` for LLaMA-like models).
        target_parameters: Names, or their ends, of parameters to adapt, such as the fused experts of a mixture,
            of shape (experts, out, in): `["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]`.
        exclude_modules: Names or a regular expression of modules to leave alone.
        layers_to_transform: Indices of the transformer blocks to adapt; the paper's LLaMA-2 runs take every third.
        layers_pattern: Name of the list of blocks, where `layers_to_transform` cannot find it.
        modules_to_save: Other modules to train and save in full, a task head for instance.
        trainable_token_indices: Rows of the embedding to train, as in LoRA.
        ensure_weight_tying: True: what trains of an embedding stays tied to the output layer, as in LoRA.
        density: Trained share of each weight's entries, in (0, 1]; of each expert's weight.
        num_values: Trained values per layer, or per expert, in place of `density` and `density_pattern`.
        rank: Columns of the transition matrices V and U in use: one number, a pair (out, in), `"full"` (the paper's),
            `"auto"`, as many of the input side as `slack` asks for, or `"narrower"`, the same of each weight's
            narrower side, an earlier default. None in a pair leaves that side in the weight's own basis, as `"auto"`
            does with the output side. A greater rank costs time, memory and bytes, and gives the support more entries
            to choose from.
        slack: With `rank="auto"` or `"narrower"`, entries of the core per trained value, at least 1. More slack costs
            time in each step, and gives the support more entries to choose from.
        basis: `"hosvd"` of warm-up gradients, `"columns"`, those of each weight whose warm-up gradients have most
            energy, `"svd"` of each weight, or `"identity"` (MeProp).
        support: `"static"`: entries chosen after the warm-up, and renewed. `"dynamic"`: the whole core trains and each
            step moves the `density` of entries with the largest gradients; use `create_sparsegrad_optimizer` with it.
        support_score: Score by which a static support is chosen: `"mean"`, |Σ G̃|, or `"energy"`, Σ G̃².
        warmup_steps: Number of backward passes that the warm-up observes in all, half of them for the bases. With no
            explicit warm-up run, they are the first ones of training, at most a quarter of a Trainer's run. 0 trains
            at once, in a data-free basis.
        renewal_steps: Number of optimizer steps after which the support is renewed for the first time, and then
            whenever the number of steps has doubled. A renewal replaces the entries of the smallest 30% of the values
            by those with the largest |Σ G̃| in the steps before. 0 keeps the first support. Static supports only.
        transition_matrices: File written by `save_transition_matrices`, which replaces the warm-up.
        init_weights: False fills the values with noise and skips the warm-up, for tests.
        density_pattern: Density for the modules whose names match a key (a suffix or regular expression).
        rank_pattern: Rank for the modules whose names match a key.

    Raises:
        ValueError: If a field is out of range. The message names it.
    """

    title: ClassVar[str] = "SparseGrad"
    source: ClassVar[str] = "Chekalina et al., EMNLP 2024, 2024.emnlp-main.831"
    variants: ClassVar[dict[str, dict[str, Any]]] = VARIANTS
    instead_of: ClassVar[dict[str, str]] = {
        "alpha": "the values have no scale to set: choose the learning rate",
        "p": "that is GradDrop's; the share that trains is `density`",
        "r": "an adapter's size is its `density` (0.01 trains 1%) or `num_values`; `rank` is the number of columns of "
        "the basis, and 'auto' derives it",
        "targets": "name the modules in `target_modules`",
    }

    density: float = field(default=0.01, metadata={"help": "Trained share of each weight's entries, in (0, 1]."})
    num_values: int | None = field(default=None, metadata={"help": "Trained values per layer, in place of `density`."})
    rank: int | tuple[int | None, int | None] | Literal["full", "auto", "narrower"] = field(
        default="auto", metadata={"help": "Columns of V and U in use: int, (out, in), 'full', 'auto' or 'narrower'."}
    )
    slack: float = field(default=4.0, metadata={"help": "Entries of the core per trained value, with rank='auto'."})
    basis: Literal["hosvd", "columns", "svd", "identity"] = field(
        default="hosvd",
        metadata={"help": "'hosvd' or 'columns' by warm-up gradients, 'svd' of each weight, or 'identity'."},
    )
    support: Literal["static", "dynamic"] = field(
        default="static",
        metadata={"help": "'static': kept between renewals. 'dynamic': the largest gradients of each step."},
    )
    support_score: Literal["mean", "energy"] = field(
        default="mean", metadata={"help": "What chooses a static support: 'mean', |Σ G̃|, or 'energy', Σ G̃²."}
    )
    warmup_steps: int = field(
        default=6, metadata={"help": "Backward passes observed before training starts; 0 needs no data."}
    )
    renewal_steps: int = field(
        default=25,
        metadata={"help": "Steps until the support is first renewed, then at each doubling; 0: never."},
    )
    transition_matrices: str | None = field(
        default=None, metadata={"help": "File of `save_transition_matrices`, in place of a warm-up."}
    )
    density_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Density of the modules whose names match a key."}
    )
    rank_pattern: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Rank of the modules whose names match a key."}
    )

    def __post_init__(self) -> None:
        saved_in_format = self.format_version
        super().__post_init__()
        self.peft_type = add_peft_type("SPARSEGRAD")
        self._check_kinds()
        self.rank = _checked_rank("rank", self.rank)
        self.rank_pattern = {key: _checked_rank(f"rank_pattern[{key!r}]", r) for key, r in self.rank_pattern.items()}
        self._check_types()
        self._check_ranges()
        choices = {"basis": ("hosvd", "columns", "svd", "identity"), "support": ("static", "dynamic")}
        self.check_choices({**choices, "support_score": tuple(SUPPORT_SCORES)})
        if saved_in_format < 3 and self.basis in ("hosvd", "svd"):
            self._read_auto_as_narrower()
        self._check_combinations()

    def _read_auto_as_narrower(self) -> None:
        """Give the settings of an adapter that was saved in format 1 or 2 the meaning that they had."""
        self.rank = "narrower" if self.rank == "auto" else self.rank
        self.rank_pattern = {key: "narrower" if r == "auto" else r for key, r in self.rank_pattern.items()}

    def _check_kinds(self) -> None:
        for name in ("density_pattern", "rank_pattern"):
            if not isinstance(patterns := getattr(self, name), dict):
                raise ValueError(f"`{name}` must be a dictionary of patterns, not {patterns!r}")
            check_expressions(name, patterns)
        if not isinstance(self.slack, Real) or isinstance(self.slack, bool):
            raise ValueError(f"`slack` must be a number of at least 1, not {self.slack!r}")
        if self.transition_matrices is not None and not isinstance(self.transition_matrices, (str, os.PathLike)):
            raise ValueError(f"`transition_matrices` must be the path of a file, not {self.transition_matrices!r}")

    def _check_types(self) -> None:
        for name in ("warmup_steps", "renewal_steps", *(["num_values"] if self.num_values is not None else [])):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise ValueError(f"`{name}` must be a whole number, not {value!r}")
        for name, value in [("density", self.density), *_entries("density_pattern", self.density_pattern)]:
            if not isinstance(value, Real) or isinstance(value, bool):
                raise ValueError(f"`{name}` must be a number in (0, 1], not {value!r}: 0.01 trains 1%")

    def _check_ranges(self) -> None:
        for name, density in [("density", self.density), *_entries("density_pattern", self.density_pattern)]:
            if not 0 < density <= 1:
                raise ValueError(f"`{name}` must be in (0, 1], not {density}: it is a share, 0.01 trains 1%")
        if self.num_values is not None and self.num_values < 1:
            raise ValueError(f"`num_values` must be at least 1, not {self.num_values}")
        if self.warmup_steps < 0 or self.warmup_steps == 1:
            raise ValueError(
                f"`warmup_steps` must be 0 (no warm-up) or at least 2 (one pass for the basis, one for the support), "
                f"not {self.warmup_steps}"
            )

        if not 1 <= self.slack < float("inf"):
            raise ValueError(f"`slack` must be at least 1, not {self.slack}: the core must hold the values")
        if self.renewal_steps < 0:
            raise ValueError(f"`renewal_steps` must be 0 (never) or above, not {self.renewal_steps}")

    def _check_combinations(self) -> None:
        self._check_size_is_given_once()
        if self.basis == "identity" and (self.rank not in ("auto", "full") or self.rank_pattern):
            raise ValueError(
                "`rank` has no meaning with basis='identity', whose columns are in no order of importance: "
                "leave it at 'auto'"
            )
        for name, rank in [("rank", self.rank), *_entries("rank_pattern", self.rank_pattern)]:
            on_output = rank in ("full", "narrower") or (isinstance(rank, tuple) and rank[0] is not None)
            if self.basis == "columns" and on_output:
                raise ValueError(
                    f"`{name}` must be a number of columns or 'auto' with basis='columns', not {rank!r}: the output "
                    "side keeps the weight's own basis, and all columns are basis='identity'"
                )
        if self.transition_matrices is not None and self.basis != "hosvd":
            raise ValueError(f"`transition_matrices` is a HOSVD basis and cannot be used with basis={self.basis!r}")

    def _check_size_is_given_once(self) -> None:
        """Refuse `num_values` beside a density other than the default; a saved adapter may have both and is loaded."""
        if self.num_values is None or self.inference_mode:
            return
        for name, default in (("density", type(self).density), ("density_pattern", {})):
            if (value := getattr(self, name)) != default:
                raise ValueError(
                    f"`num_values={self.num_values}` and `{name}={value!r}` both say how many values train: leave one "
                    "of the two out"
                )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save without `transition_matrices`, since the adapter holds them and the file may be missing later."""
        path, self.transition_matrices = self.transition_matrices, None
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.transition_matrices = path


def _entries(name: str, pattern: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(f"{name}[{key!r}]", value) for key, value in pattern.items()]


def _checked_rank(name: str, rank: Any) -> Any:
    """Return `rank`, with a list as read from JSON turned back into a pair.

    Raises:
        ValueError: If it is not a valid rank. The message names the field `name`.
    """
    if rank in NAMED_RANKS:
        return rank
    numbers = tuple(rank) if isinstance(rank, (tuple, list)) else (rank, rank)
    if len(numbers) != 2 or not all(number is None or _is_positive(number) for number in numbers):
        raise ValueError(
            f"`{name}` must be a positive int, a pair of them (out, in), 'full', 'auto' or 'narrower', not {rank!r}"
        )
    if numbers == (None, None):
        raise ValueError(f"`{name}` leaves both sides in the weight's own basis: that is basis='identity'")
    return numbers if isinstance(rank, (tuple, list)) else rank


def _is_positive(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0
