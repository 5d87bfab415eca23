"""The command line `peft-sparsegrad`, also `python -m peft_sparsegrad` (extra `cli`)."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point. Exits with the command's status, or with 2 and one line where typer or rich is not installed."""
    try:
        from .app import run
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("rich", "typer"):
            raise
        sys.stderr.write("error: the command line needs typer and rich: pip install 'peft-sparsegrad[cli]'\n")
        sys.exit(2)
    run()
