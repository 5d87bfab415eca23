"""GradDrop's adapters disabled, merged and unmerged."""

import copy

import pytest
import torch
from graddrop_layer_tools import LAYERS, made
from graddrop_tools import deltas, dropped, graddrop_layers
from tiny import bert, logits


@pytest.mark.parametrize("kind", [*LAYERS, "embedding"])
@pytest.mark.parametrize("safe_merge", [True, False])
def test_disable_merge_and_unmerge(kind, safe_merge):
    layer, model, x = made(kind)
    model.eval()
    layer.eval()
    expected, base = model(x), layer(x)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    assert not torch.allclose(expected, base)
    model.merge_adapter(safe_merge=safe_merge)
    assert torch.allclose(model(x), expected)
    with model.disable_adapter():
        assert torch.allclose(model(x), base)
    model.merge_adapter(safe_merge=safe_merge)
    model.unmerge_adapter()
    assert torch.allclose(model(x), expected)
    for name, parameter in layer.named_parameters():
        assert torch.allclose(model.base_model.model.layer.base_layer.get_parameter(name), parameter)


def test_merging_twice_merges_once():
    model = dropped(init_weights=False)
    expected = logits(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="merged"):
        model.merge_adapter()
    assert torch.allclose(logits(model), expected, atol=1e-4)


def test_unmerging_what_is_not_merged_warns():
    with pytest.warns(UserWarning, match="Already unmerged"):
        dropped().unmerge_adapter()


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_safe_merge_refuses_nan_and_leaves_the_layer(kind):
    model = dropped(bert(), init_weights=False)
    name = next(name for name in deltas(model) if name.endswith(kind))
    layer = graddrop_layers(model)[name.rpartition(".")[0]]
    before = copy.deepcopy(layer.get_base_layer().state_dict())
    with torch.no_grad():
        deltas(model)[name].view(-1)[0] = float("nan")
    with pytest.raises(
        ValueError, match=r"^NaNs detected in the merged weights\. The adapter default seems to be broken$"
    ):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(layer.get_base_layer().state_dict()[key], value) for key, value in before.items())
    assert not layer.merged
