"""The settings that both methods have: the modules to adapt, and further modules to train and save."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar, cast

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from .field_names import check_names
from .files.adapter_file import read_tensors
from .files.checksum import add_checksum
from .files.model_card import CardFacts, write_card
from .setting_types import check_types, plain
from .training.calling_trainer import calling_trainers, keep_card

FORMAT_VERSION = 3  # of the adapter's files; raised when an older release could not read them

Config = TypeVar("Config", bound="TargetedConfig")


@dataclass
class TargetedConfig(PeftConfig):
    """Settings with the same meaning as in PEFT's own methods.

    Attributes:
        title: Name of the method in texts for people.
        source: Paper that describes the method.
        variants: Settings by the name of a variant.
        instead_of: What to set in place of a keyword of other methods.
        format_version: Version of the adapter's files. Not a setting: it is written with them and checked on loading.
    """

    title: ClassVar[str]
    source: ClassVar[str]
    variants: ClassVar[Mapping[str, Mapping[str, Any]]]
    instead_of: ClassVar[Mapping[str, str]]

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to adapt: names, a regular expression, or None for the default."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters to adapt, by name or its end, such as fused experts."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave alone: names or a regular expression."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the transformer blocks to adapt. None: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks that `layers_to_transform` counts in."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to train and save in full, a task head for instance."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of the embedding to train, as in LoRA."}
    )
    ensure_weight_tying: bool = field(
        default=False,
        metadata={"help": "True: an embedding in `modules_to_save` or trained tokens stay tied to the output layer."},
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Of the adapter's files; leave it."})
    init_weights: bool = field(default=True, metadata={"help": "False: noise in place of zeros. For tests."})

    def __new__(cls, *args: Any, **kwargs: Any) -> TargetedConfig:
        check_names(cls, kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        for each in fields(self):
            setattr(self, each.name, plain(getattr(self, each.name)))
        check_types(self)
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"the adapter has files of format {self.format_version}, and this version of peft_sparsegrad reads "
                f"formats up to {FORMAT_VERSION}: upgrade it"
            )
        self.format_version = FORMAT_VERSION  # of what this release will save, whatever it has read
        self.card_facts: CardFacts | None = None  # not a setting: set while the adapter is being saved
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # pyright: ignore[reportAttributeAccessIssue]
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(f"`{name}` cannot be used when `target_modules` is a str; give a list of names")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` needs `layers_to_transform`: it says where those are counted")

    @classmethod
    def from_variant(cls: type[Config], name: str, **overrides: Any) -> Config:
        """Return the settings of the variant `name`, with some of them changed.

        `GradDropConfig.from_variant("Layer-GradDrop", p=0.5)` is Layer-GradDrop with p = 0.5, and
        `SparseGradConfig.from_variant("paper")` is SparseGrad as published.

        Raises:
            ValueError: If there is no variant of that name. The message lists all names.
        """
        if name not in cls.variants:
            raise ValueError(f"there is no {cls.title} variant {name!r}; there are {', '.join(cls.variants)}")
        return cls(**{**cls.variants[name], **overrides})

    @classmethod
    def from_pretrained(
        cls: type[Config], pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> Config:
        """Read the settings as PEFT does, and check the adapter's file beside them, before a model is changed.

        Not for an adapter on the hub, whose file is not there yet.

        Raises:
            ValueError: If a setting, or the file, is damaged. The message names it.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        path = os.path.join(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if os.path.isfile(path):
            tensors, _ = read_tensors(path)
            try:
                cast(Any, PEFT_TYPE_TO_TUNER_MAPPING)[config.peft_type].check_stored(config, tensors)
            except ValueError as error:
                raise ValueError(f"{path!r}: {error}") from error
        return cast(Config, config)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT does; if the tensors are saved too, add their checksum and a section of the model card.

        The configuration takes the place of an earlier one at once. A process that is killed leaves the one or the
        other, and in between the tensors without a checksum. A Trainer that is saving keeps the section of the card
        when it writes a card of its own.
        """
        os.makedirs(save_directory, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".config-", suffix=".partial", dir=save_directory) as partial:
            super().save_pretrained(partial, **kwargs)
            for name in os.listdir(partial):
                os.replace(os.path.join(partial, name), os.path.join(save_directory, name))
        facts, self.card_facts = self.card_facts, None
        if facts is not None:
            weights = os.path.join(save_directory, SAFETENSORS_WEIGHTS_NAME)
            if os.path.isfile(weights):
                add_checksum(weights)
            write_card(self, save_directory, facts)
            for trainer in calling_trainers():
                keep_card(trainer)

    def check_choices(self, choices: Mapping[str, tuple[str, ...]]) -> None:
        """Raise a ValueError for the first field whose value is not among its `choices`."""
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
