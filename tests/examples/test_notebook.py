"""The notebook runs from top to bottom in a kernel of its own, on a tiny model, and is kept without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from tiny import llama, tokenizer_of_characters

PATH = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


@pytest.mark.slow
def test_notebook_runs(tmp_path, monkeypatch):
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    tokenizer_of_characters().save_pretrained(tmp_path / "model")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # small tensors: threads would wait for each other
    monkeypatch.setenv("MODEL", str(tmp_path / "model"))
    monkeypatch.setenv("STEPS", "8")
    notebook = nbformat.read(PATH, as_version=4)
    NotebookClient(notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert [kind for output in outputs for kind in output.get("data", {})].count("image/png") == 3
    assert any("held-out loss, merged" in output.get("text", "") for output in outputs)
    assert (tmp_path / "outputs" / "notebook" / "adapter" / "adapter_model.safetensors").exists()


def test_outputs_are_stripped():
    for cell in nbformat.read(PATH, as_version=4).cells:
        assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None)
