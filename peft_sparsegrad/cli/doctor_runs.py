"""The miniature runs of `doctor`, on a LLaMA with random weights. Each returns what was found, or raises."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from ..common.lora_conversion import convert_to_lora
from ..graddrop import GradDropConfig
from ..sparsegrad import SparseGradConfig
from ..sparsegrad.warmup.explicit import warmup

_VOCABULARY = 64


class Skipped(Exception):
    """This machine has no use for the run; the message says why."""


def run_sparsegrad(folder: str) -> str:
    """Warm up, train a step, save, load: the loaded model must compute the same."""
    model = _adapted(_tiny_llama(), _sparsegrad_config())
    report = warmup(model, [_batch(seed) for seed in range(4)], progress=False)
    loss = _train_step(model)
    _check_loads(model, folder)
    share = report.groups[0].energy_in_support or 0.0
    return f"loss {loss:.3f}, {share:.0%} of the gradient's energy on the support"


def run_graddrop(folder: str) -> str:
    """Train a step, save, load: the loaded model must compute the same."""
    model = _adapted(_tiny_llama(), GradDropConfig(task_type="CAUSAL_LM"))
    loss = _train_step(model)
    _check_loads(model, folder)
    return f"loss {loss:.3f}"


def run_lora_conversion(folder: str) -> str:
    """A trained SparseGrad adapter as LoRA, and loaded as such."""
    model = _adapted(_tiny_llama(), _sparsegrad_config())
    warmup(model, [_batch(seed) for seed in range(4)], progress=False)
    _train_step(model)
    conversion = convert_to_lora(model)
    conversion.save(folder)
    _check_same(_logits(PeftModel.from_pretrained(_tiny_llama(), folder)), _logits(model), 1e-4)
    return f"relative error {conversion.largest_error:.0e}"


def run_add_adapter(folder: str) -> str:
    """Attach and train an adapter without a `PeftModel`."""
    model = _tiny_llama()
    model.add_adapter(GradDropConfig())
    return f"loss {_train_step(model):.3f}"


def run_four_bit(folder: str) -> str:
    """Train a step on a base in 4 bits."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Skipped("bitsandbytes is not installed")
    _tiny_llama().save_pretrained(Path(folder, "base"))
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(Path(folder, "base"), quantization_config=config, dtype=torch.float32)
    model = _adapted(base, _sparsegrad_config())
    warmup(model, [_batch(seed) for seed in range(4)], progress=False)
    return f"loss {_train_step(model):.3f} on the {next(model.parameters()).device.type.upper()}"


def run_cuda(folder: str) -> str:
    """Train a step on the GPU."""
    if not torch.cuda.is_available():
        raise Skipped("PyTorch sees no GPU")
    model = _adapted(_tiny_llama(), _sparsegrad_config()).to("cuda")
    warmup(model, [_batch(seed) for seed in range(4)], progress=False)
    return f"loss {_train_step(model):.3f} on {torch.cuda.get_device_name()}"


def _tiny_llama() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes: Any = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=_VOCABULARY, **sizes))


def _sparsegrad_config() -> SparseGradConfig:
    return SparseGradConfig(density=0.05, warmup_steps=4, task_type="CAUSAL_LM")


def _adapted(base: Any, config: Any) -> Any:
    return get_peft_model(base, config)


def _batch(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(_VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def _train_step(model: Any) -> float:
    """One step of AdamW on every adapter value. Returns the loss before it."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss = model.train()(**{key: tensor.to(device) for key, tensor in _batch(9).items()}).loss
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=_batch(9)["input_ids"]).logits


def _check_loads(model: Any, folder: str) -> None:
    model.save_pretrained(folder)
    trained = _logits(model)
    if torch.equal(trained, _logits(_tiny_llama())):
        raise RuntimeError("a training step changed nothing")
    _check_same(_logits(PeftModel.from_pretrained(_tiny_llama(), folder)), trained, 0.0)


def _check_same(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    difference = (found - expected).abs().max().item()
    if not difference <= tolerance:
        raise RuntimeError(f"the loaded adapter computes something else, by {difference:.1e}")
