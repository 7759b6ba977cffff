"""The model card in `student/`: what the student is, what it was distilled from, and how good it is."""

from __future__ import annotations

import json
from pathlib import Path

from sar_kd.config.sections import SELF
from sar_kd.reporting.harness_table import HARNESS, harness_rows, harness_scores
from sar_kd.reporting.history import RunHistory, read_history
from sar_kd.reporting.rendering import render
from sar_kd.runtime.files import as_float, atomic_write
from sar_kd.runtime.run_folder import saved_student
from sar_kd.version import __version__

FILE = "README.md"

_SETTINGS = (
    "alignment", "kd_direction", "temperature", "alpha_kd", "alpha_ce", "routing", "student_lr", "learning_rate",
    "lora_rank", "optimizer", "weight_decay", "train_steps", "per_device_batch_size", "grad_accum_steps", "block_size",
    "model_dtype", "seed",
)  # fmt: skip


class CardWriter:
    """An observer of the run log that keeps the card beside the student up to date."""

    name = "the model card"

    def __init__(self, folder: Path):
        self.folder = folder

    def log_record(self, record: dict) -> None:
        if record["event"] in ("start", "evaluation"):
            self._write()

    def log_summary(self, summary: dict) -> None:
        self._write()

    def close(self) -> None:
        pass

    def _write(self) -> None:
        student = saved_student(self.folder)
        if student.is_dir():
            atomic_write(student / FILE, build_model_card(read_history(self.folder, with_steps=False)))


def build_model_card(run: RunHistory) -> str:
    """The card of a run's best student, Markdown with the metadata that the Hugging Face hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    best = run.best
    names = [run.setting(f"{role}_model") for role in ("teacher", "student")]
    names[0] = names[1] if names[0] == SELF else names[0]
    teacher, student = (public_name(str(name)) if name else "" for name in names)  # fine-tuning has no teacher
    teacher = "" if as_float(run.setting("alpha_kd")) == 0 else teacher
    dataset = run.setting("dataset_name")
    found = run.summary.get(HARNESS)
    results_of_tasks = [
        EvalResult(
            task_type="text-generation", dataset_type=task, dataset_name=task, metric_type=metric, metric_value=value,
            metric_args={"num_questions": entry.get("num_questions"), **({"stderr": stderr} if stderr >= 0 else {})},
        )
        for model, task, metric, value, stderr, entry in harness_scores(found) if model == "distilled"
    ]  # fmt: skip
    title = f"{student}, distilled from {teacher}" if teacher else f"{student}, fine-tuned"
    metadata = ModelCardData(
        model_name=title if results_of_tasks else None,
        eval_results=results_of_tasks or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["knowledge-distillation" if teacher else "fine-tuning", "sar-kd"],
        base_model=student if "/" in student else None,
        datasets=[str(dataset)] if dataset else None,
    )
    results = [
        _result("student, before", run.start),
        _result(f"student, this one (step {best.get('step', 0)})", best),
        *(model for model in run.models() if model[0].startswith("control")),
        *([_result("teacher", run.start, "teacher_")] if teacher else []),
    ]
    settings = {"mode": run.config.get("mode"), **{name: run.setting(name) for name in _SETTINGS}}
    if recipe := run.setting("recipe"):  # whose values go before the mode's
        settings = {"recipe": recipe, **settings}
    return render(
        "model_card.md",
        metadata=metadata.to_yaml(),
        teacher=teacher,
        student=student,
        version=__version__,
        step=best.get("step", 0),
        dtype=saved_dtype(saved_student(run.folder)),
        results=results,
        tasks=harness_rows(found),
        verdict=run.verdict(),
        text=_text_of(run),
        settings={name: value for name, value in settings.items() if value is not None},
    )


def saved_dtype(student: Path) -> str:
    """The dtype of a saved student's weights; of an adapter float32."""
    try:
        config = json.loads((student / "config.json").read_text(encoding="utf-8"))
        return str(config.get("dtype") or config.get("torch_dtype") or "float32")
    except (OSError, ValueError, AttributeError, RecursionError):
        return "float32"


def _result(name: str, record: dict, prefix: str = "") -> tuple[str, float, float]:
    """Name, perplexity, bits per byte."""
    return name, as_float(record.get(f"{prefix}val_ppl")), as_float(record.get(f"{prefix}val_bits_per_byte"))


def _text_of(run: RunHistory) -> str:
    if run.setting("dataset_name"):
        return " ".join(filter(None, (str(run.setting("dataset_name")), str(run.setting("dataset_config_name") or ""))))
    if run.setting("task"):
        return f"questions of the task {run.setting('task')}"
    files = run.setting("train_file")
    if isinstance(files, list) and files:
        return ", ".join(Path(file).name for file in files)
    return "the documentation of CPython, as shipped with SAR-KD"


def public_name(name: str) -> str:
    """A model's name without the folders of the machine that it lies on."""
    is_path = name.startswith((".", "/", "~")) or Path(name).expanduser().is_dir()
    return Path(name).name if is_path else name
