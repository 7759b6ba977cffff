"""The commands from Python: the same settings, guards and run folder as on the command line."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sar_kd.commands.preflight import check
from sar_kd.commands.sft import fine_tune
from sar_kd.commands.train import train
from sar_kd.config.command_line import configure, new_run_folder
from sar_kd.config.commands import CACHE, PREFLIGHT, SFT
from sar_kd.config.fields import Command
from sar_kd.config.presets import STABLE
from sar_kd.config.python_arguments import called_from_python
from sar_kd.config.sections import EMBEDDED
from sar_kd.data.files.given_texts import GivenTexts, TextsLike
from sar_kd.errors import UsageError
from sar_kd.models.loading import LoadedModels, load_for_generation
from sar_kd.models.model_files import IN_MEMORY
from sar_kd.reporting.history import findings_of, read_history
from sar_kd.reporting.report import FILE as REPORT
from sar_kd.reporting.report import check_page, results_of, write_report
from sar_kd.reporting.run_comparison import compare_runs
from sar_kd.runtime.console import print_stderr
from sar_kd.runtime.run_folder import saved_student

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from sar_kd.config.option_types import CacheOptions, DistillOptions, Mode, SftOptions

ModelLike = str | Path | nn.Module | tuple[nn.Module, Any]

_PARAMETERS = {
    "teacher_model": "teacher",
    "student_model": "student",
    "train_file": "texts",
    "validation_file": "validation_texts",
}
"""The options that are parameters under another name."""


@dataclass(frozen=True, repr=False)
class RunResult:
    """The result of `distill` and of `sft`."""

    student: nn.Module
    """The best student by validation loss, in eval mode, an adapter merged; the one saved in the run folder"""
    tokenizer: Any
    summary: dict
    """The values of `summary.json`"""
    folder: Path
    """The run folder; `report.html` in it, where matplotlib is installed"""

    def __repr__(self) -> str:
        values = self.summary
        return (
            f"<{values['status']} after {values['steps']} steps: bits per byte {values['val_bits_per_byte_start']:.4f} "
            f"-> {values['val_bits_per_byte_best']:.4f}, perplexity {values['val_ppl_start']:.2f} -> "
            f"{values['val_ppl_best']:.2f} at best (step {values['best_step']}); {self.folder}>"
        )

    def _repr_html_(self) -> str:
        """The report, for a notebook."""
        return _page(self.folder / REPORT) or f"<p>{str(self)[1:-1]}</p>"


Distilled = RunResult


@dataclass(frozen=True, repr=False)
class Comparison:
    """The result of `compare`."""

    results: list[dict]
    """For each run: `run`, `status`, `steps`, `bits per byte`, `best`, `perplexity`, ... as the page shows them"""
    findings: dict[str, list[str]]
    """What each run shows, in sentences"""
    page: Path
    verdicts: list[str]
    """Which run is better than which, on the held-out documents of both; or why that cannot be said"""

    def __repr__(self) -> str:
        results = ("  ".join(f"{k} {v}" for k, v in row.items()) for row in self.results)
        return "\n".join([*self.verdicts, *results, f"<{self.page}>"])

    def _repr_html_(self) -> str:
        return _page(self.page)


def distill(
    teacher: ModelLike = EMBEDDED,
    student: ModelLike = EMBEDDED,
    texts: TextsLike | None = None,
    *,
    validation_texts: TextsLike | None = None,
    mode: Mode | None = None,
    output_dir: str | Path | None = None,
    callback: Callable[[dict], object] | None = None,
    **options: Unpack[DistillOptions],
) -> RunResult:
    """Distil `teacher` into `student` on `texts`.

    teacher, student  a hub id or a directory; or a loaded model with its tokenizer, `(model, tokenizer)`. A loaded
                      student is trained in place and ends with the last weights; a loaded teacher is frozen and cast to
                      the run's dtype. 'embedded': the models shipped with the package
    texts             a file or several (`Path`s); or the examples themselves, strings or dicts as in a .jsonl file:
                      {"text": ...}, {"messages": [...]}, {"prompt": ..., "completion": ...}. None: the embedded text
    validation_texts  held-out text, likewise; by default 5 % of `texts`
    mode              by default 'balanced', or with resume=True that of the run
    output_dir        the run folder. Examples given in memory are kept in it, so that resume=True finds them
    callback          called with each record of `metrics.jsonl` once it is written ('event': 'start', 'step',
                      'evaluation' or 'rewind'), and with the summary ('event': 'end'); its errors end the run
    options           as on the command line: train_steps=200, temperature=2.0, resume=True, quiet=True, ...

    Returns: the best student, its tokenizer, the summary and the run folder
    Raises: UsageError (a ValueError) naming the argument and the remedy; TrainingDiverged after an emergency stop, once
    all is saved; KeyboardInterrupt at a second Ctrl-C (the first one saves, and the summary says 'interrupted')
    """
    with called_from_python(STABLE, _PARAMETERS):
        call = _Call(STABLE, "distill", options, teacher=teacher, student=student, mode=mode)
        values, pairs = call.values, call.pairs
        if values.get("teacher_cache") and "teacher_model" in pairs:
            raise UsageError(f"--teacher_cache {values['teacher_cache']}: give the teacher by name, not one in memory")
        return call.run(train, output_dir, texts, validation_texts, callback)


def sft(
    student: ModelLike = EMBEDDED,
    texts: TextsLike | None = None,
    *,
    validation_texts: TextsLike | None = None,
    output_dir: str | Path | None = None,
    callback: Callable[[dict], object] | None = None,
    **options: Unpack[SftOptions],
) -> RunResult:
    """Fine-tune `student` on questions with answers, or on text. Arguments, Returns and Raises: as `distill`"""
    with called_from_python(SFT, _PARAMETERS):
        call = _Call(SFT, "sft", options, student=student)
        return call.run(fine_tune, output_dir, texts, validation_texts, callback)


def cache(
    teacher: str | Path = EMBEDDED,
    texts: TextsLike | None = None,
    *,
    folder: str | Path = "teacher_cache",
    validation_texts: TextsLike | None = None,
    **options: Unpack[CacheOptions],
) -> Path:
    """Run `teacher` once over `texts` and store its logits; returns the folder, for distill(teacher_cache=...).

    teacher: a hub id or a directory
    Raises: UsageError naming the argument and the remedy
    """
    from sar_kd.commands.cache import main as build_cache

    names = _PARAMETERS | {"teacher_cache": "folder", "student_model": "student_model"}
    with called_from_python(CACHE, names), tempfile.TemporaryDirectory() as place:
        call = _Call(CACHE, "cache", options, teacher=teacher)
        if call.pairs:
            raise UsageError("--teacher_model: a cache needs the teacher by name, as it stores which one it is of")
        call.values["teacher_cache"] = str(_folder("teacher_cache", folder))
        with call.add_texts(Path(place), texts, validation_texts):
            config = configure(CACHE, call.values)
            for line in config.notices:
                print_stderr(line)
            build_cache(config)
    return Path(folder)


def preflight(
    teacher: ModelLike = EMBEDDED,
    student: ModelLike = EMBEDDED,
    texts: TextsLike | None = None,
    *,
    validation_texts: TextsLike | None = None,
    mode: Mode | None = None,
    **options: Unpack[DistillOptions],
) -> dict:
    """Check a run with these arguments; nothing is trained. With quiet=True nothing is printed.

    Returns: the findings by check; `ok`: could the run start?; if not, `error`: why
    """
    with called_from_python(PREFLIGHT, _PARAMETERS) as translate, tempfile.TemporaryDirectory() as place:
        call = _Call(PREFLIGHT, "preflight", options, teacher=teacher, student=student, mode=mode)
        with call.add_texts(Path(place), texts, validation_texts):
            show = (lambda line: None) if call.values.get("quiet") else lambda line: print(translate(line))
            record = check(configure(PREFLIGHT, call.values), show, LoadedModels(call.pairs))
    if not record["ok"]:
        record["error"] = translate(record["error"])
    return record


def compare(*runs: str | Path | RunResult, page: str | Path = REPORT) -> Comparison:
    """Write one page about several runs, or about one, and say which is better. runs: folders, or results of `distill`
    and `sft`

    Raises: UsageError if a folder holds no run, or matplotlib is missing
    """
    if not runs:
        raise UsageError("compare: give the folders of the runs")
    folders = [run.folder if isinstance(run, RunResult) else _folder("runs", run) for run in runs]
    histories = [read_history(folder) for folder in folders]
    path = _folder("page", page)
    check_page(path, f"page={str(page)!r}")
    write_report(histories, path)
    try:
        verdicts = compare_runs(folders)["sentences"]
    except UsageError as error:
        verdicts = [str(error)]
    return Comparison(results_of(histories), {run.name: findings_of(run) for run in histories}, path, verdicts)


class _Call:
    """The arguments of a function as options of its command: `values`, and `pairs`, the models that are in memory."""

    def __init__(self, command: Command, function: str, options: Any, mode: Any = None, **models: Any):
        for option in (*(f"{role}_model" for role in models), "train_file", "validation_file"):
            if option in options:
                raise UsageError(f"{function}({option}=...): is called {_PARAMETERS[option]} here")
        self.command, self.function, self.pairs = command, function, dict[str, tuple[nn.Module, Any]]()
        self.values: dict[str, Any] = {name: str(v) if isinstance(v, Path) else v for name, v in options.items()}
        resumes = bool(options.get("resume"))
        self.values |= {"mode": mode} if mode else {}
        for role, model in models.items():
            if not (resumes and isinstance(model, str) and model == EMBEDDED):  # the run has its own
                self.values[f"{role}_model"] = self._name_of(f"{role}_model", model)
        if len({id(model) for model, _ in self.pairs.values()}) < len(self.pairs):
            raise UsageError("--student_model: is the teacher itself, which is frozen; give a copy of the model")

    def _name_of(self, option: str, model: Any) -> str:
        """A model's name in the settings; a loaded model is added to `pairs`."""
        if isinstance(model, (str, Path)):
            return str(model)
        if isinstance(model, nn.Module):
            raise UsageError(f"--{option}: a loaded model needs its tokenizer: give (model, tokenizer)")
        if not (isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], nn.Module)):
            kind = type(model).__name__
            raise UsageError(f"--{option}: {kind} is neither a hub id, nor a directory, nor a (model, tokenizer) pair")
        self.pairs[option] = model
        name = getattr(model[0], "name_or_path", "") or type(model[0]).__name__
        return f"{IN_MEMORY} {name}"

    def add_texts(self, folder: Path, texts: TextsLike | None, validation_texts: TextsLike | None) -> GivenTexts:
        """Name the files of the texts in `values`; those given in memory are written when the result is entered."""
        given = GivenTexts(folder, self.values.get("text_field", "text"), bool(self.values.get("resume")))
        for option, examples in (("train_file", texts), ("validation_file", validation_texts)):
            if examples is not None and (files := given.files_of(option, examples)) is not None:
                self.values[option] = files
        return given

    def run(
        self,
        main: Callable[..., dict],
        output_dir: str | Path | None,
        texts: TextsLike | None,
        validation_texts: TextsLike | None,
        callback: Callable[[dict], object] | None,
    ) -> RunResult:
        """Make the run. main: of the command"""
        if callback is not None and not callable(callback):
            raise UsageError(f"{self.function}(callback={callback!r}): must be a function that takes a record")
        if output_dir is None and self.values.get("resume"):
            raise UsageError(f"{self.function}(resume=True): give the run folder, output_dir=...")
        folder = _folder("output_dir", output_dir or new_run_folder(self.command.run_name))
        self.values["output_dir"] = str(folder)
        given = self.add_texts(folder, texts, validation_texts)
        config = configure(self.command, self.values)
        listeners = [] if callback is None else [_Listener(callback)]
        summary = main(config, LoadedModels(self.pairs), listeners, given)
        best, tokenizer = load_for_generation(
            "student_model", str(saved_student(folder)), config.models.trust_remote_code
        )
        return RunResult(best, tokenizer, summary, folder)


class _Listener:
    """An observer of the run log that calls a function with each record."""

    name = "callback"

    def __init__(self, callback: Callable[[dict], object]):
        self._callback = callback

    def log_record(self, record: dict) -> None:
        self._callback(record)

    def log_summary(self, summary: dict) -> None:
        self._callback({"event": "end", **summary})

    def close(self) -> None:
        pass


def _folder(argument: str, value: Any) -> Path:
    if not isinstance(value, (str, Path)):
        raise UsageError(f"{argument}={value!r}: must be a path, as text or as a Path")
    return Path(value)


def _page(path: Path) -> str:
    """An HTML page as a frame in another one; '' if there is none."""
    if not path.is_file():
        return ""
    page = path.read_text(encoding="utf-8").replace("&", "&amp;").replace('"', "&quot;")
    return f'<iframe srcdoc="{page}" style="width: 100%; height: 900px; border: 0"></iframe>'


vars(sys.modules["sar_kd"])["preflight"] = preflight  # the package of that name would hide the function
