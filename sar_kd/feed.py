"""What a step reads: its micro-batches, made a step ahead where they depend on the text alone."""

from __future__ import annotations

from collections.abc import Callable

from sar_kd.config import TrainConfig
from sar_kd.data import Batch, Corpus
from sar_kd.on_policy import OnPolicy
from sar_kd.prefetch import Prefetch
from sar_kd.recovery import left_in
from sar_kd.step import StepReport
from sar_kd.world import World

_Key = tuple[int, frozenset[int]]


class Feed:
    """A run's micro-batches, by step and by what is left out of the text."""

    def __init__(
        self, train: Corpus, settings: TrainConfig, passes: int, world: World, on_policy: OnPolicy | None = None
    ):
        """passes: attempts in a row on the same text"""
        self.train, self.settings, self.passes, self.world, self.on_policy = train, settings, passes, world, on_policy
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
        return self._micro_batches(*key, self.world.rank)

    def _window(self, step: int, left_out: frozenset[int], report: StepReport, own: list[Batch]) -> list[Batch]:
        """The micro-batches among which a NaN batch is to be looked for; every rank looks at the same ones."""
        if self.world.size == 1:
            return own
        # Whose gradient is not finite is not known: by then it is the sum of all.
        ranks = [report.rank] if report.verdict.cause == "forward" else range(self.world.size)
        return [batch for rank in ranks for batch in self._micro_batches(step, left_out, rank)]

    def _micro_batches(self, step: int, left_out: frozenset[int], rank: int) -> list:
        """Batches; where the student is to write, the blocks of its prompts."""
        settings, step = self.settings, step // self.passes
        sizes = settings.per_device_batch_size, settings.grad_accum_steps
        made: list = []
        for blocks in self.train.micro_blocks(step, *sizes, settings.seed, rank, self.world.size):
            place = step * settings.grad_accum_steps + len(made)
            blocks = left_in(self.train, blocks, left_out)
            writes = self.on_policy is not None and self.on_policy.is_on_policy(place)
            made.append(blocks if writes else self.train.batch(blocks))
        return made
