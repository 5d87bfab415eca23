"""SparseGrad as a PEFT method."""

from .config import SparseGradConfig
from .layer import SparseGradLayer, SparseGradLinear
from .model import SparseGradModel
from .report import GroupReport, WarmUpReport
from .transition_file import save_transition_matrices

__all__ = [
    "GroupReport",
    "SparseGradConfig",
    "SparseGradLayer",
    "SparseGradLinear",
    "SparseGradModel",
    "WarmUpReport",
    "save_transition_matrices",
]
