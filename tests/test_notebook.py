"""The Kaggle notebook, executed as a person would: on the embedded pair, with few steps, and once more to go on."""

import json
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "kaggle_sar_kd.ipynb"

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")


def _execute(place: Path, monkeypatch, *, steps: int, former: str = "") -> str:
    """Execute the notebook with few steps; all that its cells printed and showed."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    training = ["--train_steps", str(steps), "--block_size", "64", "--eval_steps", "2", "--save_steps", "2"]
    values = {"TEXT": ["--train_file", str(place / "text.txt")], "TRAINING": training, "FORMER_RUN": former}
    parameters.source += "".join(f"\n{name} = {value!r}" for name, value in values.items())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    where = {"metadata": {"path": str(place / "work")}}
    kernel = _kernel(place, monkeypatch)
    cells = nbclient.NotebookClient(notebook, timeout=500, kernel_name=kernel, resources=where).execute().cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text", "") + output.get("data", {}).get("text/html", "") for output in outputs)


def _kernel(folder: Path, monkeypatch) -> str:
    """A kernel that is this interpreter, wherever else one is installed."""
    spec = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "this"}
    (folder / "jupyter" / "kernels" / "this").mkdir(parents=True, exist_ok=True)
    (folder / "jupyter" / "kernels" / "this" / "kernel.json").write_text(json.dumps({**spec, "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    return "this"


@pytest.fixture
def place(tmp_path, corpus_texts, monkeypatch):
    """A folder to work in, below one that holds the program, and a text."""
    (tmp_path / "text.txt").write_text("\n".join(corpus_texts * 2), encoding="utf-8")
    (tmp_path / "work").mkdir()
    for name in ("train_sar_kd_stable.py", "requirements.txt", "sar_kd"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_the_notebook_checks_trains_and_shows_the_report(place, monkeypatch):
    shown = _execute(place, monkeypatch, steps=2)
    assert "installed now: nothing" in shown
    assert "Ready: nothing stands in the way of this run" in shown
    assert "status: finished" in shown
    assert "<iframe srcdoc=" in shown
    assert "student, after" in shown
    assert json.loads((place / "work" / "run" / "summary.json").read_text())["steps"] == 2


@pytest.mark.long
def test_a_second_session_goes_on_where_the_first_one_stopped(place, monkeypatch):
    _execute(place, monkeypatch, steps=2)
    (place / "work" / "run").rename(place / "former")
    shown = _execute(place, monkeypatch, steps=4, former=str(place / "former"))
    assert "Resumed after step 2" in shown
    assert json.loads((place / "work" / "run" / "summary.json").read_text())["steps"] == 4


def test_the_notebook_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs")]
    nbformat.validate(notebook)
