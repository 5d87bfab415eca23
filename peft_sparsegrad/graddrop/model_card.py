"""The section of the model card on an adapter that was saved with `save_density`."""

from __future__ import annotations

import re
from pathlib import Path

from ..common.files.atomic import write_text
from ..common.files.model_card import END

_BEGIN = "<!-- peft_sparsegrad: what was left out -->"


def note_saved_energy(directory: str, save_density: float | None, saved_energy: float | None) -> None:
    """Write, replace or remove the section of the model card on the entries that were not saved.

    Args:
        directory: Folder of the adapter; its `README.md` is created if there is none.
        save_density: Share of each tensor's entries that was saved; None if all entries that changed were.
        saved_energy: Share of the squared norm of all changes that the saved entries hold. None if nothing was left
            out now, which leaves the card unchanged: the adapter may have been loaded from a file with such a section.
    """
    if save_density is not None and saved_energy is None:
        return
    card = Path(directory, "README.md")
    text = card.read_text("utf-8") if card.exists() else ""
    without = re.sub(rf"\n*{re.escape(_BEGIN)}.*?{re.escape(END)}", "", text, flags=re.DOTALL).rstrip()
    if save_density is None:
        if _BEGIN in text:
            write_text(card, f"{without}\n")
        return
    section = (
        f"{_BEGIN}\n## What was left out of this file\n\n"
        f"`save_density={save_density:g}`: of each tensor's changes only the largest "
        f"{save_density:.2%} were saved. They hold {saved_energy:.2%} of the squared norm of all changes; the rest is "
        f"lost, and the loaded adapter differs from the trained one by it.\n{END}\n"
    )
    write_text(card, f"{without}\n\n{section}" if without else section)
