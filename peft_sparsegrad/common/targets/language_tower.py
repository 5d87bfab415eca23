"""The language tower of a model that also has towers for images or sound."""

from __future__ import annotations

import warnings

from torch import nn
from transformers.models.auto import modeling_auto

_GENERATIVE = {
    model_type
    for mapping in ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
    for model_type in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", ())
}


def language_tower(model: nn.Module) -> tuple[str, str] | None:
    """Return the name and the model type of the part that generates text, in a model that takes more than text.

    Returns:
        None for every other model, models that compare the outputs of two towers among them.
    """
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in _GENERATIVE:
        return None
    text = getattr(config, "text_config", None)
    if text is None:
        return None
    names = (name for name, module in model.named_modules() if name and getattr(module, "config", None) is text)
    name = next(names, None)
    return None if name is None else (name, text.model_type)


def warn_of_other_towers(title: str, tower: str) -> None:
    """Warn that the default targets of the method `title` lie in the language tower alone."""
    warnings.warn(
        f"{title}'s default targets lie in the language tower, {tower!r}; the towers for other inputs stay frozen. "
        "To train those too, name their modules in `target_modules`.",
        stacklevel=2,
    )
