"""Faults outside the arithmetic: a kill, a full disk, damaged files, two runs in one folder, odd text, odd models, and
files that would rather be run than read. Whatever happens, one line says it and what was saved stays.
"""

import ast
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import ANY

import pytest
import safetensors.torch
import torch
import transformers

from sar_kd.commands import main
from sar_kd.errors import UsageError
from sar_kd.reporting import run_log
from sar_kd.runtime.files import FolderLock
from sar_kd.training import trainer
from sar_kd.training.checkpoint import find_checkpoint, save_student

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent


def _module(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = _module("train_sar_kd_fp16_safe", ROOT / "train_sar_kd_fp16_safe.py")


@pytest.fixture(scope="module", autouse=True)
def _without_pages():
    """Most of the time of such a short run would go into the charts of its `report.html`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_log, "find_report_writer", lambda folder: ([], []))
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, make_student, byte_tokenizer, corpus_texts):
    """Two tiny models with one tokenizer, and a text file."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("student", "teacher"):
        make_student(len(byte_tokenizer), num_hidden_layers=1).save_pretrained(folder / name)
        byte_tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text("\n".join(corpus_texts), encoding="utf-8")
    return folder


def _argv(inputs, out, *more, steps=4):
    values = {
        "teacher_model": inputs / "teacher", "student_model": inputs / "student", "train_file": inputs / "text.txt",
        "block_size": 32, "train_steps": steps, "eval_steps": 2, "save_steps": 1, "log_steps": 1, "device": "cpu",
        "per_device_batch_size": 2, "student_lr": 1e-3, "output_dir": out,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))] + [str(m) for m in more]


def _run(argv):
    """Exit code, and the text on stderr and stdout."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.run(SCRIPT.main, [str(word) for word in argv])
    return code, err.getvalue(), out.getvalue()


def _assert_refused(argv, *parts):
    code, err, _ = _run(argv)
    assert code == 2, err
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert all(str(part) in err for part in parts), err
    return err


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert _run(_argv(inputs, folder))[0] == 0
    return folder


@pytest.fixture
def run_folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def _resume(folder, *more):
    return ["--resume", "--output_dir", folder, "--train_steps", 6, *more]


# Killed


@pytest.mark.long
def test_killed_runs_end_resumed_as_one_never_touched():
    phases, wrong = _module("kills", ROOT / "benchmarks" / "kills.py").kill(4, seed=1)
    assert wrong == []
    assert sum(phases.values()) == 4


@pytest.mark.long
def test_two_hundred_killed_runs_end_resumed_as_one_never_touched():
    phases, wrong = _module("kills", ROOT / "benchmarks" / "kills.py").kill(int(os.environ.get("KILLS", "200")), seed=0)
    assert wrong == []
    assert phases["inside a checkpoint write"] > 0


def test_a_start_killed_before_its_config_was_there_can_be_repeated(inputs, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").write_text("12345")
    (folder / ".config.json.partial").write_text("{")
    assert _run(_argv(inputs, folder, steps=1))[0] == 0


def test_an_overwrite_killed_while_it_deletes_can_be_repeated(run_folder, inputs, monkeypatch):
    class Killed(BaseException):
        pass

    def remove(path, **how):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", remove)
        with pytest.raises(Killed):
            _run(_argv(inputs, run_folder, "--overwrite"))
    assert (run_folder / "config.json").exists()
    assert _run(_argv(inputs, run_folder, "--overwrite", steps=1))[0] == 0


# A disk that is full


@contextlib.contextmanager
def _files_end_at(num_bytes):
    """Every write beyond so many bytes of a file fails, in Python and below it, as on a full disk."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("num_bytes", [1000, 50_000, 150_000])
def test_a_checkpoint_that_does_not_fit_leaves_the_former_one(run_folder, num_bytes):
    before = {path: path.read_bytes() for path in (run_folder / "checkpoint").rglob("*") if path.is_file()}
    sizes = sorted(len(content) for content in before.values())
    assert sizes[0] < 1000 < 150_000 < sizes[-1]
    with _files_end_at(num_bytes):
        err = _assert_refused(_resume(run_folder), "--output_dir", run_folder, "cannot be written")
    assert "--resume" in err or "intact" in err
    after = {path: path.read_bytes() for path in (run_folder / "checkpoint").rglob("*") if path.is_file()}
    assert before == after
    assert _run(_resume(run_folder))[0] == 0


def test_a_disk_that_is_full_before_the_first_checkpoint_asks_for_a_new_start(inputs, tmp_path):
    with _files_end_at(50_000):
        err = _assert_refused(_argv(inputs, tmp_path / "run"), "cannot be written", "start again with --overwrite")
    assert "--resume" not in err
    assert _run(_argv(inputs, tmp_path / "run", "--overwrite", steps=1))[0] == 0


def test_a_disk_without_room_is_reported_before_anything_is_written(run_folder, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9, 0)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        _assert_refused(_resume(run_folder), "no room for", " 0 bytes free")
    assert _run(_resume(run_folder))[0] == 0


def test_a_student_that_does_not_fit_leaves_the_former_one(tmp_path, make_student, byte_tokenizer):
    student = make_student(64, num_hidden_layers=1)
    save_student(student, byte_tokenizer, tmp_path / "student")
    before = (tmp_path / "student" / "model.safetensors").read_bytes()
    student.lm_head.weight.data.add_(1.0)
    with _files_end_at(2000), pytest.raises(UsageError, match="the student cannot be written"):
        save_student(student, byte_tokenizer, tmp_path / "student")
    assert (tmp_path / "student" / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".student*"))


# Memory that ends


@contextlib.contextmanager
def _address_space(num_bytes):
    """The process may have so many bytes more than it has now, as in a container with a limit."""
    now = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmSize" in line)
    former = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1024 * now + num_bytes, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, former)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.parametrize("place", ["train_step", "evaluate", "save_checkpoint"])
def test_memory_that_ends_is_one_line_and_the_run_resumes(run_folder, monkeypatch, place):
    act = getattr(trainer, place)

    def starved(*args, **options):
        with _address_space(0):
            bytearray(2**33)  # what a larger model would ask for
        return act(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, place, starved)
        err = _assert_refused(_resume(run_folder), "out of memory; lower --per_device_batch_size")
    assert "--resume continues" in err
    code, _, out = _run(_resume(run_folder))
    assert code == 0
    assert "Resumed after step" in out


# Damaged files


def _checkpoints(folder):
    return sorted(path for path in (folder / "checkpoint").iterdir() if path.is_dir())


def _flip(path, at):
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


FILES = ["student.safetensors", "state.pt", "progress.json", "digests.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["flip at 0.2", "flip at 0.6", "flip at 1", "truncated", "empty", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(run_folder, file, damage):
    former, last = _checkpoints(run_folder)
    path = last / file
    if damage.startswith("flip"):
        _flip(path, float(damage.split()[-1]))
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if damage == "truncated" else b"")
    err = _assert_refused(_resume(run_folder), "--resume", last, f"{former.name} is intact", "delete")
    assert (file in err) or file == "digests.json"


def test_without_the_damaged_checkpoint_a_run_resumes_from_the_one_before(run_folder):
    former, last = _checkpoints(run_folder)
    _flip(last / "state.pt", 0.5)
    _assert_refused(_resume(run_folder), f"{former.name} is intact", "delete")
    shutil.rmtree(last)
    code, _, out = _run(_resume(run_folder))
    assert code == 0
    assert "Resumed after step 3" in out


def test_two_damaged_checkpoints_are_reported_to_be_all_there_is(run_folder):
    for path in _checkpoints(run_folder):
        _flip(path / "state.pt", 0.5)
    _assert_refused(_resume(run_folder), "no other one", "--overwrite")


def test_a_pointer_that_leads_elsewhere_is_not_followed(run_folder, tmp_path):
    shutil.copytree(_checkpoints(run_folder)[-1], tmp_path / "step-00000009")
    for name in ("..", str(tmp_path / "step-00000009"), "", "\0", "../../step-00000009"):
        (run_folder / "checkpoint" / "latest").write_text(name)
        found, lines = find_checkpoint(run_folder / "checkpoint")
        assert found == _checkpoints(run_folder)[-1]
        assert len(lines) == 1
    code, _, out = _run(_resume(run_folder))
    assert code == 0
    assert "Resumed after step 4" in out


def test_without_a_pointer_the_newest_intact_checkpoint_is_taken_and_named_to_the_user(run_folder):
    (run_folder / "checkpoint" / "latest").unlink()
    _flip(_checkpoints(run_folder)[-1] / "state.pt", 0.5)
    code, _, out = _run(_resume(run_folder))
    assert code == 0
    assert "latest is missing or damaged: resuming from the newest intact checkpoint, step-00000003" in out
    assert "Resumed after step 3" in out


@pytest.mark.parametrize("keep", [1, 3])
def test_so_many_checkpoints_are_kept(inputs, tmp_path, keep):
    assert _run(_argv(inputs, tmp_path / "run", "--keep_checkpoints", keep))[0] == 0
    assert [int(path.name[-1]) for path in _checkpoints(tmp_path / "run")] == [1, 2, 3, 4][-keep:]


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "nan", "missing weight"])
def test_a_damaged_model_is_named(inputs, tmp_path, which, damage):
    folder = shutil.copytree(inputs / which, tmp_path / which)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    if damage in ("nan", "missing weight"):
        weights = safetensors.torch.load(content)
        name = "model.layers.0.mlp.up_proj.weight"
        weights[name][0, 0] = float("nan")
        if damage == "missing weight":
            del weights[name]
        safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    else:
        damaged = {"truncated": content[: len(content) // 2], "header": b"\xff" * 16 + content[16:], "empty": b""}
        path.write_bytes(damaged[damage])
    err = _assert_refused(_argv(inputs, tmp_path / "run", f"--{which}_model", folder), f"--{which}_model {folder}")
    assert ("up_proj" in err) == (damage in ("nan", "missing weight"))


# Two runs, one folder


def test_a_second_run_in_a_folder_is_refused_with_the_firsts_process_id(inputs, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train_sar_kd_fp16_safe.py"), *_argv(inputs, folder, steps=100_000)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        next(line for line in first.stdout if line.startswith("Step 3:"))
        for more in (("--overwrite",), ("--resume",)):
            argv = _argv(inputs, folder, *more, steps=100_000)
            _assert_refused(argv, f"--output_dir {folder}", f"process {first.pid}")
        steps = len((folder / "metrics.jsonl").read_text().splitlines())
        assert steps > 0
    finally:
        first.kill()
        first.communicate()
    assert (folder / ".lock").exists()
    made = int(_checkpoints(folder)[-1].name.removeprefix("step-"))
    assert _run(["--resume", "--output_dir", folder, "--train_steps", made]) == (0, "", ANY)
    assert not (folder / ".lock").exists()


def test_of_two_runs_that_begin_together_one_gets_the_folder(tmp_path):
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.acquire()
    first.acquire()
    with pytest.raises(UsageError, match=str(os.getpid())):
        second.acquire()
    with pytest.raises(UsageError, match=str(os.getpid())):
        second.check()
    first.release()
    second.check()
    second.acquire()
    second.release()
    assert not list(tmp_path.iterdir())


# Text


ODD_TEXTS = {
    "empty": (b"", "holds no text"),
    "blank": (b" \n\t\n", "holds no text"),
    "binary": (bytes(range(256)) * 40, "is not UTF-8 text"),
    "latin1": ("na\u00efve ".encode("latin-1") * 40, "is not UTF-8 text"),
    "utf16": ("plain text ".encode("utf-16") * 40, "is not UTF-8 text"),
    "zeros": (b"\0" * 4000, None),
    "emoji": ("\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467".encode() * 60, None),
    "one token": (b"a", "holds"),
    "one line": (b"word " * 4000, None),
    "no space": (b"x" * 8000, None),
    "combining": ("e\u0301\u0302\u0303".encode() * 500, None),
    "right to left": ("\u202e\u05d0\u05d1 \u0627\u0644".encode() * 300, None),
    "carriage returns": (b"a\rb\r\nc\x0b\x0c\x85" [:-1] * 600, None),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD_TEXTS)
def test_odd_text_trains_or_is_refused_in_one_line(inputs, tmp_path, kind):
    content, reason = ODD_TEXTS[kind]
    (tmp_path / "odd.txt").write_bytes(content)
    argv = _argv(inputs, tmp_path / "run", "--train_file", tmp_path / "odd.txt", steps=2)
    code, err, _ = _run(argv)
    if reason is None:
        assert (code, err) == (0, "")
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["applied"] + sum(summary["skipped"].values()) == 2
    else:
        assert (code, err.count("\n")) == (2, 1)
        assert reason in err
        assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_named(inputs, tmp_path):
    (tmp_path / "secret.txt").write_text("text " * 100)
    (tmp_path / "secret.txt").chmod(0)
    _assert_refused(_argv(inputs, tmp_path / "run", "--train_file", tmp_path / "secret.txt"), "secret.txt", "denied")


def test_a_folder_and_a_missing_file_are_no_text(inputs, tmp_path):
    (tmp_path / "folder.txt").mkdir()
    for name, reason in (("folder.txt", "is a folder"), ("missing.txt", "cannot be read")):
        _assert_refused(_argv(inputs, tmp_path / "run", "--train_file", tmp_path / name), name, reason)


def test_documents_without_text_are_skipped(inputs, tmp_path, corpus_texts):
    rows = ["", " ", "a", "\U0001f600" * 30, *corpus_texts, ""]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    code, err, _ = _run(_argv(inputs, tmp_path / "run", "--train_file", tmp_path / "rows.jsonl", steps=2))
    assert (code, err) == (0, "")


@pytest.mark.long
@pytest.mark.parametrize("end", [b" ", b"\n"], ids=["one line", "many lines"])
def test_100_mb_of_text_train(inputs, tmp_path, end):
    line = b"The quick brown fox jumps over the lazy dog, again." + end
    (tmp_path / "long.txt").write_bytes(line * (100_000_000 // len(line)))
    (tmp_path / "held_out.txt").write_bytes(line * 40)
    more = ("--train_file", tmp_path / "long.txt", "--validation_file", tmp_path / "held_out.txt")
    code, err, _ = _run(_argv(inputs, tmp_path / "run", *more, steps=2))
    names = [line.partition(": ")[0] for line in err.splitlines()]
    assert (code, names) == (0, ["Tokens", "Tokens"]), err  # that they are made, and where they are kept


def test_responses_that_are_all_cut_away_are_skipped_or_refused(inputs, tmp_path):
    rows = [{"prompt": "word " * 200, "completion": "no"}] * 12
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    more = ("--train_file", tmp_path / "rows.jsonl", "--validation_file", inputs / "text.txt")
    code, err, _ = _run(_argv(inputs, tmp_path / "run", *more, steps=2))
    if code:
        assert (code, err.count("\n")) == (2, 1)
    else:
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["applied"] + sum(summary["skipped"].values()) == 2


# Tokenizers and models


def _with_tokens(inputs, folder, tokenizer, **tokens):
    """Copies of both models whose tokenizers have these special tokens only; the flags that name them."""
    flags = []
    for which in ("student", "teacher"):
        bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **tokens)
        bare.save_pretrained(shutil.copytree(inputs / which, folder / which))
        flags += [f"--{which}_model", folder / which]
    return flags


def test_a_tokenizer_without_pad_token_trains(inputs, tmp_path, byte_tokenizer):
    more = _with_tokens(inputs, tmp_path, byte_tokenizer, eos_token=byte_tokenizer.eos_token)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "student").pad_token is None
    assert _run(_argv(inputs, tmp_path / "run", *more, steps=2)) == (0, "", ANY)


def test_a_tokenizer_without_end_token_is_refused_as_such(inputs, tmp_path, byte_tokenizer):
    more = _with_tokens(inputs, tmp_path, byte_tokenizer)
    for alignment in ("auto", "uld"):
        argv = _argv(inputs, tmp_path / "run", *more, "--alignment", alignment)
        _assert_refused(argv, "--student_model", "no end-of-text token (eos_token)")


def test_a_teacher_whose_head_is_padded_trains(inputs, tmp_path, make_student, byte_tokenizer):
    make_student(len(byte_tokenizer) + 40, num_hidden_layers=1).save_pretrained(tmp_path / "teacher")
    byte_tokenizer.save_pretrained(tmp_path / "teacher")
    code, err, _ = _run(_argv(inputs, tmp_path / "run", "--teacher_model", tmp_path / "teacher", steps=2))
    assert (code, err) == (0, "")


def test_a_block_longer_than_the_students_context_is_refused(inputs, tmp_path):
    _assert_refused(_argv(inputs, tmp_path / "run", "--block_size", 500), "--block_size 500", "256 tokens at most")


def test_a_teacher_with_a_shorter_context_than_the_block_gets_shorter_blocks(
    inputs, tmp_path, make_student, byte_tokenizer
):
    make_student(len(byte_tokenizer), num_hidden_layers=1, max_position_embeddings=16).save_pretrained(tmp_path / "t")
    byte_tokenizer.save_pretrained(tmp_path / "t")
    code, err, _ = _run(_argv(inputs, tmp_path / "run", "--teacher_model", tmp_path / "t", steps=2))
    assert (code, err) == (0, "")


# Files that would rather be run


class _Touch:
    """What a malicious pickle holds: something to do on reading it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_in_a_checkpoint_is_not_run(run_folder, tmp_path):
    last = _checkpoints(run_folder)[-1]
    torch.save({"optimizer": _Touch(tmp_path / "owned")}, last / "state.pt")
    digests = json.loads((last / "digests.json").read_text())
    digests["state.pt"] = hashlib.sha256((last / "state.pt").read_bytes()).hexdigest()
    (last / "digests.json").write_text(json.dumps(digests))
    _assert_refused(_resume(run_folder), "--resume", "cannot be read")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_for_a_model_is_not_run(inputs, tmp_path, how):
    folder = shutil.copytree(inputs / "student", tmp_path / "student")
    (folder / "model.safetensors").unlink()
    weights = {"lm_head.weight": _Touch(tmp_path / "owned")}
    if how == "torch":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(weights))
    _assert_refused(_argv(inputs, tmp_path / "run", "--student_model", folder), "--student_model", "cannot be loaded")
    assert not (tmp_path / "owned").exists()


@pytest.fixture
def with_own_code(inputs, tmp_path):
    """A student whose folder carries Python that makes a file when it is imported."""
    folder = shutil.copytree(inputs / "student", tmp_path / "student")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'owned')!r}).touch()\nclass C: pass\nclass M: pass\n"
    (folder / "mine.py").write_text(code)
    return folder


def test_a_checkpoints_own_code_runs_only_when_asked_for(inputs, with_own_code, tmp_path):
    _assert_refused(_argv(inputs, tmp_path / "run", "--student_model", with_own_code), "--student_model")
    assert not (tmp_path / "owned").exists()


def test_a_run_folder_cannot_ask_for_code_to_be_run(run_folder):
    config = json.loads((run_folder / "config.json").read_text())
    config["models"]["trust_remote_code"] = True
    (run_folder / "config.json").write_text(json.dumps(config))
    _assert_refused(_resume(run_folder), "--resume", "--trust_remote_code")
    assert _run(_resume(run_folder, "--trust_remote_code"))[0] == 0


@pytest.mark.parametrize("place", ["student", "checkpoint", "metrics.jsonl", "crash"])
def test_a_link_out_of_a_run_folder_is_refused(run_folder, inputs, tmp_path, place):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis.tex").write_text("x")
    path = run_folder / place
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(outside if place != "metrics.jsonl" else outside / "thesis.tex")
    for argv in (_resume(run_folder), _argv(inputs, run_folder, "--overwrite")):
        _assert_refused(argv, "--output_dir", place, "leads out of it")
    assert (outside / "thesis.tex").read_text() == "x"
    assert [path.name for path in outside.iterdir()] == ["thesis.tex"]


def test_no_module_reads_a_pickle():
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "sar_kd").rglob("*.py")}
    calls = [
        (path.name, ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
        for path, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
    ]
    loads = [(name, arguments.get("weights_only")) for name, function, arguments in calls if function == "torch.load"]
    assert loads == [("checkpoint.py", "True")]
    unsafe = {"pickle.load", "pickle.loads", "np.load", "numpy.load", "joblib.load", "yaml.load", "eval", "exec"}
    starts = {name for name, function, _ in calls if function.startswith(("os.system", "subprocess."))}
    assert starts == {"run_environment.py", "export.py"}  # git, for a checkout's commit; llama.cpp's converter
    assert not [call for call in calls if call[1] in unsafe]
