"""The model card in `student/`: what the student is, what it learned from, and how good it is."""

from __future__ import annotations

import json
import math
from pathlib import Path

from sar_kd.reporting.history import History, read_history
from sar_kd.runtime.files import atomic_write, number_of
from sar_kd.version import __version__

FILE = "README.md"

_TOLD = (
    "mode", "alignment", "kd_direction", "temperature", "alpha_kd", "alpha_ce", "routing", "student_lr",
    "learning_rate", "lora_rank", "weight_decay", "train_steps", "per_device_batch_size", "grad_accum_steps",
    "block_size", "model_dtype", "seed",
)  # fmt: skip


class CardWriter:
    """Keeps the card beside the student up to date while the run goes on."""

    def __init__(self, folder: Path):
        self.folder = folder

    def record(self, record: dict) -> None:
        """Take notice of a line of `metrics.jsonl`."""
        if record["event"] in ("start", "evaluation"):
            self._write()

    def finish(self, summary: dict) -> None:
        """Write the card for the last time."""
        self._write()

    def close(self) -> None:
        """Nothing is kept open."""

    def _write(self) -> None:
        if (self.folder / "student").is_dir():
            atomic_write(self.folder / "student" / FILE, card_of(read_history(self.folder, with_steps=False)))


def card_of(run: History) -> str:
    """The card of a run's best student, in the form that the Hugging Face hub reads."""
    validations = run.validations()
    best = min(validations, key=lambda record: _ordered(record.get("val_loss")), default={})
    names = [run.setting(f"{whose}_model") for whose in ("teacher", "student")]
    teacher, student = (_public(str(name)) if name else "" for name in names)  # fine-tuning has no teacher
    text = _text_of(run)
    settings = {"mode": run.config.get("mode"), **{name: run.setting(name) for name in _TOLD[1:]}}
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [{'knowledge-distillation' if teacher else 'fine-tuning'}, sar-kd]",
        *([f"base_model: {json.dumps(student)}"] if "/" in student else []),
        *([f"datasets: [{json.dumps(run.setting('dataset_name'))}]"] if run.setting("dataset_name") else []),
        "---",
        f"# {student}, " + (f"distilled from {teacher}" if teacher else "fine-tuned"),
        "",
        f"Made with SAR-KD {__version__}. The weights are float32 and those of step {best.get('step', 0)}, the best by "
        "validation loss.",
        "",
        "| on held-out text | perplexity | bits per byte |",
        "|---|---:|---:|",
        _row("student, before", run.start, ""),
        _row(f"student, this one (step {best.get('step', 0)})", best, ""),
        *([_row("teacher", run.start, "teacher_")] if teacher else []),
        "",
        "Perplexity is exp(nats / token) over all of a fixed text. It compares between models of equal tokenizers; "
        "bits per byte compares between all.",
        "",
        *([f"- Teacher: {teacher}"] if teacher else []),
        f"- Student: {student}",
        f"- Text: {text}",
        *(f"- {name}: {value}" for name, value in settings.items() if value is not None),
        "",
        "```python",
        "from transformers import pipeline",
        'pipeline("text-generation", model=DIRECTORY)("Once", max_new_tokens=40)',
        "```",
        "",
        "The licences of the teacher, the student and the text hold for this model too; they are not looked up here.",
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, record: dict, prefix: str) -> str:
    figures = (number_of(record.get(f"{prefix}{kind}")) for kind in ("val_ppl", "val_bits_per_byte"))
    return "| {} | {:.2f} | {:.4f} |".format(name, *figures)


def _text_of(run: History) -> str:
    if run.setting("dataset_name"):
        return " ".join(filter(None, (str(run.setting("dataset_name")), str(run.setting("dataset_config_name") or ""))))
    if run.setting("task"):
        return f"questions of the task {run.setting('task')}"
    files = run.setting("train_file")
    if isinstance(files, list) and files:
        return ", ".join(Path(file).name for file in files)
    return "the documentation that CPython carries, as shipped with SAR-KD"


def _public(name: str) -> str:
    """A model's name without the folders of the machine that it lies on."""
    is_path = name.startswith((".", "/", "~")) or Path(name).expanduser().is_dir()
    return Path(name).name if is_path else name


def _ordered(loss: object) -> float:
    value = number_of(loss)
    return math.inf if math.isnan(value) else value
