"""The example notebook, executed as Jupyter does: its kernel has a running event loop."""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.helpers import ROOT

nbclient: Any = pytest.importorskip("nbclient")
nbformat: Any = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")


@pytest.mark.slow
def test_the_notebook_trains_plots_changes_resumes_exports_and_launches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # with it ipykernel redirects no process's output
    notebook = nbformat.read(ROOT / "launch/notebook.ipynb", as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    data = [output["data"] for output in outputs if "data" in output]
    trained, plot, lr, live, resumed, error, two = (item["text/plain"] for item in data)
    assert "'eval/loss'" in trained and "Figure" in plot and "image/png" in data[1]
    assert lr == "'net: lr 0.001'" and live.split("'")[3] == "quit" and "0.001)" in live
    assert resumed == "(20, 0.001)"
    assert float(error) < 0.5
    assert two.startswith(f"('complete', {200 * 2 * 32}, ")  # steps, ranks, samples of each
    assert (tmp_path / "runs/notebook/exports").is_dir()
    shown = "".join(output.get("text", "") for output in outputs)
    assert "200/200" in shown  # the progress bar
    assert "on 2 ranks" in shown  # what the ranks print in processes of their own
