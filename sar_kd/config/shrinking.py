"""`sar-kd shrink`: which model is cut, how much of it is kept, and on which text that is decided and measured."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from sar_kd.config.fields import RunConfig, Section, option, require
from sar_kd.config.sections import AUTO_BATCH, DataConfig, OutputConfig, model_option
from sar_kd.errors import UsageError

CHOICES = ("influence", "late", "even", "first")

_COUNT = re.compile(r"[1-9][0-9]{0,8}|0?\.[0-9]{1,9}")

_RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")

_MAX_LAYERS = 10_000

_PARTS = {"layers": "layers", "intermediate": "channels", "experts": "experts", "vocab_size": "tokens"}
"""What each option says how much of is kept"""


def kept_count(option_name: str, text: str, total: int) -> int:
    """What a number of parts to keep, or a share of them such as 0.75, is of this total; a share is rounded.

    Raises: UsageError unless at least one is kept and at least one is cut
    """
    count = int(text) if text.isdigit() else round(float(text) * total)
    require(0 < count < total, option_name, text, f"keeps {count} of {total}; give a number from 1 to {total - 1}")
    return count


@dataclass(frozen=True, kw_only=True)
class ShrinkConfig(Section):
    """Cut: which model, how much of it is kept, and where the smaller one is written."""

    model: str = model_option("teacher")
    trust_remote_code: bool = option(False, "run model code that comes with a checkpoint")
    output_dir: str = option("", "new folder for the smaller model", not_empty="give a new folder")
    layers: str = option("", "layers to keep: their number, or a share such as 0.75")
    layer_choice: str = option(
        "influence",
        "which layers to keep; influence: cut those in a row that change the hidden states of the text least; late: "
        "cut those before the last two; even: keep them at equal distances; first: keep the first; or a list, from 0, "
        "such as 0-19,28-29",
    )
    intermediate: str = option(
        "",
        "inner channels to keep in each feed-forward part, those of the largest activations: their number, or a share",
    )
    experts: str = option(
        "", "experts to keep in each block of a mixture of experts, the most used ones: their number, or a share"
    )
    vocab_size: str = option(
        "",
        "tokens to keep: their number, or a share; bytes and special tokens first, then those that the text uses most, "
        "then those that it uses with other case or spaces, then those of the lowest ids",
    )
    vocab_from: tuple[str, ...] = option(
        (),
        "files of the text that the tokens are counted in, each as --train_file; 'embedded': the embedded text; by "
        "default all of the training text",
    )
    calibration_chars: int = option(
        100_000, "characters of the training text on which the choice is made", at_least=1000
    )
    eval_chars: int = option(
        100_000, "characters of the held-out text on which the model is measured before and after", at_least=1000
    )
    heal_steps: int = option(
        0, "then distil the whole model into the smaller one for this many steps, in each round; 0: do not", at_least=0
    )
    iterative: int = option(1, "rounds, each of which cuts an equal part and distils", at_least=1)
    student_lr: float = option(1e-4, "peak learning rate of --heal_steps", positive=True)
    per_device_batch_size: int = option(
        4, f"of --heal_steps: {AUTO_BATCH.format(what='blocks')}", at_least=1, auto=True
    )
    model_dtype: str = option(
        "auto", "compute dtype of --heal_steps, as that of a run; the cut is made in float32",
        choices=("auto", "float16", "bfloat16", "float32"),
    )  # fmt: skip
    device: str = option("auto", "auto, cpu, cuda or cuda:N")

    def __post_init__(self):
        super().__post_init__()
        for name, what in _PARTS.items():
            value = getattr(self, name)
            require(not value or bool(_COUNT.fullmatch(value)), name, value,
                    f"must be a number of {what}, or a share above 0 and below 1 such as 0.75")  # fmt: skip
        listed = self.listed_layers
        if listed and self.layers:
            raise UsageError(f"--layer_choice {self.layer_choice}: says how many layers are kept; leave out --layers")
        if self.layer_choice != "influence" and not (self.layers or listed):
            raise UsageError(f"--layer_choice {self.layer_choice}: needs --layers, how many to keep")
        if not (listed or any(getattr(self, name) for name in _PARTS)):
            raise UsageError("shrink: nothing is to be cut; give --layers, --intermediate, --experts or --vocab_size")
        if self.iterative > 1:
            require(self.heal_steps > 0, "iterative", self.iterative, "distils between the cuts; give --heal_steps too")
            require(not listed, "iterative", self.iterative, "needs --layers, not a list of them in --layer_choice")

    @property
    def text_sizes(self) -> tuple[int, int]:
        """Characters of the training and of the held-out text."""
        return self.calibration_chars, self.eval_chars

    @property
    def listed_layers(self) -> tuple[int, ...]:
        """The layers of a list, ascending; none where another choice is made. Raises: UsageError"""
        if self.layer_choice in CHOICES:
            return ()
        found: set[int] = set()
        for part in self.layer_choice.split(","):
            match = _RANGE.fullmatch(part.strip())
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            is_range = match is not None and first <= last < _MAX_LAYERS and not found & {*range(first, last + 1)}
            require(is_range, "layer_choice", self.layer_choice,
                    f"must be {', '.join(CHOICES)}, or a list of different layers such as 0-19,28-29")  # fmt: skip
            found |= {*range(first, last + 1)}
        return tuple(sorted(found))


@dataclass(frozen=True, kw_only=True)
class ShrinkingConfig(RunConfig):
    """Everything a smaller model is made from."""

    shrink: ShrinkConfig = field(default_factory=ShrinkConfig)
    data: DataConfig = field(default_factory=DataConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
