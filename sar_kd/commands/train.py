"""`sar-kd train`: a distillation run, the program's table of contents.

The two scripts and `sar_kd.distill` call it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from sar_kd.commands.control import Control, TrainedText
from sar_kd.commands.hand_over import check_hand_over, hand_over
from sar_kd.commands.unit_task import prepare_task, task_callbacks
from sar_kd.config.runs import Config
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.sources import load_documents
from sar_kd.data.teacher_prompt import build_teacher_prompt
from sar_kd.data.token_cache import TokenCache
from sar_kd.data.words import find_words
from sar_kd.losses.objective import Objective
from sar_kd.models.loading import NO_LOADED_MODELS, LoadedModels, load_models
from sar_kd.preflight.checks import preflight
from sar_kd.preflight.fitting import fit, fit_batch_size
from sar_kd.reporting.run_log import Observer, open_run
from sar_kd.runtime.distributed import ProcessGroup, join_process_group
from sar_kd.runtime.precision import setup_precision
from sar_kd.runtime.run_folder import hold_run_folder
from sar_kd.teacher.cached import CachedTeacher, open_teacher_cache, set_template_date
from sar_kd.teacher.live import LiveTeacher
from sar_kd.training.callbacks import LastStudent
from sar_kd.training.guards import StepGuard
from sar_kd.training.on_policy import build_on_policy
from sar_kd.training.optimizer import build_optimizer
from sar_kd.training.parallel import build_strategy
from sar_kd.training.run_inputs import digest_inputs
from sar_kd.training.sample_texts import SampleTexts
from sar_kd.training.step import StepContext
from sar_kd.training.trainer import Datasets, Trainer


def train(
    config: Config,
    loaded: LoadedModels = NO_LOADED_MODELS,
    listeners: Sequence[Observer] = (),
    texts: AbstractContextManager | None = None,
) -> dict:
    """One run: distil, and save the best student; returns the summary.

    loaded: models that are in memory already, instead of those that the settings name
    listeners: receive what the run log writes; texts: puts text that was given in Python into the run folder
    Raises: UsageError for what the user can mend, TrainingDiverged after an emergency stop
    """
    group = join_process_group()  # torchrun's processes, or this one alone
    config = group.check_same_config(config)
    with hold_run_folder(config.train, group), texts or nullcontext():  # one run in it at a time
        config = fit(config, group, loaded)  # --fit: the cheapest options with which it fits
        config = set_template_date(config)  # that chat templates write
        config = fit_batch_size(config, group, loaded)  # --per_device_batch_size auto
        control = Control(config, loaded, group) if config.has_control else None  # --control: may it be trained?
        config = prepare_task(config, loaded)  # --task: fine-tune the teacher
        listeners = [*listeners, *(control.observers if control else [])]
        summary, text = _run(config, loaded, listeners, group)
        if control:  # --control: train it, on the same text
            summary = control.compare(config, summary, text)
        return hand_over(config, summary, group)  # --save_dtype, --push_to_hub


def _run(
    config: Config, loaded: LoadedModels, listeners: Sequence[Observer], group: ProcessGroup
) -> tuple[dict, TrainedText]:
    """The distillation; returns its summary, and its text for a control."""
    log = open_run(config, process_group=group, listeners=listeners)  # terminal, metrics.jsonl, summary.json
    group.on_rank_zero(lambda: preflight(config, log.info, loaded, log.detail))  # refuse a run that cannot work
    precision = setup_precision(config.precision, config.train.seed, group)  # device, compute dtype, loss scale

    config, cache = open_teacher_cache(config, group, log.info)  # --teacher_cache: logits without a teacher
    documents = load_documents(config.data, log.info)  # training and held-out text
    models = load_models(config, precision, cache.teacher if cache else None, loaded)  # and their tokenizers
    for line in models.notes:
        log.info(line)
    check_hand_over(config, models.student)  # --save_dtype, --push_to_hub: what would be refused at the end
    limits = models.block_limits(config.data.block_size)  # tokens in a block, for each model
    prompt = build_teacher_prompt(config.models.teacher_system_prompt, models.tokenizers, *reversed(limits))
    limits = limits[0], limits[1] - (prompt.num_tokens if prompt else 0)  # --teacher_system_prompt
    logits = cache.texts(documents, models.tokenizers.teacher) if cache else (None, None)
    tokens, workspace_mb = TokenCache(config.data.token_cache), config.loss.loss_workspace_mb
    train, validation = (
        build_dataset(text, models.tokenizers, *limits, tokens, cached, workspace_mb, option, prompt)
        for text, cached, option in zip(documents, logits, config.data.text_options(), strict=True)
    )

    if config.has_control:
        validation.words = find_words(validation.text, models.tokenizers, log.info)  # to compare the models on each

    objective = Objective(models.teacher, models.student, config.loss, train.aligner, precision, models.offload)
    strategy = build_strategy(objective, config.train, group)  # one device, DDP or FSDP
    teacher = CachedTeacher(config, train) if cache else LiveTeacher(config, objective, train.aligner, group)
    on_policy = build_on_policy(config, models, train, limits, precision, strategy)  # if the student generates text
    optimizer = build_optimizer(models.student, config.optim, objective.parameters())
    guard = StepGuard(config.guards)  # may an update be applied?
    context = StepContext(objective, optimizer, guard, precision, config.guards.max_grad_norm, strategy=strategy)
    samples = SampleTexts(models, documents[1], precision, config.train)  # for the report
    last = [LastStudent(config, models, context, train)] if config.on_policy.keep_last else []
    callbacks = [*task_callbacks(config, models, limits, precision), samples, *last]
    inputs = digest_inputs(config, documents, models, group)  # of text, tokenizers, models: for --resume
    datasets = Datasets(train, validation)
    trainer = Trainer(config, models, datasets, context, log, teacher, callbacks, on_policy, inputs)
    return trainer.run(), TrainedText(documents, datasets, models.tokenizers, limits, teacher.passes)
