"""What the guards cost: a step with all of them against a step with none, in turns.

    python benchmarks/guard_cost.py

With all: `step.train_step` and the clamps as the script has them. With none: the same forwards, losses and optimizer
without clamps, finiteness checks, norm, clipping, verdict and host read; the loss scale stays, because half precision
does not train without it. Both sides have models of their own; each pair of steps reads the same batch, the order
alternates, and what counts is the median of the ratios of their CPU seconds. One thread. The table goes to the
terminal, the figures to `benchmarks/results/guard_cost.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from sar_kd import columns, distillation, embedded, projected, tiled  # noqa: E402
from sar_kd.arguments import parse_args  # noqa: E402
from sar_kd.data import Corpus  # noqa: E402
from sar_kd.documents import load_documents  # noqa: E402
from sar_kd.guards import StepGuard  # noqa: E402
from sar_kd.models import load_models  # noqa: E402
from sar_kd.objective import Objective  # noqa: E402
from sar_kd.optim import build_optimizer  # noqa: E402
from sar_kd.precision import setup  # noqa: E402
from sar_kd.presets import FP16_SAFE  # noqa: E402
from sar_kd.step import train_step  # noqa: E402

NO_CLAMPS = ["--logit_clamp_style", "off", "--loss_clamp_style", "off"]
PAIRS = {
    "different tokenizers (embedded pair)": [],
    "equal tokenizers (the embedded student as its own teacher)": [
        "--teacher_model", str(embedded.STUDENT_DIR), "--student_model", str(embedded.STUDENT_DIR),
    ],
}  # fmt: skip


class Side:
    """A step, with all guards or with none, on models of its own."""

    def __init__(self, flags: list[str], guarded: bool):
        self.config = parse_args(FP16_SAFE, [*flags, *([] if guarded else NO_CLAMPS)])
        self.guarded = guarded
        self.precision = setup(self.config.precision, 0)
        models = load_models(self.config, self.precision)
        limits = models.block_limits(self.config.data.block_size)
        self.corpus = Corpus(load_documents(self.config.data)[0], models.tokenizers, *limits)
        pair = (models.teacher, models.student)
        self.objective = Objective(*pair, self.config.loss, self.corpus.pairing, self.precision)
        self.optimizer = build_optimizer(models.student, self.config.optim, self.objective.parameters())
        self.guard = StepGuard(self.config.guards)

    def step(self, batches) -> float:
        """CPU seconds of one update."""
        started = time.process_time()
        if self.guarded:
            limit = self.config.guards.max_grad_norm
            report = train_step(batches, self.objective, self.optimizer, self.guard, self.precision, limit)
            assert report.verdict.applied
        else:
            with _unchecked():
                self._bare_step(batches)
        return time.process_time() - started

    def _bare_step(self, batches) -> None:
        count = sum(batch.num_target_tokens for batch in batches)
        for batch in batches:
            self.precision.backward(self.objective(batch).total / count)
        self.precision._scaler.step(self.optimizer)
        self.precision._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


def _all_columns(tile):
    return torch.ones(tile.shape[1], dtype=torch.bool)


@contextlib.contextmanager
def _unchecked():
    """Every row is taken to be finite."""
    users = tiled, distillation, projected
    former = columns.finite_columns, columns.silence_
    for module in users:
        module.finite_columns, module.silence_ = _all_columns, lambda tile, keep: tile
    try:
        yield
    finally:
        for module in users:
            module.finite_columns, module.silence_ = former


def compare(flags: list[str], pairs: int, warmup: int = 3) -> list[tuple[float, float]]:
    """CPU seconds of a step with all guards and of one with none, pair by pair."""
    guarded, bare = Side(flags, True), Side(flags, False)
    measured = []
    for number in range(pairs + warmup):
        size = guarded.config.train.per_device_batch_size
        batches = guarded.corpus.micro_batches(number, size, 1, 0)
        order = (guarded, bare) if number % 2 else (bare, guarded)
        seconds = {side: side.step(batches) for side in order}
        measured.append((seconds[guarded], seconds[bare]))
    return measured[warmup:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "guard_cost.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    print(f"| step, {options.pairs} pairs | with none, ms | with all, ms | median ratio | quartiles |")
    print("|---|---:|---:|---:|---:|")
    for name, flags in PAIRS.items():
        for dtype in ("float16", "float32"):
            measured = compare([*flags, "--model_dtype", dtype], options.pairs)
            ratios = [guarded / bare for guarded, bare in measured]
            low, middle, high = statistics.quantiles(ratios, n=4)
            mine, none = (1e3 * statistics.median(side) for side in zip(*measured, strict=True))
            results[f"{name}, {dtype}"] = {"ratio": middle, "quartiles": [low, high], "all_ms": mine, "none_ms": none}
            print(f"| {name}, {dtype} | {none:.1f} | {mine:.1f} | {middle:.3f} | {low:.3f} to {high:.3f} |", flush=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
