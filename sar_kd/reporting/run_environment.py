"""Where and how a run was made: versions, GPU, commit, command line and date."""

from __future__ import annotations

import datetime
import platform
import shlex
import subprocess
import sys
from pathlib import Path

from sar_kd.runtime import environment
from sar_kd.version import __version__

_PACKAGE = Path(__file__).resolve().parents[1]


def describe_environment() -> dict:
    """Plain values for `config.json`: `sar_kd`, `python`, `torch` and other versions, `devices`, `system`, `commit`,
    `command` and `date`.
    """
    versions = {name: version for name, version in environment.versions().items() if version != "missing"}
    gpus = [f"{gpu.name}, {gpu.memory / 1e9:.1f} GB" for gpu in environment.find_gpus()]
    return {
        "sar_kd": __version__,
        **versions,
        "devices": gpus or ["CPU"],
        "system": f"{platform.system()} {platform.machine()}",
        "commit": find_commit(),
        "command": command_line(),
        "date": timestamp(),
    }


def timestamp() -> str:
    """The date and time with its zone, to the second: 2026-01-31T12:34:56+00:00."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def command_line() -> str:
    """The command that started this process, as it can be typed again."""
    words = list(sys.argv)
    if Path(words[0]).parts[-2:] == ("sar_kd", "__main__.py"):
        words[:1] = ["python", "-m", "sar_kd"]
    elif words[0].endswith(".py"):
        words.insert(0, "python")
    return shlex.join(words)


def find_commit(package: Path = _PACKAGE) -> str:
    """The commit of the checkout that this package lies in, with '+changes' if files differ; '' if there is none."""
    if not (package.parent / ".git").exists():
        return ""
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(package.parent), *words], capture_output=True, text=True, timeout=5, check=True
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no", "--", package.name))
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit + ("+changes" if changes else "")
