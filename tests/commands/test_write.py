"""`write`: the file is a `--train_file`, whole after a kill, and never mixed with what was made from something else."""

import json
import signal
import subprocess
import sys
import time

import pytest

from sar_kd.commands import write
from sar_kd.commands.main import main
from sar_kd.config.sections import DataConfig
from sar_kd.data.files.samples import Conversation
from sar_kd.data.files.sources import load_documents
from tests.helpers.writing_models import CHATML, build_writer, save, with_template

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
ROWS = [
    {"messages": [{"role": "user", "content": "Add 1 and 1."}, {"role": "assistant", "content": "an old answer"}]},
    {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}], "tools": TOOLS},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi!"},
                  {"role": "user", "content": "Name a colour ~"}]},
    {"prompt": "Name a river"},
    {"question": "Name a town", "answer": "an old answer"},
    {"instruction": "Count", "input": "to ten", "output": "an old answer"},
    {"conversations": [{"from": "human", "value": "Name a bird"}, {"from": "gpt", "value": "an old answer"}]},
    {"text": "The museum opens at nine and closes at half past five."},
    {"prompt": None},
    {"text": " "},
]  # fmt: skip


@pytest.fixture
def teacher(tmp_path, byte_tokenizer):
    tokenizer = with_template(byte_tokenizer, CHATML)
    return save(tmp_path / "teacher", build_writer(tokenizer, stop_bias=1.0), tokenizer)


@pytest.fixture
def run(tmp_path, teacher, capsys):
    """run(name, *words): the exit code, and what was printed; writes into that file of the temporary folder."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def run(name, *words, prompts="prompts.jsonl"):
        given = ["--teacher_model", teacher, "--prompts", tmp_path / prompts, "--output", tmp_path / name]
        given += ["--per_device_batch_size", 3, "--max_new_tokens", 12, "--device", "cpu", "--keep_unfinished"]
        code = main(["write", *map(str, [*given, *words])])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def _rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_row_keeps_its_prompt_and_only_the_new_answer_is_learned(run, tmp_path):
    code, out = run("out.jsonl", "--repeat_limit", 0, "--sample_temperature", 0, "--prompt_tokens", 4)
    assert code == 0
    assert "Skipped 1 empty example" in out
    assert "Skipped 1 prompt: prompts.jsonl:9 (its 'prompt' is null)" in out
    record = json.loads((tmp_path / "out.jsonl.json").read_text())
    rows, counts = _rows(tmp_path / "out.jsonl"), record["counts"]
    assert record["complete"]
    assert counts["written"] == len(rows)
    assert counts["written"] + counts["empty"] == 8
    assert "an old answer" not in json.dumps(rows)
    loaded = load_documents(DataConfig(train_file=(str(tmp_path / "out.jsonl"),)))
    samples = [sample for part in loaded for sample in part]
    conversations = [sample for sample in samples if isinstance(sample, Conversation)]
    assert len(conversations) >= 5
    for sample in conversations:
        assert [message.is_target for message in sample.messages][:-1] == [False] * (len(sample.messages) - 1)
        assert sample.messages[-1].is_target
    by_prompt = {row["prompt"]: row for row in rows if isinstance(row.get("prompt"), str)}
    assert set(by_prompt) <= {"Name a river", "Name a town"}
    texts = [row["text"] for row in rows if "text" in row]
    assert all("The museum".startswith(text[:8]) and len(text) > 8 for text in texts)
    assert [row["tools"] for row in rows if "tools" in row] in ([], [TOOLS])


@pytest.mark.slow
def test_several_answers_differ_and_a_seed_decides_them(run, tmp_path):
    for name, *words in (("a.jsonl",), ("b.jsonl",), ("c.jsonl", "--seed", 1)):
        assert run(name, "--samples", 3, "--repeat_limit", 0, *words)[0] == 0
    texts = [(tmp_path / name).read_bytes() for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    assert texts[0] == texts[1] != texts[2]
    answers = [row["completion"] for row in _rows(tmp_path / "a.jsonl") if row.get("prompt") == "Name a river"]
    assert len(answers) > 1
    assert len(set(answers)) == len(answers)


class _Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_kill_between_rows_and_record_changes_no_byte(run, tmp_path, monkeypatch, after):
    assert run("whole.jsonl", "--samples", 2)[0] == 0
    count, atomic_write = 0, write.atomic_write

    def kill(*args):
        nonlocal count
        count += 1
        if count == after + 2:  # the first record is that of no answer
            raise _Killed
        atomic_write(*args)

    monkeypatch.setattr(write, "atomic_write", kill)
    with pytest.raises(_Killed):
        run("out.jsonl", "--samples", 2)
    monkeypatch.setattr(write, "atomic_write", atomic_write)
    assert (tmp_path / "out.jsonl").read_bytes() != (tmp_path / "whole.jsonl").read_bytes()
    code, out = run("out.jsonl", "--samples", 2)
    assert code == 0
    assert (f"Going on: {3 * after}" in out) == bool(after)
    for ending in ("", ".json"):
        assert (tmp_path / f"out.jsonl{ending}").read_bytes() == (tmp_path / f"whole.jsonl{ending}").read_bytes()
    before = (tmp_path / "out.jsonl").read_bytes()
    monkeypatch.setattr(write, "_write_batch", pytest.fail)
    assert run("out.jsonl", "--samples", 2)[0] == 0  # it is finished
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_what_was_begun_otherwise_is_refused(run, tmp_path, teacher):
    assert run("out.jsonl")[0] == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "others.jsonl").write_text(json.dumps({"prompt": "Another"}) + "\n")
    for words, how, reason in (
        (["--seed", 1], {}, "was begun with another --seed (0, not 1); name another file, or --overwrite"),
        (["--template_date", "2020-01-31"], {}, "another --template_date"),
        ([], {"prompts": "others.jsonl"}, "was begun with different prompts"),
        (["--model_dtype", "bfloat16"], {}, "a different --model_dtype"),
    ):
        code, out = run("out.jsonl", *words, **how)
        assert (code, reason in out) == (2, True), out
    (tmp_path / "out.jsonl").write_bytes(before.replace(b"a", b"b", 1))
    code, out = run("out.jsonl")
    assert (code, "has been changed since it was written" in out) == (2, True)
    (tmp_path / "notes.jsonl").write_text("mine\n")
    code, out = run("notes.jsonl")
    assert (code, "this command did not write it" in out) == (2, True)
    assert (tmp_path / "notes.jsonl").read_text() == "mine\n"
    weights = teacher / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    (tmp_path / "out.jsonl").write_bytes(before)
    code, out = run("out.jsonl")
    assert (code, "a different teacher" in out) == (2, True), out
    assert run("out.jsonl", "--overwrite", "--teacher_model", "nowhere")[0] == 2
    assert (tmp_path / "out.jsonl").read_bytes() == before  # nothing is lost before all else is known to be right
    assert run("out.jsonl", "--overwrite")[0] == 0
    (tmp_path / "folder.jsonl").mkdir()
    assert "is a folder; name a .jsonl file" in run("folder.jsonl", "--overwrite")[1]


def test_a_teacher_that_writes_nothing_finite_is_refused_and_single_answers_are_counted(
    run, tmp_path, teacher, byte_tokenizer
):
    tokenizer = with_template(byte_tokenizer, CHATML)
    model = build_writer(tokenizer, stop_bias=1.0)
    model.transformer.wte.weight.data[tokenizer.encode("~")] = 3e38  # a mean of squares overflows there
    model.save_pretrained(teacher)
    code, out = run("some.jsonl")
    assert code == 0, out
    assert "1 nonfinite" in out
    assert "Warning: some logits of the teacher were not finite" in out
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "Name a colour ~"}) + "\n")
    code, out = run("none.jsonl", prompts="one.jsonl")
    assert (code, "its logits are not finite, so it writes nothing; use --model_dtype float32" in out) == (2, True)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--output", "x.txt"], "must be a .jsonl file"),
        (["--samples", "2", "--sample_temperature", "0"], "greedy answers are all the same"),
        (["--repeat_limit", "1"], "give 2 or more, or 0"),
        (["--prompts", "missing.jsonl"], "--prompts missing.jsonl: cannot be read"),
        (["--prompts", "x.jsonl", "--output", "x.jsonl"], "is one of --prompts"),
    ],
)
def test_a_mistake_is_one_line(run, tmp_path, monkeypatch, words, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "Hello"}) + "\n")
    code, out = run("out.jsonl", *words)
    assert (code, reason in out) == (2, True), out


@pytest.mark.slow
def test_a_student_of_another_tokenizer_trains_on_it(run, tmp_path, teacher, make_student, sp_tokenizer):
    assert run("out.jsonl", "--samples", 6, "--repeat_limit", 0)[0] == 0
    student = save(tmp_path / "student", make_student(len(sp_tokenizer)), sp_tokenizer)
    words = ["train", "--teacher_model", teacher, "--student_model", student, "--train_file", tmp_path / "out.jsonl"]
    words += ["--train_steps", 2, "--block_size", 64, "--device", "cpu", "--output_dir", tmp_path / "run"]
    assert main([str(word) for word in words]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["applied"] == 2


@pytest.mark.slow
def test_a_killed_process_goes_on_with_the_same_bytes(run, tmp_path, teacher):
    words = ["--samples", "30", "--seed", "3"]
    given = ["--teacher_model", teacher, "--prompts", tmp_path / "prompts.jsonl", "--output", tmp_path / "out.jsonl"]
    given += ["--per_device_batch_size", 3, "--max_new_tokens", 12, "--device", "cpu", "--keep_unfinished", *words]
    with subprocess.Popen([sys.executable, "-m", "sar_kd", "write", *map(str, given)]) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (tmp_path / "out.jsonl").exists() and (tmp_path / "out.jsonl").stat().st_size > 500:
                break
            time.sleep(0.02)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert not json.loads((tmp_path / "out.jsonl.json").read_text())["complete"]
    assert run("out.jsonl", *words)[0] == 0
    assert run("whole.jsonl", *words)[0] == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
