"""The mathematics of both methods in plain PyTorch. Nothing here imports peft or transformers."""

from .accumulators import Accumulator, hosvd_accumulator
from .column_energy import ColumnEnergy
from .core import Core
from .core_size import core_ranks, core_shape, num_trained_values
from .delta import delta_product, delta_weight, observe_gradient
from .delta_linear import delta_linear, writing_out_pays
from .hosvd import ExactHosvd, Hosvd, hosvd_of_weight
from .hosvd_sketch import SketchedHosvd
from .masked_layer import Conv2dOperation, Delta, masked_layer, masked_linear, masked_sum
from .masks import (
    GradientMask,
    bernoulli_block_mask,
    bernoulli_mask,
    block_sets,
    gaussian_block_mask,
    gaussian_mask,
    set_mask,
)
from .observed_gradient import LinearGradient, ObservedGradient, StackedGradient
from .packed_support import is_older_form, pack_support, packed_support_size, unpack_support
from .schedules import SCHEDULES
from .sides import Side, file_dtype, from_core, is_selection, rounded, side_in, side_like, side_matrix, to_core
from .sparse_by_dense import sparse_by_dense, sparse_by_dense_coo
from .stacked import observe_weight_gradient, stacked_core_gradient, stacked_delta, stacked_sum
from .streams import stream_key
from .support import (
    SUPPORT_SCORES,
    keep_largest,
    renew_support,
    select_support,
    select_supports,
    spread_support,
)
from .weight_gradient import core_gradient, gradient_energy, weight_gradient

__all__ = [
    "SCHEDULES",
    "SUPPORT_SCORES",
    "Accumulator",
    "ColumnEnergy",
    "Conv2dOperation",
    "Core",
    "Delta",
    "ExactHosvd",
    "GradientMask",
    "Hosvd",
    "LinearGradient",
    "ObservedGradient",
    "Side",
    "SketchedHosvd",
    "StackedGradient",
    "bernoulli_block_mask",
    "bernoulli_mask",
    "block_sets",
    "core_gradient",
    "core_ranks",
    "core_shape",
    "delta_linear",
    "delta_product",
    "delta_weight",
    "file_dtype",
    "from_core",
    "gaussian_block_mask",
    "gaussian_mask",
    "gradient_energy",
    "hosvd_accumulator",
    "hosvd_of_weight",
    "is_older_form",
    "is_selection",
    "keep_largest",
    "masked_layer",
    "masked_linear",
    "masked_sum",
    "num_trained_values",
    "observe_gradient",
    "observe_weight_gradient",
    "pack_support",
    "packed_support_size",
    "renew_support",
    "rounded",
    "select_support",
    "select_supports",
    "set_mask",
    "side_in",
    "side_like",
    "side_matrix",
    "sparse_by_dense",
    "sparse_by_dense_coo",
    "spread_support",
    "stacked_core_gradient",
    "stacked_delta",
    "stacked_sum",
    "stream_key",
    "to_core",
    "unpack_support",
    "weight_gradient",
    "writing_out_pays",
]
