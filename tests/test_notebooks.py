"""Every notebook runs from its first cell to its last."""

import os
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
SHORT = {  # the same cells, fewer steps of a smaller model
    "01_train_a_waist.ipynb": {
        "steps = 150": "steps = 8",
        "width=128": "width=32",
        "seq_len=128": "seq_len=32",
        "length=150": "length=40",
    },
    "02_correct_a_concept.ipynb": {"steps=400": "steps=60", "hidden=32": "hidden=16"},
}
LAST = {  # what the last cell must say
    "01_train_a_waist.ipynb": "def ",
    "02_correct_a_concept.ipynb": "leak_bits",
}


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.ipynb")))
def test_a_notebook_runs(name, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiles sooner
    flags = f"{os.environ['XLA_FLAGS']} --xla_cpu_use_fusion_emitters=false"
    monkeypatch.setenv("XLA_FLAGS", flags)
    notebook = nbformat.read(FOLDER / name, as_version=4)
    changed = 0
    for cell in notebook.cells:
        for long, short in SHORT[name].items():
            changed += cell.source.count(long)
            cell.source = cell.source.replace(long, short)
    assert changed == len(SHORT[name]), "the notebook is no longer shortened here"
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    assert any("image/png" in out.get("data", {}) for out in outputs), "no figure"
    assert LAST[name] in outputs[-1]["text"]
