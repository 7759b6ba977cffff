"""Each kind of training as a configuration made of sections: `Config` (distillation) and `SftConfig` (fine-tuning);
and the sections that only one of them has.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from sar_kd.config.fields import RunConfig, Section, option, require
from sar_kd.config.hand_over import HandOverConfig
from sar_kd.config.lora import LoraConfig
from sar_kd.config.sections import (
    AUTO_BATCH,
    EMBEDDED,
    SELF,
    DataConfig,
    DistillationDataConfig,
    GuardConfig,
    LossConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    TeacherMemoryConfig,
    TrainConfig,
    model_option,
)
from sar_kd.errors import UsageError

ROUTER_PATTERNS = "regular expressions for the full names of the routers; by default class and structure find them"
"""The help of `--router_patterns`."""


@dataclass(frozen=True, kw_only=True)
class RoutingConfig(Section):
    """Routing: which experts of a mixture-of-experts teacher are active, and whether its routers learn."""

    routing: str = option(
        "native",
        "native: the teacher's own top-k; all: every expert; ka: all experts but one (see --ka_lambda); sar: the "
        "routers learn from the student (see --sar_routing); auto: sar for a mixture of experts, native for a dense "
        "teacher",
        choices=("auto", "native", "all", "sar", "ka"),
    )
    router_patterns: tuple[str, ...] = option((), ROUTER_PATTERNS, metavar="REGEX")
    sar_schedule: str = option(
        "joint",
        "joint: one teacher forward for both updates; two_stage: update the routers first, then the student with the "
        "updated teacher",
        choices=("two_stage", "joint"),
    )
    sar_routing: str = option(
        "auto",
        "active experts in sar; all: every expert; native: the teacher's own top-k, cheaper; auto: all, unless that "
        "raises the teacher's perplexity by more than 5 %%",
        choices=("auto", "all", "native"),
    )
    router_lr: float = option(1e-5, "peak learning rate of the routers", at_least=0)
    router_beta: float = option(0.01, "weight of the load balancing loss, CV^2 of the expert probabilities", at_least=0)
    router_anchor: float = option(0.1, "weight of the routers' relative squared distance from the start", at_least=0)
    router_direction: str = option(
        "forward",
        "divergence that the routers minimize; forward: KL(teacher || student); reverse: KL(student || teacher); jsd: "
        "Jensen-Shannon divergence",
        choices=("forward", "reverse", "jsd"),
    )
    router_max_grad_norm: float = option(0.5, "router gradients are clipped to this L2 norm", positive=True)
    router_stop_on_drift: bool = option(False, "stop training the routers at an alarm (entropy, teacher perplexity)")
    activation_checkpointing: bool = option(
        False, "recompute the teacher's activations in backward: less memory, one more teacher forward"
    )
    ka_lambda: float = option(0.05, "ka: probability that a token drops a random expert, not the least likely one")
    ka_passes: int = option(2, "ka: consecutive steps on the same text, each with other experts dropped", at_least=1)

    def __post_init__(self):
        super().__post_init__()
        require(0.0 <= self.ka_lambda <= 1.0, "ka_lambda", self.ka_lambda, "must be between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig(Section):
    """On-policy: the student generates text and learns from the teacher's logits on it."""

    recipe: str = option(
        "",
        "a set of options; on-policy: first the teacher's own text, then half of it the student's, in short responses "
        "at a low rate; sar-paper, ka-paper: Algorithm 2 or 1 of arXiv 2502.12947, the run lists what differs",
        choices=("", "on-policy", "sar-paper", "ka-paper"),
    )
    on_policy_fraction: float = option(0.0, "share of micro-batches whose responses the student generates; 1: all")
    on_policy_start: float = option(0.0, "share of the steps before the first generated response")
    sample_temperature: float = option(1.0, "temperature of the student's generation; 0: greedy", at_least=0)
    sample_top_p: float = option(1.0, "sample from the fewest tokens with this total probability", positive=True)
    max_new_tokens: int = option(128, "longest generated response in tokens, within a block", at_least=1)
    replay_size: int = option(0, "generated responses to keep and train on again; 0: each is used once", at_least=0)
    replay_fraction: float = option(0.5, "share of the on-policy micro-batches taken from the kept responses")
    keep_last: bool = option(False, "save the student of the last step too, in last_student/, beside the best one")

    def __post_init__(self):
        super().__post_init__()
        for name in ("on_policy_fraction", "on_policy_start", "replay_fraction"):
            require(0.0 <= getattr(self, name) <= 1.0, name, getattr(self, name), "must be between 0 and 1")
        require(self.on_policy_start < 1.0, "on_policy_start", self.on_policy_start,
                "must be below 1, or nothing is generated")  # fmt: skip
        require(self.recipe != "on-policy" or self.on_policy_fraction > 0.0, "on_policy_fraction",
                self.on_policy_fraction, "must be above 0 with --recipe on-policy")  # fmt: skip
        require(self.sample_top_p <= 1.0, "sample_top_p", self.sample_top_p, "must be at most 1")
        require(self.replay_fraction < 1.0 or not self.replay_size, "replay_fraction", self.replay_fraction,
                "must be below 1, or nothing is generated")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig(Section):
    """Control: the same student, start and batches by cross-entropy alone (alpha_kd 0, alpha_ce 1), to compare with."""

    control: bool = option(False, "after the run train the control too, in OUTPUT_DIR-control, and compare with it")
    skip_baseline: bool = option(False, "with --task, which trains a control unless told otherwise: train none")


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Everything a distillation run is made from; each module gets its own section."""

    models: ModelConfig = field(default_factory=ModelConfig)
    data: DistillationDataConfig = field(default_factory=DistillationDataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    on_policy: OnPolicyConfig = field(default_factory=OnPolicyConfig)
    comparison: ComparisonConfig = field(default_factory=ComparisonConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    memory: TeacherMemoryConfig = field(default_factory=TeacherMemoryConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    hand_over: HandOverConfig = field(default_factory=HandOverConfig)

    def __post_init__(self):
        fraction = self.on_policy.on_policy_fraction
        uses_teacher = self.loss.alpha_kd > 0 or not fraction
        require(uses_teacher, "on_policy_fraction", fraction, "generated text is learned by --alpha_kd, which is 0")
        if self.comparison.control and not self.loss.alpha_kd:
            raise UsageError("--control: --alpha_kd is 0, so the run is by cross-entropy alone itself; leave it out")
        routing = self.routing.routing
        obstacle = self.routing_obstacle(routing == "sar", self.train.parallel == "fsdp")
        if routing in ("all", "ka", "sar") and obstacle:
            raise UsageError(f"--routing {routing}: {'; '.join(obstacle)}")
        _require_fitting_optimizer(self)
        if self.models.teacher_model == SELF:
            self._require_own_base()
        is_sharded, rank = self.train.parallel == "fsdp", self.lora.lora_rank
        require(not (is_sharded and rank), "lora_rank", rank,
                "with --parallel fsdp no device has the whole student that an adapter belongs to; use --parallel ddp, "
                "under which the frozen weights are half the size")  # fmt: skip
        if self.data.task and self.models.teacher_cache:
            learns_first = self.models.teacher_model == EMBEDDED and self.data.task_teacher_steps > 0
            require(not learns_first, "teacher_cache", self.models.teacher_cache,
                    "--task first fine-tunes the embedded teacher, so the cache is not of this teacher; give the "
                    "fine-tuned one as --teacher_model, and a cache made with it")  # fmt: skip

    @property
    def has_control(self) -> bool:
        """Is a control trained after the run?"""
        asked = self.comparison.control or (bool(self.data.task) and not self.comparison.skip_baseline)
        return asked and self.loss.alpha_kd > 0

    def _require_own_base(self) -> None:
        """Raise UsageError where the student cannot be its own teacher."""
        memory, routing = self.memory, self.routing.routing
        refusals = {
            "is the student without its adapter; give --lora_rank": self.lora.lora_rank == 0,
            "is not used, as --alpha_kd is 0": self.loss.alpha_kd == 0,
            "is in no cache; leave out --teacher_cache": bool(self.models.teacher_cache),
            f"its experts are the student's, so --routing {routing} would change both; use --routing native":
                routing not in ("native", "auto"),
            "has no weights of its own; leave out the options of the teacher's memory":
                bool(memory.placement() or memory.offload_teacher_to_cpu or memory.teacher_quantization != "off"),
        }  # fmt: skip
        for reason, is_refused in refusals.items():
            require(not is_refused, "teacher_model", SELF, reason)

    def routing_obstacle(self, trains_routers: bool, is_sharded: bool) -> tuple[str, str] | None:
        """Why no routing but the native one is possible with these settings, and the remedy; None if one is.

        is_sharded: the student's weights are sharded over devices
        """
        if self.loss.alpha_kd == 0:
            return "distillation is off (--alpha_kd is 0)", "use --routing native"
        if not trains_routers:
            return None
        if self.models.teacher_model == SELF:
            return "--teacher_model self has the student's routers", "use --routing native"
        if self.loss.alignment == "hidden":
            reason = "--alignment hidden compares no probabilities, from which routers learn"
            return reason, "use another alignment, or --routing all"
        if is_sharded:
            reason = "with --parallel fsdp no device has the whole student, from which routers learn"
            return reason, "use --parallel ddp, or --routing all"
        if self.memory.routers_frozen_reason:
            return self.memory.routers_frozen_reason, "use --routing all or native"
        return None

    def summary_lines(self) -> list[str]:
        """The run in its first line, and further lines that few people need."""
        models, loss = self.models, self.loss
        what = f"Distilling {models.teacher_model} into {models.student_model}"
        what = what if loss.alpha_kd else f"Training {models.student_model} by cross-entropy alone"
        mode = preset_name(self.mode, self.on_policy.recipe)
        return [
            f"{what}, {self.lora.describe()}, {mode}; run folder {self.train.output_dir}",
            f"Loss: {loss.alpha_ce:g} * ce + {loss.alpha_kd:g} * kd at temperature {loss.temperature:g}, "
            "shown unclamped",
        ]


def preset_name(mode: object, recipe: object) -> str:
    """Where the values of a run's options come from, as its first line and its page say it."""
    return f"mode {mode} with the values of recipe {recipe}" if recipe else f"mode {mode}"


SECTIONS = Config.sections()


def _require_fitting_optimizer(config: RunConfig) -> None:
    optimizer, sharded = config.optim.optimizer, config.train.parallel == "fsdp"
    require(optimizer == "adamw" or not sharded, "optimizer", optimizer,
            "its state is not sharded; with --parallel fsdp use adamw")  # fmt: skip
    require(optimizer != "adafactor" or not config.lora.lora_rank, "optimizer", optimizer,
            "its steps are relative to the size of a weight, and an adapter begins at 0; with --lora_rank use adamw, "
            "whose state is small for an adapter")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SftModelConfig(Section):
    """Model: which one to fine-tune."""

    student_model: str = model_option("student")
    trust_remote_code: bool = option(False, "run model code that comes with a checkpoint")


@dataclass(frozen=True, kw_only=True)
class SftOptimConfig(OptimConfig):
    """Optimizer: which one; linear warm-up, then cosine decay to 10 %."""

    student_lr: float = option(2e-4, "peak learning rate", positive=True, aliases=("learning_rate",))


_NEVER = 2**62


@dataclass(frozen=True, kw_only=True)
class SftTrainConfig(TrainConfig):
    """Run: how long, how often, where to. A step is one attempted update, applied or skipped."""

    epochs: float = option(1.0, "passes over the examples, if --train_steps is not given", positive=True)
    train_steps: int = option(0, "attempted optimizer updates; 0: as many as --epochs takes", at_least=0)
    max_steps: int = option(0, "stop after this many steps in any case, for a quick check; 0: no limit", at_least=0)
    per_device_batch_size: int = option(8, AUTO_BATCH.format(what="examples"), at_least=1, auto=True)
    eval_steps: int = option(200, "steps between validations; also one at the start and one at the end", at_least=1)
    log_steps: int = option(10, "steps between printed lines; with --max_steps every step is printed", at_least=1)
    save_strategy: str = option(
        "epoch",
        "when to save a checkpoint; epoch: after each; steps: every --save_steps; no: only at the end or if "
        "interrupted; the best student is saved at each validation in any case",
        choices=("epoch", "steps", "no"),
    )

    def in_steps(self, num_examples: int) -> SftTrainConfig:
        """The same run with its length and its checkpoints in steps, for this number of training examples."""
        steps_per_epoch = max(1, math.ceil(num_examples / (self.per_device_batch_size * self.grad_accum_steps)))
        steps = self.train_steps or math.ceil(self.epochs * steps_per_epoch)
        saves = {"epoch": steps_per_epoch, "steps": self.save_steps, "no": _NEVER}[self.save_strategy]
        return dataclasses.replace(
            self,
            train_steps=min(steps, self.max_steps or steps),
            save_steps=saves,
            log_steps=1 if self.max_steps else self.log_steps,
        )


CROSS_ENTROPY = LossConfig(alpha_kd=0.0, alpha_ce=1.0, logit_clamp_style="off", loss_clamp_style="off")
"""The distillation loss with one term."""


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
    hand_over: HandOverConfig = field(default_factory=HandOverConfig)
    loss: LossConfig = field(default=CROSS_ENTROPY, metadata={"options": False})
    mode: str = "sft"

    def __post_init__(self):
        _require_fitting_optimizer(self)

    def in_steps(self, num_examples: int) -> SftConfig:
        """The same run with its length and its checkpoints in steps, for this number of training examples."""
        return dataclasses.replace(self, train=self.train.in_steps(num_examples))

    def summary_lines(self) -> list[str]:
        """The run in its first line."""
        return [f"Fine-tuning {self.models.student_model}, {self.lora.describe()}; run folder {self.train.output_dir}"]
