"""GradDrop: the chosen weights train in full, with randomly masked gradients."""

from .callback import GradDropCallback
from .config import GradDropConfig
from .layer import GradDropLayer
from .layer_kinds import GradDropConv2d, GradDropLinear, GradDropModule
from .model import GradDropModel
from .training import GradDrop
from .variants import VARIANTS

__all__ = [
    "VARIANTS",
    "GradDrop",
    "GradDropCallback",
    "GradDropConfig",
    "GradDropConv2d",
    "GradDropLayer",
    "GradDropLinear",
    "GradDropModel",
    "GradDropModule",
]
