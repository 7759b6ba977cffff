"""A cache from log-probabilities that another program computed is the local one, and says what it lacks."""

import contextlib
import gzip
import io
import json
import re
import shutil
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sar_kd.commands import main
from sar_kd.config.command_line import parse
from sar_kd.config.commands import CACHE
from sar_kd.teacher.cache import format, served, server
from sar_kd.teacher.cache.format import TEXTS
from tests.helpers.logprob_server import LogprobServer, log_probs_of, prompt_logprobs
from tests.helpers.runs import ROOT, run_script

pytestmark = pytest.mark.slow

K = 8


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, make_student, sp_tokenizer, byte_tokenizer, corpus_texts):
    """Saved teachers with two tokenizers, one with a start token and one without, and a text of some documents."""
    folder = tmp_path_factory.mktemp("inputs")
    models = {}
    for name, tokenizer in (("starting", sp_tokenizer), ("byte", byte_tokenizer)):
        models[name] = make_student(len(tokenizer), num_hidden_layers=1, initializer_range=0.3).eval(), tokenizer
        models[name][0].save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        for weights in (folder / f"{name}-tokenizer",):
            tokenizer.save_pretrained(weights)
            models[name][0].config.save_pretrained(weights)
    texts = ["\n".join(corpus_texts[i : i + 10 : 2]) for i in range(0, len(corpus_texts), 10)]
    rows = [{"text": text} for text in texts[:-1]]
    rows.insert(3, {"prompt": corpus_texts[0], "completion": corpus_texts[1]})
    (folder / "held.jsonl").write_text(json.dumps({"text": texts[-1]}), encoding="utf-8")
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder, models, texts


@pytest.fixture
def start(inputs, monkeypatch):
    """start(name): a server of that teacher; waits between attempts are short."""
    running = []
    monkeypatch.setattr(server, "WAITS", (0.01, 0.01, 0.01))

    def begin(name):
        running.append(LogprobServer(*inputs[1][name]))
        return running[-1]

    yield begin
    for each in running:
        each.close()


def _argv(inputs, folder, *more, block_size=48):
    argv = ["--train_file", inputs[0] / "text.jsonl", "--validation_file", inputs[0] / "held.jsonl"]
    argv += ["--block_size", block_size, "--teacher_cache", folder]
    argv += ["--student_model", inputs[0] / "byte", "--teacher_top_k", K, "--token_cache", "off", *more]
    return [str(word) for word in argv]


def _url(inputs, server, teacher="byte"):
    return "--teacher_url", server.url, "--teacher_tokenizer", inputs[0] / f"{teacher}-tokenizer"


def _build(inputs, folder, *more):
    """Build a cache; its output and its lines on standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        main.start(CACHE, _argv(inputs, folder, *more))
    return out.getvalue() + err.getvalue()


def _refusal(inputs, folder, *more):
    """The one line with which the command ends."""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        assert main.main(["cache", *_argv(inputs, folder, *more)]) == 2
    lines = err.getvalue().splitlines()
    assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True]
    return lines[-1]


def _local(inputs, folder, teacher="byte"):
    more = "--teacher_model", inputs[0] / teacher, "--keep", "topk", "--model_dtype", "float32", "--device", "cpu"
    _build(inputs, folder, *more)
    return _records(folder)


def _content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _records(folder):
    header = format.read_header(folder)
    shards = [format.Shards(folder, header, text) for text in TEXTS]
    return np.concatenate([each.take(np.arange(len(each))) for each in shards])


def _assert_equal(found, wanted, known=1.0, same_context=1.0, has_ids=True):
    """known: the least share of records that are there; same_context: of these, the least share that are the same

    has_ids: compare the tokens too, which two tokens of the same bytes prevent where they have one name
    """
    assert len(found) == len(wanted)
    is_known = np.isfinite(found["max_log_prob"])
    assert is_known.mean() >= known
    found, wanted = found[is_known], wanted[is_known]
    differences = [np.abs(found[name] - wanted[name]) for name in ("target_log_prob", "max_log_prob")]
    is_same = np.maximum(*differences) < 1e-4
    assert is_same.mean() >= same_context
    found, wanted = found[is_same], wanted[is_same]
    if not has_ids:
        return
    assert (found["ids"] == wanted["ids"]).mean() > 0.999  # but for ties
    gaps = [each["log_prob_gaps"].astype(np.float32) for each in (found, wanted)]
    assert np.allclose(*gaps, atol=2e-3, rtol=1e-3)  # float16
    shares = [1 / (1 + np.exp(-each["tail_log_ratios"][:, 0].astype(np.float32))) for each in (found, wanted)]
    assert np.abs(shares[0] - shares[1]).max() < 1e-3


def _counts(folder):
    return format.read_header(folder).get("counts", {})


# A server


@pytest.mark.parametrize("teacher", ["byte", "starting"])
def test_a_server_gives_the_local_cache(inputs, tmp_path, start, teacher):
    wanted, server = _local(inputs, tmp_path / "local", teacher), start(teacher)
    out = _build(inputs, tmp_path / "cache", *_url(inputs, server, teacher))
    _assert_equal(_records(tmp_path / "cache"), wanted)
    assert "Warning" not in out
    assert "--temperature 1" in out
    assert _counts(tmp_path / "cache").keys() <= {"small_tail"}
    assert all(type(prompt) is list for body in server.requests for prompt in body["prompt"])
    assert max(len(body["prompt"]) for body in server.requests) == 4


@pytest.mark.parametrize(("teacher", "status"), [("byte", 422), ("starting", 500)])
def test_one_that_takes_text_alone_gives_it_where_it_cuts_the_text_as_the_tokenizer_does(
    inputs, tmp_path, start, teacher, status
):
    wanted, server = _local(inputs, tmp_path / "local", teacher), start(teacher)
    server.takes_ids, server.no_ids = False, status
    out = _build(inputs, tmp_path / "cache", *_url(inputs, server, teacher))
    _assert_equal(_records(tmp_path / "cache"), wanted, known=0.9, same_context=0.9, has_ids=teacher == "byte")
    counts, missing = _counts(tmp_path / "cache"), np.isnan(_records(tmp_path / "cache")["max_log_prob"]).sum()
    assert sum(count for name, count in counts.items() if name != "small_tail") == missing > 0
    assert "The server takes no token ids: each block is sent as text, and it gets the start token as text too" in out
    assert f"{counts['cut']:,} of {len(wanted):,} tokens where a token of the top k is not given" in out


@pytest.mark.parametrize("hides_start", [False, True])
def test_a_start_token_that_the_server_adds_is_not_sent_and_one_that_it_hides_costs_the_first_token(
    inputs, tmp_path, start, hides_start
):
    wanted, server = _local(inputs, tmp_path / "local", "starting"), start("starting")
    server.takes_ids, server.adds_start, server.hides_start = False, True, hides_start
    out = _build(inputs, tmp_path / "cache", *_url(inputs, server, "starting"))
    assert "it adds its own start token" in out
    assert not any(body["prompt"].startswith("<s>") for body in server.requests if type(body["prompt"]) is str)
    found = _records(tmp_path / "cache")
    _assert_equal(found, wanted, known=0.8, same_context=0.9, has_ids=False)
    num_blocks = _counts(tmp_path / "cache").get("first", 0)
    assert (num_blocks > 10) == hides_start
    if hides_start:
        assert f"{num_blocks} of {len(found):,} tokens behind no start token" in out


def test_tokens_that_share_a_name_are_not_taken_for_one_of_them(inputs, tmp_path, start):
    wanted, server = _local(inputs, tmp_path / "local"), start("byte")
    server.names_ids = server.names_bytes = False
    more = _url(inputs, server)
    line = _refusal(inputs, tmp_path / "cache", *more)
    assert "gives no log-probabilities that can be used at" in line
    assert "lower --teacher_top_k" in line
    _build(inputs, tmp_path / "cache", *more, "--teacher_top_k", 1, "--overwrite")
    found, counts = _records(tmp_path / "cache"), _counts(tmp_path / "cache")
    known = np.isfinite(found["max_log_prob"])
    assert counts["cut"] == (~known).sum() > 20  # half of this vocabulary are parts of characters
    assert (found["ids"][known, 0] == wanted["ids"][known, 0]).mean() > 0.999
    assert np.abs(found["target_log_prob"] - wanted["target_log_prob"]).max() < 1e-4  # known in any case


def test_fewer_tokens_than_are_asked_for_lower_the_top_k(inputs, tmp_path, start):
    wanted, server = _local(inputs, tmp_path / "local"), start("byte")
    server.gives = 3
    out = _build(inputs, tmp_path / "cache", *_url(inputs, server))
    assert f"The server gives 3 tokens at a position, fewer than --teacher_top_k {K}; it is lowered" in out
    assert format.read_header(tmp_path / "cache")["metadata"]["teacher_top_k"] == 3
    found = _records(tmp_path / "cache")
    assert np.isfinite(found["max_log_prob"]).all()
    assert (found["ids"] == wanted["ids"][:, :3]).mean() > 0.999


def _run_argv(inputs, cache, out, teacher, student, temperature=1):
    argv = ["--teacher_model", inputs[0] / teacher, "--student_model", inputs[0] / student, "--teacher_cache", cache]
    argv += ["--train_file", inputs[0] / "text.jsonl", "--validation_file", inputs[0] / "held.jsonl"]
    argv += ["--block_size", 48, "--temperature", temperature, "--train_steps", 3, "--log_steps", 1]
    argv += ["--alpha_kd", 0.5, "--model_dtype", "float32", "--device", "cpu", "--output_dir", out]
    return [str(word) for word in argv]


@pytest.mark.parametrize("student", ["byte", "starting"])
def test_a_run_trains_with_it_as_with_the_local_cache(inputs, tmp_path, start, student):
    _local(inputs, tmp_path / "local")
    _build(inputs, tmp_path / "cache", *_url(inputs, start("byte")))
    losses = []
    for name, teacher in (("local", "byte"), ("cache", "byte-tokenizer")):
        code, lines, err = run_script(_run_argv(inputs, tmp_path / name, tmp_path / f"{name}-run", teacher, student))
        assert code == 0, err
        steps = [json.loads(line) for line in (tmp_path / f"{name}-run" / "metrics.jsonl").read_text().splitlines()]
        losses.append([step["kd_loss"] for step in steps if step["event"] == "step"])
    assert np.allclose(*losses, rtol=1e-3)
    assert len(losses[0]) == 3
    assert any("in its own precision" in line and "its weights are not here to compare" in line for line in lines)
    code, _, err = run_script(_run_argv(inputs, tmp_path / "cache", tmp_path / "hot", "byte-tokenizer", student, 2))
    assert (code, len(err)) == (2, 1)
    assert "the mass of all other tokens at temperature 1 alone; give --temperature 1" in err[0]


# Errors


def test_a_build_that_was_killed_goes_on_after_its_last_shard_and_ends_with_the_same_bytes(
    inputs, tmp_path, start, monkeypatch
):
    monkeypatch.setattr(served, "_SHARD_SIZE", 100)
    server = start("byte")
    _build(inputs, tmp_path / "whole", *_url(inputs, server))
    wanted, num_requests = _content(tmp_path / "whole"), len(server.requests)
    server.requests.clear()

    class Killed(BaseException):
        pass

    def kill(content):
        raise Killed

    def write_header(folder, header, write=format.write_header):
        write(folder, header)
        if len(header["shards"]["train"]) == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("sar_kd.teacher.cache.builder.write_header", write_header)
        with contextlib.suppress(Killed):
            _build(inputs, tmp_path / "cache", *_url(inputs, server))
    assert len(list((tmp_path / "cache").rglob("*.records"))) == 3
    before = len(server.requests)
    out = _build(inputs, tmp_path / "cache", *_url(inputs, server))
    assert "Going on: " in out
    assert len(server.requests) == num_requests + 1  # the first block is asked for again
    assert before < num_requests
    assert _content(tmp_path / "cache") == wanted


@pytest.mark.parametrize("fault", [500, 503, 429, lambda content: None])
def test_errors_that_pass_are_waited_for_and_shown(inputs, tmp_path, start, fault):
    wanted, server = _local(inputs, tmp_path / "local"), start("byte")
    server.faults = [lambda content: content, fault, fault]
    out = _build(inputs, tmp_path / "cache", *_url(inputs, server))
    assert out.count("The teacher's server: ") == out.count("trying again in 0.01 s") == 2
    _assert_equal(_records(tmp_path / "cache"), wanted)


def test_status_500_for_the_first_prompt_does_not_make_it_text(inputs, tmp_path, start):
    wanted, server = _local(inputs, tmp_path / "local"), start("byte")
    server.faults = [500, 500]
    _build(inputs, tmp_path / "cache", *_url(inputs, server))
    _assert_equal(_records(tmp_path / "cache"), wanted)


def _first_half(inputs, start, monkeypatch, folder, fault, count=3):
    """A build that meets a fault behind some good answers; its line, and the server, which is well again."""
    monkeypatch.setattr(served, "_SHARD_SIZE", 100)
    server = start("byte")
    server.faults = [lambda content: content] * count + [fault] * 9
    line = _refusal(inputs, folder, *_url(inputs, server))
    server.faults = []
    return line, server


def _wrong_text(content):
    content["choices"][0]["logprobs"]["tokens"][2] = "token_id:300"
    return content


def _wrong_sums(content):
    for top in content["choices"][0]["logprobs"]["top_logprobs"][1:]:
        top |= dict.fromkeys(list(top)[:-1], -0.1)
    return content


def _not_a_number(content):
    content["choices"][0]["logprobs"]["token_logprobs"][3] = float("nan")
    return content


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (503, "503 busy, in 4 attempts; the same command goes on after the last shard"),
        (lambda content: None, "no answer (Remote end closed connection without response), in 4 attempts"),
        (lambda content: b"<html>", "its answer to /completions is no JSON object"),
        (lambda content: [1], "its answer to /completions is no JSON object"),
        (lambda content: {"model": "tiny", "choices": []}, "has 0 choices for 4 prompts"),
        (lambda content: {"model": "tiny"}, "its answer has no 'choices'"),
        (lambda content: content | {"choices": [{"text": "a"}] * 4}, "its answer has no 'logprobs'"),
        (_wrong_text, "its answer does not fit the text: it has "),
        (_wrong_sums, "its answer does not fit the text: it has "),
        (_not_a_number, "nan is no log-probability"),
        (lambda content: content | {"model": "other"}, "its model has changed from tiny to other"),
        (400, "refuses a prompt (400 busy)"),
        (401, "wants a key (401 busy); give it in SAR_KD_API_KEY"),
    ],
)
def test_a_server_that_dies_or_answers_nonsense_ends_the_command_in_one_line_and_nothing_is_lost(
    inputs, tmp_path, start, monkeypatch, fault, reason
):
    line, server = _first_half(inputs, start, monkeypatch, tmp_path / "cache", fault)
    assert line.startswith(f"error: --teacher_url {server.url}: ")
    assert reason in line
    kept = len(list((tmp_path / "cache").rglob("*.records")))
    assert kept >= 2
    out = _build(inputs, tmp_path / "cache", *_url(inputs, server))
    assert "Going on: " in out
    _assert_equal(_records(tmp_path / "cache"), _local(inputs, tmp_path / "local"))


def test_a_slow_server_is_given_up_after_the_time_limit(inputs, tmp_path, start, monkeypatch):
    monkeypatch.setattr(served, "_SHARD_SIZE", 100)
    server = start("byte")
    _build(inputs, tmp_path / "cache", *_url(inputs, server), "--server_timeout", 5)
    server.delay = 0.5
    line = _refusal(inputs, tmp_path / "other", *_url(inputs, server), "--server_timeout", 0.05)
    assert "no answer in time, in 4 attempts" in line


def test_no_server_at_all_is_said_at_once(inputs, tmp_path, start):
    server = start("byte")
    server.close()
    line = _refusal(inputs, tmp_path / "cache", *_url(inputs, server))
    assert "no answer (" in line
    assert "is the server started, and this its address?" in line


def test_another_model_of_the_same_name_is_refused_on_going_on_and_after_a_lost_connection(
    inputs, tmp_path, start, monkeypatch, make_student
):
    line, server = _first_half(inputs, start, monkeypatch, tmp_path / "cache", 503)
    model, other = server.model, make_student(600, num_hidden_layers=1, initializer_range=0.5).eval()
    server.model = other
    before = _content(tmp_path / "cache")
    line = _refusal(inputs, tmp_path / "cache", *_url(inputs, server))
    assert "the server's log-probabilities are no longer those that are cached" in line
    assert _content(tmp_path / "cache") == before

    def restart(content):
        server.model = other

    server.model, server.faults = model, [lambda content: content, restart]
    line = _refusal(inputs, tmp_path / "cache", *_url(inputs, server))
    assert "answers otherwise than before the connection was lost: its model has changed" in line
    server.model = model
    _build(inputs, tmp_path / "cache", *_url(inputs, server))
    _assert_equal(_records(tmp_path / "cache"), _local(inputs, tmp_path / "local"))


def test_log_probabilities_of_the_next_token_are_refused(inputs, tmp_path, start):
    server = start("byte")
    server.model = _Repeating(server.model)
    _build(inputs, tmp_path / "right", *_url(inputs, server))
    server.is_shifted = True
    line = _refusal(inputs, tmp_path / "cache", *_url(inputs, server))
    assert "it has at each token the log-probabilities of the one behind it" in line


class _Repeating:
    """A model that often knows the next token."""

    def __init__(self, model):
        self.model = model

    def __call__(self, input_ids):
        out = self.model(input_ids=input_ids)
        out.logits[0, :-1].scatter_(1, input_ids[0, 1:, None], 20.0)
        return out


def test_another_tokenizer_than_the_models_is_refused(inputs, tmp_path, start):
    server = start("byte")
    server.takes_ids = False
    line = _refusal(inputs, tmp_path / "cache", *_url(inputs, server, "starting"))
    assert "--teacher_tokenizer" in line


def test_a_limit_of_the_server_is_told_in_its_words(inputs, tmp_path, start):
    server = start("byte")
    server.most = 4
    line = _refusal(inputs, tmp_path / "cache", *_url(inputs, server))
    assert "refuses a prompt (400 logprobs must be at most 4)" in line


def test_the_longest_prompt_that_the_server_takes_limits_the_blocks(inputs, tmp_path, start):
    server = start("byte")
    server.max_model_len = 31
    _build(inputs, tmp_path / "cache", *_url(inputs, server))
    assert max(len(ids) for body in server.requests for ids in body["prompt"]) == 30


def test_a_key_goes_into_the_header_and_nowhere_else(inputs, tmp_path, start, monkeypatch):
    monkeypatch.setenv("SAR_KD_API_KEY", "s3cret-key")
    server = start("byte")
    out = _build(inputs, tmp_path / "cache", *_url(inputs, server))
    assert set(server.keys) == {"Bearer s3cret-key"}
    assert "s3cret" not in out
    assert not any(b"s3cret" in content for content in _content(tmp_path / "cache").values())
    server.answer = lambda body: (401, {"error": {"message": "wrong key s3cret-key"}})
    line = _refusal(inputs, tmp_path / "other", *_url(inputs, server))
    assert "wrong key ***" in line
    assert "s3cret" not in line


def test_a_redirect_which_would_take_the_key_along_is_not_followed(inputs, tmp_path, start):
    server, other = start("byte"), start("byte")
    server.redirect = other.url
    line = _refusal(inputs, tmp_path / "cache", *_url(inputs, server))
    assert "307" in line
    assert not other.requests


# Files


def _lines_of_vllm(inputs, teacher, with_ends=True):
    """Each document as the script of docs/teacher_elsewhere.md writes it; the tokens, if without ends, of the text."""
    model, tokenizer = inputs[1][teacher]
    lines = []
    for text in inputs[2]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if with_ends:
            start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            ids = [start, *ids, tokenizer.eos_token_id]
        lines.append({"prompt_token_ids": ids, "prompt_logprobs": prompt_logprobs(model, tokenizer, ids, K)})
    return lines


def _file(path, lines):
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def _from(inputs, path, teacher="byte"):
    return "--from_logprobs", path, "--teacher_tokenizer", inputs[0] / f"{teacher}-tokenizer"


@pytest.mark.parametrize("teacher", ["byte", "starting"])
@pytest.mark.parametrize("name", ["given.jsonl", "given.jsonl.gz"])
def test_files_in_any_order_give_what_the_model_says_of_each_document(inputs, tmp_path, teacher, name):
    model, tokenizer = inputs[1][teacher]
    path = _file(tmp_path / name, _lines_of_vllm(inputs, teacher)[::-1])
    out = _build(inputs, tmp_path / "cache", *_from(inputs, path, teacher))
    assert "lacks 1 document of the text: text.jsonl:4" in out
    assert not list((tmp_path / "cache").rglob("*.partial"))
    found, first = _records(tmp_path / "cache"), 0
    for text in inputs[2]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        own, targets = found[first : first + len(ids) + 1], [*ids, tokenizer.eos_token_id]
        wanted = log_probs_of(model, [start, *targets]).numpy()
        if text is inputs[2][-1]:  # held out, behind the training text with its conversation, which is not in the file
            first, own = len(found) - len(targets), found[-len(targets) :]
        first += len(targets)
        assert np.abs(own["target_log_prob"] - wanted[np.arange(len(targets)), targets]).max() < 1e-5
        order = np.argsort(-wanted, axis=1)[:, :K]
        assert (own["ids"] == order).mean() > 0.999
        mass = np.take_along_axis(np.exp(wanted), order, 1).sum(1)
        assert np.allclose(own["tail_log_ratios"][:, 0], np.log((1 - mass) / mass), atol=2e-3)
    counts = _counts(tmp_path / "cache")
    assert counts["document"] == np.isnan(found["max_log_prob"]).sum()


def test_positions_alone_are_enough_and_lack_the_ends(inputs, tmp_path):
    model, tokenizer = inputs[1]["byte"]
    lines = [line["prompt_logprobs"] for line in _lines_of_vllm(inputs, "byte", with_ends=False)]
    _build(inputs, tmp_path / "cache", *_from(inputs, _file(tmp_path / "given.jsonl", lines)))
    counts = _counts(tmp_path / "cache")
    assert counts["first"] == counts["special"] == len(lines)
    ids = tokenizer(inputs[2][0], add_special_tokens=False).input_ids
    found, wanted = _records(tmp_path / "cache")[: len(ids)], log_probs_of(model, ids).numpy()
    assert np.isnan(found["target_log_prob"][0])
    assert np.abs(found["target_log_prob"][1:] - wanted[np.arange(len(ids) - 1), ids[1:]]).max() < 1e-5


def test_a_run_leaves_the_tokens_without_log_probabilities_out_of_the_distillation_and_the_perplexity(inputs, tmp_path):
    lines = [line["prompt_logprobs"] for line in _lines_of_vllm(inputs, "byte", with_ends=False)]
    _build(inputs, tmp_path / "cache", *_from(inputs, _file(tmp_path / "given.jsonl", lines)))
    code, out, err = run_script(_run_argv(inputs, tmp_path / "cache", tmp_path / "run", "byte-tokenizer", "byte"))
    assert code == 0, err
    assert any(re.search(r"2 of [\d,]+ held-out tokens have no log-probabilities in the cache", line) for line in out)
    assert not any(line.startswith("Warning: --teacher_cache") for line in out)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    model, tokenizer = inputs[1]["byte"]
    ids = tokenizer(inputs[2][-1], add_special_tokens=False).input_ids
    wanted = np.exp(-log_probs_of(model, ids).numpy()[np.arange(len(ids) - 1), ids[1:]].mean())
    assert summary["teacher_val_ppl"] == pytest.approx(wanted, rel=1e-4)
    assert summary["teacher_rows_dropped"] > 0
    assert summary["skipped"]["teacher"] == 0


def test_the_script_of_the_page_writes_a_file_that_is_read_whole(inputs, tmp_path, monkeypatch):
    """With a stand-in for vLLM, which has the same interface."""
    model, tokenizer = inputs[1]["starting"]
    page = (ROOT / "docs" / "teacher_elsewhere.md").read_text(encoding="utf-8")
    code = textwrap.dedent(page[page.index("    import json\n") : page.index("\nMore documents")])
    assert len(code.strip().splitlines()) <= 16

    class LLM:
        def __init__(self, name, max_logprobs):
            assert (name, max_logprobs) == (str(inputs[0] / "starting"), 20)

        def generate(self, prompts, params):
            for prompt in prompts:
                entries = prompt_logprobs(model, tokenizer, prompt["prompt_token_ids"], params.prompt_logprobs)
                found = [entry and {int(i): SimpleNamespace(**each) for i, each in entry.items()} for entry in entries]
                yield SimpleNamespace(prompt_logprobs=found)

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace))
    monkeypatch.chdir(tmp_path)
    shutil.copy(inputs[0] / "held.jsonl", "held_out.jsonl")
    texts = (inputs[0] / "text.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path("corpus.jsonl").write_text("".join(line for line in texts if '"text"' in line), encoding="utf-8")
    exec(code.replace('"TEACHER"', repr(str(inputs[0] / "starting"))), {})
    more = *_from(inputs, "logprobs.jsonl", "starting"), "--train_file", "corpus.jsonl"
    out = _build(inputs, tmp_path / "cache", *more)
    assert "Warning" not in out
    assert np.isfinite(_records(tmp_path / "cache")["max_log_prob"]).all()


def test_answers_of_completions_are_read_from_a_file_with_their_prompt(inputs, tmp_path, start):
    server, lines = start("starting"), []
    server.adds_start = True
    for text in inputs[2]:
        answer = server.answer({"prompt": text, "logprobs": K})[1]
        lines.append({"prompt": text, **answer})
    out = _build(inputs, tmp_path / "cache", *_from(inputs, _file(tmp_path / "given.jsonl", lines), "starting"))
    counts = _counts(tmp_path / "cache")
    # No end-of-text token was in the prompts, but some were generated behind them.
    assert counts["special"] == sum(line["choices"][0]["logprobs"]["tokens"][-1] != "</s>" for line in lines)
    assert "first" not in counts
    assert f"{counts['special']} of" in out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda lines: [[1, 2], *lines], "line 1 is not of vLLM's form"),
        (lambda lines: [*lines[:2], "{"], "line 3 cannot be read"),
        (lambda lines: [*lines[:2], 7], "line 3 holds neither a list nor an object"),
        (lambda lines: [{"choices": []}], "line 1 holds not the answer to one prompt"),
        (lambda lines: lines[:2], "of the text's tokens (5 documents are not in it)"),
        (lambda lines: [], "holds no line with log-probabilities"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(inputs, tmp_path, change, reason):
    lines = change(_lines_of_vllm(inputs, "byte"))
    content = "".join((line if line == "{" else json.dumps(line)) + "\n" for line in lines)
    path = tmp_path / "given.jsonl"
    path.write_text(content)
    line = _refusal(inputs, tmp_path / "cache", *_from(inputs, path))
    assert line.startswith(f"error: --from_logprobs {path}: ")
    assert reason in line


def test_a_damaged_gz_file_is_refused(inputs, tmp_path):
    path = _file(tmp_path / "given.jsonl.gz", _lines_of_vllm(inputs, "byte"))
    path.write_bytes(path.read_bytes()[:-2000])
    assert "cannot be read" in _refusal(inputs, tmp_path / "cache", *_from(inputs, path))


def test_other_files_do_not_go_on_with_a_cache_and_the_same_ones_do(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("sar_kd.commands.cache.SHARD_SIZE", 200)
    lines = _lines_of_vllm(inputs, "byte")
    path = _file(tmp_path / "given.jsonl", lines)
    _build(inputs, tmp_path / "cache", *_from(inputs, path))
    wanted = _content(tmp_path / "cache")
    assert "Going on" in _build(inputs, tmp_path / "cache", *_from(inputs, path))
    assert _content(tmp_path / "cache") == wanted
    _file(path, lines[:-1])
    line = _refusal(inputs, tmp_path / "cache", *_from(inputs, path))
    assert "was made with other log-probabilities, or another served model" in line


def test_a_disk_without_room_for_the_records_and_their_copy_is_one_line(inputs, tmp_path, monkeypatch):
    path = _file(tmp_path / "given.jsonl", _lines_of_vllm(inputs, "byte"))
    out = _build(inputs, tmp_path / "whole", *_from(inputs, path))
    size, tokens = (
        int(word.replace(",", "")) for word in re.search(r"(\d+) bytes a token, ([\d,]+) tokens", out).groups()
    )
    spare = 2**24
    for factor, fits in ((1.9, False), (2.1, True)):
        usage = SimpleNamespace(free=spare + int(factor * size * tokens))
        monkeypatch.setattr("sar_kd.runtime.files.shutil.disk_usage", lambda _, usage=usage: usage)
        if fits:
            _build(inputs, tmp_path / "cache", *_from(inputs, path))
        else:
            assert "no room for the teacher's logits" in _refusal(inputs, tmp_path / "cache", *_from(inputs, path))


# The command line


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--teacher_url", "http://h/v1"], "--teacher_url http://h/v1: give --teacher_tokenizer"),
        (["--from_logprobs", "a.jsonl"], "--from_logprobs a.jsonl: give --teacher_tokenizer"),
        (["--from_logprobs", "a.txt"], "--from_logprobs a.txt: must be .jsonl or .jsonl.gz"),
        (["--from_logprobs", "a.jsonl", "--teacher_url", "http://h/v1"], "give it or --from_logprobs, not both"),
        (["--teacher_url", "localhost:8000"], "--teacher_url localhost:8000: must be like http://HOST:8000/v1"),
        (["--teacher_url", "http://[h/v1"], "--teacher_url: is no address"),
        (["--teacher_url", "http://me:s3cret@h/v1"], "--teacher_url: holds a password or a key"),
        (["--teacher_url", "http://h/v1?key=s3cret"], "--teacher_url: holds a password or a key"),
        (["--teacher_url", "http://h/v1", "--teacher_tokenizer", "t", "--keep", "mixed"], "--keep mixed: draws need"),
        (["--teacher_url", "http://h/v1", "--teacher_tokenizer", "t", "--temperatures", "1", "2"],
         "--temperatures 1 2: --teacher_url gives the mass of all other tokens at temperature 1 alone"),
        (["--teacher_url", "http://h/v1", "--teacher_tokenizer", "t", "--server_timeout", "0"], "--server_timeout 0"),
        (["--from_logprobs", "none.jsonl", "--teacher_tokenizer", "./nowhere"],
         "--teacher_tokenizer ./nowhere: no such directory"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused_in_one_line(words, reason, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.main(["cache", *words]) == 2
    err = capsys.readouterr().err
    assert reason in err
    assert "s3cret" not in err
    assert [line for line in err.splitlines() if not line.startswith("Warning")] == [err.splitlines()[-1]]


def test_a_teacher_elsewhere_has_other_defaults_and_values_that_are_given_win():
    given = ["--teacher_url", "http://h/v1", "--teacher_tokenizer", "t"]
    cache = parse(CACHE, given).cache
    assert (cache.keep, cache.teacher_top_k, cache.temperature_values()) == ("topk", 20, [1.0])
    assert parse(CACHE, [*given, "--teacher_top_k", "5"]).cache.teacher_top_k == 5
    assert (parse(CACHE, []).cache.keep, parse(CACHE, ["--keep", "topk"]).cache.teacher_top_k) == ("mixed", 32)
