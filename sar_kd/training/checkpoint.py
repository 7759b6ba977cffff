"""Checkpoints and the saved student: its Hugging Face format, and everything needed to resume bit for bit.

`checkpoint/step-N/` is written whole, with a digest of every file, and flushed before one atomic rename points
`checkpoint/latest` at it; only then are older ones deleted, all but `--keep_checkpoints` and those that
`Recovery` keeps. So a kill at any moment, or a full disk, leaves a checkpoint that loads; a damaged one is detected,
and the one before it offered. No pickle is ever loaded: safetensors, JSON, and `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pickle
import shutil
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sar_kd.config.fields import RunConfig
from sar_kd.data.chat.encoding import DEFAULT_TEMPLATE
from sar_kd.errors import UsageError
from sar_kd.models.loading import Models
from sar_kd.models.lora import models_to_save, save_trainable
from sar_kd.models.model_checks import is_finite_weight, lm_head_bias_name
from sar_kd.models.optimizer_state import state_of
from sar_kd.runtime.files import (
    atomic_rename,
    atomic_write,
    checkpoint_name,
    file_digest,
    how_to_go_on,
    require_disk_space,
    saved_checkpoints,
    step_of_checkpoint,
)
from sar_kd.teacher.base import Teacher
from sar_kd.tokenization.token_stream import TokenizedText
from sar_kd.training.optimizer import parameters_of
from sar_kd.training.step import StepContext
from sar_kd.training.trainer_state import TrainerState
from sar_kd.version import RUN_FORMAT

_FILES = ("student.safetensors", "state.pt", "progress.json")

_DIGESTS = "digests.json"

_OWNERS = ("optimizer", "precision", "objective")
"""Parts of a `StepContext` whose state dict is saved in state.pt; the guard's is in progress.json."""

_MAY_BE_NEGATIVE = ("exp_avg", "state1", "qmap1")
"""First moments, and the values that 8-bit ones stand for"""

_WRITE_BUFFERS = 2**24
"""Bytes of memory that the writers of weights and tokenizers need at most for themselves"""

_UNREADABLE = (
    OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError,
    pickle.UnpicklingError, safetensors.SafetensorError,
)  # fmt: skip
"""What a checkpoint that is damaged may raise while it is loaded."""


def save_student(
    student: Any,
    tokenizer,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
    text: TokenizedText | None = None,
) -> None:
    """Write model and tokenizer into `folder`, so that `from_pretrained(folder)` loads them.

    weights: the student's full weights, if it is sharded
    text: that it was trained on, of which its stop tokens and the default chat template are saved with it

    The files are written aside and moved in one by one. Between two saves of a run only the weights differ, so a
    reader finds the old student or the new one.
    Raises: UsageError if they cannot be written; the old student is then intact
    """
    _complete_generation_config_(student, tokenizer, text.stop_ids[0] if text else ())
    partial = folder.with_name(f".{folder.name}.partial")
    with _writing(partial, folder.parent, _num_bytes(student.state_dict()), "the student"):
        student.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        if text and "student" in text.without_template:
            (partial / "chat_template.jinja").write_text(DEFAULT_TEMPLATE, encoding="utf-8")
        for path in sorted(path for path in partial.rglob("*") if path.is_file()):
            target = folder / path.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            atomic_rename(path, target)
    shutil.rmtree(partial)


def save_student_of_run(
    config: RunConfig, models: Models, context: StepContext, text: TokenizedText, prefix: str = ""
) -> None:
    """Write the student as it is into the run folder, and with an adapter this too. Every rank must call this; rank 0
    writes. prefix: of the folders' names
    """
    weights, folder = context.strategy.full_weights(), Path(config.train.output_dir)

    def save() -> None:
        for name, model in models_to_save(models.student, context.precision, config.lora.adapter_only).items():
            save_student(model, models.tokenizers.student, folder / f"{prefix}{name}", weights, text)

    context.strategy.process_group.on_rank_zero(save)


def _complete_generation_config_(model: nn.Module, tokenizer, stop_ids: tuple[int, ...]) -> None:
    """Make the model's generation config one that can be saved and that `generate` accepts without a warning.

    A published one may have a temperature without `do_sample`, which is refused when saved, and may lack the
    end-of-text token, which the tokenizer knows. stop_ids: further tokens that the model has learned to stop with
    """
    config: Any = getattr(model, "generation_config", None)
    if config is None:
        return
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = list(dict.fromkeys([*(end for end in ends if end is not None), *stop_ids]))
    if len(ends) > 1:
        config.eos_token_id = ends
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True


def save_checkpoint(
    folder: Path,
    context: StepContext,
    teacher: Teacher,
    state: TrainerState,
    keep: int = 2,
    keeps: Callable[[int], bool] = lambda step: False,
) -> None:
    """Write the state after `state.step` attempts: weights, optimizer, loss scale, random numbers, counters, and the
    trainable parameters of the objective and of the teacher's routers. Every rank must call this; rank 0 writes.

    The newest `keep` checkpoints stay, and older ones for whose step `keeps` is true; those of later steps, of before a
    rewind, do not.

    Raises: UsageError if it cannot be written; the older ones are then intact
    """
    strategy, owners = context.strategy, {name: getattr(context, name) for name in _OWNERS} | {"teacher": teacher}
    tensors = {name: strategy.full_tensors(owner.state_dict()) for name, owner in owners.items()}
    tensors["other_ranks"] = strategy.process_group.all_gather_object(tensors["precision"])[1:]
    weights = strategy.full_weights()
    counters = {"format": RUN_FORMAT, "progress": dataclasses.asdict(state), "guard": context.guard.state_dict()}

    def write() -> None:
        name = checkpoint_name(state.step)
        _write(folder, name, context.objective.student, weights, tensors, counters)
        older = [other for other in saved_checkpoints(folder) if step_of_checkpoint(other) < state.step]
        kept = {name, *older[: keep - 1], *(other for other in older if keeps(step_of_checkpoint(other)))}
        for old in folder.iterdir():
            if old.is_dir() and old.name not in kept:
                shutil.rmtree(old)

    strategy.process_group.on_rank_zero(write)


def _write(
    folder: Path, name: str, student: nn.Module, weights: dict[str, Tensor] | None, tensors: dict, counters: dict
) -> None:
    partial = folder / f".{name}.partial"
    num_bytes = _num_bytes(student.state_dict()) + _num_bytes(tensors)
    with _writing(partial, folder.parent, num_bytes, f"the checkpoint of step {counters['progress']['step']}"):
        partial.mkdir(parents=True)
        if weights is None:
            save_trainable(student, partial / "student.safetensors")
        else:
            safetensors.torch.save_file(weights, str(partial / "student.safetensors"))
        torch.save(tensors, partial / "state.pt")
        (partial / "progress.json").write_text(json.dumps(counters))
        (partial / _DIGESTS).write_text(json.dumps({file: file_digest(partial / file) for file in _FILES}))
        atomic_rename(partial, folder / name)
        atomic_write(folder / "latest", name)


@contextlib.contextmanager
def _writing(partial: Path, run: Path, num_bytes: int, what: str) -> Iterator[None]:
    """Check the disk space first; turn the error of a full or broken disk into one line, and delete `partial`."""
    shutil.rmtree(partial, ignore_errors=True)
    require_disk_space(run, num_bytes, what)
    bytearray(_WRITE_BUFFERS)  # MemoryError here, where the writers in Rust would abort the process
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        remedy = f"free some room; {how_to_go_on(run)}"
        raise UsageError(f"--output_dir {run}: {what} cannot be written ({reason}); {remedy}") from None


def _num_bytes(state) -> int:
    """Bytes of the tensors in a nest of dicts and lists."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(_num_bytes(part) for part in parts)


def find_checkpoint(folder: Path) -> tuple[Path, list[str]]:
    """The checkpoint to resume from: the one that `latest` names. Where that file is missing or names none, the newest
    intact one, and a line that says so.

    Raises: UsageError if there is none
    """
    pointer, saved = folder / "latest", saved_checkpoints(folder)
    try:
        name = pointer.read_text().strip() if pointer.is_file() else ""
    except (OSError, UnicodeDecodeError):
        name = ""
    if name in saved:
        return folder / name, []
    if not saved:
        raise UsageError(f"--resume: {folder} holds no checkpoint yet; start again with --overwrite")
    name = next((name for name in saved if _damage(folder / name) is None), saved[0])
    return folder / name, [f"{pointer} is missing or damaged: resuming from the newest intact checkpoint, {name}"]


def load_checkpoint(path: Path, context: StepContext, teacher: Teacher) -> TrainerState:
    """Restore everything that `save_checkpoint` wrote; returns the trainer's state.

    Raises: UsageError if the checkpoint cannot be read (then it names the one before, if that is intact), or was
    written in another format or by another number of processes
    """
    strategy = context.strategy
    rank, num_ranks = strategy.process_group.rank, strategy.process_group.size
    with _reading(path):
        if damage := _damage(path):
            raise ValueError(damage)
        tensors = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        of_ranks = [tensors["precision"], *tensors.get("other_ranks", ())]
        counters = json.loads((path / "progress.json").read_text())
        found = counters.get("format")
    if found != RUN_FORMAT:
        raise UsageError(
            f"--resume: {path} has format {found or 1} and this version reads format {RUN_FORMAT}; resume it with the "
            "version that wrote it, or start again with --overwrite"
        )
    if len(of_ranks) != num_ranks:
        start = f"with torchrun, {len(of_ranks)} processes in all" if len(of_ranks) > 1 else "without torchrun"
        raise UsageError(
            f"--resume: {path} is of {len(of_ranks)} processes, and {num_ranks} are running; start it {start}"
        )
    with _reading(path):
        objective = context.objective
        _check_weights(path / "student.safetensors", objective.student)
        _check_optimizer(tensors["optimizer"], context.optimizer)
        _check_scaler(of_ranks[rank]["scaler"], context.precision.state_dict()["scaler"])
        strategy.load_student_(objective.student, path / "student.safetensors")
        # Hyperparameters are those of the settings, as at the start of the run.
        groups = context.optimizer.state_dict()["param_groups"]
        strategy.load_optimizer_(context.optimizer, {"state": tensors["optimizer"]["state"], "param_groups": groups})
        context.precision.load_state_dict(of_ranks[rank])
        objective.load_state_dict(strategy.shard_like(tensors["objective"], objective.state_dict()))
        teacher.load_state_dict(tensors["teacher"])
        _check_guard(counters["guard"], context.guard.state_dict())
        context.guard.load_state_dict(counters["guard"])
        return _trainer_state(counters["progress"])


def _check_weights(path: Path, student: nn.Module) -> None:
    """Raise ValueError if a weight in the file is not finite, which no update that was applied leaves, or is of another
    dtype than this one has in `student`.
    """
    own, bias_name = student.state_dict(), lm_head_bias_name(student)
    with safetensors.safe_open(str(path), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # no dict
            weight = file.get_tensor(name)
            if not is_finite_weight(weight, name == bias_name):
                raise ValueError(f"{path.name}: {name} is not finite")
            if name in own and weight.dtype != own[name].dtype:
                raise ValueError(f"{path.name}: {name} is {weight.dtype}, the student's is {own[name].dtype}")


def _check_optimizer(state: dict, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless each parameter's state is finite and of its shapes; each tensor gets memory of its own.

    A step with others does not raise: it reads memory that is not theirs.
    """
    parameters, kind = parameters_of(optimizer), type(optimizer).__name__
    indices = [index for group in state["param_groups"] for index in group["params"]]
    if indices != list(range(len(parameters))):
        raise ValueError("state.pt: its optimizer has other parameters")
    for index, saved in state["state"].items():
        nested = [value for value in saved.values() if isinstance(value, dict)]  # as bitsandbytes groups what it has
        own = {name: value for part in (saved, *nested) for name, value in part.items() if not isinstance(value, dict)}
        expected = state_of(parameters[index], kind.lower()) | {"step": ((), torch.float32)}
        if own.keys() != expected.keys():
            raise ValueError(f"state.pt: the optimizer's state of parameter {index} is not {kind}'s")
        for name, value in own.items():
            tensor = torch.tensor(float(value)) if name == "step" and type(value) is int else value
            if not isinstance(tensor, Tensor) or (tuple(tensor.shape), tensor.dtype) != expected[name]:
                raise ValueError(f"state.pt: {name} of parameter {index} has another shape or dtype than the parameter")
            if not tensor.isfinite().all():
                raise ValueError(f"state.pt: {name} of parameter {index} is not finite")
            if name not in _MAY_BE_NEGATIVE and (tensor < 0).any():
                raise ValueError(f"state.pt: {name} of parameter {index} is below 0")
            if isinstance(value, Tensor):  # a file can hold tensors that share memory, and a step writes into each
                own[name] = value.clone()
        state["state"][index] = own


def _check_scaler(state: dict, own: dict) -> None:
    """Raise ValueError unless the gradient scaler's state holds finite numbers, those that a scaler of ours has."""
    for name, value in own.items():
        found = state[name]
        if isinstance(found, bool) or not isinstance(found, (int, type(value))) or not 0 <= found < math.inf:
            raise ValueError(f"state.pt: {name} of the gradient scaler is {found!r}")


def _check_guard(state: dict, own: dict) -> None:
    """Raise ValueError unless each counter of the guard is of its kind."""
    for name, value in own.items():
        found = state.get(name, value)
        if not (isinstance(found, type(value)) or value is None or found is None):
            raise ValueError(f"progress.json: the guard's {name} is {found!r}")


def _trainer_state(values: dict) -> TrainerState:
    """The state, if each value has its field's kind."""
    state, containers = TrainerState(**values), (dict, list)
    for name, kind in typing.get_type_hints(TrainerState).items():
        origin = typing.get_origin(kind)
        if not isinstance(getattr(state, name), origin if origin in containers else kind):
            raise ValueError(f"progress.json: {name} is {getattr(state, name)!r}")
    return state


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the error of a damaged checkpoint into one line."""
    try:
        yield
    except _UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, pickle.UnpicklingError):  # PyTorch's text advises to load it nevertheless
            reason = "state.pt is damaged, or holds other things than tensors and numbers"
        raise UsageError(f"--resume: the checkpoint {path} cannot be read ({reason}){_offer(path)}") from None


def _damage(path: Path) -> str | None:
    """The first damage of a checkpoint's files; None if every one is as it was written."""
    try:
        digests = dict(json.loads((path / _DIGESTS).read_text()))
    except (OSError, ValueError, TypeError) as error:
        return f"{_DIGESTS}: {error}"
    for file in _FILES:
        if not (path / file).is_file():
            return f"{file} is missing"
        if digests.get(file) != file_digest(path / file):
            return f"{file} is not as it was written"
    return None


def _offer(damaged: Path) -> str:
    """The end of the message about a damaged checkpoint: an older one that is intact, if there is one."""
    for name in saved_checkpoints(damaged.parent):
        if name < damaged.name and _damage(damaged.parent / name) is None:
            return f"; {name} is intact: delete {damaged} and --resume continues after step {step_of_checkpoint(name)}"
    return "; no other one is there: start again with --overwrite"
