"""`sar-kd COMMAND`, `python -m sar_kd COMMAND`, and the way from a command line to an exit code.

A command line is checked before the command's own module is imported, and torch with it, so that help and mistakes are
answered at once.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from sar_kd.config.command_line import parse
from sar_kd.config.commands import COMMANDS
from sar_kd.config.fields import C, Command
from sar_kd.config.installation import program_name
from sar_kd.errors import TrainingDiverged, UsageError
from sar_kd.runtime.garbage import no_garbage_collection
from sar_kd.runtime.signals import INTERRUPTED, end_at_once_on_ctrl_c
from sar_kd.version import __version__

if TYPE_CHECKING:
    from sar_kd.runtime.distributed import ProcessGroup

DONE, USAGE, DIVERGED = 0, 2, 3

_NO_MEMORY = ("DefaultCPUAllocator", "bad_alloc", "Cannot allocate memory", "can't start new thread")
"""In the texts of errors that are no MemoryError: PyTorch's, those of C++, the system and its threads"""

_HELP = """{program} COMMAND

train           distil a teacher into a student, as train_sar_kd_stable.py does
preflight       check a run before it starts; nothing is trained
cache           run a teacher once over a text and store its logits
write           let a teacher write the text that a student trains on
shrink          cut a model down to a smaller one, as a student
report          show a run, or compare several, on one HTML page
compare         tell whether one run is better than another, by their held-out text
generate        continue a prompt with the teacher and the student, before and after
eval            let a run's models answer tasks of lm-evaluation-harness
export          write a student as a GGUF file, for llama.cpp and Ollama, or upload it
sft             fine-tune a model on questions with answers
explain         find the likely cause of bad losses in a training log
forensics       show why a step of a run was not finite, and what to try
audit           show how two tokenizers align on a text
routers         list the routers of a mixture-of-experts model
embedded        train the embedded models again

{program} COMMAND --help lists the options of a command."""


def main(argv: list[str] | None = None) -> int:
    """Run the command that `argv` begins with; returns the exit code, as `run`, and 2 for an unknown command."""
    own_process = argv is None
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--version"]:
        print(f"sar-kd {__version__}")
        return DONE
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP.format(program=program_name()))
        return DONE
    if argv[0] not in COMMANDS:
        nearest = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"the commands are {', '.join(COMMANDS)}"
        print(f"error: {argv[0]}: no such command; {hint}", file=sys.stderr)
        return USAGE
    resumable = argv[0] in ("train", "sft")
    return run(partial(start, COMMANDS[argv[0]]), argv[1:], resumable, own_process and resumable)


def start(command: Command[C], argv: Sequence[str] | None = None) -> dict:
    """Check a command line and run the command; returns its result, a dict with `status`.

    Raises: UsageError for what the user can mend; TrainingDiverged after an emergency stop
    """
    if "RANK" in os.environ:  # torchrun: once the processes know one another, only one of them prints an error
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings about sockets hold C++ stack traces
        importlib.import_module("sar_kd.runtime.distributed").join_process_group()
    config = parse(command, argv)
    for line in () if command.run_name else config.notices:  # a run shows them in its first lines
        print(line, file=sys.stderr)
    name, _, function = command.entry.partition(":")
    with no_garbage_collection():
        module = importlib.import_module(f"sar_kd.commands.{name}")
    return getattr(module, function)(config)


def run(
    main: Callable[[list[str] | None], dict],
    argv: list[str] | None = None,
    resumable: bool = True,
    own_process: bool = False,
) -> int:
    """Run a command's `main` and turn its result into an exit code; of several processes one prints the error.

    0 done; 2 an error that the user can mend, in one line; 3 emergency stop; 130 interrupted
    resumable: the command saves checkpoints from which `--resume` continues
    own_process: the process is the command's own, so that a Ctrl-C may end it at once where no loop waits for one
    """
    if own_process:
        end_at_once_on_ctrl_c(_interrupted(resumable), is_silent=os.environ.get("RANK", "0") != "0")
    try:
        summary = main(argv)
    except UsageError as error:
        return _report(f"error: {error}", USAGE)
    except TrainingDiverged as error:
        return _report(str(error), DIVERGED)
    except (RuntimeError, OSError, MemoryError) as error:
        if (line := _memory_error(error)) is not None:
            return _report(line + _how_to_go_on(error), USAGE)
        if isinstance(error, OSError):  # such as a full disk
            reason = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
            return _report(f"error: {reason}{_how_to_go_on(error)}", USAGE)
        group = _process_group()
        line = group.explain_lost_rank(error) if group and isinstance(error, RuntimeError) else None
        if line is None:
            raise
        return _report(
            f"error: {line}; --resume continues from the last checkpoint, if there is one", USAGE, follows=True
        )
    except KeyboardInterrupt:
        return _report(_interrupted(resumable), INTERRUPTED)
    if group := _process_group():
        group.destroy()
    return INTERRUPTED if summary["status"] == "interrupted" else DONE


def _how_to_go_on(error: Exception) -> str:
    """What the run that this error has ended has saved; '' for a command that makes no run."""
    folder = getattr(error, "run_folder", None)
    return f"; {importlib.import_module('sar_kd.runtime.files').how_to_go_on(folder)}" if folder else ""


def _memory_error(error: Exception) -> str | None:
    """The line about memory that has ended; None for any other error."""
    is_gpu = type(error).__name__ == "OutOfMemoryError"  # torch's, which is imported late
    text = str(error)
    if not (is_gpu or isinstance(error, MemoryError) or any(sign in text for sign in _NO_MEMORY)):
        return None
    return (
        f"error: out of {'GPU memory' if is_gpu else 'memory'}; lower --per_device_batch_size or --block_size, or give "
        f"--per_device_batch_size auto or --gradient_checkpointing; `{program_name()} preflight` with the same options "
        "shows what needs the memory"
    )


def _interrupted(resumable: bool) -> str:
    rest = "; --resume continues from the last checkpoint, if there is one" if resumable else ""
    return f"interrupted at once{rest}"


def _report(line: str, code: int, follows: bool = False) -> int:
    """Print an error; returns the code. follows: from a failure of another process, which reports the cause"""
    group = _process_group()
    if group is None or group.should_report(line, follows):
        print("\\n".join(line.splitlines()), file=sys.stderr)  # a value in it may contain newlines
    return code


def _process_group() -> ProcessGroup | None:
    """That of this run; None where nothing has imported its module, and torch with it."""
    distributed = sys.modules.get("sar_kd.runtime.distributed")
    return distributed.current_process_group() if distributed else None
