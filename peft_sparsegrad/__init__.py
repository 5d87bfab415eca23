"""SparseGrad and GradDrop as PEFT methods. Importing this package registers them."""

from .callback import SparseGradCallback
from .graddrop import (
    GradDrop,
    GradDropConfig,
    GradDropConv2d,
    GradDropLayer,
    GradDropLinear,
    GradDropModel,
    GradDropParameters,
)
from .graddrop_callback import GradDropCallback
from .lora_conversion import LoraConversion, convert_to_lora
from .optimizer import SparseGradAdam, create_sparsegrad_optimizer
from .registration import register
from .run_warmup import warmup
from .sparsegrad import (
    GroupReport,
    SparseGradConfig,
    SparseGradLayer,
    SparseGradLinear,
    SparseGradModel,
    WarmUpReport,
    save_transition_matrices,
)

__version__ = "0.1.0"

__all__ = [
    "GradDrop",
    "GradDropCallback",
    "GradDropConfig",
    "GradDropConv2d",
    "GradDropLayer",
    "GradDropLinear",
    "GradDropModel",
    "GradDropParameters",
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

register("sparsegrad", SparseGradConfig, SparseGradModel)
register("graddrop", GradDropConfig, GradDropModel)
