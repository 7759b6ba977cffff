"""The teacher cache: the losses of a live run to 1e-3, the same bytes after a kill, and refused where it is damaged."""

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from sar_kd.commands import cache, main
from sar_kd.config.command_line import parse
from sar_kd.config.commands import CACHE
from sar_kd.config.presets import STABLE
from sar_kd.data import words
from sar_kd.data.blocks import pack, skip_start_tokens
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.samples import Document
from sar_kd.data.files.sources import load_documents
from sar_kd.errors import UsageError
from sar_kd.losses.objective import Objective
from sar_kd.models import loading
from sar_kd.models.loading import load_models
from sar_kd.reporting.held_out import read_held_out
from sar_kd.runtime.distributed import SINGLE_PROCESS
from sar_kd.runtime.precision import setup_precision
from sar_kd.teacher.cache import builder, format
from sar_kd.teacher.cache.format import TEXTS
from sar_kd.teacher.cache.lookup import CacheIndex, CacheLookup, PlainTargets
from sar_kd.teacher.cached import open_teacher_cache
from sar_kd.tokenization.token_stream import Blocks
from sar_kd.tokenization.tokenizer_pair import TokenizerPair
from tests.helpers import ranks
from tests.helpers.runs import run_script

pytestmark = pytest.mark.slow

K = 16
CLAMPS = ("--logit_clamp_style", "normalized", "--loss_clamp_style", "scale")


@pytest.fixture(scope="module")
def inputs(
    tmp_path_factory, make_student, make_teacher, sp_tokenizer, byte_tokenizer, superword_tokenizer, corpus_texts
):
    """Saved models with two tokenizers, plain text, and the same with conversations between."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, model, tokenizer in (
        ("student", make_student(len(sp_tokenizer), num_hidden_layers=1), sp_tokenizer),
        ("equal_student", make_student(len(byte_tokenizer), num_hidden_layers=1), byte_tokenizer),
        ("teacher", make_teacher(len(byte_tokenizer), num_hidden_layers=1, initializer_range=0.3), byte_tokenizer),
        ("dense", make_student(len(byte_tokenizer), num_hidden_layers=1, hidden_size=16), byte_tokenizer),
        # Its tokenizer has a start token.
        ("starting", make_student(len(sp_tokenizer), num_hidden_layers=1, initializer_range=0.3), sp_tokenizer),
        # Its tokens span words.
        (
            "spanning",
            make_student(len(superword_tokenizer), num_hidden_layers=1, initializer_range=0.3),
            superword_tokenizer,
        ),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text("\n".join(corpus_texts), encoding="utf-8")
    examples = [{"text": "\n".join(corpus_texts[i : i + 6])} for i in range(0, len(corpus_texts), 6)]
    for number in range(6):
        question, answer = corpus_texts[2 * number : 2 * number + 2]
        examples.insert(3 * number, {"prompt": question, "completion": answer})
    (folder / "mixed.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    return folder


def _text(inputs, text="text.txt", block_size=48):
    return ["--train_file", str(inputs / text), "--block_size", str(block_size)]


def _model_flags(inputs, student="student", teacher="teacher"):
    return ["--teacher_model", str(inputs / teacher), "--student_model", str(inputs / student)]


def _build(inputs, folder, *more, student="student", text="text.txt", dtype="float32", keep="topk"):
    """Build a cache; returns its output."""
    out = io.StringIO()
    argv = [*_model_flags(inputs, student), *_text(inputs, text), "--model_dtype", dtype, "--device", "cpu"]
    argv += ["--teacher_cache", str(folder), "--teacher_top_k", str(K), "--per_device_batch_size", "3", "--keep", keep]
    with contextlib.redirect_stdout(out):
        main.start(CACHE, [*argv, *map(str, more)])
    return out.getvalue()


@pytest.fixture(scope="module")
def built(inputs, tmp_path_factory):
    """built(**how): the folder of a cache, built once for the same arguments."""
    made = {}

    def get(**how) -> Path:
        key = tuple(sorted(how.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("cache") / "cache"
            _build(inputs, made[key], **how)
        return made[key]

    return get


class _Run:
    """A run up to its first step."""

    def __init__(self, flags):
        config, reader = open_teacher_cache(parse(STABLE, flags), SINGLE_PROCESS, lambda line: None)
        self.config, self.precision = config, setup_precision(config.precision, 0)
        self.models = load_models(config, self.precision, reader and reader.teacher)
        limits, texts = self.models.block_limits(config.data.block_size), load_documents(config.data)
        cached = reader.texts(texts, self.models.tokenizers.teacher)[0] if reader else None
        self.dataset = build_dataset(texts[0], self.models.tokenizers, *limits, cached_logits=cached)
        sides = self.models.teacher, self.models.student
        self.objective = Objective(*sides, config.loss, self.dataset.aligner, self.precision)

    def terms_and_gradient(self, blocks):
        """The terms of a batch, and the unscaled gradient of its total."""
        self.models.student.zero_grad()
        batch = self.dataset.batch(blocks)
        scale = self.precision.loss_scale / batch.num_target_tokens
        terms = self.objective(batch, grad_scale=scale)
        (terms.total * scale).backward()
        grads = [p.grad.flatten() for p in self.models.student.parameters() if p.grad is not None]
        return terms, torch.cat(grads) / self.precision.loss_scale


def _runs(inputs, folder, *more, student="student", text="text.txt", dtype="float32"):
    common = [*_model_flags(inputs, student), *_text(inputs, text), "--model_dtype", dtype, "--device", "cpu"]
    common += ["--alpha_kd", "0.6", "--alpha_ce", "0.4", "--output_dir", "none", *map(str, more)]
    return _Run([*common, "--teacher_cache", str(folder)]), _Run([*common, "--teacher_top_k", str(K)])


def _assert_same(cached, live):
    assert [tuple(block) for block in cached.dataset.blocks] == [tuple(block) for block in live.dataset.blocks]
    for blocks in ([0, 1, 2], [len(live.dataset) - 2, len(live.dataset) - 1]):
        (own, own_grad), (terms, grad) = cached.terms_and_gradient(blocks), live.terms_and_gradient(blocks)
        assert terms.kd > 0.1
        for name in ("total", "ce", "kd"):
            torch.testing.assert_close(getattr(own, name), getattr(terms, name), rtol=1e-3, atol=0.0)
        assert (own_grad - grad).norm() < 1e-3 * grad.norm()


# The same losses


@pytest.mark.parametrize("student", ["equal_student", "student"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_losses_and_gradients_are_those_of_a_live_teacher(inputs, built, student, temperature):
    _assert_same(*_runs(inputs, built(student=student), *CLAMPS, "--temperature", temperature, student=student))


@pytest.mark.parametrize("student", ["equal_student", "student"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_so_are_they_with_conversations_and_in_true_float16(inputs, built, student, dtype):
    how = {"student": student, "text": "mixed.jsonl", "dtype": dtype}
    _assert_same(*_runs(inputs, built(**how), *CLAMPS, "--temperature", 2.0, **how))


@pytest.mark.parametrize("student", ["equal_student", "student"])
def test_so_are_they_where_the_teacher_has_a_start_token_before_each_document(inputs, tmp_path, student):
    teacher = "--teacher_model", inputs / "starting"
    _build(inputs, tmp_path / "cache", *map(str, teacher), student=student, text="mixed.jsonl")
    cached, live = _runs(inputs, tmp_path / "cache", *teacher, student=student, text="mixed.jsonl")
    start = cached.dataset.pair.teacher_start
    assert cached.dataset.pair.document_starts == ((start,) if student == "student" else (), (start,))
    assert not cached.dataset.text.teacher.is_target[cached.dataset.text.teacher.ids == start].any()
    assert cached.dataset.cached_records.num_missing == 0
    _assert_same(cached, live)
    _assert_total_nats(cached, live)


@pytest.mark.parametrize("student", ["equal_student", "student"])
def test_so_are_they_where_passages_without_a_common_end_are_in_no_block(inputs, tmp_path, student):
    more = "--teacher_model", inputs / "spanning", "--block_size", 28
    _build(inputs, tmp_path / "cache", *more, student=student)
    cached, live = _runs(inputs, tmp_path / "cache", *more, student=student)
    assert len(cached.dataset.text.skipped_ranges) == len(live.dataset.text.skipped_ranges) == 2
    assert cached.dataset.cached_records.num_missing == 0
    _assert_same(cached, live)
    _assert_total_nats(cached, live)


def _assert_total_nats(cached, live):
    found = [cached.dataset.cached_records.target_nats(block) for block in cached.dataset.blocks]
    nats, count = sum(nats.sum() for nats, _ in found), sum(len(nats) for nats, _ in found)
    assert not any(num_nonfinite for _, num_nonfinite in found)
    batches = list(live.dataset.token_batches("teacher", 1))
    assert count == sum(len(batch.targets) for batch in batches)
    log_probs = 0.0
    for batch in batches:
        with torch.no_grad():
            logits = live.models.teacher(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions].double()
        log_probs += float(logits.log_softmax(-1).gather(1, batch.targets[:, None]).sum())
    assert nats == pytest.approx(-log_probs, rel=1e-5)


@pytest.mark.parametrize("alignment", ["strict", "alm", "uld", "projection"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_every_alignment_and_direction_is_served(inputs, built, alignment, direction):
    more = ("--alignment", alignment, "--kd_direction", direction, "--temperature", 1.5)
    _assert_same(*_runs(inputs, built(student="student"), *more))


def test_fewer_tokens_than_are_cached_are_those_of_a_live_teacher_with_the_same_top_k(inputs, built):
    common = [*_model_flags(inputs), *_text(inputs), "--device", "cpu", "--output_dir", "none", "--teacher_top_k", "4"]
    cached, live = _Run([*common, "--teacher_cache", str(built(student="student"))]), _Run(common)
    assert cached.objective.distillation.top_k == 4
    _assert_same(cached, live)


@pytest.mark.parametrize("student", ["equal_student", "student"])
def test_another_temperature_is_served_by_a_cache_that_was_made_for_it(inputs, tmp_path, student):
    _build(inputs, tmp_path / "cache", "--temperatures", "3", "0.5", student=student)
    for temperature in (3.0, 0.5):
        _assert_same(*_runs(inputs, tmp_path / "cache", "--temperature", temperature, student=student))


@pytest.mark.parametrize("student", ["equal_student", "student"])
@pytest.mark.parametrize(("temperature", "dtype"), [(1.0, "float32"), (2.0, "float16")])
def test_drawn_tokens_have_about_the_gradient_of_the_whole_teacher(inputs, tmp_path, student, temperature, dtype):
    how = {"student": student, "text": "mixed.jsonl", "dtype": dtype}
    _build(inputs, tmp_path / "cache", "--teacher_top_k", 200, keep="mixed", **how)
    more = (*CLAMPS, "--temperature", temperature)
    cached, _ = _runs(inputs, tmp_path / "cache", *more, **how)
    common = [*_model_flags(inputs, student), *_text(inputs, "mixed.jsonl"), "--model_dtype", dtype, "--device", "cpu"]
    live = _Run([*common, "--alpha_kd", "0.6", "--alpha_ce", "0.4", "--output_dir", "none", *map(str, more)])
    for blocks in ([0, 1, 2], [len(live.dataset) - 2, len(live.dataset) - 1]):
        (own, own_grad), (terms, grad) = cached.terms_and_gradient(blocks), live.terms_and_gradient(blocks)
        torch.testing.assert_close(own.ce, terms.ce, rtol=1e-3, atol=0.0)
        assert (own_grad - grad).norm() < 0.2 * grad.norm()
        assert own.unshared_positions == 0


def test_the_text_alone_is_learned_from_drawn_tokens_as_from_others(inputs, built):
    drawn, kept = (
        _runs(inputs, built(student="student", keep=keep), "--alignment", "alm")[0] for keep in ("mixed", "topk")
    )
    (terms, grad), (others, other_grad) = (run.terms_and_gradient([0, 1, 2]) for run in (drawn, kept))
    assert torch.equal(terms.kd, others.kd)
    assert torch.equal(grad, other_grad)


def test_the_records_hold_the_teachers_log_probabilities(inputs, built):
    """Every record against a teacher run block by block, in float64 from its logits."""
    folder = built(student="equal_student")
    live = _runs(inputs, folder, student="equal_student")[1]
    records = format.Shards(folder, format.read_header(folder), "train").take(np.arange(live.dataset.num_tokens))
    first = 0
    for block in range(len(live.dataset)):
        batch = live.dataset.batch([block]).teacher
        with torch.no_grad():
            logits = live.models.teacher(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions].double()
        log_probs, own = logits.log_softmax(-1), records[first : first + len(batch.positions)]
        first += len(batch.positions)
        targets = log_probs.gather(1, batch.targets[:, None])[:, 0]
        assert np.allclose(own["target_log_prob"], targets, atol=1e-5)
        ids = torch.from_numpy(own["ids"].astype(np.int64))
        top = torch.from_numpy(own["max_log_prob"][:, None].astype(np.float64) + own["log_prob_gaps"])
        assert torch.allclose(log_probs.gather(1, ids), top, atol=1e-5, rtol=1e-3)
        assert torch.equal(log_probs.topk(K).indices[:, 0], ids[:, 0])
        for i, temperature in enumerate((1.0, 1.5, 2.0)):
            mass = (logits / temperature).softmax(-1).gather(1, ids).sum(1)
            ratios = torch.from_numpy(own["tail_log_ratios"][:, i]).double()
            assert torch.allclose(((1 - mass) / mass).log(), ratios, atol=2e-3)
    assert first == live.dataset.num_tokens


# Runs


def _argv(inputs, out, *more, student="student", text="text.txt", steps=3):
    argv = [*_model_flags(inputs, student), *_text(inputs, text), "--device", "cpu", "--model_dtype", "float32"]
    argv += ["--train_steps", str(steps), "--eval_steps", "2", "--log_steps", "1", "--per_device_batch_size", "2"]
    argv += ["--warmup_steps", "1", "--student_lr", "1e-3", "--alpha_kd", "0.5", "--alpha_ce", "0.5"]
    return [*argv, "--output_dir", str(out), *map(str, more)]


def test_the_last_line_is_a_run_that_the_cache_serves(inputs, tmp_path):
    out = _build(inputs, tmp_path / "cache", "--temperatures", "3", "4", student="equal_student", text="mixed.jsonl")
    line = out.splitlines()[-1]
    assert line.startswith("Use it: ")
    argv = shlex.split(line)
    config = parse(STABLE, argv[argv.index("train") + 1 :])
    assert (config.models.teacher_model, config.models.student_model) == (
        str(inputs / "teacher"), str(inputs / "equal_student"),
    )  # fmt: skip
    assert (config.data.train_file, config.data.block_size) == ((str(inputs / "mixed.jsonl"),), 48)
    assert config.loss.temperature == 3.0
    config, reader = open_teacher_cache(config, SINGLE_PROCESS, lambda line: None)
    reader.texts(load_documents(config.data), load_models(config, setup_precision(config.precision, 0),
                                                          reader.teacher).tokenizers.teacher)  # fmt: skip


@pytest.mark.parametrize("student", ["equal_student", "student"])
def test_a_run_with_the_cache_has_the_metrics_of_one_with_the_teacher(inputs, built, tmp_path, student, monkeypatch):
    monkeypatch.setattr(words, "FEWEST", 1)  # so that a short text has some
    folder = built(student=student, text="mixed.jsonl")
    summaries = []
    for name, more in (("cached", ["--teacher_cache", folder]), ("live", ["--teacher_top_k", K])):
        argv = _argv(inputs, tmp_path / name, *more, "--control", student=student, text="mixed.jsonl")
        assert run_script(argv)[0] == 0
        steps = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses = [[s["loss"], s["kd_loss"], s["ce_loss"], s["grad_norm"]] for s in steps if s["event"] == "step"]
        summaries.append((json.loads((tmp_path / name / "summary.json").read_text()), losses))
    (cached, cached_losses), (live, losses) = summaries
    assert np.allclose(cached_losses, losses, rtol=1e-3)
    for name in ("val_ppl_final", "teacher_val_ppl", "teacher_val_bits_per_byte", "val_bits_per_byte_final"):
        assert cached[name] == pytest.approx(live[name], rel=1e-4)
    assert (cached["tokens"], cached["applied"]) == (live["tokens"], live["applied"])
    found, wanted = (read_held_out(tmp_path / name) for name in ("cached", "live"))
    assert found.nats["teacher"] == pytest.approx(wanted.nats["teacher"], rel=1e-4)
    assert found.words.nats["teacher"] == pytest.approx(wanted.words.nats["teacher"], rel=1e-4)
    assert len(found.words.words) > 5


# A teacher that is not finite


@pytest.fixture
def break_teacher(monkeypatch):
    """break_teacher(share): every teacher that is loaded is not finite behind about this share of its vocabulary."""

    def apply(share):
        load, ids = loading._load_checked_model, []

        def broken(option, *args, **how):
            model = load(option, *args, **how)
            if option == "teacher_model":
                model.get_input_embeddings().register_forward_pre_hook(remember)
                model.model.norm.register_forward_hook(spoil)
            return model

        def remember(module, inputs):
            ids[:] = inputs

        def spoil(module, inputs, output):
            return output.masked_fill((ids[0] * 7919 % 100 < 100 * share)[..., None], torch.nan)

        monkeypatch.setattr(loading, "_load_checked_model", broken)

    return apply


def test_a_teacher_that_is_not_finite_is_not_cached(inputs, tmp_path, break_teacher):
    break_teacher(1.0)
    with pytest.raises(UsageError) as error:
        _build(inputs, tmp_path / "cache")
    line = str(error.value)
    assert line.startswith(f"--teacher_model {inputs / 'teacher'}: its logits are not finite at 100.0% of")
    assert "model.norm" in line
    assert not list(tmp_path.rglob("*.records"))


def test_one_that_is_not_finite_in_parts_is_cached_with_the_share_and_a_run_has_the_counts_of_a_live_one(
    inputs, tmp_path, break_teacher
):
    break_teacher(0.2)
    folder = tmp_path / "cache"
    dense = "--teacher_model", inputs / "dense"
    out = _build(inputs, folder, *dense, student="equal_student")
    header = format.read_header(folder)
    stored = [format.Shards(folder, header, text) for text in TEXTS]
    records = [shards.take(np.arange(len(shards)))["max_log_prob"] for shards in stored]
    share = np.isnan(np.concatenate(records)).mean()
    assert 0.0 < share < 0.5
    assert f"Warning: not finite at {share:.1%} of the tokens" in out
    counts = []
    for name, more in (("cached", ["--teacher_cache", folder]), ("live", ["--teacher_top_k", K])):
        code, lines, errors = run_script(_argv(inputs, tmp_path / name, *more, *dense, student="equal_student"))
        assert code == 0, errors
        assert any(line.startswith("Warning: --teacher_") and "not finite at" in line for line in lines)
        assert any("teacher_dropped=" in line for line in lines if line.startswith("Step "))
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        counts.append([summary[key] for key in ("teacher_rows_dropped", "teacher_positions", "teacher_val_nonfinite")])
    assert counts[0] == counts[1]
    assert counts[0][0] > 0


def test_a_cache_whose_logits_are_not_finite_in_most_of_the_held_out_text_is_refused(
    inputs, tmp_path, break_teacher, monkeypatch
):
    break_teacher(0.9)
    monkeypatch.setattr(builder.Teacher, "max_nonfinite", 1.0)  # as a version did that did not look
    _build(inputs, tmp_path / "cache", student="equal_student")
    monkeypatch.undo()
    argv = _argv(inputs, tmp_path / "run", "--teacher_cache", tmp_path / "cache", student="equal_student")
    code, _, (line,) = run_script(argv)
    assert code == 2
    assert "--teacher_cache" in line
    assert "make it again" in line


def test_one_cache_serves_students_with_other_tokenizers(inputs, built, tmp_path):
    folder = built(student="equal_student", text="mixed.jsonl")
    for student in ("equal_student", "student"):
        code, out, _ = run_script(_argv(inputs, tmp_path / student, "--teacher_cache", folder, student=student,
                                  text="mixed.jsonl"))  # fmt: skip
        assert code == 0
        summary = json.loads((tmp_path / student / "summary.json").read_text())
        assert summary["teacher_val_ppl"] > 1.0
        assert summary["skipped"]["forward"] == 0
    assert any("The teacher read plain text in" in line for line in out)


def test_the_weights_of_the_teacher_are_never_loaded(inputs, built, tmp_path):
    shutil.copytree(inputs / "teacher", tmp_path / "teacher")
    (tmp_path / "teacher" / "model.safetensors").unlink()
    argv = _argv(inputs, tmp_path / "run", "--teacher_cache", built(student="student"))
    argv[1] = str(tmp_path / "teacher")
    code, out, _ = run_script(argv)
    assert code == 0
    assert any("its weights are not here to compare" in line for line in out)


def test_a_run_renders_the_date_that_its_cache_was_made_with(inputs, tmp_path):
    for name in ("equal_student", "teacher"):
        shutil.copytree(inputs / name, tmp_path / name)
        template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}|{{ m.content }}{% endfor %}<|endoftext|>"
        (tmp_path / name / "chat_template.jinja").write_text(template)
    shutil.copy(inputs / "mixed.jsonl", tmp_path)
    how = {"student": "equal_student", "text": "mixed.jsonl"}
    out = _build(tmp_path, tmp_path / "cache", "--template_date", "2026-01-31", **how)
    assert "The student's and teacher's chat templates write a date: 2026-01-31" in out
    assert "2026-01-31" in _build(tmp_path, tmp_path / "cache", **how)  # goes on on another day
    argv = _argv(tmp_path, tmp_path / "run", "--teacher_cache", tmp_path / "cache", **how)
    code, lines, _ = run_script(argv)
    assert code == 0
    assert any("2026-01-31" in line for line in lines)
    assert not any("not in the cache" in line for line in lines)
    code, _, err = run_script([*argv, "--overwrite", "--template_date", "2026-02-01"])
    assert (code, len(err)) == (2, 1)
    assert "was made with a different --template_date (2026-01-31, not 2026-02-01)" in err[0]


@pytest.mark.parametrize("keep", ["topk", "mixed"])
def test_a_run_resumes_with_its_cache(inputs, built, tmp_path, keep):
    folder = built(student="student", keep=keep)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    more = ("--teacher_cache", folder, "--lr_schedule", "constant")
    assert run_script(_argv(inputs, whole, *more, steps=4))[0] == 0
    assert run_script(_argv(inputs, halves, *more, steps=2))[0] == 0
    assert run_script(["--resume", "--output_dir", str(halves), "--train_steps", "4"])[0] == 0
    both = [(path / "student" / "model.safetensors").read_bytes() for path in (whole, halves)]
    assert both[0] == both[1]


# Building


def _content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class _Killed(BaseException):
    """A kill: nothing catches it."""


@pytest.mark.parametrize(
    ("moment", "after", "keep"),
    [(moment, after, "topk") for moment in ("index", "write_shard", "rename", "header") for after in (1, 3)]
    + [("write_shard", 3, "mixed"), ("header", 1, "sampled")],
)
def test_a_build_that_was_killed_goes_on_and_ends_with_the_same_bytes(
    inputs, tmp_path, monkeypatch, moment, after, keep
):
    monkeypatch.setattr(cache, "SHARD_SIZE", 500)
    how = {"student": "student", "text": "mixed.jsonl", "keep": keep}
    _build(inputs, tmp_path / "whole", **how)
    wanted = _content(tmp_path / "whole")
    assert sum(name.endswith(".records") for name in wanted) >= 4
    calls = []

    def dies(function, before):
        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == after and before:
                raise _Killed
            result = function(*args, **kwargs)
            if len(calls) == after:
                raise _Killed
            return result

        return call

    with monkeypatch.context() as patch:
        if moment == "index":
            patch.setattr(builder.TeacherText, "write_index", dies(builder.TeacherText.write_index, before=after == 3))
        elif moment == "write_shard":  # the shard is whole, the header does not name it
            patch.setattr(builder, "write_shard", dies(builder.write_shard, before=False))
        elif moment == "rename":  # the shard is written, not yet under its name
            patch.setattr(os, "replace", dies(os.replace, before=True))
        else:
            patch.setattr(builder, "write_header", dies(builder.write_header, before=False))
        with contextlib.suppress(_Killed):
            _build(inputs, tmp_path / "cache", **how)
    if calls and len(calls) >= after:
        partial = tmp_path / "cache"
        code, _, err = run_script(_argv(inputs, tmp_path / "run", "--teacher_cache", partial, text="mixed.jsonl"))
        assert (code, len(err)) == (2, 1)
        assert "is not finished" in err[0] or "holds no teacher cache" in err[0]
    _build(inputs, tmp_path / "cache", **how)
    assert _content(tmp_path / "cache") == wanted


class _SigkilledWriting:
    """A build that is killed in the middle of its `number`-th atomic write, with a share of the file on the disk."""

    def __init__(self, inputs, folder, number, share):
        self.inputs, self.folder, self.number, self.share = inputs, folder, number, share

    def __call__(self, rank):
        writes, fsync = [], os.fsync

        def interrupted(file):
            if Path(f"/proc/self/fd/{file}").resolve().name.startswith("."):  # neither the index nor a folder
                writes.append(file)
            if len(writes) == self.number:
                os.ftruncate(file, int(self.share * os.fstat(file).st_size))
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(file)

        os.fsync, cache.SHARD_SIZE = interrupted, 200
        _build(self.inputs, self.folder, text="mixed.jsonl")
        return 0


def test_a_build_under_repeated_sigkill_in_the_middle_of_a_write_ends_with_the_same_bytes(
    inputs, tmp_path, monkeypatch
):
    monkeypatch.setattr(cache, "SHARD_SIZE", 200)
    _build(inputs, tmp_path / "whole", text="mixed.jsonl")
    wanted, folder, draw = _content(tmp_path / "whole"), tmp_path / "cache", random.Random(7)
    num_shards = []
    # At first a header is written, then shards and headers in turn; of these four, the first stops a shard.
    for attempt, number in enumerate((2, 4, 3, 4)):
        dies = _SigkilledWriting(inputs, folder, number, draw.random())
        (ended,) = ranks.run(tmp_path / f"{attempt}", dies, size=1)
        assert ended.code == -signal.SIGKILL, ended.err
        assert any(name.endswith(".partial") for name in _content(folder))
        num_shards.append(sum(name.endswith(".records") for name in _content(folder)))
    assert num_shards == sorted(num_shards)
    assert 0 < num_shards[-1] < sum(name.endswith(".records") for name in wanted)
    _build(inputs, folder, text="mixed.jsonl")
    assert _content(folder) == wanted


def test_a_finished_cache_is_left_as_it_is(inputs, built):
    folder = built(student="student")
    before = _content(folder)
    out = _build(inputs, folder, student="student")
    assert "Going on:" in out
    assert _content(folder) == before


def test_the_size_is_printed_before_and_is_the_size_that_is_written(inputs, tmp_path):
    out = _build(inputs, tmp_path / "cache").splitlines()
    printed = re.search(r"(\d+) bytes a token, ([\d,]+) tokens", out[0])
    records = sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*.records"))
    index = sum((tmp_path / "cache" / text / "index" / name).stat().st_size for text in TEXTS for name in
                ("tokens",))  # fmt: skip
    assert int(printed[1]) * int(printed[2].replace(",", "")) == records + index


def test_a_disk_without_room_is_one_line(inputs, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("sar_kd.runtime.files.shutil.disk_usage", lambda _: usage)
    with pytest.raises(UsageError, match=r"--teacher_cache .*no room for the teacher's logits.*--teacher_top_k"):
        _build(inputs, tmp_path / "cache")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--teacher_top_k", 8], r"a different --teacher_top_k \(16, not 8\); name another folder, or --overwrite"),
        (["--block_size", 32], r"a different --block_size \(48, not 32\)"),
        (["--per_device_batch_size", 2], r"a different --per_device_batch_size"),
        (["--model_dtype", "float16"], r"a different --model_dtype \(float32, not float16\)"),
        (["--teacher_top_k", 600], "the teacher has 600 tokens; give fewer"),
        (["--temperatures", 1, 3], "different --temperatures"),
        (["--keep", "mixed"], r"a different --keep \(topk, not mixed\)"),
        (["--keep", "mixed", "--teacher_top_k", 256], "--teacher_top_k 256: must be at most 255 with --keep mixed"),
        (["--temperatures", 1, "warm"], "--temperatures 1 warm: must be numbers from 0.001 to 1000"),
    ],
)
def test_a_cache_is_not_gone_on_with_under_other_settings(inputs, built, more, reason):
    folder = built(student="student")
    before = _content(folder)
    with pytest.raises(UsageError, match=reason):
        _build(inputs, folder, *more, student="student")
    assert _content(folder) == before


def test_another_text_or_teacher_is_not_gone_on_with_and_overwrite_begins_anew(inputs, tmp_path):
    folder = tmp_path / "cache"
    _build(inputs, folder)
    for flags, reason in (
        (["--train_file", inputs / "mixed.jsonl"], "a different text"),
        (["--teacher_model", inputs / "dense"], "a different teacher"),
        (["--student_model", inputs / "equal_student"], "a different student tokenizer"),
    ):
        with pytest.raises(UsageError, match=reason):
            _build(inputs, folder, *flags)
    _build(inputs, folder, "--train_file", inputs / "mixed.jsonl", "--overwrite")
    assert _content(folder).keys() >= {"header.json", "train/00000.records", "validation/index/header.json"}


def test_a_folder_of_something_else_is_not_touched(inputs, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something else; name another folder"):
        _build(inputs, tmp_path, "--overwrite")
    assert _content(tmp_path) == {"notes.txt": b"mine"}


# Refusals


def test_a_flipped_byte_is_refused_wherever_it_is(inputs, built, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(built(student="student"), folder)
    argv = _argv(inputs, tmp_path / "run", "--teacher_cache", folder)
    for name, content in _content(folder).items():
        if not content:
            continue
        at = int(hashlib.sha256(name.encode()).hexdigest(), 16) % len(content)
        changed = bytearray(content)
        changed[at] ^= 1
        (folder / name).write_bytes(bytes(changed))
        code, _, err = run_script(argv)
        assert (code, len(err)) == (2, 1), name
        assert f"--teacher_cache {folder}: " in err[0]
        assert f"cache --teacher_cache {folder} --overwrite` and the options that it was made with" in err[0]
        (folder / name).write_bytes(content[: len(content) // 2])
        assert run_script(argv)[0] == 2, name
        (folder / name).write_bytes(content)
    assert run_script(argv)[0] == 0


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--routing", "sar"], "own routing, which --routing sar changes; leave the cache out, or --routing native"),
        (["--routing", "all"], "own routing, which --routing all changes"),
        (["--routing", "ka"], "own routing, which --routing ka changes"),
        (["--alignment", "hidden"], "holds no hidden states"),
        (["--on_policy_fraction", 0.5], "holds a fixed text"),
        (["--logit_clamp_style", "raw", "--force"], "holds no logits"),
        (["--alpha_kd", 0], "distillation is off"),
        (["--temperature", 3], "serves --temperature 1, 1.5, 2, not 3; make another one with --temperatures 1 1.5 2 3"),
        (["--teacher_top_k", 17], "holds 16 tokens per position, fewer than --teacher_top_k 17"),
        (["--block_size", 32], r"a different --block_size (48, not 32)"),
        (["--teacher_model", "dense"], "a different teacher"),
        (["--teacher_model", "retrained"], "a different teacher"),
        (["--teacher_model", "student"], "a different teacher"),
        (["--train_file", "mixed.jsonl"], "a different text"),
        (["--teacher_cache", "nowhere"], "no such folder"),
        (["--teacher_cache", "."], "holds no teacher cache"),
    ],
)
def test_a_run_that_the_cache_cannot_serve_is_refused_in_one_line(inputs, built, tmp_path, more, reason, monkeypatch):
    monkeypatch.chdir(inputs)
    if not (inputs / "retrained").exists():
        shutil.copytree(inputs / "teacher", inputs / "retrained")
        path = inputs / "retrained" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    code, _, err = run_script(_argv(inputs, tmp_path / "run", "--teacher_cache", built(student="student"), *more))
    assert (code, len(err)) == (2, 1)
    assert err[0].startswith("error: --teacher_cache ")
    assert reason in err[0]


@pytest.mark.parametrize(
    "setting",
    [
        ("--kd_direction", "reverse"),
        ("--kd_direction", "jsd"),
        ("--alignment", "strict"),
        ("--alignment", "uld"),
        ("--teacher_top_k", "4"),
    ],
)
def test_drawn_tokens_are_refused_in_one_line_where_the_most_likely_ones_are_needed(inputs, built, tmp_path, setting):
    folder = built(student="student", keep="mixed")
    code, _, err = run_script(_argv(inputs, tmp_path / "run", "--teacher_cache", folder, *setting))
    assert (code, len(err)) == (2, 1)
    assert f"holds drawn tokens (--keep mixed); {' '.join(setting)} needs the most likely ones" in err[0]
    assert "make a cache with --keep topk" in err[0]


def test_other_draws_have_another_seed(inputs, built, tmp_path):
    folder = built(student="student", keep="mixed")
    with pytest.raises(UsageError, match=r"a different --seed \(0, not 1\)"):
        _build(inputs, folder, "--seed", 1, student="student", keep="mixed")
    _build(inputs, tmp_path / "again", student="student", keep="mixed")
    _build(inputs, tmp_path / "other", "--seed", 1, student="student", keep="mixed")
    again, other, first = (
        _content(path)["train/00000.records"] for path in (tmp_path / "again", tmp_path / "other", folder)
    )
    assert again == first != other


def test_a_task_that_fine_tunes_its_teacher_first_has_no_cache_of_it(built, tmp_path):
    argv = ["--task", "units", "--teacher_cache", built(student="student"), "--output_dir", tmp_path / "run"]
    code, _, err = run_script([str(word) for word in argv])
    assert (code, len(err)) == (2, 1)
    assert "--task first fine-tunes the embedded teacher" in err[0]


def test_another_tokenizer_of_the_teachers_is_refused(inputs, built, tmp_path):
    shutil.copytree(inputs / "teacher", tmp_path / "teacher")
    path = tmp_path / "teacher" / "tokenizer.json"
    path.write_text(path.read_text().replace('"ignore_merges": false', '"ignore_merges": true'))
    argv = _argv(inputs, tmp_path / "run", "--teacher_cache", built(student="student"))
    argv[1] = str(tmp_path / "teacher")
    code, _, err = run_script(argv)
    assert (code, len(err)) == (2, 1)
    assert "a different teacher tokenizer" in err[0]


def test_the_command_refuses_a_wrong_option_in_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argv, message in (
        (["--teacher_topk", "8"], "did you mean --teacher_top_k?"),
        (["--teacher_top_k", "0"], "--teacher_top_k 0: must be a number of at least 1"),
        (["--teacher_model", "./nowhere"], "no such directory"),
    ):
        assert main.main(["cache", *argv]) == 2
        assert message in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


def test_a_header_without_a_record_keeps_no_other_command_out(built, tmp_path):
    metadata = format.read_header(built())["metadata"]
    cache._open_header(tmp_path, metadata)
    other = metadata | {"teacher_top_k": 3}
    assert cache._open_header(tmp_path, other)["metadata"] == format.read_header(tmp_path)["metadata"] == other


# Documents and blocks


def _dataset(documents, student, teacher, **how):
    sizes = {"student_vocab_size": len(student), "teacher_vocab_size": len(teacher)}
    return build_dataset(documents, TokenizerPair(student, teacher, **sizes, aligns=True), 24, 60, **how)


def _index(dataset):
    """Of a cache for which the teacher read the text as one block."""
    text = dataset.text
    size = len(text.teacher.ids)
    starts = np.searchsorted(text.teacher.ends, text.starts, side="right")
    return CacheIndex(text.teacher.ids, np.append(starts, size), list(text.names), np.array([size]), 0)


@pytest.fixture(scope="module")
def documents(corpus_texts):
    return [Document(str(number), text) for number, text in enumerate(corpus_texts)]


def test_records_are_found_by_document_where_a_run_skips_some(documents, sp_tokenizer, byte_tokenizer):
    whole = _dataset(documents, byte_tokenizer, byte_tokenizer)
    index = _index(whole)
    kept = [d for number, d in enumerate(documents) if number % 3 != 1]
    part = _dataset(kept, sp_tokenizer, byte_tokenizer)
    lookup = CacheLookup(part.text, index)
    assert lookup.num_missing == 0
    indices = lookup.record_indices(0, len(part.text.teacher.ids))
    assert np.array_equal(index.tokens[indices], part.text.teacher.ids)
    assert len(np.unique(indices)) == len(indices) < len(index.tokens)


@pytest.mark.parametrize("student", ["byte", "sp"])
def test_every_target_of_a_block_has_its_record_and_a_start_token_has_none(
    documents, sp_tokenizer, byte_tokenizer, student
):
    whole = _dataset(documents, sp_tokenizer, sp_tokenizer)
    stream, starts = whole.text.teacher, np.append(whole.text.starts, whole.text.num_bytes + len(documents))
    ids, ends = stream.ids[stream.is_target], stream.ends[stream.is_target]
    assert len(stream.ids) == len(ids) + len(documents)
    offsets = np.searchsorted(ends, starts, side="right")
    index = CacheIndex(ids, offsets, list(whole.text.names), np.array([len(ids)]), 0)
    kept = [d for number, d in enumerate(documents) if number % 3 != 1]
    run = _dataset(kept, byte_tokenizer if student == "byte" else sp_tokenizer, sp_tokenizer)
    lookup, found = CacheLookup(run.text, index), []
    assert lookup.num_missing == 0
    for block, batch in zip(run.blocks, run.token_batches("teacher", 1), strict=True):
        records = lookup.record_indices(block.teacher_start, block.teacher_end)
        assert ids[records].tolist() == batch.targets.tolist()
        found += records.tolist()
    assert len(set(found)) == len(found) == int(run.text.teacher.is_target.sum())


def test_the_ends_of_a_teachers_blocks_are_found_between_start_tokens(documents, sp_tokenizer, byte_tokenizer):
    """Ends as numbers of records, as positions in the tokens, and back."""
    text = _dataset(documents, byte_tokenizer, sp_tokenizer).text
    plain, is_target = PlainTargets(text), text.teacher.is_target
    before = np.append(0, np.cumsum(is_target))
    tokens = np.arange(len(is_target) + 1)
    assert plain.count_before(tokens).tolist() == before.tolist()
    assert len(plain) == before[-1] < plain.num_tokens == len(is_target)
    counts = np.arange(1, len(plain) + 1)
    assert plain.token_ends(counts).tolist() == (np.flatnonzero(is_target) + 1).tolist()
    assert plain[counts - 1].tolist() == text.teacher.ids[is_target].tolist()


def test_a_document_with_other_tokens_has_no_records(documents, sp_tokenizer, byte_tokenizer):
    whole = _dataset(documents, byte_tokenizer, byte_tokenizer)
    changed = [d._replace(text=d.text + "!") if d.name == "3" else d for d in documents]
    changed = [d._replace(text=d.text[:-1] + "#") if d.name == "7" else d for d in changed]
    part = _dataset([*changed, Document("new", "Not there before.")], sp_tokenizer, byte_tokenizer)
    lookup = CacheLookup(part.text, _index(whole))
    assert lookup.first_missing == ["3", "7", "new"]
    starts = np.append(lookup.plain.starts, 0)
    assert np.all(lookup.record_indices(int(starts[3]), int(starts[4])) == -1)
    assert np.all(lookup.record_indices(int(starts[4]), int(starts[5])) >= 0)


@pytest.mark.parametrize("size", [7, 24, 59])
@pytest.mark.parametrize("pair", ["sp_from_byte", "byte_from_sp", "byte_from_byte"])
def test_blocks_cover_all_text_and_end_where_the_teachers_do(documents, sp_tokenizer, byte_tokenizer, size, pair):
    tokenizers = {"sp": sp_tokenizer, "byte": byte_tokenizer}
    student, teacher = map(tokenizers.get, pair.split("_from_"))
    text = _dataset(documents, student, teacher).text
    last = len(text.teacher.ids)
    ends = np.append(np.arange(size, last, size), last)
    blocks = pack(text, 20, 40, ends).ranges
    assert np.array_equal(blocks[1:, [0, 2]], blocks[:-1, [1, 3]])
    assert blocks[0, [0, 2]].tolist() == [0, 0]
    assert blocks[-1, [1, 3]].tolist() == [len(text.student.ids), last]
    assert (blocks[:, 1] - blocks[:, 0]).max() <= 20
    assert (blocks[:, 3] - blocks[:, 2]).max() <= 40
    student_ends, teacher_ends = (text.student.ends[blocks[:, 1] - 1], text.teacher.ends[blocks[:, 3] - 1])
    assert np.array_equal(student_ends, teacher_ends)
    common = np.intersect1d(text.student.ends, text.teacher.ends)
    for end in text.teacher.ends[ends - 1]:
        assert common[common <= end].max(initial=0) in [0, *student_ends]


def test_blocks_of_the_teacher_that_fit_are_the_blocks(documents, sp_tokenizer, byte_tokenizer):
    plain = _dataset(documents, sp_tokenizer, byte_tokenizer)
    again = pack(plain.text, 23, 59, plain.blocks.ranges[:, 3])
    assert skip_start_tokens(again, plain.text) == Blocks(plain.blocks.ranges)


def test_a_teacher_in_memory_has_no_cache(make_teacher, byte_tokenizer, built, inputs):
    from sar_kd.api import distill

    teacher = make_teacher(len(byte_tokenizer)), byte_tokenizer
    with pytest.raises(UsageError, match=r"teacher_cache=.*not one in memory"):
        distill(teacher, str(inputs / "student"), teacher_cache=str(built(student="student")))
