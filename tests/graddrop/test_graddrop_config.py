"""The settings: what is refused, what the paper's variants are, and that a file keeps them."""

import json
import re

import pytest
from peft import PeftConfig

from peft_sparsegrad import GradDropConfig

SETS = {"interval": "epoch", "selection": "without-replacement"}
ORDERED = {"interval": "epoch", "granularity": "layer", "selection": "top-down"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *[({"p": p}, f"`p` must be in [0, 1), not {p}") for p in (1, 1.0, -0.1, 2, float("nan"), float("inf"))],
        *[
            ({"save_density": d}, f"`save_density` must be in (0, 1] or None, not {d}")
            for d in (0, -0.5, 1.1, float("nan"))
        ],
        *[({"num_epochs": n}, f"`num_epochs` must be at least 1, not {n}") for n in (0, -3)],
        *[
            (
                {"schedule": schedule, "num_epochs": 1},
                f"`schedule='{schedule}'` changes what trains from epoch to epoch and needs at least 2 of them, "
                "`num_epochs` is 1: train longer, or use schedule='constant'",
            )
            for schedule in ("linear", "linear-paper", "exponential")
        ],
        ({"granularity": "row"}, "`granularity` must be one of element, layer, not 'row'"),
        ({"interval": "run"}, "`interval` must be one of step, epoch, not 'run'"),
        (
            {"selection": "random"},
            "`selection` must be one of bernoulli, without-replacement, top-down, bottom-up, not 'random'",
        ),
        (
            {"schedule": "cosine"},
            "`schedule` must be one of constant, linear, linear-paper, exponential, not 'cosine'",
        ),
        ({"noise": "uniform"}, "`noise` must be one of bernoulli, gaussian, not 'uniform'"),
        ({"frozen": "melt"}, "`frozen` must be one of hold, gradient, not 'melt'"),
        *[
            (
                {"selection": s, "granularity": "layer"},
                f"`selection='{s}'` adds a set in each epoch: it needs interval='epoch'",
            )
            for s in ("without-replacement", "top-down", "bottom-up")
        ],
        *[
            (
                {"selection": s, "interval": "epoch"},
                f"`selection='{s}'` is an order of layers: it needs granularity='layer'",
            )
            for s in ("top-down", "bottom-up")
        ],
        ({**SETS, "num_epochs": 1}, "`selection='without-replacement'` changes what trains from epoch to epoch"),
        ({"seed": 1.5}, "`seed` must be a whole number, not 1.5"),
        ({"p": "0.2"}, "`p` must be a number, not '0.2'"),
        ({"num_epochs": True}, "`num_epochs` must be a whole number or None, not True"),
        ({"blocks_per_epoch": 2.0}, "`blocks_per_epoch` must be a whole number or None, not 2.0"),
        ({**ORDERED, "blocks_per_epoch": 0}, "`blocks_per_epoch` must be at least 1 or None, not 0"),
        *[
            (
                {**settings, "blocks_per_epoch": 2},
                "`blocks_per_epoch=2` is for blocks in order: it needs selection='top-down' or 'bottom-up'",
            )
            for settings in ({}, {**SETS, "granularity": "layer"})
        ],
        ({"toggle": True}, "`toggle` freezes earlier sets again: it needs a `selection` that has sets"),
        ({"toggle": True, "interval": "epoch"}, "`toggle` freezes earlier sets again: it needs a `selection`"),
        *[
            (
                {**sets, "schedule": "linear"},
                f"`schedule='linear'` has no meaning with selection='{sets['selection']}'",
            )
            for sets in (SETS, ORDERED)
        ],
        *[
            ({**sets, "noise": "gaussian"}, f"`noise='gaussian'` has no meaning with selection='{sets['selection']}'")
            for sets in (SETS, ORDERED)
        ],
        *[
            ({**sets, "scale": True}, f"`scale=True` has no meaning with selection='{sets['selection']}'")
            for sets in (SETS, ORDERED)
        ],
        ({"target_modules": ".*q", "layers_to_transform": [0]}, "`layers_to_transform` cannot be used when"),
        ({"target_modules": ["q"], "layers_pattern": "layers"}, "`layers_pattern` needs `layers_to_transform`"),
    ],
    ids=str,
)
def test_bad_setting_is_named_with_its_value_and_the_way_out(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GradDropConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"p": 0},
        {"p": 0.999},
        {"save_density": 1},
        {"save_density": 1e-6},
        {"num_epochs": 1},
        {"schedule": "linear", "num_epochs": 2},
        {"schedule": "linear-paper", "p": 0.9},
        {"schedule": "exponential", "interval": "epoch"},
        {"noise": "gaussian"},
        {"noise": "gaussian", "granularity": "layer", "interval": "epoch"},
        {"scale": False},
        {"scale": True, "granularity": "layer"},
        {"frozen": "hold"},
        {"frozen": "gradient", "granularity": "layer"},
        {**SETS, "granularity": "layer", "toggle": True},
        {**SETS, "scale": False, "num_epochs": 2},
        {**ORDERED, "toggle": True},
        {**ORDERED, "blocks_per_epoch": 2},
        {**ORDERED, "selection": "bottom-up", "frozen": "gradient"},
        {"target_modules": "all-linear"},
        {"layers_to_transform": 0},
        {"layers_to_transform": [0], "layers_pattern": ["h"]},
    ],
    ids=str,
)
def test_valid_settings_are_kept(settings):
    config = GradDropConfig(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


def test_defaults():
    config = GradDropConfig()
    assert config.peft_type == "GRADDROP"
    assert (config.granularity, config.interval, config.selection) == ("element", "step", "bernoulli")
    assert (config.toggle, config.schedule, config.p, config.num_epochs) == (False, "constant", 0.2, None)
    assert (config.seed, config.noise, config.save_density, config.init_weights) == (0, "bernoulli", None, True)
    assert config.target_modules is None


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, True),
        ({"interval": "epoch"}, True),
        ({"granularity": "layer"}, False),
        (SETS, False),
        ({**SETS, "granularity": "layer"}, False),
        (ORDERED, False),
    ],
    ids=str,
)
def test_scaled_by_default_where_masks_are_element_wise_and_bernoulli(settings, scale):
    assert GradDropConfig(**settings).scale is scale


@pytest.mark.parametrize(
    ("settings", "frozen"),
    [
        ({}, "gradient"),
        ({"schedule": "linear"}, "gradient"),
        ({"noise": "gaussian"}, "gradient"),
        ({"granularity": "layer"}, "hold"),
        ({"interval": "epoch"}, "hold"),
        (SETS, "hold"),
        (ORDERED, "hold"),
    ],
    ids=str,
)
def test_layers_and_epochs_are_held_by_default(settings, frozen):
    assert GradDropConfig(**settings).frozen == frozen


@pytest.mark.parametrize(
    ("settings", "epoch", "num_epochs"),
    [
        ({}, False, False),
        ({"granularity": "layer"}, False, False),
        ({"interval": "epoch"}, True, False),
        ({"schedule": "linear"}, True, True),
        (SETS, True, True),
        (ORDERED, True, True),
    ],
    ids=str,
)
def test_what_has_to_be_known(settings, epoch, num_epochs):
    config = GradDropConfig(**settings)
    assert (config.needs_epoch, config.needs_num_epochs) == (epoch, num_epochs)


FIELDS = ("granularity", "interval", "selection", "toggle", "schedule", "p", "scale", "frozen")
VARIANTS = {
    "GradDrop": ("element", "step", "bernoulli", False, "constant", 0.2, True, "gradient"),
    "Layer-GradDrop": ("layer", "step", "bernoulli", False, "constant", 0.2, False, "hold"),
    "GradDrop-Epoch": ("element", "epoch", "without-replacement", False, "constant", 0.2, False, "hold"),
    "GradDrop-Epoch-Toggle": ("element", "epoch", "without-replacement", True, "constant", 0.2, False, "hold"),
    "GradDrop-Epoch-Reset": ("element", "epoch", "bernoulli", False, "constant", 0.2, True, "hold"),
    "Anneal-GradDrop": ("element", "step", "bernoulli", False, "linear", 0.9, True, "gradient"),
    "Anneal-Layer-GradDrop": ("layer", "step", "bernoulli", False, "linear", 0.9, False, "hold"),
    "GradFreeze-TopDown": ("layer", "epoch", "top-down", False, "constant", 0.2, False, "hold"),
    "GradFreeze-BottomUp": ("layer", "epoch", "bottom-up", False, "constant", 0.2, False, "hold"),
    "GradFreeze-Toggle-TopDown": ("layer", "epoch", "top-down", True, "constant", 0.2, False, "hold"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_is_the_papers(name):
    config = GradDropConfig.from_variant(name)
    assert tuple(getattr(config, field) for field in FIELDS) == VARIANTS[name]
    assert (config.num_epochs, config.noise, config.target_modules) == (None, "bernoulli", None)


def test_variant_with_other_settings():
    config = GradDropConfig.from_variant("Layer-GradDrop", p=0.5, target_modules=["q"], scale=True)
    assert (config.granularity, config.p, config.target_modules, config.scale) == ("layer", 0.5, {"q"}, True)
    assert GradDropConfig.from_variant("Layer-GradDrop").p == 0.2


def test_variant_with_settings_that_contradict_it_is_refused():
    with pytest.raises(ValueError, match="needs interval='epoch'"):
        GradDropConfig.from_variant("GradDrop-Epoch", interval="step")


def test_unknown_variant_lists_all():
    with pytest.raises(ValueError, match="there is no GradDrop variant 'graddrop'; there are") as error:
        GradDropConfig.from_variant("graddrop")
    assert str(error.value).partition("; there are ")[2].split(", ") == sorted(
        VARIANTS, key=str(error.value).partition("; there are ")[2].split(", ").index
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        *[{"variant": name} for name in VARIANTS],
        {"variant": "GradDrop-Epoch", "num_epochs": 5, "seed": 7, "save_density": 0.1},
        {"variant": "GradFreeze-TopDown", "blocks_per_epoch": 2},
        {"noise": "gaussian", "scale": False, "frozen": "hold", "init_weights": False},
        {"target_modules": ["q", "v"], "exclude_modules": ["a.q"], "modules_to_save": ["classifier"]},
        {"layers_to_transform": [0, 2], "layers_pattern": "h", "task_type": "CAUSAL_LM"},
    ],
    ids=str,
)
def test_round_trip_through_a_file(tmp_path, settings):
    settings = dict(settings)
    variant = settings.pop("variant", None)
    config = GradDropConfig.from_variant(variant, **settings) if variant else GradDropConfig(**settings)
    config.save_pretrained(str(tmp_path))
    for loaded in (GradDropConfig.from_pretrained(str(tmp_path)), PeftConfig.from_pretrained(str(tmp_path))):
        assert type(loaded) is GradDropConfig
        assert loaded == config


def test_file_holds_settings_only(tmp_path):
    GradDropConfig(save_density=0.5).save_pretrained(str(tmp_path))
    assert "saved_energy" not in json.loads((tmp_path / "adapter_config.json").read_text())


def test_no_field_is_mistaken_for_a_dropout():
    """PEFT's own tests set every field whose name ends so to 0.5."""
    assert not [name for name in GradDropConfig().to_dict() if name.endswith("dropout")]
