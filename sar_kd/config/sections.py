"""What a run is: the settings, their legal values, and the modes.

Every field below is a flag of the same name. A mode is a set of values for some of those fields; any flag
given beside it wins, and no other code asks which mode it is in. Whatever a user can get wrong raises
`UsageError`, whose one line names the flag, its value and the remedy.

Settings of memory: what is kept, what is computed again or moved instead, how small the teacher's weights are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from sar_kd.config.fields import AUTO, option, require, require_at_least, require_positive, seconds_of
from sar_kd.errors import UsageError

EMBEDDED = "embedded"
"""The value of --teacher_model and --student_model that means the models shipped with the package."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Models: which teacher and which student."""

    teacher_model: str = option(EMBEDDED, "directory or hub id; 'embedded' is the pair shipped with the package")
    student_model: str = option(EMBEDDED, "directory or hub id; 'embedded' is the pair shipped with the package")
    trust_remote_code: bool = option(False, "run model code that comes with a checkpoint")
    teacher_cache: str = option(
        "", "folder that `sar-kd cache` made: what the teacher says is read there, its weights are not loaded"
    )

    def __post_init__(self):
        for name in ("teacher_model", "student_model"):
            require(bool(getattr(self, name)), name, "''", "give a directory or a hub id")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text: what the student reads; without any of these flags, the embedded text."""

    train_file: tuple[str, ...] = option(
        (), "text or conversations to train on: .txt, .jsonl or .jsonl.gz, one or more"
    )
    validation_file: tuple[str, ...] = option((), "held-out text; by default a part of the training text is held out")
    text_field: str = option(
        "text", "the field of a .jsonl line or a dataset row that holds the text; lines without it may be conversations"
    )
    dataset_name: str = option("", "a dataset for the `datasets` package: hub id or directory")
    dataset_config_name: str = option("", "its configuration, for example wikitext-103-raw-v1")
    task: str = option(
        "",
        "units: questions about units, made from a seed, with accuracy and answer rate measured on ones never seen; "
        "needs no text, and brings the defaults of a task",
        choices=("", "units"),
    )
    task_teacher_steps: int = option(
        1500, "steps for which a distillation run fine-tunes the embedded teacher on --task first; 0: as it is"
    )
    skip_baseline: bool = option(False, "with --task, train no student by cross-entropy alone to compare with")
    block_size: int = option(256, "tokens in a block, for the student; the teacher reads the same text")
    token_cache: str = option(
        "", "folder that keeps the tokens of a large text; by default sar_kd in the user's cache; 'off' keeps none"
    )

    def __post_init__(self):
        require_at_least(self, 0, "task_teacher_steps")
        require(self.block_size >= 8, "block_size", self.block_size, "must be at least 8 tokens")
        if self.task and (self.dataset_name or self.train_file):
            raise UsageError(f"--task {self.task}: makes its own text; leave out --train_file and --dataset_name")
        if self.dataset_name and self.train_file:
            raise UsageError(f"--dataset_name {self.dataset_name}: give it or --train_file, not both")
        if self.dataset_config_name and not self.dataset_name:
            raise UsageError(f"--dataset_config_name {self.dataset_config_name}: needs --dataset_name")
        if self.validation_file and not (self.train_file or self.dataset_name):
            raise UsageError(f"--validation_file {self.validation_file[0]}: needs --train_file or --dataset_name")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Loss: alpha_ce * CE(text) + alpha_kd * T^2 * D(teacher, student)."""

    temperature: float = option(2.0, "T: logits are divided by it before the softmax of the distillation term")
    alpha_kd: float = option(0.1, "weight of the distillation term; 0 trains by cross-entropy alone")
    alpha_ce: float = option(0.9, "weight of the cross-entropy term")
    logit_clamp: float = option(5.0, "c: logits count within [-c, c] in the training loss")
    logit_clamp_style: str = option(
        "normalized",
        "normalized: shift logits so that logsumexp = c, then floor at -c, gradient untouched; "
        "raw: clamp(z, -c, c) to the letter; off",
        choices=("normalized", "raw", "off"),
    )
    loss_clamp: float = option(6.0, "largest cross-entropy and largest total loss that count, in nats per token")
    loss_clamp_style: str = option(
        "scale",
        "scale: a loss above the limit is scaled down to it and keeps its gradient's direction; "
        "hard: clamp to the letter, no gradient above the limit; off",
        choices=("scale", "hard", "off"),
    )
    alignment: str = option(
        "auto",
        "auto: token by token where the tokenizers are equal, byte-prefix projection where they differ; "
        "projection: the projection in both cases; strict: same tokens of the same bytes; alm: likelihood of chunks; "
        "uld: sorted probabilities; hidden: last hidden states",
        choices=("auto", "projection", "strict", "alm", "uld", "hidden"),
    )
    kd_direction: str = option(
        "forward",
        "forward: KL(teacher || student); reverse: KL(student || teacher); jsd: between the two",
        choices=("forward", "reverse", "jsd"),
    )
    jsd_beta: float = option(0.5, "the teacher's share of the mixture in --kd_direction jsd")
    teacher_top_k: int = option(
        0, "of each teacher row so many tokens are told apart, the others are one outcome; 0: all"
    )
    alm_tau: float = option(5.0, "temperature of the chunk likelihoods in --alignment alm")
    loss_workspace_mb: int = option(64, "memory for logits, which are made and used in tiles of so many MiB")
    force: bool = option(False, "train even where preflight finds that nothing can be learned or memory is short")

    def __post_init__(self):
        require_positive(self, "temperature", "logit_clamp", "loss_clamp", "alm_tau")
        require_at_least(self, 0.0, "alpha_kd", "alpha_ce", "teacher_top_k")
        require_at_least(self, 1, "loss_workspace_mb")
        require(0.0 < self.jsd_beta < 1.0, "jsd_beta", self.jsd_beta, "must be above 0 and below 1")
        require(self.alpha_kd + self.alpha_ce > 0, "alpha_kd", self.alpha_kd, "is 0 and so is --alpha_ce: give one")


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """Optimizer: AdamW, linear warm-up, cosine decay to a tenth. What the rate is called is a subclass's matter."""

    weight_decay: float = option(0.01, "decoupled weight decay on matrices")
    warmup_steps: int = option(20, "steps over which the rate rises to its peak")
    lr_schedule: str = option("cosine", "shape of the rate after warm-up", choices=("cosine", "constant"))

    def __post_init__(self):
        require_at_least(self, 0, "weight_decay", "warmup_steps")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(AdamWConfig):
    """Optimizer: AdamW, linear warm-up, cosine decay to a tenth."""

    student_lr: float = option(1e-5, "peak learning rate of the student")

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "student_lr")


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Precision: where the run computes and in which dtype. Trainable weights are float32 always."""

    model_dtype: str = option(
        "auto",
        "compute dtype; auto is bfloat16 where the hardware has it, else float16 on CUDA, else float32",
        choices=("auto", "float16", "bfloat16", "float32"),
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    init_loss_scale: float = option(16384.0, "first factor of the GradScaler, a power of two")

    def __post_init__(self):
        known = self.device in ("auto", "cpu", "cuda") or self.device.removeprefix("cuda:").isdecimal()
        require(known, "device", self.device, "must be auto, cpu, cuda or cuda:N")
        fits = 1.0 <= self.init_loss_scale <= 2.0**24 and math.log2(self.init_loss_scale).is_integer()
        require(fits, "init_loss_scale", self.init_loss_scale, "must be a power of two between 1 and 16777216")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Guards: when an update is refused."""

    max_grad_norm: float = option(0.5, "gradients are clipped to this L2 norm")
    skip_grad_norm: float = option(2.0, "an update whose gradient norm is above this is skipped")
    skip_rule: str = option(
        "storm",
        "storm: skip above --skip_grad_norm until 80 %% of 50 attempts were skipped for it, then above "
        "--skip_factor times the median norm; adaptive: the median rule from the start; fixed: never adapts",
        choices=("storm", "fixed", "adaptive"),
    )
    skip_factor: float = option(2.0, "the median rule skips above this many times the median of recent norms")
    max_nan_batches: int = option(10, "emergency stop after this many consecutive NaN batches")
    on_divergence: str = option(
        "stop",
        "stop: after that many, save the last good student and exit with 3; rewind: once, go back to the last "
        "checkpoint, halve the learning rate and leave out the documents that were not finite",
        choices=("stop", "rewind"),
    )

    def __post_init__(self):
        require_positive(self, "max_grad_norm", "skip_grad_norm")
        require_at_least(self, 1, "skip_factor", "max_nan_batches")


AUTO_BATCH = "{what} in a micro-batch of each device; auto: as many as fit, with --grad_accum_steps to match"
"""The help of `--per_device_batch_size`."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Run: how long, how often, where to. A step is one attempted update, applied or skipped."""

    min_train_steps: ClassVar[int] = 1

    train_steps: int = option(500, "attempted optimizer updates")
    per_device_batch_size: int = option(4, AUTO_BATCH.format(what="blocks"), auto=True)
    grad_accum_steps: int = option(1, "micro-batches in a step")
    eval_steps: int = option(50, "validate every so many steps; also at the start and at the end")
    log_steps: int = option(25, "print a line every so many steps")
    save_steps: int = option(100, "write a checkpoint every so many steps")
    parallel: str = option(
        "ddp",
        "with several devices (torchrun); ddp: each has the whole student; fsdp: the student lies in shards over them",
        choices=("ddp", "fsdp"),
    )
    keep_checkpoints: int = option(2, "checkpoints to keep; the former one is there if the last one is damaged")
    time_limit: str = option(
        "",
        "save and exit, as if interrupted, after this time from the start on: 11h, 90m, 1h30m",
    )
    tensorboard: bool = option(False, "also write TensorBoard event files into the run folder")
    wandb: bool = option(False, "also send the figures to Weights & Biases")
    seed: int = option(0, "seed of the data order and of every random number")
    output_dir: str = option("", "run folder; by default runs/<script>-<date>-<time>")
    resume: bool = option(False, "continue the run in --output_dir from its checkpoint")
    overwrite: bool = option(False, "start again in an --output_dir that holds a run")

    def __post_init__(self):
        require_at_least(self, self.min_train_steps, "train_steps")
        require_at_least(self, 1, "grad_accum_steps", "eval_steps", "log_steps")
        if self.per_device_batch_size != AUTO:
            require_at_least(self, 1, "per_device_batch_size")
        require_at_least(self, 1, "save_steps", "keep_checkpoints")
        require_at_least(self, 0, "seed")
        require(self.seed < 2**63, "seed", self.seed, "must be below 2^63")
        require(self.time_limit_seconds > 0, "time_limit", self.time_limit, "must be a time such as 11h, 90m or 1h30m")
        if self.resume and self.overwrite:
            raise UsageError("--resume --overwrite: one continues the run, the other deletes it; give one")

    @property
    def time_limit_seconds(self) -> float:
        """`--time_limit` in seconds, inf for none; 0 for what is no time."""
        return seconds_of(self.time_limit) if self.time_limit else math.inf


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Memory: what is computed anew, moved or rounded so that a run fits; `sar-kd preflight` says what fits."""

    gradient_checkpointing: bool = option(
        False, "compute the student's activations anew in backward: less memory, a third more time"
    )


@dataclass(frozen=True, kw_only=True)
class TeacherMemoryConfig(MemoryConfig):
    """Memory: what is computed anew, moved or rounded so that a run fits; `sar-kd preflight` says what fits."""

    offload_teacher_to_cpu: bool = option(
        False,
        "the teacher reads a step's whole text first and then lies in the CPU's memory while the student learns: less "
        "memory, a copy of its weights to the GPU in every step",
    )
    teacher_quantization: str = option(
        "off",
        "nf4: the teacher's linear layers in 4 bits, through bitsandbytes (pip install 'sar-kd[quant]')",
        choices=("off", "nf4"),
    )

    def offloads_from(self, device: Any) -> bool:
        """Does the teacher leave this device? Not a CPU, where it lies already."""
        return self.offload_teacher_to_cpu and device.type != "cpu"

    @property
    def routers_frozen_reason(self) -> str:
        """Why the teacher's routers cannot learn beside these settings; empty if they can."""
        if self.offload_teacher_to_cpu:
            return "--offload_teacher_to_cpu takes the teacher away before its routers could learn from the student"
        if self.teacher_quantization != "off":
            return f"--teacher_quantization {self.teacher_quantization} lets no exact gradient through the teacher"
        return ""


MIN_LOSS_SCALE = 1.0
"""Floor of the loss scale. An overflow at the floor cannot be calibrated away, so it counts as a NaN batch."""

MAX_LOSS_SCALE = 2.0**24

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA: train a low-rank adapter instead of every weight; needs `pip install peft`."""

    lora_rank: int = option(0, "rank of the adapter, 4 for example; 0 trains every weight")
    lora_alpha: float = option(16.0, "the adapter counts alpha / rank times")
    lora_dropout: float = option(0.0, "dropout on the adapter's input")
    lora_targets: tuple[str, ...] = option(
        (ALL_LINEAR,), "names of the layers that get one, or all-linear", metavar="NAME"
    )

    def __post_init__(self):
        require_at_least(self, 0, "lora_rank")
        require_positive(self, "lora_alpha")
        require(0.0 <= self.lora_dropout < 1.0, "lora_dropout", self.lora_dropout, "must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Output: for people, or for programs."""

    json: bool = option(False, "print JSON")
