"""Errors that a user can act on, and a full disk, which every library words in its own way."""

from __future__ import annotations

import errno
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

# EFBIG is what a limit on a file's size gives, and a quota on some systems.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InputError(Exception):
    """Something that the user gave cannot be used; the message says what and why, in a sentence."""


def disk_is_full(error: BaseException) -> bool:
    """Return whether a write failed for want of space. safetensors and torch.save say so in words alone."""
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return True
    text = str(error)
    if any(f"os error {number}" in text for number in NO_SPACE) or "PytorchStreamWriter failed writing" in text:
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and disk_is_full(cause)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """For a whole program: quiet libraries, and exit status 2 with one line on stderr where the input cannot be used.

    A full disk is such an input; anything else that is raised is a fault of the program, and keeps its traceback.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        yield
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except Exception as error:
        if not disk_is_full(error):
            raise
        sys.stderr.write(f"error: the disk is full ({str(error).splitlines()[0]}); make room and start again\n")
        sys.exit(2)
