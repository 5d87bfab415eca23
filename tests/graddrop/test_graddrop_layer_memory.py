"""What GradDrop's layers keep for the backward pass, and what masked ones do not compute."""

import pytest
import torch
from graddrop_layer_tools import made
from graddrop_tools import deltas, dropped, loss_of, masks_of, tower
from tiny import batch, llama
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from peft_sparsegrad import GradDrop


def kept_storages(model, x):
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage, tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers(), x]}
    return y, {pointer: shape for pointer, (_, shape) in kept.items() if pointer not in own}


@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d", "conv", "conv, groups"])
def test_sum_of_weight_and_delta_is_not_kept_for_the_backward_pass(kind):
    layer, model, x = made(kind)
    _, kept = kept_storages(model, x.requires_grad_())
    assert not [shape for shape in kept.values() if shape.numel() == layer.weight.numel()]


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_input_is_not_kept_where_nothing_of_the_weight_trains(kind):
    _, model, x = made(kind, granularity="layer", p=0.5)
    masks = masks_of(model)
    shares = {}
    for number in range(20):
        masks.progress.set_step(number)
        own = x.clone().requires_grad_() * 1.0
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            model(own)
        trains = not masks.mask("", "layer").keeps_nothing
        shares.setdefault(trains, set()).add(any(t.shape[-1] == x.shape[-1] and t.numel() == x.numel() for t in kept))
    assert shares == {True: {True}, False: {False}}


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__.split(".")[0] in ("mm", "addmm", "bmm", "convolution", "convolution_backward")
        return func(*args, **(kwargs or {}))


def test_masked_layers_compute_no_weight_gradient():
    model = dropped(tower(num_blocks=4), "Layer-GradDrop", p=0.5)
    masks = masks_of(model)
    counts = set()
    for number in range(24):
        masks.progress.set_step(number)
        loss = loss_of(model)
        with Products() as products:
            loss.backward()
        training = [block for block in masks.blocks if not masks.mask("", block).keeps_nothing]
        for name, delta in deltas(model).items():
            assert (delta.grad is not None) == any(name.startswith(f"{block}.") for block in training)
            delta.grad = None
        lowest = masks.blocks.index(training[0]) if training else 0  # if nothing trains, gradients of zero reach all
        counts.add((len(training), lowest, products.count))
    assert len({lowest for _, lowest, _ in counts}) > 2
    # of each block two gradients of weights, if it trains, and two of inputs, if it or one below it does
    assert len({count - 2 * training - 2 * (4 - lowest) for training, lowest, count in counts}) == 1


def test_masked_layers_save_arithmetic():
    model = dropped(llama(), "GradFreeze-TopDown", num_epochs=3)
    graddrop = GradDrop(model)
    flops = []
    for epoch in range(3):
        graddrop.set_epoch(epoch)
        loss = model(**batch()).loss
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        flops.append(counter.get_total_flops())
    per_block = 2 * 8 * 12 * (4 * 32 * 32 + 3 * 32 * 64)
    # nothing below the last block that trains is computed: neither gradients of weights nor of inputs
    assert [flops[1] - flops[0], flops[2] - flops[1]] == [2 * per_block, 2 * per_block]
