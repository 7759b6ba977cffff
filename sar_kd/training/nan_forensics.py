"""Why a forward or a gradient is not finite: replay it once with hooks, and write down what a person needs to mend it.

Runs only after a step was refused, so it costs nothing while nothing is wrong. `python -m sar_kd forensics RUN_DIR`
prints the page.
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
from sar_kd.runtime.files import atomic_write, plain
from sar_kd.runtime.precision import Precision

REMEDIES = {
    "fp16 range": "the weights are sound but float16 cannot hold this model's activations: use --model_dtype float32, "
    "or bfloat16 on a card that has it",
    "weights": "a weight of the student is not finite: start from a checkpoint that is sound",
    "weights or data": "the forward is not finite in float32 either: look at the module and the documents named here",
    "loss": "the logits are finite and the loss is not: lower --alpha_ce, --alpha_kd or --temperature",
    "gradient": "the forward is finite and the gradients are not, even at the lowest loss scale: use "
    "--model_dtype float32, or a lower --student_lr",
    "shards": "a student that lies in shards is not replayed: try the documents named here with --parallel ddp or in "
    "one process, to see which module it is; or --model_dtype float32",
    "not reproduced": "the replay, without dropout, is finite: it was dropout or the hardware; if it happens again, "
    "lower --student_lr or use --model_dtype float32, and test the card's memory",
}


def examine(
    student: nn.Module,
    batch: Batch,
    precision: Precision,
    cause: str | None = "forward",
    loss: Callable[[Batch], Tensor] | None = None,
) -> dict:
    """Replay a bad micro-batch in the run's dtype and, if that is not finite, in float32.

    cause  why its step was refused, as `guards.CAUSES`
    loss   the total loss of a batch; needed to tell a bad loss, and to replay the backward of a bad gradient
    Returns: the verdict (a key of `REMEDIES`), its remedy, whether each replay is finite, the blocks whose logits are
    not, and the first module whose output (for a bad gradient: whose gradient) is not, with dtype, largest input,
    largest weight and its largest output in float32
    """
    input_ids = batch.to(precision.device).student.input_ids
    was_training = student.training
    student.eval()
    with torch.no_grad():
        logits, first = _replay(student, input_ids, precision.autocast())
        in_float32 = True
        if first is not None:
            wide = next(module for name, module in student.named_modules() if name == first["name"])
            with _largest_output(wide) as seen:
                in_float32 = _replay(student, input_ids, contextlib.nullcontext())[1] is None
            first["largest_output_float32"] = max(seen, default=math.nan)
    verdict = _verdict(student, first, in_float32, cause)
    if first is None and loss is not None:
        first, is_finite = _replay_backward(student, batch, loss)
        verdict = verdict if is_finite else "loss"
    student.train(was_training)
    bad_rows = (~logits.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    return {
        "verdict": verdict,
        "remedy": REMEDIES[verdict],
        "finite_in_run_dtype": verdict in ("gradient", "not reproduced", "loss"),
        "finite_in_float32": in_float32,
        "first_bad_module": first,
        "bad_blocks": [batch.blocks[row] for row in bad_rows] or list(batch.blocks),
    }


def unexamined(micro_batches: list[Batch], cause: str | None) -> dict:
    """What `examine` would have returned, of a student that lies in shards: every block may be the bad one."""
    return {
        "verdict": "shards",
        "remedy": REMEDIES["shards"],
        "finite_in_run_dtype": cause == "gradient",
        "finite_in_float32": None,
        "first_bad_module": None,
        "bad_blocks": [block for batch in micro_batches for block in batch.blocks],
    }


def _verdict(student: nn.Module, first: dict | None, in_float32: bool, cause: str | None) -> str:
    if first is None:
        return "gradient" if cause == "gradient" else "not reproduced"
    if not all(parameter.isfinite().all() for parameter in student.parameters()):
        return "weights"
    return "fp16 range" if in_float32 else "weights or data"


def _replay(student: nn.Module, input_ids: Tensor, context) -> tuple[Tensor, dict | None]:
    """The logits, and the first module whose output is not finite; None if all are."""
    found: list[dict] = []

    def hook_of(name: str):
        def hook(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            if found or not isinstance(output, Tensor) or bool(output.isfinite().all()):
                return
            found.append(_described(name, module, inputs, output))

        return hook

    # Children report before the module that contains them, so the first report is the innermost culprit.
    handles = [module.register_forward_hook(hook_of(name)) for name, module in student.named_modules() if name]
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        with context:
            logits = student(input_ids=input_ids, use_cache=False).logits
    return logits, found[0] if found else None


def _replay_backward(student: nn.Module, batch: Batch, loss: Callable[[Batch], Tensor]) -> tuple[dict | None, bool]:
    """The first module, on the way back from an unscaled loss, whose gradient is not finite; is the loss finite?"""
    found: list[dict] = []

    def hook_of(name: str):
        def hook(module, gradients, _):
            bad = [g for g in gradients if isinstance(g, Tensor) and not bool(g.isfinite().all())]
            if bad and not found:
                found.append(_described(name, module, (), bad[0]))

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


def _described(name: str, module: nn.Module, inputs, output: Tensor) -> dict:
    tensors = [value for value in inputs if isinstance(value, Tensor) and value.is_floating_point()]
    return {
        "name": name,
        "kind": type(module).__name__,
        "output_dtype": str(output.dtype).removeprefix("torch."),
        "largest_input": _largest(tensors),
        "largest_weight": _largest(list(module.parameters(recurse=False))),
    }


@contextlib.contextmanager
def _largest_output(module: nn.Module):
    """A list that receives the largest magnitude of the module's output."""
    seen: list[float] = []

    def hook(module, inputs, output):
        seen.append(_largest([output[0] if isinstance(output, tuple) else output]))

    with module.register_forward_hook(hook):
        yield seen


def _largest(tensors: list[Tensor]) -> float:
    return max((tensor.abs().max().item() for tensor in tensors if tensor.numel()), default=0.0)


def write_crash(folder: Path, batch: Batch, record: dict) -> None:
    """`crash.md` to read, `crash.json` for programs, `batch.safetensors` with the tokens of the bad micro-batch."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"input_ids": batch.student.input_ids.cpu(), "labels": batch.student.labels.cpu()}
    safetensors.torch.save_file(tensors, str(folder / "batch.safetensors"))
    atomic_write(folder / "crash.json", json.dumps(plain(record), indent=2) + "\n")
    atomic_write(folder / "crash.md", page(record))


def page(record: dict) -> str:
    """The report as a page of Markdown: what happened, where, in which documents, and what to try."""
    module, what = record["first_bad_module"], "forward" if record["cause"] == "forward" else "gradient"
    lines = [f"# Step {record['step']}: the {what} is not finite", "", record["outcome"], ""]
    if module:
        value = "output" if what == "forward" else "gradient"
        lines += [f"The first module whose {value} is not finite: `{module['name']}` ({module['kind']}).", ""]
        lines += _reach(module, record)
    rows = {
        "cause": record["cause"],
        "diagnosis": record["verdict"],
        "replay in the run's dtype": "finite" if record["finite_in_run_dtype"] else "not finite",
        "replay in float32": {None: "not made", True: "finite", False: "not finite"}[record["finite_in_float32"]],
        "loss scale": f"{record['loss_scale']:g}",
        "gradient norm": f"{record['grad_norm']:g}",
        "loss (ce, kd)": f"{record['loss']:g} ({_figure(record['ce_loss'])}, {_figure(record['kd_loss'])})",
    }
    if module:
        rows |= {
            "dtype of the module's output": module["output_dtype"],
            "largest input": f"{module['largest_input']:.4g}",
            "largest weight": f"{module['largest_weight']:.4g}",
        }
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]
    documents, remedy = record["documents"], record["remedy"]
    shown = [f"- {name}" for name in documents[:20]]
    if len(documents) > len(shown):
        shown.append(f"- and {len(documents) - len(shown)} more")
    lines += ["## Documents", "", *shown, "", "## What to try", "", f"{remedy[0].upper()}{remedy[1:]}."]
    return "\n".join(lines) + "\n"


def _reach(module: dict, record: dict) -> list[str]:
    """A sentence about how far the module's output goes where float32 can say it."""
    reach, ends = module.get("largest_output_float32", math.nan), torch.finfo(torch.float16).max
    if record["verdict"] != "fp16 range" or not math.isfinite(reach):
        return []
    if module["largest_weight"] > ends:
        return [f"A weight of it is {module['largest_weight']:.4g}; float16 ends at {ends:.0f}.", ""]
    if reach > ends:
        return [f"In float32 its output reaches {reach:.4g}; float16 ends at {ends:.0f}.", ""]
    return [f"In float32 its output reaches {reach:.4g} only: what is too large for float16 lies within it.", ""]


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"
