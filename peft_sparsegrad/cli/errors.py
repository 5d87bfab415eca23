"""Errors that a user can act on, and a full disk, which every library words in its own way."""

from __future__ import annotations

import errno

# EFBIG is what a limit on a file's size gives, and a quota on some systems.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InputError(Exception):
    """Something that the user gave cannot be used; the message says what and why, in a sentence."""


def disk_is_full(error: BaseException) -> bool:
    """Whether a write failed for want of space. safetensors and torch.save say so in words alone."""
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return True
    text = str(error)
    if any(f"os error {number}" in text for number in NO_SPACE) or "PytorchStreamWriter failed writing" in text:
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and disk_is_full(cause)
