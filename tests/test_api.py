"""`sar_kd.distill`: the same run from Python, with ids, directories, or models and texts that are in memory."""

import json
import signal
import threading
from pathlib import Path

import pytest
import torch
import transformers

import sar_kd
from sar_kd import Distilled, distill
from sar_kd.config.presets import STABLE
from sar_kd.config.python_arguments import called_from_python
from sar_kd.data import unit_questions
from sar_kd.data.files.given_texts import TextsLike
from sar_kd.embedded import STUDENT_DIR
from sar_kd.errors import TrainingDiverged, UsageError
from sar_kd.models.model_files import IN_MEMORY
from sar_kd.runtime.signals import StopRequest
from sar_kd.teacher.moe import router_checkpoint
from sar_kd.training import trainer
from sar_kd.version import RUN_FORMAT
from train_sar_kd_stable import main as train

STEPS = {"train_steps": 2, "block_size": 32, "eval_steps": 1, "log_steps": 1, "student_lr": 3e-3, "device": "cpu"}


@pytest.fixture
def pairs(make_student, make_teacher, sp_tokenizer, byte_tokenizer):
    """A teacher and a student in memory, each with its tokenizer."""
    teacher = make_teacher(len(byte_tokenizer), num_hidden_layers=1), byte_tokenizer
    return teacher, (make_student(len(sp_tokenizer), num_hidden_layers=1), sp_tokenizer)


def _losses(folder):
    records = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["event"] == "step"]


@pytest.mark.slow
def test_loaded_models_and_texts_give_the_run_that_their_files_give(pairs, corpus_texts, tmp_path):
    for name, (model, tokenizer) in zip(("teacher", "student"), pairs, strict=True):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    examples = [{"text": text} for text in corpus_texts]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    files = {"teacher_model": "teacher", "student_model": "student", "train_file": "examples.jsonl", "output_dir": "a"}
    words = [word for option, name in files.items() for word in (f"--{option}", str(tmp_path / name))]
    train([*words, *(str(word) for option, value in STEPS.items() for word in (f"--{option}", value))])
    result = distill(*pairs, corpus_texts, output_dir=tmp_path / "b", **STEPS)
    assert _losses(tmp_path / "a") == _losses(tmp_path / "b")
    assert result.summary["val_ppl_final"] < result.summary["val_ppl_start"]


def test_the_result_is_the_best_student_its_tokenizer_the_summary_and_the_folder(pairs, corpus_texts, tmp_path):
    result = distill(*pairs, corpus_texts, mode="precise", output_dir=tmp_path / "run", **STEPS)
    assert isinstance(result, Distilled)
    assert not result.student.training
    assert result.folder == tmp_path / "run"
    saved = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert saved == {"format": RUN_FORMAT, **result.summary}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["mode"] == "precise"
    ids = torch.tensor([result.tokenizer("The loss scale")["input_ids"]])
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student").eval()(ids).logits
        assert torch.equal(result.student(ids).logits, expected)
        if result.summary["best_step"] == 2:  # a student that was handed over is trained in place
            assert torch.equal(pairs[1][0].eval()(ids).logits, expected)


def test_examples_may_be_conversations_and_held_out_text_may_be_in_memory(pairs, corpus_texts, tmp_path):
    examples = [{"prompt": text, "completion": " and so on."} for text in corpus_texts[:8]]
    distill(
        *pairs,
        examples,
        validation_texts=corpus_texts[8:16],
        output_dir=tmp_path / "run",
        **STEPS | {"block_size": 128},
    )
    saved = [json.loads(line) for line in (tmp_path / "run/given_texts/train.jsonl").read_text().splitlines()]
    assert saved == examples
    held_out = (tmp_path / "run/given_texts/validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in held_out] == corpus_texts[8:16]


@pytest.mark.slow
def test_a_run_from_python_is_resumed_in_python_and_nowhere_else(pairs, corpus_texts, tmp_path):
    where = {"output_dir": tmp_path / "run"}
    distill(*pairs, corpus_texts, **where, **STEPS)
    with pytest.raises(UsageError, match=f"{IN_MEMORY[1:-1]}.*was handed over in Python"):
        train(["--resume", "--output_dir", str(tmp_path / "run"), "--train_steps", "3"])
    longer = {**STEPS, "train_steps": 3}
    assert distill(*pairs, corpus_texts, **where, resume=True, **longer).summary["steps"] == 3


def test_what_a_call_prints_names_its_arguments(pairs, corpus_texts, tmp_path, capsys, monkeypatch):
    distill(*pairs, corpus_texts[:3], output_dir=tmp_path / "run", sample_top_p=0.5, kd_direction="jsd", **STEPS)
    lines = capsys.readouterr().out.splitlines()
    assert "sample_top_p: has no effect without on_policy_fraction above 0" in lines
    assert any(
        line.startswith("Warning: the held-out text") and line.endswith("with validation_texts") for line in lines
    )
    assert [line for line in lines if "--" in line and not line.startswith(("Next: ", "      "))] == []
    assert set(lines) < set((tmp_path / "run/log.txt").read_text().splitlines())
    monkeypatch.setattr("sar_kd.commands.cache.main", lambda config: None)
    sar_kd.cache(text_field="x")
    assert capsys.readouterr().err == "text_field: has no effect without texts or dataset_name\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"train_step": 3}, "train_step: no such argument; did you mean train_steps?"),
        ({"train_steps": "3"}, "train_steps='3': must be a whole number"),
        ({"train_steps": 0}, "train_steps=0: must be a number of at least 1"),
        ({"mode": "balance"}, "mode='balance': must be ultra-conservative or balanced or precise"),
        ({"alignment": "gold"}, "alignment='gold': must be auto or projection"),
        ({"texts": []}, "texts: holds nothing"),
        ({"texts": [3]}, "texts: holds int"),
        ({"texts": [None]}, "texts: holds NoneType"),
        ({"texts": [__file__]}, "texts: its texts are names of files; give each file as a Path"),
        ({"texts": "a\0.txt"}, "texts='a\\x00.txt': holds a null character"),
        ({"mode": ["precise"]}, "mode=['precise']: must be ultra-conservative or balanced or precise"),
        ({"student": (torch.nn.Linear(2, 2), None)}, "student='(in memory) Linear': Linear has no language-model head"),
        ({"texts": 3}, "texts: is a int"),
        ({"texts": [{"text": object()}]}, "texts: holds what JSON cannot"),
        ({"texts": "nowhere.txt"}, "texts='nowhere.txt': "),
        ({"student": torch.nn.Linear(2, 2)}, "student: a loaded model needs its tokenizer"),
        ({"teacher": 3}, "teacher: int is neither a hub id"),
        ({"output_dir": 3}, "output_dir=3: must be a path"),
        ({"callback": 3}, "distill(callback=3): must be a function"),
        ({"output_dir": None, "resume": True}, "distill(resume=True): give the run folder"),
        ({"quiet": True, "verbose": True}, "quiet=True verbose=True: "),
    ],
)
def test_an_error_is_one_line_that_names_the_argument(arguments, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        distill(**{"texts": ["a b c"], "output_dir": tmp_path / "run", **arguments})
    assert str(caught.value).startswith(expected)
    assert "--" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--train_file a b.txt: no; or --skip_rule fixed", "texts='a b.txt': no; or skip_rule='fixed'"),
        ("x (--max_grad_norm 1.0), --resume goes on", "x (max_grad_norm=1.0), resume=True goes on"),
        (
            "see `sar-kd sft --resume`, --train_file; `pip install --upgrade x`",
            "see `sar-kd sft --resume`, texts; `pip install --upgrade x`",
        ),
        ("--student_lr is high, --alpha_kd, and --nonsense 3", "student_lr is high, alpha_kd, and --nonsense 3"),
        ("Warning: --train_file a.txt: no --mode precise", "Warning: texts='a.txt': no mode='precise'"),
    ],
)
def test_options_in_a_sentence_become_arguments(line, expected):
    with pytest.raises(UsageError) as caught, called_from_python(STABLE, {"train_file": "texts"}):
        raise UsageError(line)
    assert str(caught.value) == expected
    with pytest.raises(TrainingDiverged, match="try student_lr=1e-5"), called_from_python(STABLE, {}):
        raise TrainingDiverged("try --student_lr 1e-5")


def test_a_student_that_cannot_be_trained_is_refused(pairs, corpus_texts, tmp_path):
    teacher, (student, _) = pairs
    where = {**STEPS, "texts": corpus_texts, "output_dir": tmp_path / "run"}
    with pytest.raises(UsageError, match=r"^student: is the teacher itself"):
        distill(teacher, teacher, **where)
    student.requires_grad_(False)
    for run, models in ((distill, pairs), (sar_kd.sft, pairs[1:])):
        with pytest.raises(UsageError, match="all of its weights are frozen"):
            run(*models, **where)


def test_an_adapter_on_a_student_that_has_one_is_refused(pairs, corpus_texts, tmp_path):
    peft = pytest.importorskip("peft")
    student, tokenizer = pairs[1]
    adapted = peft.get_peft_model(student, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UsageError, match=r"^lora_rank=2: the student has an adapter already"):
        sar_kd.sft((adapted, tokenizer), corpus_texts, output_dir=tmp_path / "run", lora_rank=2, **STEPS)


def test_files_beside_and_in_the_folder_stay_as_they_are(pairs, corpus_texts, tmp_path):
    mine = [tmp_path / "corpus.train.jsonl", tmp_path / "corpus.validation.jsonl"]
    for path in mine:
        path.write_text("mine")
    distill(*pairs, corpus_texts, validation_texts=corpus_texts[:3], output_dir=tmp_path / "corpus", **STEPS)
    assert [path.read_text() for path in mine] == ["mine", "mine"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "train.jsonl").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        distill(*pairs, corpus_texts, output_dir=tmp_path / "full", **STEPS)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["train.jsonl"]


@pytest.mark.slow
def test_a_refused_run_leaves_no_texts_and_can_be_started_again(pairs, corpus_texts, tmp_path):
    with pytest.raises(UsageError, match=r"^block_size=100000: "):
        distill(*pairs, corpus_texts, output_dir=tmp_path / "run", **STEPS | {"block_size": 100_000})
    assert not (tmp_path / "run" / "given_texts").exists()
    result = distill(*pairs, corpus_texts, output_dir=tmp_path / "run", **STEPS)
    again = distill(*pairs, corpus_texts[:9], output_dir=tmp_path / "run", overwrite=True, **STEPS)
    assert len((tmp_path / "run/given_texts/train.jsonl").read_text().splitlines()) == 9
    assert again.summary["val_ppl_start"] != result.summary["val_ppl_start"]


@pytest.mark.slow
def test_a_resumed_run_needs_its_own_texts_or_none(pairs, corpus_texts, tmp_path):
    where = {"output_dir": tmp_path / "run"}
    distill(*pairs, corpus_texts, mode="precise", **where, **STEPS)
    with pytest.raises(UsageError, match=r"^texts: these are not the texts of the run"):
        distill(*pairs, corpus_texts[:5], **where, resume=True, train_steps=3)
    assert distill(*pairs, **where, resume=True, train_steps=3).summary["steps"] == 3
    assert json.loads((tmp_path / "run" / "config.json").read_text())["mode"] == "precise"


def test_a_callback_sees_every_record_and_a_quiet_run_prints_nothing(pairs, corpus_texts, tmp_path, capsys):
    seen = []
    transformers.utils.logging.enable_progress_bar()  # as where nothing has been loaded from a folder yet
    result = distill(*pairs, corpus_texts, output_dir=tmp_path / "run", callback=seen.append, quiet=True, **STEPS)
    events = [record["event"] for record in seen]
    assert events == ["start", "step", "evaluation", "step", "evaluation", "end"]
    assert seen[1]["loss"] == _losses(result.folder)[0]
    assert seen[-1]["status"] == "finished"
    assert capsys.readouterr() == ("", "")
    assert "Step 2: avg_loss" in (result.folder / "log.txt").read_text()
    shown = repr(result)
    assert shown.startswith("<finished after 2 steps: bits per byte ")
    assert len(shown) < 300


def test_an_error_of_the_callback_is_the_callers(pairs, corpus_texts, tmp_path):
    def stop(record):
        if record["event"] == "step":
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        distill(*pairs, corpus_texts, output_dir=tmp_path / "run", callback=stop, **STEPS)


def test_fine_tuning_from_python(pairs, corpus_texts, tmp_path):
    examples = [{"question": f"What is {i}?", "answer": text[:60]} for i, text in enumerate(corpus_texts[:12])]
    few = {"max_steps": 2, "block_size": 128, "device": "cpu", "per_device_batch_size": 2, "quiet": True}
    result = sar_kd.sft(pairs[1], examples, output_dir=tmp_path / "run", **few)
    assert result.summary["status"] == "finished"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["mode"] == "sft"
    with pytest.raises(UsageError, match=r"^lora_rank=-1: "):
        sar_kd.sft(pairs[1], examples, output_dir=tmp_path / "other", lora_rank=-1)


def test_a_cache_made_in_python_is_one_for_distill(pairs, corpus_texts, tmp_path):
    model, tokenizer = pairs[0]
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    pairs[1][0].save_pretrained(tmp_path / "student")
    pairs[1][1].save_pretrained(tmp_path / "student")
    how = {"block_size": 32, "device": "cpu"}
    folder = sar_kd.cache(
        tmp_path / "teacher", corpus_texts, folder=tmp_path / "cache", teacher_top_k=8,
        student_model=tmp_path / "student", **how,
    )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "student", "teacher"]
    result = distill(
        tmp_path / "teacher", tmp_path / "student", corpus_texts, teacher_cache=folder,
        output_dir=tmp_path / "run", **STEPS,
    )  # fmt: skip
    assert result.summary["status"] == "finished"
    with pytest.raises(UsageError, match=r"^teacher: a cache needs the teacher by name"):
        sar_kd.cache(pairs[0], corpus_texts, folder=tmp_path / "other")
    with pytest.raises(UsageError, match=r"^teacher_top_k=0: "):
        sar_kd.cache(tmp_path / "teacher", corpus_texts, folder=tmp_path / "other", teacher_top_k=0)


def test_preflight_from_python_says_whether_a_run_could_start(pairs, corpus_texts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = sar_kd.preflight(*pairs, corpus_texts, quiet=True, **STEPS)
    assert found["ok"]
    assert found["memory"]["verdict"] == "fits"
    assert "validation_texts" in found["alignment"]["warnings"][-1]
    assert "--" not in "".join(found["alignment"]["warnings"])
    assert capsys.readouterr().out == ""
    found = sar_kd.preflight(*pairs, texts="nowhere.txt", quiet=True)
    assert not found["ok"]
    assert found["error"].startswith("texts='nowhere.txt': ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_runs_are_compared_from_python(pairs, corpus_texts, tmp_path):
    pytest.importorskip("matplotlib")
    first = distill(*pairs, corpus_texts, output_dir=tmp_path / "first", quiet=True, **STEPS)
    found = sar_kd.compare(first, tmp_path / "first", page=tmp_path / "page.html")
    assert [row["run"] for row in found.results] == ["first", "first"]
    assert found.results[0]["status"] == "finished"
    assert found.findings["first"][0] == "Finished: 2 steps."
    assert found._repr_html_().startswith("<iframe")
    assert "first" in repr(found)
    for runs, expected in (
        ((), "compare: give"),
        ((3,), "runs=3: must be a path"),
        ((tmp_path / "no",), "holds no run"),
    ):
        with pytest.raises(UsageError, match=expected):
            sar_kd.compare(*runs)
    with pytest.raises(
        UsageError, match=f"^page='{tmp_path}': is a folder; give a file, such as {tmp_path}/report.html$"
    ):
        sar_kd.compare(first, page=tmp_path)


def test_texts_may_be_files_by_path(tmp_path, corpus_texts, pairs):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in paths:
        path.write_text("\n".join(corpus_texts))
    texts: TextsLike = paths
    result = distill(*pairs, texts, output_dir=tmp_path / "run", **STEPS)
    assert json.loads((result.folder / "config.json").read_text())["data"]["train_file"] == list(map(str, paths))


def test_the_report_is_shown_in_a_notebook(pairs, corpus_texts, tmp_path):
    pytest.importorskip("matplotlib")
    shown = distill(*pairs, corpus_texts, output_dir=tmp_path / "run", **STEPS)._repr_html_()
    assert shown.startswith('<iframe srcdoc="&lt;!doctype html') or shown.startswith('<iframe srcdoc="<!doctype html')
    assert shown.count('"') == 4  # nothing inside the page ends the attribute


def test_the_public_names_are_these_and_no_other():
    names = {
        "Comparison",
        "Distilled",
        "RunResult",
        "TrainingDiverged",
        "UsageError",
        "__version__",
        "cache",
        "compare",
    }
    names |= {"distill", "load_router_update", "preflight", "sft"}
    assert set(sar_kd.__all__) == names
    assert sar_kd.UsageError is UsageError
    assert sar_kd.load_router_update is router_checkpoint.load_router_update
    assert all(getattr(sar_kd, name) is not None for name in names)
    with pytest.raises(AttributeError, match="no attribute 'destil'"):
        _ = sar_kd.destil


# A run's end by the clock


@pytest.mark.slow
def test_a_time_limit_saves_and_ends_as_an_interruption_and_the_run_goes_on_later(
    pairs, corpus_texts, tmp_path, monkeypatch
):
    now = [0.0]
    monkeypatch.setattr("sar_kd.reporting.run_log.time.monotonic", lambda: now[0])
    step = trainer.train_step

    def an_hour(*arguments):
        now[0] += 3600
        return step(*arguments)

    monkeypatch.setattr(trainer, "train_step", an_hour)
    longer = {**STEPS, "train_steps": 5, "save_steps": 100, "output_dir": tmp_path / "run"}
    summary = distill(*pairs, corpus_texts, time_limit="2h", **longer).summary
    assert (summary["status"], summary["steps"]) == ("interrupted", 2)
    monkeypatch.undo()
    summary = distill(*pairs, corpus_texts, resume=True, **longer).summary
    assert (summary["status"], summary["steps"]) == ("finished", 5)


def test_a_request_that_comes_between_two_looks_ends_no_run_unsaved(pairs, corpus_texts, tmp_path, monkeypatch):
    """The loop reads `requested` once a step; here it becomes true with every second reading."""
    readings = iter([False, True] + [True] * 9)
    monkeypatch.setattr(StopRequest, "requested", property(lambda self: next(readings)))
    summary = distill(*pairs, corpus_texts, output_dir=tmp_path / "run", **{**STEPS, "train_steps": 5}).summary
    assert summary["steps"] == 2
    assert (tmp_path / "run" / "checkpoint" / "step-00000002").is_dir()


def test_outside_the_main_thread_the_deadline_alone_counts():
    found = []

    def work():
        with StopRequest(deadline=0.0) as interruption:
            found.append(interruption.requested)
        with StopRequest() as interruption:
            found.append(interruption.requested)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True, False]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("option", ["teacher_model", "student_model", "train_file", "validation_file"])
def test_an_option_that_has_another_name_here_is_refused(option):
    with pytest.raises(UsageError, match=rf"distill\({option}=...\): is called "):
        distill(**{option: "somewhere"})


@pytest.mark.slow
def test_a_student_in_memory_has_a_task_and_a_control(tmp_path, monkeypatch):
    monkeypatch.setattr(unit_questions, "COUNTS", {"train": 16, "validation": 4, "test": 4})
    student = transformers.AutoModelForCausalLM.from_pretrained(STUDENT_DIR)
    given = {"student": (student, transformers.AutoTokenizer.from_pretrained(STUDENT_DIR)), "task": "units"}
    few = {"task_teacher_steps": 0, "train_steps": 1, "per_device_batch_size": 1, "output_dir": tmp_path / "run"}
    summary = distill(**given, **few).summary
    assert summary["benchmark_result"].keys() == {"student_start", "teacher", "student_end", "student"}
    assert summary["control"].keys() >= {"accuracy", "val_bits_per_byte_best"}
    assert "control" not in distill(**given, **few | {"output_dir": tmp_path / "other"}, skip_baseline=True).summary
