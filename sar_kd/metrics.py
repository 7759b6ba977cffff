"""What a run tells: the bar and the lines in the terminal, `metrics.jsonl`, `summary.json`.

The only module that prints. It measures nothing and decides nothing; it is handed figures and shows them.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from sar_kd.closing import closing_table, perplexity_text
from sar_kd.config import GuardConfig, RunConfig, TrainConfig, UsageError
from sar_kd.folder import FolderLock, check_contained, clear, holds_something
from sar_kd.guards import Verdict


class RunLog:
    """A run folder and the terminal."""

    def __init__(self, config: RunConfig):
        self.folder = Path(config.train.output_dir)
        self._config = config
        self._every = config.train.log_steps
        self._is_terminal = sys.stdout.isatty()
        self._bar: tqdm | None = None
        self._perplexity = math.nan
        self._metrics = None
        self._lock = FolderLock(self.folder)
        self._window: list[dict] = []

    def say(self, line: str) -> None:
        """Print one line, above the bar if there is one."""
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def start(self, first_step: int, calendar: TrainConfig) -> None:
        """Write `config.json`, open `metrics.jsonl` without what a resumed run is about to repeat, show the bar."""
        self._every = calendar.log_steps
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        if first_step == 0 and self._config.train.overwrite:  # only now is it sure that a run begins
            clear(self.folder)
        replace_text(self.folder / "config.json", json.dumps(self._config.to_dict(), indent=2) + "\n")
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
        kept = [line for line in _complete_lines(path) if _step_of(line) <= first_step] if first_step else []
        replace_text(path, "".join(kept))
        self._metrics = open(path, "a", encoding="utf-8", buffering=1)

    def rewind(self, record: dict, num_blocks: int) -> None:
        """Go back to the step that `record` names, and say so: what came after it is about to happen otherwise."""
        self._metrics.close()
        self._open_metrics(record["step"])
        self._write({"event": "rewind", **record})
        self._window.clear()
        self._bar.reset()
        self._bar.update(record["step"])
        left_out = f"{len(record['left_out'])} of {num_blocks} blocks ({few(record['documents'])})"
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

    def step(self, record: dict, success_rate: float, tokens_per_second: float) -> None:
        """Enter one attempted update; its `step` counts from 1."""
        self._write({"event": "step", **record})
        self._window.append(record)
        figures = self._postfix(record, success_rate)
        self._bar.set_postfix_str(f"{figures} tok/s={tokens_per_second:,.0f}", refresh=False)
        self._bar.update(1)
        if record["step"] % self._every == 0:
            self.say(self._line(record["step"], success_rate))
            self._window.clear()

    def _postfix(self, record: dict, success_rate: float) -> str:
        """What stands beside the bar."""
        return (
            f"loss={record['loss']:.3f} kd={record['kd_loss']:.3f} ce={record['ce_loss']:.3f} "
            f"ppl={self._perplexity:.2f} grad_norm={record['grad_norm']:.2f} success={success_rate:.0%} "
            f"loss_scale={record['loss_scale']:.0f}"
        )

    def _line(self, step: int, success_rate: float) -> str:
        """What is said of the steps since the last line."""
        finite = [r for r in self._window if math.isfinite(r["loss"])]
        loss, kd, ce = (_mean([r[key] for r in finite]) for key in ("loss", "kd_loss", "ce_loss"))
        odd = len(self._window) - len(finite)
        bad = f" not_finite={odd}" if odd else ""
        of_routers = [r["router_kl"] for r in finite if "router_kl" in r]
        routers = f" router_kl={_mean(of_routers):.4f}" if of_routers else ""
        return (
            f"Step {step}: avg_loss={loss:.4f} (kd={kd:.4f}, ce={ce:.4f}){routers} success_rate={success_rate:.0%}{bad}"
        )

    def beginning(self, start: dict, teacher: dict) -> None:
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
        replace_text(self.folder / "summary.json", json.dumps(plain(summary), indent=2) + "\n")
        self.close()
        for line in self._closing(summary):
            self.say(line)

    def _closing(self, summary: dict) -> list[str]:
        return closing_table(summary, self.folder)

    def _write(self, record: dict) -> None:
        self._metrics.write(json.dumps(plain(record)) + "\n")


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
    log = kind(config)
    for line in (*config.headline(), *config.notices):
        log.say(line)
    return log


def notices_of(
    step: int, verdict: Verdict, grad_norm: float, scales: tuple[float, float], guards: GuardConfig
) -> list[str]:
    """What a verdict gives to say beside its figures; mostly nothing.

    scales: the loss scale before the step and after it
    """
    lines = []
    if verdict.cause in ("forward", "gradient", "overflow"):
        before, after = scales
        scale = f", loss scale {before:.0f} -> {after:.0f}" if after != before else ""
        lines.append(f"Step {step}: skipped ({verdict.cause}{scale})")
    if verdict.storm:
        lines.append(
            f"Step {step}: skip storm. 80 % of the last 50 steps were skipped for a gradient norm (now "
            f"{grad_norm:.2f}) above --skip_grad_norm {guards.skip_grad_norm:g}. From here on the limit is "
            f"{guards.skip_factor:g} times the median norm; --skip_rule fixed keeps it."
        )
    if verdict.often_nan:
        lines.append(
            f"Step {step}: {guards.max_nan_batches} of the last 50 steps were NaN batches; good ones in between kept "
            "the run going. crash/crash.md is about the first."
        )
    if verdict.dead:
        lines.append(
            f"Step {step}: the last 10 updates had no gradient, so the weights only decay; look at the clamps "
            "(--loss_clamp_style, --logit_clamp_style) and the loss weights."
        )
    return lines


def few(names: Sequence[str]) -> str:
    """The first names of a list that may be long."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader, and a kill, meet the old text or the new, never a part.

    Raises: UsageError if it cannot be written
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UsageError(
            f"--output_dir: {path} cannot be written ({error.strerror}); what was saved before is intact: free some "
            "room, then --resume"
        ) from None


def _complete_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _step_of(line: str) -> float:
    """The step that a line of `metrics.jsonl` is about; inf for a line that is none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf


def plain(value):
    """The value as JSON can hold it: JSON has no nan and no infinity, so they become the words."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
