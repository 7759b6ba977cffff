"""The cost of the guards: a step with all of them against a step with none, in turns.

    python benchmarks/guard_cost.py

With all: `training.step.train_step` and the clamps of the script. With none: the same forwards, losses and optimizer
without clamps, finiteness checks, norm, clipping, verdict and host read; the loss scale stays, because half precision
does not train without it. Each side has its own models; each pair of steps has the same batch, the order
alternates, and the result is the median of the ratios of their CPU seconds (wall seconds on a GPU). One thread. The
table goes to the terminal, the numbers to `benchmarks/results/guard_cost.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics

import torch
from paired import Clock, Run, add_flags, device_of, ratio_of, take_turns, write

from sar_kd import embedded
from sar_kd.config.presets import FP16_SAFE
from sar_kd.losses import distillation, divergence, tiled_loss
from sar_kd.losses.projection import loss as projection_loss
from sar_kd.models import logit_tiles

NO_CLAMPS = ["--logit_clamp_style", "off", "--loss_clamp_style", "off"]
PAIRS = {
    "different tokenizers (embedded pair)": [],
    "equal tokenizers (the embedded student as its own teacher)": [
        "--teacher_model", str(embedded.STUDENT_DIR), "--student_model", str(embedded.STUDENT_DIR),
    ],
}  # fmt: skip


class Side:
    """A step, with all guards or with none, on models of its own."""

    def __init__(self, flags: list[str], guarded: bool, of_cpu: bool):
        self.run, self.guarded = Run([*flags, *([] if guarded else NO_CLAMPS)], FP16_SAFE), guarded
        self._clock = Clock(self.run.precision.device, of_cpu)

    def step(self, batches) -> float:
        """Seconds of one update."""
        if self.guarded:
            return self._clock(lambda: self.run.step(batches))
        with _unchecked():
            return self._clock(lambda: self._bare_step(batches))

    def _bare_step(self, batches) -> None:
        run = self.run
        count = sum(batch.num_target_tokens for batch in batches)
        for batch in batches:
            run.precision.backward(run.objective(batch.to(run.precision.device)).total / count)
        run.precision._scaler.step(run.optimizer)
        run.precision._scaler.update()
        run.optimizer.zero_grad(set_to_none=True)


def _all_positions(tile):
    return torch.ones(tile.shape[1], dtype=torch.bool, device=tile.device)


@contextlib.contextmanager
def _unchecked():
    """Every position is taken to be finite."""
    users = tiled_loss, distillation, divergence, projection_loss
    former = logit_tiles.finite_positions, logit_tiles.mask_positions_
    for module in users:
        module.finite_positions, module.mask_positions_ = _all_positions, lambda tile, keep: tile
    try:
        yield
    finally:
        for module in users:
            module.finite_positions, module.mask_positions_ = former


def compare(flags: list[str], pairs: int, of_cpu: bool) -> dict[str, list[float]]:
    """Seconds of a step with all guards and of one with none, pair by pair."""
    sides = {"all": Side(flags, True, of_cpu), "none": Side(flags, False, of_cpu)}
    made: dict[int, list] = {}

    def turn(side: Side, number: int) -> float:
        if number not in made:
            made.clear()
            made[number] = sides["all"].run.batches(number)
        return side.step(made[number])

    return take_turns({name: functools.partial(turn, side) for name, side in sides.items()}, pairs, warmup=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_flags(parser, "guard_cost.json")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--model_dtype", nargs="+", default=["float16", "float32"])
    options = parser.parse_args()
    of_cpu = device_of(options).type == "cpu"
    torch.set_num_threads(1)
    results = {}
    print(f"| step, {options.pairs} pairs | with none, ms | with all, ms | median ratio | quartiles |")
    print("|---|---:|---:|---:|---:|")
    for name, flags in PAIRS.items():
        for dtype in options.model_dtype:
            seconds = compare([*flags, "--device", options.device, "--model_dtype", dtype], options.pairs, of_cpu)
            middle, low, high = ratio_of(seconds["all"], seconds["none"])
            mine, none = (1e3 * statistics.median(seconds[side]) for side in ("all", "none"))
            results[f"{name}, {dtype}"] = {"ratio": middle, "quartiles": [low, high], "all_ms": mine, "none_ms": none}
            print(f"| {name}, {dtype} | {none:.1f} | {mine:.1f} | {middle:.3f} | {low:.3f} to {high:.3f} |", flush=True)
    write(options, results)


if __name__ == "__main__":
    main()
