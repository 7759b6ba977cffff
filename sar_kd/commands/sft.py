"""`sar-kd sft`: fine-tune a model on questions with answers, on the loop that distils, with the same guards.

It is the distillation step with one term: cross-entropy on the answers. There is no teacher.
"""

from __future__ import annotations

import torch

from sar_kd.config.command_line import parse
from sar_kd.config.fields import Command
from sar_kd.config.presets import TASKS
from sar_kd.config.runs import SftConfig
from sar_kd.data.dataset import Dataset
from sar_kd.data.sources import load_documents
from sar_kd.data.token_cache import TokenCache
from sar_kd.errors import UsageError
from sar_kd.losses.objective import Objective
from sar_kd.models.loading import Models, load_student
from sar_kd.models.lora import add_adapter, describe_trainable
from sar_kd.models.memory_saving import recompute_activations_
from sar_kd.preflight.checks import preflight
from sar_kd.preflight.memory_plan import fit_batch_size
from sar_kd.reporting.run_log import SftLog, open_run
from sar_kd.runtime.distributed import join_process_group
from sar_kd.runtime.precision import Precision, setup_precision
from sar_kd.teacher.base import NoTeacher
from sar_kd.training.callbacks import Callback, TargetChecks, TaskEvaluation, check_targets
from sar_kd.training.guards import StepGuard
from sar_kd.training.optimizer import build_optimizer
from sar_kd.training.parallel import build_strategy
from sar_kd.training.step import StepContext
from sar_kd.training.trainer import Datasets, Trainer

_QUICK_QUESTIONS = 50
"""Of a task, in the quick check that --max_steps asks for."""


def main(argv: list[str]) -> dict:
    """Fine-tune what the command line asks for; the run's summary.

    Raises: UsageError for what the user can mend; TrainingDiverged after an emergency stop
    """
    return fine_tune(parse(SFT, argv))


def fine_tune(config: SftConfig) -> dict:
    """One run, from a model and examples to a saved model; its summary. Raises: as `main`"""
    process_group = join_process_group()
    if process_group.size > 1:
        raise UsageError(
            f"fine-tuning takes one process, and {process_group.size} are running: start it without torchrun; likewise --task, "
            "which fine-tunes first"
        )
    config = fit_batch_size(config, process_group)  # how much at once, where that is to be found
    log = open_run(config, SftLog)  # where to
    preflight(config, log.info)  # can it be done here?
    precision = setup_precision(config.precision, config.train.seed)  # on which device, in which dtype
    # Weights that learn are float32, whatever their checkpoint says; under an adapter none of these learns.
    dtype = precision.dtype if config.lora.lora_rank else torch.float32
    models = load_student(config.models, dtype, precision)
    if config.memory.gradient_checkpointing:
        recompute_activations_(models.student, same_dropout=True)
        models.student.enable_input_require_grads()  # type: ignore[operator]  # transformers'
    models = models.with_student(add_adapter(models.student, config.lora))  # what of it learns
    limits = models.block_limits(config.data.block_size)
    texts = load_documents(config.data)  # training and held-out examples
    cache = TokenCache(config.data.token_cache)
    train, validation = (Dataset(text, models.tokenizers, *limits, cache) for text in texts)
    config = config.in_steps(len(train))  # epochs to steps
    for line in (describe_trainable(models.student), *check_targets(train, config.data)):
        log.info(line)
    objective = Objective(None, models.student, config.loss, train.aligner, precision)  # one term
    strategy = build_strategy(objective, config.train, process_group)
    optimizer = build_optimizer(models.student, config.optim)  # type: ignore[arg-type]  # a rate of another name
    guard = StepGuard(config.guards)
    callbacks = [TargetChecks(train), *_exams(config, models, limits, precision)]
    context = StepContext(objective, optimizer, guard, precision, config.guards.max_grad_norm, strategy=strategy)
    return Trainer(config, models, Datasets(train, validation), context, log, NoTeacher(), callbacks).run()


def _exams(config: SftConfig, models: Models, limits: tuple[int, int], precision: Precision) -> list[Callback]:
    if not config.data.task:
        return []
    most = _QUICK_QUESTIONS if config.train.max_steps else None
    return [TaskEvaluation(models, limits, precision, config.models.trust_remote_code, most)]


SFT = Command(
    name="sft",
    description="Fine-tune a causal language model on questions with answers, in fp16, without NaN.",
    config=SftConfig,
    defaults={"max_grad_norm": 1.0, "skip_rule": "adaptive", "skip_factor": 4.0},
    presets={"task": {"units": {**TASKS["units"], "warmup_steps": 50, "log_steps": 100}}},
    embedded_lr_factors={"learning_rate": 10.0},  # the embedded student is far smaller than models that 2e-4 is for
    run_name="sft",
)
