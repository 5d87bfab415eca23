"""Every file says its format, and a newer one is refused before anything is changed."""

from __future__ import annotations

import json

import pytest
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import adapted, batch, llama

from peft_sparsegrad import GradDropConfig, SparseGradConfig, save_transition_matrices, warmup

CONFIGS = {"sparsegrad": SparseGradConfig(warmup_steps=0), "graddrop": GradDropConfig()}


@pytest.mark.parametrize("name", CONFIGS)
def test_newer_adapter_is_refused(tmp_path, name):
    get_peft_model(llama(), CONFIGS[name]).save_pretrained(tmp_path)
    path, base = tmp_path / "adapter_config.json", llama()
    config = json.loads(path.read_text())
    assert config["format_version"] == 3
    path.write_text(json.dumps({**config, "format_version": 4, "a_setting_of_tomorrow": 3}))
    before = list(base.state_dict())
    with pytest.raises(ValueError, match=r"files of format 4, and this version of peft_sparsegrad reads .* up to 3"):
        PeftModel.from_pretrained(base, tmp_path)
    assert list(base.state_dict()) == before


def test_newer_transition_matrices_are_refused(tmp_path):
    model = adapted(warmup_steps=4)
    warmup(model, [batch(number) for number in range(4)], progress=False)
    save_transition_matrices(model, tmp_path / "matrices.safetensors")
    with safe_open(tmp_path / "matrices.safetensors", framework="pt") as file:
        metadata = file.metadata()
    newer = str(tmp_path / "newer.safetensors")
    save_file(load_file(tmp_path / "matrices.safetensors"), newer, metadata={**metadata, "version": "3"})
    with pytest.raises(ValueError, match=r"newer.safetensors' has format 3, and this version .* up to 2: upgrade it"):
        get_peft_model(llama(), SparseGradConfig(transition_matrices=newer))
