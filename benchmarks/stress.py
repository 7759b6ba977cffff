"""The table of the stress suite: what a naive loop does in each scenario, measured, and what this program does.

    python benchmarks/stress.py

Runs `tests/stress/test_fp16.py` and writes what its scenarios measured to `benchmarks/results/stress.md`. Exit code 1
if one of them fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SUITE = ROOT / "tests" / "stress" / "test_fp16.py"
HEAD = """\
# The stress suite

Made by `python benchmarks/stress.py`: each row is a test of `tests/stress/test_fp16.py`, run in true float16 on a CPU
with tiny models. Both columns were measured in the same test: a naive loop (autocast, GradScaler, mean cross-entropy,
clip, step; clamps and limits where one would first put them) and the program's own step, around which seven invariants
are asserted (`tests/stress/harness.py`). A CPU's autocast leaves softmax, exp and log in half, where CUDA's computes
them in float32; the program asks for float32 by itself, so it behaves alike on both.
"""


class PositionIndex:
    """A pytest plugin that keeps what each scenario says of itself."""

    def __init__(self):
        self.rows: list[list[str]] = []

    def pytest_runtest_logreport(self, report):
        """Take the rows of a scenario that has passed."""
        if report.when == "call" and report.passed:
            self.rows += [value for name, value in report.user_properties if name == "stress"]


def table(rows: list[list[str]]) -> str:
    """Markdown, one row a scenario, numbered in the order of the file."""
    head = ["| | scenario | a naive loop | this program |", "|---:|---|---|---|"]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(head + [f"| {number} | " + " | ".join(row) + " |" for number, row in enumerate(cells, 1)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "stress.md")
    options = parser.parse_args()
    rows, started = PositionIndex(), time.monotonic()
    failed = pytest.main(["-q", str(SUITE), "-p", "no:cacheprovider"], plugins=[rows])
    if failed:
        return 1
    text = f"{HEAD}\n{table(rows.rows)}\n"
    options.output.write_text(text, encoding="utf-8")
    print(f"{len(rows.rows)} scenarios in {time.monotonic() - started:.0f} s; table in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
