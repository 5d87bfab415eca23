"""Settings of GradDrop."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, ClassVar, Literal

from ..common.registration import add_peft_type
from ..common.targeted_config import TargetedConfig
from ..functional import SCHEDULES
from .model_card import note_saved_energy
from .variants import variant_settings

_NONE = type(None)
_TYPES: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("toggle", (bool,), "True or False"),
    ("p", (int, float), "a number"),
    ("num_epochs", (int, _NONE), "a whole number or None"),
    ("seed", (Integral,), "a whole number"),
    ("scale", (bool, _NONE), "True, False or None"),
    ("save_density", (int, float, _NONE), "a number or None"),
)


@dataclass
class GradDropConfig(TargetedConfig):
    """Settings of a [`GradDropModel`]: the chosen weights train in full, with randomly masked gradients.

    Method: O'Neill and Dutta, *Gradient Sparsification For Masked Fine-Tuning of Transformers* (arXiv 2307.10098). It
    has only its name in common with the multi-task GradDrop of arXiv 2010.06808. With `m` drawn anew in every step or
    epoch,

        θ ← θ − α · g ⊙ m

    `from_variant` has the paper's variants by name.

    Args:
        target_modules: Names or a regular expression of the modules to train, `"all-linear"`, or None for every
            linear, convolution and normalisation layer inside the transformer blocks. Embeddings and the task head
            only by name.
        exclude_modules: Names or a regular expression of modules to leave alone.
        layers_to_transform: Indices of the transformer blocks to train.
        layers_pattern: Name of the list of blocks, where `layers_to_transform` cannot find it.
        modules_to_save: Other modules to train, unmasked, and save in full, a task head for instance.
        trainable_token_indices: Rows of the embedding to train, as in LoRA.
        granularity: What is kept or dropped as one: each `"element"` of a weight, or a `"layer"`, which is a
            transformer block with all that trains in it.
        interval: How long a mask lasts: an optimizer `"step"` (all its micro-batches share one) or an `"epoch"`.
        selection: `"bernoulli"`: dropped with probability `p`. `"without-replacement"`: each element or layer belongs
            to one of `num_epochs` random sets, and each epoch adds a set. `"top-down"`, `"bottom-up"`: layers are
            added in order from the output or from the input.
        toggle: With sets, an epoch trains its own set only, and the earlier ones freeze again.
        schedule: How `p` changes over the epochs: `"constant"`, `"linear"` (to 0 in the last epoch), `"linear-paper"`
            (the paper's step of 1/`num_epochs`), `"exponential"` (to a hundredth).
        p: Probability to drop, in [0, 1); where it is annealed, in the first epoch. 0 is plain fine-tuning. Not used
            with sets.
        num_epochs: Length of the run, for sets and schedules; None: as the Trainer says.
        seed: Of the masks, and of nothing else; the Trainer's seed does not change them.
        noise: `"bernoulli"`, or `"gaussian"`: multiply by noise with mean 1 and the variance p / (1 − p) instead.
        scale: Multiply what is kept by 1 / (1 − p). None: for element-wise Bernoulli masks only, as in the paper. Not
            used with Gaussian noise, whose mean is 1.
        frozen: `"hold"`: what is masked stays exactly where it is, momentum and weight decay included.
            `"gradient"`: its gradient is zero, and the optimizer does as it likes. None: hold for layers and epochs.
        save_density: Save only this share of each tensor's entries, the largest changes. None: all that changed.
        init_weights: False fills the deltas with noise. For tests.

    Raises:
        ValueError: For a field out of range, or fields that do not go together, by name.
    """

    title: ClassVar[str] = "GradDrop"
    source: ClassVar[str] = "O'Neill and Dutta, arXiv 2307.10098"

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
        self.seed = int(self.seed)  # of NumPy, for instance: a configuration is saved as JSON
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

    @classmethod
    def from_variant(cls, name: str, **overrides: Any) -> GradDropConfig:
        """The paper's variant `name`, with some settings changed: `from_variant("Layer-GradDrop", p=0.5)`.

        Raises:
            ValueError: With all names, if there is no variant of that name.
        """
        return cls(**{**variant_settings(name), **overrides})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT does; with `save_density` the model card says what was left out."""
        super().save_pretrained(save_directory, **kwargs)
        note_saved_energy(save_directory, self.save_density, self.saved_energy)

    @property
    def uses_sets(self) -> bool:
        """Whether an epoch's entries are chosen by the set they belong to."""
        return self.selection != "bernoulli"

    @property
    def needs_epoch(self) -> bool:
        """Whether a mask cannot be drawn without knowing the epoch."""
        return self.interval == "epoch" or self.schedule != "constant"

    @property
    def needs_num_epochs(self) -> bool:
        """Whether a mask cannot be drawn without knowing how many epochs there will be."""
        return self.uses_sets or self.schedule != "constant"

    def check_num_epochs(self, num_epochs: int) -> None:
        """Raise a ValueError if a run of that length has too few epochs for these settings."""
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

    def _check_combinations(self) -> None:
        if self.uses_sets and self.interval != "epoch":
            raise ValueError(f"`selection={self.selection!r}` adds a set in each epoch: it needs interval='epoch'")
        if self.selection in ("top-down", "bottom-up") and self.granularity != "layer":
            raise ValueError(f"`selection={self.selection!r}` is an order of layers: it needs granularity='layer'")
        if self.toggle and not self.uses_sets:
            raise ValueError("`toggle` freezes earlier sets again: it needs a `selection` that has sets")
        for name, value in (("schedule", "constant"), ("noise", "bernoulli"), ("scale", False)):
            if self.uses_sets and getattr(self, name) != value:
                raise ValueError(f"`{name}={getattr(self, name)!r}` has no meaning with selection={self.selection!r}")
