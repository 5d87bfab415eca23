"""Memory of a training step on the device, against LoRA's at the same targets."""

from __future__ import annotations

import torch
from gpu_twins import MLP
from peft import LoraConfig, PeftConfig, get_peft_model
from tiny import llama

from experiments.costs import step_memory
from peft_sparsegrad import SparseGradConfig

TOKENS = 512


def memory_of(config: PeftConfig, device: torch.device) -> dict[str, int]:
    """Bytes kept and peak of a step of two blocks of width 256 and 1024, under bfloat16 autocast."""
    model = get_peft_model(llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=2), config).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(3, 64, (8, TOKENS // 8), device=device)

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return model(input_ids=ids, labels=ids).loss

    forward().backward()
    optimizer.step()
    optimizer.zero_grad()
    return step_memory(model, optimizer, forward)


def test_the_default_takes_no_more_memory_than_lora_of_rank_16(device):
    ours = memory_of(SparseGradConfig(warmup_steps=0, task_type="CAUSAL_LM"), device)
    lora = memory_of(LoraConfig(r=16, target_modules=MLP, task_type="CAUSAL_LM"), device)
    assert ours["kept_memory"] <= lora["kept_memory"]
    assert ours["peak_memory"] <= lora["peak_memory"]
