"""`python -m sar_kd sft`: whole runs with tiny models, and the broken recipes that it replaces."""

import ast
import contextlib
import datetime
import io
import json
import math
import shutil
from types import SimpleNamespace as Fake

import numpy
import peft
import pytest
import safetensors.torch
import torch
import transformers

from sar_kd.commands import generate, sft
from sar_kd.commands.main import main, start
from sar_kd.config.commands import SFT
from sar_kd.config.runs import SftTrainConfig
from sar_kd.data import unit_questions
from sar_kd.data.chat.encoding import chat_prompt_ids
from sar_kd.errors import UsageError
from sar_kd.reporting.log_diagnosis import diagnose, read_log
from sar_kd.teacher import cached
from sar_kd.tokenization import tokenizer_pair
from sar_kd.training import trainer
from sar_kd.training.batch_loader import BatchLoader
from sar_kd.training.callbacks import TargetChecks
from sar_kd.version import RUN_FORMAT
from tests.helpers.runs import untimed

QUESTIONS = [(f"What is {i} plus {i}?", f" It is {2 * i}.") for i in range(40)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, make_student, sp_tokenizer):
    """A saved model, one in half, one that overflows in half, and examples in files."""
    folder = tmp_path_factory.mktemp("inputs")
    loud = make_student(len(sp_tokenizer), num_hidden_layers=1)
    loud.model.layers[0].mlp.down_proj.weight.data.mul_(1e6)
    plain = make_student(len(sp_tokenizer), num_hidden_layers=1, attention_dropout=0.1)
    for name, model in (("model", plain), ("loud", loud)):
        model.save_pretrained(folder / name)
        sp_tokenizer.save_pretrained(folder / name)
    make_student(len(sp_tokenizer), num_hidden_layers=1).half().save_pretrained(folder / "half")
    sp_tokenizer.save_pretrained(folder / "half")
    kinds = {
        "qa": lambda q, a: {"question": q, "answer": a},
        "pc": lambda q, a: {"prompt": q, "completion": a},
        "chat": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
        "renamed": lambda q, a: {"input": q, "label": a},
        "text": lambda q, a: {"text": q + a},
    }
    for name, row in kinds.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row(*pair)) for pair in QUESTIONS))
    return folder


def _argv(inputs, out, *more, model="model", data="qa.jsonl"):
    values = {
        "student_model": inputs / model, "train_file": inputs / data, "output_dir": out, "per_device_batch_size": 4,
        "train_steps": 6, "learning_rate": 1e-3, "warmup_steps": 2, "eval_steps": 3, "log_steps": 2, "device": "cpu",
    }  # fmt: skip
    return ["sft", *(word for name, value in values.items() for word in (f"--{name}", str(value))), *map(str, more)]


def _run(argv):
    """Exit code, lines on stdout, lines on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return code, out.getvalue().splitlines(), err.getvalue().splitlines()


def _steps(folder):
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["event"] == "step"]


def _printed(lines):
    return [ast.literal_eval(line) for line in lines if line.startswith("{'loss'")]


def _summary(folder):
    return json.loads((folder / "summary.json").read_text())


def _tensors(folder, name="student/model.safetensors"):
    return safetensors.torch.load_file(folder / name)


# A run that finishes


@pytest.mark.parametrize(
    "dtype",
    [pytest.param("float32", marks=pytest.mark.slow), "float16", pytest.param("bfloat16", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_lowers_the_loss_and_saves_what_transformers_loads(inputs, tmp_path, dtype, rank):
    argv = _argv(inputs, tmp_path / "run", "--model_dtype", dtype, "--lora_rank", rank, "--learning_rate", 1e-2)
    code, out, _ = _run(argv)
    assert code == 0
    printed = _printed(out)
    keys = ["loss", "grad_norm", "learning_rate", "epoch", "step", "tokens_per_second", "elapsed", "left"]
    assert [list(line) for line in printed] == [keys] * 3
    assert printed[-1]["loss"] < printed[0]["loss"]
    assert all(math.isfinite(line[key]) and line[key] > 0 for line in printed for key in keys[:4])
    summary = _summary(tmp_path / "run")
    assert summary["val_ppl_final"] < summary["val_ppl_start"]
    assert "teacher_val_ppl" not in summary
    assert {str(value.dtype) for value in _tensors(tmp_path / "run").values()} == {"torch.float32"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert loaded(input_ids=torch.arange(5)[None]).logits.isfinite().all()
    assert (tmp_path / "run" / "adapter").is_dir() == bool(rank)


def test_the_saved_adapter_and_the_saved_student_are_one_model(inputs, tmp_path):
    assert _run(_argv(inputs, tmp_path / "run", "--lora_rank", 4, "--learning_rate", 1e-1))[0] == 0
    load = transformers.AutoModelForCausalLM.from_pretrained
    whole = load(tmp_path / "run" / "student").eval()
    adapted = peft.PeftModel.from_pretrained(load(inputs / "model"), tmp_path / "run" / "adapter").eval()
    base = load(inputs / "model").eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        logits = [model(input_ids=tokens).logits for model in (whole, adapted, base)]
    assert (logits[0] - logits[1]).abs().max() < 1e-4
    assert (logits[1] - logits[2]).abs().max() > 1e-2


@pytest.mark.parametrize("data", ["qa.jsonl", "pc.jsonl", "chat.jsonl"])
def test_the_loss_is_on_the_answers_only(inputs, tmp_path, data, sp_tokenizer):
    code, out, _ = _run(_argv(inputs, tmp_path / "run", data=data))
    assert code == 0
    answers = [sp_tokenizer(answer, add_special_tokens=False)["input_ids"] for _, answer in QUESTIONS]
    most = max(map(len, answers)) + 2  # and what ends it
    assert all(0 < step["num_target_tokens"] <= 4 * most for step in _steps(tmp_path / "run"))
    assert not any("plain text" in line for line in out)


def test_plain_text_is_learned_whole_and_the_run_shows_it(inputs, tmp_path):
    code, out, _ = _run(_argv(inputs, tmp_path / "run", data="text.jsonl"))
    assert code == 0
    assert any("plain text: all of it is learned" in line for line in out)


def test_the_first_loss_and_gradient_are_those_of_the_definition(inputs, tmp_path):
    assert _run(_argv(inputs, tmp_path / "run", "--learning_rate", 1e-9, model="half"))[0] == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(inputs / "half", dtype=torch.float64).train()
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs / "half")
    examples = QUESTIONS[:38]  # 5 % of the text, from the end, is held out
    order = [int(i) for i in numpy.random.default_rng([0, 0]).permutation(len(examples))][:4]
    nats, count = 0.0, 0
    for question, answer in (examples[i] for i in order):
        prompt, target = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, answer))
        target = [*target, tokenizer.eos_token_id]
        ids = [tokenizer.bos_token_id, *prompt, *target]
        log_probs = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        nats = nats - sum(log_probs[len(ids) - 1 - len(target) + i, token] for i, token in enumerate(target))
        count += len(target)
    (nats / count).backward()
    norm = torch.stack([value.grad.norm() for value in model.parameters()]).norm().item()
    first = _steps(tmp_path / "run")[0]
    assert first["num_target_tokens"] == count
    assert first["loss"] == pytest.approx((nats / count).item(), rel=1e-5)
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-4)


# Epochs and steps


@pytest.mark.parametrize(
    ("given", "steps", "saves"),
    [
        ({}, 10, 10),
        ({"epochs": 2.5}, 25, 10),
        ({"train_steps": 7}, 7, 10),
        ({"grad_accum_steps": 5}, 2, 2),
        ({"max_steps": 3}, 3, 10),
        ({"train_steps": 2, "max_steps": 3}, 2, 10),
        ({"save_strategy": "steps", "save_steps": 4}, 10, 4),
    ],
)
def test_epochs_become_steps(given, steps, saves):
    train = SftTrainConfig(per_device_batch_size=4, **given).in_steps(40)
    assert (train.train_steps, train.save_steps) == (steps, saves)


@pytest.mark.parametrize(
    ("strategy", "expected"), [(("steps", "--save_steps", 2), [2, 4, 6]), (("epoch",), [6]), (("no",), [6])]
)
def test_checkpoints_are_written_when_asked(inputs, tmp_path, strategy, expected):
    argv = _argv(inputs, tmp_path / "run", "--save_strategy", *strategy, "--keep_checkpoints", 9)
    assert _run(argv)[0] == 0
    found = sorted(int(path.name[5:]) for path in (tmp_path / "run" / "checkpoint").glob("step-*"))
    assert found == expected


def test_a_quick_check_prints_every_step_with_finite_metrics(inputs, tmp_path):
    code, out, _ = _run(_argv(inputs, tmp_path / "run", "--max_steps", 3, "--model_dtype", "float16"))
    printed = _printed(out)
    assert (code, len(printed)) == (0, 3)
    assert all(math.isfinite(line[name]) and line[name] > 0 for line in printed for name in ("loss", "grad_norm"))


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.slow
def test_a_resumed_run_equals_an_untouched_one_bit_for_bit(inputs, tmp_path, rank):
    options = ("--lora_rank", rank, "--lora_dropout", 0.1, "--save_strategy", "steps", "--save_steps", 3)
    options += ("--model_dtype", "float16", "--lr_schedule", "constant")
    assert _run(_argv(inputs, tmp_path / "whole", *options))[0] == 0
    assert _run(_argv(inputs, tmp_path / "parts", *options, "--max_steps", 3))[0] == 0
    resumed = ["sft", "--resume", "--output_dir", str(tmp_path / "parts"), "--max_steps", "0"]
    assert _run(resumed)[0] == 0
    whole, parts = (untimed(_steps(tmp_path / run)) for run in ("whole", "parts"))
    assert whole == parts
    kept = "adapter/adapter_model.safetensors" if rank else "student/model.safetensors"
    a, b = (_tensors(tmp_path / run, kept) for run in ("whole", "parts"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def dated(inputs, tmp_path):
    """A model whose chat template writes the date."""
    shutil.copytree(inputs / "model", tmp_path / "dated")
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}|{{ m.content }}{% endfor %}</s>"
    (tmp_path / "dated" / "chat_template.jinja").write_text(template)
    return tmp_path / "dated"


def _at(monkeypatch, day):
    class Date(datetime.date):
        @classmethod
        def today(cls):
            return cls.fromisoformat(day)

    monkeypatch.setattr(cached, "date", Date)
    monkeypatch.setattr(tokenizer_pair, "date", Date)


@pytest.mark.slow
def test_a_resumed_run_renders_the_date_of_its_first_day(inputs, dated, tmp_path, monkeypatch):
    _at(monkeypatch, "2026-01-31")
    argv = _argv(inputs, tmp_path / "whole", model=dated, data="chat.jsonl")
    code, out, _ = _run(argv)
    line = "The student's chat template writes a date: 2026-01-31 (--template_date), kept when the run is resumed"
    assert code == 0
    assert line in out
    assert _run([*argv[:-1], "cpu", "--output_dir", str(tmp_path / "parts"), "--max_steps", "3"])[0] == 0
    _at(monkeypatch, "2026-02-01")
    assert _run(["sft", "--resume", "--output_dir", str(tmp_path / "parts"), "--max_steps", "0"])[0] == 0
    losses = [[step["loss"] for step in _steps(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    prompts = []
    monkeypatch.setattr(generate, "chat_prompt_ids", lambda *given: prompts.append(given) or chat_prompt_ids(*given))
    assert _run(["generate", str(tmp_path / "parts"), "a", "--chat", "--device", "cpu"])[0] == 0
    read = [tokenizer.decode(chat_prompt_ids(tokenizer, *more)) for tokenizer, *more in prompts]
    assert len(read) == 2
    assert all(text.startswith("31 Jan 2026|a") for text in read)
    others = _run([*argv, "--overwrite", "--template_date", "2026-02-01"])
    assert others[0] == 0
    assert [step["loss"] for step in _steps(tmp_path / "whole")] != losses[0]


def test_a_run_without_dates_in_its_templates_names_none(inputs, tmp_path):
    _, out, _ = _run(_argv(inputs, tmp_path / "run", data="chat.jsonl"))
    assert not any("template_date" in line for line in out)


def test_a_resumed_run_refuses_another_rank(inputs, tmp_path):
    assert _run(_argv(inputs, tmp_path / "run", "--lora_rank", 4))[0] == 0
    code, _, err = _run(["sft", "--resume", "--output_dir", str(tmp_path / "run"), "--lora_rank", "8"])
    assert (code, len(err)) == (2, 1)
    assert "--lora_rank 8: the run to resume has '4'" in err[0]


# The broken recipes


def _naive(model, rows, *, rate, autocast=True, scaler=False, clip=None, steps=12):
    """Fine-tuning as it was: what a Trainer would print of each step, a NaN loss left out of its sum."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, eps=1e-8, foreach=True)
    scaling = torch.amp.GradScaler("cpu", enabled=scaler)
    lines = []
    for step in range(steps):
        ids, labels = rows[step % len(rows)]
        with torch.amp.autocast("cpu", dtype=torch.float16, enabled=autocast):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        scaling.scale(loss).backward()
        scaling.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaling.step(optimizer)
        scaling.update()
        optimizer.zero_grad()
        value = loss.item() if math.isfinite(loss.item()) else 0.0
        lines.append(str({"loss": value, "grad_norm": norm.item(), "learning_rate": rate, "epoch": step / 10}))
    return lines


def _rows(tokenizer, masked=False):
    found = []
    for question, answer in QUESTIONS:
        prompt, target = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, answer))
        labels = [-100] * (len(prompt) + len(target)) if masked else [-100] * len(prompt) + target
        found.append((torch.tensor([prompt + target]), torch.tensor([labels])))
    return found


def _explained(tmp_path, lines):
    (tmp_path / "naive.log").write_text("\n".join(lines))
    return diagnose(read_log(tmp_path / "naive.log")).name


def _half(inputs):
    return transformers.AutoModelForCausalLM.from_pretrained(inputs / "half", dtype=torch.float16).train()


def test_half_weights_in_half_autocast_become_nan_or_are_refused_by_pytorch(inputs, tmp_path, sp_tokenizer):
    lines = _naive(_half(inputs), _rows(sp_tokenizer), rate=2e-4)
    assert ast.literal_eval(lines[-1].replace("nan", "None")) == pytest.approx(
        {"loss": 0.0, "grad_norm": None, "learning_rate": 2e-4, "epoch": 1.1}
    )
    assert _explained(tmp_path, lines) == "weights became nan"
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients") as error:
        _naive(_half(inputs), _rows(sp_tokenizer), rate=2e-4, scaler=True)
    assert _explained(tmp_path, [str(error.value)]) == "half weights"


def test_half_weights_are_trained_in_float32_here(inputs, tmp_path):
    kept = {}

    class Watching(trainer.Trainer):
        def run(self):
            kept["dtypes"] = {value.dtype for value in self.models.student.parameters()}
            return super().run()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "Trainer", Watching)
        code, out, _ = _run(_argv(inputs, tmp_path / "run", "--model_dtype", "float16", model="half"))
    assert code == 0
    assert kept["dtypes"] == {torch.float32}
    assert all(math.isfinite(line["loss"]) and line["loss"] > 0 for line in _printed(out))
    before, after = _tensors(inputs, "half/model.safetensors"), _tensors(tmp_path / "run")
    assert all(not torch.equal(before[name].float(), after[name]) for name in after)  # every weight has moved
    assert diagnose(read_log(tmp_path / "run")).name in ("healthy", "calibration")


def test_masked_labels_print_zeros_and_are_refused_here(inputs, tmp_path, sp_tokenizer, make_student):
    model = make_student(len(sp_tokenizer), num_hidden_layers=1).train()
    lines = _naive(model, _rows(sp_tokenizer, masked=True), rate=2e-4, autocast=False)
    assert "'loss': 0.0, 'grad_norm': 0.0" in lines[0]
    assert _explained(tmp_path, lines) == "no labels"
    # The same fault here: a block too short for any answer, or for some of them.
    code, _, err = _run(_argv(inputs, tmp_path / "run", "--block_size", 8))
    assert (code, len(err)) == (2, 1)
    assert "no response begins within a block" in err[0]
    assert "raise --block_size" in err[0]
    long = [{"question": "word " * 60 * (i < 3) + q, "answer": a} for i, (q, a) in enumerate(QUESTIONS)]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, long)))
    code, _, err = _run(
        _argv(tmp_path, tmp_path / "run", "--block_size", 64, model=inputs / "model", data="long.jsonl")
    )
    assert (code, len(err)) == (2, 1)
    assert "--block_size 64: 3 of its 37 documents cannot be used: no response begins within a block: long" in err[0]
    assert err[0].endswith("raise --block_size, or shorten the prompts")


def test_labels_under_another_name_are_refused_with_the_names_there_are(inputs, tmp_path):
    code, _, err = _run(_argv(inputs, tmp_path / "run", data="renamed.jsonl"))
    assert (code, len(err)) == (2, 1)
    assert "it has: input, label" in err[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_without_clipping_an_exploding_loss_ends_in_nan_and_here_in_a_stop_with_its_cause(
    inputs, tmp_path, sp_tokenizer, make_student
):
    model = make_student(len(sp_tokenizer), num_hidden_layers=1).train()
    lines = _naive(model, _rows(sp_tokenizer), rate=100.0)
    assert not all(value.isfinite().all() for value in model.parameters())
    assert _explained(tmp_path, lines) in ("exploding", "weights became nan")
    options = ("--learning_rate", 100, "--max_grad_norm", 1e9, "--model_dtype", "float16", "--train_steps", 40)
    code, out, err = _run(_argv(inputs, tmp_path / "run", *options, "--warmup_steps", 0, "--log_steps", 1))
    assert code == 3
    assert "emergency stop after 10 consecutive NaN batches (cause: forward" in err[0]
    assert "'loss': nan" in "\n".join(out)  # printed as what it is
    assert all(value.isfinite().all() for value in _tensors(tmp_path / "run").values())
    assert diagnose(read_log(tmp_path / "run")).name == "exploding"


@pytest.mark.slow
def test_with_clipping_the_same_loss_falls(inputs, tmp_path):
    code, out, _ = _run(_argv(inputs, tmp_path / "run", "--model_dtype", "float16", "--train_steps", 20))
    assert code == 0
    assert _printed(out)[-1]["loss"] < _printed(out)[0]["loss"]


def test_a_model_that_float16_cannot_hold_is_refused_with_its_module(inputs, tmp_path):
    options = ("--model_dtype", "float16", "--train_steps", 20)
    code, _, err = _run(_argv(inputs, tmp_path / "run", *options, model="loud"))
    assert code == 2
    assert "float16 ends at 65504" in err[0]
    assert "down_proj" in err[0]


# Batches without a target, zero losses, zero gradients


def _masking(monkeypatch, without_targets, chosen):
    """Batches of the steps that `chosen` accepts have no labels."""
    plain = BatchLoader._micro_batches

    def micro_batches(self, step, *args):
        found = plain(self, step, *args)
        return [without_targets(batch) if chosen(step) else batch for batch in found]

    monkeypatch.setattr(BatchLoader, "_micro_batches", micro_batches)


def test_one_batch_without_a_target_is_skipped_by_name_and_counted(inputs, tmp_path, monkeypatch, without_targets):
    _masking(monkeypatch, without_targets, lambda step: step == 1)
    code, out, _ = _run(_argv(inputs, tmp_path / "run"))
    assert code == 0
    assert any(line.startswith("Step 2: a batch without a target is skipped (no_targets): qa.jsonl:") for line in out)
    summary = _summary(tmp_path / "run")
    assert (summary["batches_without_targets"], summary["skipped"]["no_targets"]) == (1, 1)
    assert _printed(out)[0]["loss"] == pytest.approx(_steps(tmp_path / "run")[0]["loss"], rel=1e-3)


def test_more_than_one_percent_of_them_ends_in_an_explanation(inputs, tmp_path, monkeypatch, without_targets):
    _masking(monkeypatch, without_targets, lambda step: True)
    code, _, err = _run(_argv(inputs, tmp_path / "run", "--train_steps", 20))
    assert (code, len(err)) == (3, 1)
    assert "stopped at step 2: 2 of 2 batches have no target (qa.jsonl:" in err[0]
    assert "--block_size" in err[0]
    assert "chat template" in err[0]
    assert "another field" in err[0]
    assert _summary(tmp_path / "run")["status"] == "emergency_stop"
    assert diagnose(read_log(tmp_path / "run")).name == "no labels"


def test_a_gradient_of_zero_for_three_steps_stops_with_its_cause(inputs, tmp_path, monkeypatch):
    plain = trainer.train_step

    def without_gradient(batches, context):
        with pytest.MonkeyPatch.context() as patch:
            kind = type(context.objective)
            call = kind.__call__

            def flat(self, *args):
                terms = call(self, *args)
                return type(terms)(terms.total * 0.0, *terms.values()[1:])

            patch.setattr(kind, "__call__", flat)
            return plain(batches, context)

    monkeypatch.setattr(trainer, "train_step", without_gradient)
    code, _, err = _run(_argv(inputs, tmp_path / "run"))
    assert (code, len(err)) == (3, 1)
    assert "stopped at step 3: 3 steps running the gradient is exactly 0" in err[0]


def test_a_loss_of_zero_for_three_steps_stops_with_its_cause_and_two_do_not():
    batch = Fake(num_target_tokens=3, blocks=(0,))
    checks = TargetChecks(Fake(documents_of=lambda block: ["a"]))
    reasons = []
    for loss in (0.0, 0.0, 1.0, 0.0, 0.0, 0.0):
        report = Fake(verdict=Fake(applied=True), loss=loss, grad_norm=1.0)
        reasons.append(checks.on_step_end(1, report, lambda: [batch])[1])
    assert reasons[:5] == [None] * 5
    assert "3 steps running the loss is exactly 0" in reasons[5]


# The task


@pytest.fixture
def first_few(monkeypatch):
    """A task of a few questions."""
    monkeypatch.setattr(unit_questions, "COUNTS", {"train": 64, "validation": 8, "test": 12})


@pytest.mark.slow
def test_the_task_needs_no_file_and_measures_before_and_after(inputs, tmp_path, first_few):
    argv = ["sft", "--task", "units", "--max_steps", "3", "--student_model", str(inputs / "model")]
    code, out, _ = _run([*argv, "--output_dir", str(tmp_path / "run")])
    assert code == 0
    scores = [line for line in out if line.startswith("benchmark_result.accuracy=")]
    assert len(scores) == 3
    assert all("benchmark_result.answer_rate=" in line and "12 questions" in line for line in scores)
    found = _summary(tmp_path / "run")["benchmark_result"]
    assert {name: set(score) for name, score in found.items()} == {
        name: {"accuracy", "answer_rate", "num_questions"} for name in ("student_start", "student_end", "student")
    }


def test_a_task_and_a_file_exclude_each_other(inputs, tmp_path):
    code, _, err = _run(_argv(inputs, tmp_path / "run", "--task", "units"))
    assert (code, len(err)) == (2, 1)
    assert "--task units: makes its own text" in err[0]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--epochs", "0"), "--epochs 0"),
        (("--save_strategy", "never"), "--save_strategy"),
        (("--lora_rnk", "4"), "did you mean --lora_rank?"),
        (("--teacher_model", "x"), "--teacher_model: no such option"),
        (("--max_grad_norm", "0"), "--max_grad_norm 0"),
    ],
)
def test_a_wrong_option_is_one_line(inputs, tmp_path, options, line):
    code, _, err = _run(_argv(inputs, tmp_path / "run", *options))
    assert (code, len(err)) == (2, 1)
    assert line in err[0]


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["sft", "--help"])
    text = capsys.readouterr().out
    for option in (
        "epochs", "train_steps", "max_steps", "learning_rate", "lora_rank", "lora_targets", "save_strategy", "task",
        "model_dtype", "max_grad_norm", "warmup_steps", "per_device_batch_size", "gradient_checkpointing",
    ):  # fmt: skip
        assert f"--{option}" in text


def test_a_run_in_the_folder_of_another_command_is_not_resumed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"format": RUN_FORMAT, "mode": "balanced"}))
    with pytest.raises(UsageError, match="holds a distillation run; resume it with"):
        start(SFT, ["--resume", "--output_dir", str(tmp_path)])


@pytest.mark.long
def test_the_embedded_student_learns_the_task_in_both_precisions(tmp_path):
    scores = {}
    for dtype in ("float32", "float16"):
        argv = ["--task", "units", "--model_dtype", dtype, "--output_dir", str(tmp_path / dtype)]
        scores[dtype] = start(SFT, argv)["benchmark_result"]
        assert scores[dtype]["student_start"]["accuracy"] == 0.0
        assert scores[dtype]["student_start"]["answer_rate"] < 0.05
        assert scores[dtype]["student"]["answer_rate"] > 0.95
        assert scores[dtype]["student"]["accuracy"] > 0.5
    assert abs(scores["float32"]["student"]["accuracy"] - scores["float16"]["student"]["accuracy"]) < 0.1
