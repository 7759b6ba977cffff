"""`sar-kd forensics`: why a step of a run was not finite, and what to try."""

from __future__ import annotations

from pathlib import Path

from sar_kd.config.commands import ForensicsConfig
from sar_kd.errors import UsageError


def main(config: ForensicsConfig) -> dict:
    """Print `crash/` of a run folder; `--json` for programs.

    Raises: UsageError if the folder holds no run
    """
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
