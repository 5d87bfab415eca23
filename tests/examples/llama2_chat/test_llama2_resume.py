"""finetune.py killed and started again, started twice, and started in two processes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from fresh import ROOT, environment
from llama2_chat_runs import (
    conversations,
    kill_when,
    options,
    read_metrics,
    run,
    write_lines,
)
from safetensors.torch import load_file

from examples.llama2_chat.finetune import main
from peft_sparsegrad.cli.errors import InputError


def test_killed_run_goes_on_to_the_same_adapter(base, data, tmp_path):
    settings = {"steps": 24, "save_steps": 3, "epochs": 1}
    main(options(base, data, tmp_path / "through", **settings))
    out = tmp_path / "killed"
    given = options(base, data, out, **settings)
    kill_when(out, lambda path: (path / "checkpoint-6" / "complete").exists(), "finetune", *given)
    # Only its mark tells a whole checkpoint from one that was being written.
    steps = sorted(int(path.name[11:]) for path in out.glob("checkpoint-*"))
    torn = out / f"checkpoint-{steps[-1]}"
    (torn / "complete").unlink(missing_ok=True)
    (torn / "trainer_state.json").write_text("{")
    before = float((out / f"checkpoint-{steps[-2]}" / "complete").read_text())
    resumed = run("finetune", *given)
    assert resumed.returncode == 0, resumed.stderr
    assert f"checkpoint-{steps[-2]}" in resumed.stdout
    through, after = (load_file(p / "adapter_model.safetensors") for p in (tmp_path / "through", out))
    assert through.keys() == after.keys()
    assert all(torch.equal(through[name], after[name]) for name in through)
    assert read_metrics(out)["validation_loss_after"] == read_metrics(tmp_path / "through")["validation_loss_after"]
    assert read_metrics(out)["validation_loss_before"] == read_metrics(tmp_path / "through")["validation_loss_before"]
    assert read_metrics(out)["resumed_from_step"] == steps[-2]
    last = float((out / "checkpoint-24" / "complete").read_text())
    assert 0 < before < last <= read_metrics(out)["seconds"], "the time of both parts"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "sparsegrad"])
def test_two_processes_train_what_one_trains_on_twice_the_batch(base, data, tmp_path, method):
    """Where gradients were not averaged over the processes, each would learn from its own half."""
    settings = {"method": method, "steps": 6, "save_steps": 6}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    two = ["-m", "examples.llama2_chat.finetune", *options(base, data, tmp_path / "two", batch_size=2, **settings)]
    ended = subprocess.run(
        [*launcher, *two],
        cwd=ROOT,
        env=environment(CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="1"),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    main(options(base, data, tmp_path / "one", batch_size=4, **settings))
    assert [read_metrics(tmp_path / name)["settings"]["the number of processes"] for name in ("one", "two")] == [1, 2]
    loss, of_both = (read_metrics(tmp_path / name)["validation_loss_after"] for name in ("one", "two"))
    assert of_both == pytest.approx(loss, abs=1e-4)
    if method == "lora":  # the directions of a basis whose singular values are close turn with the rounding
        one, both = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
        assert all(torch.allclose(one[name], both[name], atol=1e-4) for name in one)
    assert ended.stdout.count("validation loss") == 1, "only one process speaks"


def test_run_killed_after_its_last_checkpoint_is_finished_from_there(base, data, tmp_path):
    out = tmp_path / "out"
    main(options(base, data, out))
    expected, adapter = read_metrics(out), (out / "adapter_model.safetensors").read_bytes()
    (out / "metrics.json").unlink()
    (out / "adapter_model.safetensors").unlink()
    main(options(base, data, out))
    assert read_metrics(out)["validation_loss_after"] == expected["validation_loss_after"]
    assert read_metrics(out)["resumed_from_step"] == 8
    assert (out / "adapter_model.safetensors").read_bytes() == adapter


def test_finished_run_is_left_alone_unless_overwritten(base, data, tmp_path, capsys):
    out = tmp_path / "out"
    given = options(base, data, out, steps=2)
    main(given)
    written = (out / "metrics.json").read_bytes()
    main(given)
    assert "finished already" in capsys.readouterr().out
    assert (out / "metrics.json").read_bytes() == written
    with pytest.raises(InputError, match=r"begun with --lr 0\.02 and now it is 0\.01"):
        main(options(base, data, out, steps=2, lr=0.01))
    main([*options(base, data, out, steps=2, lr=0.01), "--overwrite"])
    assert read_metrics(out)["settings"]["lr"] == 0.01


def test_other_data_in_the_same_file_is_noticed(base, tmp_path):
    data = write_lines(tmp_path / "d.jsonl", conversations(20))
    main(options(base, data, tmp_path / "out", steps=1))
    write_lines(data, conversations(21))
    with pytest.raises(InputError, match="begun with the data's hash"):
        main(options(base, data, tmp_path / "out", steps=1))
