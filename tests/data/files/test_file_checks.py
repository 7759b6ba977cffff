"""Files of text that are not there, are no files, or do not begin as they should, before anything is read whole."""

import os
import socket

import pytest

from sar_kd.config.sections import DataConfig
from sar_kd.data.files import file_checks
from sar_kd.data.files.file_checks import check_first_lines, require_files
from sar_kd.data.files.sources import load_documents
from sar_kd.errors import UsageError

OPTION = pytest.mark.parametrize("option", ["train_file", "validation_file"])


def _config(option, path, tmp_path):
    (tmp_path / "good.txt").write_text("Some text.")
    files = {"train_file": (str(tmp_path / "good.txt"),)}
    return DataConfig(**files | {option: (str(tmp_path / "good.txt"), str(path))})


@OPTION
@pytest.mark.parametrize("name", ["no.txt", "no/such.txt", "n" * 300 + ".txt"])
def test_a_file_that_is_not_there_is_one_line_with_its_option(option, name, tmp_path):
    with pytest.raises(UsageError, match=f"--{option} .*cannot be read"):
        require_files(_config(option, tmp_path / name, tmp_path))


@OPTION
def test_a_file_name_with_a_null_character_is_refused_with_its_option(option, tmp_path):
    with pytest.raises(UsageError, match=f"--{option} .*null character"):
        _config(option, tmp_path / "null\0byte.txt", tmp_path)


@OPTION
def test_what_is_no_file_is_refused_and_never_waited_for(option, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.txt").mkdir()
    listener = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(tmp_path)  # a long path is no name of a socket
    listener.bind("socket.txt")
    for name, word in {"pipe.txt": "pipe", "folder.txt": "folder", "socket.txt": "socket"}.items():
        for act in (require_files, check_first_lines, load_documents):
            with pytest.raises(UsageError, match=f"--{option} .*{name}: is a {word}"):
                act(_config(option, tmp_path / name, tmp_path))
    with pytest.raises(UsageError, match="is a device"):
        require_files(_config(option, "/dev/zero", tmp_path))
    listener.close()


@OPTION
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.bin", b"text", "must be a"),
        ("a.jsonl", b"{", "line 1 is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "it has: body"),
        ("a.txt", b"\xff\xfe\xff", "is not UTF-8"),
        ("a.jsonl.gz", b"no archive", "cannot be read"),
    ],
)
def test_a_file_that_begins_wrong_is_refused_by_its_first_line(option, name, content, expected, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=expected):
        check_first_lines(_config(option, tmp_path / name, tmp_path))


def test_of_a_long_text_the_beginning_is_read_only(tmp_path, monkeypatch):
    monkeypatch.setattr(file_checks, "LONG", 8)
    monkeypatch.setattr(file_checks, "read_file", lambda *a: pytest.fail("it was read whole"))
    path = tmp_path / "long.txt"
    path.write_text("Some text that is long.")
    check_first_lines(DataConfig(train_file=(str(path),)))
