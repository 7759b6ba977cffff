"""How processes meet: a wrong variable, a wrong address or a missing rank is one line, in bounded time."""

import re
import socket
import threading
import time

import pytest

from sar_kd.errors import UsageError
from sar_kd.runtime.rendezvous import Place, meet, read_place

GOOD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_torchruns_variables_are_read():
    assert read_place(GOOD) == Place(1, 2, "127.0.0.1", 29500)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "3"}
    place = read_place(GOOD | agent | {"RANK": "0"})
    assert (place.agent_store, place.hosts_store) == ("/worker/attempt_3", False)
    assert read_place(GOOD | {"RANK": "0"}).hosts_store
    assert read_place(GOOD | {"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert read_place({"RANK": "0"}) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("WORLD_SIZE", "abc"), ("WORLD_SIZE", "-1"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "2.0"), ("WORLD_SIZE", ""),
     ("WORLD_SIZE", "9" * 5000), ("RANK", "7"), ("RANK", "2"), ("RANK", "-1"), ("RANK", "x"), ("MASTER_PORT", "port"),
     ("MASTER_PORT", "70000")],
)  # fmt: skip
def test_a_variable_without_a_usable_value_is_named(name, value):
    with pytest.raises(UsageError) as error:
        read_place(GOOD | {name: value})
    assert str(error.value).startswith(f"{name}={value}: must be a whole number ")


def test_a_rank_that_does_not_start_is_named_in_bounded_time(capsys):
    started = time.monotonic()
    with pytest.raises(UsageError, match=r"ranks 1, 2 of 3 did not start within 1 seconds; start all"):
        meet(Place(0, 3, "127.0.0.1", _free_port()), wait_seconds=1.0)
    assert time.monotonic() - started < 10
    assert "Waiting for ranks 1, 2 of 3 at 127.0.0.1:" in capsys.readouterr().err


@pytest.mark.parametrize("agent", ["", "/worker/attempt_0"], ids=["rank 0", "torchrun"])
def test_an_address_where_nobody_listens_is_named_in_bounded_time(agent):
    host = "torchrun" if agent else "rank 0"
    expected = (
        rf"^127.0.0.1:\d+: {host} cannot be reached there \(Connection refused\); give its address as MASTER_ADDR"
    )
    with pytest.raises(UsageError, match=expected):
        meet(Place(1, 2, "127.0.0.1", _free_port(), agent), wait_seconds=0.5)


def test_a_port_that_another_program_has_is_named():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        with pytest.raises(UsageError, match=r"cannot meet there \(.*; give another MASTER_ADDR or MASTER_PORT"):
            meet(Place(0, 2, "127.0.0.1", other.getsockname()[1]), wait_seconds=1.0)


def _meet_in_threads(ranks, port):
    """What each of these ranks gets: a store, or the error."""
    found = {}

    def come(number, rank):
        try:
            found[number] = meet(Place(rank, 2, "127.0.0.1", port), wait_seconds=3.0)
        except UsageError as error:
            found[number] = str(error)

    threads = [threading.Thread(target=come, args=pair) for pair in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def test_all_ranks_get_one_store_whoever_comes_first():
    first, second = _meet_in_threads([1, 0], _free_port()).values()
    first.set("word", "from one")
    assert second.get("word") == b"from one"


def test_two_processes_with_one_rank_are_refused():
    found = _meet_in_threads([0, 1, 1], _free_port())
    errors = [value for value in found.values() if isinstance(value, str)]
    assert len(errors) == 1
    assert re.match(r"RANK=1: another process of this run has the same rank", errors[0])
