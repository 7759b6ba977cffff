"""`python -m sar_kd explain LOG`: what a log of losses and gradient norms says went wrong, and what to try.

Logs of losses and gradient norms: a Trainer's lines, its `trainer_state.json`, a run's `metrics.jsonl`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sar_kd.errors import UsageError

_FLAT = 1e-3

_RISE = 1.5

_LOUDER = 10.0


@dataclass(frozen=True)
class Diagnosis:
    """A pattern, its likely cause, and what to try."""

    name: str
    pattern: str
    cause: str
    remedy: str
    seen: str = ""
    """Where others met it"""


DIAGNOSES = {
    diagnosis.name: diagnosis
    for diagnosis in (
        Diagnosis(
            "half weights",
            "'Attempting to unscale FP16 gradients'",
            "the weights that learn are float16 themselves: loaded in half and trained in half autocast",
            "load them in float32 and let autocast compute in half (dtype=torch.float32 with fp16=True); under LoRA "
            "cast "
            "the adapter to float32. `python -m sar_kd sft` never trains half weights",
            "PEFT's troubleshooting guide; AdamW(fused=True) does it without the error",
        ),
        Diagnosis(
            "forward overflow",
            "loss 0.0 or nan, and grad_norm nan, from the first line on",
            "the forward is not finite in float16, as with a model trained in bfloat16 on a card without it; the "
            "Trainer "
            "leaves a NaN loss out of its sum and prints 0.0. If float32 shows the same, every label is masked",
            "bfloat16 where the card has it, else --model_dtype float32; `python -m sar_kd forensics RUN_DIR` names "
            "the "
            "module. If it goes away with another attention (sdpa, eager) or without ZeRO-2's overlap_comm, it was "
            "that",
            "QwenLM/Qwen3#670, #868, #826; LlamaFactory#8088; DeepSpeed#5347",
        ),
        Diagnosis(
            "weights became nan",
            "finite at first, then loss 0.0 or nan with grad_norm nan to the end",
            "one update made the weights NaN: half weights under Adam (its eps is 0 in float16), or an overflow in "
            "float16 "
            "without a GradScaler that refuses the step",
            "float32 weights, float16 by autocast with a GradScaler (fp16=True), bfloat16 where the card has it",
            "one step of Adam on float16 weights with eps 1e-8 gives -inf",
        ),
        Diagnosis(
            "exploding",
            "loss or grad_norm grows many times over, then nan or far above where it began",
            "the updates are too large: learning rate too high, or no clipping",
            "--max_grad_norm 1.0, a lower --learning_rate, more --warmup_steps",
        ),
        Diagnosis(
            "backward overflow",
            "loss finite, grad_norm nan on every line",
            "the forward fits float16 and the gradients do not, even at the lowest loss scale; often the residual "
            "stream",
            "bfloat16 where the card has it, else --model_dtype float32; a low --init_loss_scale if it ends after "
            "some steps",
            "unslothai/unsloth-zoo#866",
        ),
        Diagnosis(
            "calibration",
            "loss finite, grad_norm nan or inf now and then",
            "the loss scale is being calibrated: those updates were skipped and the scale halved",
            "nothing, as long as it is a few steps in a hundred",
        ),
        Diagnosis(
            "no labels",
            "loss 0.0 and grad_norm 0 or nan on every line",
            "nothing is to be learned: every label is masked. The answers are cut off (the prompt fills the length), "
            "the "
            "response template is not found, or the labels stand under another name",
            "raise --block_size (max_length), keep the prompt below it, and print one example's labels: some must not "
            "be -100",
            "TRL#6668, TRL#5826; princeton-nlp/SimPO#35 (max_prompt_length >= max_length)",
        ),
        Diagnosis(
            "some labels missing",
            "loss 0.0 and grad_norm 0 or nan on some lines, others in order",
            "some batches have no label left: their answers are cut off by the maximum length",
            "raise --block_size (max_length), or leave out the long examples",
            "TRL PR#6671; nanochat#618; OpenRLHF#583; cosmos-rl#155",
        ),
        Diagnosis(
            "loss lost",
            "loss 0.0 after the first line, grad_norm finite and always the same",
            "the environment: a mismatch of ZeRO, attention and package versions loses the loss on its way",
            "run the same on one device without DeepSpeed, then change one version at a time",
            "MedicalGPT#479, LlamaFactory#9567",
        ),
        Diagnosis(
            "no gradient",
            "loss finite, grad_norm 0",
            "what learns does not reach the loss: gradient checkpointing without input gradients, frozen weights, a "
            "hard "
            "clamp on the loss, or float16 gradients rounded to nothing",
            "model.enable_input_require_grads() with checkpointing; check which weights require a gradient; a loss "
            "scale",
        ),
        Diagnosis(
            "no movement",
            "loss and grad_norm finite, and the loss stays where it is",
            "the updates have no effect: a rate of 0, or one so small that float16 weights round it away",
            "float32 weights, and a learning rate that suits them",
            "at rate 5e-6 no float16 LayerNorm weight moves in 100 steps",
        ),
        Diagnosis(
            "norm skips",
            "most updates skipped for their gradient norm",
            "the limit lies below what this model's gradients are",
            "--skip_rule storm or adaptive lets the limit follow; else raise --skip_grad_norm",
        ),
        Diagnosis(
            "no answers",
            "the loss is in order and the answer rate is 0",
            "the model learned, and what it writes does not parse: it is asked in another form than it was trained on "
            "(template, missing start token, padding on the right), the tags are missing, the answer is cut off, or "
            "the "
            "adapter was not loaded",
            "print one generation beside one training example; pad on the left; raise max_new_tokens; load the adapter",
        ),
        Diagnosis(
            "wrong answers",
            "the loss is in order, answers parse, and none is right",
            "the form is learned and the content is not yet",
            "train longer, at a higher rate, or a larger model",
        ),
        Diagnosis("healthy", "loss and grad_norm finite throughout", "nothing here looks wrong", "go on"),
    )
}  # fmt: skip
"""Every pattern that is known, in the order in which a log is tried against them, the last one when nothing fits."""


def diagnose(log: TrainingLog) -> Diagnosis:
    """The first pattern that the log shows."""
    return DIAGNOSES[next((name for name, shows in _RULES.items() if shows(log)), "healthy")]


def _lost(point: Point) -> bool:
    """The loss is 0 or no number: a Trainer prints 0 where it was NaN all along."""
    return not math.isfinite(point.loss) or point.loss == 0.0


def _bad_norm(point: Point) -> bool:
    return point.grad_norm is not None and not math.isfinite(point.grad_norm)


def _no_norm(point: Point) -> bool:
    """0, nan or not named."""
    return not point.grad_norm or _bad_norm(point)


def _share(points: Sequence[Point], holds: Callable[[Point], bool]) -> float:
    return sum(map(holds, points)) / len(points) if points else 0.0


def _from(points: Sequence[Point], holds: Callable[[Point], bool]) -> int:
    """Where the last stretch begins in which each point `holds`; the number of points if the last one does not."""
    start = len(points)
    while start and holds(points[start - 1]):
        start -= 1
    return start


def _is_nan(point: Point) -> bool:
    return not math.isfinite(point.loss) or (point.loss == 0.0 and _bad_norm(point))


def _forward(log: TrainingLog) -> bool:
    return bool(log.points) and _is_nan(log.points[0]) and _share(log.points, _is_nan) > 0.5


def _explodes(log: TrainingLog) -> bool:
    """Higher at the end than it ever should be, or on its way there when it became no number."""
    finite = [point.loss for point in log.points if math.isfinite(point.loss) and point.loss]
    norms = [p.grad_norm for p in log.points if p.grad_norm and math.isfinite(p.grad_norm)]
    if not finite:
        return False
    late = finite[-max(1, len(finite) // 5) :]
    rises = sum(late) / len(late) > max(_RISE * finite[0], min(finite) + 1.0)
    was_fine = 0 < _from(log.points, _is_nan) < len(log.points)
    louder = len(norms) > 1 and norms[-1] > _LOUDER * norms[0]
    # A run of ours refuses what would make its weights NaN, so that they must have become too large instead.
    return rises or (was_fine and (louder or log.is_ours or finite[-1] > _RISE * min(finite)))


def _flat(log: TrainingLog) -> bool:
    losses = [point.loss for point in log.points]
    return len(losses) >= 5 and all(map(math.isfinite, losses)) and max(losses) - min(losses) <= _FLAT * abs(losses[0])


def _refused_for(*causes: str) -> Callable[[TrainingLog], bool]:
    return lambda log: _share(log.points, lambda point: point.cause in causes) > 0.5


def _zeros(point: Point) -> bool:
    return point.loss == 0.0 and _no_norm(point)


_RULES: dict[str, Callable[[TrainingLog], bool]] = {
    "half weights": lambda log: log.unscales_half,
    "no labels": lambda log: _refused_for("no_targets")(log)
    or (_share(log.points, lambda p: p.loss == 0.0 and p.grad_norm in (0.0, None)) == 1.0),
    "norm skips": _refused_for("norm"),
    "forward overflow": _forward,
    "exploding": _explodes,
    "weights became nan": lambda log: 0 < _from(log.points, _is_nan) < len(log.points),
    "some labels missing": lambda log: 0 < _share(log.points, _zeros) < 1,
    "loss lost": lambda log: len(log.points) > 2 and _from(log.points, lambda p: p.loss == 0.0) == 1,
    "backward overflow": lambda log: _share(log.points, _bad_norm) > 0.5,
    "no gradient": lambda log: _share(log.points, lambda p: p.grad_norm == 0.0) > 0.5,
    "no movement": _flat,
    "no answers": lambda log: log.scores.get("answer_rate") == 0.0,
    "wrong answers": lambda log: log.scores.get("accuracy") == 0.0,
    "calibration": lambda log: any(map(_bad_norm, log.points)),
}  # fmt: skip


def lines_of(log: TrainingLog) -> list[str]:
    """The diagnosis for people."""
    found, points = diagnose(log), log.points
    lines = [f"{log.path}: {len(points)} lines with a loss"]
    if points:
        odd = Counter("nan or inf" if not math.isfinite(p.loss) else "0" for p in points if _lost(p))
        counts = ", ".join(f"{count} of them {kind}" for kind, count in odd.items())
        lines[0] += f", from {points[0].loss:g} to {points[-1].loss:g}" + (f" ({counts})" if counts else "")
    lines += [f"Pattern: {found.pattern}", f"Likely cause: {found.cause}", f"What to try: {found.remedy}"]
    return lines + ([f"Seen: {found.seen}"] if found.seen else [])


_LINE = re.compile(r"\{[^{}]*['\"]loss['\"][^{}]*\}")

_ITEM = re.compile(r"['\"](\w+)['\"]\s*:\s*['\"]?([-+.\w]+)")

_ACCURACY = re.compile(r"\b(accuracy|answer_rate)['\"]?\s*[=:]\s*['\"]?([-+.\w]+)")

_HOMES = ("metrics.jsonl", "trainer_state.json")


@dataclass(frozen=True)
class Point:
    """One line of a log. What a line does not say is None."""

    loss: float
    grad_norm: float | None = None
    learning_rate: float | None = None
    step: float | None = None
    cause: str | None = None
    """Why the update was refused, as `guards.CAUSES`; only this program's own files know"""


@dataclass(frozen=True)
class TrainingLog:
    """A log as it was found."""

    path: Path
    points: tuple[Point, ...]
    is_ours: bool
    """It is a run's `metrics.jsonl`, in which a loss of 0 is one"""
    scores: dict[str, float]
    """The last `accuracy` and `answer_rate` that the log names"""
    unscales_half: bool
    """It holds PyTorch's complaint about gradients of half weights"""


def read_log(path: Path) -> TrainingLog:
    """Read a log file, or the one that a run's or a checkpoint's folder holds.

    Raises: UsageError if there is none, or it names no loss
    """
    if path.is_dir():
        path = next((path / name for name in _HOMES if (path / name).is_file()), path)
    if not path.is_file():
        raise UsageError(f"explain {path}: no such log; give a file, or a folder that holds {' or '.join(_HOMES)}")
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"explain {path}: cannot be read ({error.strerror})") from None
    records = _records(text)
    is_ours = any(record.get("event") == "step" for record in records)
    points = tuple(point for record in records if (point := _point(record)) is not None)
    scores = {name: number for name, value in _ACCURACY.findall(text) if (number := _number(value)) is not None}
    unscales_half = "Attempting to unscale FP16 gradients" in text
    if not points and not unscales_half:
        raise UsageError(
            f"explain {path}: names no loss; give lines as {{'loss': 2.27, 'grad_norm': 1.55}}, or {_HOMES[1]}"
        )
    return TrainingLog(path, points, is_ours, scores, unscales_half)


def _records(text: str) -> list[dict]:
    whole = _json(text)
    if isinstance(whole, dict) and isinstance(whole.get("log_history"), list):
        return [record for record in whole["log_history"] if isinstance(record, dict)]
    lines = [_json(line) for line in text.splitlines()]
    ours = [line for line in lines if isinstance(line, dict) and "event" in line]
    return [record for record in ours if record["event"] == "step"] or list(_from_lines(text))


def _from_lines(text: str) -> Iterator[dict]:
    """The dicts that a Trainer prints, in which nan is not JSON; newer versions print their values as text."""
    for found in _LINE.finditer(text):
        yield dict(_ITEM.findall(found[0]))


def _json(text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _point(record: dict) -> Point | None:
    loss, cause = _number(record.get("loss")), record.get("cause")
    if loss is None:
        return None
    others = {name: _number(record.get(name)) for name in ("grad_norm", "learning_rate", "step")}
    return Point(loss, **others, cause=cause if isinstance(cause, str) else None)


def _number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, (int, float, str)) else None
    except ValueError:
        return None
