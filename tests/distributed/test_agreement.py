"""Ranks that differ go on as one, or all end with the same error."""

import pytest
from ranks import Failure

SCRIPT = "agreement"


def errors(ranks, function, **arguments):
    with pytest.raises(Failure) as failure:
        ranks.run(function, **arguments)
    return failure.value.errors


@pytest.mark.parametrize("ok", [[True, True, True], [True, False, True], [False, False, False]])
def test_all_ranks_learn_whether_all_can_go_on(ranks, ok):
    assert ranks.run("agreement", world=3, points=["here"] * 3, ok=ok) == [all(ok)] * 3


def test_one_process_agrees_with_itself(ranks):
    assert ranks.run("agreement", world=1, points=["here"], ok=[False]) == [False]


def test_ranks_at_different_points_raise_the_same_error(ranks):
    found = errors(ranks, "agreement", world=3, points=["here", "here", "there"], ok=[True, False, True])
    assert (
        found
        == [
            "RuntimeError: the ranks have come to different points, rank 0 to here and rank 2 to there: do as the others"
        ]
        * 3
    )


@pytest.mark.parametrize("world", [1, 3])
def test_numbers_come_in_the_order_of_the_ranks(ranks, world):
    assert ranks.run("numbers", world=world) == [[5, 6, 7][:world]] * world


def test_join_context_is_refused_on_all_ranks(ranks):
    found = errors(ranks, "passes_of_ddp", joined=True)
    assert all("the test needs all ranks in every pass" in error and "without `join`" in error for error in found)


@pytest.mark.parametrize("joined", [None, False])
def test_passes_without_a_join_context_are_not_refused(ranks, joined):
    ranks.run("passes_of_ddp", joined=joined)
