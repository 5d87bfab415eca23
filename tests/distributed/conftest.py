"""The server that runs the functions of a script on several ranks."""

from pathlib import Path

import pytest
from fresh import environment
from ranks import Ranks


@pytest.fixture(scope="module")
def ranks(request, tmp_path_factory):
    """Runs the functions of the script `SCRIPT`, which lies beside the test module that names it."""
    script = Path(__file__).parent / f"{request.module.SCRIPT}.py"
    server = Ranks(script, tmp_path_factory.mktemp("ranks"), environment())
    yield server
    server.stop()


@pytest.fixture(scope="module")
def one_process(ranks):
    """What a method trains in one process, by its name and whether it accumulates gradients."""
    done = {}

    def of(method, accumulation):
        if (method, accumulation) not in done:
            engine = "one process, accumulation" if accumulation else "one process"
            done[method, accumulation] = ranks.run("train_by_torch", world=1, engine=engine, method=method)[0]
        return done[method, accumulation]

    return of
