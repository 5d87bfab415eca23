"""Pictures of gradients, bases, supports and training (extra `plot`).

Every function takes data and returns a `matplotlib.figure.Figure`, which needs no display: `figure.savefig(path)`.
"""

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError("plots need matplotlib: pip install 'peft-sparsegrad[plot]'", name=error.name) from error

from .active_entries import active_entries, active_shares
from .energy import energy_over_training
from .gradients import gradient_heat_map, gradient_magnitudes
from .nonzero_shares import NonzeroShares, nonzero_shares, recorded_nonzero_shares
from .output_gradients import nonzero_over_training, output_gradient_rows
from .spectra import spectra
from .supports import support_maps

__all__ = [
    "NonzeroShares",
    "active_entries",
    "active_shares",
    "energy_over_training",
    "gradient_heat_map",
    "gradient_magnitudes",
    "nonzero_over_training",
    "nonzero_shares",
    "output_gradient_rows",
    "recorded_nonzero_shares",
    "spectra",
    "support_maps",
]
