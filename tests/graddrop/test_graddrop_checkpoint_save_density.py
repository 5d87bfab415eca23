"""`save_density` keeps the largest changes, and the model card says what was left out."""

import pytest
import torch
from graddrop_tools import deltas, dropped, tower
from peft import PeftModel

from peft_sparsegrad import GradDropConfig


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0, 1e-6])
def test_save_density_keeps_exactly_the_largest(tmp_path, density):
    model = dropped(tower(dtype=torch.float32), save_density=density, init_weights=False)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tower(dtype=torch.float32), tmp_path)
    for name, delta in deltas(model).items():
        count = max(1, round(density * delta.numel()))
        threshold = delta.abs().flatten().sort(descending=True).values[count - 1]
        expected = torch.where(delta.abs() >= threshold, delta, torch.zeros(()))
        assert torch.equal(deltas(loaded)[name], expected)
        assert torch.count_nonzero(deltas(loaded)[name]) == count


def kept_energy(model, density):
    kept = total = 0.0
    for delta in deltas(model).values():
        squares = delta.detach().double().square().flatten().sort(descending=True).values
        kept += squares[: max(1, round(density * squares.numel()))].sum().item()
        total += squares.sum().item()
    return kept / total


def test_model_card_says_what_was_left_out(tmp_path):
    model = dropped(tower(dtype=torch.float32), save_density=0.25, init_weights=False)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    assert card.count("## What was left out of this file") == 1
    assert "`save_density=0.25`: of each tensor's changes only the largest 25.00% were saved." in card
    assert f"They hold {kept_energy(model, 0.25):.2%} of the squared norm of all changes" in card
    assert "library_name: peft" in card


def test_second_save_rewrites_the_section(tmp_path):
    model = dropped(tower(dtype=torch.float32), save_density=0.25, init_weights=False)
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text("utf-8") + "\n## My own section\n\nwith words\n", "utf-8")
    first = card.read_text("utf-8")
    model.peft_config["default"].save_density = 0.5
    model.save_pretrained(tmp_path)
    second = card.read_text("utf-8")
    assert second.count("## What was left out of this file") == 1
    assert f"{kept_energy(model, 0.25):.2%}" in first
    assert f"{kept_energy(model, 0.25):.2%}" not in second
    assert f"{kept_energy(model, 0.5):.2%}" in second
    assert second.count("## My own section\n\nwith words") == 1
    model.save_pretrained(tmp_path)
    assert card.read_text("utf-8") == second


def test_no_section_without_save_density(tmp_path):
    dropped(tower(dtype=torch.float32), init_weights=False).save_pretrained(tmp_path)
    assert "left out" not in (tmp_path / "README.md").read_text("utf-8")


def test_section_is_taken_out_when_everything_is_saved(tmp_path):
    model = dropped(tower(dtype=torch.float32), save_density=0.25, init_weights=False)
    model.save_pretrained(tmp_path)
    model.peft_config["default"].save_density = None
    model.save_pretrained(tmp_path)
    assert "left out" not in (tmp_path / "README.md").read_text("utf-8")


def test_untrained_adapter_loses_nothing(tmp_path):
    dropped(tower(dtype=torch.float32), save_density=0.25).save_pretrained(tmp_path)
    assert "left out" not in (tmp_path / "README.md").read_text("utf-8")


def test_configuration_saved_by_itself_states_nothing(tmp_path):
    GradDropConfig(save_density=0.25).save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_adapter_that_is_loaded_and_saved_again_keeps_what_its_card_says(tmp_path):
    dropped(tower(dtype=torch.float32), save_density=0.25, init_weights=False).save_pretrained(tmp_path)
    section = (tmp_path / "README.md").read_text("utf-8").split("## What was left out")[1].strip()
    PeftModel.from_pretrained(tower(dtype=torch.float32), tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text("utf-8").split("## What was left out")[1].strip() == section


def test_save_density_is_read_again(tmp_path):
    dropped(tower(dtype=torch.float32), save_density=0.25).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tower(dtype=torch.float32), tmp_path)
    assert loaded.peft_config["default"].save_density == 0.25
