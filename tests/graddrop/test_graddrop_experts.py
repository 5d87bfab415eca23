"""GradDrop on the fused weights of experts (`target_parameters`), with LoRA on the same parameters beside it."""

import copy

import pytest
import torch
from graddrop_tools import deltas, graddrop_layers, masks_of
from mixtures import EXPERTS, gpt_oss, ids, loss, mixtral, qwen3_moe, train
from peft import LoraConfig, PeftModel, get_peft_model
from torch.func import functional_call

from peft_sparsegrad import GradDropConfig, convert_to_lora


def dropped(model, **settings):
    settings = {"target_modules": [], "target_parameters": EXPERTS, "frozen": "gradient", **settings}
    return get_peft_model(model, GradDropConfig(**settings))


def weight_of(name):
    """Name of the parameter to which the delta of this name belongs."""
    return name.removesuffix(".weight")


@pytest.mark.parametrize("make", [mixtral, qwen3_moe, gpt_oss])
def test_output_and_masked_gradient_are_those_of_the_changed_weights(make):
    model = dropped(make("batched_mm").double(), init_weights=False, p=0.5).double()
    base = make().double()
    weights = {
        weight_of(name): (base.get_parameter(weight_of(name)) + delta).detach().requires_grad_()
        for name, delta in deltas(model).items()
    }
    assert len(weights) == 4
    output = functional_call(base, weights, kwargs={"input_ids": ids(), "labels": ids()})
    output.loss.backward()
    found = model(input_ids=ids(), labels=ids())
    found.loss.backward()
    torch.testing.assert_close(found.logits, output.logits)
    for name, delta in deltas(model).items():
        block = ".".join(name.split(".")[:3])
        gradient = weights[weight_of(name)].grad.contiguous()
        wanted = masks_of(model).mask(name, block).apply_(gradient.clone())
        assert 0.3 < (wanted == 0).double().mean() - (gradient == 0).double().mean() * 0.5 < 0.7
        torch.testing.assert_close(delta.grad, wanted)


@pytest.mark.parametrize("frozen", ["hold", "gradient"])
def test_training_is_that_of_masked_weights(frozen):
    """Each step moves the kept entries as AdamW would, by a loop that masks the gradients of plain weights."""
    model, base = dropped(mixtral().double(), frozen=frozen).double(), mixtral().double()
    values = {weight_of(name): torch.zeros_like(delta, requires_grad=True) for name, delta in deltas(model).items()}
    optimizer = torch.optim.AdamW(values.values(), lr=0.02)
    masks = copy.deepcopy(masks_of(model).config)
    assert masks.frozen == frozen
    own = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        weights = {name: base.get_parameter(name) + value for name, value in values.items()}
        functional_call(base, weights, kwargs={"input_ids": ids(), "labels": ids()}).loss.backward()
        loss(model).backward()
        before = {name: value.detach().clone() for name, value in values.items()}
        kept = {}
        for name, value in values.items():
            mask = masks_of(model).mask(f"{name}.weight", ".".join(name.split(".")[:3]))
            kept[name] = mask.keep(value.shape, value.device)
            mask.apply_(value.grad)
        optimizer.step()
        own.step()
        with torch.no_grad():
            for name, value in values.items() if frozen == "hold" else ():
                value.copy_(torch.where(kept[name], value, before[name]))
        optimizer.zero_grad()
        own.zero_grad()
    for name, delta in deltas(model).items():
        torch.testing.assert_close(delta.detach(), values[weight_of(name)].detach())


def test_merging_saving_and_loading_are_exact_as_with_lora(tmp_path):
    lora = LoraConfig(target_modules=[], target_parameters=EXPERTS, r=2)
    for name, model in (("ours", dropped(mixtral())), ("lora", get_peft_model(mixtral(), lora))):
        losses = train(model, steps=4)
        assert losses[-1] < losses[0]
        model.eval()
        with torch.no_grad():
            output = model(input_ids=ids()).logits
            with model.disable_adapter():
                assert torch.equal(model(input_ids=ids()).logits, mixtral().eval()(input_ids=ids()).logits)
            model.save_pretrained(tmp_path / name)
            loaded = PeftModel.from_pretrained(mixtral(), tmp_path / name).eval()
            assert torch.equal(loaded(input_ids=ids()).logits, output)
            merged = model.merge_and_unload(safe_merge=True)
            torch.testing.assert_close(merged(input_ids=ids()).logits, output)
            assert merged.state_dict().keys() == mixtral().state_dict().keys()


def test_adapter_of_other_experts_is_refused(tmp_path):
    train(trained := dropped(mixtral(num_local_experts=3)), steps=1)
    trained.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"experts.*\((3, 48, 16|3, 16, 24)\).*\((4, 48, 16|4, 16, 24)\)"):
        PeftModel.from_pretrained(mixtral(), tmp_path)


def test_default_targets_come_with_the_parameters_of_the_chosen_blocks(tmp_path):
    model = dropped(mixtral(), target_modules=None, layers_to_transform=[1])
    names = graddrop_layers(model)
    assert {f"model.layers.1.{name}" for name in (*EXPERTS, "self_attn.q_proj")} <= set(names)
    assert {name.split(".")[2] for name in names} == {"1"}
    model.save_pretrained(tmp_path)
    assert graddrop_layers(PeftModel.from_pretrained(mixtral(), tmp_path)).keys() == names.keys()


def test_layerwise_masks_drop_a_block_with_its_experts():
    model = dropped(mixtral(), granularity="layer", p=0.5, seed=1)
    loss(model).backward()
    trained = {name: delta.grad is not None and bool(delta.grad.any()) for name, delta in deltas(model).items()}
    by_block = [{own for name, own in trained.items() if f"layers.{block}." in name} for block in range(2)]
    assert sorted(map(sorted, by_block)) == [[False], [True]]


def test_gradient_checkpointing_trains_the_same():
    plain, checkpointed = dropped(mixtral()), dropped(mixtral())
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed.train()
    plain.train()
    assert train(plain) == pytest.approx(train(checkpointed), rel=1e-6)


def test_bad_names_and_mixed_batches_are_refused():
    base = mixtral()
    keys = list(base.state_dict())
    with pytest.raises(ValueError, match=r"no parameter of the model: similar ones are 'experts.down_proj'"):
        dropped(base, target_parameters=["experts.downproj"])
    assert list(base.state_dict()) == keys
    model = dropped(base).eval()
    with pytest.raises(ValueError, match="`adapter_names` cannot be used with an adapter on"):
        model(input_ids=ids(), adapter_names=["default"] * 4)
    train(model.train(), steps=1)
    with pytest.raises(ValueError, match=r"on no linear layer.*merge the adapter"):
        convert_to_lora(model, rank=2)
