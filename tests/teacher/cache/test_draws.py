"""Drawn tokens: the mean of many draws is the teacher's distribution, and of their gradients the whole teacher's."""

import math

import numpy as np
import pytest
import torch

from sar_kd.config.sections import LossConfig
from sar_kd.data.batch import CachedDraws
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.samples import Document
from sar_kd.losses.distillation import ForwardOutputs, TokenLevel
from sar_kd.losses.projection.loss import Projection
from sar_kd.teacher.cache.draws import TokenSampler, gaps_of, log_factors_of
from sar_kd.teacher.cache.format import record_dtype
from sar_kd.tokenization.tokenizer_pair import TokenizerPair
from tests.helpers.lm_heads import lazy_logits

CPU = torch.device("cpu")
K = 11
TEMPERATURES = [1.0, 1.5, 2.0]
EVERY_KEEP = pytest.mark.parametrize("keep", ["mixed", "sampled"])
EVERY_TEMPERATURE = pytest.mark.parametrize("temperature", TEMPERATURES)
LETTERS = "abc"
PIECES = [
    b"",
    *[
        word.encode()
        for a in LETTERS
        for b in LETTERS
        for c in LETTERS
        for word in (a, a + b, a + b + c, a + b + c + "d")
    ],
]


def _metadata(keep, num_tokens, k=K, temperatures=TEMPERATURES):
    return {"keep": keep, "teacher_top_k": k, "temperatures": temperatures, "num_tokens": num_tokens}


def _records(metadata, logits, targets, seed=0, pieces=None):
    """The records of positions with these logits, float32 [V, n], as `CacheBuilder` writes them."""
    sampler, records = TokenSampler(metadata, pieces, CPU), np.zeros(len(targets), dtype=record_dtype(metadata))
    log_probs = logits.double().log_softmax(0)
    records["max_log_prob"] = log_probs[: metadata["num_tokens"]].amax(0).numpy()
    records["target_log_prob"] = log_probs.gather(0, targets[None])[0].numpy()
    sampler.write(records, logits, targets, sampler.uniforms((seed, 0), 0, len(targets)))
    return records


def _cached(metadata, records, targets, temperature, record_index=None):
    """They as a batch carries them."""
    at = metadata["temperatures"].index(temperature)
    return CachedDraws(
        record_index=torch.arange(len(records)) if record_index is None else record_index,
        ids=torch.from_numpy(records["ids"].astype(np.int32)),
        max_log_probs=torch.from_numpy(records["max_log_prob"].copy()),
        log_prob_gaps=torch.from_numpy(gaps_of(records)),
        target_log_probs=torch.from_numpy(records["target_log_prob"].copy()),
        temperature=temperature,
        log_factors=torch.from_numpy(log_factors_of(records, metadata)),
        log_sums=torch.from_numpy(records["log_sums"][:, at].astype(np.float32)),
        targets=targets.int(),
    )


def _estimates(keep, logits, target, temperature, count=20_000, pieces=None):
    """Of one position, drawn `count` times: float64 [V, count]; and the tile."""
    metadata, targets = _metadata(keep, len(logits)), torch.full((count,), target)
    records = _records(metadata, logits[:, None].repeat(1, count), targets, pieces=pieces)
    top = _cached(metadata, records, targets, temperature).tile(slice(None))
    return torch.zeros(len(logits), count, dtype=torch.float64).scatter_(
        0, top.ids, (top.logits / temperature).exp().double()
    ), top


def _one_position(spread):
    return torch.randn(len(PIECES), generator=torch.Generator().manual_seed(3)) * spread


@EVERY_KEEP
@EVERY_TEMPERATURE
@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("pieces", [PIECES, None])
def test_the_mean_of_many_draws_is_the_teachers_distribution(keep, temperature, spread, pieces):
    logits, target = _one_position(spread), PIECES.index(b"abc")
    found, top = _estimates(keep, logits, target, temperature, pieces=pieces)
    expected = (logits.double() / temperature).softmax(0)
    error, is_often_drawn = (found.mean(1) - expected).abs(), (found > 0).sum(1) > 100
    assert torch.all((error < 5 * found.std(1) / math.sqrt(found.shape[1]) + 5e-3 * expected)[is_often_drawn])
    assert expected[~is_often_drawn].sum() < 0.05
    assert torch.all(found.sum(0).sub(top.weights).abs() < 1e-5)
    assert torch.allclose(found[target], expected[target], rtol=2e-3)  # known, not drawn
    assert found.std(1).max() > 0.01


@pytest.mark.parametrize("pieces", [PIECES, None])
def test_mixed_draws_hold_no_token_twice_and_the_likely_ones_always(pieces):
    logits = _one_position(4.0)
    found, top = _estimates("mixed", logits, 5, 1.0, pieces=pieces)
    ids = top.ids.sort(0).values
    assert torch.all(ids[1:] > ids[:-1])
    assert len(top.ids) == K + 1
    likely = logits.softmax(0).topk(3).indices
    assert torch.all((found[likely] > 0).all(1))
    assert torch.allclose(found[likely].mean(1), logits.double().softmax(0)[likely], rtol=2e-3)
    assert torch.all(found[likely].std(1) < 0.05 * found[likely].mean(1))
    others = (found > 0).double().mean(1)
    assert others.min() < 0.05
    assert (found > 0).sum(0).double().mean() > K


def test_a_prefix_of_the_target_is_drawn_however_unlikely_it_is():
    """All tokens that begin with c together have the probability e-7; half of the draws still are among them."""
    begin = torch.tensor([piece.startswith(b"c") for piece in PIECES])
    logits = torch.where(begin, -16.0, 0.0) + 0.1 * _one_position(1.0)
    target = PIECES.index(b"cab")
    counts = [
        (_estimates("mixed", logits, target, 1.0, 2000, pieces)[0][begin] > 0).sum(0).double().mean()
        for pieces in (PIECES, None)
    ]
    assert counts[0] > 3.0
    assert counts[1] < 1.01  # the target


@EVERY_KEEP
def test_a_distribution_on_fewer_tokens_than_are_kept_is_held_whole(keep):
    logits = torch.full((50,), -1e30)
    logits[:3] = torch.tensor([1.0, 0.0, -1.0])
    found, top = _estimates(keep, logits, 1, 1.0, 300)
    if keep == "mixed":
        assert torch.allclose(found.mean(1), logits.double().softmax(0), rtol=4e-3)  # a gap is rounded by chance
    assert torch.all(found[3:] == 0.0)
    ids = top.ids.sort(0).values
    assert torch.all(ids[1:] > ids[:-1])


@EVERY_KEEP
def test_draws_are_a_function_of_seed_text_and_position(keep):
    metadata = _metadata(keep, 80)
    sampler = TokenSampler(metadata, None, CPU)
    whole = sampler.uniforms((4, 0), 0, 100)
    assert torch.equal(whole[37:61], sampler.uniforms((4, 0), 37, 24))
    for other in ((5, 0), (4, 1)):
        assert not torch.equal(whole, sampler.uniforms(other, 0, 100))
    assert 0.0 <= whole.min() < 0.1 < 0.9 < whole.max() < 1.0


# Gradients


@pytest.fixture(scope="module")
def make_batch(byte_tokenizer, sp_tokenizer, corpus_texts):
    """make_batch(name): the aligner, a batch, the logits of both models, and the bytes of the teacher's tokens."""
    tokenizers = {"byte": byte_tokenizer, "sp": sp_tokenizer}
    documents = [Document(str(number), text) for number, text in enumerate(corpus_texts)]

    def make(name):
        student, teacher = map(tokenizers.get, name.split("_from_"))
        sizes = {"student_vocab_size": len(student), "teacher_vocab_size": len(teacher)}
        dataset = build_dataset(documents, TokenizerPair(student, teacher, **sizes, aligns=True), 24, 60)
        batch, generator = dataset.batch([0, 17]), torch.Generator().manual_seed(0)
        student_logits = torch.randn(batch.num_target_tokens, len(student), generator=generator) * 2
        teacher_logits = torch.randn(batch.teacher.input_ids.numel(), len(teacher), generator=generator) * 4
        # As a teacher that has learned something: the text's own tokens are likely.
        teacher_logits[batch.teacher.positions, batch.teacher.targets] += 6.0
        return dataset.aligner, batch, student_logits, teacher_logits, dataset.pair.token_tables[1].pieces

    return make


def _gradient(method, batch, student, teacher):
    leaf = student.clone().requires_grad_()
    method(batch, ForwardOutputs(lazy_logits(leaf), teacher)).loss.backward()
    return leaf.grad.double()


def _gradients(make_batch, name, method, keep, temperature, number=48, k=K):
    """Of the whole teacher; of its top 32; and of as many draws."""
    aligner, batch, student, teacher, pieces = make_batch(name)
    config = {"temperature": temperature, "logit_clamp_style": "off"}
    whole = _gradient(method(LossConfig(**config), aligner), batch, student, lazy_logits(teacher))
    top = _gradient(method(LossConfig(**config, teacher_top_k=32), aligner), batch, student, lazy_logits(teacher))
    drawing = method(LossConfig(**config, teacher_top_k=k + 1), aligner)
    positions, targets = batch.teacher.positions, batch.teacher.targets
    metadata = _metadata(keep, teacher.shape[1], k)
    index = torch.zeros(len(teacher), dtype=torch.int64).index_copy_(0, positions, torch.arange(len(positions)))
    drawn = []
    for seed in range(number):
        records = _records(metadata, teacher[positions].T.contiguous(), targets, seed, pieces)
        cached = _cached(metadata, records, targets, temperature, index)
        drawn.append(_gradient(drawing, batch, student, cached))
    return whole, top, torch.stack(drawn)


def _bias(drawn, whole):
    """The distance of the mean gradient from the whole teacher's, beyond what so few draws leave, as a share of it."""
    mean, number = drawn.mean(0), len(drawn)
    noise = (drawn - mean).square().sum() / (number - 1) / number
    return float((((mean - whole).square().sum() - noise).clamp_min(0.0) / whole.square().sum()).sqrt())


@EVERY_KEEP
@EVERY_TEMPERATURE
@pytest.mark.parametrize(("name", "method"), [("byte_from_byte", TokenLevel), ("byte_from_byte", Projection)])
def test_the_gradient_is_unbiased_between_equal_tokenizers(make_batch, name, method, keep, temperature):
    whole, _, drawn = _gradients(make_batch, name, method, keep, temperature)
    assert _bias(drawn, whole) < 0.03
    assert (drawn - drawn.mean(0)).norm() / len(drawn) ** 0.5 > 0.05 * whole.norm()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["sp_from_byte", "byte_from_sp"])
def test_between_different_tokenizers_it_is_closer_than_the_top_32_and_the_closer_the_more_are_drawn(
    make_batch, name, temperature
):
    whole, top, drawn = _gradients(make_batch, name, Projection, "mixed", temperature)
    _, _, more = _gradients(make_batch, name, Projection, "mixed", temperature, k=5 * K)
    bias, of_top = _bias(drawn, whole), float((top - whole).norm() / whole.norm())
    assert bias < 0.5 * of_top
    assert _bias(more, whole) < 0.5 * bias + 0.01
