"""Plugin of pytest that runs PEFT's generic tests for one method of this package, in place of PEFT's own methods.

PEFT's tests take the class of a configuration, and mostly its settings, from tables in `pytest.mark.parametrize`. The
plugin puts rows for the class that PEFT_SUITE_METHOD names in place of these tables, and deselects tests without one.
PEFT's files are read as they are.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from peft_sparsegrad import GradDropConfig, SparseGradConfig

if find_spec("diffusers") is None:  # PEFT's tests import it, and only those of its own methods use it
    sys.modules["diffusers"] = cast(ModuleType, SimpleNamespace(StableDiffusionPipeline=None))

METHODS: dict[str, tuple[type, dict[str, Any]]] = {
    "SparseGrad": (SparseGradConfig, {"density": 0.5, "warmup_steps": 0}),
    "GradDrop": (GradDropConfig, {}),
}
CONFIG, SETTINGS = METHODS[os.environ["PEFT_SUITE_METHOD"]]
TARGETS: tuple[dict[str, Any], ...] = (
    {"target_modules": "lin0"},
    {"target_modules": ["lin0"]},
    {"target_modules": ["lin1"]},
    {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
    {"target_modules": ["lin0", "lin1"]},
    {"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin1"]},
)
NOT_FOR_US = {
    # about LoRA's and IA³'s own parts or default targets
    *("test_default_target_modules_list_of_str", "test_default_target_modules_str"),
    *("test_weighted_combination_of_adapters", "test_add_weighted_adapter_cat_with_rank_pattern"),
    *("test_adapter_name_makes_no_difference", "test_disable_adapter_with_bias_warns"),
    # about prompts
    *("test_prompt_learning_forward_with_inputs_embeds", "test_set_requires_grad_prompt_learning_raises"),
    *("test_prompt_learning_with_gradient_checkpointing", "test_prompt_tuning_text_prepare_for_training"),
    *("test_prompt_tuning_sample_vocab_prepare_for_training", "test_training_prompt_learning_tasks"),
    # downloads into an empty folder
    "test_from_pretrained_cache_dir",
}


class WithSettings(CONFIG):
    """The configuration for tests that name `target_modules` and nothing else."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{**SETTINGS, **settings})


def rows(names: Sequence[str], table: Sequence[Any]) -> list[Any] | None:
    """Return our rows for a table of PEFT's tests; None if the table is not one of methods, [] if it has no like."""
    if "config_cls" not in names and "config_class" not in names:
        return None
    if tuple(names) == ("test_name", "model_id", "config_cls", "config_kwargs"):
        return [(f"MLP {n}", "MLP", CONFIG, {**SETTINGS, **targets}) for n, targets in enumerate(TARGETS)]
    if tuple(names) == ("test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"):
        one, other = ({**SETTINGS, "init_weights": False, "target_modules": [name]} for name in ("lin0", "lin1"))
        return [("same", "external", CONFIG, one, one), ("different", "external", CONFIG, one, other)]
    if tuple(names) == ("config_cls", "config_kwargs"):
        return [(CONFIG, {**SETTINGS, "target_modules": None, **_task(table[0])})]
    if tuple(names) == ("config_class", "mandatory_kwargs"):
        return [(CONFIG, SETTINGS)]
    return [WithSettings] if len(names) == 1 else []


def _task(row: Any) -> dict[str, Any]:
    settings = getattr(row, "values", row)[1]
    return {"task_type": settings["task_type"]} if "task_type" in settings else {}


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for number, mark in enumerate(metafunc.definition.own_markers):
        if mark.name != "parametrize":
            continue
        names = [n.strip() for n in mark.args[0].split(",")] if isinstance(mark.args[0], str) else list(mark.args[0])
        ours = rows(names, list(mark.args[1]))
        if ours is not None:
            metafunc.definition.own_markers[number] = pytest.mark.parametrize(mark.args[0], ours).mark


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if _is_ours(item)]
    config.hook.pytest_deselected(items=[item for item in items if not _is_ours(item)])
    items[:] = ours
    for item in ours:
        module = getattr(item, "module", None)
        if hasattr(module, "check_beft_config"):
            # PEFT 0.21.2 asks `isinstance` of a class here, and so skips merging on LLaMA for all methods but BEFT.
            module.check_beft_config = lambda *args: None


def _is_ours(item: Any) -> bool:
    given = getattr(getattr(item, "callspec", None), "params", {})
    about = given.get("config_cls", given.get("config_class"))
    return item.originalname not in NOT_FOR_US and isinstance(about, type) and issubclass(about, CONFIG)
