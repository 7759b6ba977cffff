"""`sar-kd eval`: which models of a run answer which tasks of lm-evaluation-harness, and how."""

from __future__ import annotations

from dataclasses import dataclass

from sar_kd.config.fields import Section, option, require

MODELS = ("start", "control", "distilled", "teacher")

UNIT_CONVERSION = "unit_conversion"
"""The task that ships with the package"""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section):
    """Evaluation: which models of a run, on which tasks."""

    run: str = option("", "a run folder", metavar="RUN_DIR", positional=True)
    which: tuple[str, ...] = option(
        ("distilled",), f"which of its models: {', '.join(MODELS)}, one or more", metavar="MODEL"
    )
    tasks: tuple[str, ...] = option(
        (UNIT_CONVERSION,),
        "tasks of lm-evaluation-harness, or .yaml files of tasks; unit_conversion ships with this package and needs no "
        "download",
        metavar="TASK",
    )
    limit: int = option(0, "only the first questions of each task; 0: all", at_least=0)
    num_fewshot: int = option(-1, "examples before each question; -1: as the task says", at_least=-1)
    apply_chat_template: bool = option(False, "make each question a user message in the model's chat template")
    add_bos_token: bool = option(
        False, "put the start token before each prompt, as it begins each block of a run, where the tokenizer puts none"
    )
    per_device_batch_size: int = option(8, "questions in one forward", at_least=1)
    model_dtype: str = option(
        "", "compute dtype; by default the run's", choices=("", "auto", "float16", "bfloat16", "float32")
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    trust_remote_code: bool = option(False, "run model code that comes with a checkpoint")
    json: bool = option(False, "print JSON")

    def __post_init__(self):
        super().__post_init__()
        for name in self.which:
            require(name in MODELS, "which", name, f"must be {', '.join(MODELS)}")
        require(bool(self.which and self.tasks), "tasks", "''", "give at least one model and one task")
