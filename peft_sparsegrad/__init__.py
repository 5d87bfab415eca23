"""SparseGrad and GradDrop as PEFT methods. Importing this package registers them."""

from .common import bitsandbytes_notice  # noqa: F401 - before the first import of peft
from .common.lora_conversion import LoraConversion, convert_to_lora
from .common.output_change import OutputChange
from .common.registration import register
from .common.scaling import rescale_adapter_scale
from .graddrop import (
    GradDrop,
    GradDropCallback,
    GradDropConfig,
    GradDropConv2d,
    GradDropLayer,
    GradDropLinear,
    GradDropModel,
    GradDropModule,
)
from .sparsegrad import (
    GroupReport,
    SparseGradAdam,
    SparseGradCallback,
    SparseGradConfig,
    SparseGradLayer,
    SparseGradLinear,
    SparseGradModel,
    WarmUpReport,
    create_sparsegrad_optimizer,
    save_transition_matrices,
    warmup,
    warmup_report,
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
    "GradDropModule",
    "GroupReport",
    "LoraConversion",
    "OutputChange",
    "SparseGradAdam",
    "SparseGradCallback",
    "SparseGradConfig",
    "SparseGradLayer",
    "SparseGradLinear",
    "SparseGradModel",
    "WarmUpReport",
    "convert_to_lora",
    "create_sparsegrad_optimizer",
    "rescale_adapter_scale",
    "save_transition_matrices",
    "warmup",
    "warmup_report",
]

register("sparsegrad", SparseGradConfig, SparseGradModel)
register("graddrop", GradDropConfig, GradDropModel)
