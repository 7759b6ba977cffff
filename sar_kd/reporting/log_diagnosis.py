"""The pattern in a log of losses and gradient norms, its likely cause, and what to try.

A log is what a Trainer prints, its `trainer_state.json`, or a run's `metrics.jsonl`.
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
"""A loss that varies by less, relative to the first one, does not move"""

_RISE = 1.5
"""A mean loss at the end that is so many times the first one has risen"""

_NORM_RISE = 10.0

_LOG_NAMES = ("metrics.jsonl", "trainer_state.json")

_LINE = re.compile(r"\{[^{}]*['\"]loss['\"][^{}]*\}")

_ITEM = re.compile(r"['\"](\w+)['\"]\s*:\s*['\"]?([-+.\w]+)")

_SCORE = re.compile(r"\b(accuracy|answer_rate)['\"]?\s*[=:]\s*['\"]?([-+.\w]+)")


@dataclass(frozen=True)
class Diagnosis:
    """A pattern, its likely cause, and what to try."""

    name: str
    pattern: str
    cause: str
    remedy: str
    seen: str = ""
    """Where others met it"""


_ALL = (
    Diagnosis(
        "half weights",
        "'Attempting to unscale FP16 gradients'",
        "the trainable weights are float16 themselves: loaded in float16 and trained in float16 autocast",
        "load them in float32 and let autocast compute in float16 (dtype=torch.float32 with fp16=True); under LoRA "
        "cast the adapter to float32. `python -m sar_kd sft` never trains float16 weights",
        "PEFT's troubleshooting guide; AdamW(fused=True) does it without the error",
    ),
    Diagnosis(
        "forward overflow",
        "loss 0.0 or nan, and grad_norm nan, from the first line on",
        "the forward is not finite in float16, as with a model trained in bfloat16 on a card without it; the Trainer "
        "leaves a NaN loss out of its sum and prints 0.0. If float32 shows the same, every label is masked",
        "bfloat16 where the card has it, else --model_dtype float32; `python -m sar_kd forensics RUN_DIR` names the "
        "module. If it goes away with another attention (sdpa, eager) or without ZeRO-2's overlap_comm, it was that",
        "QwenLM/Qwen3#670, #868, #826; LlamaFactory#8088; DeepSpeed#5347",
    ),
    Diagnosis(
        "weights became nan",
        "finite at first, then loss 0.0 or nan with grad_norm nan to the end",
        "one update made the weights NaN: float16 weights under Adam (its eps is 0 in float16), or an overflow in "
        "float16 without a GradScaler that refuses the step",
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
        "the forward fits float16 and the gradients do not, even at the lowest loss scale; often the residual stream",
        "bfloat16 where the card has it, else --model_dtype float32; a low --init_loss_scale if it ends after a few "
        "steps",
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
        "there is nothing to learn: every label is masked. The answers are cut off (the prompt fills the length), the "
        "response template is not found, or the labels stand under another name",
        "raise --block_size (max_length), keep the prompt below it, and print one example's labels: some must not be "
        "-100",
        "TRL#6668, TRL#5826; princeton-nlp/SimPO#35 (max_prompt_length >= max_length)",
    ),
    Diagnosis(
        "some labels missing",
        "loss 0.0 and grad_norm 0 or nan on some lines, others normal",
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
        "the trainable weights do not reach the loss: gradient checkpointing without input gradients, frozen weights, "
        "a hard clamp on the loss, or float16 gradients rounded to zero",
        "model.enable_input_require_grads() with checkpointing; check which weights require a gradient; a loss scale",
    ),
    Diagnosis(
        "no movement",
        "loss and grad_norm finite, and the loss does not change",
        "the updates have no effect: a rate of 0, or one so small that float16 weights round it away",
        "float32 weights, and a learning rate that suits them",
        "at rate 5e-6 no float16 LayerNorm weight moves in 100 steps",
    ),
    Diagnosis(
        "norm skips",
        "most updates skipped for their gradient norm",
        "the limit lies below the gradient norms of this model",
        "--skip_rule storm or adaptive lets the limit follow; else raise --skip_grad_norm",
    ),
    Diagnosis(
        "no answers",
        "the loss is normal and the answer rate is 0",
        "the model learned, and its output does not parse: it is prompted in another form than it was trained on "
        "(template, missing start token, padding on the right), the tags are missing, the answer is cut off, or the "
        "adapter was not loaded",
        "print one generation beside one training example; pad on the left; raise max_new_tokens; load the adapter",
    ),
    Diagnosis(
        "wrong answers",
        "the loss is normal, answers parse, and none is right",
        "the form is learned and the content is not yet",
        "train longer, at a higher rate, or a larger model",
    ),
    Diagnosis("healthy", "loss and grad_norm finite throughout", "nothing here looks wrong", "go on"),
)

DIAGNOSES = {diagnosis.name: diagnosis for diagnosis in _ALL}
"""Every known pattern, by name"""


@dataclass(frozen=True)
class LoggedStep:
    """One line of a log; None for a value that it does not have."""

    loss: float
    grad_norm: float | None = None
    cause: str | None = None
    """Why the update was skipped, as in `guards.CAUSES`; in this program's own files only"""

    @property
    def has_bad_norm(self) -> bool:
        """Is the gradient norm nan or inf?"""
        return self.grad_norm is not None and not math.isfinite(self.grad_norm)

    @property
    def is_nan(self) -> bool:
        """Is the loss not finite? A Trainer prints 0 for a loss that was NaN all along."""
        return not math.isfinite(self.loss) or (self.loss == 0.0 and self.has_bad_norm)

    @property
    def has_no_labels(self) -> bool:
        """Is the loss 0, and the gradient norm 0, nan or missing?"""
        return self.loss == 0.0 and (not self.grad_norm or self.has_bad_norm)


@dataclass(frozen=True)
class TrainingLog:
    """A log as it was read."""

    path: Path
    steps: tuple[LoggedStep, ...]
    is_own: bool
    """It is a `metrics.jsonl` of this program, in which a loss of 0 is a loss of 0"""
    scores: dict[str, float]
    """The last `accuracy` and `answer_rate` in the log"""
    has_unscale_error: bool
    """It holds PyTorch's error about unscaling float16 gradients"""


def diagnose(log: TrainingLog) -> Diagnosis:
    """The first pattern that the log shows."""
    return DIAGNOSES[next((name for name, matches in _RULES.items() if matches(log)), "healthy")]


def diagnosis_lines(log: TrainingLog) -> list[str]:
    """The diagnosis as text."""
    found, steps = diagnose(log), log.steps
    lines = [f"{log.path}: {len(steps)} lines with a loss"]
    if steps:
        bad = Counter(
            "0" if s.loss == 0.0 else "nan or inf" for s in steps if s.loss == 0.0 or not math.isfinite(s.loss)
        )
        counts = ", ".join(f"{count} of them {kind}" for kind, count in bad.items())
        lines[0] += f", from {steps[0].loss:g} to {steps[-1].loss:g}" + (f" ({counts})" if counts else "")
    lines += [f"Pattern: {found.pattern}", f"Likely cause: {found.cause}", f"What to try: {found.remedy}"]
    return lines + ([f"Seen: {found.seen}"] if found.seen else [])


def _share(log: TrainingLog, holds: Callable[[LoggedStep], bool]) -> float:
    """The share of the steps for which this holds; 0 without steps."""
    return sum(map(holds, log.steps)) / len(log.steps) if log.steps else 0.0


def _start_of_tail(steps: Sequence[LoggedStep], holds: Callable[[LoggedStep], bool]) -> int:
    """The first of the last steps for all of which this holds; the number of steps if it does not for the last one."""
    start = len(steps)
    while start and holds(steps[start - 1]):
        start -= 1
    return start


def _skipped_for(cause: str, log: TrainingLog) -> bool:
    return _share(log, lambda step: step.cause == cause) > 0.5


def _ends_in_nan(log: TrainingLog) -> bool:
    return 0 < _start_of_tail(log.steps, lambda step: step.is_nan) < len(log.steps)


def _explodes(log: TrainingLog) -> bool:
    """Is the loss much higher at the end than at the start, or was it rising when it became nan?"""
    finite = [step.loss for step in log.steps if math.isfinite(step.loss) and step.loss]
    norms = [step.grad_norm for step in log.steps if step.grad_norm and math.isfinite(step.grad_norm)]
    if not finite:
        return False
    late = finite[-max(1, len(finite) // 5) :]
    rises = sum(late) / len(late) > max(_RISE * finite[0], min(finite) + 1.0)
    norm_rises = len(norms) > 1 and norms[-1] > _NORM_RISE * norms[0]
    # A run of this program refuses updates that are NaN, so its weights must have become too large instead.
    return rises or (_ends_in_nan(log) and (norm_rises or log.is_own or finite[-1] > _RISE * min(finite)))


def _is_flat(log: TrainingLog) -> bool:
    losses = [step.loss for step in log.steps]
    return len(losses) >= 5 and all(map(math.isfinite, losses)) and max(losses) - min(losses) <= _FLAT * abs(losses[0])


_RULES: dict[str, Callable[[TrainingLog], bool]] = {
    "half weights": lambda log: log.has_unscale_error,
    "no labels": lambda log: _skipped_for("no_targets", log)
    or _share(log, lambda step: step.loss == 0.0 and step.grad_norm in (0.0, None)) == 1.0,
    "norm skips": lambda log: _skipped_for("norm", log),
    "forward overflow": lambda log: (
        bool(log.steps) and log.steps[0].is_nan and _share(log, lambda step: step.is_nan) > 0.5
    ),
    "exploding": _explodes,
    "weights became nan": _ends_in_nan,
    "some labels missing": lambda log: 0 < _share(log, lambda step: step.has_no_labels) < 1,
    "loss lost": lambda log: len(log.steps) > 2 and _start_of_tail(log.steps, lambda step: step.loss == 0.0) == 1,
    "backward overflow": lambda log: _share(log, lambda step: step.has_bad_norm) > 0.5,
    "no gradient": lambda log: _share(log, lambda step: step.grad_norm == 0.0) > 0.5,
    "no movement": _is_flat,
    "no answers": lambda log: log.scores.get("answer_rate") == 0.0,
    "wrong answers": lambda log: log.scores.get("accuracy") == 0.0,
    "calibration": lambda log: any(step.has_bad_norm for step in log.steps),
}  # fmt: skip
"""The test of each pattern, in the order in which they are tried"""


def read_log(path: Path) -> TrainingLog:
    """Read a log file, or the one in a run's or a checkpoint's folder.

    Raises: UsageError if there is none, or it holds no loss
    """
    if path.is_dir():
        path = next((path / name for name in _LOG_NAMES if (path / name).is_file()), path)
    if not path.is_file():
        raise UsageError(f"explain {path}: no such log; give a file, or a folder that holds {' or '.join(_LOG_NAMES)}")
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"explain {path}: cannot be read ({error.strerror})") from None
    records = _records(text)
    is_own = any(record.get("event") == "step" for record in records)
    steps = tuple(step for record in records if (step := _logged_step(record)) is not None)
    scores = {name: number for name, value in _SCORE.findall(text) if (number := _number(value)) is not None}
    has_unscale_error = "Attempting to unscale FP16 gradients" in text
    if not steps and not has_unscale_error:
        raise UsageError(
            f"explain {path}: holds no loss; give lines as {{'loss': 2.27, 'grad_norm': 1.55}}, or {_LOG_NAMES[1]}"
        )
    return TrainingLog(path, steps, is_own, scores, has_unscale_error)


def _records(text: str) -> list[dict]:
    whole = _json(text)
    if isinstance(whole, dict) and isinstance(whole.get("log_history"), list):
        return [record for record in whole["log_history"] if isinstance(record, dict)]
    lines = [_json(line) for line in text.splitlines()]
    own = [line for line in lines if isinstance(line, dict) and line.get("event") == "step"]
    return own or list(_printed_records(text))


def _printed_records(text: str) -> Iterator[dict]:
    """The dicts that a Trainer prints, in which nan is not JSON; newer versions print their values as text."""
    for found in _LINE.finditer(text):
        yield dict(_ITEM.findall(found[0]))


def _json(text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _logged_step(record: dict) -> LoggedStep | None:
    loss, cause = _number(record.get("loss")), record.get("cause")
    if loss is None:
        return None
    return LoggedStep(loss, _number(record.get("grad_norm")), cause if isinstance(cause, str) else None)


def _number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, (int, float, str)) else None
    except ValueError:
        return None
