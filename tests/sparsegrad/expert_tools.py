"""Mixtures of experts with a SparseGrad adapter on their fused weights."""

from mixtures import EXPERTS, gpt_oss, mixtral, qwen3_moe
from peft import get_peft_model

from peft_sparsegrad import SparseGradConfig
from peft_sparsegrad.sparsegrad.layer import SparseGradLayer

MODELS = [mixtral, qwen3_moe, gpt_oss]


def adapted(model, adapter_name="default", **settings):
    size = {} if "num_values" in settings else {"density": 0.05}
    settings = {"target_modules": [], "target_parameters": EXPERTS, **size, "warmup_steps": 0, **settings}
    return get_peft_model(model, SparseGradConfig(task_type="CAUSAL_LM", **settings), adapter_name)


def expert_layers(model):
    return [module for module in model.modules() if isinstance(module, SparseGradLayer)]
