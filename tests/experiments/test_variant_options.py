"""The options of the programs for the settings of a method."""

from __future__ import annotations

import argparse

import pytest

from experiments.variant_options import add_variant_options, check_settings_have_effect, method_settings, settings_json
from peft_sparsegrad.cli.errors import InputError


def parse(*line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_variant_options(parser.add_argument)
    return parser.parse_args(line)


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ([], {}),
        (["--rank", "64"], {"rank": 64}),
        (["--rank", "64,none"], {"rank": (64, None)}),
        (["--rank", "full", "--support", "dynamic"], {"rank": "full", "support": "dynamic"}),
        (["--rank", "narrower", "--slack", "12"], {"rank": "narrower", "slack": 12.0}),
        (["--basis", "svd", "--slack", "3"], {"basis": "svd", "slack": 3.0}),
        (
            ["--set", "renewal_steps=0", "support_score=energy", 'density_pattern={"up": 0.1}'],
            {"renewal_steps": 0, "support_score": "energy", "density_pattern": {"up": 0.1}},
        ),
        (["--set", "rank=8,4"], {"rank": (8, 4)}),
    ],
)
def test_settings_of_the_options(line, settings):
    assert method_settings(parse(*line), "sparsegrad") == settings


def test_settings_reach_the_methods_that_they_concern():
    args = parse("--slack", "3", "--lora-rank", "7")
    assert settings_json(args, "paper") == '{"slack": 3.0}'
    assert settings_json(args, "lora") == '{"rank": 7}'
    assert settings_json(args, "full") == settings_json(args, "graddrop") == "{}"


@pytest.mark.parametrize(
    "line",
    [
        ["--rank", "0"],
        ["--rank", "1,2,3"],
        ["--rank", "none"],
        ["--set", "renewal_steps"],
        ["--set", "density=0.1"],
        ["--set", "warmup=3"],
        ["--basis", "dct"],
    ],
)
def test_what_is_no_setting_is_refused(line, capsys):
    with pytest.raises(SystemExit):
        parse(*line)
    assert line[1] in capsys.readouterr().err


def test_settings_that_contradict_the_method_are_refused():
    with pytest.raises(InputError, match="meprop-paper: `rank` has no meaning with basis='identity'"):
        method_settings(parse("--rank", "8"), "meprop-paper")
    with pytest.raises(InputError, match="sparsegrad: `renewal_steps` must be a whole number"):
        method_settings(parse("--set", "renewal_steps=often"), "sparsegrad")


def test_options_without_effect_are_refused():
    check_settings_have_effect(parse("--rank", "8", "--lora-rank", "7"), ["lora", "paper"])
    with pytest.raises(InputError, match=r"`rank` is a setting of sparsegrad, .* none runs"):
        check_settings_have_effect(parse("--rank", "8"), ["lora"])
    with pytest.raises(InputError, match="--lora-rank concerns the method lora, which is not run"):
        check_settings_have_effect(parse("--lora-rank", "8"), ["paper"])
