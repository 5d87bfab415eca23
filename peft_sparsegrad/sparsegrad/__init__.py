"""SparseGrad as a PEFT method."""

from .callback import SparseGradCallback
from .config import SparseGradConfig
from .layer import SparseGradLayer, SparseGradLinear
from .model import SparseGradModel
from .optimizer import SparseGradAdam, create_sparsegrad_optimizer
from .transition_file import save_transition_matrices
from .variants import VARIANTS
from .warmup.explicit import warmup, warmup_report
from .warmup.report import GroupReport, WarmUpReport

__all__ = [
    "VARIANTS",
    "GroupReport",
    "SparseGradAdam",
    "SparseGradCallback",
    "SparseGradConfig",
    "SparseGradLayer",
    "SparseGradLinear",
    "SparseGradModel",
    "WarmUpReport",
    "create_sparsegrad_optimizer",
    "save_transition_matrices",
    "warmup",
    "warmup_report",
]
