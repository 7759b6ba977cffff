"""Why a forward or a gradient is not finite: replay it once with hooks, and write `crash/` with what to try.

Runs only after a step was skipped, so it costs nothing otherwise. `sar-kd forensics RUN_DIR` prints the page.
"""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from sar_kd.data.batch import Batch
from sar_kd.evaluation.nonfinite import describe_module, remedy_of, replay
from sar_kd.models.lm_head import in_eval_mode
from sar_kd.models.logit_tiles import is_finite_peak
from sar_kd.reporting.rendering import render
from sar_kd.runtime.files import atomic_write, json_safe
from sar_kd.runtime.precision import Precision


def examine(
    model: nn.Module,
    batch: Batch,
    precision: Precision,
    cause: str | None = "forward",
    loss: Callable[[Batch], Tensor] | None = None,
) -> dict:
    """Replay a bad micro-batch in the run's dtype and, if that is not finite, in float32.

    model  the student; the teacher if the cause is 'teacher'
    cause  why its step was skipped, of `guards.CAUSES`
    loss   the total loss of a batch; needed to detect a bad loss, and to replay the backward of a bad gradient
    Returns: the entries of `replay`; the blocks whose logits are not finite; and the cross-entropy of the batch in
    float32, nats per token
    """
    tokens = batch.to(precision.device)
    input_ids = tokens.teacher.input_ids if cause == "teacher" else tokens.student.input_ids
    with in_eval_mode(model):
        found, logits, logits_float32 = replay(model, input_ids, precision)
        if found["verdict"] == "not reproduced" and cause == "gradient":
            found["verdict"] = "gradient"
        if found["first_bad_module"] is None and loss is not None:
            found["first_bad_module"], loss_is_finite = _replay_backward(model, batch, loss)
            found["verdict"] = found["verdict"] if loss_is_finite else "loss"
    bad_rows = (~is_finite_peak(logits.float().amax(-1)).all(1)).nonzero().flatten().tolist()
    return found | {
        "growth": "",
        "remedy": remedy_of(found["verdict"], precision),
        "ce_float32": math.nan if cause == "teacher" else _cross_entropy(logits_float32, batch),
        "finite_in_run_dtype": found["verdict"] in ("gradient", "not reproduced", "loss"),
        "bad_blocks": [batch.blocks[row] for row in bad_rows] or list(batch.blocks),
    }


def _cross_entropy(logits: Tensor, batch: Batch) -> float:
    """Nats per target token; nan if there is no target."""
    targets = batch.to(logits.device).student
    rows = logits.flatten(0, 1)[targets.positions].float()
    return nn.functional.cross_entropy(rows, targets.targets).item()


def unexamined(micro_batches: list[Batch], cause: str | None, precision: Precision) -> dict:
    """The findings where nothing is replayed, a sharded student or a cached teacher: every block may be the bad one."""
    verdict = "cache" if cause == "teacher" else "shards"
    return {
        "verdict": verdict,
        "growth": "",
        "remedy": remedy_of(verdict, precision),
        "ce_float32": math.nan,
        "finite_in_run_dtype": cause == "gradient",
        "finite_in_float32": None,
        "first_bad_module": None,
        "bad_blocks": [block for batch in micro_batches for block in batch.blocks],
    }


def _replay_backward(student: nn.Module, batch: Batch, loss: Callable[[Batch], Tensor]) -> tuple[dict | None, bool]:
    """The first module, in the backward of an unscaled loss, whose gradient is not finite; is the loss finite?"""
    found: list[dict] = []

    def hook_of(name: str):
        def hook(module, gradients, _):
            bad = [g for g in gradients if isinstance(g, Tensor) and not bool(g.isfinite().all())]
            if bad and not found:
                found.append(describe_module(name, module, (), bad[0]))

        return hook

    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers before the first adapter, whose inputs need no gradient
        for name, module in student.named_modules():
            if name and not isinstance(module, nn.Embedding) and not any(module.children()):
                stack.enter_context(module.register_full_backward_hook(hook_of(name)))
        total = loss(batch) / max(1, batch.num_target_tokens)
        is_finite = bool(total.isfinite())
        if is_finite and total.requires_grad:
            total.backward()
    student.zero_grad(set_to_none=True)
    return (found[0] if found else None), is_finite


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
    largest_output = (module or {}).get("largest_output_float32")
    if record["verdict"] != "fp16 range" or largest_output is None or not math.isfinite(largest_output):
        largest_output = None  # float32 does not show by how much float16 is exceeded
    return render("crash.md", **record, module=module, float16_max=float16_max, largest_output=largest_output)
