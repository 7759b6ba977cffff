"""`sar-kd write`: which teacher continues which prompts, how, and which of its answers are kept."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from sar_kd.config.fields import RunConfig, Section, is_date, option, require
from sar_kd.config.sections import DeviceConfig, OutputConfig, model_option
from sar_kd.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class WriteConfig(Section):
    """Text: which teacher writes it, behind which prompts, and where to."""

    teacher_model: str = model_option("teacher")
    trust_remote_code: bool = option(False, "run model code that comes with a checkpoint")
    prompts: tuple[str, ...] = option(
        (), "files as for --train_file: of a conversation all before its last answer, of a text its beginning"
    )
    output: str = option(
        "", "the .jsonl file to write, a --train_file as it is; an interrupted one is continued",
        not_empty="name a .jsonl file",
    )  # fmt: skip
    text_field: str = option("text", "field or column with the text of an example that is no conversation")
    prompt_tokens: int = option(32, "plain text: tokens of each document that the teacher continues", at_least=1)
    samples: int = option(1, "answers to each prompt", at_least=1)
    sample_temperature: float = option(0.7, "temperature of sampling; 0: greedy", at_least=0)
    sample_top_p: float = option(0.9, "sample from the fewest tokens with this total probability", positive=True)
    max_new_tokens: int = option(256, "longest answer in tokens", at_least=1)
    keep_unfinished: bool = option(False, "keep answers that have not ended within --max_new_tokens")
    repeat_limit: int = option(
        3, "drop an answer whose end is a phrase of two tokens or more, so many times in a row; 0: keep it", at_least=0
    )
    per_device_batch_size: int = option(8, "answers that are written together", at_least=1)
    template_date: str = option("", "the date that a chat template writes, such as 2026-01-31; by default today's")
    seed: int = option(0, "seed of sampling", at_least=0)
    overwrite: bool = option(False, "delete --output and start again")

    def __post_init__(self):
        super().__post_init__()
        if not self.prompts:
            raise UsageError("write: there is nothing to answer; give --prompts FILE")
        require(self.output.endswith(".jsonl"), "output", self.output, "must be a .jsonl file")
        require(self.sample_top_p <= 1.0, "sample_top_p", self.sample_top_p, "must be at most 1")
        require(self.repeat_limit != 1, "repeat_limit", 1, "every answer has such an end; give 2 or more, or 0")
        require(
            not self.template_date or is_date(self.template_date), "template_date", self.template_date,
            "must be a date such as 2026-01-31",
        )  # fmt: skip
        if self.samples > 1 and not self.sample_temperature:
            raise UsageError(f"--samples {self.samples}: greedy answers are all the same; raise --sample_temperature")

    def what_decides(self) -> dict:
        """The settings on which the written text depends; models and prompts are compared by their content."""
        others = ("teacher_model", "trust_remote_code", "prompts", "output", "template_date", "overwrite")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in others}


@dataclass(frozen=True, kw_only=True)
class WritingConfig(RunConfig):
    """Everything that written text is made from."""

    write: WriteConfig = field(default_factory=WriteConfig)
    precision: DeviceConfig = field(default_factory=DeviceConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
