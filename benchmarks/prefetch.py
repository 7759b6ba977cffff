"""Batches made ahead: whole steps with and without, in turns.

    python benchmarks/prefetch.py

Rounds of steps of the embedded pair (different tokenizers, so that each batch is aligned), the same steps in each way:
`off` makes a step's batches before it, `thread` is `training.batch_loader.Prefetch`, `process` is torch's DataLoader
with one worker process. A round's first step is not counted, because nothing could be made ahead of it. `wait` is what
a step waited for its batches; the ratio is that of a round's seconds to those of `off` in the same turn, median over
the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from sar_kd.config.command_line import parse  # noqa: E402
from sar_kd.config.presets import STABLE  # noqa: E402
from sar_kd.data.batch import Batch  # noqa: E402
from sar_kd.data.dataset import Dataset, build_dataset  # noqa: E402
from sar_kd.data.files.sources import load_documents  # noqa: E402
from sar_kd.losses.objective import Objective  # noqa: E402
from sar_kd.models.loading import load_models  # noqa: E402
from sar_kd.runtime.precision import setup_precision  # noqa: E402
from sar_kd.training.batch_loader import Prefetch  # noqa: E402
from sar_kd.training.guards import StepGuard  # noqa: E402
from sar_kd.training.optimizer import build_optimizer  # noqa: E402
from sar_kd.training.step import StepContext, train_step  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "prefetch.json"
WAYS = ("off", "thread", "process")


class Steps(TorchDataset):
    """A step's micro-batches by number."""

    def __init__(self, corpus: Dataset, config):
        self.corpus, self.train = corpus, config.train

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, step: int) -> list[Batch]:
        train = self.train
        return self.corpus.micro_batches(step, train.per_device_batch_size, train.grad_accum_steps, train.seed)


def batches(way: str, steps: Steps, first: int, count: int) -> Iterator[list[Batch]]:
    """The batches of some steps, made in one of the ways."""
    numbers = range(first, first + count)
    if way == "off":
        yield from (steps[number] for number in numbers)
    elif way == "thread":
        ahead = Prefetch(steps.__getitem__)
        yield from (ahead.get(number, number + 1 if number + 1 in numbers else None) for number in numbers)
        ahead.close()
    else:
        loader = DataLoader(steps, batch_size=None, sampler=numbers, num_workers=1, prefetch_factor=1)
        yield from loader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=20, help="in a round")
    options, flags = parser.parse_known_args()
    config = parse(STABLE, flags)
    precision = setup_precision(config.precision, 0)
    models = load_models(config, precision)
    limits = models.block_limits(config.data.block_size)
    corpus = build_dataset(
        load_documents(config.data)[0], models.tokenizers, *limits, loss_workspace_mb=config.loss.loss_workspace_mb
    )
    objective = Objective(models.teacher, models.student, config.loss, corpus.aligner, precision)
    optimizer, guard = build_optimizer(models.student, config.optim, objective.parameters()), StepGuard(config.guards)
    context = StepContext(objective, optimizer, guard, precision, 1.0)
    steps = Steps(corpus, config)

    def round_of(way: str, first: int) -> tuple[float, float]:
        """Seconds of a step, and of these what it waited, over all but the first."""
        source, waited = batches(way, steps, first, options.steps + 1), 0.0
        train_step(next(source), context)
        started = time.perf_counter()
        for _ in range(options.steps):
            before = time.perf_counter()
            micro_batches = next(source)
            waited += time.perf_counter() - before
            train_step(micro_batches, context)
        seconds = time.perf_counter() - started
        list(source)
        return seconds / options.steps, waited / options.steps

    round_of("off", 0)  # the maps of the text are made in it
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for number in range(options.rounds):
        for way in WAYS if number % 2 else WAYS[::-1]:
            found[way].append(round_of(way, number * options.steps))
    record = {"cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "flags": flags, "ways": {}}
    print(f"{'':<10}{'step ms':>9}{'wait ms':>9}{'ratio':>8}   quartiles")
    for way in WAYS:
        ratios = [mine[0] / off[0] for mine, off in zip(found[way], found["off"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        step, wait = (1e3 * statistics.median(values) for values in zip(*found[way], strict=True))
        record["ways"][way] = {"step_ms": step, "wait_ms": wait, "ratio": middle, "quartiles": [low, high]}
        print(f"{way:<10}{step:>9.1f}{wait:>9.2f}{middle:>8.3f}   {low:.3f} to {high:.3f}")
    RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
