"""The notebook runs from its first cell to its last, on a CPU, with a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat

NOTEBOOK = Path(__file__).parents[1] / "examples" / "grpo_quickstart.ipynb"
RUN = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=250, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[1])
"""


def read(path: Path = NOTEBOOK) -> Any:
    return nbformat.read(path, as_version=4)


def execute(path: Path) -> None:
    """Run the notebook in place, in a process of its own whose kernel leaves the home alone."""
    folders = dict.fromkeys(("IPYTHONDIR", "JUPYTER_DATA_DIR"), str(path.parent))
    env = os.environ | folders | {"JUPYTER_PREFER_ENV_PATH": "1"}
    env.pop("MPLBACKEND", None)  # the kernel's own, which shows plots
    command = [sys.executable, "-c", RUN, str(path)]
    result = subprocess.run(command, cwd=path.parent, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def test_notebook_is_committed_without_outputs() -> None:
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    assert [(cell.outputs, cell.execution_count) for cell in cells] == [([], None)] * len(cells)


def test_notebook_runs_on_a_cpu(tiny_model_dir: Path, tmp_path: Path) -> None:
    notebook = read()
    (at,) = (n for n, cell in enumerate(notebook.cells) if cell.metadata.get("tags"))
    settings = f'MODEL, SOURCE = "{tiny_model_dir}", "auto"\nSTEPS, NUM_HELD_OUT = 2, 8'
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(settings))
    path = tmp_path / "run.ipynb"
    nbformat.write(notebook, path)
    execute(path)
    summary = json.loads((tmp_path / "outputs" / "notebook" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["num_eval_prompts"] == 8
    outputs = [output for cell in read(path).cells for output in cell.get("outputs", [])]
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert shown.count("image/png") == 1
    assert shown.count("text/markdown") == 1
