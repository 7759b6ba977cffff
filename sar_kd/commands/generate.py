"""`sar-kd generate RUN_DIR PROMPT`: what the teacher, the student before and the student after write, side by side."""

from __future__ import annotations

import json
import shutil
import textwrap
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch

from sar_kd.config.command_line import parse
from sar_kd.config.fields import Command, option, require_at_least
from sar_kd.config.sections import PrecisionConfig
from sar_kd.errors import UsageError
from sar_kd.models.generation import generate
from sar_kd.models.loading import load_for_generation
from sar_kd.reporting.history import History, read_history
from sar_kd.runtime.files import as_float
from sar_kd.runtime.precision import Precision, setup_precision

_LEAST_COLUMN = 30


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Writing: how the models go on from the prompt."""

    run: str = option("", "a run folder", metavar="RUN_DIR")
    prompt: str = option("", "what they go on from", metavar="PROMPT")
    max_new_tokens: int = option(60, "tokens that each model writes at most")
    sample_temperature: float = option(0.0, "0 takes the likeliest token each time; above, tokens are drawn")
    chat: bool = option(False, "put the prompt as a user's message into each model's chat template")
    seed: int = option(0, "seed of the draws")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    json: bool = option(False, "print JSON")

    def __post_init__(self):
        require_at_least(self, 1, "max_new_tokens")
        require_at_least(self, 0, "sample_temperature", "seed")


GENERATE = Command(
    name="generate",
    description="Continue a prompt with the teacher, the student before and the student after.",
    config=GenerateConfig,
    positionals=("run", "prompt"),
)


def main(argv: list[str]) -> dict:
    """Print what the three models write; `--json` for programs.

    Raises: UsageError if the run has left no student, or a model cannot be loaded
    """
    config = parse(GENERATE, argv)
    if not config.prompt:
        raise UsageError("generate: the prompt is empty; give some text to go on from")
    run = read_history(Path(config.run))
    student = run.folder / "student"
    if not student.is_dir():
        raise UsageError(f"generate {run.folder}: its run has not saved a student yet")
    precision = setup_precision(PrecisionConfig(device=config.device), config.seed)
    sources = {
        "teacher": ("teacher_model", str(run.setting("teacher_model"))),
        "student, before": ("student_model", str(run.setting("student_model"))),
        "student, after": ("student_model", str(student)),
    }
    trusted = run.setting("trust_remote_code") is True
    if not run.setting("teacher_model"):  # it was fine-tuned
        del sources["teacher"]
    texts = {who: _write(flag_, name, trusted, config, precision) for who, (flag_, name) in sources.items()}
    if config.json:
        print(json.dumps({"prompt": config.prompt, **texts}, indent=2, ensure_ascii=False))
    else:
        print("\n".join([f"Prompt: {config.prompt}", "", *side_by_side(texts, _figures(run), _width())]))
    return {"status": "finished"}


def _write(flag_: str, name: str, trusted: bool, config: GenerateConfig, precision: Precision) -> str:
    """One model's text, the prompt left out; the model is gone again afterwards."""
    model, tokenizer = load_for_generation(flag_, name, trusted, precision.dtype)
    model.to(precision.device)
    if config.chat:
        if not tokenizer.chat_template:
            raise UsageError(f"--chat: the tokenizer of {name} has no chat template; leave the flag out")
        message = [{"role": "user", "content": config.prompt}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    else:
        ids = tokenizer(config.prompt)["input_ids"]
    stops = model.generation_config.eos_token_id
    stops = [tokenizer.eos_token_id] if stops is None else stops if isinstance(stops, list) else [stops]
    torch.manual_seed(config.seed)
    with precision.autocast():
        (written,) = generate(
            model,
            [ids],
            stop_token_ids=stops,
            max_new_tokens=[config.max_new_tokens],
            temperature=config.sample_temperature,
        )
    return tokenizer.decode(written.ids, skip_special_tokens=True)


def _figures(run: History) -> dict[str, str]:
    """Each model's bits per byte on the run's held-out text, where the run knows it."""
    best = min((as_float(r.get("val_bits_per_byte")) for r in run.validations()), default=float("nan"))
    bits = {
        "teacher": as_float(run.start.get("teacher_val_bits_per_byte")),
        "student, before": as_float(run.start.get("val_bits_per_byte")),
        "student, after": best,
    }
    return {who: f"{value:.4f} bits per byte" for who, value in bits.items() if value == value}


def side_by_side(texts: dict[str, str], figures: dict[str, str], width: int) -> list[str]:
    """The texts in columns, each under its name; below one another where the terminal is too narrow for that."""
    column = (width - 3 * (len(texts) - 1)) // len(texts)
    if column < _LEAST_COLUMN:
        blocks = [
            [f"-- {who} ({figures.get(who, 'not measured')})", *_wrap(text, width), ""] for who, text in texts.items()
        ]
        return [line for block in blocks for line in block]
    columns = [[who, figures.get(who, ""), "-" * column, *_wrap(text, column)] for who, text in texts.items()]
    rows = zip_longest(*columns, fillvalue="")
    return ["   ".join(cell.ljust(column) for cell in row).rstrip() for row in rows]


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters; the text's own ends of lines stay."""
    wrap = textwrap.TextWrapper(width, drop_whitespace=False).wrap  # a line's indentation is the model's too
    lines = [part.rstrip() for line in text.splitlines() for part in (wrap(line) or [""])]
    return lines if any(lines) else ["(nothing)"]


def _width() -> int:
    return shutil.get_terminal_size((100, 24)).columns
