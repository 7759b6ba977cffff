"""The parser of a command line, built from a command's options: its help, its one-line errors, its hints."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import shutil
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sar_kd.config.commands import COMMANDS
from sar_kd.config.fields import AUTO, KIND_NAMES, Command, options_of
from sar_kd.config.installation import as_called_here, program_name
from sar_kd.errors import UsageError

CONFIG = "config"
"""The option that names a file of options; it is no setting itself."""

_KNOWN_ELSEWHERE = {
    "--student_lr": ("lr", "peak_lr", "max_lr"),
    "--router_lr": ("router_learning_rate",),
    "--train_steps": ("max_steps", "num_steps", "steps", "max_train_steps", "iterations"),
    "--epochs": ("num_train_epochs", "num_epochs", "epoch"),
    "--train_steps, which counts updates": ("epochs", "num_train_epochs", "num_epochs", "epoch"),
    "--per_device_batch_size": (
        "batch_size", "train_batch_size", "per_device_train_batch_size", "micro_batch_size", "bs", "mbs",
    ),
    "--grad_accum_steps": ("gradient_accumulation_steps", "accumulation_steps", "accum_steps", "grad_accum"),
    "--block_size": ("max_length", "max_seq_length", "max_seq_len", "seq_len", "seq_length", "context_length"),
    "--model_dtype float16": ("fp16", "half", "float16"),
    "--model_dtype bfloat16": ("bf16", "bfloat16"),
    "--model_dtype float32": ("fp32", "float32", "no_fp16"),
    "--model_dtype": ("dtype", "torch_dtype", "precision", "mixed_precision", "amp"),
    "--teacher_model": ("teacher", "teacher_model_name_or_path", "teacher_path"),
    "--student_model": ("student", "model", "model_name_or_path", "model_name", "model_path", "student_path"),
    "--model": ("teacher_model", "student_model", "teacher", "student"),
    "--train_file": ("data", "data_file", "data_path", "text", "input", "corpus", "dataset_path", "data_dir"),
    "--validation_file": ("eval_file", "valid_file", "val_file", "test_file", "eval_data"),
    "--dataset_name": ("dataset", "hf_dataset"),
    "--dataset_config_name": ("dataset_config", "subset"),
    "--text_field": ("text_column", "dataset_text_field", "field", "column"),
    "--output_dir": ("output", "out", "out_dir", "save_dir", "run_dir", "run_name", "o"),
    "--output": ("output_dir", "out", "output_file", "o"),
    "--eval_steps": ("eval_every", "evaluation_steps", "eval_interval"),
    "--log_steps": ("logging_steps", "log_every", "log_interval"),
    "--save_steps": ("save_every", "checkpoint_steps", "save_interval"),
    "--keep_checkpoints": ("save_total_limit",),
    "--max_grad_norm": ("clip", "grad_clip", "clip_grad_norm", "max_norm", "gradient_clipping"),
    "--warmup_steps": ("warmup", "num_warmup_steps"),
    "--lr_schedule": ("lr_scheduler_type", "scheduler", "lr_scheduler"),
    "--weight_decay": ("wd",),
    "--alpha_kd": ("alpha", "kd_weight", "kd_alpha", "lambda_kd"),
    "--alpha_ce": ("ce_weight", "ce_alpha"),
    "--temperature": ("temp", "t", "kd_temperature", "tau"),
    "--sample_temperature": ("temperature", "temp"),
    "--sample_top_p": ("top_p",),
    "--kd_direction": ("divergence", "kl", "loss_type", "kd_loss"),
    "--jsd_beta": ("beta",),
    "--teacher_top_k": ("top_k", "topk", "k"),
    "--on_policy_fraction": ("on_policy", "lmbda", "lambda"),
    "--resume": ("resume_from_checkpoint", "continue"),
    "--overwrite": ("overwrite_output_dir",),
    "--gradient_checkpointing": ("grad_checkpointing", "checkpointing"),
    "--teacher_quantization nf4": ("load_in_8bit", "quantization", "quantize"),
    "--lora_quantization nf4": ("load_in_4bit", "4bit", "qlora"),
    "--lora_rank": ("lora_r", "rank", "r", "lora"),
    "--lora_targets": ("target_modules", "lora_target_modules"),
    "--device": ("gpu", "cuda", "cpu", "no_cuda"),
    "--wandb": ("report_to",),
}  # fmt: skip
"""An option here -> names that other programs have for it"""


def unknown_option(name: str, names: Iterable[str], prefix: str = "--") -> str:
    """The error about an option that there is not, with the one that was likely meant.

    name: as it was typed; names: the options there are, without `prefix`
    """
    known, plain = list(names), name.split("=")[0].removeprefix("--").lstrip("-").replace("-", "_").lower()
    for meant, others in _KNOWN_ELSEWHERE.items():
        if plain in others and meant.split()[0].strip("-,") in known:
            return f"{name}: no such option; did you mean {prefix}{meant.removeprefix('--')}?"
    if owners := _commands_with(plain):
        return f"{name}: no such option here; it is one of `{program_name()} {owners[0]}`"
    # A name with a part left out, such as --top_p for --sample_top_p, counts as near.
    nearest = difflib.get_close_matches(plain, known, n=1) or [own for own in known if len(plain) > 2 and plain in own]
    hint = f"did you mean {prefix}{nearest[0]}?" if nearest else "--help lists the options"
    return f"{name}: no such option; {hint}"


def _commands_with(name: str) -> list[str]:
    """The commands that have an option of this name, or of one that other programs call so."""
    names = {f"--{name}", *(meant for meant, others in _KNOWN_ELSEWHERE.items() if name in others)}
    return [
        command.name
        for command in COMMANDS.values()
        for item, _ in options_of(command.sections.values())
        if f"--{item.name}" in names and not item.metadata["positional"]
    ]


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line each and name the nearest option there is."""

    def error(self, message: str) -> typing.NoReturn:
        missing = "the following arguments are required: "
        if message.startswith(missing):
            raise UsageError(f"{message.removeprefix(missing)}: not given; {self.format_usage().strip()}")
        raise UsageError(re.sub(r"^argument (--\w+)(/--\w+)*", r"\1", message))  # an alias is not named

    def parse_args(self, argv=None, namespace=None):
        argv = [self._underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
        found, unknown = self.parse_known_args(argv, namespace)
        if unknown and not unknown[0].startswith("-"):
            raise UsageError(self._stray(unknown[0], argv))
        if unknown:
            names = [name.removeprefix("--") for name in self._option_string_actions if name.startswith("--")]
            raise UsageError(unknown_option(unknown[0], names))
        return found

    def _underscored(self, word: str) -> str:
        """`--student-lr` is `--student_lr`."""
        name, equals, value = word.partition("=")
        name = "--" + name.removeprefix("--").replace("-", "_")
        return name + equals + value if word.startswith("--") and name in self._option_string_actions else word

    def _stray(self, word: str, argv: Sequence[str]) -> str:
        """The error about a word that belongs to no option; it often follows one that takes no value."""
        before = argv[argv.index(word) - 1] if argv.index(word) else ""
        for action in self._actions:
            if action.nargs == 0 and before in action.option_strings:
                return f"{before}: takes no value, not {word!r}; its help: {action.help}"
        return f"{word!r}: belongs to no option"


def build_parser(command: Command) -> argparse.ArgumentParser:
    """A parser with one option for each field, in a group for each section."""
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    modes = command.presets.get("mode", {})
    positionals = [item for item, _ in options_of(command.sections.values()) if item.metadata["positional"]]
    usage = ["%(prog)s", *map(_usage_of, positionals), *(["[--mode MODE]"] if modes else []), "[options]"]
    parser = _Parser(
        prog=f"{program_name()} {command.name}" if command.name else None,
        usage=" ".join(usage),
        description=command.description,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=width),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    if command.has_config_file:
        text = "options from a .json or .yaml file, such as the config.json of a run; those given beside it win"
        parser.add_argument(f"--{CONFIG}", metavar="FILE", help=text)
    if modes:
        text = f"a set of values; any option given beside it wins ({command.defaults['mode']})"
        parser.add_argument("--mode", choices=tuple(modes), help=text)
    defaults = {**command.defaults, **modes.get(command.defaults.get("mode", ""), {})}
    for section in command.sections.values():
        title, _, description = as_called_here((section.__doc__ or "").rstrip(".")).partition(": ")
        group = parser.add_argument_group(title, description)
        for item, kind in options_of([section]):
            _add_option(group, item, kind, defaults.get(item.name, item.default))
    return parser


def _usage_of(item: dataclasses.Field) -> str:
    metavar = item.metadata["metavar"]
    return f"{metavar} [{metavar} ...]" if item.default == () else metavar


def _add_option(group, item: dataclasses.Field, kind: type, default) -> None:
    default = " ".join(default) if isinstance(default, tuple) else default
    nothing = default == "" or default is False
    shown = "" if nothing else f" ({default:g})" if isinstance(default, float) else f" ({default})"
    syntax = item.metadata
    how: dict[str, Any] = {"help": as_called_here(syntax["help"]) + shown}
    if kind is bool:
        how |= {"action": "store_true"}
    elif syntax["choices"]:
        how |= {"choices": tuple(filter(None, syntax["choices"]))}  # '' is what it is where it is not given
    elif kind not in KIND_NAMES:
        how |= {"nargs": "+", "metavar": syntax["metavar"]}
    elif syntax["positional"]:
        how |= {"metavar": syntax["metavar"]}
    else:
        how |= {"type": _converter(kind, syntax["auto"]), "metavar": kind.__name__.upper() + "|auto" * syntax["auto"]}
    names = [item.name] if syntax["positional"] else [f"--{name}" for name in (item.name, *syntax["aliases"])]
    group.add_argument(*names, **how)


def _converter(kind: type, auto: bool) -> Callable[[str], object]:
    """From the text of an option to its value, as argparse wants it."""

    def convert(text: str):
        if auto and text == AUTO:
            return AUTO
        try:
            return kind(text)
        except ValueError:
            words = KIND_NAMES[kind] + f" or {AUTO}" * auto
            raise argparse.ArgumentTypeError(f"'{text}' is not {words}") from None

    return convert
