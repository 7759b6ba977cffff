"""What a step reads: its micro-batches, made a step ahead where they depend on the text alone.

The next step's batches, made while this step computes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from sar_kd.config.sections import TrainConfig
from sar_kd.data.batch import Batch
from sar_kd.data.dataset import Dataset
from sar_kd.runtime.distributed import ProcessGroup
from sar_kd.training.on_policy import OnPolicy
from sar_kd.training.step import StepReport

_Key = tuple[int, frozenset[int]]


class BatchLoader:
    """A run's micro-batches, by step and by what is left out of the text."""

    def __init__(
        self,
        train: Dataset,
        settings: TrainConfig,
        passes: int,
        process_group: ProcessGroup,
        on_policy: OnPolicy | None = None,
    ):
        """passes: attempts in a row on the same text"""
        self.train, self.settings, self.passes, self.process_group, self.on_policy = (
            train,
            settings,
            passes,
            process_group,
            on_policy,
        )
        self._ahead = Prefetch(self._make)

    def take(self, step: int, left_out: frozenset[int]) -> tuple[list[Batch], Callable[[StepReport], list[Batch]]]:
        """This rank's micro-batches of a step, and a way to those that it was bad in, of whatever rank."""
        following = (step + 1, left_out) if step + 1 < self.settings.train_steps else None
        made = self._ahead.take((step, left_out), following)
        own = made if self.on_policy is None else self.on_policy.micro_batches(step // self.passes, made)
        return own, lambda report: self._window(step, left_out, report, own)

    def close(self) -> None:
        """Nothing more is read."""
        self._ahead.close()

    def _make(self, key: _Key) -> list:
        """Called in a thread, a step ahead."""
        return self._micro_batches(*key, self.process_group.rank)

    def _window(self, step: int, left_out: frozenset[int], report: StepReport, own: list[Batch]) -> list[Batch]:
        """The micro-batches among which a NaN batch is to be looked for; every rank looks at the same ones."""
        if self.process_group.size == 1:
            return own
        # Whose gradient is not finite is not known: by then it is the sum of all.
        ranks = [report.rank] if report.verdict.cause == "forward" else range(self.process_group.size)
        return [batch for rank in ranks for batch in self._micro_batches(step, left_out, rank)]

    def _micro_batches(self, step: int, left_out: frozenset[int], rank: int) -> list:
        """Batches; where the student is to write, the blocks of its prompts."""
        settings, step = self.settings, step // self.passes
        sizes = settings.per_device_batch_size, settings.grad_accum_steps
        made: list = []
        for blocks in self.train.micro_blocks(step, *sizes, settings.seed, rank, self.process_group.size):
            place = step * settings.grad_accum_steps + len(made)
            blocks = left_in(self.train, blocks, left_out)
            writes = self.on_policy is not None and self.on_policy.is_on_policy(place)
            made.append(blocks if writes else self.train.batch(blocks))
        return made


Key = TypeVar("Key", bound=Hashable)

Made = TypeVar("Made")


class Prefetch(Generic[Key, Made]):
    """Calls a function one call ahead, in a thread; what it returns must depend on its argument alone.

    So nothing of it need be saved: whoever takes other things than were foreseen, as after a resumption, gets those.
    """

    def __init__(self, make: Callable[[Key], Made]):
        self._make = make
        self._pool = ThreadPoolExecutor(1, "prefetch")
        self._ahead: tuple[Key, Future[Made]] | None = None

    def take(self, key: Key, following: Key | None = None) -> Made:
        """make(key), and begin with make(following), unless that is None.

        Raises: what `make(key)` raises
        """
        if self._ahead is None or self._ahead[0] != key:
            self._begin(key)
        assert self._ahead is not None
        _, made = self._ahead
        try:
            return made.result()
        finally:
            self._begin(following)

    def _begin(self, key: Key | None) -> None:
        if self._ahead is not None:
            self._ahead[1].cancel()
        self._ahead = None if key is None else (key, self._pool.submit(self._make, key))

    def close(self) -> None:
        """End the thread, once it is done with what it has begun."""
        self._pool.shutdown(cancel_futures=True)


def left_in(train: Dataset, blocks: list[int], left_out: frozenset[int]) -> list[int]:
    """The blocks of a batch, with the next one that is not left out in the place of each one that is.

    Unchanged if that would leave nothing.
    """
    if len(left_out) == len(train) or not left_out.intersection(blocks):
        return blocks
    kept = []
    for block in blocks:
        while block in left_out:
            block = (block + 1) % len(train)
        kept.append(block)
    return kept
