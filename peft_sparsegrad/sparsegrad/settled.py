"""The check that an adapter's warm-up has finished."""

from __future__ import annotations

from .adapter import LayerAdapter


def check_settled(adapters: list[LayerAdapter], adapter_name: str) -> None:
    """Raise a ValueError if the warm-up has not finished, so that there is no basis and no support yet."""
    if not all(adapter.is_settled for adapter in adapters):
        raise ValueError(
            f"the warm-up of the adapter {adapter_name!r} has not finished: run `peft_sparsegrad.warmup` first, or "
            "train longer"
        )
