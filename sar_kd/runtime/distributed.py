"""The process group of a run: one process, or as many as torchrun started, each with a device of its own.

Everything that the ranks must agree on before one of them acts goes through a `ProcessGroup`. With one process that
costs nothing: no collective, no copy, no branch.
"""

from __future__ import annotations

import functools
import json
import math
import operator
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sar_kd.config.config_file import options_in
from sar_kd.config.fields import RunConfig
from sar_kd.errors import UsageError
from sar_kd.runtime.rendezvous import meet, rank_names, read_place

T = TypeVar("T")

C = TypeVar("C", bound=RunConfig)

_TIMEOUT = timedelta(minutes=10)
"""The longest that a rank waits for another one in a collective. A process that has ended is noticed at once."""

_EXIT_SECONDS = 5.0
"""The longest that a rank waits at its end for the reports of the others"""


class ProcessGroup:
    """A run of one process. `TorchrunGroup` is the same for several, so that no other code asks how many there are."""

    rank = 0
    size = 1

    @property
    def is_rank_zero(self) -> bool:
        """Does this process print and write files for all?"""
        return self.rank == 0

    def all_reduce_sum(self, values: Iterable[float]) -> list[float]:
        """Each value summed over the ranks in float64, on the CPU: no device sync."""
        return list(values)

    def any_rank(self, flag: bool) -> bool:
        """Is the flag set on any rank?"""
        return self.all_reduce_sum([float(flag)])[0] > 0

    def all_gather(self, values: Tensor) -> Tensor:
        """Values on the device, float [n], of every rank: float [ranks, n]; no host read."""
        return values[None]

    def all_reduce_gradients_(self, parameters: Iterable[Tensor]) -> None:
        """Sum the gradients of replicated parameters over the ranks, in place; None counts as 0."""

    def all_gather_object(self, value: T) -> list[T]:
        """The value of every rank, by rank."""
        return [value]

    def broadcast(self, value: T) -> T:
        """Rank 0's value."""
        return value

    def on_rank_zero(self, act: Callable[[], T]) -> T | None:
        """Run `act` on rank 0 while the others wait; its result there, None elsewhere.

        Raises: on every rank the UsageError that it raised
        """
        return act()

    def check_same_config(self, config: C) -> C:
        """Rank 0's config, of which only the run folder may differ: its default name contains the time.

        Raises: UsageError if the ranks were started with different options
        """
        return config

    def seed(self, seed: int) -> int:
        """This rank's own seed; rank 0's is the one given."""
        return seed

    def device(self, named: torch.device) -> torch.device:
        """This rank's own device of the kind named.

        Raises: UsageError if there are fewer devices than processes
        """
        return named

    def should_report(self, line: str, follows: bool = False) -> bool:
        """Should this rank print the error that it ends with? follows: it only follows from another rank's end."""
        return True

    def explain_lost_rank(self, error: RuntimeError) -> str | None:
        """The line about a collective that failed because another process is gone; None for any other error."""
        return None

    def destroy(self) -> None:
        """Leave the group at the end of the run."""


SINGLE_PROCESS = ProcessGroup()


class TorchrunGroup(ProcessGroup):
    """Several processes in PyTorch's default process group: gloo between hosts, NCCL between GPUs.

    Where one rank fails, the others fail a moment later in a collective that it is missing from, and torchrun kills the
    rest. So each rank puts the reason of its end into the store, and waits a moment for those of the others: the user
    reads one line, the right one.
    """

    def __init__(self, store: dist.Store, rank: int, size: int):
        """store: outlives the process (torchrun's own does)"""
        self.rank, self.size = rank, size
        self._local_rank = int(os.environ.get("LOCAL_RANK", rank))
        self._store, self._awaited = dist.PrefixStore("exit", store), set(range(size))

    def all_reduce_sum(self, values: Iterable[float]) -> list[float]:
        sums = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def all_gather(self, values: Tensor) -> Tensor:
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(gathered, values)
        return torch.stack(gathered)

    def all_reduce_gradients_(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def all_gather_object(self, value: T) -> list[T]:
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def on_rank_zero(self, act: Callable[[], T]) -> T | None:
        result: T | None = None
        message: str | None = None
        if self.is_rank_zero:
            try:
                result = act()
            except UsageError as error:
                message = str(error)
        message = self.broadcast(message)
        if message is not None:
            raise UsageError(message)
        return result

    def check_same_config(self, config: C) -> C:
        configs = self.all_gather_object(config)
        settings = [{"mode": each.mode, **options_in(each.to_dict()), "output_dir": None} for each in configs]
        for rank, own in enumerate(settings):
            for name, value in own.items():
                if value != settings[0][name]:
                    here, first = (
                        " ".join(each) if isinstance(each, tuple) else each for each in (value, settings[0][name])
                    )
                    others = f"rank {rank} was given this and rank 0 {first}"
                    raise UsageError(f"--{name} {here}: {others}; start every process with the same flags")
        return configs[0]

    def seed(self, seed: int) -> int:
        if self.is_rank_zero:
            return seed
        return int(np.random.SeedSequence([seed, self.rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def device(self, named: torch.device) -> torch.device:
        if named.type != "cuda":
            return named
        if named.index is not None:
            raise UsageError(f"--device {named}: is one device for {self.size} processes; use --device cuda")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if self._local_rank >= count:
            processes = os.environ.get("LOCAL_WORLD_SIZE", self.size)
            raise UsageError(
                f"--device {named}: this PyTorch sees {count} CUDA devices for the {processes} processes on this "
                "machine; start no more than there are (torchrun --nproc_per_node)"
            )
        torch.cuda.set_device(self._local_rank)  # the device that NCCL and FSDP use
        return torch.device("cuda", self._local_rank)

    def should_report(self, line: str, follows: bool = False) -> bool:
        """Is this the lowest rank that ends with this line? A line that `follows` counts only if all of them do.

        Waits for the others, but not long: torchrun kills them all as soon as one has ended.
        """
        reports = self._exchange("end", [line, follows])
        self._exchange("seen", None, seconds=0.0 if self.rank else _EXIT_SECONDS)  # rank 0 may be hosting the store
        causes = {rank: text for rank, (text, follows) in reports.items() if not follows}
        lines = causes or {rank: text for rank, (text, _) in reports.items()}
        return self.rank == min((rank for rank, text in lines.items() if text == line), default=None)

    def explain_lost_rank(self, error: RuntimeError) -> str | None:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            return None
        lost = sorted(set(range(self.size)) - self._exchange("end", ["", True]).keys())
        self._awaited -= set(lost)
        if not lost:
            return f"the processes of the run lost each other ({str(error).splitlines()[0]})"
        return f"{rank_names(lost)} of {self.size} ended without an error message, or does not respond"

    def _exchange(self, topic: str, own, seconds: float = _EXIT_SECONDS) -> dict[int, list]:
        """Store this rank's value; the values of all ranks that have stored theirs, after at most so many seconds."""
        for number in (signal.SIGINT, signal.SIGTERM):  # torchrun sends them to the ranks that are left
            signal.signal(number, signal.SIG_IGN)
        keys = {rank: f"{topic}/{rank}" for rank in self._awaited}
        try:
            self._store.set(f"{topic}/{self.rank}", json.dumps(own))
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and not self._store.check(list(keys.values())):
                time.sleep(0.05)
            found = {rank: self._store.get(key) for rank, key in keys.items() if self._store.check([key])}
        except dist.DistError:  # the process that hosted the store is gone
            return {self.rank: own}
        return {rank: json.loads(value) for rank, value in found.items()}

    def destroy(self) -> None:
        dist.destroy_process_group()


def sum_and_max(gathered: list[list[float]], num_sums: int) -> tuple[list[float], list[float]]:
    """Reduce the values of all ranks: the sum of each of the first `num_sums`, and the maximum of each other one, where
    a value that is not finite is larger than any number.

    gathered: [ranks, n], as read from `ProcessGroup.all_gather`
    """
    columns = list(zip(*gathered, strict=True))
    sums = [functools.reduce(operator.add, column) for column in columns[:num_sums]]
    return sums, [next((v for v in column if not math.isfinite(v)), max(column)) for column in columns[num_sums:]]


_current = SINGLE_PROCESS


def current_process_group() -> ProcessGroup:
    """The group that this process has joined."""
    return _current


def join_process_group() -> ProcessGroup:
    """Join the other processes of this run, if torchrun's environment variables name any.

    Raises: UsageError if they cannot be reached
    """
    global _current
    if _current is not SINGLE_PROCESS:
        return _current
    place = read_place(os.environ)
    if place is None:
        return SINGLE_PROCESS
    store = meet(place)
    store.set_timeout(_TIMEOUT)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        group_store = dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=group_store, rank=place.rank, world_size=place.size, timeout=_TIMEOUT)
    except (dist.DistError, ValueError) as error:
        raise UsageError(
            f"{place}: the processes of the run cannot be connected ({str(error).splitlines()[0]}); start all of them "
            "with the same torchrun command"
        ) from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # sent by torchrun when another process has ended
    if place.rank:  # all ranks print the same (--help, lines, bars), and torchrun shows the output of all
        sys.stdout = open(os.devnull, "w")
    _current = TorchrunGroup(store, place.rank, place.size)
    return _current
