"""The log of a run: the bar and the lines in the terminal, `metrics.jsonl` and `summary.json`.

It measures nothing and decides nothing: it shows and writes the metrics that it is given.
"""

from __future__ import annotations

import json
import math
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
from sar_kd.reporting.model_card import CardWriter
from sar_kd.reporting.report import find_report_writer
from sar_kd.reporting.summary_table import summary_table
from sar_kd.reporting.trackers import find_trackers
from sar_kd.runtime.console import first_few, format_perplexity
from sar_kd.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from sar_kd.runtime.files import atomic_write, complete_lines, json_safe, step_of_line
from sar_kd.runtime.run_folder import CONFIG, check_no_run, check_run_folder, clear_run_folder
from sar_kd.version import RUN_FORMAT


class Observer(Protocol):
    """Receives everything that a run writes, once it is written."""

    def log_record(self, record: dict) -> None:
        """A line of `metrics.jsonl`; its `event` is 'start', 'step', 'evaluation' or 'rewind'."""

    def log_summary(self, summary: dict) -> None:
        """The run has ended, and its summary is written."""

    def close(self) -> None:
        """Nothing more follows, however the run has ended."""


class RunLog:
    """The log of a distillation: its run folder, the terminal, and observers.

    enabled: False on all ranks but rank 0; the log then shows and writes nothing, and
    `open` and `log_summary` are not called
    """

    def __init__(self, config: RunConfig, observers: Sequence[Observer] = (), enabled: bool = True):
        self.deadline = time.monotonic() + config.train.time_limit_seconds
        self.folder = Path(config.train.output_dir)
        self._config, self._observers, self._enabled = config, observers, enabled
        self._log_steps = config.train.log_steps
        self._bar: Any = None  # a tqdm from `open` on
        self._metrics: Any = None  # a file, likewise
        self._perplexity = math.nan
        self._recent: list[dict] = []
        """Records of the steps since the last line"""

    def info(self, line: str) -> None:
        """Print one line, above the bar if there is one."""
        if self._enabled:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def open(self, first_step: int, train: TrainConfig) -> None:
        """Write `config.json`, open `metrics.jsonl` without the steps that a resumed run repeats, show the bar."""
        self._log_steps = train.log_steps
        self.folder.mkdir(parents=True, exist_ok=True)
        check_no_run(self.folder, self._config.train)  # again: a file system without locks keeps no other run out
        is_new = first_step == 0 and self._config.train.overwrite
        if is_new and (stays := clear_run_folder(self.folder)):  # not earlier: until now the run could be refused
            self.info(f"--overwrite: {first_few(stays)} in {self.folder} is not a run's, and stays")
        (self.folder / "summary.json").unlink(missing_ok=True)  # of a run that goes on now; it may be damaged
        atomic_write(self.folder / CONFIG, json.dumps(self._config.to_dict(), indent=2) + "\n")
        self._open_metrics(first_step)
        self._bar = tqdm(
            total=train.train_steps,
            initial=first_step,
            # No drawn bar: at 80 columns it would push out the metrics, of which the first matter most.
            bar_format="{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
            dynamic_ncols=True,
            disable=not sys.stdout.isatty(),
            file=sys.stdout,
        )

    def _open_metrics(self, first_step: int) -> None:
        path = self.folder / "metrics.jsonl"
        lines = [line for line in complete_lines(path) if step_of_line(line) <= first_step] if first_step else []
        atomic_write(path, "".join(lines))
        self._metrics = open(path, "a", encoding="utf-8", buffering=1)

    def print_start(self, start: dict, teacher: dict) -> None:
        """Print the validation of student and teacher before the first step."""
        own, other = (format_perplexity(found["val_ppl"]) for found in (start, teacher))
        bits = f"bits per byte {start['val_bits_per_byte']:.3f}, teacher {teacher['val_bits_per_byte']:.3f}"
        self.info(f"Validation PPL at the start = {own} (teacher {other}; {bits})")

    def log_start(self, student: dict, teacher: dict) -> None:
        """Write the validation of student and teacher before the first step."""
        teacher = {f"teacher_{name}": value for name, value in teacher.items()}
        self._perplexity = student["val_ppl"]
        self._write({"event": "start", "step": 0, **student, **teacher})

    def log_step(self, record: dict, success_rate: float, tokens_per_second: float) -> None:
        """Write one attempted update; its `step` counts from 1. Every `log_steps` a line is printed."""
        if not self._enabled:
            return
        self._write({"event": "step", **record})
        self._recent.append(record)
        postfix = f"{self._postfix(record, success_rate)} tok/s={tokens_per_second:,.0f}"
        self._bar.set_postfix_str(self._shorten(postfix), refresh=False)
        self._bar.update(1)
        if record["step"] % self._log_steps == 0:
            self.info(self._line(record["step"], success_rate))
            self._recent.clear()

    def _shorten(self, postfix: str) -> str:
        """As many of the metrics as fit beside the bar, each whole: 100 % cut short would read as 10."""
        width = len("100% / [0:00:00<0:00:00], ") + 2 * len(str(self._bar.total))
        columns = shutil.get_terminal_size((80, 24)).columns
        return textwrap.shorten(postfix, max(1, columns - 1 - width), placeholder="")

    def _postfix(self, record: dict, success_rate: float) -> str:
        """The metrics beside the bar."""
        ce = "" if record["ce_loss"] is None else f" ce={record['ce_loss']:.3f}"
        return (
            f"loss={record['loss']:.3f} kd={record['kd_loss']:.3f}{ce} "
            f"ppl={format_perplexity(self._perplexity)} grad_norm={record['grad_norm']:.2f} success={success_rate:.0%} "
            f"loss_scale={record['loss_scale']:.0f}"
        )

    def _line(self, step: int, success_rate: float) -> str:
        """The line about the steps since the last one: means over those whose loss is finite."""
        finite = [r for r in self._recent if math.isfinite(r["loss"])]
        loss, kd = (_mean([r[key] for r in finite]) for key in ("loss", "kd_loss"))
        ce_losses = [r["ce_loss"] for r in finite if r["ce_loss"] is not None]  # None on on-policy text
        ce = f", ce={_mean(ce_losses):.4f}" if ce_losses or not finite else ""
        num_bad = len(self._recent) - len(finite)
        bad = f" not_finite={num_bad}" if num_bad else ""
        router_kls = [r["router_kl"] for r in finite if "router_kl" in r]
        routers = f" router_kl={_mean(router_kls):.4f}" if router_kls else ""
        return f"Step {step}: avg_loss={loss:.4f} (kd={kd:.4f}{ce}){routers} success_rate={success_rate:.0%}{bad}"

    def log_evaluation(self, record: dict, is_best: bool) -> None:
        """Write and print one validation of the student."""
        self._write({"event": "evaluation", **record})
        self._perplexity = record["val_ppl"]
        best = " (best so far)" if is_best else ""
        teacher = ""
        if "router_entropy" in record:
            native, routed = (record[f"teacher_val_ppl_{how}"] for how in ("native", "routed"))
            every = "" if routed == native else f", {routed:.2f} with every expert"
            teacher = f"; teacher {native:.2f}{every}, router entropy {record['router_entropy']:.3f}"
        self.info(f"Step {record['step']}: Validation PPL = {format_perplexity(record['val_ppl'])}{best}{teacher}")

    def log_rewind(self, record: dict, num_blocks: int) -> None:
        """Cut `metrics.jsonl` back to the step that `record` names, and print why: the steps after it are repeated."""
        if not self._enabled:
            return
        self._metrics.close()
        self._open_metrics(record["step"])
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
        for observer in self._observers:
            observer.log_summary(summary)
        self.close()
        if summary["status"] == "interrupted" and time.monotonic() >= self.deadline:
            self.info(f"--time_limit {self._config.train.time_limit}: the time is over, everything is saved")
        for line in summary_table(summary, self.folder):
            self.info(line)

    def close(self) -> None:
        """Release the terminal and the files, however the run has ended."""
        if self._bar is not None:
            self._bar.close()
        if self._metrics is not None:
            self._metrics.close()
        for observer in self._observers:
            observer.close()

    def _write(self, record: dict) -> None:
        if self._enabled:
            self._metrics.write(json.dumps(json_safe(record)) + "\n")
            for observer in self._observers:
                observer.log_record(record)


class SftLog(RunLog):
    """The log of a run without a teacher.

    Every `--log_steps`: {'loss': 2.27, 'grad_norm': 1.55, 'learning_rate': 0.0002, 'epoch': 0.31}
    The loss is the mean since the last line, nan if one of them was; the other metrics are those of this step.
    """

    def print_start(self, start: dict, teacher: dict) -> None:
        perplexity = format_perplexity(start["val_ppl"])
        self.info(f"Validation PPL at the start = {perplexity} (bits per byte {start['val_bits_per_byte']:.3f})")

    def _postfix(self, record: dict, success_rate: float) -> str:
        return (
            f"loss={record['loss']:.3f} grad_norm={record['grad_norm']:.2f} ppl={format_perplexity(self._perplexity)} "
            f"success={success_rate:.0%} loss_scale={record['loss_scale']:.0f}"
        )

    def _line(self, step: int, success_rate: float) -> str:
        last = self._recent[-1]
        losses = [record["loss"] for record in self._recent if record["num_target_tokens"]]
        # A mean of all steps, finite or not, and nan instead of 0 where there is none: a bad step must show.
        metrics = {"loss": sum(losses) / len(losses) if losses else math.nan}
        metrics |= {name: last[name] for name in ("grad_norm", "learning_rate")}
        rounded = {name: float(f"{value:.4g}") for name, value in metrics.items()}
        return str({**rounded, "epoch": round(last["epoch"], 2)})


def open_run(config: RunConfig, kind: type[RunLog] = RunLog, process_group: ProcessGroup = SINGLE_PROCESS) -> RunLog:
    """Check the run folder, print what the run is, and return its log. Nothing is written before `RunLog.open`.

    Raises: UsageError if the folder holds another run, or cannot be written
    """
    return process_group.on_rank_zero(lambda: _open_run(config, kind)) or kind(config, enabled=False)


def _open_run(config: RunConfig, kind: type[RunLog]) -> RunLog:
    folder = Path(config.train.output_dir)
    check_run_folder(folder, config.train)
    writers, lines = find_report_writer(folder)
    log = kind(config, [CardWriter(folder), *writers, *find_trackers(config)])
    for line in (*config.summary_lines(), *config.notices, *lines):
        log.info(line)
    return log


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
