"""Perplexity computed tile by tile: equal to that of whole logits in float64, without whole logits."""

import dataclasses
import math

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sar_kd.config.sections import LossConfig
from sar_kd.data.batch import IGNORE_INDEX, TokenBatch, next_token_targets
from sar_kd.evaluation.perplexity import evaluate
from sar_kd.models.lm_head import LMHeads
from sar_kd.models.loading import Models
from sar_kd.preflight.clamp_checks import _saturated_share
from sar_kd.runtime.precision import Precision

CPU = torch.device("cpu")
VOCAB, WIDTH = 6000, 16
ONE_MB = {"workspace_mb": 1}  # tiles of 43 positions


def _batch(shape=(4, 33), ragged=True) -> TokenBatch:
    input_ids = torch.randint(0, VOCAB, shape)
    labels = input_ids.clone()
    labels[:, 0] = IGNORE_INDEX
    if ragged:
        for i in range(len(labels)):
            labels[i, 5 + 7 * i :] = IGNORE_INDEX
    return TokenBatch(input_ids, labels, *next_token_targets(labels))


def _llama(**overrides):
    settings = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24} | overrides
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=VOCAB, hidden_size=WIDTH, tie_word_embeddings=False, **settings)
    )
    model.lm_head.weight.data.mul_(30.0)  # logits far enough apart for a softmax
    return model


class _OwnHead(torch.nn.Linear):
    """Logits by another computation than a matrix product."""

    def forward(self, states):
        return torch.nn.functional.linear(states, self.weight).sin()


def _with_own_head():
    model, head = _llama(), _OwnHead(WIDTH, VOCAB, bias=False)
    head.weight.data.normal_()
    model.set_output_embeddings(head)
    return model


MODELS = {
    "llama": _llama,
    "tied": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=1, n_head=2)
    ),
    "capped": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
            num_key_value_heads=1, intermediate_size=24, final_logit_softcapping=3.0,
        )
    ),
    "own head": _with_own_head,
}  # fmt: skip


@torch.no_grad()
def _nats(model, batches) -> float:
    """From the definition, in float64, from whole logits."""
    nats = 0.0
    for batch in batches:
        log_probs = model.double().eval()(input_ids=batch.input_ids, use_cache=False).logits.log_softmax(-1)
        for i, labels in enumerate(batch.labels):
            for t in range(1, len(labels)):
                if labels[t] != IGNORE_INDEX:
                    nats -= log_probs[i, t - 1, labels[t]].item()
    return nats


@pytest.mark.parametrize("name", MODELS)
def test_the_nats_of_tiles_are_those_of_whole_logits_in_float64(name):
    model, batches = MODELS[name](), [_batch(), _batch((2, 60), ragged=False)]
    found = evaluate(model, batches, 100, Precision(CPU, torch.float32, 1.0), **ONE_MB)
    assert found.num_tokens == sum(len(batch.targets) for batch in batches)
    assert found.nats == pytest.approx(_nats(model, batches), rel=2e-6)


def test_the_nats_of_each_group_come_from_the_same_pass_and_make_the_total():
    model, calls = _llama(), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    batches = []
    for batch in (_batch(), _batch((2, 60), ragged=False)):
        document = torch.arange(len(batch.targets)) // 17 % 4
        batches.append(dataclasses.replace(batch, groups=torch.stack([document, torch.full_like(document, 5)])))
    found = evaluate(model, batches, 100, Precision(CPU, torch.float32, 1.0), **ONE_MB, num_groups=6)
    num_calls = len(calls)
    plain = evaluate(model, batches, 100, Precision(CPU, torch.float32, 1.0), **ONE_MB)
    assert (found, plain.group_nats) == (plain, ())
    assert len(calls) == 2 * num_calls
    wanted = [0.0] * 5
    for batch in batches:
        with torch.no_grad():
            log_probs = model.double().eval()(input_ids=batch.input_ids).logits.log_softmax(-1).flatten(0, 1)
        for at, target, number in zip(batch.positions, batch.targets, batch.groups[0], strict=True):
            wanted[int(number)] -= log_probs[at, target].item()
    assert found.group_nats[:5] == pytest.approx(wanted, rel=2e-6)
    assert found.group_nats[4] == 0.0
    assert sum(found.group_nats[:4]) == pytest.approx(found.nats, rel=1e-12)
    assert found.group_nats[5] == pytest.approx(found.nats, rel=1e-12)  # of a second group that each target is in


def test_a_float16_teacher_has_the_loss_of_its_own_logits():
    model, batch = _llama().half(), _batch()
    precision = Precision(CPU, torch.float16, 1.0)
    found = evaluate(model, [batch], 100, precision, **ONE_MB)
    with torch.no_grad(), precision.autocast():
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1)[batch.positions].double(), batch.targets, reduction="sum"
    )
    assert logits.dtype is torch.float16
    assert found.nats == pytest.approx(wanted.item(), rel=1e-6)


class _Largest(TorchDispatchMode):
    """The size of the largest tensor."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count = max([self.count, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("workspace_mb", [1, 2])
def test_no_tensor_of_an_evaluation_exceeds_the_workspace_or_the_head(workspace_mb):
    model, batch, precision = _llama(), _batch((8, 64), ragged=False), Precision(CPU, torch.float32, 1.0)
    heads = LMHeads(precision)
    heads.of(model)
    with _Largest() as largest:
        evaluate(model, [batch], 100, precision, heads=heads, workspace_mb=workspace_mb)
    workspace = workspace_mb * 2**20 / 4
    assert largest.count <= 1.02 * workspace < len(batch.positions) * VOCAB / 5  # see `positions_per_tile`


def test_an_lm_head_with_a_forward_hook_is_called():
    model, seen = _llama(), []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    evaluate(model, [_batch()], 100, Precision(CPU, torch.float32, 1.0))
    assert len(seen) == 2  # once to verify it


def test_a_batch_without_targets_adds_nothing():
    model, batch = _llama(), _batch()
    none = TokenBatch(batch.input_ids, batch.labels, batch.positions[:0], batch.targets[:0])
    precision = Precision(CPU, torch.float32, 1.0)
    both, one = (evaluate(model, batches, 100, precision).nats for batches in ([batch, none], [batch]))
    assert both == one


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_nonfinite_logit_makes_the_perplexity_nan(value):
    model = _llama()
    model.lm_head.weight.data[17] = value
    assert math.isnan(evaluate(model, [_batch()], 100, Precision(CPU, torch.float32, 1.0), **ONE_MB).perplexity)


def test_the_share_of_saturated_logits_is_that_of_whole_logits():
    model, batch, precision = _llama(), _batch((1, 40)), Precision(CPU, torch.float32, 1.0)

    class Validation:
        def token_batches(self, which, batch_size):
            yield batch

    loss = LossConfig(logit_clamp=0.7, loss_workspace_mb=1)
    models = Models(None, model, None, False)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
    wanted = (logits.abs() > 0.7).double().mean().item()
    assert 0.01 < wanted < 0.99
    assert _saturated_share(models, Validation(), precision, loss, None) == pytest.approx(wanted, abs=1e-4)
