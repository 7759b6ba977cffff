"""Replaced routing: equal to its definition and to the models' own top_k, and removed without a trace."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sar_kd.errors import UsageError
from sar_kd.teacher.moe import discovery
from sar_kd.teacher.moe.discovery import Gate, find_routers
from sar_kd.teacher.moe.routing_hooks import Routing, verify, weights_of
from tests.helpers.moe_models import CAUSAL, EXPERTS, make_causal

EVERY = pytest.mark.parametrize("architecture", sorted(CAUSAL))
SWITCHED = pytest.mark.parametrize("architecture", sorted(set(CAUSAL) - {"phimoe"}))  # its two slots are hard-wired
IDS = torch.arange(3, 23).view(2, 10)


def _logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def _outputs(specs, run):
    """The outputs of the routers while `run` runs, by name."""
    outputs = {}

    def hook_of(name):
        return lambda module, args, output: outputs.__setitem__(name, output)

    handles = [spec.module.register_forward_hook(hook_of(spec.name)) for spec in specs]
    run()
    for handle in handles:
        handle.remove()
    return outputs


@SWITCHED
def test_all_equals_the_model_with_top_k_set_to_all_experts(architecture):
    model, switched = make_causal(architecture), make_causal(architecture)
    with Routing(model, find_routers(model), "all"):
        logits = _logits(model)
    for spec in find_routers(switched):
        (spec.block if architecture == "dbrx" else spec.module).top_k = EXPERTS
        if hasattr(spec.module, "topk_group"):
            spec.module.topk_group = spec.module.num_group
    assert (logits - _logits(switched)).abs().max() < 1e-5
    assert (logits - _logits(make_causal(architecture))).abs().max() > 1e-5


def test_setting_the_config_after_construction_does_nothing():
    model = make_causal("mixtral")
    before = _logits(model)
    model.config.num_experts_per_tok = EXPERTS
    assert torch.equal(_logits(model), before)


@EVERY
@pytest.mark.parametrize("mode", ["all", "ka"])
def test_leaving_restores_every_bit(architecture, mode):
    model = make_causal(architecture)
    before, state = _logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    with Routing(model, find_routers(model), mode) as routing:
        assert not torch.equal(_logits(model), before)
        with routing.using("native"):
            assert torch.equal(_logits(model), before)
        assert not torch.equal(_logits(model), before)
    assert torch.equal(_logits(model), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_error_inside_restores_too():
    model = make_causal("dbrx")
    before = _logits(model)
    with pytest.raises(ZeroDivisionError), Routing(model, find_routers(model), "all"):
        raise ZeroDivisionError
    assert torch.equal(_logits(model), before)


@pytest.mark.parametrize("architecture", ["mixtral", "olmoe", "deepseek_v3", "gpt_oss", "phimoe", "jamba"])
def test_the_weights_of_all_are_the_probabilities_of_all_experts(architecture):
    model = make_causal(architecture)
    specs = find_routers(model)
    with Routing(model, specs, "all") as routing:
        outputs = _outputs(specs, lambda: _logits(model))
        recorded = routing.logits
    for spec, logits in zip(specs, recorded, strict=True):
        _, weights, indices = outputs[spec.name]
        wide = logits.double()
        scores = wide.sigmoid() if architecture == "deepseek_v3" else wide.exp()
        scale = {"deepseek_v3": 2.5, "phimoe": 2.0}.get(architecture, 1.0)
        expected = scale * scores / scores.sum(-1, keepdim=True)
        assert indices.tolist() == [list(range(EXPERTS))] * IDS.numel()
        torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["mixtral", "olmoe", "deepseek_v3", "gpt_oss", "minimax_m2", "jamba"])
def test_the_formula_reproduces_the_models_own_weights(architecture):
    model = make_causal(architecture)
    specs = find_routers(model)
    for spec in specs:
        logits, weights, indices = _outputs(specs, lambda: _logits(model))[spec.name]
        torch.testing.assert_close(weights_of(spec.gate, logits, indices), weights, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_the_weights_is_that_of_their_definition():
    logits = torch.randn(5, EXPERTS, dtype=torch.float64, requires_grad=True)
    some = torch.tensor([[0, 2, 3]]).expand(5, -1)
    for gate in (Gate("softmax", True), Gate("softmax", False), Gate("sigmoid", True, scale=2.5)):
        for indices in (None, some):
            assert torch.autograd.gradcheck(lambda z, g=gate, i=indices: weights_of(g, z, i), (logits,))


# One expert dropped


def _dropped(model, specs, routing):
    outputs = _outputs(specs, lambda: _logits(model))
    return [set(range(EXPERTS)) - set(row) for spec in specs for row in outputs[spec.name][2].tolist()], routing.logits


def test_ka_without_chance_drops_the_smallest_logit():
    model = make_causal("mixtral")
    specs = find_routers(model)
    with Routing(model, specs, "ka", ka_lambda=0.0) as routing:
        dropped, logits = _dropped(model, specs, routing)
    assert dropped == [{int(row.argmin())} for router in logits for row in router]


def test_ka_weights_are_a_softmax_over_the_others():
    model = make_causal("olmoe")  # whose own weights are not normalised
    specs = find_routers(model)
    with Routing(model, specs, "ka") as routing:
        outputs = _outputs(specs, lambda: _logits(model))
        logits = routing.logits
    for spec, router in zip(specs, logits, strict=True):
        _, weights, indices = outputs[spec.name]
        torch.testing.assert_close(weights, router.gather(1, indices).softmax(-1), rtol=1e-5, atol=1e-6)


def test_ka_draws_the_others_from_the_gates_distribution_without_replacement():
    model = make_causal("mixtral")
    logits = torch.tensor([[2.0, 1.0, 0.0, 0.5]])
    routing = Routing(model, find_routers(model), "ka", ka_lambda=1.0)
    counts = torch.bincount(routing._draw(logits.expand(40000, -1)), minlength=EXPERTS) / 40000
    p = logits[0].double().softmax(-1)
    expected = torch.zeros(EXPERTS, dtype=torch.float64)
    for a in range(EXPERTS):  # the last of a draw of all of them, one after the other
        for b in set(range(EXPERTS)) - {a}:
            for c in set(range(EXPERTS)) - {a, b}:
                (last,) = set(range(EXPERTS)) - {a, b, c}
                expected[last] += p[a] * p[b] / (1 - p[a]) * p[c] / (1 - p[a] - p[b])
    torch.testing.assert_close(counts.double(), expected, rtol=0, atol=0.01)


def test_ka_lambda_is_the_share_of_tokens_that_are_drawn():
    model = make_causal("mixtral")
    routing = Routing(model, find_routers(model), "ka", ka_lambda=0.25)
    logits = torch.zeros(40000, EXPERTS)
    logits[:, 0] = -1e-3  # a hair below the others: by rank always left out, by a draw once in four
    share = (routing._draw(logits) == 0).float().mean().item()
    assert share == pytest.approx(0.75 + 0.25 * 0.25, abs=0.01)


def test_ka_repeats_its_choices_when_a_layer_is_recomputed_and_draws_again_in_the_next_forward():
    model = make_causal("mixtral")
    specs = find_routers(model)
    for spec in specs:
        spec.module.weight.requires_grad_(True)

    def gradients(recomputes):
        layers = model.model.layers
        plain = [layer.forward for layer in layers]
        if recomputes:
            for layer, forward in zip(layers, plain, strict=True):
                layer.forward = lambda *a, f=forward, **k: checkpoint(f, *a, use_reentrant=False, **k)
        with Routing(model, specs, "ka", ka_lambda=1.0, seed=5):
            model(input_ids=IDS, use_cache=False).logits.square().sum().backward()
        for layer in layers:
            layer.__dict__.pop("forward", None)
        found = [spec.module.weight.grad.clone() for spec in specs]
        model.zero_grad()
        return found

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))
    with Routing(model, specs, "ka", ka_lambda=1.0) as routing:
        first, second = (_dropped(model, specs, routing)[0] for _ in range(2))
    assert first != second


def test_the_draws_continue_from_a_saved_state():
    model = make_causal("mixtral")
    with Routing(model, find_routers(model), "ka", ka_lambda=1.0) as routing:
        _logits(model)
        state = routing.state_dict()
        expected = _logits(model)
        routing.load_state_dict(state)
        assert torch.equal(_logits(model), expected)


def test_the_draws_leave_the_global_generator_alone():
    model = make_causal("mixtral")
    before = torch.get_rng_state()
    with Routing(model, find_routers(model), "ka", ka_lambda=1.0):
        _logits(model)
    assert torch.equal(torch.get_rng_state(), before)


# Gradients, and where there are none


def _router_gradients(model, mode):
    specs = find_routers(model)
    for spec in specs:
        for parameter in spec.parameters.values():
            parameter.requires_grad_(True)
    with Routing(model, specs, mode):
        model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    return [parameter.grad for spec in specs for parameter in spec.parameters.values()]


@EVERY
def test_every_expert_of_every_router_has_a_gradient_in_all(architecture):
    for gradient in _router_gradients(make_causal(architecture), "all"):
        rows = gradient.flatten(1).norm(dim=1) if gradient.ndim == 2 else gradient.abs()
        assert (rows > 1e-9).all()


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "granitemoe", "deepseek_v3"])
def test_one_normalised_expert_gives_its_router_no_gradient_natively_and_one_in_all(architecture):
    native, every = (
        max(g.abs().max().item() for g in _router_gradients(make_causal(architecture, num_experts_per_tok=1), mode))
        for mode in ("native", "all")
    )
    assert native < 1e-9
    assert every > 1e-7


def test_the_recorded_logits_carry_the_graph():
    model = make_causal("mixtral")
    specs = find_routers(model)
    specs[0].module.weight.requires_grad_(True)
    with Routing(model, specs, "all") as routing:
        model(input_ids=IDS, use_cache=False)
        assert routing.logits[0].shape == (IDS.numel(), EXPERTS)
        routing.logits[0].sum().backward()
    assert specs[0].module.weight.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_keep_their_dtypes(dtype):
    model = make_causal("qwen3_moe").to(dtype)
    specs = find_routers(model)
    native = _outputs(specs, lambda: _logits(model))
    with Routing(model, specs, "all"):
        routed = _outputs(specs, lambda: _logits(model))
    for spec in specs:
        assert [part.dtype for part in routed[spec.name]] == [part.dtype for part in native[spec.name]]


# Verified before a run


RECOGNISED = sorted(set(CAUSAL) - {"phimoe", "llama4", "dbrx"})


@pytest.mark.parametrize("architecture", RECOGNISED)
def test_an_unknown_routers_gate_is_recognised_by_its_output(architecture, monkeypatch):
    model = make_causal(architecture)
    known = find_routers(model)
    monkeypatch.setattr(discovery, "REGISTRY", {})
    specs = find_routers(model)
    assert {spec.gate.score for spec in specs} == {"unknown"}
    found = verify(specs, lambda: _logits(model))
    assert [spec.gate for spec in found] == [spec.gate for spec in known]


@pytest.mark.parametrize("architecture", ["phimoe", "llama4"])
def test_an_unknown_router_of_no_known_kind_is_refused(architecture, monkeypatch):
    model = make_causal(architecture)
    monkeypatch.setattr(discovery, "REGISTRY", {})
    with pytest.raises(UsageError, match="use --routing native"):
        verify(find_routers(model), lambda: _logits(model))


def test_a_router_that_returns_probabilities_as_logits_is_refused(monkeypatch):
    model = make_causal("mixtral")
    kind = type(model.model.layers[0].mlp.gate)
    plain = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: (plain(self, x)[0].softmax(-1), *plain(self, x)[1:]))
    with pytest.raises(UsageError, match=r"returns probabilities as its logits.*use transformers 5.6 or later"):
        verify(find_routers(model), lambda: _logits(model))


def test_a_router_that_does_not_run_is_refused():
    model = make_causal("mixtral")
    specs = find_routers(model)
    with pytest.raises(UsageError, match="takes no part in a forward"):
        verify(specs, lambda: model.model.embed_tokens(IDS))


def test_verifying_leaves_no_hook():
    model = make_causal("mixtral")
    assert verify(specs := find_routers(model), lambda: _logits(model)) == specs
    assert not any(isinstance(m, nn.Module) and m._forward_hooks for m in model.modules())
