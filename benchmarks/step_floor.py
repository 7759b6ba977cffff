"""A whole step beside the least that it could cost.

    python benchmarks/step_floor.py [--vocab_size 16000 32000]

Live: our step, beside the teacher's forward and the student's forward and backward with plain cross-entropy. With a
teacher cache: our step, beside the student's own training step, that is forward, backward with plain cross-entropy and
the optimizer's step. Both floors are written here without this package: plain model calls,
whole logits, `torch.nn.functional.cross_entropy`, autograd, `GradScaler`; the same autocast, the same half products and
the same AdamW as ours. They contain no distillation loss.

Each side, in each round, on the same blocks of text:

    floor, live      teacher(ids), no gradient; student(ids); cross-entropy; backward
    floor, training  student(ids); cross-entropy; backward; unscale and AdamW's step
    MODE             `training.step.train_step` with a live teacher: losses, backward, norm, guard, clip, AdamW's step
    MODE, cache      the same, with the teacher's cached logits

`+ update` is the ratio to the live floor with AdamW's step in it, which every run needs. Batches are made
beforehand, as the prefetch thread makes them beside a step. Sides take turns in one process and share one student.

Pairs: the embedded one (different tokenizers, so that the step includes the projection), the same
student with itself as teacher (equal tokenizers), and a Llama of 512 features and 8 layers under one of 768 and 12
(equal tokenizers). Memory is what a step adds at its peak to weights and optimizer.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from paired import (
    LARGE,
    NEVER_SKIPS,
    Clock,
    Run,
    add_flags,
    device_of,
    make_pair,
    peak_bytes,
    ratio_of,
    take_turns,
    write,
)

from sar_kd import embedded
from sar_kd.commands.main import start
from sar_kd.config.commands import CACHE
from sar_kd.data.batch import Batch

MODES = ("balanced", "precise")
LIVE, TRAINING = "floor, live", "floor, training"


class Floor:
    """The models of a run without this package's step."""

    def __init__(self, run: Run):
        self.models, self.precision, self.optimizer = run.models, run.precision, run.optimizer
        halves = run.precision.dtype is torch.float16
        self._scaler = torch.amp.GradScaler(run.precision.device.type, init_scale=1024.0, enabled=halves)

    def live(self, batch: Batch) -> None:
        """The teacher's forward, the student's forward and backward."""
        self.read_teacher(batch)
        self._learn(batch)
        self.optimizer.zero_grad(set_to_none=True)

    def read_teacher(self, batch: Batch) -> None:
        """The teacher's forward, with its logits."""
        with torch.no_grad(), self.precision.autocast():
            self.models.teacher(input_ids=batch.teacher.input_ids, use_cache=False)

    def train(self, batch: Batch) -> None:
        """The student's training step."""
        self._learn(batch)
        self.update()

    def update(self) -> None:
        """The optimizer's step."""
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _learn(self, batch: Batch) -> None:
        input_ids, labels = batch.student.input_ids, batch.student.labels
        with self.precision.autocast():
            logits = self.models.student(input_ids=input_ids, use_cache=False).logits
        logits, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=-100)
        with self.precision.matmul_context():
            self._scaler.scale(loss).backward()


class Sides:
    """Every side of one pair of models in one dtype."""

    def __init__(self, flags: list[str], folder: Path, modes: list[str]):
        with contextlib.redirect_stdout(io.StringIO()):
            start(CACHE, [*flags, "--keep", "topk", "--teacher_cache", str(folder)])
        flags = [*flags, *NEVER_SKIPS, "--student_lr", "1e-6"]
        self.runs: dict[str, Run] = {}
        for mode in modes:
            given = {"given": next(iter(self.runs.values())).given} if self.runs else {}
            of_mode = [*flags, "--mode", mode]
            self.runs[mode] = live = Run(of_mode, **given)
            self.runs[f"{mode}, cache"] = Run([*of_mode, "--teacher_cache", str(folder)], given=live.given)
        for run in self.runs.values():  # the optimizers' states come to be before anything is measured
            _give_gradients(run)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
        self.live = self.runs[modes[0]]
        self.device, self._floor = self.live.precision.device, Floor(self.live)

    def acts(self, number: int) -> dict[str, Callable[[], object]]:
        """What each side does in a round, on its own form of the same text."""
        (batch,) = self.live.batches(number)
        on_device = batch.to(self.device)
        acts: dict[str, Callable[[], object]] = {
            LIVE: functools.partial(self._floor.live, on_device),
            TRAINING: functools.partial(self._floor.train, on_device),
        }
        for name, run in self.runs.items():
            batches = run.batches(number)
            assert torch.equal(batches[0].student.input_ids, batch.student.input_ids)
            acts[name] = functools.partial(run.step, batches)
        return acts

    def update_seconds(self, clock: Clock) -> float:
        """Of the optimizer's step alone."""
        _give_gradients(self.live)
        return clock(self._floor.update)


def _give_gradients(run: Run) -> None:
    for parameter in run.models.student.parameters():
        parameter.grad = torch.zeros_like(parameter)


def measure(flags: list[str], folder: Path, modes: list[str], rounds: int, of_cpu: bool) -> dict:
    """Figures of one pair in one dtype."""
    sides = Sides(flags, folder, modes)
    clock, made, peaks = Clock(sides.device, of_cpu), {}, {}

    def turn(name: str, number: int) -> float:
        if number not in made:
            made.clear()
            made[number] = sides.acts(number)
        act = made[number][name]
        if name not in peaks:  # the first round warms up
            peaks[name] = peak_bytes(sides.device, act)
            return 0.0
        return clock(act)

    turns = {name: functools.partial(turn, name) for name in (LIVE, TRAINING, *sides.runs)}
    turns["update"] = lambda number: sides.update_seconds(clock)
    seconds = take_turns(turns, rounds)
    updates = seconds.pop("update")
    with_update = [a + b for a, b in zip(seconds[LIVE], updates, strict=True)]
    found: dict = {"ms": {name: 1e3 * statistics.median(values) for name, values in seconds.items()}}
    found |= {"update_ms": 1e3 * statistics.median(updates), "peak_mb": {k: v / 1e6 for k, v in peaks.items()}}
    for mode in modes:
        live, stored = seconds[mode], seconds[f"{mode}, cache"]
        ratios = ratio_of(live, seconds[LIVE]), ratio_of(live, with_update), ratio_of(stored, seconds[TRAINING])
        found[mode] = dict(zip(("live", "live_with_update", "cache"), ratios, strict=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_flags(parser, "step_floor.json")
    parser.add_argument("--rounds", type=int, default=3, help="of the large pair")
    parser.add_argument("--tiny_rounds", type=int, default=15, help="of the small pairs")
    parser.add_argument("--model_dtype", nargs="+", default=["float32", "float16"])
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    parser.add_argument(
        "--vocab_size", type=int, nargs="*", default=[32000], help="of the large pair; several are several pairs"
    )
    parser.add_argument("--per_device_batch_size", type=int, default=4, help="of the small pairs; the large has half")
    parser.add_argument("--block_size", type=int, default=256)
    options = parser.parse_args()
    device_of(options)
    twice = ["--teacher_model", str(embedded.STUDENT_DIR), "--student_model", str(embedded.STUDENT_DIR)]
    results: dict = {}
    print("| pair, dtype, mode | floor, ms | step, ms | to the floor | + update | cached step, ms | to training | MB: "
          "floor, step, cached |")  # fmt: skip
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (text,) = embedded.read_text("transfer")
        few = "\n\n".join(text.values())[: 10 * options.block_size * options.per_device_batch_size]
        (folder / "text.txt").write_text(few, encoding="utf-8")
        common = ["--train_file", str(folder / "text.txt"), "--token_cache", "off", "--device", options.device]
        common += ["--block_size", str(options.block_size)]
        pairs = {"embedded pair": [], "embedded student, twice": twice}
        for rows in options.vocab_size:
            pairs[f"512 x 8 under 768 x 12, V = {rows}"] = make_pair(folder / str(rows), *LARGE, rows)
        for name, flags in pairs.items():
            is_large = "x" in name
            rounds = options.rounds if is_large else options.tiny_rounds
            blocks = max(1, options.per_device_batch_size // (2 if is_large else 1))
            for dtype in options.model_dtype:
                own = [*flags, *common, "--model_dtype", dtype, "--per_device_batch_size", str(blocks)]
                found = measure(own, folder / f"cache-{len(results)}", options.modes, rounds, options.cpu_time)
                results[f"{name}, {dtype}"] = found
                for mode in options.modes:
                    print(_row(f"{name}, {dtype}, {mode}", mode, found), flush=True)
    write(options, {"rounds": options.rounds, "tiny_rounds": options.tiny_rounds, "pairs": results})


def _row(title: str, mode: str, found: dict) -> str:
    ms, mb, ratios, stored = found["ms"], found["peak_mb"], found[mode], f"{mode}, cache"
    peaks = ", ".join(f"{mb[name]:.0f}" for name in (LIVE, mode, stored))
    with_update = f"{ratios['live_with_update'].median:.3f}"
    steps = [f"{ms[name]:.0f}" for name in (LIVE, mode, stored)]
    cells = [title, *steps[:2], str(ratios["live"]), with_update, steps[2], str(ratios["cache"]), peaks]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
