"""The sections of settings that runs share: their options, help texts, defaults and checks.

Every field is a command-line option of the same name. A wrong value raises `UsageError`, whose one line names the
option, its value and the remedy.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, TypeVar

from sar_kd.config.fields import Section, is_date, option, require, seconds_of
from sar_kd.config.placement import TeacherPlacementConfig
from sar_kd.errors import UsageError

SELF = "self"
"""The value of --teacher_model that means the student without its adapter."""

EMBEDDED = "embedded"
"""The value of --teacher_model and --student_model that means the models shipped with the package."""


def model_option(which: str):
    """An option that names a model; which: teacher or student."""
    text = f"directory or hub id; 'embedded' is the {which} shipped with the package"
    return option(EMBEDDED, text, not_empty="give a directory or a hub id")


@dataclass(frozen=True, kw_only=True)
class PairConfig(Section):
    """Models: which teacher and which student."""

    teacher_model: str = model_option("teacher")
    student_model: str = model_option("student")
    trust_remote_code: bool = option(False, "run model code that comes with a checkpoint")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(PairConfig):
    """Models: which teacher and which student."""

    teacher_model: str = option(
        EMBEDDED,
        "directory or hub id; 'embedded' is the teacher shipped with the package; 'self', with --lora_rank, the "
        "student without its adapter",
        not_empty="give a directory or a hub id",
    )
    teacher_cache: str = option(
        "", "folder made by `sar-kd cache`: the teacher's logits are read from it and the teacher is not loaded"
    )
    teacher_system_prompt: str = option(
        "", "a prompt, or @FILE, that only the teacher sees: a conversation's system message, or the beginning of a "
        "block of plain text",
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        require(not (self.teacher_system_prompt and self.teacher_cache), "teacher_cache", self.teacher_cache,
                "was made without --teacher_system_prompt; leave one of them out")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Text: what to train on; without any of these options, the embedded text."""

    train_file: tuple[str, ...] = option(
        (), "training text or conversations: .txt, .jsonl, .jsonl.gz, .json, .csv or .parquet, one or more"
    )
    validation_file: tuple[str, ...] = option((), "held-out text; by default a part of the training text")
    text_field: str = option(
        "text", "field or column with the text of an example; an example without it may be a conversation"
    )
    dataset_name: str = option("", "a dataset for the `datasets` package: hub id or directory")
    dataset_config_name: str = option("", "its configuration, for example wikitext-103-raw-v1")
    dataset_split: str = option("train", "its split to train on, or a part of one such as train[:1000]")
    task: str = option(
        "",
        "units: train on generated questions about units and measure accuracy and answer rate on new ones; needs no "
        "text and sets defaults of its own",
        choices=("", "units"),
    )
    template_date: str = option(
        "", "the date that chat templates write, such as 2026-01-31; by default today's, which --resume and a teacher "
        "cache keep",
    )  # fmt: skip
    block_size: int = option(256, "student tokens in a block; the teacher gets the same text")
    token_cache: str = option(
        "", "folder that stores the tokens of a large text; by default sar_kd in the user's cache folder; 'off': none"
    )

    def text_options(self) -> tuple[str, str]:
        """The options, with their values, that name the training and the held-out text."""
        train, validation = " ".join(self.train_file), " ".join(self.validation_file)
        given = f"--dataset_name {self.dataset_name}" if self.dataset_name else f"--train_file {train}".strip()
        given = f"--task {self.task}" if self.task else given
        return given, f"--validation_file {validation}" if validation else given

    def describe(self) -> str:
        """The text in a few words."""
        if self.task:
            return f"questions of the task {self.task}"
        if self.dataset_name:
            return f"{self.dataset_name} {self.dataset_config_name}".strip()
        names = [file.replace("\\", "/").rsplit("/", 1)[-1] for file in self.train_file]
        if not names:
            return "the embedded text (documentation of CPython)"
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    def __post_init__(self):
        super().__post_init__()
        require(
            not self.template_date or is_date(self.template_date), "template_date", self.template_date,
            "must be a date such as 2026-01-31",
        )  # fmt: skip
        require(self.block_size >= 8, "block_size", self.block_size, "must be at least 8 tokens")
        if self.task and (self.dataset_name or self.train_file):
            raise UsageError(f"--task {self.task}: makes its own text; leave out --train_file and --dataset_name")
        if self.dataset_name and self.train_file:
            raise UsageError(f"--dataset_name {self.dataset_name}: give it or --train_file, not both")
        if self.dataset_config_name and not self.dataset_name:
            raise UsageError(f"--dataset_config_name {self.dataset_config_name}: needs --dataset_name")
        if self.dataset_split != "train" and not self.dataset_name:
            raise UsageError(f"--dataset_split {self.dataset_split}: needs --dataset_name")
        require(bool(self.dataset_split), "dataset_split", self.dataset_split, "is empty; give the name of a split")
        if self.validation_file and not (self.train_file or self.dataset_name):
            raise UsageError(f"--validation_file {self.validation_file[0]}: needs --train_file or --dataset_name")


@dataclass(frozen=True, kw_only=True)
class DistillationDataConfig(DataConfig):
    """Text: what to train on; without any of these options, the embedded text."""

    task_teacher_steps: int = option(
        1500, "with --task: steps of fine-tuning the embedded teacher before distillation; 0: none", at_least=0
    )


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """Loss: alpha_ce * CE(text) + alpha_kd * T^2 * D(teacher, student)."""

    temperature: float = option(2.0, "T: divides the logits before the softmax of the distillation term", positive=True)
    alpha_kd: float = option(0.1, "weight of the distillation term; 0: train by cross-entropy alone", at_least=0)
    alpha_ce: float = option(0.9, "weight of the cross-entropy term", at_least=0)
    logit_clamp: float = option(5.0, "c: logits in the training loss are limited to [-c, c]", positive=True)
    logit_clamp_style: str = option(
        "normalized",
        "normalized: shift logits so that logsumexp = c, then clamp at -c, and keep the gradient of the unclamped "
        "loss; raw: plain clamp(z, -c, c); off",
        choices=("normalized", "raw", "off"),
    )
    loss_clamp: float = option(6.0, "limit of the cross-entropy and the total loss, in nats per token", positive=True)
    loss_clamp_style: str = option(
        "scale",
        "scale: scale a loss above the limit down to it, which keeps the direction of its gradient; hard: plain clamp, "
        "no gradient above the limit; off",
        choices=("scale", "hard", "off"),
    )
    alignment: str = option(
        "auto",
        "auto: token by token if the tokenizers are equal, else projection; projection: byte-prefix projection; "
        "strict: only where both models have the same token of the same bytes; alm: likelihood of aligned chunks; "
        "uld: sorted probabilities; hidden: last hidden states",
        choices=("auto", "projection", "strict", "alm", "uld", "hidden"),
    )
    kd_direction: str = option(
        "forward",
        "forward: KL(teacher || student); reverse: KL(student || teacher); jsd: Jensen-Shannon divergence",
        choices=("forward", "reverse", "jsd"),
    )
    jsd_beta: float = option(0.5, "weight of the teacher in the mixture of --kd_direction jsd")
    teacher_top_k: int = option(
        0, "teacher tokens kept at each position, the most likely; the others form one class; 0: all tokens", at_least=0
    )
    alm_tau: float = option(5.0, "temperature of the chunk likelihoods in --alignment alm", positive=True)
    loss_workspace_mb: int = option(
        0, "MiB for logits; the loss is computed in tiles of this size; 0: 64, or what 256 positions take", at_least=0
    )
    force: bool = option(False, "train even if preflight finds that nothing can be learned or memory is short")

    def __post_init__(self):
        super().__post_init__()
        require(0.0 < self.jsd_beta < 1.0, "jsd_beta", self.jsd_beta, "must be above 0 and below 1")
        require(1e-3 <= self.temperature <= 1e3, "temperature", self.temperature, "must be from 0.001 to 1000")
        for name in ("alpha_kd", "alpha_ce"):
            require(getattr(self, name) <= 1e6, name, getattr(self, name), "must be at most 1e+06")
        require(self.alpha_kd + self.alpha_ce > 0, "alpha_kd", self.alpha_kd, "is 0 and so is --alpha_ce: give one")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """Optimizer: which one; linear warm-up, then cosine decay to 10 %."""

    optimizer: str = option(
        "adamw",
        "adamw: 8 bytes of state for each trained weight; adamw8bit: 2, through bitsandbytes (`pip install "
        "bitsandbytes`); adafactor: next to none, and --student_lr is relative to the size of the weights",
        choices=("adamw", "adamw8bit", "adafactor"),
    )
    weight_decay: float = option(0.01, "decoupled weight decay of matrices", at_least=0)
    warmup_steps: int = option(20, "steps of linear warm-up", at_least=0)
    lr_schedule: str = option("cosine", "learning rate after warm-up", choices=("cosine", "constant"))
    student_lr: float = option(1e-5, "peak learning rate of the student", positive=True, aliases=("learning_rate",))


MIN_LOSS_SCALE = 1.0
"""Floor of the loss scale. There an overflow cannot be cured by a lower loss scale, so it counts as a NaN batch."""

MAX_LOSS_SCALE = 2.0**24


@dataclass(frozen=True, kw_only=True)
class DeviceConfig(Section):
    """Precision: device and compute dtype."""

    model_dtype: str = option(
        "auto",
        "compute dtype; auto: bfloat16 if the hardware has it, else float16 on CUDA and float32 on a CPU",
        choices=("auto", "float16", "bfloat16", "float32"),
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")

    def __post_init__(self):
        super().__post_init__()
        known = self.device in ("auto", "cpu", "cuda") or bool(re.fullmatch("cuda:[0-9]{1,3}", self.device))
        require(known, "device", self.device, "must be auto, cpu, cuda or cuda:N")


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig(DeviceConfig):
    """Precision: device and compute dtype; trainable weights are always float32."""

    init_loss_scale: float = option(16384.0, "initial loss scale of the GradScaler, a power of two")

    def __post_init__(self):
        super().__post_init__()
        fits = MIN_LOSS_SCALE <= self.init_loss_scale <= MAX_LOSS_SCALE and math.log2(self.init_loss_scale).is_integer()
        require(fits, "init_loss_scale", self.init_loss_scale, "must be a power of two between 1 and 16777216")


@dataclass(frozen=True, kw_only=True)
class GuardConfig(Section):
    """Guards: when an update is skipped, and when the run stops."""

    max_grad_norm: float = option(0.5, "gradients are clipped to this L2 norm", positive=True)
    skip_grad_norm: float = option(
        2.0, "lowest limit of the gradient norm above which an update is skipped", positive=True
    )
    skip_rule: str = option(
        "adaptive",
        "adaptive: the limit follows the run, --skip_factor times the median of recent norms, never below "
        "--skip_grad_norm; fixed: the limit is --skip_grad_norm",
        choices=("adaptive", "fixed"),
    )
    skip_factor: float = option(4.0, "factor of the median norm in --skip_rule adaptive", at_least=1)
    max_nan_batches: int = option(10, "consecutive NaN batches before --on_divergence applies", at_least=1)
    on_divergence: str = option(
        "stop",
        "stop: keep the best student and exit with code 3; rewind: once, go back to the last sound checkpoint, "
        "halve the learning rate and skip the documents whose loss was not finite",
        choices=("stop", "rewind"),
    )


AUTO_BATCH = "{what} in a micro-batch of each device; auto: as many as fit in memory, with --grad_accum_steps to match"
"""The help of `--per_device_batch_size`."""


_Train = TypeVar("_Train", bound="TrainConfig")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """Run: how long, how often, where to. A step is one attempted update, applied or skipped."""

    train_steps: int = option(500, "attempted optimizer updates", at_least=1)
    per_device_batch_size: int = option(4, AUTO_BATCH.format(what="blocks"), at_least=1, auto=True)
    grad_accum_steps: int = option(1, "micro-batches in a step", at_least=1)
    eval_steps: int = option(50, "steps between validations; also one at the start and one at the end", at_least=1)
    log_steps: int = option(25, "steps between printed lines", at_least=1)
    verbose: bool = option(False, "print every check and measurement; without it they are in log.txt and in the report")
    quiet: bool = option(False, "print errors only; everything is in log.txt")
    save_steps: int = option(100, "steps between checkpoints", at_least=1)
    parallel: str = option(
        "ddp",
        "with several devices (torchrun): ddp: the whole student on each; fsdp: the student sharded over them",
        choices=("ddp", "fsdp"),
    )
    keep_checkpoints: int = option(
        2, "checkpoints to keep; if the last is damaged, an error names the one before", at_least=1
    )
    time_limit: str = option("", "save and exit after this time, as if interrupted: 11h, 90m, 1h30m")
    tensorboard: bool = option(False, "also write TensorBoard event files into the run folder")
    wandb: bool = option(False, "also send the metrics to Weights & Biases")
    seed: int = option(0, "seed of the data order and of every random number", at_least=0)
    output_dir: str = option("", "run folder; by default runs/<script>-<date>-<time>-<process id>")
    resume: bool = option(False, "continue the run in --output_dir from its checkpoint")
    allow_changed_inputs: bool = option(
        False, "with --resume: go on although text, tokenizers or models have changed since the run began"
    )
    overwrite: bool = option(False, "delete the run in --output_dir and start again")

    def __post_init__(self):
        super().__post_init__()
        require(self.time_limit_seconds > 0, "time_limit", self.time_limit, "must be a time such as 11h, 90m or 1h30m")
        if self.resume and self.overwrite:
            raise UsageError("--resume --overwrite: one continues the run, the other deletes it; give one")
        if self.quiet and self.verbose:
            raise UsageError("--quiet --verbose: one prints less, the other more; give one")

    @property
    def time_limit_seconds(self) -> float:
        """`--time_limit` in seconds, inf if it is not given; 0 for text that is not a time."""
        return seconds_of(self.time_limit) if self.time_limit else math.inf

    def with_time_left(self: _Train, seconds: float) -> _Train:
        """The section with this `--time_limit`, at least a second; inf: as it is."""
        return self if seconds == math.inf else dataclasses.replace(self, time_limit=f"{max(1, int(seconds))}s")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig(Section):
    """Memory: recompute, move or round so that a run fits; `sar-kd preflight` shows what fits."""

    gradient_checkpointing: bool = option(False, "recompute the student's activations: less memory, a third more time")
    fit: bool = option(
        False, "set the cheapest options with which the run fits its device, and print them; an option given stays"
    )


@dataclass(frozen=True, kw_only=True)
class TeacherMemoryConfig(TeacherPlacementConfig, MemoryConfig):
    """Memory: recompute, move or round so that a run fits; `sar-kd preflight` shows what fits."""

    offload_teacher_to_cpu: bool = option(
        False,
        "run the teacher on the whole batch of a step, then move it to the CPU's memory while the student trains: less "
        "GPU memory, one copy of its weights to the GPU per step",
    )
    teacher_quantization: str = option(
        "off",
        "nf4: the teacher's linear layers in 4 bits, through bitsandbytes (`pip install bitsandbytes accelerate`)",
        choices=("off", "nf4"),
    )

    def __post_init__(self):
        super().__post_init__()
        quantized, place = self.teacher_quantization, self.placement()
        if self.offload_teacher_to_cpu and place:
            raise UsageError(f"--offload_teacher_to_cpu: moves the teacher to the student's device; leave out {place}")
        if quantized != "off" and self.teacher_device_map:
            raise UsageError(f"--teacher_quantization {quantized}: cannot be spread; leave out --teacher_device_map")

    def offloads_from(self, device: Any) -> bool:
        """Does the teacher leave this device (a `torch.device`)? A teacher on the CPU is there already."""
        return self.offload_teacher_to_cpu and device.type != "cpu"

    @property
    def routers_frozen_reason(self) -> str:
        """Why the teacher's routers cannot be trained with these settings; '' if they can."""
        if self.offload_teacher_to_cpu:
            return "--offload_teacher_to_cpu removes the teacher before its routers could learn from the student"
        if self.teacher_quantization != "off":
            return f"--teacher_quantization {self.teacher_quantization} gives no exact gradient through the teacher"
        if self.placement():
            return f"{self.placement()} puts the teacher elsewhere than the student from which its routers would learn"
        return ""


@dataclass(frozen=True, kw_only=True)
class OutputConfig(Section):
    """Output: for people, or for programs."""

    json: bool = option(False, "print JSON")
