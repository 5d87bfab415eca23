"""SparseGrad as a PEFT method."""

from .callback import SparseGradCallback
from .config import SparseGradConfig
from .layer import SparseGradLayer, SparseGradLinear
from .lora_conversion import LoraConversion, convert_to_lora
from .model import SparseGradModel
from .optimizer import SparseGradAdam, create_sparsegrad_optimizer
from .report import GroupReport, WarmUpReport
from .transition_file import save_transition_matrices
from .variants import VARIANTS
from .warmup import warmup

__all__ = [
    "VARIANTS",
    "GroupReport",
    "LoraConversion",
    "SparseGradAdam",
    "SparseGradCallback",
    "SparseGradConfig",
    "SparseGradLayer",
    "SparseGradLinear",
    "SparseGradModel",
    "WarmUpReport",
    "convert_to_lora",
    "create_sparsegrad_optimizer",
    "save_transition_matrices",
    "warmup",
]
