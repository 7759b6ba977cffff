"""The replay of a model that is not finite: the first module, its reach in float32 against float64, the remedy."""

import copy
import math

import pytest
import torch

from sar_kd.data.batch import TokenBatch, next_token_targets
from sar_kd.errors import UsageError
from sar_kd.evaluation.nonfinite import check_finite, module_in_words, replay
from sar_kd.evaluation.perplexity import evaluate
from sar_kd.runtime.precision import Precision
from tests.stress.harness import break_on_token

CPU = torch.device("cpu")
HALF, FLOAT32 = Precision(CPU, torch.float16, 1.0), Precision(CPU, torch.float32, 1.0)
IDS = torch.arange(3, 43).view(2, 20)
RESIDUAL, PRODUCT = "model.layers.1", "model.layers.1.mlp.down_proj"


def _batch(ids=IDS) -> TokenBatch:
    return TokenBatch(ids, ids, *next_token_targets(ids))


def _loud(make_student, module):
    """Two blocks that add 4e4 each to the residual stream, or one whose last product leaves float16's range."""
    model = make_student(mlp_bias=True).eval()
    for layer in model.model.layers:
        layer.mlp.down_proj.bias.data.zero_()
        layer.mlp.down_proj.bias.data[0] = 4e4 if module == RESIDUAL else 0.0
    if module == PRODUCT:
        model.model.layers[1].mlp.up_proj.weight.data.mul_(300.0)
        model.model.layers[1].mlp.down_proj.weight.data[0] = 3e4
    return model


def _largest_in_float64(model, name) -> float:
    """The largest output of a module, all of the model in float64."""
    seen: list[torch.Tensor] = []
    exact = copy.deepcopy(model).double()
    watch = exact.get_submodule(name).register_forward_hook
    with watch(lambda m, i, o: seen.append(o[0] if isinstance(o, tuple) else o)), torch.no_grad():
        exact(input_ids=IDS)
    return seen[0].abs().max().item()


@pytest.mark.parametrize(("module", "half_weights"), [(RESIDUAL, True), (PRODUCT, True), (PRODUCT, False)])
def test_the_module_that_leaves_float16_and_its_reach_are_those_of_float64(make_student, module, half_weights):
    model = _loud(make_student, module)
    model.model.layers[1].mlp.down_proj.weight.data.clamp_(-6e4, 6e4)
    model = model.half() if half_weights else model
    largest = _largest_in_float64(model, module)
    assert largest > 65504
    found, logits, _ = replay(model, IDS, HALF)
    first = found["first_bad_module"]
    assert not logits.isfinite().all()
    assert (first["name"], found["verdict"], found["finite_in_float32"]) == (module, "fp16 range", True)
    assert first["largest_output_float32"] == pytest.approx(largest, rel=2e-2)
    assert f"is {module} ({first['kind']}): in float32 its output reaches " in module_in_words(found)
    assert "--model_dtype float32" in found["remedy"]


@pytest.mark.parametrize("half_weights", [True, False])
def test_a_weight_and_an_input_that_are_not_finite_are_not_blamed_on_float16(make_student, half_weights):
    for spoil, verdict in (
        (lambda model: model.model.layers[0].mlp.up_proj.weight.data[0].fill_(math.nan), "weights"),
        (lambda model: break_on_token(model, 7), "weights or data"),
    ):
        model = make_student().eval()
        spoil(model)
        found, _, _ = replay(model.half() if half_weights else model, IDS, HALF)
        assert (found["verdict"], found["finite_in_float32"]) == (verdict, False)
        assert "float32 its output reaches" not in module_in_words(found)


def test_quantized_weights_are_not_replayed_and_said_to_be_so(make_student):
    class Quantized(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2, dtype=torch.uint8), requires_grad=False)

        def forward(self, states):
            return states[..., :32] * math.inf

    model = make_student().eval()
    model.model.layers[0].mlp.down_proj = Quantized()
    found, _, _ = replay(model, torch.arange(3, 43).view(2, 20), HALF)
    assert (found["verdict"], found["finite_in_float32"]) == ("quantized", None)
    assert "without --teacher_quantization" in found["remedy"]


def test_a_model_that_is_finite_is_not_replayed(make_student):
    model = make_student().eval()
    model.register_forward_hook(lambda *_: pytest.fail("replayed"))
    assert check_finite("--teacher_model a", 0.0, 0.0, HALF, model, [_batch()]) == []


def test_above_the_limit_it_is_one_line_with_share_module_value_and_remedy_below_it_a_warning(make_student):
    model = _loud(make_student, RESIDUAL).half()
    finite = make_student().eval().half()
    seen = []
    finite.register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(UsageError) as error:
        check_finite("--teacher_model a", 0.75, 0.5, HALF, model, [_batch()])
    parts = "--teacher_model a: ", "75.0% of the held-out text", "float16", RESIDUAL, "8e+04", "65504", "--model_dtype"
    assert all(part in str(error.value) for part in parts)
    assert "\n" not in str(error.value)
    (line,) = check_finite("--teacher_model a", 0.5, 0.5, HALF, model, [_batch()])
    assert line.startswith("Warning: --teacher_model a: its logits are not finite at 50.0% of the held-out text")


def test_the_first_batch_that_is_not_finite_is_the_one_that_is_described(make_student):
    model = make_student().eval()
    break_on_token(model, 7)
    batches = [_batch(IDS[1:]), _batch(IDS[:1])]
    (line,) = check_finite("--student_model a", 0.1, 0.5, FLOAT32, model, batches)
    assert "model.embed_tokens (Embedding)" in line
    assert "in float32. " in line


def test_a_model_that_is_not_replayed_has_the_remedy_of_its_kind():
    with pytest.raises(UsageError, match="make it again, with --model_dtype float32"):
        check_finite("--teacher_cache a", 1.0, 0.5, HALF, None, [], "cache")
    with pytest.raises(UsageError, match="--parallel ddp"):
        check_finite("--student_model a", 1.0, 0.0, HALF, None)


# What is counted


def test_the_positions_that_are_not_finite_are_counted_and_the_rest_is_not_taken_for_all(make_student):
    model = make_student().eval()
    break_on_token(model, 7)  # in the first block only
    with torch.no_grad():
        logits = model(input_ids=IDS).logits[:, :-1]
    bad = (~logits.isfinite().all(-1)).sum().item()
    found = evaluate(model, [_batch()], 100, FLOAT32)
    assert (found.num_nonfinite, found.num_masked, found.num_tokens) == (bad, 0, 38)
    assert 0 < bad <= 19
    assert math.isnan(found.perplexity)
    assert found.metrics()["val_nonfinite"] == bad / 38
    assert "val_nonfinite" not in evaluate(make_student().eval(), [_batch()], 100, FLOAT32).metrics()


def test_a_token_that_the_model_masks_is_counted_apart_from_what_is_not_finite(make_student):
    model = make_student().eval()

    def mask(module, inputs, output):
        output[..., 9] = -math.inf
        return output

    model.lm_head.register_forward_hook(mask)
    found = evaluate(model, [_batch()], 100, FLOAT32)
    assert (found.num_nonfinite, found.num_masked) == (0, 1)
    assert found.perplexity == math.inf
    assert found.metrics()["val_masked"] == 1 / 38


def test_a_loss_beyond_what_exp_holds_is_finite(make_student):
    model = make_student().eval()
    model.lm_head.weight.data.mul_(3e5)
    found = evaluate(model, [_batch()], 100, FLOAT32)
    assert found.perplexity == math.inf
    assert math.isfinite(found.loss)
    assert (found.num_nonfinite, found.num_masked) == (0, 0)
