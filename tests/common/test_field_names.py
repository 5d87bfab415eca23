"""Keywords that a configuration does not have: what to set in their place, and what PEFT does with them in a file."""

import dataclasses
import inspect
import json
import pickle

import pytest
from peft import PeftConfig

from peft_sparsegrad import GradDropConfig, SparseGradConfig

BOTH = (SparseGradConfig, GradDropConfig)


@pytest.mark.parametrize(
    ("config", "settings", "way_out"),
    [
        (SparseGradConfig, {"r": 8}, "`density` .*`num_values`"),
        (SparseGradConfig, {"p": 0.2}, "`density`"),
        (SparseGradConfig, {"densty": 0.1}, "similar fields are `density`"),
        (GradDropConfig, {"r": 8}, "`p`"),
        (GradDropConfig, {"density": 0.1}, "`p`, and `save_density`"),
        (GradDropConfig, {"save_densty": 0.1}, "`save_density`"),
        *[(config, {"lora_alpha": 16}, "rescale_adapter_scale") for config in BOTH],
        *[(config, {"lora_dropout": 0.1}, "no dropout") for config in BOTH],
        *[(config, {"learning_rate": 1e-3}, "the optimizer's") for config in BOTH],
        *[(config, {"zzz": 1}, "it has task_type, .*target_modules") for config in BOTH],
    ],
    ids=str,
)
def test_unknown_keyword_names_the_way_out(config, settings, way_out):
    (name,) = settings
    with pytest.raises(TypeError, match=f"{config.__name__} got an unexpected keyword argument '{name}': .*{way_out}"):
        config(**settings)


@pytest.mark.parametrize("config", BOTH)
def test_every_field_named_as_a_way_out_exists(config):
    names = {field.name for field in dataclasses.fields(config)}
    assert not names & config.instead_of.keys()
    for text in config.instead_of.values():
        assert {word for word in text.split("`")[1::2]} <= names


def test_a_variant_with_an_unknown_keyword():
    with pytest.raises(TypeError, match="'r': an adapter's size is its `density`"):
        SparseGradConfig.from_variant("paper", r=8)


@pytest.mark.parametrize("config", BOTH)
def test_a_field_of_a_later_release_in_a_file_is_left_out_with_peft_s_warning(config, tmp_path):
    config(task_type="CAUSAL_LM").save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_a_later_release": 1}))
    with pytest.warns(UserWarning, match="of_a_later_release"):
        assert PeftConfig.from_pretrained(str(tmp_path)).task_type == "CAUSAL_LM"


@pytest.mark.parametrize("config", BOTH)
def test_signature_copies_and_pickles_are_a_dataclass_s(config):
    settings = config(target_modules=["up_proj"])
    assert "target_modules" in inspect.signature(config).parameters
    assert pickle.loads(pickle.dumps(settings)) == settings == dataclasses.replace(settings)


@pytest.mark.parametrize(("name", "value"), [("density", 0.02), ("density_pattern", {"up": 0.1})])
def test_two_fields_for_the_size_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"`num_values=100` and `{name}=.*leave one of the two out"):
        SparseGradConfig(num_values=100, **{name: value})
    assert SparseGradConfig(num_values=100, inference_mode=True, **{name: value}).num_values == 100
