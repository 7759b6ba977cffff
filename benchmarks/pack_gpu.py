"""Pack what `gpu.sh` needs on a machine that has Python and PyTorch, and no network: this package, wheels, models.

    python benchmarks/pack_gpu.py gpu.tar [--python_version 3.12] [--extras peft accelerate matplotlib trl datasets]
    tar xf gpu.tar && cd sar-kd && benchmarks/gpu.sh          # there

The wheels are those that are installed here, without PyTorch and what only PyTorch needs; an extra that is not
installed is left out, and said so. Real models travel where `real_models.py --prepare` has left them. The sizes are
printed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PREFIX, WHEELS, MODELS = "sar-kd", "benchmarks/models/wheels", "benchmarks/models/real"
MODEL_NAMES = ("smollm2", "smollm2_cut")
FROM_THERE = "torch"


def requirements_of(name: str) -> list[str]:
    """What a distribution needs in every environment, without its extras."""
    found = importlib.metadata.requires(name) or []
    return [re.match(r"[A-Za-z0-9._-]+", line)[0] for line in found if "extra ==" not in line]


def closure(names: list[str]) -> tuple[dict[str, str], list[str]]:
    """The versions of these distributions and of all that they need; and those that are not installed here."""
    versions: dict[str, str] = {}
    missing, pending = [], list(names)
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in versions or name == FROM_THERE:
            continue
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # of another platform or Python, or an extra
            missing += [name] if name in names else []
            continue
        pending += requirements_of(name)
    return versions, missing


def megabytes(paths: list[Path]) -> str:
    return f"{sum(path.stat().st_size for path in paths) / 1e6:,.1f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="the tar file to write")
    parser.add_argument("--python_version", default=".".join(map(str, sys.version_info[:2])), help="of that machine")
    parser.add_argument("--extras", nargs="*", default=["peft", "accelerate", "matplotlib"], help="further packages")
    parser.add_argument("--models", type=Path, default=ROOT / MODELS, help="folder of the real models")
    options = parser.parse_args()
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = [re.match(r"[a-z0-9_-]+", line)[0] for line in lines if line]
    versions, missing = closure([*names, *options.extras])
    for name in missing:
        print(f"{name}: is not installed here, so it is left out")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]  # what is there, but not ignored
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    files = [ROOT / name for name in sorted(set(names)) if name and (ROOT / name).is_file()]
    models = sorted(path for path in options.models.glob("*/*") if path.is_file() and path.parent.name in MODEL_NAMES)
    with tempfile.TemporaryDirectory() as folder, tarfile.open(options.output, "w") as tar:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", options.python_version, "--dest", folder]
        subprocess.run([*command, *(f"{name}=={version}" for name, version in sorted(versions.items()))], check=True)
        wheels = sorted(Path(folder).iterdir())
        for title, paths, place in (
            ("this package", files, lambda path: path.relative_to(ROOT)),
            (
                f"{len(wheels)} wheels, Python {options.python_version}",
                wheels,
                lambda path: Path(WHEELS) / path.name,
            ),
            ("real models", models, lambda path: Path(MODELS) / path.relative_to(options.models)),
        ):
            for path in paths:
                tar.add(path.resolve(), f"{PREFIX}/{place(path)}")
            print(f"{title}: {megabytes(paths)}")
    print(f"{options.output}: {megabytes([options.output])}")


if __name__ == "__main__":
    main()
