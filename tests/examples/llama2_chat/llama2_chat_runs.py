"""Conversations, questions, and the programs of examples/llama2_chat as processes."""

from __future__ import annotations

import json
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fresh import Program

NOUNS = ["dog", "cat", "bird", "fish", "tree", "house", "river", "stone"]


def conversations(count: int = 40) -> list[dict]:
    rows = []
    for i in range(count):
        noun, other = NOUNS[i % 8], NOUNS[(i // 8 + i) % 8]
        turns = [f"Where is the {noun}?", f"The {noun} is by the {other}.", "And now?", f"It left the {other}."]
        roles = ["user", "assistant"] * 2
        rows.append({"messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]})
    return rows


def questions(count: int = 3) -> list[dict]:
    rows = [
        {
            "question_id": 81 + i,
            "category": "math" if i == 0 else "writing",
            "turns": [f"Where is the {noun}?", "Why?"],
        }
        for i, noun in enumerate(NOUNS[:count])
    ]
    rows[0]["reference"] = ["By the river."]
    return rows


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_metrics(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


def start(program: str, *options: object, typed: str = "") -> Program:
    return Program("-m", f"examples.llama2_chat.{program}", *options, typed=typed, CUDA_VISIBLE_DEVICES="")


def run(program: str, *options: object, typed: str = "") -> Program:
    """Return a program that has ended."""
    started = start(program, *options, typed=typed)
    started.wait()
    return started


def kill_when(path: Path, is_time, program: str, *options: object) -> None:
    """Start a program and send it SIGKILL as soon as `is_time(path)`."""
    started = start(program, *options)
    deadline = time.monotonic() + 200
    while not is_time(path):
        assert started.returncode is None, started.stderr
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.01)
    started.kill()
    assert started.returncode == -signal.SIGKILL, "it had ended before it could be killed"


@contextmanager
def limited_files(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: what a full disk is to a program."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def options(model: Path, data: Path, out: Path, /, **changes: object) -> list[str]:
    """The command line of a short run of finetune.py."""
    settings = {
        "model": model, "data": data, "out": out, "base": "float32", "density": 0.05, "lr": 0.02, "max_length": 128,
        "batch_size": 4, "warmup_steps": 2, "steps": 8, "save_steps": 4, "eval_share": 0.1, **changes,
    }  # fmt: skip
    return [text for key, value in settings.items() for text in (f"--{key.replace('_', '-')}", str(value))]
