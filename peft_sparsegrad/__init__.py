"""SparseGrad and GradDrop as PEFT methods. Importing this package registers them."""

from .callback import SparseGradCallback
from .lora_conversion import LoraConversion, convert_to_lora
from .optimizer import SparseGradAdam, create_sparsegrad_optimizer
from .registration import add_peft_type, register
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
add_peft_type("GRADDROP")
