"""Two GradDrop adapters in one model: added up, switched, merged and deleted."""

import torch
from graddrop_tools import deltas, dropped, graddrop_layers, loss_of, masks_of, sgd, step, tower

from peft_sparsegrad import GradDropConfig


def two_adapters():
    model = dropped(tower(), p=0.5, seed=1, init_weights=False)
    model.add_adapter("other", GradDropConfig(p=0.5, seed=2, init_weights=False, target_modules=["up", "norm"]))
    return model


def test_two_active_adapters_add_up_and_have_masks_of_their_own():
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    loss_of(model).backward()
    plain = tower()
    with torch.no_grad():
        for adapter in ("default", "other"):
            for name, delta in deltas(model, adapter).items():
                plain.get_parameter(name).add_(delta)
    loss_of(plain).backward()
    for adapter in ("default", "other"):
        for name, delta in deltas(model, adapter).items():
            keep = (
                masks_of(model, "default")
                if adapter == "default"
                else graddrop_layers(model)["layers.0.up"].graddrop_sampler["other"]
            )
            mask = keep.mask(name, "")
            expected = plain.get_parameter(name).grad * mask.keep(delta.shape, delta.device) * mask.factor
            assert torch.allclose(delta.grad, expected)
    first, second = deltas(model)["layers.0.up.weight"].grad, deltas(model, "other")["layers.0.up.weight"].grad
    assert not torch.equal(first != 0, second != 0)


def test_adapter_that_is_not_active_gets_no_gradient():
    model = two_adapters()
    loss_of(model).backward()
    assert all(delta.grad is None and not delta.requires_grad for delta in deltas(model, "other").values())


def test_two_adapters_switch_merge_and_are_deleted():
    model = two_adapters()
    x = torch.randn(5, 8, dtype=torch.float64)
    first = model(x)
    model.set_adapter("other")
    second = model(x)
    model.base_model.set_adapter(["default", "other"])
    both = model(x)
    assert not torch.allclose(first, second)
    assert not torch.allclose(both, second)
    model.merge_adapter()
    assert torch.allclose(model(x), both)
    model.unmerge_adapter()
    model.set_adapter("other")
    model.merge_adapter(adapter_names=["other"])
    assert [layer.merged_adapters for layer in graddrop_layers(model).values()] == 3 * [["other"], ["other"], []]
    assert torch.allclose(model(x), second)
    model.unmerge_adapter()
    model.base_model.set_adapter(["other"])
    model.delete_adapter("default")
    assert torch.allclose(model(x), second)
    assert not any("default" in key for key in model.state_dict())
    assert not any("default" in layer.graddrop_sampler for layer in graddrop_layers(model).values())
    step(model, sgd(model))
