"""Exit codes: what a script returns to the shell, and the one line that goes with it."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from sar_kd.config import UsageError
from sar_kd.guards import TrainingDiverged
from sar_kd.world import current_world

DONE, USAGE, DIVERGED, INTERRUPTED = 0, 2, 3, 130


def run(main: Callable[[list[str] | None], dict], argv: list[str] | None = None, resumable: bool = True) -> int:
    """Run a script's `main` and turn its outcome into an exit code; of several processes one says the line.

    0 done; 2 something to mend, said in one line; 3 emergency stop; 130 interrupted
    resumable: it leaves checkpoints from which `--resume` continues, as the verb `train` alone does
    """
    try:
        summary = main(argv)
    except UsageError as error:
        return _say(f"error: {error}", USAGE)
    except torch.cuda.OutOfMemoryError:
        remedy = "give --per_device_batch_size auto, or see what takes how much: python -m sar_kd preflight"
        return _say(f"error: out of GPU memory; {remedy}", USAGE)
    except TrainingDiverged as error:
        return _say(str(error), DIVERGED)
    except RuntimeError as error:
        line = current_world().lost(error)
        if line is None:
            raise
        return _say(f"error: {line}; --resume continues from the last checkpoint, if there is one", USAGE, follows=True)
    except OSError as error:  # a disk that is full, a folder that went away
        reason = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        rest = "; what was saved before is intact, --resume continues from there" if resumable else ""
        return _say(f"error: {reason}{rest}", USAGE)
    except KeyboardInterrupt:
        rest = "; --resume continues from the last checkpoint, if there is one" if resumable else ""
        return _say(f"interrupted at once{rest}", INTERRUPTED)
    current_world().leave()
    return INTERRUPTED if summary["status"] == "interrupted" else DONE


def _say(line: str, code: int, follows: bool = False) -> int:
    """follows: another process has the reason"""
    if current_world().is_to_say(line, follows):
        print("\\n".join(line.splitlines()), file=sys.stderr)  # a value that was given may hold ends of lines
    return code
