"""What is called how in this installation: a clone that is run in place, or the installed command."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]
"""The folder that holds the package"""


def program_name() -> str:
    """What to type before a command's name, here: `sar-kd`, or Python with the package."""
    if Path(sys.argv[0]).stem == "sar-kd":
        return "sar-kd"
    python = "python" if shutil.which("python") else "python3"
    # A script finds the package beside itself, first in sys.path; `-m` in the current folder or further on.
    is_importable = Path.cwd() == _ROOT or str(_ROOT) in sys.path[1:]
    place = "" if is_importable or Path(sys.argv[0]).name == "__main__.py" else f"PYTHONPATH={_ROOT} "
    return f"{place}{python} -m sar_kd"


def as_called_here(text: str) -> str:
    """A constant text about this program's commands, with the name that they have in this installation."""
    return text.replace("`sar-kd ", f"`{program_name()} ")
