"""Layout of tiles and computation of exponentials: the cost of the alternatives on a CPU.

    python benchmarks/tile_costs.py

Products into a length that is no multiple of 8 (`logit_tiles.padded_width`), exp of arguments that underflow
(`logit_tiles.exp_`), and new memory beside reused memory (`ClassMap`). Sides take turns; medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from paired import ROOT  # noqa: F401  puts the package on the path

from sar_kd.models.logit_tiles import exp_

ROUNDS = 15


def in_turns(sides: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of each side."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(ROUNDS + 2):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            if number >= 2:
                found[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in found.items()}


def product(columns: int, room: int) -> Callable[[], object]:
    """A head of 16,000 tokens and 512 features times this many columns."""
    weight, states, out = torch.randn(16000, 512), torch.randn(columns, 512), torch.empty(16000, room)[:, :columns]
    return lambda: torch.mm(weight, states.T, out=out)


def main() -> None:
    torch.manual_seed(0)
    plain, place, kept = torch.randn(2**17), torch.empty(2**17), torch.empty(2**24)
    absent = plain.clone()
    absent[::10] = -1e30
    tables = {
        "products into rows of a length": {
            "166": product(166, 166), "166 of 168": product(166, 168), "168": product(168, 168),
        },
        "exp of 131,072 numbers": {
            "plain": lambda: place.copy_(plain).exp_(),
            "all of them exp(-90)": lambda: place.fill_(-90.0).exp_(),
            "all of them absent": lambda: place.fill_(-1e30).exp_(),
            "a tenth absent": lambda: place.copy_(absent).exp_(),
            "a tenth absent, ours": lambda: exp_(place.copy_(absent)),
            "plain, ours": lambda: exp_(place.copy_(plain)),
        },
        "64 MB written to": {"new": lambda: torch.empty(2**24).fill_(1.0), "kept": lambda: kept.fill_(1.0)},
    }  # fmt: skip
    for title, sides in tables.items():
        found = in_turns(sides)
        first = next(iter(found.values()))
        print(f"| {title} | ms | beside the first |\n|---|---:|---:|")
        for name, milliseconds in found.items():
            print(f"| {name} | {milliseconds:.2f} | {milliseconds / first:.2f} |")
        print()


if __name__ == "__main__":
    main()
