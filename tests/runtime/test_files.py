"""Files that are written whole or not at all, and the lock of a folder."""

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys

import pytest

from sar_kd.errors import UsageError
from sar_kd.runtime.files import LOCK_FILES, FolderLock, atomic_rename, atomic_write, require_disk_space

HOLD = """
import sys, time
from pathlib import Path
from sar_kd.runtime.files import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def events(monkeypatch):
    """The calls of fsync ('file' or 'folder'), replace and rename, in order."""
    found = []

    def recorded(name, function):
        def call(*args):
            kind = name
            if name == "fsync":
                kind = "folder" if stat.S_ISDIR(os.fstat(args[0]).st_mode) else "file"
            found.append(kind)
            return function(*args)

        return call

    for name in ("fsync", "replace", "rename"):
        monkeypatch.setattr(os, name, recorded(name, getattr(os, name)))
    return found


@pytest.mark.parametrize("data", ["new\n", b"new\n", lambda path: path.write_bytes(b"new\n")], ids=type)
def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_is_too(tmp_path, events, data):
    (tmp_path / "file").write_text("old")
    atomic_write(tmp_path / "file", data)
    assert events == ["file", "replace", "folder"]
    assert (tmp_path / "file").read_bytes() == b"new\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_on_the_disk_with_all_its_files_before_it_replaces_another(tmp_path, events):
    for name in ("new", "old"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / name).write_text(name)
    atomic_rename(tmp_path / "new", tmp_path / "old")
    assert events == ["folder", "file", "folder", "rename", "folder"]
    assert [path.name for path in (tmp_path / "old" / "inner").iterdir()] == ["new"]


@pytest.mark.skipif(os.name == "nt", reason="no umask")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_get_the_permissions_that_the_umask_leaves(tmp_path, mask):
    former = os.umask(mask)
    try:
        (tmp_path / "new" / "inner").mkdir(parents=True)
        for path in (tmp_path / "new" / "inner" / "file", tmp_path / "alone"):
            path.touch(mode=0o600)  # as by a library that writes through a temporary file
        atomic_rename(tmp_path / "new", tmp_path / "folder")
        atomic_rename(tmp_path / "alone", tmp_path / "file")
        (tmp_path / "plain").touch()
    finally:
        assert os.umask(former) == mask
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert len(modes) == 3
    assert set(modes.values()) == {0o666 & ~mask}


def test_a_disk_that_is_full_is_one_line_and_leaves_the_old_file_alone(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")

    def fails(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(UsageError, match=r"--teacher_cache: .*file cannot be written \(No space left on device\)"):
        atomic_write(tmp_path / "file", "new", "teacher_cache")
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_whose_name_cannot_be_flushed_is_no_failure(tmp_path, monkeypatch):
    fsync = os.fsync

    def fails_for_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "no folders here")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails_for_folders)
    atomic_write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


def test_a_folder_is_refused_with_the_holders_process_id_and_is_free_once_the_holder_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        for act in (FolderLock(tmp_path, "teacher_cache").acquire, FolderLock(tmp_path, "teacher_cache").check):
            with pytest.raises(UsageError, match=f"--teacher_cache {tmp_path}: process {holder.pid} is running in it"):
                act()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    assert {path.name for path in tmp_path.iterdir()} == set(LOCK_FILES)
    lock = FolderLock(tmp_path)
    lock.check()
    lock.acquire()
    assert (tmp_path / LOCK_FILES[1]).read_text() == str(os.getpid())
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_its_holder_deleted_in_between_is_made_again(tmp_path):
    lock = FolderLock(tmp_path)
    acquire, calls = lock._lock.acquire, []

    def acquires_what_is_gone(**options):
        acquire(**options)
        calls.append(options)
        if len(calls) == 1:
            (tmp_path / LOCK_FILES[0]).unlink()

    lock._lock.acquire = acquires_what_is_gone
    lock.acquire()
    assert len(calls) == 2
    with pytest.raises(UsageError, match=str(os.getpid())):
        FolderLock(tmp_path).acquire()


def test_a_lock_file_that_another_run_made_anew_in_between_is_the_others(tmp_path):
    first, second, third = (FolderLock(tmp_path) for _ in range(3))
    acquire = second._lock.acquire

    def acquires_an_old_file(**options):
        acquire(**options)
        if not third._lock.is_locked:  # its name was given to a new file, which a third run has locked
            (tmp_path / LOCK_FILES[0]).unlink()
            third.acquire()

    second._lock.acquire = acquires_an_old_file
    first.acquire()
    first.release()
    with pytest.raises(UsageError, match=str(os.getpid())):
        second.acquire()


@pytest.mark.parametrize("error", [OSError(errno.ENOTSUP, "no locks"), NotImplementedError("no locks")], ids=type)
def test_a_file_system_without_locks_has_none(tmp_path, error):
    lock = FolderLock(tmp_path)

    def fails(**options):
        raise error

    lock._lock.acquire = fails
    lock.acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_text_with_the_bytes_of_a_file_name_that_is_not_utf8_is_written_escaped(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    atomic_write(tmp_path / "a", f"\u00e9 {name}")
    assert (tmp_path / "a").read_bytes() == "\u00e9 caf\\udce9.txt".encode()


def test_a_disk_without_room_says_what_the_run_has_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 0))
    for made, ending in (
        ("", "nothing was saved yet"),
        ("config.json", "no checkpoint was saved yet, so start again with --overwrite"),
        ("checkpoint/step-00000006", "the checkpoint of step 6 is intact, --resume continues from it"),
    ):
        (tmp_path / made).mkdir(parents=True, exist_ok=True)
        with pytest.raises(UsageError, match=r"0 bytes free\); free some; " + ending + "$"):
            require_disk_space(tmp_path, 10**6, "the checkpoint of step 9")
    with pytest.raises(UsageError, match=r"; name another folder$"):
        require_disk_space(tmp_path, 10**6, "the tokens", remedy="name another folder")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10**9))
    assert require_disk_space(tmp_path, 10**6, "the tokens") == 10**9
