"""`--per_device_batch_size auto`: as many blocks at once as fit, in updates of as many blocks as ever.

How many blocks an update has is part of what is learned, and stays what it is without `auto`: the default number times
`--grad_accum_steps`. How many of them are computed at once is a matter of memory, and of speed.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from sar_kd.arguments import default_batch_size
from sar_kd.loading import NOTHING_GIVEN, Given
from sar_kd.memory_plan import gigabytes, plan
from sar_kd.precision import choose
from sar_kd.settings import Auto, RunConfig
from sar_kd.subject import Subject
from sar_kd.world import World

R = TypeVar("R", bound=RunConfig)

MOST_TOKENS_ON_A_CPU = 4096
"""More at once do not make a CPU faster (the embedded pair: 1,000 tokens are as fast as 8,000), only fuller."""


def fit_batch_size(config: R, world: World, given: Given = NOTHING_GIVEN) -> R:
    """The settings with a number in the place of `auto`, and a line about it; of several processes all get rank 0's.

    Raises: UsageError where the models or the device are not there
    """
    if not isinstance(config.train.per_device_batch_size, Auto):
        return config
    found: list[R] = []
    world.first(lambda: found.append(_fit(config, given)))
    return world.shared(found[0] if found else config)


def _fit(config: R, given: Given) -> R:
    subject, (device, dtype, _) = Subject(config, given), choose(config.precision)
    blocks = default_batch_size(type(config.train), config.data.task) * config.train.grad_accum_steps
    sizes = [size for size in range(blocks, 0, -1) if blocks % size == 0]
    if device.type == "cpu":
        sizes = [size for size in sizes if size * config.data.block_size <= MOST_TOKENS_ON_A_CPU] or [1]
    for size in sizes:
        fitted = _with_batch_size(config, size, blocks // size)
        planned = plan(fitted, subject.models, device, dtype)
        if planned.verdict in ("fits", "unknown"):
            break
    one_block = "" if planned.verdict in ("fits", "unknown") else ", the fewest there are"
    line = (
        f"--per_device_batch_size auto: {size}{one_block} ({gigabytes(planned.needed)}), --grad_accum_steps "
        f"{blocks // size}: {blocks} blocks an update"
    )
    return dataclasses.replace(fitted, notices=(*config.notices, line))


def _with_batch_size(config: Any, size: int, accum_steps: int) -> Any:
    train = dataclasses.replace(config.train, per_device_batch_size=size, grad_accum_steps=accum_steps)
    changed: Any = dataclasses.replace(config, train=train)
    return changed
