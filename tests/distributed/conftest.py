"""One process's training, which several tests compare that of the ranks with."""

import pytest


@pytest.fixture(scope="module")
def one_process(ranks):
    """What a method trains in one process, by its name and whether it accumulates gradients."""
    done = {}

    def of(method, accumulation):
        if (method, accumulation) not in done:
            engine = "one process, accumulation" if accumulation else "one process"
            done[method, accumulation] = ranks("train_by_torch", world=1, engine=engine, method=method)[0]
        return done[method, accumulation]

    return of
