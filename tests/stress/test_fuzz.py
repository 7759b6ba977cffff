"""Random command lines, texts, checkpoints and run folders: every one ends with an exit code and at most one line, and
nothing is written outside the run folder. A tenth of the inputs runs by default, 10,000 with `-m long`.
"""

import contextlib
import functools
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import string
import sys
from types import SimpleNamespace

import pytest
import torch

from sar_kd.commands import main
from sar_kd.config.command_line import parse
from sar_kd.config.commands import FORENSICS
from sar_kd.config.presets import FP16_SAFE
from sar_kd.config.runs import SECTIONS
from sar_kd.config.sections import GuardConfig, OptimConfig, TrainConfig
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.sources import load_documents
from sar_kd.reporting.run_log import open_run
from sar_kd.runtime.precision import Precision
from sar_kd.training.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from sar_kd.training.guards import StepGuard
from sar_kd.training.optimizer import build_optimizer, learning_rate_at
from sar_kd.training.step import StepContext
from sar_kd.training.trainer_state import TrainerState
from tests.stress.test_faults import SCRIPT

COUNTS = {"flags": 4000, "texts": 3000, "checkpoints": 2000, "configs": 600, "folders": 400}
EVERY_SHARE = pytest.mark.parametrize("share", [0.1, pytest.param(1.0, marks=pytest.mark.long)], ids=["tenth", "all"])


# What is written where


class Writes:
    """While it is active: every path that Python opens for writing, makes, moves or removes."""

    def __init__(self):
        self.active, self.paths = False, []
        sys.addaudithook(self._hook)  # for ever; it does nothing while it is not active

    def _hook(self, event, arguments):
        if not self.active:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.paths.append(os.fsdecode(path))
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree"):
            if arguments[-1] in (-1, None) or event in ("os.truncate", "shutil.rmtree"):  # else a part of an rmtree
                self.paths.append(os.fsdecode(arguments[0]))
        elif event in ("os.rename", "os.symlink", "os.link"):
            self.paths += map(os.fsdecode, arguments[:2])

    @contextlib.contextmanager
    def only_in(self, folder):
        """Fails if anything else than `folder` is written to."""
        self.paths.clear()
        self.active = True
        try:
            yield
        finally:
            self.active = False
        root = os.path.realpath(folder)
        outside = [p for p in self.paths if not os.path.realpath(p).startswith(root) and p not in (os.devnull,)]
        assert not outside, outside


WRITES = Writes()


def _outcome(entry, argv=()):
    """The exit code; fails on a traceback, and on more than one line to the user."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main.run(entry, list(argv))
    except SystemExit as ended:  # --help
        code = ended.code
    lines = err.getvalue()
    assert code in (0, 2), (code, lines)
    assert lines.count("\n") == (1 if code == 2 else 0), lines
    return code


def _numbered(count, share, name):
    return [random.Random(f"{name} {number}") for number in range(int(count * share))]


# Values


NUMBERS = [
    "0",
    "1",
    "-1",
    "2.5",
    "1e-5",
    "1e308",
    "1e309",
    "nan",
    "inf",
    "-inf",
    "1_000",
    "0x10",
    "9" * 400,
    "1e",
    "+3",
]
WORDS = ["", " ", "auto", "off", "raw", "cpu", "cuda:99", "None", "true", "../../etc/passwd", "\0", "a\nb", "%s%n", "-"]
WORDS += ["\u00e9\U0001f600", "\u0663"]


def _word(chance: random.Random) -> str:
    kind = chance.random()
    if kind < 0.45:
        return chance.choice(NUMBERS)
    if kind < 0.8:
        return chance.choice(WORDS)
    return "".join(chance.choice(string.printable) for _ in range(chance.randrange(1, 20)))


def _flags(chance: random.Random, folder) -> list[str]:
    fields = [item for section in SECTIONS.values() for item in section.__dataclass_fields__.values()]
    argv = []
    for item in chance.sample(fields, chance.randrange(0, 6)):
        if item.name in ("output_dir", "device", "dataset_name"):
            continue
        argv.append(f"--{item.name}" if chance.random() < 0.97 else f"--{item.name}x")
        choices = item.metadata.get("choices")
        if choices and chance.random() < 0.7:
            argv.append(chance.choice(choices))
        elif item.type != "bool" or chance.random() < 0.1:
            argv += [_word(chance) for _ in range(1 if chance.random() < 0.95 else chance.randrange(3))]
    out = chance.choice([folder / "run", folder / "run", folder / "deep" / "er", folder / "file", ""])
    return [*argv, "--output_dir", str(out)]


@pytest.mark.slow
@EVERY_SHARE
def test_no_command_line_ends_in_a_traceback_or_writes_a_file(share, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")

    def main(argv):
        config = parse(FP16_SAFE, argv)
        open_run(config)
        StepGuard(config.guards)
        rates = [
            learning_rate_at(step, config.train.train_steps, config.optim, config.optim.student_lr)
            for step in (0, 1, 10**6)
        ]
        assert all(rate >= 0 for rate in rates)
        if config.data.train_file:
            load_documents(config.data)
        json.dumps(config.to_dict())
        return {"status": "finished"}

    codes = []
    with WRITES.only_in(tmp_path / "nowhere"):
        for chance in _numbered(COUNTS["flags"], share, "flags"):
            codes.append(_outcome(main, _flags(chance, tmp_path)))
    assert {path.name for path in tmp_path.iterdir()} == {"file"}
    assert 0.05 < codes.count(0) / len(codes) < 0.9


# Texts


ROWS = [
    {"text": "plain words"}, {"text": ""}, {"text": None}, {"text": 5}, {"messages": []}, {"messages": None}, [], None,
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, {"prompt": "a"}, 3,
    {"messages": [{"role": "assistant"}]}, {"messages": [{"role": 1, "content": 2}]}, {"question": "q", "answer": ""},
    {"prompt": "a", "completion": "b"}, {"text": "\ud800"}, {"text": "\U0001f600" * 50}, {"other": "x"},
]  # fmt: skip
LETTERS = [
    "word",
    " ",
    "\n",
    "\u00e9",
    "\U0001f600",
    "\0",
    "\u202e",
    "\r\n",
    "\ufeff",
    "<s>",
    "<|endoftext|>",
    "\u0301",
]


def _text(chance: random.Random) -> tuple[str, bytes]:
    kind = chance.random()
    if kind < 0.25:
        return ".txt", chance.randbytes(chance.randrange(400))
    if kind < 0.45:
        return ".txt", "".join(chance.choices(LETTERS, k=chance.randrange(200))).encode("utf-8")
    content = bytearray("\n".join(json.dumps(chance.choice(ROWS)) for _ in range(chance.randrange(1, 9))).encode())
    if kind > 0.7:
        content = _damaged(chance, bytes(content))
    if kind > 0.85:
        return ".jsonl.gz", _damaged(chance, gzip.compress(bytes(content)))
    return ".jsonl", bytes(content)


def _damaged(chance: random.Random, content: bytes) -> bytes:
    """Some bytes flipped, cut off, doubled, zeroed or put in."""
    changed, at = bytearray(content), chance.randrange(max(1, len(content)))
    kind = chance.randrange(6)
    if kind == 0:
        for _ in range(chance.randrange(1, 8)):
            if changed:
                changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        changed = changed[:at]
    elif kind == 2:
        changed[at:at] = chance.randbytes(chance.randrange(1, 40))
    elif kind == 3:
        changed[at : at + 16] = bytes(16)
    elif kind == 4:
        changed += changed[at:]
    else:
        changed = bytearray(chance.randbytes(chance.randrange(200)))
    return bytes(changed)


@pytest.mark.slow
@EVERY_SHARE
def test_no_text_ends_in_a_traceback(share, tmp_path, make_dataset):
    pair, codes = make_dataset().pair, []
    for chance in _numbered(COUNTS["texts"], share, "texts"):
        kind, content = _text(chance)
        path = tmp_path / f"text{kind}"
        path.write_bytes(content)

        def main(argv, path=path, chance=chance):
            config = parse(FP16_SAFE, ["--train_file", str(path)])
            for documents in load_documents(config.data):
                dataset = build_dataset(documents, pair, 24, 24)
                dataset.batch([chance.randrange(len(dataset))])
                dataset.documents_of(0)
            return {"status": "finished"}

        with WRITES.only_in(tmp_path / "nowhere"):
            codes.append(_outcome(main))
    assert 0.1 < codes.count(0) / len(codes) < 0.9


# Checkpoints


@pytest.fixture
def saved(tmp_path, make_student):
    """A checkpoint, its state, and what its files hold."""
    student = make_student(40, num_hidden_layers=1, hidden_size=8, intermediate_size=8)
    learned, teacher = torch.nn.Linear(3, 2), torch.nn.Linear(2, 3)  # stand-ins that have a state
    objective = SimpleNamespace(student=student, state_dict=learned.state_dict, load_state_dict=learned.load_state_dict)
    precision = Precision(torch.device("cpu"), torch.float16, 1024.0)
    optimizer = build_optimizer(student, OptimConfig())
    context = StepContext(objective, optimizer, StepGuard(GuardConfig()), precision, 1.0)
    student(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    folder = tmp_path / "run" / "checkpoint"
    save_checkpoint(folder, context, teacher, TrainerState(step=1))
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return SimpleNamespace(folder=folder, parts=(context, teacher), files=files)


@EVERY_SHARE
def test_no_checkpoint_ends_in_a_traceback_and_no_damaged_one_is_taken(share, saved):
    def main(argv):
        load_checkpoint(find_checkpoint(saved.folder)[0], *saved.parts)
        return {"status": "finished"}

    assert _outcome(main) == 0
    step = saved.folder / "step-00000001"
    for chance in _numbered(COUNTS["checkpoints"], share, "checkpoints"):
        path = chance.choice(sorted(saved.files))
        former = saved.files[path]
        changed = _damaged(chance, former)
        path.write_bytes(changed)
        forged = path.name in ("state.pt", "student.safetensors") and chance.random() < 0.5
        if forged:  # somebody who wants it to be read
            digests = json.loads(saved.files[step / "digests.json"])
            digests[path.name] = hashlib.sha256(changed).hexdigest()
            (step / "digests.json").write_text(json.dumps(digests))
        with WRITES.only_in(saved.folder):
            code = _outcome(main)
        if path.parent == step and changed != former and path.name != "digests.json" and not forged:
            assert code == 2, path
        path.write_bytes(former)
        (step / "digests.json").write_bytes(saved.files[step / "digests.json"])
    assert _outcome(main) == 0


# What else a run folder holds


@pytest.fixture
def run_folder(tmp_path):
    """A run folder as a finished run leaves it, without its weights."""
    folder = tmp_path / "run"
    config = parse(FP16_SAFE, ["--output_dir", str(folder), "--train_steps", "5"])
    (folder / "crash").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2))
    lines = [{"event": "step", "step": step, "loss": 1.0} for step in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "crash" / "crash.md").write_text("# Step 3: the forward is not finite\n")
    return folder


def _altered(chance: random.Random, config: dict) -> str:
    """A value of another kind, a section or a key missing or added."""
    section = chance.choice(list(config))
    odd = chance.choice(
        [None, True, -1, 0, 1, 3, 50, 0.5, 1e400, 2.5, "", "x", [], ["a", 1], {}, {"a": 1}, "nan", 10**30]
    )
    if isinstance(config[section], dict) and chance.random() < 0.8:
        name = chance.choice(list(config[section]))
        config[section][name] = odd
        if chance.random() < 0.1:
            del config[section][name]
    else:
        config[section] = odd
    return json.dumps(config)


@EVERY_SHARE
def test_no_config_of_a_run_to_resume_ends_in_a_traceback(share, run_folder):
    former = (run_folder / "config.json").read_bytes()

    def main(argv):
        config = parse(FP16_SAFE, ["--resume", "--output_dir", str(run_folder)])
        open_run(config)
        StepGuard(config.guards)
        assert isinstance(config.models.teacher_model, str)
        return {"status": "finished"}

    codes = []
    for chance in _numbered(COUNTS["configs"], share, "configs"):
        altered = chance.random() < 0.6
        content = _altered(chance, json.loads(former)).encode() if altered else _damaged(chance, former)
        (run_folder / "config.json").write_bytes(content)
        with WRITES.only_in(run_folder):
            codes.append(_outcome(main))
    assert 0.02 < codes.count(0) / len(codes) < 0.7


@EVERY_SHARE
def test_no_metrics_and_no_crash_page_end_in_a_traceback(share, run_folder):
    former = {name: (run_folder / name).read_bytes() for name in ("metrics.jsonl", "crash/crash.md")}

    def resume(argv):
        log = open_run(parse(FP16_SAFE, ["--resume", "--output_dir", str(run_folder)]))
        log.open(3, TrainConfig(train_steps=5))
        log.close()
        return {"status": "finished"}

    for chance in _numbered(COUNTS["folders"], share, "folders"):
        for name, content in former.items():
            (run_folder / name).write_bytes(_damaged(chance, content))
        with WRITES.only_in(run_folder):
            assert _outcome(resume) == 0
            _outcome(functools.partial(main.start, FORENSICS), [str(run_folder)])
        steps = [json.loads(line)["step"] for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
        assert all(step <= 3 for step in steps)


# Whole runs with legal values of every kind


@pytest.mark.long
def test_forty_runs_with_random_legal_settings_end_as_they_should(tmp_path, make_student, byte_tokenizer, corpus_texts):
    with contextlib.suppress(ModuleNotFoundError):
        import matplotlib.font_manager  # noqa: F401  its first import keeps a list of fonts in the user's cache
    for name in ("student", "teacher"):
        make_student(len(byte_tokenizer), num_hidden_layers=1).save_pretrained(tmp_path / name)
        byte_tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("\n".join(corpus_texts), encoding="utf-8")
    for number in range(40):
        chance, folder = random.Random(f"runs {number}"), tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        values = {
            "teacher_model": tmp_path / "teacher", "student_model": tmp_path / "student", "device": "cpu",
            "train_file": tmp_path / "text.txt", "output_dir": folder, "block_size": chance.choice([8, 24, 64]),
            "train_steps": chance.choice([1, 3]), "eval_steps": 2, "save_steps": chance.choice([1, 2]),
            "per_device_batch_size": chance.choice([1, 3]), "grad_accum_steps": chance.choice([1, 2]),
            "student_lr": chance.choice([1e-12, 1e-3, 1.0, 1e6]), "weight_decay": chance.choice([0, 0.1, 100]),
            "temperature": chance.choice([1e-3, 1, 2, 1e4]), "alpha_kd": chance.choice([0, 1, 1e6]), "alpha_ce": 0.5,
            "logit_clamp": chance.choice([1e-3, 5, 1e4]), "loss_clamp": chance.choice([1e-6, 6]),
            "logit_clamp_style": chance.choice(["normalized", "raw", "off"]), "warmup_steps": chance.choice([0, 9]),
            "loss_clamp_style": chance.choice(["scale", "hard", "off"]), "teacher_top_k": chance.choice([0, 1, 10**6]),
            "alignment": chance.choice(["auto", "projection", "strict", "alm", "uld", "hidden"]),
            "kd_direction": chance.choice(["forward", "reverse", "jsd"]), "max_nan_batches": chance.choice([1, 10]),
            "init_loss_scale": chance.choice([1, 2**24]), "max_grad_norm": chance.choice([1e-9, 1e9]),
            "skip_rule": chance.choice(["fixed", "adaptive"]), "skip_grad_norm": chance.choice([1e-9, 2, 1e9]),
            "model_dtype": chance.choice(["float16", "float32", "bfloat16"]), "seed": chance.choice([0, 2**63 - 1]),
            "on_divergence": chance.choice(["stop", "rewind"]),
        }  # fmt: skip
        argv = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), WRITES.only_in(folder):
            code = main.run(SCRIPT.main, argv)
        assert code in (0, 2, 3), (code, err.getvalue())
        assert err.getvalue().count("\n") == (code != 0)
