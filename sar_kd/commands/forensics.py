"""`sar-kd forensics`: why a step of a run was not finite, and what to try."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sar_kd.config.command_line import parse
from sar_kd.config.fields import Command, Section, option
from sar_kd.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ForensicsConfig(Section):
    """Run: the one to look at."""

    run: str = option("", "a run folder", metavar="RUN_DIR", positional=True)
    json: bool = option(False, "print JSON")


FORENSICS = Command("forensics", "Show why a step of a run was not finite, and what to try.", ForensicsConfig)


def main(argv: list[str]) -> dict:
    """Print `crash/` of a run folder; `--json` for programs.

    Raises: UsageError if the folder holds no run
    """
    config = parse(FORENSICS, argv)
    folder = Path(config.run)
    if not (folder / "config.json").is_file():
        raise UsageError(f"forensics {folder}: holds no run")
    path = folder / "crash" / ("crash.json" if config.json else "crash.md")
    no_crash = "{}\n" if config.json else "No step of this run had a NaN.\n"
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else no_crash
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"forensics {folder}: {path} cannot be read ({error})") from None
    print(text, end="")
    return {"status": "finished"}
