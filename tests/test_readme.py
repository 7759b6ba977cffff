"""The README and the pages it points to: commands run as printed, links lead somewhere, tables are true."""

import importlib
import json
import re
import shlex
import subprocess
import sys
import textwrap
from itertools import islice
from pathlib import Path

import pytest

from sar_kd import embedded
from sar_kd.commands.main import COMMANDS, main, run
from sar_kd.config.caching import CachingConfig
from sar_kd.config.evaluating import EvalConfig
from sar_kd.config.exporting import ExportConfig
from sar_kd.config.presets import MODES
from sar_kd.config.runs import SECTIONS, SftConfig
from sar_kd.config.shrinking import ShrinkConfig
from sar_kd.config.writing import WriteConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}
PAGES |= {f"docs/{p.name}": p.read_text(encoding="utf-8") for p in (ROOT / "docs").glob("*.md")}
# What a command that runs here must not name: other people's machines, long benchmarks, and places to be filled in.
ELSEWHERE = (
    "torchrun",
    "pip ",
    "hf ",
    "git ",
    "pytest",
    "benchmarks/",
    "DIR",
    "REPOSITORY",
    "--dataset_name",
    "RUN_",
    "corpus.jsonl",
)


def _commands(text: str) -> list[str]:
    """The lines of a page that are set as code and begin with a command, continued lines joined."""
    joined = text.replace("\\\n", " ")
    lines = [line.strip() for line in re.findall(r"^ {4}(\S.*)$", joined, flags=re.MULTILINE)]
    commands = (re.sub(r"\s+#.*$", "", part).strip() for line in lines for part in line.split("&&"))
    return [line for line in commands if line.startswith(("python ", "sar-kd ", "pip ", "hf ", "git "))]


def _runs_here(command: str) -> bool:
    return not any(word in command for word in ELSEWHERE)


def _with_few_steps(command: str) -> str:
    return command.replace("--train_steps 500", "--train_steps 2").replace(" sft --task", " sft --max_steps 3 --task")


# The same command may stand on both pages.
HERE = [
    command
    for command in dict.fromkeys(_commands(README) + _commands(PAGES["docs/first_run.md"]))
    if _runs_here(command)
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder with the program in it, as after a clone."""
    for name in ("train_sar_kd_stable.py", "train_sar_kd_fp16_safe.py", "sar_kd"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_is_short_and_has_commands_that_run_here():
    assert len(README.splitlines()) <= 140
    assert {"preflight", "report", "generate"} <= {word for command in HERE for word in command.split()}
    assert sum("train_sar_kd" in command for command in HERE) >= 2


@pytest.fixture(scope="module")
def splits():
    """The first documents of each split of the embedded text that a run reads."""
    whole = embedded.read_text("transfer", "validation")
    return {
        name: dict(islice(split.items(), 60)) for name, split in zip(("transfer", "validation"), whole, strict=True)
    }


@pytest.fixture
def little_text(monkeypatch, splits):
    """The embedded text's first documents stand for all of it."""
    monkeypatch.setattr(embedded, "read_text", lambda *names: [splits[name] for name in names])


@pytest.mark.slow
def test_every_command_of_the_readme_runs_as_printed_with_few_steps(place, little_text, capsys):
    """In this process, one after another, as the README has them."""
    for command in HERE:
        words = shlex.split(_with_few_steps(command))[1:]
        if words[:2] == ["-m", "sar_kd"]:
            code = main(words[2:])
        else:
            code = run(importlib.import_module(Path(words[0]).stem).main, words[1:])
        assert code == 0, (command, capsys.readouterr().err)
    assert json.loads((place / "runs/first/summary.json").read_text())["status"] == "finished"


@pytest.mark.long
def test_every_command_of_the_readme_runs_in_a_shell(place, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    for command in HERE:
        few = _with_few_steps(command)
        done = subprocess.run(few, shell=True, capture_output=True, text=True, cwd=place)
        assert done.returncode == 0, (command, done.stderr)


@pytest.mark.slow
def test_the_python_on_the_pages_runs(place, little_text):
    page = PAGES["docs/python.md"]
    code = textwrap.dedent(page[page.index("    from sar_kd") : page.index("\n- ")])
    names: dict = {}
    exec(code.replace("train_steps=20", "train_steps=1"), names)
    assert names["result"].summary["steps"] == 1


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_link_of_a_page_leads_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGES[page])
    local = [target for target in targets if not target.startswith("http")]
    assert not [target for target in local if not (ROOT / page).parent.joinpath(target).exists()]


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_flag_and_verb_that_a_page_names_exists(page):
    sections = [
        *SECTIONS.values(),
        *SftConfig.sections().values(),
        *CachingConfig.sections().values(),
        ShrinkConfig,
        WriteConfig,
        EvalConfig,
        ExportConfig,
    ]
    flags = {name for section in sections for name in section.__dataclass_fields__}
    of_commands = {"help", "json", "mode", "version", "output", "chat", "model", "max_new_tokens", "sample_temperature"}
    of_others = {
        "check", "index-url", "force-reinstall", "no-index", "find-links", "no-deps", "depth", "local-dir", "logdir",
        "kills", "variants", "seeds", "flags", "groups", "pairs", "rounds", "steps", "sizes", "shapes", "limit_mb",
        "vocab_size", "rows", "sides", "width", "cpu_time", "minutes", "warmup", "shape", "batch_size",
        "nproc_per_node", "repo-type",
        "nnodes", "node_rank", "master_addr", "master_port", "ranks", "workspaces", "positions",
        "upgrade", "config", "include_path", "learning_rate", "student-lr", "prepare", "trl_python", "kinds", "texts",
        "real",
    }  # fmt: skip
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", PAGES[page]))
    assert named <= flags | of_commands | of_others
    commands = set(re.findall(r"(?:python -m sar_kd|`sar-kd) ([a-z]+)", PAGES[page]))
    assert commands <= set(COMMANDS)


def test_the_table_of_modes_has_the_modes_values():
    (table,) = re.findall(r"\| `--mode` \|.*?\n\n", PAGES["docs/modes.md"], flags=re.DOTALL)
    rows = {
        row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in table.splitlines() if row
    }
    names = rows["`--mode`"]
    assert names == list(MODES)
    for mode, rate, temperature, alphas, stop in zip(
        MODES.values(), rows["`--student_lr`"], rows["`--temperature`"], rows["`--alpha_kd` / `--alpha_ce`"],
        rows["NaN batches before the emergency stop"], strict=True,
    ):  # fmt: skip
        assert float(rate) == mode["student_lr"]
        assert float(temperature) == mode["temperature"]
        assert [float(alpha) for alpha in alphas.split("/")] == [mode["alpha_kd"], mode["alpha_ce"]]
        assert int(stop) == mode["max_nan_batches"]


def test_every_package_is_in_the_readmes_map():
    listed = README[README.index("## Where things are") :]
    packages = {path.parent.name for path in (ROOT / "sar_kd").glob("*/__init__.py")}
    assert not [name for name in sorted(packages) if f"{name}/" not in listed]


def test_every_page_is_in_the_index():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"\]\(([\w-]+\.md)\)", PAGES["docs/README.md"]))


def test_the_tables_of_quality_have_the_measured_bits_per_byte():
    real, embedded_pair = PAGES["docs/quality.md"].split("## On the embedded pair")
    bits = _final_bits("quality.json")
    rows = re.findall(r"^\| [^|]+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", embedded_pair, re.MULTILINE)
    assert len(rows) == 10
    for *seeds, mean in rows:
        assert {float(value) for value in seeds} <= bits
        assert abs(sum(map(float, seeds)) / 3 - float(mean)) < 1e-4
    means = {mean for *_, mean in rows}
    bits = _final_bits("real_models.json")
    rows = re.findall(r"^\| [^|]+ \| ([\d.]+) \| ([\d.]*) ?\| ([\d.]*) ?\| (?!\d)", real, re.MULTILINE)
    assert len(rows) == 14
    for row in rows:
        values = [float(value) for value in row if value]
        assert {*values} <= bits
        means.add(f"{sum(values) / len(values):.4f}")
    shown = re.findall(r"\b[12]\.\d{4}\b", README)
    assert len(shown) == 6
    assert {*shown} <= means


def _final_bits(name):
    runs = json.loads((ROOT / "benchmarks/results" / name).read_text())["runs"]
    return {round(run["summary"]["val_bits_per_byte_final"], 4) for run in runs.values()}
