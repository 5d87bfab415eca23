"""The Trainer's arguments, groups of parameters, and the types of the command line."""

from __future__ import annotations

import argparse

import pytest
import torch
from transformers import TrainingArguments
from trl.trainer.sft_config import SFTConfig

from experiments.arguments import non_negative_float, non_negative_int, positive_float, positive_int, share
from experiments.loading import DEVICE
from experiments.optimizers import set_rate
from experiments.tables import markdown_table
from experiments.training import count_steps, rising_steps, training_arguments


@pytest.mark.parametrize("kind", [TrainingArguments, SFTConfig])
def test_arguments_are_of_the_class_and_what_is_given_wins(tmp_path, kind):
    made = training_arguments(kind, tmp_path, lr=1e-3, batch_size=4, epochs=2, seed=7, disable_tqdm=True, bf16=False)
    assert type(made) is kind
    assert (made.output_dir, made.learning_rate, made.per_device_train_batch_size) == (str(tmp_path), 1e-3, 4)
    assert (made.num_train_epochs, made.seed, made.disable_tqdm, made.report_to) == (2, 7, True, [])
    assert made.device.type == DEVICE


def test_steps():
    assert count_steps(rows=33, batch_size=16, epochs=2) == 6
    assert [rising_steps(steps) for steps in (0, 1, 100, 101)] == [0, 1, 6, 7]


def test_chosen_parameters_get_a_rate_of_their_own():
    one, two, three = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    optimizer = torch.optim.AdamW([{"params": [one, two]}, {"params": [three], "weight_decay": 0.5}], lr=0.1)
    set_rate(optimizer, [two, three], 0.2)
    groups = [(group["params"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert groups == [([one], 0.1, 0.01), ([two], 0.2, 0.01), ([three], 0.2, 0.5)]


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (positive_int, {"1": 1}, ["0", "-1"]),
        (non_negative_int, {"0": 0, "3": 3}, ["-1"]),
        (positive_float, {"1e-3": 1e-3}, ["0", "-1", "inf", "nan"]),
        (non_negative_float, {"0": 0.0, "2": 2.0}, ["-1", "inf", "nan"]),
        (share, {"1": 1.0, "0.5": 0.5}, ["0", "1.1", "nan"]),
    ],
)
def test_types_of_the_command_line(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)


def test_a_table_has_labels_on_the_left_and_figures_on_the_right():
    table = markdown_table(["task", "method", "loss"], [["cola", "lora", "0.5"]], labels=2)
    assert table == "| task | method | loss |\n| --- | --- | ---: |\n| cola | lora | 0.5 |"
