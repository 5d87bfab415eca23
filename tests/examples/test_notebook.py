"""The notebook runs from top to bottom in a kernel of its own, and is kept without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

PATH = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


@pytest.mark.slow
def test_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # small tensors: threads would wait for each other
    notebook = nbformat.read(PATH, as_version=4)
    NotebookClient(notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    shown = [data for cell in notebook.cells for output in cell.get("outputs", ()) for data in output.get("data", {})]
    assert shown.count("image/png") == 3
    assert (tmp_path / "outputs" / "notebook" / "adapter" / "adapter_model.safetensors").exists()


def test_outputs_are_stripped():
    for cell in nbformat.read(PATH, as_version=4).cells:
        assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None)
