"""Every notebook runs from its first cell to its last."""

import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
SHORT = {"steps = 150": "steps = 8"}  # the same cells, fewer steps


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.ipynb")))
def test_a_notebook_runs(name):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    changed = 0
    for cell in notebook.cells:
        for long, short in SHORT.items():
            changed += cell.source.count(long)
            cell.source = cell.source.replace(long, short)
    assert changed == len(SHORT), "the notebook's steps are no longer shortened here"
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    assert any("image/png" in out.get("data", {}) for out in outputs), "no figure"
    assert "def " in outputs[-1]["text"], "no sample"
