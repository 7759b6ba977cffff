"""`sar-kd forensics`: why a step of a run was not finite, and what to try."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sar_kd.config.command_line import parse_section
from sar_kd.config.fields import flag
from sar_kd.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ForensicsConfig:
    """Forensics: what a run has written about its first bad step."""

    run: str = flag("", "a run folder", metavar="RUN_DIR")


def main(argv: list[str]) -> dict:
    """Print why a run was stopped, or had to refuse a step; `--json` for programs.

    Raises: UsageError if the folder holds no run
    """
    about = "Why a step of a run could not be applied."
    config, as_json = parse_section("forensics", about, ForensicsConfig, argv, ["run"])
    folder = Path(config.run)
    if not (folder / "config.json").is_file():
        raise UsageError(f"forensics {folder}: holds no run")
    path = folder / "crash" / ("crash.json" if as_json else "crash.md")
    nothing = "{}\n" if as_json else "No step of this run had a NaN.\n"
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else nothing
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"forensics {folder}: {path} cannot be read ({error})") from None
    print(text, end="")
    return {"status": "finished"}
