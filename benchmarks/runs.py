"""Runs of a script, each in its own process with one thread, saved in a file, and their table.

A run that is in the file is not repeated, so an interrupted grid continues; `--fresh` on the benchmarks' command line
repeats all of them. Each run has a digest of the package's source, and the table has a note where not all runs are of
the present source.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Run(NamedTuple):
    """One command, from the repository's root; equal commands are one run."""

    flags: tuple[str, ...]
    script: str = "train_sar_kd_stable.py"
    python: str = sys.executable

    @property
    def key(self) -> str:
        """What the run is called in the file: the command without the interpreter."""
        return " ".join((self.script, *self.flags))


class Results:
    """The summaries of finished runs, in a JSON file that is rewritten after each of them."""

    def __init__(self, path: Path, fresh: bool = False, measure: Callable[[Run, Path], dict] | None = None):
        """measure: further figures of a finished run, from its folder"""
        self.path, self.source, self.measure = path, _source_digest(), measure
        self.content: dict = {"runs": {}}
        if path.is_file() and not fresh:
            found = json.loads(path.read_text())
            if all("summary" in entry for entry in found["runs"].values()):  # else a file of an earlier form
                self.content = found
        self._lock = threading.Lock()

    def make(self, runs: Iterable[Run], jobs: int) -> list[str]:
        """Make the runs that are missing, `jobs` at a time; the returned lines name those that failed."""
        missing = {run.key: run for run in runs if run.key not in self.content["runs"]}
        with ThreadPoolExecutor(jobs) as pool:
            try:
                return [line for line in pool.map(self._make, missing.values()) if line]
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                raise

    def _make(self, run: Run) -> str | None:
        with tempfile.TemporaryDirectory() as folder:
            command = [run.python, run.script, *run.flags, "--output_dir", f"{folder}/run"]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = (done.stderr or done.stdout).strip().splitlines()
                return f"{run.key}\n    exit {done.returncode}: {lines[-1] if lines else ''}"
            summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
            summary["environment"].pop("command")  # it names a temporary folder; the key says the rest
            if self.measure is not None:
                summary |= self.measure(run, Path(folder) / "run")
        bits, seconds = summary["val_bits_per_byte_final"], summary["wall_seconds"]
        with self._lock:
            self.content["runs"][run.key] = {"source": self.source, "summary": summary}
            self.save()
            print(f"{run.key}: {bits:.4f} bits per byte, {seconds:.0f} s", file=sys.stderr, flush=True)
        return None

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.path)

    def summaries(self, runs: Sequence[Run]) -> list[dict] | None:
        """The summaries of `runs`; None unless all are there."""
        entries = [self.content["runs"].get(run.key) for run in runs]
        return [entry["summary"] for entry in entries] if all(entries) else None

    def age_note(self, runs: Iterable[Run]) -> str:
        """A sentence about runs that another state of the package made; empty if there are none."""
        entries = [self.content["runs"][run.key] for run in runs if run.key in self.content["runs"]]
        others = sum(entry["source"] != self.source for entry in entries)
        return f"{others} of {len(entries)} runs were made by another state of the package." if others else ""


def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted((ROOT / "sar_kd").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def bits_of(summaries: Sequence[dict]) -> list[float]:
    """Final validation bits per byte, by seed."""
    return [summary["val_bits_per_byte_final"] for summary in summaries]


def spread_of(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table(
    rows: Sequence[tuple[str, Sequence[dict], Sequence[str]]], seeds: Sequence[int], columns: Sequence[str]
) -> str:
    """Markdown: bits per byte by seed, mean and standard deviation, then `columns`.

    rows: title, summaries by seed, cells of the further columns
    """
    header = ["run", *(f"seed {seed}" for seed in seeds), "mean", "sd", *columns]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    for title, summaries, cells in rows:
        bits = bits_of(summaries)
        figures = [f"{value:.4f}" for value in (*bits, statistics.mean(bits), spread_of(bits))]
        lines.append("| " + " | ".join([title, *figures, *cells]) + " |")
    return "\n".join(lines)


def add_flags(parser: argparse.ArgumentParser, output: str) -> None:
    """The flags that the benchmarks of runs share."""
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--train_steps", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--flags", default="", help="further flags for every run, in one string")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / output)
    parser.add_argument("--fresh", action="store_true", help="repeat runs that --output already has")
