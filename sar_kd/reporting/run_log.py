"""The log of a run: the bar and the lines in the terminal, `log.txt`, `metrics.jsonl` and `summary.json`.

It measures nothing and decides nothing: it shows and writes the metrics that it is given.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from sar_kd.config.fields import RunConfig
from sar_kd.config.python_arguments import as_called
from sar_kd.config.sections import TrainConfig
from sar_kd.errors import UsageError
from sar_kd.reporting.history import LOG
from sar_kd.reporting.model_card import CardWriter
from sar_kd.reporting.report import find_report_writer
from sar_kd.reporting.run_environment import describe_environment, timestamp
from sar_kd.reporting.step_lines import Pace, dropped_share, evaluation_line, fit, sft_line, start_line, step_parts
from sar_kd.reporting.summary_table import closing_lines, ended_line, next_commands, summary_table
from sar_kd.reporting.trackers import find_trackers
from sar_kd.runtime.console import first_few, format_perplexity, format_share, paint
from sar_kd.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from sar_kd.runtime.files import as_float, atomic_write, complete_lines, json_safe, step_of_line
from sar_kd.runtime.run_folder import CONFIG, check_no_run, check_run_folder, clear_run_folder
from sar_kd.version import RUN_FORMAT


class Observer(Protocol):
    """Receives everything that a run writes, once it is written."""

    name: str
    """What it makes, for a line about an error"""

    def log_record(self, record: dict) -> None:
        """A line of `metrics.jsonl`; its `event` is 'start', 'step', 'evaluation' or 'rewind'."""

    def log_summary(self, summary: dict) -> None:
        """The run has ended, and its summary is written."""

    def close(self) -> None:
        """Nothing more follows, however the run has ended."""


class RunLog:
    """The log of a distillation: its run folder, the terminal, and observers.

    observers: an error of one is shown, and it receives nothing more; the run goes on
    listeners: observers of the caller, whose errors are the caller's
    enabled: False on all ranks but rank 0; the log then shows and writes nothing, and
    `open` and `log_summary` are not called
    """

    def __init__(
        self,
        config: RunConfig,
        observers: Sequence[Observer] = (),
        enabled: bool = True,
        listeners: Sequence[Observer] = (),
    ):
        self.deadline = time.monotonic() + config.train.time_limit_seconds
        self.folder = Path(config.train.output_dir)
        self.same_tokenizer = True
        """Do teacher and student have the same? Else their perplexities do not compare"""
        self.environment: dict = {}
        """What `describe_environment` gives, from `open` on"""
        self._config, self._enabled = config, enabled
        self._observers, self._listeners = list(observers), list(listeners)
        self._log_steps = config.train.log_steps
        self._bar: Any = None  # a tqdm from `open` on
        self._metrics: Any = None  # a file, likewise
        self._text: Any = None  # log.txt, likewise
        self._early: list[str] = []
        """Lines for log.txt from before `open`"""
        self._first_step, self._started = 0, time.monotonic()
        self._seconds_before = 0.0
        """Of the parts of a resumed run"""
        self._perplexity = math.nan
        self._recent: list[dict] = []
        """Records of the steps since the last line"""

    def info(self, line: str) -> None:
        """Print one line, above the bar if there is one, and write it to `log.txt`; with --quiet only the latter."""
        self._show(line, line, not self._config.train.quiet)

    def detail(self, line: str) -> None:
        """Write one line to `log.txt`, from where the report shows it; print it with --verbose."""
        self._show(line, line, self._config.train.verbose)

    def _show(self, line: str, full_line: str, is_printed: bool) -> None:
        """line: for the terminal; full_line: for log.txt"""
        if not self._enabled:
            return
        line, full_line = as_called(line), as_called(full_line)
        if is_printed:
            tqdm.write(paint(line, sys.stdout), file=sys.stdout)
            sys.stdout.flush()
        if self._text is None:
            self._early.append(full_line)
        else:
            self._text.write(full_line + "\n")

    def open(self, first_step: int, train: TrainConfig) -> None:
        """Write `config.json`, open `metrics.jsonl` without the steps that a resumed run repeats, show the bar."""
        self._log_steps = train.log_steps
        self.folder.mkdir(parents=True, exist_ok=True)
        check_no_run(self.folder, self._config.train)  # again: a file system without locks keeps no other run out
        is_new = first_step == 0 and self._config.train.overwrite
        if is_new and (stays := clear_run_folder(self.folder)):  # not earlier: until now the run could be refused
            self.info(f"--overwrite: {first_few(stays)} in {self.folder} is not a run's, and stays")
        (self.folder / "summary.json").unlink(missing_ok=True)  # of a run that goes on now; it may be damaged
        self.environment = describe_environment()
        config = {**self._config.to_dict(), "environment": self.environment}
        atomic_write(self.folder / CONFIG, json.dumps(config, indent=2) + "\n")
        mode = "a" if first_step else "w"
        # A file name need not be UTF-8.
        self._text = open(self.folder / LOG, mode, encoding="utf-8", errors="backslashreplace", buffering=1)
        for line in (f"{self.environment['date']}  {self.environment['command']}", *self._early):
            self._text.write(line + "\n")
        self._seconds_before = self._open_metrics(first_step)
        self._first_step, self._started = first_step, time.monotonic()
        self._bar = tqdm(
            total=train.train_steps,
            initial=first_step,
            # No drawn bar: at 80 columns it would push out the metrics, of which the first matter most.
            bar_format="{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
            dynamic_ncols=True,
            disable=self._config.train.quiet or not sys.stdout.isatty(),
            file=sys.stdout,
        )

    def append(self) -> None:
        """Write the next lines to the end of `log.txt`, after the run has ended."""
        self._text = open(self.folder / LOG, "a", encoding="utf-8", errors="backslashreplace", buffering=1)

    def _open_metrics(self, first_step: int) -> float:
        """Returns the seconds that the kept part took."""
        path = self.folder / "metrics.jsonl"
        lines = [line for line in complete_lines(path) if step_of_line(line) <= first_step] if first_step else []
        atomic_write(path, "".join(lines))
        self._metrics = open(path, "a", encoding="utf-8", buffering=1)
        return as_float(json.loads(lines[-1]).get("seconds", 0.0)) if lines else 0.0

    def print_start(self, start: dict, teacher: dict) -> None:
        """Print the validation of student and teacher before the first step."""
        self.info(start_line(start, teacher, self.same_tokenizer))

    def log_start(self, student: dict, teacher: dict) -> None:
        """Write the validation of student and teacher before the first step."""
        teacher = {f"teacher_{name}": value for name, value in teacher.items()}
        self._perplexity = student["val_ppl"]
        self._write({"event": "start", "step": 0, "same_tokenizer": self.same_tokenizer, **student, **teacher})

    def log_step(self, record: dict, success_rate: float, tokens_per_second: float) -> None:
        """Write one attempted update; its `step` counts from 1. Every `log_steps`, and at the end, it prints a line."""
        if not self._enabled:
            return
        self._write({"event": "step", **record})
        self._recent.append(record)
        postfix = f"{self._postfix(record, success_rate)} tok/s={tokens_per_second:,.0f}"
        self._bar.set_postfix_str(self._shorten(postfix), refresh=False)
        self._bar.update(1)
        if record["step"] % self._log_steps == 0 or record["step"] == self._bar.total:
            elapsed = time.monotonic() - self._started
            left = elapsed / (record["step"] - self._first_step) * (self._bar.total - record["step"])
            pace = Pace(record["step"], self._bar.total, success_rate, tokens_per_second, elapsed, left)
            self._print_step(pace)
            self._recent.clear()

    def _print_step(self, pace: Pace) -> None:
        """A line about the steps since the last one. A terminal shows the parts that fit, as the bar has the rest."""
        parts = step_parts(self._recent, pace)
        columns = shutil.get_terminal_size((80, 24)).columns if sys.stdout.isatty() else math.inf
        self._show(fit(parts, columns), fit(parts, math.inf), not self._config.train.quiet)

    def _shorten(self, postfix: str) -> str:
        """As many of the metrics as fit beside the bar, each whole: 100 % cut short would read as 10."""
        width = len("100% / [0:00:00<0:00:00], ") + 2 * len(str(self._bar.total))
        columns = shutil.get_terminal_size((80, 24)).columns
        return textwrap.shorten(postfix, max(1, columns - 1 - width), placeholder="")

    def _postfix(self, record: dict, success_rate: float) -> str:
        """The metrics beside the bar."""
        ce = "" if record["ce_loss"] is None else f" ce={record['ce_loss']:.3f}"
        teacher = f" teacher_dropped={format_share(share)}" if (share := dropped_share([record])) else ""
        return (
            f"loss={record['loss']:.3f} kd={record['kd_loss']:.3f}{ce}{teacher} "
            f"ppl={format_perplexity(self._perplexity)} grad_norm={record['grad_norm']:.2f} success={success_rate:.0%} "
            f"loss_scale={record['loss_scale']:.0f}"
        )

    def log_evaluation(self, record: dict, is_best: bool) -> None:
        """Write and print one validation of the student."""
        self._write({"event": "evaluation", **record})
        self._perplexity = record["val_ppl"]
        self.info(evaluation_line(record, is_best, self.same_tokenizer))

    def log_rewind(self, record: dict, num_blocks: int) -> None:
        """Cut `metrics.jsonl` back to the step that `record` names, and print why: the steps after it are repeated."""
        if not self._enabled:
            return
        self._metrics.close()
        self._seconds_before += time.monotonic() - self._started
        self._open_metrics(record["step"])
        self._first_step, self._started = record["step"], time.monotonic()
        self._write({"event": "rewind", **record})
        self._recent.clear()
        self._bar.reset()
        self._bar.update(record["step"])
        skipped = f"{len(record['skipped_blocks'])} of {num_blocks} blocks ({first_few(record['documents'])})"
        self.info(
            f"Step {record['rewound_from']}: diverged. Back to step {record['step']}, once, at half the learning rate, "
            f"without {skipped}. See {self.folder / 'crash'}"
        )

    def log_summary(self, summary: dict) -> None:
        """Write `summary.json`, close everything, print the table of results."""
        text = json.dumps(json_safe({"format": RUN_FORMAT, **summary}), indent=2)
        atomic_write(self.folder / "summary.json", text + "\n")
        self._notify(lambda observer: observer.log_summary(summary))
        if summary["status"] == "interrupted" and time.monotonic() >= self.deadline:
            self.info(f"--time_limit {self._config.train.time_limit}: the time is over, everything is saved")
        self._close_bar()
        for line in self._last_lines(summary):
            self.info(line)
        self.close()

    def _last_lines(self, summary: dict) -> list[str]:
        if summary["status"] == "finished" and "control" not in summary and getattr(self._config, "has_control", False):
            return ["", f"{ended_line(summary)}; its control is trained now, then come the results"]
        # What `hand_over` does follows, and then what to type next.
        is_last = summary["status"] != "finished" or not self._config.hand_over.is_asked
        commands = next_commands(self.folder) if is_last else []
        return [*summary_table(summary, self.folder), *closing_lines(self.folder), *commands]

    def close(self) -> None:
        """Release the terminal and the files, however the run has ended."""
        self._close_bar()
        for file in (self._metrics, self._text):
            if file is not None:
                file.close()
        self._text, self._early = None, []
        self._notify(lambda observer: observer.close())

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _write(self, record: dict) -> None:
        if self._enabled:
            seconds = self._seconds_before + time.monotonic() - self._started
            record = {**record, "time": timestamp(), "seconds": round(seconds, 3)}
            self._metrics.write(json.dumps(json_safe(record)) + "\n")
            self._notify(lambda observer: observer.log_record(record))

    def _notify(self, call: Callable[[Observer], None]) -> None:
        """Call every observer. What is drawn, or sent elsewhere, must not end a run: an observer that fails is left
        out from then on, with a line about it.
        """
        for observer in list(self._observers):
            try:
                call(observer)
            except Exception as error:
                self._observers.remove(observer)
                kind = "" if isinstance(error, UsageError) else f"{type(error).__name__}: "
                reason = f"{kind}{error}".splitlines()[0]
                self.info(f"Warning: {observer.name} is not written from here on ({reason}); the run goes on")
        for listener in self._listeners:
            call(listener)


class SftLog(RunLog):
    """The log of a run without a teacher."""

    def _postfix(self, record: dict, success_rate: float) -> str:
        return (
            f"loss={record['loss']:.3f} grad_norm={record['grad_norm']:.2f} ppl={format_perplexity(self._perplexity)} "
            f"success={success_rate:.0%} loss_scale={record['loss_scale']:.0f}"
        )

    def _print_step(self, pace: Pace) -> None:
        self.info(sft_line(self._recent, pace))


class ControlLog(RunLog):
    """The log of a run's control. What it has come to stands in the table of its run."""

    def _last_lines(self, summary: dict) -> list[str]:
        return []


def log_with_control(config: RunConfig, summary: dict) -> None:
    """Write the summary and the pages of a run that has ended once more, now with its control; print the table."""
    folder = Path(config.train.output_dir)
    log = RunLog(config, [CardWriter(folder), *find_report_writer(folder)[0]])
    log.append()
    log.log_summary(summary)


def open_run(
    config: RunConfig,
    kind: type[RunLog] = RunLog,
    process_group: ProcessGroup = SINGLE_PROCESS,
    listeners: Sequence[Observer] = (),
) -> RunLog:
    """Check the run folder, print what the run is, and return its log. Nothing is written before `RunLog.open`.

    Raises: UsageError if the folder holds another run, or cannot be written
    """
    log = process_group.on_rank_zero(lambda: _open_run(config, kind, listeners))
    return log or kind(config, enabled=False)


def _open_run(config: RunConfig, kind: type[RunLog], listeners: Sequence[Observer]) -> RunLog:
    folder = Path(config.train.output_dir)
    check_run_folder(folder, config.train)
    writers, lines = find_report_writer(folder)
    log = kind(config, [CardWriter(folder), *writers, *find_trackers(config)], listeners=listeners)
    first, *others = config.summary_lines()
    log.info(first)
    for line in others:
        log.detail(line)
    for line in (*config.notices, *lines):
        log.info(line)
    return log
