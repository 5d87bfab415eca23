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
from .spectra import spectra
from .supports import support_maps

__all__ = [
    "active_entries",
    "active_shares",
    "energy_over_training",
    "gradient_heat_map",
    "gradient_magnitudes",
    "spectra",
    "support_maps",
]
