"""Layers that are copied for `torch.nn.DataParallel`, which the Trainer takes for several GPUs in one process."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import batch, llama, logits, train

from peft_sparsegrad import GradDrop, GradDropConfig, SparseGradConfig

METHODS = {
    "SparseGrad": lambda: SparseGradConfig(density=0.05, warmup_steps=0),
    "GradDrop": lambda: GradDropConfig(target_modules=r".*_proj"),
}


class Copied(torch.autograd.Function):
    """Copies whose gradients arrive at the originals, as those of `DataParallel` do."""

    @staticmethod
    def forward(ctx, *tensors):
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


def replica(model):
    """A copy as `torch.nn.parallel.replicate`, which needs GPUs, makes it for each of them."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    originals = list(model.parameters())
    tensors = dict(zip(originals, Copied.apply(*originals), strict=True))
    for module, copy in copies.items():
        for name, child in module._modules.items():
            copy._modules[name] = child if child is None else copies[child]
        for name, parameter in module._parameters.items():
            if parameter is None:
                copy._parameters[name] = None
            else:
                setattr(copy, name, tensors[parameter])
        copy._buffers = {
            name: buffer if buffer is None else buffer.clone() for name, buffer in module._buffers.items()
        }
    return copies[model]


@pytest.mark.parametrize("method", METHODS)
def test_training_through_data_parallel(method):
    model = get_peft_model(llama(), METHODS[method]())
    with pytest.raises(RuntimeError, match=r"DataParallel, .* cannot train an adapter: .*`torchrun`"):
        replica(model)


@pytest.mark.parametrize("method", METHODS)
def test_inference_through_data_parallel(method, tmp_path):
    trained = get_peft_model(llama(), METHODS[method]())
    train(trained.train())
    with torch.no_grad():
        assert torch.allclose(logits(replica(trained)), logits(trained), atol=1e-5)
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.allclose(logits(replica(loaded)), logits(trained), atol=1e-5)


def test_masked_lora_through_data_parallel():
    """GradDrop on the parameters of another method masks what arrives at them, which is the sum over the copies."""
    states = []
    for copied in (False, True):
        torch.manual_seed(1)
        model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["up_proj"]))
        GradDrop(model, GradDropConfig(p=0.5))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.05)
        for step in range(4):
            halves = [{name: tensor[half::2] for name, tensor in batch(step).items()} for half in range(2)]
            sum((replica(model) if copied else model)(**half).loss / 2 for half in halves).backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append(trained)
    assert all(torch.equal(*pair) for pair in zip(*states, strict=True))
