"""What a run tells: the bar and the lines in the terminal, `metrics.jsonl`, `summary.json`.

The only module that prints. It measures nothing and decides nothing; it is handed figures and shows them.

What a fine-tuning run tells, in the words that its users know.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from sar_kd.config.fields import RunConfig
from sar_kd.config.sections import TrainConfig
from sar_kd.errors import UsageError
from sar_kd.reporting.model_card import CardWriter
from sar_kd.reporting.report import find_report_writer
from sar_kd.reporting.summary_table import closing_table
from sar_kd.reporting.trackers import find_trackers
from sar_kd.runtime.console import first_few, perplexity_text, wrap_lines
from sar_kd.runtime.files import (
    FolderLock,
    atomic_write,
    check_contained,
    clear,
    complete_lines,
    holds_something,
    plain,
    step_of,
)


class Observer(Protocol):
    """Takes notice of everything that a run writes, once it is written."""

    def record(self, record: dict) -> None:
        """A line of `metrics.jsonl`; its `event` says of what."""

    def finish(self, summary: dict) -> None:
        """The run has ended, and its summary is written."""

    def close(self) -> None:
        """Nothing more follows, however the run has ended."""


class RunLog:
    """A run folder and the terminal, and whoever else takes notice."""

    def __init__(self, config: RunConfig, observers: Sequence[Observer] = ()):
        self.deadline = time.monotonic() + config.train.time_limit_seconds
        self._observers = observers
        self.folder = Path(config.train.output_dir)
        self._config = config
        self._every = config.train.log_steps
        self._is_terminal = sys.stdout.isatty()
        self._bar: Any = None  # a tqdm from `start` on
        self._perplexity = math.nan
        self._metrics: Any = None  # a file, likewise
        self._lock = FolderLock(self.folder)
        self._window: list[dict] = []

    def say(self, line: str) -> None:
        """Print one line, above the bar if there is one."""
        tqdm.write(wrap_lines(line), file=sys.stdout)
        sys.stdout.flush()

    def start(self, first_step: int, calendar: TrainConfig) -> None:
        """Write `config.json`, open `metrics.jsonl` without what a resumed run is about to repeat, show the bar."""
        self._every = calendar.log_steps
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        if first_step == 0 and self._config.train.overwrite:  # only now is it sure that a run begins
            clear(self.folder)
        atomic_write(self.folder / "config.json", json.dumps(self._config.to_dict(), indent=2) + "\n")
        self._open_metrics(first_step)
        self._bar = tqdm(
            total=calendar.train_steps,
            initial=first_step,
            # No drawn bar: at 80 columns it would push out the figures, of which the first matter most.
            bar_format="{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
            dynamic_ncols=True,
            disable=not self._is_terminal,
            file=sys.stdout,
        )

    def _open_metrics(self, first_step: int) -> None:
        path = self.folder / "metrics.jsonl"
        kept = [line for line in complete_lines(path) if step_of(line) <= first_step] if first_step else []
        atomic_write(path, "".join(kept))
        self._metrics = open(path, "a", encoding="utf-8", buffering=1)

    def begin(self, student: dict, teacher: dict) -> None:
        """Enter what both models are before the first step."""
        of_teacher = {f"teacher_{name}": value for name, value in teacher.items()}
        self._perplexity = student["val_ppl"]
        self._write({"event": "start", "step": 0, **student, **of_teacher})

    def rewind(self, record: dict, num_blocks: int) -> None:
        """Go back to the step that `record` names, and say so: what came after it is about to happen otherwise."""
        self._metrics.close()
        self._open_metrics(record["step"])
        self._write({"event": "rewind", **record})
        self._window.clear()
        self._bar.reset()
        self._bar.update(record["step"])
        left_out = f"{len(record['left_out'])} of {num_blocks} blocks ({first_few(record['documents'])})"
        self.say(
            f"Step {record['rewound_from']}: diverged. Back to step {record['step']}, once, at half the learning rate, "
            f"without {left_out}. See {self.folder / 'crash'}"
        )

    def close(self) -> None:
        """Let go of the terminal, the files and the folder, however the run has ended."""
        if self._bar is not None:
            self._bar.close()
        if self._metrics is not None:
            self._metrics.close()
        self._lock.release()
        for observer in self._observers:
            observer.close()

    def step(self, record: dict, success_rate: float, tokens_per_second: float) -> None:
        """Enter one attempted update; its `step` counts from 1."""
        self._write({"event": "step", **record})
        self._window.append(record)
        figures = self._postfix(record, success_rate)
        self._bar.set_postfix_str(self._beside_bar(f"{figures} tok/s={tokens_per_second:,.0f}"), refresh=False)
        self._bar.update(1)
        if record["step"] % self._every == 0:
            self.say(self._line(record["step"], success_rate))
            self._window.clear()

    def _beside_bar(self, figures: str) -> str:
        """As many of the figures as there is room for, each whole: 100 % cut short would read as 10."""
        of_bar = len("100% / [0:00:00<0:00:00], ") + 2 * len(str(self._bar.total))
        columns = shutil.get_terminal_size((80, 24)).columns
        return textwrap.shorten(figures, max(1, columns - 1 - of_bar), placeholder="")

    def _postfix(self, record: dict, success_rate: float) -> str:
        """What stands beside the bar."""
        ce = "" if record["ce_loss"] is None else f" ce={record['ce_loss']:.3f}"
        return (
            f"loss={record['loss']:.3f} kd={record['kd_loss']:.3f}{ce} "
            f"ppl={self._perplexity:.2f} grad_norm={record['grad_norm']:.2f} success={success_rate:.0%} "
            f"loss_scale={record['loss_scale']:.0f}"
        )

    def _line(self, step: int, success_rate: float) -> str:
        """What is said of the steps since the last line."""
        finite = [r for r in self._window if math.isfinite(r["loss"])]
        loss, kd = (_mean([r[key] for r in finite]) for key in ("loss", "kd_loss"))
        of_text = [r["ce_loss"] for r in finite if r["ce_loss"] is not None]  # not of the student's own
        ce = f", ce={_mean(of_text):.4f}" if of_text or not finite else ""
        odd = len(self._window) - len(finite)
        bad = f" not_finite={odd}" if odd else ""
        of_routers = [r["router_kl"] for r in finite if "router_kl" in r]
        routers = f" router_kl={_mean(of_routers):.4f}" if of_routers else ""
        return f"Step {step}: avg_loss={loss:.4f} (kd={kd:.4f}{ce}){routers} success_rate={success_rate:.0%}{bad}"

    def say_start(self, start: dict, teacher: dict) -> None:
        """Say where the student starts, and where the teacher is."""
        self.say(
            f"Validation PPL at the start = {start['val_ppl']:.2f} (teacher {teacher['val_ppl']:.2f}; "
            f"bits per byte {start['val_bits_per_byte']:.3f}, teacher {teacher['val_bits_per_byte']:.3f})"
        )

    def evaluation(self, record: dict, is_best: bool) -> None:
        """Enter one validation of the student."""
        self._write({"event": "evaluation", **record})
        self._perplexity = record["val_ppl"]
        best = " (best so far)" if is_best else ""
        teacher = ""
        if "router_entropy" in record:
            own, used = (record[f"teacher_val_ppl_{how}"] for how in ("native", "routed"))
            used = "" if used == own else f", {used:.2f} with every expert"
            teacher = f"; teacher {own:.2f}{used}, router entropy {record['router_entropy']:.3f}"
        self.say(f"Step {record['step']}: Validation PPL = {perplexity_text(record['val_ppl'])}{best}{teacher}")

    def finish(self, summary: dict) -> None:
        """Write `summary.json`, close everything, print the closing table."""
        atomic_write(self.folder / "summary.json", json.dumps(plain(summary), indent=2) + "\n")
        for observer in self._observers:
            observer.finish(summary)
        self.close()
        if summary["status"] == "interrupted" and time.monotonic() >= self.deadline:
            self.say(f"--time_limit {self._config.train.time_limit}: the time is over, everything is saved")
        for line in closing_table(summary, self.folder):
            self.say(line)

    def _write(self, record: dict) -> None:
        self._metrics.write(json.dumps(plain(record)) + "\n")
        for observer in self._observers:
            observer.record(record)


def open_run(config: RunConfig, kind: type[RunLog] = RunLog) -> RunLog:
    """Find the run folder usable and say what the run is. The folder holds a run from `RunLog.start` on.

    Raises: UsageError if the folder holds another run, or cannot be written
    """
    folder, train = Path(config.train.output_dir), config.train
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK)):
            raise UsageError(f"--output_dir {folder}: cannot be written ({existing} is no folder that can be)")
        holds_run = (folder / "config.json").exists()
        if holds_run and not (train.resume or train.overwrite):
            raise UsageError(f"--output_dir {folder}: holds a run; --resume continues it, --overwrite deletes it")
        if not holds_run and holds_something(folder):
            raise UsageError(f"--output_dir {folder}: is not empty and holds no run; name another folder")
        check_contained(folder)
        FolderLock(folder).check()
    except OSError as error:
        raise UsageError(f"--output_dir {folder}: cannot be written ({error.strerror})") from None
    writers, lines = find_report_writer(folder)
    log = kind(config, [CardWriter(folder), *writers, *find_trackers(config)])
    for line in (*config.summary_lines(), *config.notices, *lines):
        log.say(line)
    return log


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


class SftLog(RunLog):
    """A run folder and the terminal of a run without a teacher.

    Every `--log_steps`: {'loss': 2.27, 'grad_norm': 1.55, 'learning_rate': 0.0002, 'epoch': 0.31}
    the loss as the mean since the last line, nan if one of them was; the rest as of this step
    """

    def say_start(self, start: dict, teacher: dict) -> None:
        """Say where the student starts; there is no teacher."""
        bits = start["val_bits_per_byte"]
        self.say(f"Validation PPL at the start = {start['val_ppl']:.2f} (bits per byte {bits:.3f})")

    def _postfix(self, record: dict, success_rate: float) -> str:
        return (
            f"loss={record['loss']:.3f} grad_norm={record['grad_norm']:.2f} ppl={self._perplexity:.2f} "
            f"success={success_rate:.0%} loss_scale={record['loss_scale']:.0f}"
        )

    def _line(self, step: int, success_rate: float) -> str:
        last = self._window[-1]
        losses = [record["loss"] for record in self._window if record["num_target_tokens"]]
        # No average that leaves anything out, and no zero for want of a figure: what is not finite shows.
        figures = {
            "loss": sum(losses) / len(losses) if losses else float("nan"),
            "grad_norm": last["grad_norm"],
            "learning_rate": last["learning_rate"],
        }
        rounded = {name: float(f"{value:.4g}") for name, value in figures.items()}
        return str({**rounded, "epoch": round(last["epoch"], 2)})
