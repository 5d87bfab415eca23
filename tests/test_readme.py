"""Every Python block of the READMEs runs, with a tiny model in place of `path/to/model`."""

import re
from pathlib import Path

import pytest
from datasets import Dataset
from tiny import batch, llama, tokenizer, train

ROOT = Path(__file__).parent.parent
BLOCKS = [
    pytest.param(block, id=f"{path.relative_to(ROOT)}:{number}")
    for path in [ROOT / "README.md", *sorted(ROOT.glob("peft_sparsegrad/*/README.md"))]
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama(hidden_size=64, intermediate_size=128).save_pretrained("model")
    tokenizer().save_pretrained("model")
    texts = [" ".join(f"t{3 + (i * step) % 60}" for step in range(12)) for i in range(1, 33)]
    names = {
        "batches": [batch(seed) for seed in range(4)],
        "train": train,
        "dataset": Dataset.from_dict({"text": texts}),
    }
    exec(block.replace("path/to/model", "model").replace("max_steps=100", "max_steps=3, use_cpu=True"), names)


def test_there_are_blocks():
    assert len(BLOCKS) >= 3
