"""Models that mask tokens by -inf, in the bias of their LM head or behind it: measured, sampled, saved."""

import math

import pytest
import safetensors.torch
import torch
import transformers

from sar_kd.data.batch import IGNORE_INDEX, TokenBatch, next_token_targets
from sar_kd.evaluation.perplexity import evaluate
from sar_kd.models.generation import generate
from sar_kd.models.lora import require_equal_logits
from sar_kd.training.checkpoint import _check_weights
from tests.helpers.lm_heads import FLOAT32

MASKED = [7, 50]
SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


class _Suppressing(transformers.LlamaForCausalLM):
    """Suppresses tokens in its forward, behind the LM head."""

    def forward(self, *args, **inputs):
        out = super().forward(*args, **inputs)
        mask = torch.zeros(60, dtype=out.logits.dtype).index_fill_(0, torch.tensor(MASKED), -math.inf)
        out.logits = out.logits + mask
        return out


def _model(kind: str):
    torch.manual_seed(0)
    if kind == "forward":
        return _Suppressing(transformers.LlamaConfig(**SIZES)).eval()
    model = transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES)).eval()
    model.lm_head.bias.data[MASKED] = -math.inf
    return model


def _batch(*ids: int) -> TokenBatch:
    input_ids = torch.tensor([[1, *ids]])
    labels = input_ids.masked_fill(torch.arange(len(ids) + 1) == 0, IGNORE_INDEX)
    return TokenBatch(input_ids, labels, *next_token_targets(labels))


EVERY_KIND = pytest.mark.parametrize("kind", ["bias", "forward"])


@EVERY_KIND
def test_perplexity_is_that_of_the_other_tokens_and_infinite_with_a_masked_one(kind):
    model, batch = _model(kind), _batch(5, 6, 8, 9)
    found = evaluate(model, [batch], 4, FLOAT32)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids).logits[0, :-1].double()
    kept = [v for v in range(60) if v not in MASKED]
    expected = logits[:, kept].logsumexp(1).sum() - sum(logits[i, v] for i, v in enumerate((5, 6, 8, 9)))
    assert found.nats == pytest.approx(expected.item(), rel=1e-5)
    masked = evaluate(model, [batch, _batch(5, 7)], 6, FLOAT32)
    assert (masked.nats, masked.perplexity, masked.bits_per_byte) == (math.inf,) * 3


@EVERY_KIND
@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_no_masked_token_is_sampled(kind, temperature):
    model = _model(kind)
    if kind == "bias":  # the likeliest tokens, were they not masked
        model.lm_head.weight.data[MASKED] *= 50.0
    torch.manual_seed(1)
    responses = generate(model, [[5, 6], [8]], stop_token_ids=[59], max_new_tokens=[40, 40], temperature=temperature)
    assert all(response.is_finite for response in responses)
    assert not {token for response in responses for token in response.ids} & set(MASKED)


def test_a_saved_student_is_compared_by_the_tokens_that_are_not_masked():
    trained, saved = _model("bias"), _model("bias")
    require_equal_logits(trained, saved, FLOAT32)
    saved.lm_head.weight.data *= 1.1
    with pytest.raises(Exception, match="logits differ from the trained one's"):
        require_equal_logits(trained, saved, FLOAT32)


def test_a_checkpoint_with_a_masked_token_is_sound(tmp_path):
    student, path = _model("bias"), tmp_path / "student.safetensors"
    safetensors.torch.save_model(student, str(path))
    _check_weights(path, student)
    student.lm_head.bias.data[3] = math.nan
    safetensors.torch.save_model(student, str(path))
    with pytest.raises(ValueError, match=r"lm_head\.bias is not finite"):
        _check_weights(path, student)
