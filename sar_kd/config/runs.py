"""Settings of a mixture-of-experts teacher: how it chooses its experts, and how its routers learn.

Settings of on-policy distillation: how much of the text the student writes itself, and how it writes.

Settings of `python -m sar_kd sft`: those of a distillation run where they mean the same, and no teacher's.

Settings of `python -m sar_kd cache`: which teacher, over which text, and how much of what it says is kept.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

from sar_kd.config.fields import RunConfig, option, require, require_at_least, require_positive
from sar_kd.config.sections import (
    AUTO_BATCH,
    EMBEDDED,
    AdamWConfig,
    DataConfig,
    GuardConfig,
    LoraConfig,
    LossConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    PrecisionConfig,
    TeacherMemoryConfig,
    TrainConfig,
)

ROUTER_PATTERNS = "regular expressions that match the routers' full names; by default class and structure find them"


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """Routing: how a mixture-of-experts teacher chooses its experts, and whether its routers learn from the student."""

    routing: str = option(
        "native",
        "native: the teacher's own; all: every expert; ka: every expert but one, drawn anew; sar: the routers learn "
        "from the student (see --sar_routing); auto: sar for a mixture of experts, native for a dense teacher",
        choices=("auto", "native", "all", "sar", "ka"),
    )
    router_patterns: tuple[str, ...] = option((), ROUTER_PATTERNS, metavar="REGEX")
    sar_schedule: str = option(
        "joint",
        "joint: both updates from one teacher forward; two_stage: the routers' first, then the student's with the "
        "updated teacher",
        choices=("two_stage", "joint"),
    )
    sar_routing: str = option(
        "auto",
        "experts that are active in sar; all: every one; native: the teacher's own choice, cheaper; auto: all, unless "
        "that makes the teacher's perplexity more than 5 %% worse",
        choices=("auto", "all", "native"),
    )
    router_lr: float = option(1e-5, "peak learning rate of the routers")
    router_beta: float = option(0.01, "weight of the load balance, CV^2 of the experts' probabilities")
    router_anchor: float = option(0.1, "weight of the routers' squared distance from where they began, relative")
    router_direction: str = option(
        "forward",
        "what the routers lower; forward: KL(teacher || student), reverse: KL(student || teacher), jsd: between them",
        choices=("forward", "reverse", "jsd"),
    )
    router_max_grad_norm: float = option(0.5, "the routers' gradients are clipped to this L2 norm")
    router_stop_on_drift: bool = option(False, "at an alarm (entropy, teacher perplexity) the routers stop learning")
    activation_checkpointing: bool = option(
        False, "compute the teacher's activations anew in backward: less memory, one more teacher forward"
    )
    ka_lambda: float = option(0.05, "ka: probability that a token's experts are drawn instead of taken by rank")
    ka_passes: int = option(2, "ka: steps in a row on the same text, each with experts drawn anew")

    def __post_init__(self):
        require_at_least(self, 0.0, "router_lr", "router_beta", "router_anchor")
        require_positive(self, "router_max_grad_norm")
        require_at_least(self, 1, "ka_passes")
        require(0.0 <= self.ka_lambda <= 1.0, "ka_lambda", self.ka_lambda, "must be between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig:
    """On-policy: the student learns, from the teacher alone, on what it writes itself."""

    recipe: str = option(
        "",
        "sar-paper, ka-paper: Algorithm 2, or 1, of arXiv 2502.12947 with its values; says what differs from it",
        choices=("", "sar-paper", "ka-paper"),
    )
    on_policy_fraction: float = option(
        0.0, "share of the micro-batches in which the student's own text stands behind the prompt; 1: all of them"
    )
    sample_temperature: float = option(1.0, "temperature at which the student writes; 0: the likeliest token each time")
    sample_top_p: float = option(1.0, "it draws from the fewest tokens that together have this probability")
    max_new_tokens: int = option(128, "tokens that it writes at most, within a block")
    replay_size: int = option(0, "responses to keep and learn from again; 0: each is used once")
    replay_fraction: float = option(0.5, "share of the on-policy micro-batches that are taken from those kept")

    def __post_init__(self):
        for name in ("on_policy_fraction", "replay_fraction"):
            require(0.0 <= getattr(self, name) <= 1.0, name, getattr(self, name), "must be between 0 and 1")
        require_at_least(self, 0, "sample_temperature", "replay_size")
        require_at_least(self, 1, "max_new_tokens")
        require_positive(self, "sample_top_p")
        require(self.sample_top_p <= 1.0, "sample_top_p", self.sample_top_p, "must be at most 1")
        require(self.replay_fraction < 1.0 or not self.replay_size, "replay_fraction", self.replay_fraction,
                "must be below 1, or nothing would be written")  # fmt: skip


CROSS_ENTROPY = LossConfig(alpha_kd=0.0, alpha_ce=1.0, logit_clamp_style="off", loss_clamp_style="off")
"""The distillation step with one term."""

_NEVER = 2**62


@dataclass(frozen=True, kw_only=True)
class SftModelConfig:
    """Model: which one to fine-tune."""

    student_model: str = option(EMBEDDED, "directory or hub id; 'embedded' is the student shipped with the package")
    trust_remote_code: bool = option(False, "run model code that comes with a checkpoint")

    def __post_init__(self):
        require(bool(self.student_model), "student_model", "''", "give a directory or a hub id")


@dataclass(frozen=True, kw_only=True)
class SftOptimConfig(AdamWConfig):
    """Optimizer: AdamW, linear warm-up, cosine decay to a tenth."""

    learning_rate: float = option(2e-4, "peak learning rate")

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "learning_rate")

    @property
    def student_lr(self) -> float:
        """The rate by the name that the optimizer knows."""
        return self.learning_rate


@dataclass(frozen=True, kw_only=True)
class SftTrainConfig(TrainConfig):
    """Run: how long, how often, where to. A step is one attempted update, applied or skipped."""

    min_train_steps: ClassVar[int] = 0

    epochs: float = option(1.0, "times that every example is seen, where --train_steps is not given")
    train_steps: int = option(0, "attempted optimizer updates; 0: as many as --epochs come to")
    max_steps: int = option(0, "end after so many steps, whatever the flags above say: a quick check; 0: no such end")
    per_device_batch_size: int = option(8, AUTO_BATCH.format(what="examples"), auto=True)
    eval_steps: int = option(200, "validate every so many steps; also at the start and at the end")
    log_steps: int = option(10, "print a line every so many steps; every step where --max_steps is given")
    save_strategy: str = option(
        "epoch",
        "when to write a checkpoint: after every epoch, every --save_steps steps, or no: at the end and if interrupted "
        "only; the best student so far is saved at each validation in any case",
        choices=("epoch", "steps", "no"),
    )

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "epochs")
        require_at_least(self, 0, "max_steps")

    def over(self, num_examples: int) -> SftTrainConfig:
        """The same with its calendar in steps, for so many training examples."""
        steps_an_epoch = max(1, math.ceil(num_examples / (self.per_device_batch_size * self.grad_accum_steps)))
        steps = self.train_steps or math.ceil(self.epochs * steps_an_epoch)
        saves = {"epoch": steps_an_epoch, "steps": self.save_steps, "no": _NEVER}[self.save_strategy]
        return dataclasses.replace(
            self,
            train_steps=min(steps, self.max_steps or steps),
            save_steps=saves,
            log_steps=1 if self.max_steps else self.log_steps,
        )


@dataclass(frozen=True, kw_only=True)
class SftConfig(RunConfig):
    """Everything a fine-tuning run is made from."""

    models: SftModelConfig = field(default_factory=SftModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: SftOptimConfig = field(default_factory=SftOptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    train: SftTrainConfig = field(default_factory=SftTrainConfig)
    loss: LossConfig = field(default=CROSS_ENTROPY, metadata={"options": False})
    mode: str = "sft"

    def over(self, num_examples: int) -> SftConfig:
        """The same with its calendar in steps, for so many training examples."""
        return dataclasses.replace(self, train=self.train.over(num_examples))

    def summary_lines(self) -> list[str]:
        """What the run is, for its first lines."""
        rank = self.lora.lora_rank
        how = f"LoRA of rank {rank}" if rank else "every weight learns"
        return [f"Supervised fine-tuning of {self.models.student_model}, {how}, run folder {self.train.output_dir}"]


_NUMBER = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Cache: which teacher, what is kept of it, and where."""

    teacher_model: str = option(EMBEDDED, "directory or hub id; 'embedded' is the teacher shipped with the package")
    student_model: str = option(
        "",
        "cut the text as a run with this student would, so that its blocks are as without a cache; other students can "
        "use the cache too. By default one that reads as the teacher does; with the embedded teacher, its student",
    )
    trust_remote_code: bool = option(False, "run model code that comes with a checkpoint")
    teacher_cache: str = option("teacher_cache", "folder of the cache; one that was interrupted goes on")
    teacher_top_k: int = option(32, "of each teacher row so many tokens are kept, the likeliest")
    temperatures: tuple[str, ...] = option(
        ("1", "1.5", "2"),
        "what a run's --temperature may be: at each the mass of all other tokens is kept",
        metavar="T",
    )
    per_device_batch_size: int = option(4, "blocks that the teacher reads at once")
    loss_workspace_mb: int = option(64, "memory for logits, which are made and used in tiles of so many MiB")
    overwrite: bool = option(False, "start again in a --teacher_cache that holds one")

    def __post_init__(self):
        require(bool(self.teacher_model), "teacher_model", "''", "give a directory or a hub id")
        require(bool(self.teacher_cache), "teacher_cache", "''", "give a folder")
        require_at_least(self, 1, "teacher_top_k", "per_device_batch_size", "loss_workspace_mb")

        self.floats()

    def floats(self) -> list[float]:
        """The temperatures as numbers, each once, ascending."""
        found = set()
        for text in self.temperatures:
            value = float(text) if _NUMBER.fullmatch(text) else 0.0
            require(value > 0, "temperatures", " ".join(self.temperatures), "must be numbers above 0")
            found.add(value)
        return sorted(found)

    @property
    def tokenizer_of(self) -> str:
        """Whose tokenizer decides where the text is cut."""
        return self.student_model or (EMBEDDED if self.teacher_model == EMBEDDED else "")


@dataclass(frozen=True, kw_only=True)
class CachingConfig(RunConfig):
    """Everything that a teacher cache is made from."""

    cache: CacheConfig = field(default_factory=CacheConfig)
    data: DataConfig = field(default_factory=DataConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    mode: str = "cache"


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Everything a distillation run is made from; each module is handed its own part."""

    models: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    on_policy: OnPolicyConfig = field(default_factory=OnPolicyConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    memory: TeacherMemoryConfig = field(default_factory=TeacherMemoryConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        fraction = self.on_policy.on_policy_fraction
        taught = self.loss.alpha_kd > 0 or not fraction
        require(taught, "on_policy_fraction", fraction, "its own text teaches the student by --alpha_kd, which is 0")

    def summary_lines(self) -> list[str]:
        """What the run is, for its first lines."""
        models, loss = self.models, self.loss
        return [
            f"Mode {self.mode}, teacher {models.teacher_model}, student {models.student_model}, run folder "
            f"{self.train.output_dir}",
            f"loss = {loss.alpha_ce:g} * ce + {loss.alpha_kd:g} * kd at temperature {loss.temperature:g}, "
            "shown unclamped",
        ]


SECTIONS = MappingProxyType(Config.sections())
