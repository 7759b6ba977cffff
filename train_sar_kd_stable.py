"""Distil a teacher into a student: the balanced mode in the best dtype the hardware has.

python train_sar_kd_stable.py --train_steps 500
"""

import sys

from sar_kd.arguments import parse_args
from sar_kd.cli import run
from sar_kd.config import STABLE
from sar_kd.data import Corpus
from sar_kd.documents import load_documents
from sar_kd.guards import StepGuard
from sar_kd.metrics import open_run
from sar_kd.models import load_models
from sar_kd.objective import Objective
from sar_kd.optim import build_optimizer
from sar_kd.precision import setup
from sar_kd.tasks import prepare_task
from sar_kd.teacher_routing import build_teacher_routing
from sar_kd.trainer import Trainer


def main(argv=None):
    task = prepare_task(parse_args(STABLE, argv))  # what to run; with --task, what comes before it
    config = task.config
    log = open_run(config)  # where to
    precision = setup(config.precision, config.train.seed)  # on which device, in which dtype
    models = load_models(config, precision)  # teacher, student, and what connects their tokenizers
    limits = models.block_limits(config.data.block_size)
    texts = load_documents(config.data)  # training and held-out documents
    train, validation = (Corpus(text, models.tokenizers, *limits) for text in texts)  # text to blocks
    objective = Objective(models.teacher, models.student, config.loss, train.pairing, precision)  # what is minimised
    optimizer = build_optimizer(models.student, config.optim, objective.parameters())  # how
    guard = StepGuard(config.guards)  # when an update is refused
    routing = build_teacher_routing(config, models, objective, train)  # which experts the teacher asks, if it has any
    parts = (models, train, validation, objective, optimizer, guard, precision, log, routing)
    return Trainer(config, *parts, task.companions(models, limits, precision)).run()


if __name__ == "__main__":
    sys.exit(run(main))
