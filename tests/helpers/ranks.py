"""Several processes on this machine in one process group, as under torchrun, but started without its delay.

As with torchrun, the store through which they find each other lives in the process that starts them.
"""

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

import train_sar_kd_stable
from sar_kd.commands import main

ROOT = Path(__file__).parents[2]
_PRELOADED = [
    "tests.helpers.ranks",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
]


def start(folder: Path, function, *args, size: int = 2) -> SimpleNamespace:
    """Start `size` processes that call function(rank, *args); their output goes into the folder, see `finish`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    previous = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([previous] if previous else [])])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if previous is None else os.environ.update(PYTHONPATH=previous)
    folder.mkdir(parents=True, exist_ok=True)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = (size, store.port, folder, function, args)
    processes = [context.Process(target=_call, args=(rank, *shared)) for rank in range(size)]
    for process in processes:
        process.start()
    return SimpleNamespace(processes=processes, folder=folder, store=store)


def _call(rank, size, port, folder, function, args):
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True", HF_HUB_OFFLINE="1")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    result = function(rank, *args)
    torch.save(result, folder / f"result.{rank}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(result if isinstance(result, int) else 0)


def finish(started: SimpleNamespace, timeout: float = 90) -> list[SimpleNamespace]:
    """Exit code, stdout, lines of stderr and result of each process; none outlives `timeout` seconds."""
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
        path = started.folder / f"result.{rank}"
        result = torch.load(path, weights_only=False) if path.exists() else None
        ended.append(SimpleNamespace(code=process.exitcode, out=out, err=err.splitlines(), result=result))
    assert not hanging, f"ranks {hanging} hang: {[end.err[-8:] for end in ended]}"
    return ended


def run(folder: Path, function, *args, size: int = 2, timeout: float = 90) -> list[SimpleNamespace]:
    """`start`, then `finish`."""
    return finish(start(folder, function, *args, size=size), timeout)


def script(rank: int, argv: list[str], change=None) -> int:
    """The exit code of a script in one of the processes. change: called with the rank before it."""
    if change is not None:
        change(rank)
    return main.run(train_sar_kd_stable.main, argv)
