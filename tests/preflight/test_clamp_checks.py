"""Raw and hard clamps: their limits in closed form, the reasons why nothing could be learned, and the refusal."""

import dataclasses
import math
from types import SimpleNamespace

import pytest

from sar_kd.config.presets import MODES
from sar_kd.config.sections import LossConfig
from sar_kd.errors import UsageError
from sar_kd.preflight import clamp_checks
from sar_kd.preflight.clamp_checks import (
    check_clamps,
    clamp_lines,
    raw_clamp_largest_probability,
    raw_clamp_perplexity_floor,
    require_learnable,
)


def test_the_perplexity_floor_of_a_raw_clamp():
    assert raw_clamp_perplexity_floor(50257, 5.0) == pytest.approx(3.282, abs=5e-4)


def test_the_largest_probability_under_a_raw_clamp():
    assert round(raw_clamp_largest_probability(50257, 5.0, 2.0), 4) == 0.0029


@pytest.mark.parametrize("vocab_size", [2, 1000])
def test_at_temperature_one_the_largest_probability_is_one_over_the_perplexity_floor(vocab_size):
    floor = raw_clamp_perplexity_floor(vocab_size, 3.0)
    assert raw_clamp_largest_probability(vocab_size, 3.0, 1.0) == pytest.approx(1 / floor)


RAW, HARD = {"logit_clamp_style": "raw", "logit_clamp": 5.0}, {"loss_clamp_style": "hard"}
MEASURED = {"student_vocab_size": 50257, "teacher_vocab_size": 50257, "start_loss": 10.8, "saturated": 0.9}


@pytest.mark.parametrize(
    ("settings", "measured", "expected"),
    [
        ({}, {}, []),
        (HARD | {"loss_clamp": 6.0}, {}, ["--loss_clamp_style hard"]),
        (HARD | {"loss_clamp": 11.0}, {}, []),
        (HARD | {"loss_clamp": 10.8}, {}, []),
        (RAW, {}, ["perplexity below 3.28", "probability can exceed p = 0.0029", "90% of the student's logits"]),
        (RAW | {"alpha_kd": 0.0}, {"saturated": 0.5}, ["perplexity below 3.28"]),
        (RAW, {"student_vocab_size": 1000, "saturated": 0.0}, ["probability can exceed p = 0.0029"]),
        (RAW, {"student_vocab_size": 1000, "teacher_vocab_size": 1000, "saturated": 0.51}, ["51%"]),
        (RAW, {"student_vocab_size": 1000, "teacher_vocab_size": 1000, "saturated": 0.5}, []),
        (RAW | {"logit_clamp": 30.0}, {"saturated": 0.0}, []),
    ],
)
def test_each_reason_names_the_option_and_the_remedy(settings, measured, expected):
    loss = LossConfig(**{"temperature": 2.0, "alpha_kd": 0.1, **settings})
    reasons = require_learnable(dataclasses.replace(loss, force=True), **{**MEASURED, **measured})
    assert len(reasons) == len(expected)
    for reason, words in zip(reasons, expected, strict=True):
        assert words in reason
        assert reason.startswith("--")
        assert "; use --" in reason
    if expected:
        with pytest.raises(UsageError, match=f"^{expected[0]}" if expected[0][0] == "-" else expected[0]):
            require_learnable(loss, **{**MEASURED, **measured})


def _check(loss: LossConfig, monkeypatch, saturated: float = 0.0, vocab: int = 50257) -> list[str]:
    monkeypatch.setattr(clamp_checks, "vocab_size_of", lambda model: vocab)
    monkeypatch.setattr(clamp_checks, "_saturated_share", lambda *_: saturated)
    return check_clamps(loss, SimpleNamespace(student=None, teacher=None), None, None, 10.8)


@pytest.mark.parametrize("mode", MODES)
def test_the_clamps_of_every_mode_give_no_line(mode, monkeypatch):
    names = (
        "temperature", "alpha_kd", "alpha_ce", "logit_clamp", "logit_clamp_style", "loss_clamp", "loss_clamp_style",
    )  # fmt: skip
    assert _check(LossConfig(**{name: MODES[mode][name] for name in names}), monkeypatch, saturated=1.0) == []


@pytest.mark.parametrize("style", [{"logit_clamp_style": "raw"}, {"loss_clamp_style": "hard"}])
def test_a_raw_or_hard_clamp_is_refused_unless_forced(style, monkeypatch):
    with pytest.raises(UsageError, match="or --force"):
        _check(LossConfig(**style), monkeypatch)
    assert any(line.startswith("Forced: ") for line in _check(LossConfig(**style, force=True), monkeypatch))


def test_the_lines_say_what_a_clamp_does_and_name_no_other_styles_limits():
    normalized, scaled = clamp_lines(LossConfig(logit_clamp=5.0, loss_clamp=6.0), 1024, 2048)[0]
    assert normalized == "No log-probability counts for less than -10 in the loss; gradients are not changed"
    assert scaled == "A loss above 6 is scaled down to 6, and its gradient with it"
    raw, hard = clamp_lines(LossConfig(logit_clamp_style="raw", loss_clamp_style="hard", logit_clamp=5.0), 50257, 9)[0]
    assert "cut to [-5, 5]: training perplexity stays above 3.28" in raw
    assert hard.endswith("that of an untrained student is about 10.82")


def test_the_limits_of_a_raw_clamp_that_can_learn_are_stated(monkeypatch):
    (line,) = _check(LossConfig(logit_clamp_style="raw", logit_clamp=9.0), monkeypatch, vocab=1000)
    assert f"{1 + 999 * math.exp(-18):.4f}" in line
    assert f"{1 / (1 + 999 * math.exp(-9)):.4f}" in line
