"""The micro-batches of each step; those that depend on the text alone are made a step ahead, in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from sar_kd.config.sections import TrainConfig
from sar_kd.data.batch import Batch
from sar_kd.data.dataset import Dataset
from sar_kd.runtime.distributed import ProcessGroup
from sar_kd.training.on_policy import OnPolicy
from sar_kd.training.recovery import Recovery
from sar_kd.training.step import StepReport

_SECONDS_BETWEEN_LOOKS = 1.0
"""How often a wait for the thread looks whether there still is one"""


class BatchLoader:
    """A run's micro-batches, by step."""

    def __init__(
        self,
        train: Dataset,
        settings: TrainConfig,
        passes: int,
        process_group: ProcessGroup,
        recovery: Recovery,
        on_policy: OnPolicy | None = None,
    ):
        """passes: consecutive steps on the same text; recovery: knows the blocks to skip after a rewind"""
        self._train, self._settings, self._passes, self._process_group = train, settings, passes, process_group
        self._recovery, self._on_policy = recovery, on_policy
        # A step is prefetched with the blocks skipped at that time. A rewind goes back to an earlier step than the one
        # that is prefetched, so it never gets a batch from before it.
        self._prefetch = Prefetch(lambda step: self._micro_batches(step, process_group.rank))

    def get(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step."""
        following = step + 1 if step + 1 < self._settings.train_steps else None
        made = self._prefetch.get(step, following)
        return made if self._on_policy is None else self._on_policy.micro_batches(step // self._passes, made)

    def close(self) -> None:
        """End the thread."""
        self._prefetch.close()

    def nan_candidates(self, step: int, report: StepReport, micro_batches: list[Batch]) -> list[Batch]:
        """The micro-batches in which a NaN of a step may lie, the same ones on every rank.

        micro_batches: this rank's own
        """
        if self._process_group.size == 1:
            return micro_batches
        # Whose gradient is not finite is not known: it is already the sum of all.
        ranks = [report.first_nonfinite_rank] if report.verdict.cause == "forward" else range(self._process_group.size)
        made = ((rank, self._micro_batches(step, rank)) for rank in ranks)
        if self._on_policy is not None:
            made = ((rank, self._on_policy.batches(items, rank)) for rank, items in made)
        return [batch for _, batches in made for batch in batches]

    def _micro_batches(self, step: int, rank: int) -> list:
        """Batches; for an on-policy micro-batch the blocks of its prompts."""
        settings, step = self._settings, step // self._passes
        sizes = settings.per_device_batch_size, settings.grad_accum_steps
        made: list = []
        for blocks in self._train.micro_blocks(step, *sizes, settings.seed, rank, self._process_group.size):
            index = step * settings.grad_accum_steps + len(made)
            blocks = self._recovery.replace_skipped(blocks)
            is_on_policy = self._on_policy is not None and self._on_policy.is_on_policy(index)
            made.append(blocks if is_on_policy else self._train.batch(blocks))
        return made


class Prefetch:
    """Calls a function one call ahead, in a thread; its value must depend on its argument alone, so none is saved.

    Where memory ends, the thread may die, or not start at all: then the function is called by the one who asks.
    """

    def __init__(self, make: Callable[[Any], Any]):
        self._make = make
        self._thread: threading.Thread | None = None
        self._pool = ThreadPoolExecutor(1, "prefetch", initializer=self._know_thread)
        self._pending: tuple[Hashable, Future] | None = None

    def _know_thread(self) -> None:
        self._thread = threading.current_thread()

    def get(self, key: Hashable, following: Hashable | None = None) -> Any:
        """`make(key)`; starts `make(following)`, unless that is None.

        Raises: what `make(key)` raises
        """
        if self._pending is None or self._pending[0] != key:
            self._start(key)
        try:
            return self._make(key) if self._pending is None else self._wait(*self._pending)
        finally:
            self._start(following)

    def _wait(self, key: Hashable, future: Future) -> Any:
        while not future.done() and not (self._thread and not self._thread.is_alive()):
            wait([future], timeout=_SECONDS_BETWEEN_LOOKS)
        return future.result() if future.done() else self._make(key)

    def _start(self, key: Hashable | None) -> None:
        if self._pending is not None:
            self._pending[1].cancel()
        self._pending = None
        if key is not None:
            try:
                self._pending = (key, self._pool.submit(self._make, key))
            except (RuntimeError, MemoryError):  # no thread, or no more
                self._pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """End the thread, once its current call is done."""
        self._pool.shutdown(cancel_futures=True)
