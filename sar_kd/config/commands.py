"""Every command with its options: what `sar-kd COMMAND --help` shows, and what a command line is checked against.

No torch: help and mistakes are answered before a command's own module, and torch with it, is imported.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from sar_kd.config.caching import ELSEWHERE, CachingConfig
from sar_kd.config.evaluating import EvalConfig
from sar_kd.config.exporting import ExportConfig
from sar_kd.config.fields import GIVEN, Command, RunConfig, Section, option
from sar_kd.config.presets import STABLE, TASKS
from sar_kd.config.runs import ROUTER_PATTERNS, Config, SftConfig
from sar_kd.config.sections import DataConfig, OutputConfig, PairConfig, model_option
from sar_kd.config.shrinking import ShrinkingConfig
from sar_kd.config.writing import WritingConfig

TRAIN = dataclasses.replace(STABLE, name="train")


@dataclass(frozen=True, kw_only=True)
class PreflightConfig(Config):
    """A distillation run to check, and the output of the checks."""

    output: OutputConfig = field(default_factory=OutputConfig)


PREFLIGHT = dataclasses.replace(
    STABLE,
    name="preflight",
    description="Check a run with these options; nothing is trained.",
    config=PreflightConfig,
    entry="preflight:main",
)

SFT = Command(
    "sft",
    "Fine-tune a causal language model on questions with answers, in fp16, without NaN.",
    SftConfig,
    "sft:fine_tune",
    defaults={"max_grad_norm": 1.0},
    presets={"task": {"units": {**TASKS["units"], "warmup_steps": 50, "log_steps": 100}}},
    embedded_lr_factors={"student_lr": 10.0},  # it is far smaller than the models that 2e-4 is meant for
    run_name="sft",
)

CACHE = Command(
    "cache",
    "Run a teacher once over a text and store its logits, for runs that do not load it.",
    CachingConfig,
    "cache:main",
    presets={
        "keep": {"topk": {"teacher_top_k": 32}},
        "teacher_device_map": {"auto": {"per_device_batch_size": 32}},  # many blocks for each copy of a layer
        "from_logprobs": {GIVEN: ELSEWHERE},
        "teacher_url": {GIVEN: ELSEWHERE},
    },
)

WRITE = Command(
    "write",
    "Let a teacher answer prompts, or continue texts, and write what a student trains on.",
    WritingConfig,
    "write:main",
)


@dataclass(frozen=True, kw_only=True)
class AuditConfig(RunConfig):
    """Two tokenizers, and the text to compare them on."""

    models: PairConfig = field(default_factory=PairConfig)
    data: DataConfig = field(default_factory=DataConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


AUDIT = Command("audit", "Show how two tokenizers align on a text; nothing is trained.", AuditConfig, "audit:main")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Section):
    """Runs: which ones to show, and where to write the page."""

    runs: tuple[str, ...] = option(
        (), "run folders; several are compared on one page", metavar="RUN_DIR", positional=True
    )
    output: str = option("", "file to write; by default report.html, in the run folder or, for several runs, here")
    json: bool = option(False, "print JSON")


REPORT = Command("report", "Show a run, or compare several, on one HTML page.", ReportConfig, "report:main")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Section):
    """Runs: which ones to compare."""

    runs: tuple[str, ...] = option(
        (), "folders of runs with the same held-out text; a single one is compared with its control",
        metavar="RUN_DIR", positional=True,
    )  # fmt: skip
    json: bool = option(False, "print JSON")


COMPARE = Command(
    "compare",
    "Tell whether one run is better than another, by their held-out documents.",
    CompareConfig,
    "compare:main",
)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Section):
    """Generation: which models continue the prompt, and how."""

    run: str = option(
        "", "a run folder: its teacher, the student before and after; or any model: a folder, a file or a hub id",
        metavar="RUN_OR_MODEL", positional=True,
    )  # fmt: skip
    prompt: str = option("", "the text to continue", metavar="PROMPT", positional=True)
    max_new_tokens: int = option(60, "longest continuation in tokens", at_least=1)
    sample_temperature: float = option(0.7, "temperature of sampling; 0: greedy", at_least=0)
    sample_top_p: float = option(0.9, "sample from the fewest tokens with this total probability", positive=True)
    repetition_penalty: float = option(1.1, "above 1: makes tokens that occur already less likely", at_least=1)
    trust_remote_code: bool = option(False, "run model code that comes with a checkpoint")
    chat: bool = option(False, "make the prompt a user message in the model's chat template")
    seed: int = option(0, "seed of sampling", at_least=0)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    json: bool = option(False, "print JSON")


GENERATE = Command(
    "generate",
    "Continue a prompt with the models of a run (teacher, student before, student after), or with any model.",
    GenerateConfig,
    "generate:main",
)


EXPORT = Command(
    "export", "Write a student as a GGUF file for llama.cpp and Ollama, or upload it.", ExportConfig, "export:main"
)


EVAL = Command(
    "eval", "Let the models of a run answer the tasks of lm-evaluation-harness.", EvalConfig, "evaluate:main"
)


@dataclass(frozen=True, kw_only=True)
class ExplainConfig(Section):
    """Log: the one to explain."""

    log: str = option(
        "", "a Trainer's output, trainer_state.json, metrics.jsonl, or their folder", metavar="LOG", positional=True
    )
    json: bool = option(False, "print JSON")


EXPLAIN = Command(
    "explain",
    "Find the likely cause of the losses and gradient norms in a training log.",
    ExplainConfig,
    "explain:main",
)


@dataclass(frozen=True, kw_only=True)
class ForensicsConfig(Section):
    """Run: the one to look at."""

    run: str = option("", "a run folder", metavar="RUN_DIR", positional=True)
    json: bool = option(False, "print JSON")


FORENSICS = Command(
    "forensics", "Show why a step of a run was not finite, and what to try.", ForensicsConfig, "forensics:main"
)


@dataclass(frozen=True, kw_only=True)
class RoutersConfig(Section):
    """Model: whose routers to list."""

    model: str = model_option("teacher")
    router_patterns: tuple[str, ...] = option((), ROUTER_PATTERNS, metavar="REGEX")
    trust_remote_code: bool = option(False, "run model code that comes with a checkpoint")
    json: bool = option(False, "print JSON")


ROUTERS = Command(
    "routers", "List the routers of a mixture-of-experts model; nothing is trained.", RoutersConfig, "routers:main"
)

SHRINK = Command(
    "shrink", "Cut a model down to a smaller one, as a student for distillation.", ShrinkingConfig, "shrink:main"
)


@dataclass(frozen=True, kw_only=True)
class EmbeddedConfig(Section):
    """Training: how long, and where to save the models."""

    output_dir: str = option("", "new folder for both models", not_empty="give a folder for both models")
    teacher_steps: int = option(2400, "training steps of the teacher", at_least=0)
    student_steps: int = option(200, "training steps of the student", at_least=0)
    seed: int = option(0, "seed of weights, data order and noise", at_least=0)


EMBEDDED_PAIR = Command(
    "embedded",
    "Train the embedded teacher and student again, into a new folder: about 20 minutes on 2 cores.",
    EmbeddedConfig,
    "build_embedded:main",
)

_ALL: tuple[Command, ...] = (
    TRAIN, PREFLIGHT, CACHE, WRITE, SHRINK, REPORT, COMPARE, GENERATE, EVAL, EXPORT, SFT, EXPLAIN, FORENSICS, AUDIT,
    ROUTERS, EMBEDDED_PAIR,
)  # fmt: skip

COMMANDS: dict[str, Command] = {command.name: command for command in _ALL}
"""By name, in the order of the help"""
