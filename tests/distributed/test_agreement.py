"""Ranks that differ go on as one, or all end with the same error."""

import functools

import agreement
import pytest
import torch
from ranks import Failure
from versions import needs_fsdp2_on_a_cpu

SCRIPT = "agreement"


def errors(ranks, function, **arguments):
    with pytest.raises(Failure) as failure:
        ranks(function, **arguments)
    return failure.value.errors


@pytest.mark.parametrize("ok", [[True, True, True], [True, False, True], [False, False, False]])
def test_all_ranks_learn_whether_all_can_go_on(ranks, ok):
    assert ranks("agreement", world=3, points=["here"] * 3, ok=ok) == [all(ok)] * 3


def test_one_process_agrees_with_itself(ranks):
    assert ranks("agreement", world=1, points=["here"], ok=[False]) == [False]


def test_ranks_at_different_points_raise_the_same_error(ranks):
    found = errors(ranks, "agreement", world=3, points=["here", "here", "there"], ok=[True, False, True])
    message = "the ranks have come to different points, rank 0 to here and rank 2 to there: do as the others"
    assert found == [f"RuntimeError: {message}"] * 3


@pytest.mark.parametrize("world", [1, 3])
def test_numbers_come_in_the_order_of_the_ranks(ranks, world):
    assert ranks("numbers", world=world) == [[5, 6, 7][:world]] * world


def test_join_context_is_refused_on_all_ranks(ranks):
    found = errors(ranks, "passes_of_ddp", joined=True)
    assert all("the test needs all ranks in every pass" in error and "without `join`" in error for error in found)


@pytest.mark.parametrize("joined", [None, False])
def test_passes_without_a_join_context_are_not_refused(ranks, joined):
    ranks("passes_of_ddp", joined=joined)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("fewer batches", "ValueError: the ranks have [4, 3] batches with labels"),
        ("fewer batches than steps", "ValueError: the ranks have [4, 3] batches with labels"),
        ("batches without labels", "ValueError: the ranks have [4, 0] batches with labels"),
        ("a batch without a loss", "ValueError: warm-up batch 2 gave no loss"),
        ("a loss that is not finite", "ValueError: warm-up batch 0 gave a loss of"),
        ("a gradient that is not finite", "ValueError: SparseGrad's warm-up met NaN or Inf in the gradient of module"),
        ("fewer passes", "and rank 1 to the end of a sweep"),
    ],
)
def test_explicit_warm_up_of_uneven_ranks_is_refused_on_both(ranks, case, message):
    for error in errors(ranks, "uneven", case=case):
        assert message in error


def test_callable_that_runs_dry_on_one_rank_ends_the_other(ranks):
    first, second = errors(ranks, "uneven", case="a callable that runs dry")
    assert "the batches ran dry" in second
    assert "by peer" in first


def test_dataset_without_labels_on_one_rank_is_refused_on_both(ranks, tmp_path):
    for error in errors(ranks, "trainer_without_labels", folder=str(tmp_path)):
        assert "ValueError: the training dataset is empty, or all its labels are -100" in error


@pytest.mark.parametrize("layer", ["first", pytest.param("second", marks=pytest.mark.slow), "third"])
@pytest.mark.parametrize("in_ddp", [pytest.param(False, marks=pytest.mark.slow), True])
def test_layer_that_one_rank_skips_is_named_on_both(ranks, layer, in_ddp):
    for error in errors(ranks, "layer_skipped", layer=layer, in_ddp=in_ddp):
        assert f"some ranks run the layers ['{layer}'] in a pass and others do not" in error
        assert "warm the adapter up in one process and load it" in error


def test_layers_of_another_rank_are_refused_on_both(ranks):
    for error in errors(ranks, "other_layers"):
        assert "rank 0 to the backward pass of a model with 2 adapted layers, 'first' to 'second'" in error
        assert "rank 1 to the backward pass of a model with 1 adapted layers, 'third' to 'third'" in error


def test_warm_up_in_training_is_refused_in_a_join_context(ranks):
    for error in errors(ranks, "joined"):
        assert "SparseGrad's warm-up needs all ranks in every pass" in error


def test_rank_that_is_killed_ends_the_other(ranks):
    first, second = errors(ranks, "killed")
    assert second == "died"
    assert "by peer" in first  # gloo's error for a connection that was closed or reset


def same(found, expected, atol=1e-5):
    assert found["state"].keys() == expected["state"].keys()
    for name, tensor in found["state"].items():
        # A basis is rounded to float16, which may put two numbers on both sides of a border.
        rtol = 2**-10 if ".sparsegrad_basis." in name else 1e-5
        assert torch.allclose(tensor.double(), expected["state"][name].double(), rtol, atol), name
    for name, support in found["supports"].items():
        assert torch.equal(support, expected["supports"][name]), name


def test_expert_without_tokens_on_one_rank_is_warmed_up_as_in_one_process(ranks):
    first, second = ranks("expert_without_tokens")
    same(first, second)
    same(first, ranks("expert_without_tokens", world=1)[0])


@pytest.fixture(scope="module")
def warm_ups(ranks):
    """What each rank finds under an engine, by the engine's name."""
    return functools.cache(lambda engine: ranks("warm_ups", world=1 if engine == "one process" else 2, engine=engine))


@pytest.mark.parametrize("name", agreement.WARM_UPS)
@pytest.mark.parametrize("engine", ["DDP", pytest.param("FSDP2", marks=needs_fsdp2_on_a_cpu)])
def test_two_ranks_find_what_one_process_finds(warm_ups, engine, name):
    first, second = (found[name] for found in warm_ups(engine))
    same(first, second)
    if name != "energy":  # which is the sum of the squares of the ranks' own gradients
        # Without the pass with NaN two eigenvalues lie so close together that rounding turns their eigenvectors.
        same(first, warm_ups("one process")[0][name], atol=1e-3 if "NaN" in name else 1e-5)
