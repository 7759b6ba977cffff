"""`sar-kd sft`: fine-tune a model on questions with answers, on the loop that distils, with the same guards.

It is the distillation step with one term: cross-entropy on the answers. There is no teacher.
"""

from __future__ import annotations

import torch

from sar_kd.arguments import parse_training
from sar_kd.batch_size import fit_batch_size
from sar_kd.companion import Companion
from sar_kd.config import UsageError
from sar_kd.data import Corpus
from sar_kd.documents import load_documents
from sar_kd.exam import Exam
from sar_kd.guards import StepGuard
from sar_kd.layers import recompute_activations_
from sar_kd.lora import add_adapter, describe_student
from sar_kd.metrics import open_run
from sar_kd.models import Models, load_student
from sar_kd.no_teacher import NoTeacher
from sar_kd.objective import Objective
from sar_kd.optim import build_optimizer
from sar_kd.precision import Precision, setup
from sar_kd.preflight import preflight
from sar_kd.several_devices import place
from sar_kd.sft_config import SFT, SftConfig
from sar_kd.sft_log import SftLog
from sar_kd.token_cache import TokenCache
from sar_kd.trainer import Trainer
from sar_kd.vitals import Vitals, check_targets
from sar_kd.world import join_world

_QUICK_QUESTIONS = 50
"""Of a task, in the quick check that --max_steps asks for."""


def main(argv: list[str]) -> dict:
    """Fine-tune what the command line asks for; the run's summary.

    Raises: UsageError for what the user can mend; TrainingDiverged after an emergency stop
    """
    return fine_tune(parse_training(SFT, argv))


def fine_tune(config: SftConfig) -> dict:
    """One run, from a model and examples to a saved model; its summary. Raises: as `main`"""
    world = join_world()
    if world.size > 1:
        raise UsageError(
            f"fine-tuning takes one process, and {world.size} are running: start it without torchrun; likewise --task, "
            "which fine-tunes first"
        )
    config = fit_batch_size(config, world)  # how much at once, where that is to be found
    log = open_run(config, SftLog)  # where to
    preflight(config, log.say)  # can it be done here?
    precision = setup(config.precision, config.train.seed)  # on which device, in which dtype
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
    train, validation = (Corpus(text, models.tokenizers, *limits, cache) for text in texts)
    config = config.over(len(train))  # epochs to steps
    for line in (describe_student(models.student), *check_targets(train, config.data)):
        log.say(line)
    objective = Objective(None, models.student, config.loss, train.pairing, precision)  # one term
    placement = place(objective, config.train, world)
    optimizer = build_optimizer(models.student, config.optim)  # type: ignore[arg-type]  # a rate of another name
    guard = StepGuard(config.guards)
    companions = [Vitals(train), *_exams(config, models, limits, precision)]
    parts = models, train, validation, objective, optimizer, guard, precision, log, NoTeacher(), placement
    return Trainer(config, *parts, companions).run()


def _exams(config: SftConfig, models: Models, limits: tuple[int, int], precision: Precision) -> list[Companion]:
    if not config.data.task:
        return []
    most = _QUICK_QUESTIONS if config.train.max_steps else None
    return [Exam(models, limits, precision, config.models.trust_remote_code, most)]
