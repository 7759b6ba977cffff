"""Distillation from Python, for notebooks: the same settings, guards and run folder as on the command line."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sar_kd.commands.train import train
from sar_kd.config.command_line import configure
from sar_kd.config.presets import STABLE
from sar_kd.config.sections import EMBEDDED
from sar_kd.errors import UsageError
from sar_kd.models.loading import IN_MEMORY, LoadedModels, load_for_generation
from sar_kd.runtime.files import atomic_write

ModelLike = str | Path | nn.Module | tuple[nn.Module, Any]

TextsLike = str | Path | Iterable[str | Path | Mapping[str, Any]]

_NAMED = {
    "teacher_model": "teacher",
    "student_model": "student",
    "train_file": "texts",
    "validation_file": "validation_texts",
}
"""Flags that `distill` has under another name."""


@dataclass(frozen=True)
class Distilled:
    """What came of it."""

    student: nn.Module
    """The best student by validation loss, in eval mode, as `student/` holds it"""
    tokenizer: Any
    summary: dict
    """`summary.json`"""
    folder: Path
    """The run folder; `report.html` in it, where matplotlib is installed"""

    def _repr_html_(self) -> str:
        """The report, in a notebook."""
        report = self.folder / "report.html"
        if not report.is_file():
            return f"<p>{self.summary['status']}, perplexity {self.summary['val_ppl_final']:.2f}: {self.folder}</p>"
        page = report.read_text(encoding="utf-8").replace("&", "&amp;").replace('"', "&quot;")
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 900px; border: 0"></iframe>'


def distill(
    teacher: ModelLike = EMBEDDED,
    student: ModelLike = EMBEDDED,
    texts: TextsLike | None = None,
    *,
    validation_texts: TextsLike | None = None,
    mode: str = "balanced",
    output_dir: str | Path | None = None,
    **flags: Any,
) -> Distilled:
    """Distil `teacher` into `student` on `texts`.

    teacher, student  a hub id or a directory; or a loaded model with its tokenizer, `(model, tokenizer)`. A loaded
                      student is trained in place and ends with the last weights, a loaded teacher is frozen and cast to
                      the run's dtype. 'embedded' is the pair shipped with the package
    texts             a file (.txt, .jsonl, .jsonl.gz) or several (`Path`s); or the texts themselves: strings, or rows
                      such as a .jsonl file holds ({"text": ...}, {"messages": [...]}, {"prompt": ..., "completion":
                      ...}). None for the embedded text
    validation_texts  held-out text, likewise; by default 5 % of `texts`
    mode, flags       as on the command line: train_steps=200, temperature=2.0, resume=True, ...
    output_dir        the run folder. Texts that are handed over are written beside it, so that --resume finds them

    Returns: `Distilled`: the best student, its tokenizer, the summary and the run folder
    Raises: UsageError (a ValueError) naming the flag and the remedy; TrainingDiverged after an emergency stop, once all
    is saved; KeyboardInterrupt at a second Ctrl-C (the first one saves, and the summary says 'interrupted')
    """
    for flag, name in _NAMED.items():
        if flag in flags:
            raise UsageError(f"distill({flag}=...): is called {name} here")
    pairs: dict[str, tuple[nn.Module, Any]] = {}
    values: dict[str, Any] = {"mode": mode, **flags}
    for flag, model in (("teacher_model", teacher), ("student_model", student)):
        values[flag] = _name_of(flag, model, pairs)
    if values.get("teacher_cache") and "teacher_model" in pairs:
        raise UsageError(f"--teacher_cache {values['teacher_cache']}: give the teacher by name, not one in memory")
    if values.get("task") and "student_model" in pairs and not values.get("skip_baseline"):
        raise UsageError(
            f"--task {values['task']}: a student in memory is there once, and cross-entropy alone would train another; "
            "give skip_baseline=True"
        )
    folder = Path(output_dir or f"runs/{STABLE.run_name}-{time.strftime('%Y%m%d-%H%M%S')}")
    values["output_dir"] = str(folder)
    for flag, given in (("train_file", texts), ("validation_file", validation_texts)):
        if given is not None:
            values[flag] = _files_of(flag, given, folder, values.get("text_field", "text"))
    summary = train(configure(STABLE, values), LoadedModels(pairs))
    best, tokenizer = load_for_generation(
        "student_model", str(folder / "student"), values.get("trust_remote_code", False)
    )
    return Distilled(best, tokenizer, summary, folder)


def _name_of(flag: str, model: ModelLike, pairs: dict[str, tuple[nn.Module, Any]]) -> str:
    """What the settings call a model; one that is loaded is entered in `pairs`."""
    if isinstance(model, (str, Path)):
        return str(model)
    if isinstance(model, nn.Module):
        raise UsageError(f"--{flag}: a loaded model needs its tokenizer: give (model, tokenizer)")
    if not (isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], nn.Module)):
        kind = type(model).__name__
        raise UsageError(f"--{flag}: {kind} is neither a hub id, nor a directory, nor a (model, tokenizer) pair")
    pairs[flag] = model
    name = getattr(model[0], "name_or_path", "") or type(model[0]).__name__
    return f"{IN_MEMORY} {name}"


def _files_of(flag: str, texts: TextsLike, folder: Path, text_field: str) -> list[str]:
    """The files that hold these texts; what is handed over in memory is written into one, beside the run folder."""
    if isinstance(texts, (str, Path)):
        return [str(texts)]
    rows: Sequence = list(texts)
    if rows and all(isinstance(row, Path) for row in rows):
        return [str(row) for row in rows]
    wrong = next((row for row in rows if not isinstance(row, (str, Mapping))), None)
    if wrong is not None or not rows:
        found = "nothing" if not rows else type(wrong).__name__
        raise UsageError(f"--{flag}: holds {found}; give texts, rows as of a .jsonl file, or paths")
    objects = [{text_field: row} if isinstance(row, str) else dict(row) for row in rows]
    path = folder.with_name(f"{folder.name}.{flag.removesuffix('_file')}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in objects))
    return [str(path)]
