"""Runs that are there, compared on the held-out documents that they have in common: all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sar_kd.errors import UsageError
from sar_kd.reporting.comparison import difference, gap_closed
from sar_kd.reporting.held_out import HeldOut, check_same_text, read_held_out
from sar_kd.reporting.history import RunHistory, read_history
from sar_kd.runtime.files import as_float


def compare_runs(folders: Sequence[Path]) -> dict:
    """Every run beside the one by cross-entropy alone, or beside the first one if none, or several, are such.

    folders: of the runs; of a single one, its control is the other

    Returns: `sentences`, one for each run but the reference, and a note behind them; `reference`; `differences`, for
    each run but the reference what `Difference.to_dict` gives; `models`, for each run the bits per byte of `start`,
    `best` and `teacher`, its `best_step`, and `gap_closed` with its interval where the teacher is better than the start
    Raises: UsageError, in one line, if a run cannot be read, or was measured on another text
    """
    if len(folders) == 1:
        folders = [*folders, _control_of(folders[0])]
    runs = [read_history(folder, with_steps=False) for folder in folders]
    texts = [read_held_out(folder) for folder in folders]
    for folder, text in zip(folders, texts, strict=True):
        check_same_text(folders[0], texts[0], folder, text)
        if "best" not in text.nats:
            raise UsageError(f"{folder}: the loss of its best student on each document was not kept")
    alone = [number for number, run in enumerate(runs) if as_float(run.setting("alpha_kd")) == 0]
    reference = alone[0] if len(alone) == 1 else 0
    sentences, differences = [], {}
    for number, (folder, text) in enumerate(zip(folders, texts, strict=True)):
        if number != reference:
            found = difference(text.nats["best"], texts[reference].nats["best"], text.num_bytes)
            sentences.append(found.sentence(str(folder), str(folders[reference])))
            differences[str(folder)] = found.to_dict()
    if len({text.blocks for text in texts}) > 1:
        sentences.append(
            "Their blocks begin at different places (--block_size, the teacher's tokenizer, or its cache), and a block "
            "begins without context: a part of a difference may come from that."
        )
    models = {str(folder): _models_of(run, text, texts) for folder, run, text in zip(folders, runs, texts, strict=True)}
    return {
        "sentences": sentences, "reference": str(folders[reference]), "differences": differences, "models": models
    }  # fmt: skip


def _control_of(folder: Path) -> Path:
    run = read_history(folder, with_steps=False)
    if not as_float(run.setting("alpha_kd")) > 0:
        raise UsageError(f"{folder}: a run by cross-entropy alone has no control; give a second run to compare it with")
    control = run.summary.get("control")
    if not isinstance(control, dict) or control.get("status") != "finished":
        raise UsageError(
            f"{folder}: has no finished control; give another run to compare it with, or train one: the run's own "
            f"command with --resume --control --output_dir {folder}"
        )
    return folder.parent / Path(str(control.get("folder"))).name


def _models_of(run: RunHistory, text: HeldOut, texts: Sequence[HeldOut]) -> dict[str, Any]:
    """texts: of all runs; a run without a teacher is measured by that of a run with the same start"""
    nats, size = text.nats, math.log(2) * float(text.num_bytes.sum())
    found: dict[str, Any] = {
        name: float(nats[name].sum()) / size for name in ("start", "best", "teacher") if name in nats
    }
    found["best_step"] = run.best.get("step", 0)
    if (start := nats.get("start")) is None:
        return found
    same = (each.nats for each in (text, *texts) if np.array_equal(each.nats.get("start", ()), start))
    teacher = next((each["teacher"] for each in same if "teacher" in each), None)
    share = None if teacher is None else gap_closed(start, nats["best"], teacher, text.num_bytes)
    return found | ({"gap_closed": share.value, "gap_closed_interval": share.half_width} if share else {})


def comparison_table(found: dict) -> list[str]:
    """The models of compared runs, in lines: start and teacher once where all runs have the same."""
    names = [*found["models"], "start", "teacher"]
    width = max(30, *(len(name) + 20 for name in names))
    lines = [f"  {'':<{width}}{'bits per byte':>15}{'gap closed':>14}"]

    def shared(model: str) -> list[str]:
        values = {name: run[model] for name, run in found["models"].items() if model in run}
        if len({f"{value:.6f}" for value in values.values()}) == 1:
            return [f"  {model:<{width}}{next(iter(values.values())):>15.4f}"]
        return [f"  {f'{name}, {model}':<{width}}{value:>15.4f}" for name, value in values.items()]

    lines += shared("start")
    for name, run in found["models"].items():
        label = f"{name}, best (step {run['best_step']})"
        share = f"{run['gap_closed']:.0%} +- {run['gap_closed_interval']:.0%}" if "gap_closed" in run else ""
        lines.append(f"  {label:<{width}}{run['best']:>15.4f}{share:>14}".rstrip())
    return lines + shared("teacher")
