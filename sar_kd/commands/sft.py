"""`sar-kd sft`: fine-tune a model on questions with answers, with the training loop and the guards of distillation.

The loss has one term, cross-entropy on the answers; there is no teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from sar_kd.commands.hand_over import check_hand_over, hand_over
from sar_kd.config.runs import SftConfig
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.sources import load_documents
from sar_kd.data.token_cache import TokenCache
from sar_kd.errors import UsageError
from sar_kd.losses.objective import Objective
from sar_kd.models.loading import NO_LOADED_MODELS, LoadedModels, load_student
from sar_kd.preflight.checks import preflight
from sar_kd.preflight.fitting import fit, fit_batch_size
from sar_kd.reporting.run_log import Observer, SftLog, open_run
from sar_kd.runtime.distributed import ProcessGroup, join_process_group
from sar_kd.runtime.precision import setup_precision
from sar_kd.runtime.run_folder import hold_run_folder
from sar_kd.teacher.base import NoTeacher
from sar_kd.teacher.cached import set_template_date
from sar_kd.training.callbacks import Callback, TargetChecks, TaskEvaluation, check_targets
from sar_kd.training.guards import StepGuard
from sar_kd.training.optimizer import build_optimizer
from sar_kd.training.parallel import build_strategy
from sar_kd.training.run_inputs import digest_inputs
from sar_kd.training.sample_texts import SampleTexts
from sar_kd.training.step import StepContext
from sar_kd.training.trainer import Datasets, Trainer

QUICK_QUESTIONS = 50
"""Questions of a task in the quick check that --max_steps makes."""


def fine_tune(
    config: SftConfig,
    loaded: LoadedModels = NO_LOADED_MODELS,
    listeners: Sequence[Observer] = (),
    texts: AbstractContextManager | None = None,
) -> dict:
    """One run: fine-tune, and save the best model; returns the summary.

    loaded, listeners, texts: as of `train`
    Raises: UsageError for what the user can mend, TrainingDiverged after an emergency stop
    """
    group = join_process_group()
    if group.size > 1:
        raise UsageError(
            f"fine-tuning takes one process, and {group.size} are running: start it without torchrun; likewise --task, "
            "which fine-tunes first"
        )
    with hold_run_folder(config.train), texts or nullcontext():  # one run in it at a time
        summary = _run(config, loaded, listeners, group)
        return hand_over(config, summary, group)  # --save_dtype, --push_to_hub


def _run(config: SftConfig, loaded: LoadedModels, listeners: Sequence[Observer], group: ProcessGroup) -> dict:
    config = fit(config, group, loaded)  # --fit: the cheapest options with which it fits
    config = set_template_date(config)  # that the chat template writes
    config = fit_batch_size(config, group, loaded)  # --per_device_batch_size auto
    log = open_run(config, SftLog, listeners=listeners)  # terminal, metrics.jsonl, summary.json
    preflight(config, log.info, loaded, log.detail)  # refuse a run that cannot work
    precision = setup_precision(config.precision, config.train.seed)  # device, compute dtype, loss scale

    documents = load_documents(config.data, log.info)  # training and held-out text
    models = load_student(config, precision, loaded)  # and its tokenizer
    limits = models.block_limits(config.data.block_size)
    tokens = TokenCache(config.data.token_cache)
    train, validation = (
        build_dataset(text, models.tokenizers, *limits, tokens, option=option)
        for text, option in zip(documents, config.data.text_options(), strict=True)
    )
    config = config.in_steps(len(train))  # epochs to steps
    for line in (*models.notes, *check_targets(train, config.data)):
        log.info(line)
    check_hand_over(config, models.student)  # --save_dtype, --push_to_hub: what would be refused at the end

    objective = Objective(None, models.student, config.loss, train.aligner, precision)  # cross-entropy alone
    optimizer = build_optimizer(models.student, config.optim)
    guard = StepGuard(config.guards)  # may an update be applied?
    strategy = build_strategy(objective, config.train, group)
    context = StepContext(objective, optimizer, guard, precision, config.guards.max_grad_norm, strategy=strategy)
    callbacks: list[Callback] = [TargetChecks(train), SampleTexts(models, documents[1], precision, config.train)]
    if config.data.task:
        max_questions = QUICK_QUESTIONS if config.train.max_steps else None
        if max_questions:
            log.info(f"Questions: the first {max_questions} of the task only, because of --max_steps")
        callbacks.append(TaskEvaluation(models, limits, precision, config.models.trust_remote_code, max_questions))
    inputs = digest_inputs(config, documents, models)  # of text, tokenizer, model: for --resume
    data = Datasets(train, validation)
    return Trainer(config, models, data, context, log, NoTeacher(), callbacks, inputs=inputs).run()
