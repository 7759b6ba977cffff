"""Several processes on this machine that find each other as under torchrun, without its seconds of starting each."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
_PRELOADED = ["train_sar_kd_stable", "transformers.models.llama.modeling_llama", "torch.distributed.fsdp"]


def start(folder: Path, function, *args, size: int = 2) -> SimpleNamespace:
    """`size` processes that call function(rank, *args) in a folder of their own; see `finish`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    former = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *([former] if former else [])])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if former is None else os.environ.update(PYTHONPATH=former)
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_call, args=(rank, size, port, folder, function, args)) for rank in range(size)]
    for process in processes:
        process.start()
    return SimpleNamespace(processes=processes, folder=folder)


def _call(rank, size, port, folder, function, args):
    import torch

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), HF_HUB_OFFLINE="1")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    code = 0
    result = function(rank, *args)
    if isinstance(result, int):
        code = result
    else:
        torch.save(result, folder / f"result.{rank}")
    os._exit(code)


def finish(started: SimpleNamespace, timeout: float = 90) -> list[SimpleNamespace]:
    """What became of each process: exit code, lines on stdout and stderr, result; none outlives `timeout` seconds."""
    import torch

    deadline = time.monotonic() + timeout
    for process in started.processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hanging = [rank for rank, process in enumerate(started.processes) if process.is_alive()]
    for process in started.processes:
        process.kill()
        process.join()
    ended = []
    for rank, process in enumerate(started.processes):
        out, err = ((started.folder / f"{name}.{rank}").read_text() for name in ("out", "err"))
        result = None
        with contextlib.suppress(OSError, pickle.UnpicklingError):
            result = torch.load(started.folder / f"result.{rank}", weights_only=False)
        ended.append(SimpleNamespace(code=process.exitcode, out=out, err=err.splitlines(), result=result))
    assert not hanging, f"ranks {hanging} hang: {[end.err[-8:] for end in ended]}"
    return ended


def run(folder: Path, function, *args, size: int = 2, timeout: float = 90) -> list[SimpleNamespace]:
    """`start`, then `finish`."""
    return finish(start(folder, function, *args, size=size), timeout)


def script(rank: int, argv: list[str], change=None) -> int:
    """The exit code of a script in one of the processes. change: called with the rank before."""
    import train_sar_kd_stable
    from sar_kd import cli

    if change is not None:
        change(rank)
    code = cli.run(train_sar_kd_stable.main, argv)
    import sys

    sys.stdout.flush()
    sys.stderr.flush()
    return code
