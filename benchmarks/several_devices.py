"""Two processes on this machine's CPU beside one with the joined batch: gradients, a NaN on one of them, a kill.

    python benchmarks/several_devices.py

The embedded pair, two micro-batches of two blocks on each rank, gloo; one process once with the same four micro-batches
and once with two of four blocks, which float16 rounds differently, with ranks or without. Prints a table and writes
`benchmarks/results/several_devices.json`. Exit code 1 unless gradients agree to 1e-5 with the same micro-batches, both
ranks refuse the NaN without changing a bit, and a run of which one rank was killed ends, resumed, as one that was not
killed.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

import safetensors.torch  # noqa: E402
import torch  # noqa: E402

from sar_kd.config.command_line import parse  # noqa: E402
from sar_kd.config.presets import STABLE  # noqa: E402
from sar_kd.data.dataset import build_dataset  # noqa: E402
from sar_kd.data.files.sources import load_documents  # noqa: E402
from sar_kd.losses.objective import Objective  # noqa: E402
from sar_kd.models.loading import load_models  # noqa: E402
from sar_kd.runtime.distributed import join_process_group  # noqa: E402
from sar_kd.runtime.precision import setup_precision  # noqa: E402
from sar_kd.training import trainer  # noqa: E402
from sar_kd.training.guards import StepGuard  # noqa: E402
from sar_kd.training.optimizer import build_optimizer, parameters_of  # noqa: E402
from sar_kd.training.parallel import build_strategy  # noqa: E402
from sar_kd.training.step import StepContext, train_step  # noqa: E402
from tests.helpers import ranks  # noqa: E402

TOLERANCE = 1e-5
_STEPS, _KILLED_AT = 8, 6


def step(dtype: str, parallel: str, batch_size: int, bad_rank: int | None = None, shares: int = 1) -> dict:
    """One update of the embedded student in this process's world: its figures, gradient and what it changed.

    shares: of a process that is alone, the ranks whose micro-batches it reads, one after the other
    """
    process_group = join_process_group()
    flags = ["--device", "cpu", "--model_dtype", dtype, "--parallel", parallel, "--block_size", "64"]
    config = parse(STABLE, [*flags, "--mode", "precise", "--skip_rule", "fixed", "--skip_grad_norm", "1e9"])
    precision = setup_precision(config.precision, 0, process_group)
    models = load_models(config, precision)
    corpus = build_dataset(
        load_documents(config.data)[1],
        models.tokenizers,
        *models.block_limits(64),
        loss_workspace_mb=config.loss.loss_workspace_mb,
    )
    objective = Objective(models.teacher, models.student, config.loss, corpus.aligner, precision)
    strategy = build_strategy(objective, config.train, process_group)
    optimizer = build_optimizer(models.student, config.optim, objective.parameters())
    gradients = []
    optimizer.register_step_pre_hook(lambda *_: gradients.extend(_whole(p.grad) for p in parameters_of(optimizer)))
    before = [_whole(parameter) for parameter in parameters_of(optimizer)]
    if process_group.rank == bad_rank:
        models.student.get_input_embeddings().register_forward_hook(lambda module, ids, output: output * math.nan)
    parts = range(shares) if process_group.size == 1 else [process_group.rank]
    among = max(shares, process_group.size)
    batches = [batch for part in parts for batch in corpus.micro_batches(0, batch_size, 2, 0, part, among)]
    context = StepContext(objective, optimizer, StepGuard(config.guards), precision, 1e9, strategy=strategy)
    report = train_step(batches, context)
    same = all(map(torch.equal, before, (_whole(parameter) for parameter in parameters_of(optimizer))))
    figures = {"loss": report.loss, "norm": report.grad_norm, "tokens": report.num_target_tokens}
    return {"figures": figures, "cause": report.verdict.cause, "unchanged": same, "gradients": gradients}


def _whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def _two(rank: int, dtype: str, parallel: str) -> list[dict]:
    return [step(dtype, parallel, 2), step(dtype, parallel, 2, bad_rank=1)]


class _Kill:
    """SIGKILL to rank 1 in the middle of a step."""

    def __call__(self, rank: int) -> None:
        original, calls = trainer.train_step, []

        def train_step(*args):
            calls.append(1)
            if rank == 1 and len(calls) == _KILLED_AT:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        trainer.train_step = train_step


def compare(folder: Path, dtype: str, parallel: str) -> dict:
    """Gradients and verdicts of two ranks beside one process."""
    alone, joined = step(dtype, parallel, 2, shares=2), step(dtype, parallel, 4)
    good, bad = zip(*(end.result for end in ranks.run(folder, _two, dtype, parallel, timeout=300)), strict=True)
    return {
        "same_micro_batches": _difference(good, alone),
        "joined_micro_batches": _difference(good, joined),
        "largest_gradient": max(gradient.abs().max().item() for gradient in alone["gradients"]),
        "loss": [good[0]["figures"]["loss"], alone["figures"]["loss"]],
        "tokens": [good[0]["figures"]["tokens"], alone["figures"]["tokens"]],
        "ranks_equal": all(map(torch.equal, good[0]["gradients"], good[1]["gradients"])),
        "nan_on_rank_1": [rank["cause"] for rank in bad],
        "unchanged": all(rank["unchanged"] for rank in bad),
    }


def _difference(found: tuple[dict, ...], alone: dict) -> float:
    pairs = [pair for rank in found for pair in zip(rank["gradients"], alone["gradients"], strict=True)]
    return max((own - other).abs().max().item() for own, other in pairs)


def kill(folder: Path, parallel: str) -> dict:
    """Seconds from the death of rank 1 to the end of rank 0, its line, and is the resumed run as if untouched?"""
    flags = {
        "train_steps": _STEPS, "save_steps": 2, "eval_steps": 100, "block_size": 64, "per_device_batch_size": 1,
        "device": "cpu", "model_dtype": "float16", "parallel": parallel,
    }  # fmt: skip
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    ranks.run(folder / "a", ranks.script, [*argv, "--output_dir", str(folder / "straight")], timeout=300)
    started = ranks.start(folder / "b", ranks.script, [*argv, "--output_dir", str(folder / "killed")], _Kill())
    started.processes[1].join(300)
    killed = time.monotonic()
    started.processes[0].join(300)
    seconds = time.monotonic() - killed
    first, _ = ranks.finish(started)
    ranks.run(folder / "c", ranks.script, ["--resume", "--output_dir", str(folder / "killed")], timeout=300)
    ends = [_end(folder / name) for name in ("straight", "killed")]
    return {"exit_code": first.code, "line": first.err[-1], "seconds": seconds, "resumed_equal": ends[0] == ends[1]}


def _end(run: Path) -> tuple:
    latest = run / "checkpoint" / (run / "checkpoint" / "latest").read_text()
    weights = safetensors.torch.load_file(latest / "student.safetensors")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: value for name, value in each.items() if name not in ("time", "seconds")} for each in records]
    return metrics, {name: value.tolist() for name, value in weights.items()}


def main() -> int:
    torch.set_num_threads(1)
    results, good = {}, True
    with tempfile.TemporaryDirectory() as scratch:
        print(
            "| largest difference of a gradient | same micro-batches | joined | of up to | NaN on rank 1 | bits kept |"
        )
        print("|---|---:|---:|---:|---|---|")
        for parallel in ("ddp", "fsdp"):
            for dtype in ("float32", "float16"):
                found = results[f"{parallel}, {dtype}"] = compare(Path(scratch) / parallel / dtype, dtype, parallel)
                good &= found["same_micro_batches"] <= TOLERANCE and found["ranks_equal"] and found["unchanged"]
                good &= found["nan_on_rank_1"] == ["forward"] * 2 and found["tokens"][0] == found["tokens"][1]
                names = ("same_micro_batches", "joined_micro_batches", "largest_gradient")
                figures = " | ".join(f"{found[name]:.1e}" for name in names)
                kept = "yes" if found["unchanged"] else "no"
                print(f"| {parallel}, {dtype} | {figures} | both: {found['nan_on_rank_1'][0]} | {kept} |", flush=True)
        for parallel in ("ddp", "fsdp"):
            found = results[f"{parallel}, kill"] = kill(Path(scratch) / parallel, parallel)
            good &= found["exit_code"] == 2 and found["resumed_equal"]
            how = "equal" if found["resumed_equal"] else "NOT equal"
            print(f"\nRank 1 killed, {parallel}: rank 0 ended after {found['seconds']:.1f} s, resumed {how}:")
            print(f"    {found['line']}", flush=True)
    path = ROOT / "benchmarks" / "results" / "several_devices.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
