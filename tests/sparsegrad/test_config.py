import json

import pytest
from peft import LoraConfig, PeftConfig

from peft_sparsegrad import SparseGradConfig


def test_defaults():
    config = SparseGradConfig()
    assert config.peft_type == "SPARSEGRAD"
    assert config.target_modules is None
    assert (config.density, config.num_values, config.rank) == (0.01, None, "auto")
    assert (config.basis, config.support, config.support_score) == ("hosvd", "static", "mean")
    assert config.warmup_steps > 1
    assert (config.slack, config.renewal_steps) == (4, 25)
    assert config.init_weights is True
    assert config.density_pattern == {} == config.rank_pattern


def test_pattern_dicts_are_not_shared_between_configurations():
    SparseGradConfig().density_pattern["a"] = 0.5
    assert SparseGradConfig().density_pattern == {}


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        *[("density", {"density": d}) for d in (0, 0.0, 1.5, -1, float("nan"))],
        *[(r"density_pattern\['up'\]", {"density_pattern": {"down": 0.5, "up": d}}) for d in (0, 1.5, -1)],
        *[("num_values", {"num_values": n}) for n in (0, -5)],
        *[("warmup_steps", {"warmup_steps": n}) for n in (-1, 1)],
        ("basis", {"basis": "pca"}),
        ("support", {"support": "random"}),
        ("support_score", {"support_score": "signal"}),
        *[("slack", {"slack": s}) for s in (0, 0.99, -1, float("inf"), float("nan"))],
        ("renewal_steps", {"renewal_steps": -1}),
        *[("rank", {"rank": r}) for r in (0, -1, "x", (1, 2, 3), (), (0, 4), True, (True, 4), 1.5, None)],
        *[("rank", {"rank": r}) for r in ((None, None), [None, None], (None, 0), ("full", None))],
        (r"rank_pattern\['up'\]", {"rank_pattern": {"up": (None, None)}}),
        *[(r"rank_pattern\['up'\]", {"rank_pattern": {"up": r}}) for r in (0, "x", (1, 2, 3), True)],
        *[("rank", {"basis": "identity", "rank": r}) for r in (4, (4, 4), "narrower")],
        *[("rank", {"basis": "columns", "rank": r}) for r in ("full", "narrower", (4, 4))],
        ("rank", {"basis": "identity", "rank_pattern": {"up": 4}}),
        *[("transition_matrices", {"transition_matrices": "file", "basis": b}) for b in ("svd", "identity")],
        ("layers_to_transform", {"target_modules": ".*up", "layers_to_transform": [0]}),
        ("layers_pattern", {"target_modules": ".*up", "layers_pattern": "layers"}),
        ("layers_pattern", {"target_modules": ["up"], "layers_pattern": "layers"}),
    ],
    ids=str,
)
def test_bad_field_is_named(field, settings):
    with pytest.raises(ValueError, match=f"`{field}`"):
        SparseGradConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"density": 1},
        {"density": 1e-6},
        {"num_values": 1},
        {"warmup_steps": 0},
        {"warmup_steps": 2},
        {"rank": 1},
        {"rank": (1, 2)},
        {"rank": (None, 2)},
        {"rank": (1, None)},
        {"slack": 1},
        {"slack": 1.5},
        {"renewal_steps": 0},
        {"renewal_steps": 1},
        {"basis": "identity", "rank": "full"},
        {"target_modules": "all-linear"},
        {"target_modules": ["up"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": None, "layers_to_transform": [0, 1]},
        {"layers_to_transform": [0], "layers_pattern": ["layers"]},
    ],
    ids=str,
)
def test_values_at_the_edge_are_accepted(settings):
    config = SparseGradConfig(**settings)
    assert {name: getattr(config, name) for name in settings if name != "target_modules"} == {
        name: value for name, value in settings.items() if name != "target_modules"
    }


def test_list_of_targets_becomes_a_set():
    config = SparseGradConfig(target_modules=["up", "down"], exclude_modules=["a.up"])
    assert config.target_modules == {"up", "down"}
    assert config.exclude_modules == {"a.up"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rank": (12, 30), "rank_pattern": {"down": (4, 6), "up": "full", "gate": 3}},
        {"rank": (None, 30), "rank_pattern": {"down": (4, None)}, "slack": 2.5, "renewal_steps": 7},
        {"rank": "full", "density_pattern": {"down": 0.5}},
        {"rank": 7, "num_values": 9},
        {"target_modules": ["up", "down"], "exclude_modules": ["head"], "modules_to_save": ["classifier"]},
        {"target_modules": ["up"], "layers_to_transform": [0, 3], "layers_pattern": "layers"},
        {"basis": "identity", "support": "dynamic", "support_score": "energy", "warmup_steps": 0},
        {"init_weights": False, "task_type": "CAUSAL_LM", "inference_mode": True},
        {"trainable_token_indices": [1, 2]},
    ],
    ids=str,
)
def test_round_trip_through_a_file(tmp_path, settings):
    config = SparseGradConfig(**settings)
    config.save_pretrained(str(tmp_path))
    json.loads((tmp_path / "adapter_config.json").read_text())
    for loaded in (SparseGradConfig.from_pretrained(str(tmp_path)), PeftConfig.from_pretrained(str(tmp_path))):
        assert type(loaded) is SparseGradConfig
        assert loaded == config


def test_rank_pair_is_a_tuple_again(tmp_path):
    SparseGradConfig(rank=(12, 30), rank_pattern={"down": (4, 6)}).save_pretrained(str(tmp_path))
    loaded = SparseGradConfig.from_pretrained(str(tmp_path))
    assert (type(loaded.rank), type(loaded.rank_pattern["down"])) == (tuple, tuple)


def test_transition_matrices_are_not_written_and_stay_on_the_object(tmp_path):
    config = SparseGradConfig(transition_matrices="warm_up.safetensors")
    config.save_pretrained(str(tmp_path))
    assert config.transition_matrices == "warm_up.safetensors"
    assert "warm_up" not in (tmp_path / "adapter_config.json").read_text()
    assert SparseGradConfig.from_pretrained(str(tmp_path)).transition_matrices is None


def test_transition_matrices_stay_on_the_object_when_saving_fails(tmp_path):
    config = SparseGradConfig(transition_matrices="warm_up.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises((AssertionError, OSError)):
        config.save_pretrained(str(tmp_path / "file"))
    assert config.transition_matrices == "warm_up.safetensors"


def test_no_field_is_mistaken_for_a_dropout():
    """PEFT's own tests set every field whose name ends so to 0.5."""
    assert not [name for name in SparseGradConfig().to_dict() if name.endswith("dropout")]


def test_another_methods_file_is_not_read_as_this_one(tmp_path):
    LoraConfig(target_modules=["up"]).save_pretrained(str(tmp_path))
    assert type(PeftConfig.from_pretrained(str(tmp_path))) is LoraConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"renewal_steps": 2.5}, "`renewal_steps` must be a whole number, not 2.5"),
        ({"renewal_steps": True}, "`renewal_steps` must be a whole number, not True"),
        ({"warmup_steps": "32"}, "`warmup_steps` must be a whole number, not '32'"),
        ({"num_values": 100.0}, "`num_values` must be a whole number, not 100.0"),
        ({"density": "1%"}, r"`density` must be a number in \(0, 1\], not '1%': 0.01 trains 1%"),
        ({"density": True}, "`density` must be a number"),
        ({"density_pattern": {"up": None}}, r"`density_pattern\['up'\]` must be a number in \(0, 1\], not None"),
    ],
)
def test_values_of_another_type_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SparseGradConfig(**settings)


FIELDS = ("rank", "basis", "support", "renewal_steps", "slack")
VARIANTS = {
    "sparsegrad": ("auto", "hosvd", "static", 25, 4.0),
    "columns": ("auto", "columns", "static", 25, 4.0),
    "full-bases": ("full", "hosvd", "static", 25, 4.0),
    "sparsegrad-dynamic": ("auto", "hosvd", "dynamic", 25, 4.0),
    "paper": ("full", "hosvd", "dynamic", 25, 4.0),
    "meprop": ("auto", "identity", "static", 0, 4.0),
    "meprop-paper": ("auto", "identity", "dynamic", 25, 4.0),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_by_its_name(name):
    config = SparseGradConfig.from_variant(name, num_values=7)
    assert tuple(getattr(config, field) for field in FIELDS) == VARIANTS[name]
    assert (config.num_values, config.density, config.target_modules) == (7, 0.01, None)


def test_the_default_is_the_variant_of_the_methods_name():
    assert SparseGradConfig.from_variant("sparsegrad").to_dict() == SparseGradConfig().to_dict()


def test_unknown_variant_lists_all():
    with pytest.raises(ValueError, match="there is no SparseGrad variant 'Paper'; there are " + ", ".join(VARIANTS)):
        SparseGradConfig.from_variant("Paper")


def test_variant_with_settings_that_contradict_it_is_refused():
    with pytest.raises(ValueError, match="`rank` has no meaning with basis='identity'"):
        SparseGradConfig.from_variant("meprop-paper", rank=8)
