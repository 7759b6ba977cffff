"""The loss alone: divergence from hidden states to the gradients of states and head, in time and memory.

    python benchmarks/loss.py [--vocab_size 32000 262144] [--rows 1024 4096] [--width 640] [--cpu_time]

Each side in turns in one process, on the same tensors. `floor` is the four head products alone: two forward, two
backward. `naive` is the usual code: both logits whole, log_softmax in float32, autograd. With TRL installed its chunked
loss and its GKD loss are measured too. Memory is what a side's peak adds to what the tensors take already: of the
process, on Linux, or of the allocator on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from paired import Clock, add_flags, device_of, write
from torch import Tensor

from sar_kd.alignment.segments import split_range
from sar_kd.config.sections import LossConfig, PrecisionConfig
from sar_kd.losses.distillation import TokenLevel
from sar_kd.losses.tiled_loss import TiledLossSpec, tiled_loss
from sar_kd.models.lm_head import LazyLogits, LMHead
from sar_kd.runtime.precision import Precision, setup_precision

try:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.trainer.distillation_trainer import _chunked_divergence_loss
except ImportError:
    GKDTrainer = None

SCALE = 65536.0


class Case:
    """Random hidden states of both models, and their heads."""

    def __init__(self, vocab_size: int, rows: int, width: int, precision: Precision, workspace_mb: int):
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(precision.device)  # noqa: E731
        self.precision, self.rows = precision, rows
        self.weight, self.teacher_weight = (0.05 * draw(vocab_size, width) for _ in range(2))
        self.states, self.teacher = draw(rows, width), draw(rows, width)
        if precision.dtype is not torch.float32:
            self.teacher_weight = self.teacher_weight.to(precision.dtype)
        self.scale = SCALE if precision.dtype is torch.float16 else 1.0
        names = "student_vocab_size", "teacher_vocab_size", "num_teacher_tokens"
        sizes = SimpleNamespace(**dict.fromkeys(names, vocab_size))
        config = LossConfig(temperature=1.0, logit_clamp_style="off", loss_workspace_mb=workspace_mb)
        self.term = TokenLevel(config, SimpleNamespace(pair=sizes))
        self.batch = SimpleNamespace(
            alignment=SimpleNamespace(teacher_positions=torch.arange(rows, device=precision.device))
        )

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.states.detach().requires_grad_(), self.weight.detach().requires_grad_()

    def logits(self, states: Tensor, weight: Tensor) -> Tensor:
        with self.precision.autocast():
            return torch.nn.functional.linear(states, weight)

    def backward(self, loss: Tensor) -> None:
        with self.precision.matmul_context():
            (loss * self.scale / self.rows).backward()


def ours(case: Case) -> None:
    states, weight = case.leaves()
    student = LazyLogits(states, LMHead(weight), case.precision)
    teacher = LazyLogits(case.teacher, LMHead(case.teacher_weight), case.precision)
    scale = torch.tensor(case.scale / case.rows, device=case.precision.device)
    tiles, term = case.term.tiles(case.batch), case.term
    spec = TiledLossSpec(tiles, None, term.loss_and_grad, 0.0, 1.0, term.clamp, grad_scale=scale)
    case.backward(tiled_loss(spec, student, teacher).total)


def naive(case: Case) -> None:
    states, weight = case.leaves()
    log_p = case.logits(states, weight).float().log_softmax(-1)
    with torch.no_grad():
        log_t = case.logits(case.teacher, case.teacher_weight).float().log_softmax(-1)
    case.backward((log_t.exp() * (log_t - log_p)).sum())


def floor(case: Case) -> None:
    dtype = case.precision.dtype
    states, weight, teacher, teacher_weight = (
        tensor.to(dtype) for tensor in (case.states, case.weight, case.teacher, case.teacher_weight)
    )
    with case.precision.matmul_context():
        for part in split_range(case.rows, 1024):  # of more, the logits would not fit into memory
            logits, _ = states[part] @ weight.T, teacher[part] @ teacher_weight.T
            _, _ = logits @ weight, logits.T @ states[part]


def trl_chunked(case: Case) -> None:
    states, weight = case.leaves()
    mask = torch.ones(1, case.rows, dtype=torch.int64, device=case.precision.device)
    with case.precision.autocast():
        loss, *_ = _chunked_divergence_loss(
            states[None], case.teacher[None], weight, case.teacher_weight, mask, beta=0.0, num_items_in_batch=case.rows
        )
    case.backward(loss * case.rows)


def trl_gkd(case: Case) -> None:
    states, weight = case.leaves()
    student = case.logits(states, weight)
    with torch.no_grad():
        teacher = case.logits(case.teacher, case.teacher_weight)
    case.backward(GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=0.0) * case.rows)


def memory(kind: str) -> int:
    """Bytes of this process: 'VmRSS' now, 'VmHWM' at the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind + ":"):
            return 1024 * int(line.split()[1])
    return 0


def forget_peak(device: torch.device) -> int:
    """Let the peak be what is there now; that, bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def peak(device: torch.device) -> int:
    """Bytes at the peak since `forget_peak`: of the allocator on a GPU, of this process elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory("VmHWM")


def measure(
    sides: dict[str, Callable[[Case], None]], case: Case, rounds: int, of_cpu: bool
) -> dict[str, dict[str, float]]:
    """Median seconds and extra bytes at the peak of each side, in turns."""
    device, clock = case.precision.device, Clock(case.precision.device, of_cpu)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    extra: dict[str, list[int]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            gc.collect()
            before = forget_peak(device)
            seconds[name].append(clock(lambda side=side: side(case)))
            extra[name].append(peak(device) - before)
    return {name: {"seconds": statistics.median(seconds[name]), "extra_mb": max(extra[name]) / 2**20} for name in sides}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocab_size", type=int, nargs="+", default=[32000, 50257, 151936, 262144])
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--width", type=int, default=896, help="features of the hidden states")
    parser.add_argument("--model_dtype", nargs="+", default=["float32", "float16"])
    parser.add_argument("--loss_workspace_mb", type=int, default=LossConfig().loss_workspace_mb)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", default=["floor", "ours", "naive", "trl_chunked", "trl_gkd"])
    add_flags(parser, "loss.json")
    options = parser.parse_args()
    device_of(options)
    sides = {"floor": floor, "ours": ours, "naive": naive}
    if GKDTrainer is not None:
        sides |= {"trl_chunked": trl_chunked, "trl_gkd": trl_gkd}
    sides = {name: side for name, side in sides.items() if name in options.sides}
    results = []
    print(
        "| dtype | V | N | head's gradient MB | " + " | ".join(f"{name}: s (of the floor), MB" for name in sides) + " |"
    )
    print("|---|---:|---:|---:|" + "---:|" * len(sides))
    for dtype in options.model_dtype:
        precision = setup_precision(PrecisionConfig(model_dtype=dtype, device=options.device), 0)
        for vocab_size in options.vocab_size:
            for rows in options.rows:
                size = options.width, precision, options.loss_workspace_mb
                measure(sides, Case(vocab_size, 128, *size), 1, options.cpu_time)  # warms up
                found = measure(sides, Case(vocab_size, rows, *size), options.rounds, options.cpu_time)
                head_mb = 4 * vocab_size * options.width / 2**20
                record = {"dtype": dtype, "vocab_size": vocab_size, "rows": rows, "head_gradient_mb": head_mb}
                results.append(record | {"sides": found})
                cells = [
                    f"{side['seconds']:.2f} ({side['seconds'] / found['floor']['seconds']:.2f}), {side['extra_mb']:.0f}"
                    for side in found.values()
                ]
                print(f"| {dtype} | {vocab_size} | {rows} | {head_mb:.0f} | " + " | ".join(cells) + " |", flush=True)
    write(options, {"width": options.width, "rounds": options.rounds, "results": results})


if __name__ == "__main__":
    main()
