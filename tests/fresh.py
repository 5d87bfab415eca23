"""The environment of the processes that tests start."""

from __future__ import annotations

import os


def environment(**further: str) -> dict[str, str]:
    """Return this process's environment for one that compiles nothing, with one thread and no network.

    Dynamo is off because bitsandbytes, which PEFT imports, otherwise loads all of Inductor: a fifth of such a
    process's time.
    """
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1", **further}
