"""The processes of a run: one, or as many as torchrun started, each with a device of its own.

Whatever they have to agree on before any of them acts goes through a `ProcessGroup`. A run of one process agrees with itself
at no cost: no collective, no copy, no branch.

What the processes of a run tell each other at their end, so that the user reads one line, and the right one.

Where one process fails, the others fail a moment later in a collective that it is missing from, and torchrun ends
whatever is left. So each says at its end why it ends, where the others can read it, and waits for them a moment.
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
from typing import Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sar_kd.errors import UsageError

T = TypeVar("T")


class _Settings(Protocol):
    def to_dict(self) -> dict: ...


S = TypeVar("S", bound=_Settings)

_TIMEOUT = timedelta(minutes=10)
"""The longest that one process waits for another in a collective. A process that has ended is noticed at once."""

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ProcessGroup:
    """A run of one process. `TorchrunGroup` is the same for several, so that no other code asks how many there are."""

    rank = 0
    size = 1

    @property
    def is_rank_zero(self) -> bool:
        """Does this process write and tell for all?"""
        return self.rank == 0

    def all_reduce_sum(self, values: Iterable[float]) -> list[float]:
        """Each value, added up over all ranks in float64; no device is read or waited for."""
        return list(values)

    def all_reduce_total(self, count: int) -> int:
        """The count, added up over all ranks."""
        return count

    def any_rank(self, flag: bool) -> bool:
        """Is the flag up on any rank?"""
        return flag

    def all_gather(self, figures: Tensor) -> Tensor:
        """Figures on the device, float [n], of every rank: float [ranks, n]; no host read."""
        return figures[None]

    def sum_gradients_(self, parameters: Iterable[Tensor]) -> None:
        """Add up the gradients of parameters that every rank has whole; None counts as 0."""

    def all_gather_object(self, value: T) -> list[T]:
        """The value of every rank, by rank."""
        return [value]

    def broadcast(self, value: T) -> T:
        """Rank 0's value."""
        return value

    def on_rank_zero(self, act: Callable[[], T]) -> T | SilentLog:
        """What `act` returns, done on rank 0 alone, while the others wait; there something that does nothing.

        Raises: on every rank the UsageError that it raised
        """
        return act()

    def check_same_config(self, config: S) -> S:
        """Rank 0's settings, of which only the run folder may differ: its name is made of the time.

        Raises: UsageError if the ranks were started with others
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
        """Is it this rank that prints its last line? follows: another rank's end is the reason for this one's."""
        return True

    def explain_lost_rank(self, error: RuntimeError) -> str | None:
        """The line about a collective that failed because another process is gone; None if it is another error."""
        return None

    def destroy(self) -> None:
        """Part, once all is done."""


class SilentLog:
    """What stands elsewhere for what only rank 0 has, such as the log: takes every call and does nothing."""

    def __getattr__(self, name: str) -> Callable:
        return lambda *args, **kwargs: None


SINGLE_PROCESS = ProcessGroup()


class TorchrunGroup(ProcessGroup):
    """Several processes, joined in PyTorch's default process group: gloo between hosts, NCCL between GPUs."""

    def __init__(self, store: dist.Store, rank: int, size: int):
        self.rank, self.size = rank, size
        self._local_rank = int(os.environ.get("LOCAL_RANK", rank))
        self._farewell = ExitAgreement(store, rank, size)

    def all_reduce_sum(self, values: Iterable[float]) -> list[float]:
        """See `ProcessGroup`."""
        sums = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def all_reduce_total(self, count: int) -> int:
        """See `ProcessGroup`."""
        return int(self.all_reduce_sum([count])[0])

    def any_rank(self, flag: bool) -> bool:
        """See `ProcessGroup`."""
        return self.all_reduce_sum([float(flag)])[0] > 0

    def all_gather(self, figures: Tensor) -> Tensor:
        """See `ProcessGroup`."""
        rows = [torch.empty_like(figures) for _ in range(self.size)]
        dist.all_gather(rows, figures)
        return torch.stack(rows)

    def sum_gradients_(self, parameters: Iterable[Tensor]) -> None:
        """See `ProcessGroup`."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def all_gather_object(self, value: T) -> list[T]:
        """See `ProcessGroup`."""
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """See `ProcessGroup`."""
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def on_rank_zero(self, act: Callable[[], T]) -> T | SilentLog:
        """See `ProcessGroup`."""
        result: T | SilentLog = SilentLog()
        said = None
        if self.is_rank_zero:
            try:
                result = act()
            except UsageError as error:
                said = str(error)
        said = self.broadcast(said)
        if said is not None:
            raise UsageError(said)
        return result

    def check_same_config(self, config: S) -> S:
        """See `ProcessGroup`."""
        configs = self.all_gather_object(config)
        flags = [_flat(config.to_dict()) | {"output_dir": None} for config in configs]
        for rank, own in enumerate(flags):
            for name, value in own.items():
                if value != flags[0][name]:
                    others = f"rank {rank} was given this and rank 0 {flags[0][name]}"
                    raise UsageError(f"--{name} {value}: {others}; start every process with the same flags")
        return configs[0]

    def seed(self, seed: int) -> int:
        """See `ProcessGroup`."""
        if self.is_rank_zero:
            return seed
        return int(np.random.SeedSequence([seed, self.rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def device(self, named: torch.device) -> torch.device:
        """See `ProcessGroup`."""
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
        torch.cuda.set_device(self._local_rank)  # what NCCL and FSDP go by
        return torch.device("cuda", self._local_rank)

    def should_report(self, line: str, follows: bool = False) -> bool:
        """See `ProcessGroup`."""
        return self._farewell.should_report(line, follows)

    def explain_lost_rank(self, error: RuntimeError) -> str | None:
        """See `ProcessGroup`."""
        return self._farewell.explain_lost_rank(error)

    def destroy(self) -> None:
        """See `ProcessGroup`."""
        dist.destroy_process_group()


def _flat(nest: dict) -> dict:
    """The values of a dict of dicts by their inner names."""
    parts = ((value if isinstance(value, dict) else {name: value}) for name, value in nest.items())
    return {name: value for part in parts for name, value in part.items()}


def joined(rows: list[list[float]], num_sums: int) -> tuple[list[float], list[float]]:
    """One row for all ranks: the first `num_sums` figures added up, and of each other one the largest, where what is
    not finite is larger than any number.

    rows: as read from `ProcessGroup.rows`
    """
    columns = list(zip(*rows, strict=True))
    sums = [functools.reduce(operator.add, column) for column in columns[:num_sums]]
    return sums, [next((v for v in column if not math.isfinite(v)), max(column)) for column in columns[num_sums:]]


_joined = SINGLE_PROCESS


def current_process_group() -> ProcessGroup:
    """The processes that this one has joined."""
    return _joined


def join_process_group() -> ProcessGroup:
    """Join the other processes of this run, if torchrun's environment says that there are any.

    Raises: UsageError if they cannot be reached
    """
    global _joined
    if _joined is not SINGLE_PROCESS:
        return _joined
    if not all(name in os.environ for name in _ENVIRONMENT) or int(os.environ["WORLD_SIZE"]) == 1:
        return SINGLE_PROCESS
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        group_store = dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=group_store, rank=rank, world_size=size, timeout=_TIMEOUT)
    except (dist.DistError, ValueError) as error:
        raise UsageError(
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: the other processes of the run cannot be "
            f"reached ({str(error).splitlines()[0]}); start all of them with the same torchrun command"
        ) from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # torchrun's, when another process has ended
    if rank:  # rank 0 tells for all: --help, bars
        sys.stdout = open(os.devnull, "w")
    _joined = TorchrunGroup(store, rank, size)
    return _joined


_SECONDS = 5.0


class ExitAgreement:
    """The last words of one of `size` processes. store: outlives the process (torchrun's own does)."""

    def __init__(self, store: dist.Store, rank: int, size: int):
        self.rank, self.size, self._store = rank, size, dist.PrefixStore("farewell", store)
        self._awaited = set(range(size))

    def should_report(self, line: str, follows: bool = False) -> bool:
        """The lowest of the ranks that end with the same line; of lines with a reason elsewhere only if there is none.

        Waits for the others, but not long: torchrun ends them all as soon as one has ended.
        """
        said = self._exchange("end", [line, follows])
        self._exchange("left", None, seconds=0.0 if self.rank else _SECONDS)  # rank 0 may be keeping the store
        reasons = {rank: text for rank, (text, follows) in said.items() if not follows}
        lines = reasons or {rank: text for rank, (text, _) in said.items()}
        return self.rank == min((rank for rank, text in lines.items() if text == line), default=None)

    def explain_lost_rank(self, error: RuntimeError) -> str | None:
        """The line about a collective that failed because another process is gone; None if it is another error."""
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            return None
        silent = sorted(set(range(self.size)) - self._exchange("end", ["", True]).keys())
        self._awaited -= set(silent)
        if not silent:
            return f"the processes of the run lost each other ({str(error).splitlines()[0]})"
        which = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))}"
        return f"{which} of {self.size} ended without a word, or does not answer"

    def _exchange(self, what: str, own, seconds: float = _SECONDS) -> dict[int, list]:
        """Say something; what every rank has said, once all have or so many seconds have passed."""
        for number in (signal.SIGINT, signal.SIGTERM):  # torchrun's to the ranks that are left
            signal.signal(number, signal.SIG_IGN)
        keys = {rank: f"{what}/{rank}" for rank in self._awaited}
        try:
            self._store.set(f"{what}/{self.rank}", json.dumps(own))
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and not self._store.check(list(keys.values())):
                time.sleep(0.05)
            found = {rank: self._store.get(key) for rank, key in keys.items() if self._store.check([key])}
        except dist.DistError:  # the process that kept the store is gone
            return {self.rank: own}
        return {rank: json.loads(said) for rank, said in found.items()}
