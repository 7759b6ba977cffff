"""The tests on every Python, and on the oldest and the newest libraries that `pyproject.toml` allows.

    pip install nox
    nox --list
    nox -s "tests-3.13"                             # requirements-dev.txt, all tests
    nox -s lowest -- tests/losses tests/alignment   # a part of them
    nox -s newest

Each session makes its own virtual environment, runs pytest (`-n auto` without arguments) and three steps of the main
job. `SAR_KD_TORCH` is what is installed as PyTorch in place of a session's own, such as a wheel without CUDA.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import nox

PYTHONS = ("3.10", "3.11", "3.12", "3.13")

TOOLS = ("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "matplotlib>=3.8", "accelerate>=1.1")

MAIN_JOB = ("train_sar_kd_fp16_safe.py", "--train_steps", "3", "--eval_steps", "3")

nox.options.sessions = ["tests", "lowest", "newest"]


def _limits() -> dict[str, tuple[str, str]]:
    """Of each library in `requirements.txt` and of peft: the lowest version, and the requirement without its limit."""
    text = Path("requirements.txt").read_text() + "\n" + Path("pyproject.toml").read_text()
    found = re.findall(r'(?m)(?:^|")([a-z0-9]+)>=([0-9.]+)', text)
    return {name: (f"{name}=={version}.*", f"{name}>={version}") for name, version in reversed(found)}


def _check(session: nox.Session, torch: str, *libraries: str) -> None:
    """Install PyTorch and these libraries, show what was installed, and test with them."""
    session.install(os.environ.get("SAR_KD_TORCH", torch), *libraries)
    names = "torch", "transformers", "numpy", "peft"
    session.run("python", "-c", f"import importlib.metadata as m; print({{n: m.version(n) for n in {names}}})")
    session.run("python", "-m", "pytest", *(session.posargs or ("-n", "auto")))
    session.run("python", *MAIN_JOB, "--output_dir", str(Path(session.create_tmp()) / "run"), "--overwrite")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """What `requirements-dev.txt` installs."""
    _check(session, _limits()["torch"][1], "-r", "requirements-dev.txt")


@nox.session(python=PYTHONS[0])
def lowest(session: nox.Session) -> None:
    """The lowest PyTorch, transformers, numpy and peft that are allowed."""
    limits = _limits()
    own = {name: limits[name][0] for name in ("torch", "transformers", "numpy", "peft")}
    rest = [limits[name][1] for name in ("tqdm", "jinja2", "filelock", "pyyaml")]
    _check(session, own.pop("torch"), *own.values(), *rest, *TOOLS)


@nox.session(python=PYTHONS[-1])
def newest(session: nox.Session) -> None:
    """The newest ones, beyond what `requirements.txt` allows."""
    names = ("transformers", "numpy", "peft", "tqdm", "jinja2", "filelock", "pyyaml")
    _check(session, "torch", "--upgrade", *names, *TOOLS)
