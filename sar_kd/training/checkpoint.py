"""What survives the process: the student in Hugging Face format, and everything needed to resume exactly.

`checkpoint/step-N/` is written whole, with a digest of every file, and flushed to disk before `checkpoint/latest` is
pointed at it in one atomic rename; only then are older ones deleted, all but `--keep_checkpoints`. So a kill at any
moment, and a full disk, leave one that loads; a damaged one is told from a sound one, and the one before it offered. No
pickle is ever loaded: safetensors, JSON, and `torch.load(weights_only=True)`.

Where a run stands, and what of it ends up in `summary.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sar_kd.errors import UsageError
from sar_kd.losses.objective import Objective
from sar_kd.models.lora import save_trainable
from sar_kd.runtime.files import atomic_write, file_digest, require_room
from sar_kd.runtime.precision import Precision, peak_memory
from sar_kd.teacher.base import NoTeacher
from sar_kd.teacher.live import LiveTeacher
from sar_kd.training.guards import CAUSES, StepGuard
from sar_kd.training.parallel import SINGLE_DEVICE, ParallelStrategy

_FILES = ("student.safetensors", "state.pt", "progress.json")

_DIGESTS = "digests.json"

_UNREADABLE = (
    OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, pickle.UnpicklingError,
    safetensors.SafetensorError,
)  # fmt: skip

_NAME = re.compile(r"step-\d{8,}")


def save_student(student: Any, tokenizer, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write model and tokenizer into `folder`, so that `from_pretrained(folder)` loads them. weights: the student's, if
    it does not hold them whole.

    The files are written aside and moved in one by one. Between two savings of a run only the weights differ,
    so a reader meets the former student or the new one.
    Raises: UsageError if they cannot be written; the former student is then as it was
    """
    _complete_generation_config_(student, tokenizer)
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    require_room(folder.parent, _size(student.state_dict()), "the student")
    with _writing(aside, folder.parent, "the student"):
        student.save_pretrained(aside, state_dict=weights)
        tokenizer.save_pretrained(aside)
        for path in sorted(path for path in aside.rglob("*") if path.is_file()):
            target = folder / path.relative_to(aside)
            target.parent.mkdir(parents=True, exist_ok=True)
            _flush(path)
            os.replace(path, target)
    shutil.rmtree(aside)


def _complete_generation_config_(model: nn.Module, tokenizer) -> None:
    """Make the model's generation config one that can be saved and that `generate` takes without a word.

    Where published, it may sample at a temperature without saying `do_sample`, which is refused when saved; and it may
    leave out where a text ends, which the tokenizer knows.
    """
    config: Any = getattr(model, "generation_config", None)
    if config is None:
        return
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True


def save_checkpoint(
    folder: Path,
    *,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    guard: StepGuard,
    objective: Objective,
    routing: LiveTeacher | NoTeacher,
    progress: dict,
    keep: int = 2,
    placement: ParallelStrategy = SINGLE_DEVICE,
) -> None:
    """Write the state after `progress["step"]` attempts: weights, optimizer, loss scale, random numbers, counters, and
    what the objective and the teacher's routers learn beside the student. The newest `keep` checkpoints stay. Of
    several ranks all call this, and the first writes.

    Raises: UsageError if it cannot be written; the former ones are then as they were
    """
    owners: dict[str, Any]
    owners = {"optimizer": optimizer, "precision": precision, "objective": objective, "routing": routing}
    state = {part: placement.whole(owner.state_dict()) for part, owner in owners.items()}
    state["others"] = placement.process_group.all_gather_object(state["precision"])[1:]
    weights, counters = placement.weights(), {"progress": progress, "guard": guard.state_dict()}
    placement.process_group.on_rank_zero(lambda: _write(folder, student, weights, state, counters, keep))


def _write(
    folder: Path, student: nn.Module, weights: dict[str, Tensor] | None, state: dict, counters: dict, keep: int
) -> None:
    name = f"step-{counters['progress']['step']:08d}"
    partial = folder / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    what = f"the checkpoint of step {counters['progress']['step']}"
    require_room(folder.parent, _size(student.state_dict()) + _size(state), what)
    with _writing(partial, folder.parent, what):
        partial.mkdir(parents=True)
        if weights is None:
            save_trainable(student, partial / "student.safetensors")
        else:
            safetensors.torch.save_file(weights, str(partial / "student.safetensors"))
        torch.save(state, partial / "state.pt")
        (partial / "progress.json").write_text(json.dumps(counters))
        (partial / _DIGESTS).write_text(json.dumps({file: file_digest(partial / file) for file in _FILES}))
        for path in partial.iterdir():
            _flush(path)
        shutil.rmtree(folder / name, ignore_errors=True)
        os.rename(partial, folder / name)
        atomic_write(folder / "latest", name)
    kept = {name, *[older for older in _saved(folder) if older < name][: keep - 1]}
    for old in folder.iterdir():
        if old.is_dir() and old.name not in kept:
            shutil.rmtree(old)


def load_checkpoint(
    folder: Path,
    *,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    guard: StepGuard,
    objective: Objective,
    routing: LiveTeacher | NoTeacher,
    placement: ParallelStrategy = SINGLE_DEVICE,
) -> dict:
    """Put everything back as `save_checkpoint` found it, and return `progress`.

    Raises: UsageError if there is no checkpoint, or it cannot be read; it then names the one before, if that is sound;
    likewise if it was made by another number of processes
    """
    path, process_group = folder / _latest(folder), placement.process_group
    with _reading(folder, path):
        damage = _damage(path)
        if damage:
            raise ValueError(damage)
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        saved = json.loads((path / "progress.json").read_text())
        of_ranks = [state["precision"], *state["others"]]
    if len(of_ranks) != process_group.size:
        start = f"with torchrun, {len(of_ranks)} processes in all" if len(of_ranks) > 1 else "without torchrun"
        raise UsageError(
            f"--resume: {path} is of {len(of_ranks)} processes, and {process_group.size} are running; start it {start}"
        )
    with _reading(folder, path):
        placement.load_student_(student, path / "student.safetensors")
        placement.load_optimizer_(optimizer, state["optimizer"])
        precision.load_state_dict(of_ranks[process_group.rank])
        objective.load_state_dict(placement.like(state["objective"], objective.state_dict()))
        routing.load_state_dict(state["routing"])
        guard.load_state_dict(saved["guard"])
    return saved["progress"]


@contextlib.contextmanager
def _reading(folder: Path, path: Path) -> Iterator[None]:
    """Turns what a checkpoint that is not sound raises into one line."""
    try:
        yield
    except _UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"--resume: the checkpoint {path} cannot be read ({reason}){_offer(folder, path)}") from None


def _latest(folder: Path) -> str:
    """The checkpoint that `latest` names; the newest one, if that was deleted."""
    pointer, saved = folder / "latest", _saved(folder)
    try:
        name = pointer.read_text().strip() if pointer.is_file() else ""
    except (OSError, UnicodeDecodeError):
        name = ""
    if name in saved:
        return name
    if not saved or not pointer.is_file():
        raise UsageError(f"--resume: {folder} holds no checkpoint yet; start again with --overwrite")
    return saved[0]


def _saved(folder: Path) -> list[str]:
    """Names of the checkpoints in a folder, the newest first."""
    if not folder.is_dir():
        return []
    found = [path.name for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda name: int(name.removeprefix("step-")), reverse=True)


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if every one is as it was written.

    Raises: OSError, ValueError or TypeError where its digests cannot be read
    """
    digests = json.loads((path / _DIGESTS).read_text())
    for file in _FILES:
        if not (path / file).is_file():
            return f"{file} is missing"
        if digests.get(file) != file_digest(path / file):
            return f"{file} is not as it was written"
    return None


def _offer(folder: Path, damaged: Path) -> str:
    """The rest of the sentence about a damaged checkpoint: what else there is."""
    for name in _saved(folder):
        if name < damaged.name and _is_sound(folder / name):
            step = int(name.removeprefix("step-"))
            return f"; {name} is sound: delete {damaged} and --resume continues after step {step}"
    return "; no other one is there: start again with --overwrite"


def _is_sound(path: Path) -> bool:
    try:
        return _damage(path) is None
    except (OSError, ValueError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def _writing(partial: Path, run: Path, what: str) -> Iterator[None]:
    """Turns what a full or broken disk raises into one line, and frees the room that was taken."""
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"--output_dir {run}: {what} cannot be written ({reason}); what was saved before is intact: free some "
            "room, then --resume"
        ) from None


def _size(state) -> int:
    """Bytes of the tensors in a nest of dicts and lists."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(_size(part) for part in parts)


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@dataclass
class TrainerState:
    """Where a run stands: everything that a resumed run must know and no other object carries."""

    step: int = 0
    """Attempts made"""
    tokens: int = 0
    """Target tokens of all attempts"""
    seconds: float = 0.0
    """Wall time, all parts of a resumed run together"""
    train_seconds: float = 0.0
    """The part of it spent in attempts"""
    start: dict = field(default_factory=dict)
    teacher: dict = field(default_factory=dict)
    """`val_ppl` and `val_bits_per_byte` before the first step; empty where there is no teacher"""
    last: dict = field(default_factory=dict)
    best: dict = field(default_factory=dict)
    best_step: int = 0
    rewound_from: int = 0
    """The step at which the run diverged and went back (`--on_divergence rewind`); 0 if it did not"""
    rate_factor: float = 1.0
    """What the learning rate is multiplied by since"""
    left_out: list[int] = field(default_factory=list)
    """Blocks that are not read since"""
    companions: list[dict] = field(default_factory=list)
    """What each companion keeps"""

    def summary(self, status: str, guard: StepGuard, precision: Precision) -> dict:
        """What the run did and what it reached."""
        return {
            "status": status,
            "steps": self.step,
            "applied": guard.applied,
            "skipped": {cause: guard.skipped[cause] for cause in CAUSES},
            "success_rate": guard.success_rate,
            "val_ppl_start": self.start["val_ppl"],
            "val_ppl_final": self.last["val_ppl"],
            "val_ppl_best": self.best["val_ppl"],
            "best_step": self.best_step,
            "val_loss_final": self.last["val_loss"],
            "val_bits_per_byte_start": self.start["val_bits_per_byte"],
            "val_bits_per_byte_final": self.last["val_bits_per_byte"],
            "val_bits_per_byte_best": self.best["val_bits_per_byte"],
            **{f"teacher_{name}": value for name, value in self.teacher.items()},
            "nan_batches_max_consecutive": guard.nan_batches_max,
            "dead_steps": guard.dead_steps,
            "rewound_from": self.rewound_from,
            "loss_scale_final": precision.loss_scale.item(),
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / max(1e-9, self.train_seconds),
            "train_seconds": self.train_seconds,
            "peak_memory_bytes": peak_memory(precision.device),
            "wall_seconds": self.seconds,
        }
