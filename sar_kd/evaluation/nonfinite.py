"""Where is a model not finite? A replay with hooks finds the first such module, its reach in float32, and a remedy.

Nothing runs here while all is finite.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sar_kd.data.batch import TokenBatch
from sar_kd.errors import UsageError
from sar_kd.evaluation.perplexity import count_nonfinite, eval_mode
from sar_kd.models.lm_head import LMHeads, device_of
from sar_kd.models.logit_tiles import is_finite_peak
from sar_kd.models.model_checks import is_finite_weight, lm_head_bias_name
from sar_kd.models.placement import is_offloaded, weights_of
from sar_kd.runtime.console import format_share
from sar_kd.runtime.distributed import ProcessGroup
from sar_kd.runtime.precision import Precision

REMEDIES = {
    "diverged": "the updates were too large for this model: start again with a lower --student_lr",
    "fp16 range": "the weights are finite but float16 cannot hold this model's activations: use --model_dtype float32, "
    "or bfloat16 on a card that has it",
    "weights": "a weight is not finite: start from an intact checkpoint",
    "weights or data": "the forward is not finite in float32 either: look at the module and the text",
    "quantized": "quantized weights are not replayed in float32: try without --teacher_quantization and "
    "--lora_quantization, or --model_dtype float32",
    "offloaded": "weights that are not on the device are not replayed in float32: try --model_dtype float32",
    "cache": "the logits in the teacher cache are not finite: make it again, with --model_dtype float32",
    "loss": "the logits are finite and the loss is not: leave out text with tokens that the student masks (logits of "
    "-inf), or lower --alpha_ce, --alpha_kd or --temperature",
    "masked": "only one of the models masks tokens (logits of -inf), where KL is infinite: use --kd_direction jsd",
    "gradient": "the forward is finite and the gradients are not, even at the lowest loss scale: use "
    "--model_dtype float32, or a lower --student_lr",
    "shards": "a sharded student is not replayed: try --parallel ddp or one process, to see which module it is; or "
    "--model_dtype float32",
    "not reproduced": "the replay, without dropout, is finite: it was dropout or the hardware; if it happens again, "
    "lower --student_lr or use --model_dtype float32, and test the card's memory",
}
"""What to try, by diagnosis."""

_IN_FLOAT32 = {
    "gradient": "the forward is finite and the gradients are not, in float32: look at the module named here, and lower "
    "--student_lr",
    "shards": "a sharded student is not replayed: try --parallel ddp or one process, to see which module it is",
    "quantized": "quantized weights are not replayed in float32: try without --teacher_quantization and "
    "--lora_quantization",
    "offloaded": "weights that are not on the device are not replayed: leave out --teacher_device_map where it fits",
    "cache": "the logits in the teacher cache are not finite: make it again",
    "not reproduced": "the replay, without dropout, is finite: it was dropout or the hardware; if it happens again, "
    "lower --student_lr, and test the card's memory",
}
"""What to try in a run that computes in float32 already"""


def remedy_of(verdict: str, precision: Precision, student_lr: str = "", max_grad_norm: float = 0.0) -> str:
    """What to try, with the values of the run and without what it does already.

    verdict: a key of `REMEDIES`; student_lr: the value of that option, in words
    """
    text = _IN_FLOAT32.get(verdict, REMEDIES[verdict]) if precision.dtype is torch.float32 else REMEDIES[verdict]
    if student_lr:
        text = text.replace("--student_lr", f"--student_lr (it is {student_lr})")
    if verdict == "diverged" and max_grad_norm > 1.0:
        text += f", or with --max_grad_norm 1 (it is {max_grad_norm:g})"
    return text


def check_finite(
    title: str,
    share: float,
    limit: float,
    precision: Precision,
    model: nn.Module | None,
    batches: Iterable[TokenBatch] = (),
    verdict: str = "shards",
    where: str = "the held-out text",
    trains: bool = False,
) -> list[str]:
    """A warning about a model whose logits are not finite at a share of a text; none where all are.

    title: the option and its value; share: as it was measured; limit: the largest share to go on with
    batches: of the text; the first one that is not finite is replayed
    verdict: a key of `REMEDIES`, where the model is None and not replayed
    where: the text; trains: it was measured in the run's dtype, whatever that of the weights
    Raises: UsageError above the limit, with the module, the largest value and the remedy
    """
    if not share:
        return []
    found, dtype, used = "", "", precision
    if model is not None:
        with eval_mode(model, precision) as used:
            used = precision if trains else used
            for batch in batches:
                findings, _, _ = replay(model, batch.input_ids, used)
                verdict, found = findings["verdict"], module_in_words(findings)
                if verdict != "not reproduced":
                    break
        dtype = " in " + str(used.dtype).removeprefix("torch.")
    line = f"{title}: its logits are not finite at {format_share(share)} of {where}{dtype}. "
    line += f"{found} What to try: {remedy_of(verdict, used)}".strip()
    if share > limit:
        raise UsageError(line)
    return [f"Warning: {line}. There a student learns from the text alone"]


def check_first_steps(
    title: str,
    student: nn.Module,
    steps: Iterable[list[TokenBatch]],
    precision: Precision,
    heads: LMHeads,
    process_group: ProcessGroup,
    replays: bool,
) -> None:
    """Raise UsageError where a student's forward, as a step computes it, is finite in none of the first steps.

    A validation computes in float32, as the saved student will; what float16 cannot hold only a step's forward shows.

    title, heads: as in `check_finite` and `evaluate`; steps: this rank's micro-batches of each
    replays: to name the module
    """
    if precision.as_float32() is precision:
        return
    nonfinite, total, number, batches = 0.0, 0.0, 0, list[TokenBatch]()
    for number, batches in enumerate(steps, start=1):  # noqa: B007
        count: float = sum(count_nonfinite(student, batch, precision, heads) for batch in batches)
        count, targets = process_group.all_reduce_sum([count, sum(len(batch.targets) for batch in batches)])
        nonfinite, total = nonfinite + count, total + targets
        if not count:
            return
    where, model = f"the text of steps 1 to {number} (some in each)", student if replays else None
    try:
        check_finite(title, nonfinite / total, 0.0, precision, model, batches, where=where, trains=True)
    except UsageError as error:  # of every rank, each with its own largest values
        raise UsageError(process_group.broadcast(str(error))) from None


@torch.no_grad()
def replay(model: nn.Module, input_ids: Tensor, precision: Precision) -> tuple[dict, Tensor, Tensor]:
    """Run a model in the run's dtype and, if that is not finite, in float32; in half weights, the bad module alone.

    Returns: the `verdict` (a key of `REMEDIES`), its `remedy`, `finite_in_float32` (None if not replayed), and
    `first_bad_module`, whose output is the first that is not finite, with dtype, largest input, largest weight and its
    largest output in float32; the logits in both dtypes
    """
    device = device_of(model)
    input_ids, precision = input_ids.to(device), precision.on(device)
    has_half_weights = any(parameter.dtype is not torch.float32 for parameter in model.parameters())
    logits, first = _replay(model, input_ids, precision, replays_module=has_half_weights)
    logits_float32, finite_in_float32 = logits, None if first else True
    if first is not None and not has_half_weights:
        bad_module = next(module for name, module in model.named_modules() if name == first["name"])
        largest = list[float]()

        def record_largest(module, inputs, output) -> None:
            largest.append(_max_abs([output[0] if isinstance(output, tuple) else output]))

        with bad_module.register_forward_hook(record_largest):
            logits_float32, bad_in_float32 = _replay(model, input_ids, precision.as_float32())
        first["largest_output_float32"] = max(largest, default=math.nan)
        finite_in_float32 = bad_in_float32 is None
    elif first is not None and first["largest_output_float32"] is not None:
        finite_in_float32 = math.isfinite(first["largest_output_float32"])
    verdict = _verdict(model, first, finite_in_float32)
    found: dict = {"verdict": verdict, "remedy": remedy_of(verdict, precision)}
    found |= {"finite_in_float32": finite_in_float32, "first_bad_module": first}
    return found, logits, logits_float32


def module_in_words(found: dict) -> str:
    """What `replay` found, as a sentence; '' if it found no module."""
    module, float16_max = found["first_bad_module"], torch.finfo(torch.float16).max
    if module is None:
        return ""
    text = f"The first module that is not finite is {module['name']} ({module['kind']})"
    largest = module.get("largest_output_float32")
    if found["finite_in_float32"] and largest > float16_max:
        return f"{text}: in float32 its output reaches {largest:.4g}, float16 ends at {float16_max:.0f}."
    sizes = {"inputs": module["largest_input"], "weights": module["largest_weight"]}
    text += "".join(f", its {name} up to {size:.4g}" for name, size in sizes.items() if size)
    is_beyond = found["finite_in_float32"] and max(filter(None, sizes.values()), default=0.0) > float16_max
    return f"{text}; float16 ends at {float16_max:.0f}." if is_beyond else f"{text}."


def _verdict(model: nn.Module, first: dict | None, finite_in_float32: bool | None) -> str:
    if first is None:
        return "not reproduced"
    bias_name = lm_head_bias_name(model)
    if not all(is_finite_weight(weight, name == bias_name) for name, weight in weights_of(model)):
        return "weights"
    if finite_in_float32 is None:
        return "offloaded" if is_offloaded(model) else "quantized"
    return "fp16 range" if finite_in_float32 else "weights or data"


def _replay(
    model: nn.Module, input_ids: Tensor, precision: Precision, replays_module: bool = False
) -> tuple[Tensor, dict | None]:
    """The logits, and the first module whose output is not finite; None if all are.

    replays_module: run that module once more, in float32
    """
    found, head = list[dict](), model.get_output_embeddings()  # type: ignore[operator]

    def hook_of(name: str):
        def hook(module, args, kwargs, output):
            output = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(output, Tensor) and not _is_finite(output, module is head):
                found.append(describe_module(name, module, (*args, *kwargs.values()), output))
                if replays_module:  # after the entry, because the module's hooks run again
                    with precision.as_float32().autocast():
                        found[0]["largest_output_float32"] = _largest_in_float32(module, args, kwargs)

        return hook

    # The hook of a child runs before that of the module that contains it, so the first finding is the innermost module.
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                stack.enter_context(module.register_forward_hook(hook_of(name), with_kwargs=True))
        with precision.autocast():
            logits = model(input_ids=input_ids, use_cache=False).logits
    return logits, found[0] if found else None


def _is_finite(output: Tensor, is_lm_head: bool) -> bool:
    """Are all numbers finite? -inf in an LM head's output is a masked token, unless all of a position are."""
    if not is_lm_head:
        return bool(output.isfinite().all())
    return bool(is_finite_peak(output.float().amax(-1)).all())


def _largest_in_float32(module: nn.Module, args: tuple, kwargs: dict) -> float | None:
    """The largest magnitude of a module's output in float32; None for weights that are quantized or not loaded."""
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    if any(weight.is_meta or not weight.is_floating_point() for weight in module.parameters()):
        return None

    def cast(value):
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    output = torch.func.functional_call(module, *(tree_map(cast, values) for values in (tensors, args, kwargs)))
    output = output[0] if isinstance(output, tuple) else output
    return output.abs().max().item()


def describe_module(name: str, module: nn.Module, inputs, output: Tensor) -> dict:
    """A module whose output (or gradient) is not finite, in plain values."""
    tensors = [value for value in inputs if isinstance(value, Tensor) and value.is_floating_point()]
    return {
        "name": name,
        "kind": type(module).__name__,
        "output_dtype": str(output.dtype).removeprefix("torch."),
        "largest_input": _max_abs(tensors),
        "largest_weight": _max_abs([weight for weight in module.parameters(recurse=False) if not weight.is_meta]),
    }


def _max_abs(tensors: list[Tensor]) -> float:
    return max((tensor.abs().max().item() for tensor in tensors if tensor.numel()), default=0.0)
