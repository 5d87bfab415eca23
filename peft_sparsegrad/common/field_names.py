"""Keywords that a configuration does not have, mostly LoRA's, and what to set in their place."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable

_LEARNING_RATE = "the learning rate is the optimizer's, or `TrainingArguments`'"
# What holds for both methods; each has the rest in its `instead_of`.
_INSTEAD_OF = {
    "bias": "biases are not a setting here: name whole modules in `modules_to_save`",
    "learning_rate": _LEARNING_RATE,
    "lora_alpha": "the delta has no scale to set: choose the learning rate, and weigh a trained adapter with "
    "`rescale_adapter_scale`",
    "lora_dropout": "there is no dropout on the adapter's input",
    "lr": _LEARNING_RATE,
    "use_dora": "there is no decomposition into magnitude and direction: leave it out",
    "use_rslora": "the delta has no scale to set: leave it out",
}


def check_names(config_class: type, given: Iterable[str]) -> None:
    """Raise a TypeError for the first of the keywords `given` that is no field, which says what to set in its place.

    Its words begin like Python's, by which PEFT recognises a field of a later release in a file.
    """
    names = [field.name for field in dataclasses.fields(config_class) if field.init]  # pyright: ignore
    for name in given:
        if name not in names:
            raise TypeError(
                f"{config_class.__name__} got an unexpected keyword argument '{name}': "
                f"{_way_out(config_class, name, names)}"
            )


def _way_out(config_class: type, name: str, names: list[str]) -> str:
    instead = {**_INSTEAD_OF, **getattr(config_class, "instead_of", {})}
    if name in instead:
        return instead[name]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    return f"similar fields are {', '.join(f'`{each}`' for each in near)}" if near else f"it has {', '.join(names)}"
