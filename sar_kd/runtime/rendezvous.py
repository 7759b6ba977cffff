"""How the processes of a run find one another: torchrun's environment variables, and a store that all of them reach.

PyTorch's own rendezvous waits ten minutes or longer without a word, and Ctrl-C waits with it. Here the wait is bounded
and says for whom.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from sar_kd.errors import UsageError
from sar_kd.runtime.console import print_stderr

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

WAIT_SECONDS = 120.0
"""The longest that a process waits for the others to start. torchrun starts its processes at the same time."""

_QUIET_SECONDS = 10.0
"""After this time a line names the processes that have not started"""

_STORE_SECONDS = 30.0

_REMEDY = "start all processes with the same torchrun command"


class Place(NamedTuple):
    """What torchrun tells a process."""

    rank: int
    size: int
    address: str
    port: int
    agent_store: str = ""
    """If torchrun hosts the store: the prefix of this start's keys; else rank 0 hosts it"""

    @property
    def hosts_store(self) -> bool:
        """Does this process host the store?"""
        return self.rank == 0 and not self.agent_store

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"


def read_place(environment: Mapping[str, str]) -> Place | None:
    """This process' place among several; None if it is alone.

    Raises: UsageError naming the variable that has no usable value
    """
    if not all(name in environment for name in _VARIABLES):
        return None
    size = _number(environment, "WORLD_SIZE", 1, 2**31)
    rank = _number(environment, "RANK", 0, size, f"below WORLD_SIZE={size}")
    if size == 1:
        return None
    port = _number(environment, "MASTER_PORT", 1, 2**16)
    is_agents = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    prefix = f"/worker/attempt_{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}" if is_agents else ""
    return Place(rank, size, environment["MASTER_ADDR"], port, prefix)


def _number(environment: Mapping[str, str], name: str, low: int, end: int, limit: str = "") -> int:
    text = environment[name].strip()
    number = int(text) if text.isdecimal() and len(text) < 20 else -1
    if not low <= number < end:
        limit = limit or f"of at least {low}"
        raise UsageError(f"{name}={environment[name]}: must be a whole number {limit}; {_REMEDY}, which sets it")
    return number


def meet(place: Place, wait_seconds: float = WAIT_SECONDS) -> dist.Store:
    """A store that every process of the run has reached.

    Raises: UsageError naming the ranks that did not come, or the address that cannot be reached
    """
    started = time.monotonic()
    if not place.hosts_store:
        _await_host(place, started, wait_seconds)
    store = _open_store(place)
    if store.add(f"joined/{place.rank}", 1) > 1:
        raise UsageError(f"RANK={place.rank}: another process of this run has the same rank; {_REMEDY}")
    missing = list(range(place.size))

    def all_came() -> bool:
        missing[:] = [rank for rank in missing if not store.check([f"joined/{rank}"])]
        return not missing

    if not _wait(all_came, started, wait_seconds, lambda: f"{rank_names(missing)} of {place.size} at {place}"):
        raise UsageError(
            f"{place}: {rank_names(missing)} of {place.size} did not start within {wait_seconds:.0f} seconds; {_REMEDY}"
        )
    return store


def _await_host(place: Place, started: float, wait_seconds: float) -> None:
    """Wait until somebody listens at the address: by Python, where Ctrl-C is noticed."""
    reasons = [""]

    def is_there() -> bool:
        try:
            socket.create_connection((place.address, place.port), timeout=2.0).close()
            return True
        except OSError as error:
            reasons[0] = error.strerror or str(error)
            return False

    host = "torchrun" if place.agent_store else "rank 0"
    if not _wait(is_there, started, wait_seconds, lambda: f"{host} at {place} ({reasons[0]})"):
        raise UsageError(
            f"{place}: {host} cannot be reached there ({reasons[0]}); give its address as MASTER_ADDR and MASTER_PORT "
            f"(torchrun --master_addr, --master_port), and {_REMEDY}"
        )


def _wait(is_done: Callable[[], bool], started: float, wait_seconds: float, what: Callable[[], str]) -> bool:
    """Ask until it is done or the time is over; after some seconds, say what is waited for."""
    is_quiet = True
    while not is_done():
        seconds = time.monotonic() - started
        if seconds > wait_seconds:
            return False
        if is_quiet and seconds > min(_QUIET_SECONDS, wait_seconds / 2):
            is_quiet = False
            print_stderr(f"Waiting for {what()}, up to {wait_seconds:.0f} seconds")
        time.sleep(0.1)
    return True


def _open_store(place: Place) -> dist.Store:
    try:
        store = dist.TCPStore(
            "localhost" if place.hosts_store else place.address,
            place.port,
            place.size,
            is_master=place.hosts_store,
            timeout=timedelta(seconds=_STORE_SECONDS),
            wait_for_workers=False,
        )
    except (dist.DistError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"{place}: the processes of the run cannot meet there ({reason}); give another MASTER_ADDR or MASTER_PORT "
            f"(torchrun --master_addr, --master_port), and {_REMEDY}"
        ) from None
    return dist.PrefixStore(place.agent_store, store) if place.agent_store else store


def rank_names(ranks: list[int]) -> str:
    """'rank 1', 'ranks 1, 2'."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
