"""The settings that both methods have: the modules to adapt, and further modules to train and save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft.config import PeftConfig

from .model_card import CardFacts, write_card

FORMAT_VERSION = 1  # of the adapter's files; raised when an older release could not read them


@dataclass
class TargetedConfig(PeftConfig):
    """Settings with the same meaning as in PEFT's own methods.

    Attributes:
        title: Name of the method in texts for people.
        source: Paper that describes the method.
        format_version: Version of the adapter's files. Not a setting: it is written with them and checked on loading.
    """

    title: ClassVar[str]
    source: ClassVar[str]

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to adapt: names, a regular expression, or None for the default."}
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
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Of the adapter's files; leave it."})
    init_weights: bool = field(default=True, metadata={"help": "False: noise in place of zeros. For tests."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"the adapter has files of format {self.format_version}, and this version of peft_sparsegrad reads "
                f"formats up to {FORMAT_VERSION}: upgrade it"
            )
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

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT does, and write a section of the model card if the adapter's tensors are saved too."""
        super().save_pretrained(save_directory, **kwargs)
        facts, self.card_facts = self.card_facts, None
        if facts is not None:
            write_card(self, save_directory, facts)

    def check_choices(self, choices: Mapping[str, tuple[str, ...]]) -> None:
        """Raise a ValueError for the first field whose value is not among its `choices`."""
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
