"""The methods whose saved adapters can be read. A new one is a file in this folder and a line here."""

from __future__ import annotations

from ..errors import InputError
from .adapter import SavedAdapter
from .graddrop import SavedGradDrop
from .lora import SavedLora
from .method import SavedMethod
from .sparsegrad import SavedSparseGrad

METHODS: dict[str, type[SavedMethod]] = {
    method.peft_type: method for method in (SavedSparseGrad, SavedGradDrop, SavedLora)
}
NEED_THE_IMPORT = ("SPARSEGRAD", "GRADDROP")  # of this package, without which PEFT raises `KeyError: 'SPARSEGRAD'`


def read_method(adapter: SavedAdapter) -> SavedMethod:
    """Read an adapter as its method stores it.

    Raises:
        InputError: If the method cannot be read, or the files are damaged.
    """
    if adapter.method not in METHODS:
        raise InputError(f"the weights of a {adapter.method} adapter cannot be read; {', '.join(METHODS)} can")
    return METHODS[adapter.method](adapter)
