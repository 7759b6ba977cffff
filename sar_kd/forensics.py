"""Why a forward is not finite: replay it once with hooks, and write down what a person needs to mend it.

Runs only after a run has stopped itself, so it costs nothing while nothing is wrong.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from sar_kd.data import Batch
from sar_kd.metrics import plain, replace_text
from sar_kd.precision import Precision

REMEDIES = {
    "fp16 range": "the weights are sound but float16 cannot hold this model's activations: use --model_dtype float32, "
    "or bfloat16 on a card that has it",
    "weights": "a weight of the student is not finite: start from a checkpoint that is sound",
    "weights or data": "the forward is not finite in float32 either: look at the module and the documents named here",
    "gradient": "the forward is finite and the gradients are not, even at the lowest loss scale: use "
    "--model_dtype float32, or a lower --student_lr",
}


@torch.no_grad()
def examine(student: nn.Module, batch: Batch, precision: Precision) -> dict:
    """Replay the student's forward in the run's dtype and in float32.

    Returns: the verdict (a key of `REMEDIES`), its remedy, whether each replay is finite, and the first module
    whose output is not: its name, output dtype, largest input and largest weight
    """
    input_ids = batch.to(precision.device).student.input_ids
    was_training = student.training
    student.eval()
    first = _first_bad_module(student, input_ids, precision.autocast())
    first_fp32 = first and _first_bad_module(student, input_ids, contextlib.nullcontext())
    student.train(was_training)
    if first is None:
        verdict = "gradient"
    elif not all(parameter.isfinite().all() for parameter in student.parameters()):
        verdict = "weights"
    else:
        verdict = "fp16 range" if first_fp32 is None else "weights or data"
    return {
        "verdict": verdict,
        "remedy": REMEDIES[verdict],
        "finite_in_run_dtype": first is None,
        "finite_in_float32": first_fp32 is None,
        "first_bad_module": first,
    }


def _first_bad_module(student: nn.Module, input_ids: Tensor, context) -> dict | None:
    found: list[dict] = []

    def hook_of(name: str):
        def hook(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            if found or not isinstance(output, Tensor) or bool(output.isfinite().all()):
                return
            tensors = [value for value in inputs if isinstance(value, Tensor) and value.is_floating_point()]
            weights = list(module.parameters(recurse=False))
            found.append(
                {
                    "name": name,
                    "output_dtype": str(output.dtype).removeprefix("torch."),
                    "largest_input": _largest(tensors),
                    "largest_weight": _largest(weights),
                }
            )

        return hook

    # Children report before the module that contains them, so the first report is the innermost culprit.
    handles = [module.register_forward_hook(hook_of(name)) for name, module in student.named_modules() if name]
    try:
        with context:
            student(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _largest(tensors: list[Tensor]) -> float:
    return max((tensor.abs().max().item() for tensor in tensors if tensor.numel()), default=0.0)


def write_crash(folder: Path, batch: Batch, report: dict) -> None:
    """`crash/crash.json` with the whole report and `crash/batch.safetensors` with the tokens of the last bad batch."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"input_ids": batch.student.input_ids.cpu(), "labels": batch.student.labels.cpu()}
    safetensors.torch.save_file(tensors, str(folder / "batch.safetensors"))
    replace_text(folder / "crash.json", json.dumps(plain(report), indent=2) + "\n")
