"""Settings of GradDrop."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, ClassVar, Literal

from ..common.registration import add_peft_type
from ..common.targeted_config import TargetedConfig
from ..functional import SCHEDULES
from .model_card import note_saved_energy
from .variants import VARIANTS

_NONE = type(None)
_TYPES: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("toggle", (bool,), "True or False"),
    ("p", (int, float), "a number"),
    ("num_epochs", (int, _NONE), "a whole number or None"),
    ("blocks_per_epoch", (int, _NONE), "a whole number or None"),
    ("seed", (Integral,), "a whole number"),
    ("scale", (bool, _NONE), "True, False or None"),
    ("save_density", (int, float, _NONE), "a number or None"),
)


@dataclass
class GradDropConfig(TargetedConfig):
    """Settings of a [`GradDropModel`]: the chosen weights train in full, with randomly masked gradients.

    Method: O'Neill and Dutta, *Gradient Sparsification For Masked Fine-Tuning of Transformers* (arXiv 2307.10098). It
    has only its name in common with the multi-task GradDrop of arXiv 2010.06808. With a mask `m` drawn anew in every
    step or epoch,

        θ ← θ − α · g ⊙ m

    `from_variant` returns the settings of one of the paper's variants.

    Args:
        target_modules: Names or a regular expression of the modules to train, `"all-linear"`, or None for every
            linear, convolution and normalisation layer inside the transformer blocks. Embeddings and the task head
            train only if they are named.
        target_parameters: Names, or their ends, of parameters to train, such as the fused experts of a mixture,
            of shape (experts, out, in): `["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]`.
        exclude_modules: Names or a regular expression of modules to leave alone.
        layers_to_transform: Indices of the transformer blocks to train.
        layers_pattern: Name of the list of blocks, where `layers_to_transform` cannot find it.
        modules_to_save: Other modules to train, unmasked, and save in full, a task head for instance.
        trainable_token_indices: Rows of the embedding to train, as in LoRA.
        ensure_weight_tying: True: what trains of an embedding stays tied to the output layer, as in LoRA.
        granularity: Unit that is kept or dropped as a whole: each `"element"` of a weight, or a `"layer"`, which is a
            transformer block with everything that trains in it.
        interval: Lifetime of a mask: an optimizer `"step"` (all its micro-batches share one mask) or an `"epoch"`.
        selection: `"bernoulli"`: each element or layer is dropped with probability `p`. `"without-replacement"`: each
            belongs to one of `num_epochs` random sets, and each epoch adds a set. `"top-down"`, `"bottom-up"`: layers
            are added in order from the output or from the input.
        toggle: With sets, train only the epoch's own set and freeze the earlier ones again.
        schedule: Change of `p` over the epochs: `"constant"`, `"linear"` (to 0 in the last epoch), `"linear-paper"`
            (the paper's step of 1/`num_epochs`), `"exponential"` (to a hundredth).
        p: Probability to drop, in [0, 1); with a schedule, that of the first epoch. 0 is plain fine-tuning. Not used
            with sets.
        num_epochs: Number of epochs of the run, for sets and schedules; None takes the Trainer's.
        blocks_per_epoch: Number of blocks that each epoch adds, with `"top-down"` or `"bottom-up"`: 2 of 24 blocks in
            3 epochs leave 18 frozen to the end. None adds an even part of all blocks, so that all train in the last.
        seed: Seed of the masks and of nothing else; the Trainer's seed does not change them.
        noise: `"bernoulli"` for masks of zeros and ones, or `"gaussian"` to multiply each gradient by noise of mean 1
            and variance p / (1 − p) instead.
        scale: True multiplies entries that are kept by 1 / (1 − p). None does so for element-wise Bernoulli masks
            only, as in the paper. Not used with Gaussian noise, whose mean is 1.
        frozen: `"hold"` keeps masked entries exactly where they are, whatever momentum and weight decay would do.
            `"gradient"` only sets their gradient to zero. None means `"hold"` for layers and epochs, else
            `"gradient"`.
        save_density: Save only this share of each tensor's entries, those of the largest changes. None saves every
            entry that changed.
        init_weights: False fills the deltas with noise, for tests.

    Raises:
        ValueError: If a field is out of range, or fields do not go together. The message names them.
    """

    title: ClassVar[str] = "GradDrop"
    source: ClassVar[str] = "O'Neill and Dutta, arXiv 2307.10098"
    variants: ClassVar[dict[str, dict[str, Any]]] = VARIANTS
    instead_of: ClassVar[dict[str, str]] = {
        "density": "the share of gradients that is dropped is `p`, and `save_density` the share of changes that is "
        "saved",
        "num_values": "GradDrop trains whole weights; `save_density` is the share of changes that is saved",
        "r": "GradDrop has no rank, it trains whole weights: the share of gradients that is dropped is `p`",
        "rank": "GradDrop has no rank, it trains whole weights: the share of gradients that is dropped is `p`",
        "targets": "name the modules in `target_modules`",
    }

    granularity: Literal["element", "layer"] = field(
        default="element", metadata={"help": "What is dropped as one: an 'element' or a 'layer' (a block)."}
    )
    interval: Literal["step", "epoch"] = field(default="step", metadata={"help": "How long a mask lasts."})
    selection: Literal["bernoulli", "without-replacement", "top-down", "bottom-up"] = field(
        default="bernoulli", metadata={"help": "'bernoulli', or the order in which sets are unfrozen."}
    )
    toggle: bool = field(default=False, metadata={"help": "With sets: earlier sets freeze again."})
    schedule: Literal["constant", "linear", "linear-paper", "exponential"] = field(
        default="constant", metadata={"help": "How `p` changes over the epochs."}
    )
    p: float = field(default=0.2, metadata={"help": "Probability to drop, in [0, 1). Not used with sets."})
    num_epochs: int | None = field(default=None, metadata={"help": "Epochs of the run; None: as the Trainer says."})
    blocks_per_epoch: int | None = field(
        default=None, metadata={"help": "Blocks that an epoch adds, top-down or bottom-up. None: an even part."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the masks."})
    noise: Literal["bernoulli", "gaussian"] = field(
        default="bernoulli", metadata={"help": "What the gradient is multiplied by."}
    )
    scale: bool | None = field(default=None, metadata={"help": "Multiply by 1 / (1 - p). None: as in the paper."})
    frozen: Literal["hold", "gradient"] | None = field(
        default=None, metadata={"help": "'hold': masked entries do not move at all. 'gradient': only no gradient."}
    )
    save_density: float | None = field(
        default=None, metadata={"help": "Share of each tensor's entries to save, the largest. None: all changed."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("GRADDROP")
        self.saved_energy: float | None = None  # not a setting: learned when entries are left out of a file
        self._check_types()
        self._check_ranges()
        self.check_choices(
            {
                "granularity": ("element", "layer"),
                "interval": ("step", "epoch"),
                "selection": ("bernoulli", "without-replacement", "top-down", "bottom-up"),
                "schedule": tuple(SCHEDULES),
                "noise": ("bernoulli", "gaussian"),
            }
        )
        if self.scale is None:
            self.scale = self.granularity == "element" and self.selection == "bernoulli"
        if self.frozen is None:
            self.frozen = "hold" if self.granularity == "layer" or self.interval == "epoch" else "gradient"
        self.check_choices({"frozen": ("hold", "gradient")})
        self._check_combinations()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT does, and with `save_density` write into the model card what was left out."""
        super().save_pretrained(save_directory, **kwargs)
        note_saved_energy(save_directory, self.save_density, self.saved_energy)

    @property
    def uses_sets(self) -> bool:
        """True if the entries that train in an epoch are chosen by the set they belong to."""
        return self.selection != "bernoulli"

    @property
    def needs_epoch(self) -> bool:
        """True if a mask can only be drawn once the epoch is known."""
        return self.interval == "epoch" or self.schedule != "constant"

    @property
    def needs_num_epochs(self) -> bool:
        """True if a mask can only be drawn once the number of epochs is known."""
        return self.uses_sets or self.schedule != "constant"

    def check_num_epochs(self, num_epochs: int) -> None:
        """Raise a ValueError if `num_epochs` is too small for these settings."""
        if self.needs_num_epochs and num_epochs < 2:
            name = "schedule" if self.schedule != "constant" else "selection"
            raise ValueError(
                f"`{name}={getattr(self, name)!r}` changes what trains from epoch to epoch and needs at least 2 of "
                f"them, `num_epochs` is {num_epochs}: train longer, or use schedule='constant', selection='bernoulli'"
            )

    def _check_types(self) -> None:
        for name, kinds, wanted in _TYPES:
            value = getattr(self, name)
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise ValueError(f"`{name}` must be {wanted}, not {value!r}")

    def _check_ranges(self) -> None:
        if not 0 <= self.p < 1:
            raise ValueError(f"`p` must be in [0, 1), not {self.p}: it is the probability to drop a gradient")
        if self.save_density is not None and not 0 < self.save_density <= 1:
            raise ValueError(f"`save_density` must be in (0, 1] or None, not {self.save_density}: it is a share")
        if self.num_epochs is not None:
            if self.num_epochs < 1:
                raise ValueError(f"`num_epochs` must be at least 1, not {self.num_epochs}")
            self.check_num_epochs(self.num_epochs)
        if self.blocks_per_epoch is not None and self.blocks_per_epoch < 1:
            raise ValueError(f"`blocks_per_epoch` must be at least 1 or None, not {self.blocks_per_epoch}")

    def _check_combinations(self) -> None:
        if self.uses_sets and self.interval != "epoch":
            raise ValueError(f"`selection={self.selection!r}` adds a set in each epoch: it needs interval='epoch'")
        if self.selection in ("top-down", "bottom-up") and self.granularity != "layer":
            raise ValueError(f"`selection={self.selection!r}` is an order of layers: it needs granularity='layer'")
        if self.blocks_per_epoch is not None and self.selection not in ("top-down", "bottom-up"):
            raise ValueError(
                f"`blocks_per_epoch={self.blocks_per_epoch}` is for blocks in order: it needs selection='top-down' or "
                "'bottom-up'"
            )
        if self.toggle and not self.uses_sets:
            raise ValueError("`toggle` freezes earlier sets again: it needs a `selection` that has sets")
        for name, value in (("schedule", "constant"), ("noise", "bernoulli"), ("scale", False)):
            if self.uses_sets and getattr(self, name) != value:
                raise ValueError(f"`{name}={getattr(self, name)!r}` has no meaning with selection={self.selection!r}")
