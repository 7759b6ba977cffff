"""The Kaggle notebook, executed as a person would: on the embedded pair, with few steps, and once more to go on."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "kaggle_sar_kd.ipynb"

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")


def _execute(
    place: Path, monkeypatch, *, steps: int, former: str = "", more: Sequence[str] = (), **parameters: object
) -> str:
    """Execute the notebook with few steps; all that its cells printed and showed."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (first,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    training = ["--train_steps", str(steps), "--block_size", "64", "--eval_steps", "2", "--save_steps", "2"]
    values = {"TEXT": ["--train_file", str(place / "text.txt")], "TRAINING": training, "FORMER_RUN": former}
    first.source += "".join(f"\n{name} = {value!r}" for name, value in (values | parameters).items())
    first.source += f"\nTRAINING += {more!r}"
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


def _train_cell(folder: Path, *, devices: int, gpus: int, code: int, status: str | None, former: str | None) -> list:
    """Execute the cell that trains, with a command that ends with `code` and writes this status; the command's words.

    former: status of a run that is there already; status: None where the command writes no summary
    """
    (folder / "run").mkdir()
    summary = folder / "run" / "summary.json"
    if former:
        summary.write_text(json.dumps({"status": former}))
        os.utime(summary, ns=(1, 1))
    called: list = []

    def start(*words):
        called.extend(words)
        if status:
            summary.write_text(json.dumps({"status": status}))
        return code, "error: --block_size 7: must be at least 8 tokens"

    counted = SimpleNamespace(run=lambda *a, **k: SimpleNamespace(stdout=f"{gpus}\n"))
    names = {"DEVICES": devices, "start": start, "RUN": folder / "run", "PROGRAM": folder, "FLAGS": [], "json": json}
    names |= {"TIME_LIMIT": "1h", "ENVIRONMENT": {}, "sys": sys, "subprocess": counted}
    (cell,) = (cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if "written_summary" in cell.source)
    exec(cell.source, names)
    return called


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("former", [None, "finished", "interrupted"])
@pytest.mark.parametrize(
    ("code", "status", "succeeds"),
    [
        (0, "finished", True),
        ("interrupted", "interrupted", True),
        ("refused", None, False),
        ("killed", None, False),
        ("stopped", "emergency_stop", False),
        ("crashed", "finished", False),
    ],
)
def test_the_cell_that_trains_fails_with_the_first_error_unless_the_run_succeeded(
    code, status, succeeds, former, devices, tmp_path
):
    own = {0: 0, "interrupted": 130, "refused": 2, "killed": -9, "stopped": 3, "crashed": 1}[code]
    ended = {"devices": devices, "gpus": 0, "code": min(1, abs(own)) if devices > 1 else own, "status": status}
    if succeeds:
        _train_cell(tmp_path, **ended, former=former)
    else:
        with pytest.raises(SystemExit, match="The run has failed: error: --block_size 7"):
            _train_cell(tmp_path, **ended, former=former)


@pytest.mark.parametrize(("devices", "gpus", "processes"), [(0, 0, 1), (0, 1, 1), (0, 2, 2), (1, 2, 1), (2, 2, 2)])
def test_the_notebook_uses_every_gpu_unless_it_is_told_how_many(devices, gpus, processes, tmp_path):
    words = _train_cell(tmp_path, devices=devices, gpus=gpus, code=0, status="finished", former=None)
    assert ("torch.distributed.run" in words) == (processes > 1)
    if processes > 1:
        assert words[words.index("--nproc_per_node") + 1] == str(processes)


@pytest.mark.long
def test_a_run_that_two_processes_refuse_fails_the_notebook_with_its_line(place, monkeypatch):
    with pytest.raises(
        nbclient.exceptions.CellExecutionError, match=r"has failed: error: --on_policy_fraction 0\.5: takes"
    ):
        _execute(place, monkeypatch, steps=2, DEVICES=2, more=["--on_policy_fraction", "0.5"])


@pytest.mark.slow
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
