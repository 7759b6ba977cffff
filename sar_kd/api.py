"""Distillation from Python: the same settings, guards and run folder as on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sar_kd.commands.train import train
from sar_kd.config.command_line import configure, new_run_folder
from sar_kd.config.presets import STABLE
from sar_kd.config.sections import EMBEDDED
from sar_kd.errors import UsageError
from sar_kd.models.loading import IN_MEMORY, LoadedModels, load_for_generation
from sar_kd.runtime.files import atomic_write

ModelLike = str | Path | nn.Module | tuple[nn.Module, Any]

TextsLike = str | Path | Iterable[str | Path | Mapping[str, Any]]

_PARAMETERS = {
    "teacher_model": "teacher",
    "student_model": "student",
    "train_file": "texts",
    "validation_file": "validation_texts",
}
"""The options that are parameters of `distill` under another name."""


@dataclass(frozen=True)
class Distilled:
    """The result of `distill`."""

    student: nn.Module
    """The best student by validation loss, in eval mode; the one saved in `student/`"""
    tokenizer: Any
    summary: dict
    """The values of `summary.json`"""
    folder: Path
    """The run folder; `report.html` in it, where matplotlib is installed"""

    def _repr_html_(self) -> str:
        """The report, for a notebook."""
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
    **options: Any,
) -> Distilled:
    """Distil `teacher` into `student` on `texts`.

    teacher, student  a hub id or a directory; or a loaded model with its tokenizer, `(model, tokenizer)`. A loaded
                      student is trained in place and ends with the last weights; a loaded teacher is frozen and cast to
                      the run's dtype. 'embedded': the models shipped with the package
    texts             a file (.txt, .jsonl, .jsonl.gz) or several (`Path`s); or the examples themselves, strings or
                      dicts as in a .jsonl file: {"text": ...}, {"messages": [...]}, {"prompt": ..., "completion":
                      ...}. None: the embedded text
    validation_texts  held-out text, likewise; by default 5 % of `texts`
    output_dir        the run folder. Examples given in memory are written beside it, so that resume=True finds them
    mode, options     as on the command line: train_steps=200, temperature=2.0, resume=True, ...

    Returns: `Distilled`: the best student, its tokenizer, the summary and the run folder
    Raises: UsageError (a ValueError) naming the option and the remedy; TrainingDiverged after an emergency stop, once
    all is saved; KeyboardInterrupt at a second Ctrl-C (the first one saves, and the summary says 'interrupted')
    """
    for option, name in _PARAMETERS.items():
        if option in options:
            raise UsageError(f"distill({option}=...): is called {name} here")
    pairs: dict[str, tuple[nn.Module, Any]] = {}
    values: dict[str, Any] = {"mode": mode, **options}
    for option, model in (("teacher_model", teacher), ("student_model", student)):
        values[option] = _name_of(option, model, pairs)
    if values.get("teacher_cache") and "teacher_model" in pairs:
        raise UsageError(f"--teacher_cache {values['teacher_cache']}: give the teacher by name, not one in memory")
    if values.get("task") and "student_model" in pairs and not values.get("skip_baseline"):
        raise UsageError(
            f"--task {values['task']}: the baseline would need a second student, and the one in memory exists once; "
            "give skip_baseline=True"
        )
    folder = Path(output_dir or new_run_folder(STABLE.run_name))
    values["output_dir"] = str(folder)
    for option, examples in (("train_file", texts), ("validation_file", validation_texts)):
        if examples is not None:
            values[option] = _files_of(option, examples, folder, values.get("text_field", "text"))
    summary = train(configure(STABLE, values), LoadedModels(pairs))
    best, tokenizer = load_for_generation(
        "student_model", str(folder / "student"), values.get("trust_remote_code", False)
    )
    return Distilled(best, tokenizer, summary, folder)


def _name_of(option: str, model: ModelLike, pairs: dict[str, tuple[nn.Module, Any]]) -> str:
    """A model's name in the settings; a loaded model is added to `pairs`."""
    if isinstance(model, (str, Path)):
        return str(model)
    if isinstance(model, nn.Module):
        raise UsageError(f"--{option}: a loaded model needs its tokenizer: give (model, tokenizer)")
    if not (isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], nn.Module)):
        kind = type(model).__name__
        raise UsageError(f"--{option}: {kind} is neither a hub id, nor a directory, nor a (model, tokenizer) pair")
    pairs[option] = model
    name = getattr(model[0], "name_or_path", "") or type(model[0]).__name__
    return f"{IN_MEMORY} {name}"


def _files_of(option: str, texts: TextsLike, folder: Path, text_field: str) -> list[str]:
    """The files that hold these examples; those given in memory are written to one beside the run folder."""
    if isinstance(texts, (str, Path)):
        return [str(texts)]
    examples: Sequence = list(texts)
    if examples and all(isinstance(example, Path) for example in examples):
        return list(map(str, examples))
    wrong = next((example for example in examples if not isinstance(example, (str, Mapping))), None)
    if wrong is not None or not examples:
        found = "nothing" if not examples else type(wrong).__name__
        raise UsageError(f"--{option}: holds {found}; give texts, dicts as in a .jsonl file, or paths")
    objects = [{text_field: each} if isinstance(each, str) else dict(each) for each in examples]
    path = folder.with_name(f"{folder.name}.{option.removesuffix('_file')}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in objects))
    return [str(path)]
