"""Why a forward or a gradient is not finite: replay it once with hooks, and write `crash/` with what to try.

Runs only after a step was skipped, so it costs nothing otherwise. `sar-kd forensics RUN_DIR` prints the page.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from sar_kd.data.batch import Batch
from sar_kd.reporting.rendering import render
from sar_kd.runtime.files import atomic_write, json_safe
from sar_kd.runtime.precision import Precision

REMEDIES = {
    "diverged": "the updates were too large for this model: start again with a lower --student_lr",
    "fp16 range": "the weights are finite but float16 cannot hold this model's activations: use --model_dtype float32, "
    "or bfloat16 on a card that has it",
    "weights": "a weight of the student is not finite: start from an intact checkpoint",
    "weights or data": "the forward is not finite in float32 either: look at the module and the documents named here",
    "loss": "the logits are finite and the loss is not: lower --alpha_ce, --alpha_kd or --temperature",
    "gradient": "the forward is finite and the gradients are not, even at the lowest loss scale: use "
    "--model_dtype float32, or a lower --student_lr",
    "shards": "a sharded student is not replayed: try the documents named here with --parallel ddp or in one process, "
    "to see which module it is; or --model_dtype float32",
    "not reproduced": "the replay, without dropout, is finite: it was dropout or the hardware; if it happens again, "
    "lower --student_lr or use --model_dtype float32, and test the card's memory",
}
"""What to try, by diagnosis."""

_IN_FLOAT32 = {
    "gradient": "the forward is finite and the gradients are not, in float32: look at the module named here, and lower "
    "--student_lr",
    "shards": "a sharded student is not replayed: try the documents named here with --parallel ddp or in one process, "
    "to see which module it is",
    "not reproduced": "the replay, without dropout, is finite: it was dropout or the hardware; if it happens again, "
    "lower --student_lr, and test the card's memory",
}
"""What to try in a run that computes in float32 already"""


def remedy_of(verdict: str, precision: Precision, student_lr: float = math.nan, max_grad_norm: float = 0.0) -> str:
    """What to try, with the values of the run and without what it does already. verdict: a key of `REMEDIES`"""
    text = _IN_FLOAT32.get(verdict, REMEDIES[verdict]) if precision.dtype is torch.float32 else REMEDIES[verdict]
    if not math.isnan(student_lr):
        text = text.replace("--student_lr", f"--student_lr (it is {student_lr:g})")
    if verdict == "diverged" and max_grad_norm > 1.0:
        text += f", or with --max_grad_norm 1 (it is {max_grad_norm:g})"
    return text


def examine(
    student: nn.Module,
    batch: Batch,
    precision: Precision,
    cause: str | None = "forward",
    loss: Callable[[Batch], Tensor] | None = None,
) -> dict:
    """Replay a bad micro-batch in the run's dtype and, if that is not finite, in float32.

    cause  why its step was skipped, of `guards.CAUSES`
    loss   the total loss of a batch; needed to detect a bad loss, and to replay the backward of a bad gradient
    Returns: the verdict (a key of `REMEDIES`), its remedy, whether each replay is finite, the blocks whose logits are
    not, and the first module whose output (for a bad gradient: whose gradient) is not, with dtype, largest input,
    largest weight and its largest output in float32; and the cross-entropy of the batch in float32, nats per token
    """
    input_ids = batch.to(precision.device).student.input_ids
    was_training = student.training
    student.eval()
    with torch.no_grad():
        logits, first = _replay(student, input_ids, precision.autocast())
        logits_float32, finite_in_float32 = logits, True
        if first is not None:
            bad_module = next(module for name, module in student.named_modules() if name == first["name"])
            with _largest_output(bad_module) as outputs:
                logits_float32, bad_in_float32 = _replay(student, input_ids, contextlib.nullcontext())
            finite_in_float32 = bad_in_float32 is None
            first["largest_output_float32"] = max(outputs, default=math.nan)
    verdict = _verdict(student, first, finite_in_float32, cause)
    if first is None and loss is not None:
        first, loss_is_finite = _replay_backward(student, batch, loss)
        verdict = verdict if loss_is_finite else "loss"
    student.train(was_training)
    bad_rows = (~logits.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    return {
        "verdict": verdict,
        "growth": "",
        "remedy": remedy_of(verdict, precision),
        "ce_float32": _cross_entropy(logits_float32, batch),
        "finite_in_run_dtype": verdict in ("gradient", "not reproduced", "loss"),
        "finite_in_float32": finite_in_float32,
        "first_bad_module": first,
        "bad_blocks": [batch.blocks[row] for row in bad_rows] or list(batch.blocks),
    }


def _cross_entropy(logits: Tensor, batch: Batch) -> float:
    """Nats per target token; nan if there is no target."""
    targets = batch.to(logits.device).student
    rows = logits.flatten(0, 1)[targets.positions].float()
    return nn.functional.cross_entropy(rows, targets.targets).item()


def unexamined(micro_batches: list[Batch], cause: str | None, precision: Precision) -> dict:
    """The findings about a sharded student, which is not replayed: every block may be the bad one."""
    return {
        "verdict": "shards",
        "growth": "",
        "remedy": remedy_of("shards", precision),
        "ce_float32": math.nan,
        "finite_in_run_dtype": cause == "gradient",
        "finite_in_float32": None,
        "first_bad_module": None,
        "bad_blocks": [block for batch in micro_batches for block in batch.blocks],
    }


def _verdict(student: nn.Module, first: dict | None, finite_in_float32: bool, cause: str | None) -> str:
    if first is None:
        return "gradient" if cause == "gradient" else "not reproduced"
    if not all(parameter.isfinite().all() for parameter in student.parameters()):
        return "weights"
    return "fp16 range" if finite_in_float32 else "weights or data"


def _replay(student: nn.Module, input_ids: Tensor, context) -> tuple[Tensor, dict | None]:
    """The logits, and the first module whose output is not finite; None if all are."""
    found: list[dict] = []

    def hook_of(name: str):
        def hook(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(output, Tensor) and not bool(output.isfinite().all()):
                found.append(_describe(name, module, inputs, output))

        return hook

    # The hook of a child runs before that of the module that contains it, so the first finding is the innermost module.
    with contextlib.ExitStack() as stack:
        for name, module in student.named_modules():
            if name:
                stack.callback(module.register_forward_hook(hook_of(name)).remove)
        with context:
            logits = student(input_ids=input_ids, use_cache=False).logits
    return logits, found[0] if found else None


def _replay_backward(student: nn.Module, batch: Batch, loss: Callable[[Batch], Tensor]) -> tuple[dict | None, bool]:
    """The first module, in the backward of an unscaled loss, whose gradient is not finite; is the loss finite?"""
    found: list[dict] = []

    def hook_of(name: str):
        def hook(module, gradients, _):
            bad = [g for g in gradients if isinstance(g, Tensor) and not bool(g.isfinite().all())]
            if bad and not found:
                found.append(_describe(name, module, (), bad[0]))

        return hook

    with contextlib.ExitStack() as stack:
        for name, module in student.named_modules():
            if name and not isinstance(module, nn.Embedding) and not any(module.children()):
                stack.callback(module.register_full_backward_hook(hook_of(name)).remove)
        total = loss(batch) / max(1, batch.num_target_tokens)
        is_finite = bool(total.isfinite())
        if is_finite and total.requires_grad:
            total.backward()
    student.zero_grad(set_to_none=True)
    return (found[0] if found else None), is_finite


def _describe(name: str, module: nn.Module, inputs, output: Tensor) -> dict:
    tensors = [value for value in inputs if isinstance(value, Tensor) and value.is_floating_point()]
    return {
        "name": name,
        "kind": type(module).__name__,
        "output_dtype": str(output.dtype).removeprefix("torch."),
        "largest_input": _max_abs(tensors),
        "largest_weight": _max_abs(list(module.parameters(recurse=False))),
    }


@contextlib.contextmanager
def _largest_output(module: nn.Module):
    """A list that receives the largest magnitude of each output of the module."""
    largest: list[float] = []

    def hook(module, inputs, output):
        largest.append(_max_abs([output[0] if isinstance(output, tuple) else output]))

    with module.register_forward_hook(hook):
        yield largest


def _max_abs(tensors: list[Tensor]) -> float:
    return max((tensor.abs().max().item() for tensor in tensors if tensor.numel()), default=0.0)


def write_crash(folder: Path, batch: Batch, record: dict) -> None:
    """`crash.md` to read, `crash.json` for programs, `batch.safetensors` with the tokens of the bad micro-batch."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"input_ids": batch.student.input_ids.cpu(), "labels": batch.student.labels.cpu()}
    safetensors.torch.save_file(tensors, str(folder / "batch.safetensors"))
    atomic_write(folder / "crash.json", json.dumps(json_safe(record), indent=2) + "\n")
    atomic_write(folder / "crash.md", crash_page(record))


def crash_page(record: dict) -> str:
    """The record of a NaN batch as a page of Markdown: cause, module, documents, and what to try."""
    module, float16_max = record["first_bad_module"], torch.finfo(torch.float16).max
    largest_output = (module or {}).get("largest_output_float32", math.nan)
    if record["verdict"] != "fp16 range" or not math.isfinite(largest_output):
        largest_output = None  # float32 does not show by how much float16 is exceeded
    return render("crash.md", **record, module=module, float16_max=float16_max, largest_output=largest_output)
