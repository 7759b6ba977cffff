"""A distillation run from its settings to its summary: the program's table of contents.

The two scripts, `sar-kd train` and `sar_kd.distill` all end up in `train`.
"""

from __future__ import annotations

import dataclasses

from sar_kd.commands.unit_task import prepare_task
from sar_kd.config.command_line import parse
from sar_kd.config.fields import Command
from sar_kd.config.presets import STABLE
from sar_kd.config.runs import Config
from sar_kd.data.dataset import Dataset
from sar_kd.data.sources import load_documents
from sar_kd.data.token_cache import TokenCache
from sar_kd.losses.objective import Objective
from sar_kd.models.loading import NO_LOADED_MODELS, LoadedModels, Models, load_models
from sar_kd.preflight.checks import preflight
from sar_kd.preflight.memory_plan import fit_batch_size
from sar_kd.reporting.run_log import open_run
from sar_kd.runtime.distributed import SINGLE_PROCESS, ProcessGroup, join_process_group
from sar_kd.runtime.precision import setup_precision
from sar_kd.teacher.cached import CachedTeacher, open_teacher_cache
from sar_kd.teacher.live import LiveTeacher, build_live_teacher
from sar_kd.training.guards import StepGuard
from sar_kd.training.on_policy import build_on_policy
from sar_kd.training.optimizer import build_optimizer
from sar_kd.training.parallel import build_strategy
from sar_kd.training.trainer import Trainer

TRAIN = dataclasses.replace(STABLE, name="train")


def main(argv: list[str] | None = None, command: Command[Config] = TRAIN) -> dict:
    """Train as the command line asks; returns the summary.

    command: of a script, one of `config.presets`

    Raises: UsageError for what the user can mend, TrainingDiverged after an emergency stop
    """
    return train(parse(command, argv))


def train(config: Config, given: LoadedModels = NO_LOADED_MODELS) -> dict:
    """One run; returns its summary. Raises: as `main`

    given: models that are in memory already, instead of those that the settings name
    """
    process_group = join_process_group()  # with which other processes, if torchrun started any
    config = process_group.check_same_config(config)  # what to run
    config = fit_batch_size(config, process_group, given)  # how much of it at once, where that is to be found
    config, task = prepare_task(config)  # with --task, what comes before the run
    log = process_group.on_rank_zero(lambda: open_run(config))  # where to
    process_group.on_rank_zero(lambda: preflight(config, log.say, given))  # can it be done here?
    precision = setup_precision(config.precision, config.train.seed, process_group)  # on which device, in which dtype
    config, stored = open_teacher_cache(
        config, process_group, log
    )  # what the teacher said before, with --teacher_cache
    models = load_models(config, precision, stored.teacher, given)  # both, and what connects their tokenizers
    limits = models.block_limits(config.data.block_size)
    texts = load_documents(config.data)  # training and held-out documents
    cache = TokenCache(config.data.token_cache)  # where the tokens of a large text are kept
    answers = stored.texts(texts, models.tokenizers.teacher)  # what it said of them
    both = zip(texts, answers, strict=True)
    train, validation = (
        Dataset(text, models.tokenizers, *limits, cache, said, config.loss.loss_workspace_mb) for text, said in both
    )  # text to blocks
    loss = config.loss, train.aligner, precision, models.offload
    objective = Objective(models.teacher, models.student, *loss)  # what is minimised
    strategy = build_strategy(objective, config.train, process_group)  # on how many devices the student lies, and how
    optimizer = build_optimizer(models.student, config.optim, objective.parameters())  # how
    guard = StepGuard(config.guards)  # when an update is refused
    routing = build_teacher(config, models, objective, train, process_group)  # which experts the teacher asks, if any
    parts = models, train, validation, objective, optimizer, guard, precision, log, routing, strategy
    callbacks = task.callbacks(models, limits, precision)  # what takes part beside them
    on_policy = build_on_policy(
        config, models, train, limits, precision, process_group
    )  # what the student writes itself
    return Trainer(config, *parts, callbacks, on_policy).run()  # type: ignore[arg-type]  # elsewhere than on rank 0 the log is silent


def build_teacher(
    config: Config, models: Models, objective: Objective, train: Dataset, process_group: ProcessGroup = SINGLE_PROCESS
) -> LiveTeacher | CachedTeacher:
    """The teacher of a run: from `--teacher_cache`, or there and routed as `--routing` asks.

    Raises: UsageError as `build_live_teacher`
    """
    if config.models.teacher_cache:
        return CachedTeacher(config, train)
    return build_live_teacher(config, models, objective, train, process_group)
