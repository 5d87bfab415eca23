"""Memory that each rank holds for a LLaMA-2 7B in training, counted on the meta device: no weights, no processes.

    python -m benchmarks.rank_memory --ranks 2 8

Counted is what is alive between the backward pass and the optimizer's step, from the second step on. Left out are
activations, and what an engine holds for a moment: buckets, and gathered weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.tables import markdown_table
from peft_sparsegrad import GradDropConfig, SparseGradConfig
from peft_sparsegrad.graddrop.layer import GradDropLayer
from peft_sparsegrad.sparsegrad.adapter import LayerAdapter
from peft_sparsegrad.sparsegrad.basis import Basis

Tensors: TypeAlias = "list[torch.Tensor]"

METHODS: dict[str, Callable[[], PeftConfig]] = {
    "LoRA": lambda: LoraConfig(r=16, target_modules=["up_proj", "down_proj"], task_type="CAUSAL_LM"),
    "SparseGrad": lambda: SparseGradConfig(task_type="CAUSAL_LM"),
    "SparseGrad, columns": lambda: SparseGradConfig.from_variant("columns", task_type="CAUSAL_LM"),
    "SparseGrad, dynamic": lambda: SparseGradConfig(support="dynamic", task_type="CAUSAL_LM"),
    "GradDrop": lambda: GradDropConfig(task_type="CAUSAL_LM"),
    "GradDrop-Epoch": lambda: GradDropConfig.from_variant("GradDrop-Epoch", task_type="CAUSAL_LM"),
}


class OfRank(NamedTuple):
    """Tensors of one kind each that one rank holds, or their bytes.

    Attributes:
        base: Frozen parameters and buffers of the base model.
        bases: Transition matrices.
        supports: Supports, slots, and positions of the values; masks that GradDrop remembers for an epoch.
        sums: Sum of the core's gradient since the last renewal.
        pending: Gradient of the core, until the step is taken.
        values: Trained parameters.
        gradients: Gradients of the trained parameters.
        copies: Trained parameters in float32, where the engine keeps them apart from those of the model.
        state: State of AdamW.
    """

    base: Tensors
    bases: Tensors
    supports: Tensors
    sums: Tensors
    pending: Tensors
    values: Tensors
    gradients: Tensors
    copies: Tensors
    state: Tensors

    def bytes(self) -> dict[str, int]:
        """Return the bytes of each kind."""
        return {kind: sum(tensor.nbytes for tensor in tensors) for kind, tensors in self._asdict().items()}


class Parameters(NamedTuple):
    """Parameters, gradients and float32 copies that one rank holds under an engine."""

    base: Tensors
    values: Tensors
    gradients: Tensors
    copies: Tensors


def llama_7b() -> LlamaForCausalLM:
    """Return a model of LLaMA-2 7B's shape in bfloat16 on the meta device."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # the defaults are those of 7B
        nn.Module.to(model, torch.bfloat16)
        return model


def count(model: nn.Module, engine: str, ranks: int) -> OfRank:
    """Return what the first of `ranks` ranks holds of a model with an adapter; the others hold no more.

    Args:
        model: The model in one piece, on any device.
        engine: Key of `ENGINES`.
        ranks: Number of ranks.
    """
    parameters = [(parameter.requires_grad, parameter.detach().to("meta")) for parameter in model.parameters()]
    frozen, trained = ([each for trains, each in parameters if trains is which] for which in (False, True))
    held = ENGINES[engine](frozen, trained, ranks)
    adapters = [module for module in model.modules() if isinstance(module, LayerAdapter)]
    cores = [torch.empty(each.plan.core_shape, device="meta") for each in adapters if each.training_state.is_renewed]
    return OfRank(
        base=held.base + _base_buffers(model),
        bases=[buffer for module in model.modules() if isinstance(module, Basis) for buffer in module.buffers()],
        supports=[tensor for adapter in adapters for tensor in _support(adapter)] + _remembered_masks(model),
        sums=cores,
        pending=cores,
        values=held.values,
        gradients=held.gradients,
        copies=held.copies,
        state=_state_of_adamw(held.copies or held.values),
    )


def _base_buffers(model: nn.Module) -> Tensors:
    modules = [module for module in model.modules() if isinstance(module, LayerAdapter | Basis)]
    own = {id(buffer) for module in modules for buffer in module.buffers()}
    return [buffer for buffer in model.buffers() if id(buffer) not in own]


def _support(adapter: LayerAdapter) -> Tensors:
    return [*adapter.buffers(), *([] if adapter.indices is None else [adapter.indices])]


def _remembered_masks(model: nn.Module) -> Tensors:
    """Return the masks of single entries that last for an epoch, a byte an entry."""
    layers = [module for module in model.modules() if isinstance(module, GradDropLayer)]
    masked = [masked for layer in layers for masked in layer.masked_parameters()]
    configs = [each.sampler.config for each in masked]
    lasting = [config.interval == "epoch" and config.granularity == "element" for config in configs]
    sizes = [each.parameter.numel() for each, lasts in zip(masked, lasting, strict=True) if lasts]
    return [torch.empty(size, dtype=torch.int8, device="meta") for size in sizes]


def _state_of_adamw(parameters: Tensors) -> Tensors:
    leaves = [parameter.detach().requires_grad_() for parameter in parameters]
    for leaf in leaves:
        leaf.grad = torch.empty_like(leaf)
    optimizer = torch.optim.AdamW(leaves, foreach=False)
    optimizer.step()
    return [tensor for state in optimizer.state.values() for tensor in state.values()]


def _whole(frozen: Tensors, trained: Tensors, ranks: int) -> Parameters:
    return Parameters(frozen, trained, trained, [])


def _fsdp2(frozen: Tensors, trained: Tensors, ranks: int) -> Parameters:
    """Cut every parameter along its first dimension, and pad each piece to the longest."""
    base, values = _rows(frozen, ranks), _rows(trained, ranks)
    return Parameters(base, values, values, [])


def _zero(frozen: Tensors, trained: Tensors, ranks: int) -> Parameters:
    """Join what trains to a flat tensor, whole on every rank; a rank has its share of gradients and float32 copies."""
    alignment = 2 * ranks
    size = _share(_size(trained), alignment) * alignment
    share = _bf16(size // ranks)
    return Parameters(frozen, [_bf16(size)], [share], [share.float()])


def _zero_3(frozen: Tensors, trained: Tensors, ranks: int) -> Parameters:
    """Cut every parameter into pieces of one length; a rank has its pieces and no more."""
    base = [tensor.new_empty(_share(tensor.numel(), ranks)) for tensor in frozen]
    share = _bf16(sum(_share(tensor.numel(), ranks) for tensor in trained))
    return Parameters(base, [share], [share], [share.float()])


WHOLE = "one process, DDP"
# Under ZeRO the model trains in bfloat16, its parameters alone, as with `bf16: {"enabled": true}`.
ENGINES: dict[str, Callable[[Tensors, Tensors, int], Parameters]] = {
    WHOLE: _whole,
    "FSDP2": _fsdp2,
    "ZeRO-1": _zero,
    "ZeRO-2": _zero,
    "ZeRO-3": _zero_3,
}


def _rows(tensors: Tensors, ranks: int) -> Tensors:
    return [tensor.new_empty(_share(len(tensor), ranks), *tensor.shape[1:]) for tensor in tensors]


def _bf16(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.bfloat16, device="meta")


def _size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _share(size: int, ranks: int) -> int:
    return -(-size // ranks)


def table(model: nn.Module, engines: Iterable[str], ranks: Iterable[int]) -> str:
    """Return a table in Markdown with a row for each engine and number of ranks, without columns that are empty."""
    runs = [(engine, number) for engine in engines for number in ([1] if engine == WHOLE else ranks)]
    counted = [count(model, engine, number).bytes() for engine, number in runs]
    kinds = [kind for kind in OfRank._fields if any(sizes[kind] for sizes in counted)]
    rows = []
    for (engine, number), sizes in zip(runs, counted, strict=True):
        columns = [*(sizes[kind] for kind in kinds), sum(sizes.values())]
        rows.append([engine, "any" if engine == WHOLE else str(number), *map(_readable, columns)])
    return markdown_table(["engine", "ranks", *kinds, "total"], rows)


def _readable(size: int) -> str:
    if size >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB" if size else ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rank_memory", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8], help="default: 2 8")
    parser.add_argument("--engine", choices=ENGINES, nargs="+", default=list(ENGINES), help="default: all")
    parser.add_argument("--method", choices=METHODS, nargs="+", default=list(METHODS), help="default: all")
    arguments = parser.parse_args()
    for method in arguments.method:
        with torch.device("meta"):
            model = get_peft_model(llama_7b(), METHODS[method]())
        print(f"## {method}\n\n{table(model, arguments.engine, arguments.ranks)}\n")


if __name__ == "__main__":
    main()
