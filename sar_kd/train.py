"""`sar-kd train`: what the two scripts do, as a verb; and the same with models that are in memory already."""

from __future__ import annotations

from sar_kd.arguments import parse_args
from sar_kd.batch_size import fit_batch_size
from sar_kd.config import Config
from sar_kd.data import Corpus
from sar_kd.documents import load_documents
from sar_kd.guards import StepGuard
from sar_kd.loading import NOTHING_GIVEN, Given
from sar_kd.metrics import open_run
from sar_kd.models import load_models
from sar_kd.objective import Objective
from sar_kd.on_policy import build_on_policy
from sar_kd.optim import build_optimizer
from sar_kd.precision import setup
from sar_kd.preflight import preflight
from sar_kd.presets import STABLE
from sar_kd.several_devices import place
from sar_kd.stored_teaching import build_teaching
from sar_kd.tasks import prepare_task
from sar_kd.teacher_cache import open_teacher_cache
from sar_kd.token_cache import TokenCache
from sar_kd.trainer import Trainer
from sar_kd.world import join_world


def main(argv: list[str] | None = None) -> dict:
    """Train as the flags say; the summary.

    Raises: UsageError for what the user can mend, TrainingDiverged after an emergency stop
    """
    return train(parse_args(STABLE, argv, "train"))


def train(config: Config, given: Given = NOTHING_GIVEN) -> dict:
    """The scripts' table of contents, line for line, with models that are given instead of loaded; the summary."""
    world = join_world()  # with which other processes, if torchrun started any
    config = world.agreed(config)  # what to run
    config = fit_batch_size(config, world, given)  # how much of it at once, where that is to be found
    config, task = prepare_task(config)  # with --task, what comes before the run
    log = world.first(lambda: open_run(config))  # where to
    world.first(lambda: preflight(config, log.say, given))  # can it be done here?
    precision = setup(config.precision, config.train.seed, world)  # on which device, in which dtype
    config, stored = open_teacher_cache(config, world, log)  # what the teacher said before, with --teacher_cache
    models = load_models(config, precision, stored.teacher, given)  # both, and what connects their tokenizers
    limits = models.block_limits(config.data.block_size)
    texts = load_documents(config.data)  # training and held-out documents
    cache = TokenCache(config.data.token_cache)  # where the tokens of a large text are kept
    answers = stored.texts(texts, models.tokenizers.teacher)  # what it said of them
    both = zip(texts, answers, strict=True)
    train, validation = (Corpus(text, models.tokenizers, *limits, cache, said) for text, said in both)  # text to blocks
    loss = config.loss, train.pairing, precision, models.offload
    objective = Objective(models.teacher, models.student, *loss)  # what is minimised
    placement = place(objective, config.train, world)  # on how many devices the student lies, and how
    optimizer = build_optimizer(models.student, config.optim, objective.parameters())  # how
    guard = StepGuard(config.guards)  # when an update is refused
    routing = build_teaching(config, models, objective, train, world)  # which experts the teacher asks, if any
    parts = models, train, validation, objective, optimizer, guard, precision, log, routing, placement
    companions = task.companions(models, limits, precision)  # what takes part beside them
    on_policy = build_on_policy(config, models, train, limits, precision, world)  # what the student writes itself
    return Trainer(config, *parts, companions, on_policy).run()  # type: ignore[arg-type]  # elsewhere than on rank 0 the log is silent
