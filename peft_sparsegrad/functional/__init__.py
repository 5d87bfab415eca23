"""The mathematics of both methods in plain PyTorch. Nothing here imports peft or transformers."""

from .core import core_shape, num_trained_values
from .delta import delta_product, delta_weight, observe_gradient
from .hosvd import ExactHosvd, Hosvd, SketchedHosvd, gradient_energy, hosvd_accumulator, hosvd_of_weight
from .sparse_by_dense import sparse_by_dense
from .support import core_gradient, pack_support, packed_support_size, select_support, spread_support, unpack_support

__all__ = [
    "ExactHosvd",
    "Hosvd",
    "SketchedHosvd",
    "core_gradient",
    "core_shape",
    "delta_product",
    "delta_weight",
    "gradient_energy",
    "hosvd_accumulator",
    "hosvd_of_weight",
    "num_trained_values",
    "observe_gradient",
    "pack_support",
    "packed_support_size",
    "select_support",
    "sparse_by_dense",
    "spread_support",
    "unpack_support",
]
