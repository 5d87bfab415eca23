"""Settings of another type, as in a damaged or edited configuration, are refused by their name."""

from __future__ import annotations

import numpy as np
import pytest

from peft_sparsegrad import GradDropConfig, SparseGradConfig

WRONG = [
    *[("target_modules", value) for value in (3, {"x": 1}, ["up", 1])],
    *[("exclude_modules", value) for value in (False, [None])],
    *[("layers_to_transform", value) for value in ("0", 1.5, ["0"], True)],
    *[("modules_to_save", value) for value in ("classifier", 2, [3])],
    *[("trainable_token_indices", value) for value in (1, ["x"], {"embed": 1}, {1: [2]})],
    *[("init_weights", value) for value in (None, "no", 1)],
    *[("format_version", value) for value in (None, "1", 1.0, True)],
    ("inference_mode", None),
    ("base_model_name_or_path", 3),
    ("revision", ["main"]),
    ("auto_mapping", "x"),
]
SPARSEGRAD = [
    *[(name, value) for name in ("density_pattern", "rank_pattern") for value in (None, "x", [1])],
    *[("slack", value) for value in (None, "6", True, [6])],
    *[("transition_matrices", value) for value in (False, 3)],
]
RIGHT = [
    {"target_modules": {"up", "down"}, "layers_to_transform": np.int64(1), "modules_to_save": ("head",)},
    {"target_modules": "all-linear", "exclude_modules": "down", "trainable_token_indices": {"embed": [1, 2]}},
    {"target_modules": ["up"], "layers_to_transform": range(2), "layers_pattern": ["layers"]},
]


@pytest.mark.parametrize("config", [SparseGradConfig, GradDropConfig])
@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_type_is_refused_by_name(config, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be "):
        config(**{name: value})


@pytest.mark.parametrize(("name", "value"), SPARSEGRAD)
def test_wrong_type_in_sparsegrad_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be "):
        SparseGradConfig(**{name: value})


@pytest.mark.parametrize("config", [SparseGradConfig, GradDropConfig])
@pytest.mark.parametrize("settings", RIGHT)
def test_types_that_peft_takes_are_taken(config, settings):
    config(**settings)


@pytest.mark.parametrize("config", [SparseGradConfig, GradDropConfig])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "up["},
        {"target_modules": ["up"], "exclude_modules": "*"},
        {"target_modules": ["up"], "layers_to_transform": 1, "layers_pattern": ["layers", "(h"]},
    ],
)
def test_a_text_that_is_no_regular_expression_is_refused_by_name(config, settings):
    name = list(settings)[-1]
    with pytest.raises(ValueError, match=f"`{name}` must be a regular expression, and .* is none: "):
        config(**settings)
    config(target_modules=["up["])  # names in a list are no expressions


@pytest.mark.parametrize("name", ["density_pattern", "rank_pattern"])
def test_a_pattern_of_sparsegrad_that_is_no_regular_expression_is_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must be a regular expression, and 'up\\[' is none"):
        SparseGradConfig(**{name: {"up[": 0.5 if name == "density_pattern" else 4}})


NUMPY = {
    SparseGradConfig: {
        "density": np.float32(0.05),
        "slack": np.float32(6),
        "density_pattern": {"up": np.float64(0.1)},
    },
    GradDropConfig: {"p": np.float32(0.25), "seed": np.int64(3), "save_density": np.float64(0.5)},
}


@pytest.mark.parametrize("layers", [range(2), np.arange(2), [np.int64(0), np.int64(1)], (0, 1)], ids=repr)
@pytest.mark.parametrize("config", NUMPY)
def test_settings_of_numpy_are_saved_and_read(config, layers, tmp_path):
    given = config(target_modules=frozenset(["up"]), layers_to_transform=layers, **NUMPY[config])
    given.save_pretrained(tmp_path)
    read = config.from_pretrained(tmp_path)
    assert list(read.layers_to_transform) == [0, 1]
    assert set(read.target_modules) == {"up"}
    assert all(getattr(read, name) == value for name, value in NUMPY[config].items())
