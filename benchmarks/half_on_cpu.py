"""The cost of a float16 step on a CPU: PyTorch's own half kernels, products rounded once, and float32.

    python benchmarks/half_on_cpu.py

The embedded pair, default batch; the three take turns, step by step, from the same weights on the same text. Nothing
else may run beside it. The table goes to the terminal, the numbers to `benchmarks/results/half_on_cpu.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from sar_kd.config.command_line import parse  # noqa: E402
from sar_kd.config.presets import FP16_SAFE  # noqa: E402
from sar_kd.data.dataset import build_dataset  # noqa: E402
from sar_kd.data.files.sources import load_documents  # noqa: E402
from sar_kd.losses.objective import Objective  # noqa: E402
from sar_kd.models.loading import load_models  # noqa: E402
from sar_kd.runtime.precision import setup_precision  # noqa: E402
from sar_kd.training.guards import StepGuard  # noqa: E402
from sar_kd.training.optimizer import build_optimizer  # noqa: E402
from sar_kd.training.step import StepContext, train_step  # noqa: E402

KINDS = {"native half": ("float16", False), "products rounded once": ("float16", True), "float32": ("float32", False)}


class Side:
    """One kind of step with models of its own."""

    def __init__(self, dtype: str, emulates: bool):
        self.config = parse(FP16_SAFE, ["--model_dtype", dtype])
        self.precision = setup_precision(self.config.precision, 0)
        self.precision.emulates_float16 = emulates
        self.models = load_models(self.config, self.precision)
        limits = self.models.block_limits(self.config.data.block_size)
        self.corpus = build_dataset(
            load_documents(self.config.data)[0],
            self.models.tokenizers,
            *limits,
            loss_workspace_mb=self.config.loss.loss_workspace_mb,
        )
        pair = (self.models.teacher, self.models.student)
        self.objective = Objective(*pair, self.config.loss, self.corpus.aligner, self.precision)
        self.optimizer = build_optimizer(self.models.student, self.config.optim, self.objective.parameters())
        guard = StepGuard(self.config.guards)
        self.context = StepContext(self.objective, self.optimizer, guard, self.precision, 0.5)

    def step(self, batches) -> tuple[float, float]:
        """Seconds and loss of one attempted update."""
        started = time.perf_counter()
        report = train_step(batches, self.context)
        return time.perf_counter() - started, report.loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "half_on_cpu.json")
    options = parser.parse_args()
    sides = {name: Side(*kind) for name, kind in KINDS.items()}
    first = sides["float32"]
    measured = {name: [] for name in sides}
    for step in range(options.steps + 1):
        batches = first.corpus.micro_batches(step, first.config.train.per_device_batch_size, 1, 0)
        for name, side in sides.items():
            measured[name].append(side.step(batches))
    results = {}
    print(f"| step | ms, median of {options.steps} | min | max | largest loss difference to float32 |")
    print("|---|---:|---:|---:|---:|")
    for name, pairs in measured.items():
        times = [1e3 * seconds for seconds, _ in pairs[1:]]  # the first step warms up
        gap = max(abs(loss - truth) for (_, loss), (_, truth) in zip(pairs, measured["float32"], strict=True))
        results[name] = {"ms": times, "median_ms": statistics.median(times), "largest_loss_difference": gap}
        print(f"| {name} | {statistics.median(times):.0f} | {min(times):.0f} | {max(times):.0f} | {gap:.1e} |")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
