"""On-policy distillation: rollouts and their issues, gradients, the replay buffer, and whole runs."""

import copy
import dataclasses
import itertools
import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sar_kd.config.presets import MODES
from sar_kd.config.runs import Config, OnPolicyConfig
from sar_kd.config.sections import LossConfig, OptimConfig
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.samples import Conversation, Document, Message
from sar_kd.losses.objective import Objective
from sar_kd.models.generation import Generation
from sar_kd.runtime.precision import Precision
from sar_kd.tokenization.tokenizer_pair import TokenizerPair
from sar_kd.training import on_policy, trainer
from sar_kd.training.guards import StepGuard
from sar_kd.training.on_policy import OnPolicy, build_on_policy
from sar_kd.training.optimizer import build_optimizer
from sar_kd.training.parallel import SINGLE_DEVICE
from sar_kd.training.rollouts import Prompt, Rollouts
from sar_kd.training.step import StepContext, train_step
from tests.helpers.runs import (
    TIMING,
    argv_of,
    assert_equal_runs,
    assert_refused,
    inputs,
    interrupting,
    latest_checkpoint,
    read_json,
    read_metrics,
    run_script,
    untimed,
)

__all__ = ["inputs"]  # a fixture
CPU = torch.device("cpu")
KINDS = ("equal", "different")
LIMITS = (48, 48)
ON = ("--on_policy_fraction", 1, "--max_new_tokens", 12, "--model_dtype", "float32")


def _conversation(name, question, answer):
    return Conversation(name, (Message("user", question, False), Message("assistant", answer, True)), True)


@pytest.fixture
def make_dataset(byte_tokenizer, sp_tokenizer, corpus_texts):
    """make_dataset(kind, documents): documents, by default the dataset' own, for a pair of tokenizers."""

    def make(kind="different", documents=None, limits=LIMITS):
        student = sp_tokenizer
        teacher = byte_tokenizer if kind == "different" else sp_tokenizer
        pair = TokenizerPair(student, teacher, student_vocab_size=len(student), teacher_vocab_size=len(teacher))
        documents = documents or [Document(f"d{i}", text) for i, text in enumerate(corpus_texts[:40])]
        return build_dataset(documents, pair, *limits)

    return make


@pytest.fixture
def formatted(byte_tokenizer, sp_tokenizer):
    """An answer inside a format of the student's chat template, which ends a part with a stop token of its own."""
    student = copy.deepcopy(sp_tokenizer)
    student.add_tokens(["<|start|>", "<|final|>", "<|end|>", "<|return|>"], special_tokens=True)
    student.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|start|>' + m.content + '<|end|>' }}{% else %}"
        "{{ '<|start|>' + m.thinking + '<|end|><|final|>' + m.content + '<|return|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>{% endif %}"
    )
    teacher = copy.deepcopy(byte_tokenizer)
    teacher.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
        "{{ '[' + m.thinking + '] ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )
    pair = TokenizerPair(student, teacher, student_vocab_size=len(student), teacher_vocab_size=len(teacher))
    answer = Message("assistant", "Two.", True, '{"thinking": "One more."}')
    return build_dataset([Conversation("talk", (Message("user", "1 + 1?", False), answer), False)], pair, *LIMITS)


@pytest.fixture
def make_models(make_student, byte_tokenizer, sp_tokenizer):
    """make_models(kind): a student and a teacher with heads scaled up: a fresh head is all but uniform."""

    def make(kind="different"):
        student = make_student(len(sp_tokenizer), num_hidden_layers=1)
        student.lm_head.weight.data.mul_(20.0)
        rows = len(byte_tokenizer if kind == "different" else sp_tokenizer)
        teacher = make_student(rows, num_hidden_layers=1, hidden_size=16, intermediate_size=32)
        teacher.lm_head.weight.data.mul_(20.0)
        return SimpleNamespace(student=student, teacher=teacher.requires_grad_(False).eval())

    return make


def _on_policy(models, dataset, precision=None, seed=0, **settings):
    precision = precision or Precision(CPU, torch.float32, 1.0)
    settings = {"on_policy_fraction": 1.0, "max_new_tokens": 12} | settings
    return OnPolicy(OnPolicyConfig(**settings), models, dataset, LIMITS, precision, seed)


def _gradients(models, dataset, batch, **loss):
    settings = LossConfig(**{"alpha_kd": 1.0, "alpha_ce": 0.0, "temperature": 1.5} | loss)
    precision = Precision(CPU, torch.float32, 1.0)
    terms = Objective(models.teacher, models.student, settings, dataset.aligner, precision)(batch)
    models.student.zero_grad()
    terms.total.backward()
    return terms, [p.grad.clone() for p in models.student.parameters()]


def _overfit(student, batch, steps=150):
    """Overfit a student to a batch."""
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    for _ in range(steps):
        logits = student(input_ids=batch.student.input_ids).logits.flatten(0, 1)[batch.student.positions]
        torch.nn.functional.cross_entropy(logits, batch.student.targets).backward()
        optimizer.step()
        optimizer.zero_grad()


def _spelt(dataset, batch, side):
    """The bytes of the targets of each example of a batch, without the stop token."""
    tokens = batch.teacher if side else batch.student
    return [dataset.pair.tables[side].spell(labels[labels >= 0].tolist()) for labels in tokens.labels]


# Batches


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["conversations", "plain"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_a_greedy_students_gradients_are_those_of_the_same_text_off_policy(
    kind, text, direction, make_dataset, make_models
):
    conversations = [_conversation(f"q{i}", f"Question {i}?", f" The answer: {i * i}.") for i in range(4)]
    plain = [Document("d", "The story number 4 is told.")]
    dataset, models = (
        make_dataset(kind, conversations if text == "conversations" else plain, limits=(24, 48)),
        make_models(kind),
    )
    blocks = list(range(len(dataset)))
    given = dataset.batch(blocks)
    _overfit(models.student, given)
    policy = _on_policy(models, dataset, sample_temperature=0.0, max_new_tokens=40)
    policy.rollouts.sample_prompt = _empty_prompt if text == "plain" else policy.rollouts.sample_prompt
    (sampled,) = policy.micro_batches(0, [blocks])
    for side in ("student", "teacher"):
        assert torch.equal(getattr(sampled, side).input_ids, getattr(given, side).input_ids)
        assert torch.equal(getattr(sampled, side).labels, getattr(given, side).labels)
    a, ours = _gradients(models, dataset, sampled, kd_direction=direction)
    b, theirs = _gradients(models, dataset, given, kd_direction=direction)
    assert a.total.item() == pytest.approx(b.total.item(), rel=1e-6)
    largest = max(float(g.abs().max()) for g in theirs)
    assert largest > 1e-3
    assert max(float((x - y).abs().max()) for x, y in zip(ours, theirs, strict=True)) < 1e-6 * largest


def _empty_prompt(block, rng):
    """A prompt without a token: the response is the whole block."""
    return Prompt(block, 0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_text_adds_no_cross_entropy(kind, make_dataset, make_models):
    dataset, models = make_dataset(kind), make_models(kind)
    _overfit(models.student, dataset.batch([0, 1, 2, 3]), 40)
    (batch,) = _on_policy(models, dataset).micro_batches(0, [[0, 1]])
    with_ce, a = _gradients(models, dataset, batch, alpha_ce=0.5, kd_direction="reverse")
    without, b = _gradients(models, dataset, batch, alpha_ce=0.0, kd_direction="reverse")
    assert with_ce.ce.item() == 0.0
    assert with_ce.total.item() == without.total.item() > 0
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    text = dataclasses.replace(batch, is_on_policy=False)
    assert _gradients(models, dataset, text, alpha_ce=0.5)[0].ce.item() > 0


def test_only_the_response_is_a_target_and_both_models_get_the_same_bytes(make_dataset, make_models):
    dataset, models = make_dataset(), make_models()
    blocks = list(range(8))
    _overfit(models.student, dataset.batch(blocks), 40)
    policy = _on_policy(models, dataset, max_new_tokens=20)
    (batch,) = policy.micro_batches(0, [blocks])
    policy.on_step_end(0, None, None)
    responses = policy.state["responses"]["0"]
    assert batch.blocks == tuple(response[0][0] for response in responses)
    student, teacher = _spelt(dataset, batch, 0), _spelt(dataset, batch, 1)
    assert student == teacher
    assert student == [dataset.pair.tables[0].spell(response[1]) for response in responses]
    for number, (block, of_student, of_teacher) in enumerate(response[0] for response in responses):
        cut = dataset.blocks[block]
        for tokens, start, size in (
            (batch.student, cut.student_start, of_student), (batch.teacher, cut.teacher_start, of_teacher)
        ):  # fmt: skip
            stream = dataset.text.student if tokens is batch.student else dataset.text.teacher
            assert tokens.input_ids[number, 1 : 1 + size].tolist() == stream.ids[start : start + size].tolist()
            assert (tokens.labels[number, : 1 + size] < 0).all()
            assert (tokens.labels[number, 1 + size :] >= 0).any()


def test_a_plain_block_is_cut_at_every_common_token_end_equally_often(make_dataset):
    rollouts = Rollouts(make_dataset(), *LIMITS)
    sides = [rollouts._stream(rollouts.train.blocks[0], side) for side in range(2)]
    common = sorted(set(sides[0].ends[:-1].tolist()) & set(sides[1].ends[:-1].tolist()))
    found = Counter()
    for seed in range(3000):
        prompt = rollouts.sample_prompt(0, np.random.default_rng(seed))
        assert sides[0].ends[prompt.num_student_tokens - 1] == sides[1].ends[prompt.num_teacher_tokens - 1]
        found[int(sides[0].ends[prompt.num_student_tokens - 1])] += 1
    assert sorted(found) == common
    assert max(found.values()) < 2 * 3000 / len(common)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_ends_with_a_document_goes_on_with_the_start_token_of_the_next(make_dataset, kind):
    dataset = make_dataset(kind, [Document(str(i), "ab") for i in range(40)])
    start, end = dataset.pair.student_start, dataset.pair.student_end
    rollouts, last = Rollouts(dataset, *LIMITS), Counter()
    for seed in range(200):
        prompt = rollouts.sample_prompt(0, np.random.default_rng(seed))
        ids = rollouts.prompt_ids(prompt)
        assert ids[-1] != end
        last[ids[-1] == start] += 1
        assert [b for a, b in itertools.pairwise(ids) if a == end] == [start] * ids.count(end)
    assert min(last[True], last[False]) > 20


def test_prompt_and_response_fit_a_teacher_of_the_same_tokenizer_whose_context_is_shorter(make_dataset):
    dataset = make_dataset("equal", limits=(48, 20))
    rollouts = Rollouts(dataset, 48, 20)
    for block in range(len(dataset)):
        prompt = rollouts.sample_prompt(block, np.random.default_rng(block))
        size = rollouts.max_new_tokens(prompt, 100)
        assert size >= 1
        assert len(rollouts.prompt_ids(prompt)) + size <= 20
        response, _ = rollouts.keep_usable([(prompt, Generation([5] * (size - 1), dataset.pair.student_end))])
        assert rollouts.batch(response).teacher.input_ids.shape[1] <= 20


def test_a_conversation_is_answered_at_its_last_response(make_dataset):
    messages = [("user", "One?"), ("assistant", "First."), ("user", "Two?"), ("assistant", "Second.")]
    talk = Conversation("t", tuple(Message(role, text, role == "assistant") for role, text in messages), False)
    dataset = make_dataset("different", [talk], limits=(96, 96))
    prompt = Rollouts(dataset, 96, 96).sample_prompt(0, np.random.default_rng(0))
    for side, (stream, size) in enumerate(
        ((dataset.text.student, prompt.num_student_tokens), (dataset.text.teacher, prompt.num_teacher_tokens))
    ):
        spell = dataset.pair.tables[side].spell
        behind = 1 + size  # the token that the template begins with comes before the block
        assert spell(stream.ids[:behind].tolist()).decode().endswith("Two?\n\nAssistant:\n")
        assert spell(stream.ids[behind:].tolist()) == b"Second."


# Issues of responses


def _ids(dataset, text):
    return dataset.pair.student(text, add_special_tokens=False)["input_ids"]


def _byte(dataset, byte):
    (token,) = (i for i, string in enumerate(dataset.pair.tables[0].strings) if string == f"<0x{byte:02X}>")
    return token


def _usable(dataset, ids, stop=None, finite=True, limits=LIMITS):
    rollouts = Rollouts(dataset, *limits)
    kept, issues = rollouts.keep_usable([(Prompt(0, 1, 1), Generation(ids, stop, finite))])
    return rollouts, kept, {issue: count for issue, count in issues.items() if count}


def test_a_response_begins_behind_each_models_own_format_and_ends_with_no_stop_token_inside_it(formatted):
    rollouts, pair = Rollouts(formatted, *LIMITS), formatted.pair
    prompt = rollouts.sample_prompt(0, np.random.default_rng(0))
    assert pair.student.decode(rollouts.prompt_ids(prompt)) == "<|start|>1 + 1?<|end|><|start|>"
    assert pair.teacher.decode(formatted.text.teacher.ids[1 : 1 + prompt.num_teacher_tokens].tolist()) == "1 + 1?["
    stops = pair.student.convert_ids_to_tokens(rollouts.stop_token_ids())
    assert "<|return|>" in stops
    assert "<|end|>" not in stops
    ids = pair.student("Three.", add_special_tokens=False)["input_ids"]
    stop = pair.student.convert_tokens_to_ids("<|return|>")
    usable, issues = rollouts.keep_usable([(prompt, Generation(ids, stop))])
    assert not any(issues.values())
    batch = rollouts.batch(usable)
    labels = batch.teacher.labels[0]
    assert pair.teacher.decode(labels[labels >= 0].tolist()) == f"Three.{pair.teacher.eos_token}"


def test_half_a_character_at_the_end_is_cut_off_and_counted(make_dataset):
    dataset = make_dataset()
    whole, euro = _ids(dataset, "It costs"), "\u20ac".encode()
    rollouts, kept, issues = _usable(dataset, [*whole, *(_byte(dataset, byte) for byte in euro[:2])])
    assert (kept[0].ids, issues) == (whole, {"broken_utf8": 1})
    assert _spelt(dataset, rollouts.batch(kept), 1) == [b"It costs"]
    _, kept, issues = _usable(dataset, [*whole, *(_byte(dataset, byte) for byte in euro)])
    assert (len(kept[0].ids), issues) == (len(whole) + 3, {})


def test_what_follows_a_byte_that_is_no_text_is_cut_off_with_the_stop_token(make_dataset):
    dataset = make_dataset()
    whole = _ids(dataset, "It costs")
    broken = [*whole, _byte(dataset, 0xFF), *_ids(dataset, " more")]
    _, kept, issues = _usable(dataset, broken, stop=dataset.pair.student_end)
    assert (kept[0].ids, kept[0].stop, issues) == (whole, None, {"broken_utf8": 1})


def test_a_special_token_in_the_middle_ends_the_response_and_is_counted(make_dataset):
    dataset = make_dataset()
    whole = _ids(dataset, "It costs")
    _, kept, issues = _usable(dataset, [*whole, dataset.pair.student_start, *whole], stop=dataset.pair.student_end)
    assert (kept[0].ids, kept[0].stop, issues) == (whole, None, {"special": 1})


def test_an_empty_response_is_its_stop_token_to_both(make_dataset):
    dataset = make_dataset()
    rollouts, kept, issues = _usable(dataset, [], stop=dataset.pair.student_end)
    batch = rollouts.batch(kept)
    assert issues == {}
    assert batch.student.targets.tolist() == [dataset.pair.student_end]
    assert batch.teacher.targets.tolist() == [dataset.pair.teacher_end]
    assert len(batch.alignment.student_positions) == 1


@pytest.mark.parametrize("finite", [True, False])
def test_a_response_without_tokens_is_dropped_and_counted(finite, make_dataset):
    _, kept, issues = _usable(make_dataset(), [], finite=finite)
    assert (kept, issues) == ([], {"nothing": 1} | ({} if finite else {"nonfinite": 1}))


def test_a_response_too_long_for_the_teacher_is_cut_at_a_common_token_end(make_dataset):
    dataset = make_dataset()
    ids = _ids(dataset, "Words, words, words; commas, colons: and (parentheses) [brackets] {braces}.")
    rollouts, kept, issues = _usable(dataset, ids, dataset.pair.student_end, limits=(200, 20))
    batch = rollouts.batch(kept)
    assert issues == {"too_long": 1}
    assert kept[0].stop is None
    assert 5 < batch.teacher.input_ids.shape[1] <= 20
    assert _spelt(dataset, batch, 0) == _spelt(dataset, batch, 1)
    assert dataset.pair.tables[0].spell(ids).startswith(_spelt(dataset, batch, 0)[0])


def test_a_response_that_the_teachers_tokenizer_would_change_is_dropped_and_counted(make_dataset, monkeypatch):
    dataset = make_dataset()
    monkeypatch.setattr("sar_kd.training.rollouts.encode_inside", lambda *_: None)
    _, kept, issues = _usable(dataset, _ids(dataset, "It costs"))
    assert (kept, issues) == ([], {"unrepresentable": 1})


def test_a_teacher_that_puts_a_space_before_its_text_puts_none_before_a_response(
    sp_tokenizer, dummy_prefix_tokenizer, corpus_texts
):
    sizes = {"student_vocab_size": len(sp_tokenizer), "teacher_vocab_size": len(dummy_prefix_tokenizer)}
    pair = TokenizerPair(sp_tokenizer, dummy_prefix_tokenizer, **sizes)
    dataset = build_dataset([Document("d", " ".join(corpus_texts[:5]))], pair, *LIMITS)
    for text in ("costs", " costs", "  two", "\n"):
        rollouts, kept, issues = _usable(dataset, _ids(dataset, text))
        assert issues == {}
        assert _spelt(dataset, rollouts.batch(kept), 1) == [text.encode()]


# Which micro-batches are on-policy, and the replay buffer


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 1.0])
def test_the_share_of_on_policy_micro_batches_is_exact_and_evenly_spread(fraction, make_dataset, make_models):
    policy = _on_policy(make_models(), make_dataset(), on_policy_fraction=fraction)
    marks = [policy.is_on_policy(index) for index in range(1000)]
    for size in (10, 100, 1000):
        assert abs(sum(marks[:size]) - fraction * size) <= 1


@pytest.mark.parametrize(("start", "routing", "first"), [(0.0, "native", 0), (0.5, "native", 30), (0.25, "ka", 6)])
def test_nothing_is_generated_before_the_share_of_the_steps_that_comes_first(
    start, routing, first, make_dataset, make_models
):
    options = {"on_policy_fraction": 0.5, "on_policy_start": start, "routing": routing, "ka_passes": 2}
    config = Config.from_options({**MODES["precise"], **options, "train_steps": 20, "grad_accum_steps": 3}, "precise")
    precision = Precision(CPU, torch.float32, 1.0)
    policy = build_on_policy(config, make_models(), make_dataset(), LIMITS, precision, SINGLE_DEVICE)
    marks = [policy.is_on_policy(index) for index in range(60)]
    assert not any(marks[:first])
    assert marks[first:] == [index % 2 == 1 for index in range(60 - first)]


def test_without_an_on_policy_fraction_nothing_is_built(make_dataset, make_models):
    config = Config(on_policy=OnPolicyConfig())
    assert (
        build_on_policy(config, make_models(), make_dataset(), LIMITS, Precision(CPU, torch.float32, 1.0), None) is None
    )


def test_responses_depend_on_the_seed_and_the_step_and_on_no_other_random_number(make_dataset, make_models):
    dataset, models = make_dataset(), make_models()

    def ids(step, seed=0, before=0):
        torch.manual_seed(before)
        state = torch.get_rng_state()
        policy = _on_policy(models, dataset, seed=seed)
        policy.micro_batches(step, [[0, 1], [2, 3]])
        policy.on_step_end(step, None, None)
        assert torch.equal(torch.get_rng_state(), state)
        return policy.state["responses"]

    assert ids(0) == ids(0, before=7)
    assert ids(0) != ids(1)
    assert ids(0) != ids(0, seed=1)


def test_consecutive_steps_on_the_same_text_have_the_same_responses(make_dataset, make_models):
    models = make_models()
    policy = _on_policy(models, make_dataset())
    (first,) = policy.micro_batches(3, [[0, 1]])
    policy.on_step_end(4, None, None)
    models.student.lm_head.weight.data.neg_()
    (again,) = policy.micro_batches(3, [[0, 1]])
    (later,) = policy.micro_batches(4, [[0, 1]])
    assert torch.equal(first.student.input_ids, again.student.input_ids)
    assert not torch.equal(first.student.input_ids, later.student.input_ids)


def test_replayed_responses_replace_generation_in_their_share(make_dataset, make_models, monkeypatch):
    dataset, models = make_dataset(), make_models()
    _overfit(models.student, dataset.batch([0, 1, 2, 3]), 40)
    policy = _on_policy(models, dataset, replay_size=6, replay_fraction=0.75)
    calls = []
    monkeypatch.setattr(on_policy, "generate", lambda *a, **k: calls.append(1) or _GENERATE(*a, **k))
    seen = []
    for step in range(20):
        policy.micro_batches(step, [[step, step + 1]])
        policy.on_step_end(step, None, None)
        assert len(policy.state["replay"]) <= 6
        seen.append(json.dumps(policy.state["responses"]["0"]))
    assert len(calls) == 5
    assert sum(seen.count(each) > 1 for each in set(seen)) > 0
    assert policy.state["totals"]["responses"] == 10


_GENERATE = on_policy.generate


ENDED, CUT = Generation(list(range(20)), 1), Generation(list(range(20)), None)


@pytest.mark.parametrize(
    ("name", "first", "later", "text"),
    [
        ("repetition", [ENDED] * 4, [Generation([7] * 20, 1)] * 4, "43% of a response's tokens are distinct, 100% at"),
        ("length", [ENDED] * 4, [Generation(list(range(40)), 1)] * 4, "32.0 tokens on average, 20.0 at first"),
        ("cut_off", [ENDED] * 3 + [CUT], [ENDED] + [CUT] * 3, "55% reach the most tokens, 25% at first"),
        ("", [ENDED] * 4, [ENDED] * 3 + [CUT], ""),  # one in four more is no alarm
        ("", [ENDED] * 4, [ENDED, ENDED, ENDED, Generation(list(range(55)), 1)], ""),
    ],
)
def test_responses_that_change_for_the_worse_are_reported_once_and_counted(
    name, first, later, text, make_dataset, make_models
):
    policy, messages, marked = _on_policy(make_models(), make_dataset()), [], []
    for step, found in enumerate([*[first] * 15, *[later] * 15]):
        policy._metrics = {}
        policy._count(found, Counter())
        marked += policy.metrics()["response_alarms"]
        messages += policy.on_step_end(step, None, None)[0]
    assert len(messages) == (1 if name else 0)
    assert text in "".join(messages)
    assert set(marked) == ({name} if name else set())
    alarms = policy.summary()["on_policy"]["alarms"]
    assert alarms == {"repetition": 0, "length": 0, "cut_off": 0} | Counter(marked)
    assert not name or alarms[name] == 10  # the mean of ten steps is beyond the limit from the sixth changed one on


def test_if_no_response_is_usable_the_text_itself_is_used(make_dataset, make_models):
    models, dataset = make_models(), make_dataset()
    models.student.lm_head.weight.data.fill_(math.nan)
    policy = _on_policy(models, dataset)
    (batch,) = policy.micro_batches(0, [[0, 1]])
    policy.on_step_end(0, None, None)
    assert not batch.is_on_policy
    assert torch.equal(batch.student.input_ids, dataset.batch([0, 1]).student.input_ids)
    assert policy.state["totals"]["nonfinite"] == policy.state["totals"]["nothing"] == 2


# A step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_denominator_over_on_policy_and_given_text(dtype, make_dataset, make_models):
    dataset, models = make_dataset(), make_models()
    _overfit(models.student, dataset.batch([0, 1, 2, 3]), 40)
    precision = Precision(CPU, dtype, 1024.0 if dtype is torch.float16 else 1.0)
    policy = _on_policy(models, dataset, precision)
    own, given = policy.micro_batches(0, [[0, 1], dataset.batch([2, 3])])
    config = LossConfig(alpha_ce=0.4, alpha_kd=0.6, temperature=1.5, logit_clamp_style="off", loss_clamp_style="off")
    objective = Objective(models.teacher, models.student, config, dataset.aligner, precision)
    terms = [objective(batch) for batch in (own, given)]
    optimizer = build_optimizer(models.student, OptimConfig(), [])
    context = StepContext(objective, optimizer, StepGuard(Config().guards), precision, 0.5)
    report = train_step([own, given], context)
    counts = [batch.num_target_tokens for batch in (own, given)]
    assert report.num_target_tokens == sum(counts)
    assert report.ce_loss == pytest.approx(terms[1].ce.item() / counts[1], rel=1e-5)
    assert report.kd_loss == pytest.approx(sum(t.kd.item() for t in terms) / sum(counts), rel=1e-5)
    assert report.loss == pytest.approx(sum(t.total.item() for t in terms) / sum(counts), rel=1e-4)


# Whole runs


@pytest.mark.slow
def test_without_an_on_policy_fraction_the_other_options_change_nothing(inputs, tmp_path):
    """Bit for bit the same, whatever the other on-policy flags say."""
    for name, more in (("a", ()), ("b", ("--sample_temperature", 0.3, "--replay_size", 9, "--max_new_tokens", 3))):
        assert run_script(argv_of(inputs, tmp_path / name, *more))[0] == 0
    a, b = (untimed(read_metrics(tmp_path / name)) for name in "ab")
    assert a == b
    assert "on_policy" not in read_json(tmp_path / "a" / "summary.json")


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("on_policy") / "run"
    code, out, err = run_script(argv_of(inputs, folder, *ON, "--kd_direction", "reverse", "--alpha_ce", 0, steps=4))
    assert (code, err) == (0, [])
    return folder, out


def test_an_on_policy_run_reports_its_responses_and_prints_no_cross_entropy(finished):
    folder, out = finished
    steps = [line for line in out if line.startswith("Step") and "avg_loss" in line]
    assert len(steps) == 4
    assert not any("ce=" in line for line in steps)
    assert [record["ce_loss"] for record in read_metrics(folder, "step")] == [None] * 4
    (line,) = (line for line in out if line.startswith("  generated "))
    assert line.startswith("  generated 16 responses of ")
    found = read_json(folder / "summary.json")["on_policy"]
    assert found["responses"] == 16
    assert 0 < found["tokens"] <= 16 * 12
    assert found["ended"] + found["cut_off"] == 16
    assert found["sampling_seconds"] > 0
    record = read_metrics(folder, "step")[0]
    assert 0 < record["response_distinct_tokens"] <= 1
    assert 0 <= record["response_end_rate"] <= 1


@pytest.mark.parametrize(
    "more",
    [
        ("--on_policy_fraction", 0.5, "--replay_size", 8),
        ("--on_policy_fraction", 1, "--routing", "ka", "--ka_passes", 2),
        ("--on_policy_fraction", 1, "--model_dtype", "float16"),
    ],
    ids=["replay", "ka", "float16"],
)
@pytest.mark.slow
def test_an_interrupted_run_goes_on_bit_for_bit(inputs, tmp_path, monkeypatch, more):
    more = ("--max_new_tokens", 8, *more)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run_script(argv_of(inputs, whole, *more, steps=6))[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", interrupting(train_step, after=3))
        assert run_script(argv_of(inputs, halves, *more, steps=6))[0] == 130
    assert run_script(["--resume", "--output_dir", str(halves)])[0] == 0
    assert_equal_runs(whole, halves)


@pytest.mark.parametrize("failing", ["generate", "train_step"])
@pytest.mark.slow
def test_a_run_resumed_after_an_attempt_that_failed_has_the_summary_of_one_that_never_did(
    failing, inputs, tmp_path, monkeypatch
):
    """Neither are the responses of that attempt counted twice, nor is the given text learned in their place."""
    more = ("--max_new_tokens", 8, "--on_policy_fraction", 1, "--replay_size", 4)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run_script(argv_of(inputs, whole, *more))[0] == 0
    with monkeypatch.context() as patch:
        module = on_policy if failing == "generate" else trainer
        patch.setattr(module, failing, _failing(getattr(module, failing), call=2))
        assert run_script(argv_of(inputs, halves, *more))[0] == 2
    assert run_script(["--resume", "--output_dir", str(halves)])[0] == 0
    summaries = [read_json(folder / "summary.json") for folder in (whole, halves)]
    assert summaries[0].keys() == summaries[1].keys()
    differ = {key for key in summaries[0] if untimed(summaries[0][key]) != untimed(summaries[1][key])}
    assert differ <= TIMING
    assert_equal_runs(whole, halves)


def _failing(function, call):
    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise MemoryError
        return function(*args, **kwargs)

    return failing


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sar-paper", "ka-paper"])
def test_a_recipe_runs_the_papers_algorithm_and_prints_the_differences(recipe, inputs, tmp_path, monkeypatch):
    order = []
    for name in ("generate", "train_step"):
        module = on_policy if name == "generate" else trainer
        monkeypatch.setattr(module, name, _noting(order, name, getattr(module, name)))
    argv = argv_of(inputs, tmp_path / "run", "--recipe", recipe, "--max_new_tokens", 6, steps=4)
    argv = [word for i, word in enumerate(argv) if "--routing" not in argv[max(0, i - 1) : i + 1]]
    code, out, err = run_script(argv)
    assert (code, err) == (0, [])
    assert sum(line.startswith("Unlike the paper: ") for line in out) >= 5
    config = read_json(tmp_path / "run" / "config.json")
    assert (config["loss"]["kd_direction"], config["loss"]["alpha_ce"]) == ("reverse", 0.0)
    assert config["routing"]["routing"] == recipe.removesuffix("-paper")
    steps = ["generate", "train_step"] if recipe == "sar-paper" else ["generate", "train_step", "train_step"]
    assert order == list(itertools.islice(itertools.cycle(steps), len(order)))
    assert order.count("train_step") == 4


@pytest.mark.slow
def test_the_on_policy_recipe_begins_with_the_text_and_keeps_the_last_student_beside_the_best(inputs, tmp_path):
    more = ("--recipe", "on-policy", "--max_new_tokens", 6, "--student_lr", 3, "--model_dtype", "float32")
    more += ("--eval_steps", 4, "--skip_rule", "fixed", "--skip_grad_norm", 1e9)
    code, out, err = run_script(argv_of(inputs, tmp_path / "run", *more, steps=8))
    assert (code, err) == (0, [])
    assert any(line.startswith("Recipe on-policy: 50% of the steps on the given text, then 50%") for line in out)
    run, steps = tmp_path / "run", read_metrics(tmp_path / "run", "step")
    generated = [step["step"] for step in steps if step.get("responses")]
    assert generated
    assert min(generated) > 4
    assert read_json(run / "summary.json")["best_step"] < 8  # at this rate it only gets worse
    last, best = (AutoModelForCausalLM.from_pretrained(run / name).state_dict() for name in ("last_student", "student"))
    saved = load_file(latest_checkpoint(run) / "student.safetensors")
    assert all(torch.equal(last[name], weight) for name, weight in saved.items())
    assert not all(torch.equal(best[name], weight) for name, weight in saved.items())
    assert any("last_student" in line for line in out)
    assert "alarms" in read_json(run / "summary.json")["on_policy"]


def _noting(order, name, function):
    def noting(*args, **kwargs):
        order.append(name)
        return function(*args, **kwargs)

    return noting


def test_an_on_policy_run_without_distillation_is_refused(inputs, tmp_path):
    assert_refused(argv_of(inputs, tmp_path / "run", *ON, "--alpha_kd", 0), "--on_policy_fraction 1", "--alpha_kd")


@pytest.mark.slow
def test_a_run_whose_student_is_not_finite_stops_and_names_the_module(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("sar_kd.training.trainer.Trainer._check_first_steps", lambda self: None)  # would refuse it
    code, _, err = run_script(
        argv_of(inputs, tmp_path / "run", "--on_policy_fraction", 1, "--max_new_tokens", 4, student="loud", steps=12)
    )
    assert code == 3
    assert "down_proj" in " ".join(err)
    assert read_json(tmp_path / "run" / "summary.json")["on_policy"]["issues"]["nonfinite"] > 0
