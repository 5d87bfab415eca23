"""A Trainer run that goes on from its newest whole checkpoint, and says after each step where it is.

python killed_script.py FOLDER [callback]
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from tiny import adapted, llama, rows
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_sparsegrad import SparseGradCallback

STEPS = 40


class Say(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("step", state.global_step, flush=True)


def newest_checkpoint(folder: Path) -> str | None:
    """The Trainer writes its state last; a checkpoint without one was cut off."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        state = path / "trainer_state.json"
        if state.exists() and state.read_text().rstrip().endswith("}"):
            return str(path)
        shutil.rmtree(path)
    return None


def main(folder: Path, callback: bool) -> None:
    """Train; no checkpoint is inside the warm-up of four passes, which would begin again after it."""
    model = adapted(llama(attention_dropout=0.1), warmup_steps=4, renewal_steps=4)
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, save_steps=4, per_device_train_batch_size=4, learning_rate=0.02, report_to=[],
        disable_tqdm=True, use_cpu=True, seed=3,
    )  # fmt: skip
    callbacks = [Say(), *([SparseGradCallback(steps=3)] if callback else [])]
    run = Trainer(model, arguments, train_dataset=rows(64), callbacks=callbacks)
    run.train(resume_from_checkpoint=newest_checkpoint(folder) if folder.exists() else None)
    state = {name: tensor for name, tensor in model.state_dict().items() if "sparsegrad_" in name}
    torch.save(state, folder / "end.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "callback" in sys.argv)
