"""The options of the Python functions, for editors and type checkers: those of the command line, by the same names.

`tests/config/test_option_types.py` prints what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

Mode = Literal["ultra-conservative", "balanced", "precise"]


class TrainingOptions(TypedDict, total=False):
    """Options of both ways to train a student."""

    trust_remote_code: bool
    text_field: str
    dataset_name: str
    dataset_config_name: str
    dataset_split: str
    task: Literal["", "units"]
    template_date: str
    block_size: int
    token_cache: str
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    lora_targets: Sequence[str]
    lora_quantization: Literal["off", "nf4"]
    adapter_only: bool
    optimizer: Literal["adamw", "adamw8bit", "adafactor"]
    weight_decay: float
    warmup_steps: int
    lr_schedule: Literal["cosine", "constant"]
    student_lr: float
    model_dtype: Literal["auto", "float16", "bfloat16", "float32"]
    device: str
    init_loss_scale: float
    gradient_checkpointing: bool
    fit: bool
    max_grad_norm: float
    skip_grad_norm: float
    skip_rule: Literal["adaptive", "fixed"]
    skip_factor: float
    max_nan_batches: int
    on_divergence: Literal["stop", "rewind"]
    train_steps: int
    per_device_batch_size: int | Literal["auto"]
    grad_accum_steps: int
    eval_steps: int
    log_steps: int
    verbose: bool
    quiet: bool
    save_steps: int
    parallel: Literal["ddp", "fsdp"]
    keep_checkpoints: int
    time_limit: str
    tensorboard: bool
    wandb: bool
    seed: int
    save_dtype: Literal["float32", "float16", "bfloat16"]
    push_to_hub: str
    public: bool
    resume: bool
    allow_changed_inputs: bool
    overwrite: bool


class DistillOptions(TrainingOptions, total=False):
    """Options of `distill` and `preflight`."""

    teacher_cache: str
    teacher_system_prompt: str
    task_teacher_steps: int
    skip_baseline: bool
    control: bool
    temperature: float
    alpha_kd: float
    alpha_ce: float
    logit_clamp: float
    logit_clamp_style: Literal["normalized", "raw", "off"]
    loss_clamp: float
    loss_clamp_style: Literal["scale", "hard", "off"]
    alignment: Literal["auto", "projection", "strict", "alm", "uld", "hidden"]
    kd_direction: Literal["forward", "reverse", "jsd"]
    jsd_beta: float
    teacher_top_k: int
    alm_tau: float
    loss_workspace_mb: int
    force: bool
    routing: Literal["auto", "native", "all", "sar", "ka"]
    router_patterns: Sequence[str]
    sar_schedule: Literal["two_stage", "joint"]
    sar_routing: Literal["auto", "all", "native"]
    router_lr: float
    router_beta: float
    router_anchor: float
    router_direction: Literal["forward", "reverse", "jsd"]
    router_max_grad_norm: float
    router_stop_on_drift: bool
    activation_checkpointing: bool
    ka_lambda: float
    ka_passes: int
    recipe: Literal["", "on-policy", "sar-paper", "ka-paper"]
    on_policy_fraction: float
    on_policy_start: float
    sample_temperature: float
    sample_top_p: float
    max_new_tokens: int
    replay_size: int
    replay_fraction: float
    keep_last: bool
    teacher_device: str
    teacher_device_map: Literal["", "auto"]
    teacher_max_memory: Sequence[str]
    offload_teacher_to_cpu: bool
    teacher_quantization: Literal["off", "nf4"]


class SftOptions(TrainingOptions, total=False):
    """Options of `sft`."""

    epochs: float
    max_steps: int
    save_strategy: Literal["epoch", "steps", "no"]


class CacheOptions(TypedDict, total=False):
    """Options of `cache`."""

    from_logprobs: Sequence[str]
    teacher_url: str
    teacher_tokenizer: str
    server_timeout: float
    student_model: str
    trust_remote_code: bool
    keep: Literal["topk", "sampled", "mixed"]
    teacher_top_k: int
    temperatures: Sequence[str]
    seed: int
    per_device_batch_size: int
    loss_workspace_mb: int
    overwrite: bool
    text_field: str
    dataset_name: str
    dataset_config_name: str
    dataset_split: str
    task: Literal["", "units"]
    template_date: str
    block_size: int
    token_cache: str
    model_dtype: Literal["auto", "float16", "bfloat16", "float32"]
    device: str
    teacher_device: str
    teacher_device_map: Literal["", "auto"]
    teacher_max_memory: Sequence[str]
