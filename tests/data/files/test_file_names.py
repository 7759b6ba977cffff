"""Whole runs on files whose names are not text."""

import os

import pytest

from tests.helpers.runs import argv_of, inputs, run_script

__all__ = ["inputs"]  # a fixture


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_file_name_that_is_not_utf8_ends_no_run(inputs, tmp_path, kind):
    name = os.fsdecode(b"caf\xe9.") + kind
    text = (inputs / "text.txt").read_text(encoding="utf-8")
    content = text if kind == "txt" else '{"text": "Some words to learn from."}\n' * 60
    (tmp_path / name).write_text(content, encoding="utf-8")
    argv = argv_of(inputs, tmp_path / "run", steps=2)
    argv[argv.index("--train_file") + 1] = str(tmp_path / name)
    code, _, err = run_script(argv)
    assert (code, err) == (0, [])
    assert b"caf\\udce9" in (tmp_path / "run" / "log.txt").read_bytes()
    assert (tmp_path / "run" / "report.html").is_file()
