"""Settings of `python -m sar_kd sft`: those of a distillation run where they mean the same, and no teacher's."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from sar_kd.arguments import Verb
from sar_kd.config import EMBEDDED, AdamWConfig, DataConfig, GuardConfig, LossConfig, PrecisionConfig, TrainConfig
from sar_kd.lora import LoraConfig
from sar_kd.memory_config import AUTO_BATCH, MemoryConfig
from sar_kd.presets import TASKS
from sar_kd.settings import RunConfig, flag, require, require_at_least, require_positive

EMBEDDED_LR_FACTOR = 10.0
"""What the embedded student's rate is multiplied by: it is far smaller than the models that 2e-4 is meant for."""

CROSS_ENTROPY = LossConfig(alpha_kd=0.0, alpha_ce=1.0, logit_clamp_style="off", loss_clamp_style="off")
"""The distillation step with one term."""

_NEVER = 2**62


@dataclass(frozen=True, kw_only=True)
class SftModelConfig:
    """Model: which one to fine-tune."""

    student_model: str = flag(EMBEDDED, "directory or hub id; 'embedded' is the student shipped with the package")
    trust_remote_code: bool = flag(False, "run model code that comes with a checkpoint")

    def __post_init__(self):
        require(bool(self.student_model), "student_model", "''", "give a directory or a hub id")


@dataclass(frozen=True, kw_only=True)
class SftOptimConfig(AdamWConfig):
    """Optimizer: AdamW, linear warm-up, cosine decay to a tenth."""

    learning_rate: float = flag(2e-4, "peak learning rate")

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

    fewest_steps = 0

    epochs: float = flag(1.0, "times that every example is seen, where --train_steps is not given")
    train_steps: int = flag(0, "attempted optimizer updates; 0: as many as --epochs come to")
    max_steps: int = flag(0, "end after so many steps, whatever the flags above say: a quick check; 0: no such end")
    per_device_batch_size: int = flag(8, AUTO_BATCH.format(what="examples"), auto=True)
    eval_steps: int = flag(200, "validate every so many steps; also at the start and at the end")
    log_steps: int = flag(10, "print a line every so many steps; every step where --max_steps is given")
    save_strategy: str = flag(
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
    loss: LossConfig = field(default=CROSS_ENTROPY, metadata={"flags": False})
    mode: str = "sft"

    def over(self, num_examples: int) -> SftConfig:
        """The same with its calendar in steps, for so many training examples."""
        return dataclasses.replace(self, train=self.train.over(num_examples))

    def headline(self) -> list[str]:
        """What the run is, for its first lines."""
        rank = self.lora.lora_rank
        how = f"LoRA of rank {rank}" if rank else "every weight learns"
        return [f"Supervised fine-tuning of {self.models.student_model}, {how}, run folder {self.train.output_dir}"]


SFT = Verb(
    name="sft",
    description="Fine-tune a causal language model on questions with answers, in fp16, without NaN.",
    kind=SftConfig,
    defaults={"max_grad_norm": 1.0, "skip_rule": "adaptive", "skip_factor": 4.0},
    tasks={"units": {**TASKS["units"], "warmup_steps": 50, "log_steps": 100}},
    embedded_lr_factor=EMBEDDED_LR_FACTOR,
)
