"""The run folder: one run in it at a time, what in it is a run's own, and no link in it that leads out of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sar_kd.config.sections import TrainConfig
from sar_kd.errors import UsageError
from sar_kd.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from sar_kd.runtime.files import CHECKPOINTS, CONFIG, LOCK_FILES, FolderLock
from sar_kd.runtime.signals import cleaned_up

GIVEN_TEXTS = "given_texts"
"""Where a run that was started from Python keeps the texts that it was given in memory"""

EXPORTS = "gguf"
"""Where `sar-kd export` puts the files that it makes of a run's student"""

RUN_FILES = (
    CONFIG, "metrics.jsonl", "summary.json", "report.html", "log.txt", "samples.json", "held_out.json",
    "router_update.safetensors", "student", "adapter", "last_student", "last_adapter", EXPORTS, CHECKPOINTS, "crash",
    "tensorboard", "wandb",
)  # fmt: skip
"""All that a run writes into its folder; `--overwrite` deletes these and nothing else."""


@contextlib.contextmanager
def hold_run_folder(train: TrainConfig, process_group: ProcessGroup = SINGLE_PROCESS) -> Iterator[None]:
    """Take the run folder before anything in it is looked at, and keep other runs out of it until the end.

    Folders that were made for a run that was then refused are removed again. An error gets `run_folder`, the folder of
    the run that it has ended.
    Raises: UsageError if another run is in it, if it holds a run or something else, or cannot be written
    """
    held = process_group.on_rank_zero(lambda: _take(Path(train.output_dir), train)) or contextlib.ExitStack()
    with cleaned_up(held.close):
        try:
            yield
        except (RuntimeError, OSError, MemoryError) as error:
            vars(error)["run_folder"] = Path(train.output_dir)
            raise


def _take(folder: Path, train: TrainConfig) -> contextlib.ExitStack:
    """What gives the folder back."""
    with contextlib.ExitStack() as stack:
        with _write_errors(folder):
            for path in (path for path in (*reversed(folder.absolute().parents), folder) if not path.exists()):
                path.mkdir(exist_ok=True)
                stack.callback(_remove_if_empty, path)
            lock = FolderLock(folder)
            lock.acquire()
            stack.callback(lock.release)
        check_run_folder(folder, train)
        return stack.pop_all()


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Turn the error of a folder that cannot be written into one line."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UsageError(
            f"--output_dir {folder}: cannot be written: {error.strerror or error}{where}; name another folder"
        ) from None


def check_run_folder(folder: Path, train: TrainConfig) -> None:
    """Raise UsageError unless a run with these settings may use the folder; nothing is written."""
    with _write_errors(folder):
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK)):
            raise UsageError(f"--output_dir {folder}: cannot be written ({existing} is no folder that can be)")
        check_no_run(folder, train)
        if not holds_run(folder) and (found := foreign_names(folder)):
            raise UsageError(f"--output_dir {folder}: holds no run, and is not empty ({found[0]}); name another folder")
        _check_links(folder)


def check_no_run(folder: Path, train: TrainConfig) -> None:
    """Raise UsageError if the folder holds a run that is neither to be resumed nor to be deleted."""
    if not (train.resume or train.overwrite) and holds_run(folder):
        raise UsageError(f"--output_dir {folder}: holds a run; --resume continues it, --overwrite deletes it")


def holds_run(folder: Path) -> bool:
    """Is a run in the folder? Its `config.json` names a mode, which that of a model does not. A `config.json` that
    cannot be read is a run's if a run's metrics or checkpoints lie beside it.
    """
    path = folder / CONFIG
    if not path.exists():
        return False
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return (folder / "metrics.jsonl").exists() or (folder / CHECKPOINTS).is_dir()
    return isinstance(saved, dict) and "mode" in saved


def saved_student(folder: Path) -> Path:
    """Where a run keeps its best student: `student/`, or with `--adapter_only` `adapter/`."""
    student, adapter = folder / "student", folder / "adapter"
    return adapter if adapter.is_dir() and not student.is_dir() else student


def foreign_names(folder: Path) -> list[str]:
    """What is in the folder beside that which a run leaves that was killed as it began."""
    leftovers = {*LOCK_FILES, f".{CONFIG}.partial", GIVEN_TEXTS}
    return sorted(path.name for path in folder.iterdir() if path.name not in leftovers) if folder.exists() else []


def _check_links(folder: Path) -> None:
    """Raise UsageError if a link in the folder leads out of it: a run would write, or delete, what it points at."""
    inside = folder.resolve()
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent) / name
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise UsageError(f"--output_dir {folder}: {path} is a link that leads out of it; remove it")


def clear_run_folder(folder: Path) -> list[str]:
    """Delete what an earlier run left; returns the names of what is not a run's, and stays.

    `config.json` stays until a new one replaces it, so that after a kill in between the folder is still known as a
    run's.
    """
    for name in RUN_FILES:
        if name == CONFIG:
            continue
        for path in (folder / name, folder / f".{name}.partial"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    return [name for name in foreign_names(folder) if name != CONFIG]
