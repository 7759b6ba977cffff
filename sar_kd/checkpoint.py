"""What survives the process: the student in Hugging Face format, and everything needed to resume exactly.

`checkpoint/step-N/` is written whole and flushed to disk before `checkpoint/latest` is pointed at it in one
atomic rename, and only then is the former one deleted; so a kill at any moment leaves one that loads. No pickle
is ever loaded: safetensors, JSON, and `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from sar_kd.config import UsageError
from sar_kd.guards import StepGuard
from sar_kd.metrics import replace_text
from sar_kd.objective import Objective
from sar_kd.precision import Precision
from sar_kd.teacher_routing import TeacherRouting


def save_student(student: nn.Module, tokenizer, folder: Path) -> None:
    """Write model and tokenizer into `folder`, so that `from_pretrained(folder)` loads them.

    The files are written aside and moved in one by one. Between two savings of a run only the weights differ,
    so a reader meets the former student or the new one.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    student.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    for path in sorted(path for path in aside.rglob("*") if path.is_file()):
        target = folder / path.relative_to(aside)
        target.parent.mkdir(parents=True, exist_ok=True)
        _flush(path)
        os.replace(path, target)
    shutil.rmtree(aside)


def save_checkpoint(
    folder: Path,
    *,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    guard: StepGuard,
    objective: Objective,
    routing: TeacherRouting,
    progress: dict,
) -> None:
    """Write the state after `progress["step"]` attempts: weights, optimizer, loss scale, random numbers, counters, and
    what the objective and the teacher's routers learn beside the student.
    """
    name = f"step-{progress['step']:08d}"
    partial = folder / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    safetensors.torch.save_model(student, str(partial / "student.safetensors"))
    stateful = {"optimizer": optimizer, "precision": precision, "objective": objective, "routing": routing}
    torch.save({part: owner.state_dict() for part, owner in stateful.items()}, partial / "state.pt")
    (partial / "progress.json").write_text(json.dumps({"progress": progress, "guard": guard.state_dict()}))
    for path in partial.iterdir():
        _flush(path)
    shutil.rmtree(folder / name, ignore_errors=True)
    os.rename(partial, folder / name)
    replace_text(folder / "latest", name)
    for old in folder.iterdir():
        if old.is_dir() and old.name != name:
            shutil.rmtree(old)


def load_checkpoint(
    folder: Path,
    *,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    guard: StepGuard,
    objective: Objective,
    routing: TeacherRouting,
) -> dict:
    """Put everything back as `save_checkpoint` found it, and return `progress`.

    Raises: UsageError if there is no checkpoint, or it cannot be read
    """
    latest = folder / "latest"
    if not latest.is_file():
        raise UsageError(f"--resume: {folder} holds no checkpoint yet; start again with --overwrite")
    path = folder / Path(latest.read_text()).name
    try:
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        saved = json.loads((path / "progress.json").read_text())
        safetensors.torch.load_model(student, str(path / "student.safetensors"))
        optimizer.load_state_dict(state["optimizer"])
        precision.load_state_dict(state["precision"])
        objective.load_state_dict(state["objective"])
        routing.load_state_dict(state["routing"])
        guard.load_state_dict(saved["guard"])
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"--resume: the checkpoint {path} cannot be read ({reason})") from None
    return saved["progress"]


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
