"""What held-out documents show about the difference of two models: the arithmetic, its uncertainty, the sentences."""

import dataclasses
import math

import numpy as np
import pytest

from sar_kd.reporting.comparison import (
    _MAX_UNITS,
    _t_of_95,
    compare_with_control,
    difference,
    gap_closed,
    losses_by_file,
    ratio_of_sums,
)
from sar_kd.reporting.held_out import HeldOut


def _documents(count, gain=0.03, noise=0.04, seed=0):
    """Nats of two models on documents of very different size, the first `gain` bits per byte better on average."""
    random = np.random.default_rng(seed)
    num_bytes = np.ceil(random.lognormal(6.0, 1.0, count)).astype(np.int64)
    shared = random.normal(2.0, 0.4, count)
    other = shared + random.normal(0, noise, count)
    return (other - gain) * num_bytes * math.log(2), shared * num_bytes * math.log(2), num_bytes


@pytest.mark.parametrize(("degrees", "quantile"), [(19, 2.09302), (29, 2.04523), (60, 2.00030), (1000, 1.96234)])
def test_the_quantiles_are_those_of_students_t(degrees, quantile):
    assert _t_of_95(degrees) == pytest.approx(quantile, abs=1e-4)


@pytest.mark.parametrize("count", [40, 400])
def test_the_interval_is_that_of_the_linearized_ratio(count):
    """Of the delta method: the residuals x - r y of a ratio r of sums, over the sum of y."""
    one, other, num_bytes = _documents(count)
    found = ratio_of_sums(other - one, num_bytes * math.log(2))
    x, y = (other - one).tolist(), [size * math.log(2) for size in num_bytes.tolist()]
    ratio = math.fsum(x) / math.fsum(y)
    residuals = [a - ratio * b for a, b in zip(x, y, strict=True)]
    error = math.sqrt(count / (count - 1) * math.fsum(r * r for r in residuals)) / math.fsum(y)
    assert found.value == pytest.approx(ratio, rel=1e-12)
    assert found.half_width == pytest.approx(_t_of_95(count - 1) * error, rel=0.12 if count == 40 else 0.04)
    assert found == ratio_of_sums(other - one, num_bytes * math.log(2))  # the seed is fixed


def test_the_interval_holds_the_truth_in_at_least_90_of_100_samples():
    """Samples of documents from a population whose ratio of sums is known; unpaired noise is four times the gain."""
    one, other, num_bytes = _documents(200_000, gain=0.01, noise=0.04)
    truth = (other - one).sum() / num_bytes.sum() / math.log(2)
    random, held, outcomes = np.random.default_rng(1), 0, []
    for _ in range(100):
        drawn = random.integers(0, len(one), 60)
        found = difference(one[drawn], other[drawn], num_bytes[drawn])
        held += abs(found.gain.value - truth) <= found.gain.half_width
        outcomes.append(found.outcome)
    assert 90 <= held <= 99
    assert "worse" not in outcomes  # the first model is better
    assert {"better", "no difference"} <= set(outcomes)  # 60 documents show it in some samples only


def test_the_interval_shrinks_with_the_square_root_of_the_documents():
    one, other, num_bytes = _documents(100)
    few = difference(one, other, num_bytes).gain.half_width
    many = difference(*(np.tile(values, 16) for values in (one, other, num_bytes))).gain.half_width
    assert few / many == pytest.approx(4.0, rel=0.05)


def test_of_very_many_documents_neighbours_are_resampled_together():
    one, other, num_bytes = _documents(40 * _MAX_UNITS + 7)
    found = difference(one, other, num_bytes)
    x, y = other - one, num_bytes * math.log(2)
    residuals = x - x.sum() / y.sum() * y
    assert found.gain.half_width == pytest.approx(1.96 * math.sqrt((residuals**2).sum()) / y.sum(), rel=0.06)


# Sentences


def test_a_clear_difference_has_its_size_its_interval_and_the_documents():
    one, other, num_bytes = _documents(149)
    found = difference(one, other, num_bytes)
    better = int((one < other).sum())
    assert found.sentence("A", "B") == (
        f"A is {found.gain.value:.4f} +- {found.gain.half_width:.4f} bits per byte better than B "
        f"(better on {better} of 149 documents)."
    )
    reverse = difference(other, one, num_bytes)
    assert reverse.outcome == "worse"
    assert f"bits per byte worse than A (better on {149 - better} of 149 documents)." in reverse.sentence("B", "A")


def test_where_nothing_shows_the_sentence_says_how_much_text_would():
    one, other, num_bytes = _documents(100, gain=0.005, seed=3)
    found = difference(one, other, num_bytes)
    assert found.outcome == "no difference"
    documents = 100 * (found.gain.half_width / found.gain.value) ** 2
    said = int(found.sentence("A", "B").split("about ")[1].split(" documents")[0].replace(",", ""))
    assert documents <= said <= 1.1 * documents
    same = difference(one, one, num_bytes).sentence("A", "B")
    assert "no difference that this text can show (0.0000 +- 0.0000" in same
    assert same.endswith("better on 0 of 100 documents).")  # how much text would show none has no answer


def test_too_few_documents_and_losses_that_are_not_finite_are_not_judged():
    one, other, num_bytes = _documents(19)
    found = difference(one, other, num_bytes)
    assert found.outcome == "not judged"
    assert "but 19 held-out documents cannot show whether that is chance; it takes at least 20" in found.sentence(
        "A", "B"
    )
    assert difference(*_documents(20)).outcome != "not judged"
    for bad in (math.nan, math.inf):
        one, other, num_bytes = _documents(50)
        one[7] = bad
        found = difference(one, other, num_bytes)
        assert (found.outcome, found.sentence("A", "B")) == (
            "not judged", "A and B cannot be compared: a loss on the held-out text is not finite."
        )  # fmt: skip


# A run and its control


def _held_out(**nats):
    num_bytes = _documents(60)[2]
    return HeldOut("text", "tokenizer", "blocks", [str(i) for i in range(60)], num_bytes, nats)


def test_the_gap_is_that_between_start_and_teacher():
    alone, start, num_bytes = _documents(60, gain=0.2, noise=0.02)
    distilled, teacher = alone - 0.03 * num_bytes, alone - 0.4 * num_bytes
    share = gap_closed(start, distilled, teacher, num_bytes)
    assert share.value == pytest.approx((start - distilled).sum() / (start - teacher).sum(), rel=1e-12)
    assert 0 < share.half_width < 0.1
    run, control = _held_out(start=start, best=distilled, teacher=teacher), _held_out(best=alone)
    found = compare_with_control(run, control)
    assert found["outcome"] == "better"
    assert found["gap_closed"] == share.value > found["control_gap_closed"]
    assert found["documents_better"] == found["documents"] == 60
    assert found["sentences"][0].startswith(
        "The distilled student is 0.0433 +- 0.0000 bits per byte better than the co"
    )
    assert found["sentences"][1].startswith(f"Of the gap between start and teacher it closed {share.value:.0%} +- ")


def test_a_teacher_that_is_no_better_than_the_start_leaves_no_gap():
    alone, start, num_bytes = _documents(60, gain=0.2, noise=0.02)
    for teacher in (start + 0.1 * num_bytes, start):
        assert gap_closed(start, alone, teacher, num_bytes) is None
        run = _held_out(start=start, best=alone, teacher=teacher)
        found = compare_with_control(run, _held_out(best=alone))
        assert len(found["sentences"]) == 1
        assert "gap_closed" not in found


def test_a_best_student_that_is_the_one_at_the_start_is_named():
    alone, start, _ = _documents(60, gain=0.2, noise=0.02)
    found = compare_with_control(_held_out(start=start, best=alone), _held_out(start=start, best=start))
    assert found["sentences"][1].startswith("The best control is the student as it was")
    found = compare_with_control(_held_out(start=start, best=start), _held_out(start=start, best=alone))
    assert found["sentences"][1].startswith("The best distilled student is the student as it was")
    found = compare_with_control(_held_out(start=start, best=start), _held_out(start=start, best=start))
    assert found["outcome"] == "not judged"
    assert found["sentences"][0].startswith("No validation found a student better than the one at the start, with")


def test_a_control_on_another_text_is_not_judged():
    one, other, _ = _documents(60)
    run, control = _held_out(start=other, best=one), dataclasses.replace(_held_out(best=other), text="another")
    assert compare_with_control(run, control) == {
        "outcome": "not judged", "sentences": ["The run and its control were measured on different texts."]
    }  # fmt: skip


def test_without_losses_on_documents_nothing_is_judged():
    found = compare_with_control(_held_out(), _held_out())
    assert found == {
        "outcome": "not judged", "sentences": ["The losses on single documents were not kept by both runs."]
    }  # fmt: skip


def test_losses_by_file_are_the_sums_over_the_documents_of_each():
    random = np.random.default_rng(1)
    names = [f"{'abcdefghijklmnopq'[i % 17]}.txt:{i}" for i in range(600)]
    size = random.integers(50, 300, 600)
    nats = {model: random.uniform(50, 300, 600) for model in ("start", "best", "teacher")}
    run = HeldOut("t", "k", "b", names, size, nats)
    control = HeldOut("t", "k", "b", names, size, {"best": random.uniform(50, 300, 600)})
    rows = losses_by_file(run, control)
    assert len(rows) == 13
    assert rows[-1].name == "the other 5 files"
    assert sum(row.num_documents for row in rows) == 600
    named = {row.name for row in rows[:-1]}
    for row in rows:
        own = [i for i, n in enumerate(names) if (n.split(":")[0] == row.name or row is rows[-1]) and
               (row is not rows[-1] or n.split(":")[0] not in named)]  # fmt: skip
        assert row.num_bytes == sum(int(size[i]) for i in own)
        for model, values in (*nats.items(), ("control", control.nats["best"])):
            expected = sum(float(values[i]) for i in own) / math.log(2) / row.num_bytes
            assert row.bits_per_byte[model] == pytest.approx(expected, rel=1e-12)
        gain = row.bits_per_byte["control"] - row.bits_per_byte["best"]
        assert row.difference.gain.value == pytest.approx(gain, abs=1e-12)
        assert row.difference.num_documents == len(own)
    assert [row.num_bytes for row in rows[:-1]] == sorted((row.num_bytes for row in rows[:-1]), reverse=True)


def test_a_single_file_has_no_table_and_another_text_no_control():
    one = HeldOut("t", "k", "b", ["a.txt:1", "a.txt:2"], np.array([10, 20]), {"best": np.array([5.0, 6.0])})
    assert losses_by_file(one) == []
    two = HeldOut("t", "k", "b", ["a.txt", "b.txt"], np.array([10, 20]), {"best": np.array([5.0, 6.0])})
    other = HeldOut("u", "k", "b", ["a.txt", "b.txt"], np.array([10, 20]), {"best": np.array([5.0, 6.0])})
    assert all(row.difference is None for row in losses_by_file(two, other))
