"""The log of a run: what the terminal shows, what the files hold, and that an observer cannot end a run."""

import datetime
import io
import json
import re
import sys
import types

import pytest

from sar_kd.config.command_line import parse
from sar_kd.config.commands import SFT
from sar_kd.config.presets import STABLE
from sar_kd.errors import UsageError
from sar_kd.reporting import run_environment
from sar_kd.reporting.run_environment import command_line, describe_environment, find_commit
from sar_kd.reporting.run_log import RunLog, SftLog
from sar_kd.runtime.console import paint

RECORD = {
    "loss": 4.0, "ce_loss": 4.25, "kd_loss": 2.5, "grad_norm": 0.75, "learning_rate": 1e-3, "loss_scale": 16384.0,
    "num_target_tokens": 9, "epoch": 0.5, "applied": True, "cause": None,
}  # fmt: skip
START, TEACHER = {"val_ppl": 3.0, "val_bits_per_byte": 1.0}, {"val_ppl": 2.0, "val_bits_per_byte": 0.5}


def _log(folder, *flags, observers=(), kind=RunLog, command=STABLE):
    config = parse(command, ["--output_dir", str(folder), "--log_steps", "1", "--train_steps", "4", *flags])
    return kind(config, observers), config


def _records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_details_are_printed_with_verbose_only_and_always_kept(tmp_path, capsys):
    for flags, expected in (((), ["a"]), (("--verbose",), ["a", "b"]), (("--quiet",), [])):
        folder = tmp_path / f"run{flags}"
        log, config = _log(folder, *flags)
        log.info("a")
        log.detail("b")
        log.open(0, config.train)
        log.close()
        assert capsys.readouterr().out.splitlines() == expected
        assert (folder / "log.txt").read_text().splitlines()[1:] == ["a", "b"]


def test_a_resumed_run_goes_on_in_its_log_and_counts_its_seconds_on(tmp_path):
    log, config = _log(tmp_path)
    log.info("first")
    log.open(0, config.train)
    log.log_step({"step": 1, **RECORD}, 1.0, 1.0)
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text(json.dumps(json.loads(lines[0]) | {"seconds": 100.0}) + "\n")
    log, config = _log(tmp_path, "--resume")
    log.open(1, config.train)
    log.log_step({"step": 2, **RECORD}, 1.0, 1.0)
    log.close()
    text = (tmp_path / "log.txt").read_text()
    assert text.index("first") < text.index("Step 1:") < text.index("Step 2:")
    first, second = _records(tmp_path)
    assert 100.0 <= second["seconds"] < 110.0
    assert datetime.datetime.fromisoformat(first["time"]).tzinfo is not None


def test_every_record_has_a_time_and_the_config_where_it_was_made(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/sar_kd/__main__.py", "train", "--train_file", "a b.txt"])
    log, config = _log(tmp_path)
    log.open(0, config.train)
    log.log_start(START, TEACHER)
    log.log_step({"step": 1, **RECORD}, 1.0, 1.0)
    log.log_evaluation({"step": 1, **START}, True)
    log.close()
    assert all({"time", "seconds"} <= set(record) for record in _records(tmp_path))
    found = json.loads((tmp_path / "config.json").read_text())["environment"]
    assert found["command"] == "python -m sar_kd train --train_file 'a b.txt'"
    assert {"torch", "transformers", "python", "devices", "commit", "date"} <= set(found)
    assert (tmp_path / "log.txt").read_text().splitlines()[0] == f"{found['date']}  {found['command']}"
    assert parse(STABLE, ["--resume", "--output_dir", str(tmp_path)]).train.train_steps == 4  # still reads it


def test_the_commit_is_that_of_a_checkout_and_none_elsewhere(tmp_path):
    assert find_commit(tmp_path / "sar_kd") == ""
    (tmp_path / ".git").mkdir()  # no repository
    assert find_commit(tmp_path / "sar_kd") == ""


def test_the_environment_names_what_is_installed(monkeypatch):
    monkeypatch.setattr(run_environment.environment, "versions", lambda: {"torch": "1", "matplotlib": "missing"})
    found = describe_environment()
    assert found["torch"] == "1"
    assert "matplotlib" not in found
    monkeypatch.setattr(sys, "argv", ["train.py", "-x"])
    assert command_line() == "python train.py -x"


@pytest.mark.parametrize("hook", ["log_record", "log_summary", "close"])
@pytest.mark.parametrize(("error", "kind"), [(RuntimeError, "RuntimeError: "), (UsageError, "")])
def test_an_observer_that_fails_is_left_out_and_the_run_goes_on(tmp_path, capsys, hook, error, kind):
    calls = []

    def fail(*_):
        raise error("no drawing today\nsecond line")

    hooks = {name: (lambda *_, name=name: calls.append(name)) for name in ("log_record", "log_summary", "close")}
    bad = types.SimpleNamespace(name="report.html", **hooks | {hook: fail})
    good = types.SimpleNamespace(name="good", **hooks)
    log, config = _log(tmp_path, observers=[bad, good])
    log.open(0, config.train)
    log.log_step({"step": 1, **RECORD}, 1.0, 1.0)
    log.log_step({"step": 2, **RECORD}, 1.0, 1.0)
    log.close()
    lines = [line for line in capsys.readouterr().out.splitlines() if "report.html" in line]
    expected = f"Warning: report.html is not written from here on ({kind}no drawing today); the run goes on"
    assert lines == ([] if hook == "log_summary" else [expected])
    assert calls.count("log_record") == (2 if hook == "log_record" else 4)


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_narrow_terminal_gets_the_parts_that_fit_and_the_file_all(tmp_path, monkeypatch):
    for columns, ending in ((80, "grad_norm=0.75"), (200, "left")):
        terminal = _Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setenv("COLUMNS", str(columns))
        folder = tmp_path / str(columns)
        log, config = _log(folder)
        log.open(0, config.train)
        log.log_step({"step": 1, **RECORD}, 1.0, 5286.0)
        log.close()
        (line,) = (line for line in terminal.getvalue().split("\n") if "Step 1:" in line)
        line = line[line.index("Step") :]
        assert line.endswith(ending)
        assert len(line) < columns
        full = (folder / "log.txt").read_text().splitlines()[-1]
        assert full.startswith(
            "Step 1: avg_loss=4.0000 (kd=2.5000, ce=4.2500) lr=1.0e-03 grad_norm=0.75 success_rate=100%"
        )
        assert full.endswith("left")


def test_the_last_step_has_a_line_however_few_there_are(tmp_path, capsys):
    log, config = _log(tmp_path, "--log_steps", "3")
    log.open(0, config.train)
    for step in range(1, 5):
        log.log_step({"step": step, **RECORD}, 1.0, 5286.0)
    log.close()
    printed = re.findall(r"Step (\d+): avg_loss", capsys.readouterr().out)
    assert printed == ["3", "4"]


def test_fine_tuning_prints_its_pace_too(tmp_path, capsys):
    log, config = _log(tmp_path, kind=SftLog, command=SFT)
    log.open(0, config.train)
    log.log_step({"step": 1, **RECORD}, 1.0, 5286.4)
    log.close()
    found = eval(capsys.readouterr().out)
    assert found["step"] == "1/4"
    assert found["tokens_per_second"] == 5286
    assert {"elapsed", "left", "loss", "grad_norm", "learning_rate", "epoch"} <= set(found)


# Colours


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    line = "Step 3: skipped (overflow, loss scale 4 -> 2)"
    assert paint(line, _Terminal()) == f"\033[33m{line}\033[0m"
    assert paint("Step 3: Validation PPL = 3.00 (best so far)", _Terminal()).startswith("\033[32m")
    assert paint("error: --x: no", _Terminal()).startswith("\033[31m")
    assert paint("plain", _Terminal()) == "plain"
    assert paint(line, io.StringIO()) == line
    monkeypatch.setenv("NO_COLOR", "1")
    assert paint(line, _Terminal()) == line
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert paint(line, _Terminal()) == line


def test_a_line_is_wrapped_between_words_on_a_terminal_and_a_command_is_not(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    line = "Warning: " + "word-by-word " * 20 + "/a" * 50 + " --grad_accum_steps 4"
    start, *parts, end = paint(line, _Terminal()).split("\n")
    assert start.startswith("\033[33mWarning: word-by-word")
    assert end == "  --grad_accum_steps 4\033[0m"
    assert all(len(part) < 80 or part == "  " + "/a" * 50 for part in parts)
    assert " ".join(part.strip() for part in (start[5:], *parts, end[:-4])) == line
    assert paint(line, io.StringIO()) == line
    table = f"  {'student, start':<28}{'71.0':>12}"
    assert paint(table, _Terminal()) == table
    assert "\n" not in paint("Next: python -m sar_kd generate " + "runs/a " * 20, _Terminal())
