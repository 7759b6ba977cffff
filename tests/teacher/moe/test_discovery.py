"""Finding routers: on every architecture by name and by structure, and refusals with their reason."""

import json

import pytest
import torch
from torch import nn

from sar_kd.commands.main import main
from sar_kd.errors import UsageError
from sar_kd.teacher.moe import discovery
from sar_kd.teacher.moe.discovery import describe_routers, find_routers, require_routers, router_parameters
from tests.helpers.moe_models import (
    CAUSAL,
    EXPERTS,
    NATIVE_ONLY,
    make_causal,
    make_dense,
    make_encoder_decoder,
    router_names,
)

EVERY = pytest.mark.parametrize("architecture", sorted(CAUSAL))


@EVERY
def test_routers_are_found_by_their_exact_names(architecture):
    specs = find_routers(make_causal(architecture))
    assert [spec.name for spec in specs] == router_names(architecture)
    assert {spec.found_by for spec in specs} == {"class"}
    assert {spec.num_experts for spec in specs} == {EXPERTS}
    assert {spec.top_k for spec in specs} == {1 if architecture == "llama4" else 2}


@EVERY
def test_only_the_routers_weight_and_bias_are_trainable(architecture):
    model = make_causal(architecture)
    expected = {f"{name}.{key}" for name in router_names(architecture) for key in CAUSAL[architecture][4]}
    found = router_parameters(find_routers(model))
    assert set(found) == expected
    assert all(found[name] is model.get_parameter(name) for name in expected)


@EVERY
def test_structure_alone_finds_the_same_routers(architecture, monkeypatch):
    monkeypatch.setattr(discovery, "REGISTRY", {})
    specs = find_routers(make_causal(architecture))
    assert [spec.name for spec in specs] == router_names(architecture)
    assert {spec.found_by for spec in specs} == {"structure"}


@pytest.mark.parametrize("architecture", sorted(NATIVE_ONLY))
def test_routers_with_capacities_are_found_and_left_to_their_own_routing(architecture):
    model = make_encoder_decoder(architecture)
    specs = find_routers(model)
    assert tuple(spec.name for spec in specs) == NATIVE_ONLY[architecture]
    assert set(router_parameters(specs)) == {f"{name}.classifier.weight" for name in NATIVE_ONLY[architecture]}
    for routing in ("all", "sar", "ka"):
        with pytest.raises(UsageError, match=f"--routing {routing}: .* allows no routing but its own"):
            require_routers(model, specs, routing, trains_natively=False)


def test_a_dense_model_has_none_and_is_refused():
    model = make_dense()
    assert find_routers(model) == []
    with pytest.raises(UsageError, match="--routing sar: the teacher is dense, it has no routers; use --routing nat"):
        require_routers(model, [], "sar", trains_natively=False)


def test_a_config_with_experts_but_no_router_in_sight_is_not_called_dense():
    model = make_dense()
    model.config.num_local_experts = 8
    with pytest.raises(UsageError, match=r"config names 8 experts.*--router_patterns"):
        require_routers(model, [], "sar", trains_natively=False)


@pytest.mark.parametrize(
    ("architecture", "pattern", "reason"),
    [
        ("mixtral", r"model\.layers\.\d\.mlp", "cannot be a router of 4 experts"),
        ("qwen2_moe", r".*\.shared_expert_gate", "'shared_expert_gate' names a feed-forward"),
        ("qwen2_moe", r".*\.shared_expert\.gate_proj", "is no router"),
        ("mixtral", r".*\.q_proj", "'q_proj' names a feed-forward, attention"),
        ("ernie4_5_moe", r".*\.moe_statics", "cannot be a router of"),
        ("mixtral", r".*\.input_layernorm", "cannot be a router of 4 experts"),
        ("mixtral", r".*\.nothing", "matches the full name of no module"),
        ("mixtral", r"mlp\.gate", "matches the full name of no module"),
        ("mixtral", "(", "is no regular expression"),
        ("mixtral", r"model\.layers\.0\.mlp\.gate", "no router found for 1 of 2 blocks.*model.layers.1.mlp"),
    ],
)
def test_patterns_that_choose_something_else_are_refused(architecture, pattern, reason):
    with pytest.raises(UsageError, match=reason):
        find_routers(make_causal(architecture), (pattern,))


def test_patterns_that_choose_the_routers_find_them():
    specs = find_routers(make_causal("mixtral"), (r"model\.layers\.\d+\.mlp\.gate",))
    assert [spec.name for spec in specs] == router_names("mixtral")
    assert {spec.found_by for spec in specs} == {"pattern"}


def test_a_dense_models_gate_proj_is_refused_by_name():
    with pytest.raises(UsageError, match="'gate_proj' names a feed-forward"):
        find_routers(make_dense(), (r".*\.gate_proj",))


def test_a_router_of_another_width_than_its_experts_is_refused():
    model = make_causal("mixtral")
    model.model.layers[1].mlp.gate.weight = nn.Parameter(torch.zeros(EXPERTS + 1, 32))
    with pytest.raises(UsageError, match=r"model.layers.1.mlp.gate \(weight \(5, 32\)\) cannot be a router of 4"):
        find_routers(model)


def test_routers_that_are_too_large_to_be_routers_are_refused(monkeypatch):
    monkeypatch.setattr(discovery, "MAX_PARAMETER_SHARE", 1e-4)
    with pytest.raises(UsageError, match="more than the 0% that a router can be"):
        find_routers(make_causal("mixtral"))


def test_two_routers_of_one_block_are_refused():
    model = make_causal("mixtral")
    model.model.layers[0].mlp.second = nn.Linear(32, EXPERTS)
    patterns = (r".*\.mlp\.gate", r".*\.mlp\.second")
    model.model.layers[0].mlp.second.top_k = 2
    with pytest.raises(UsageError, match=r"would both route model\.layers\.0\.mlp"):
        find_routers(model, patterns)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_next", "gpt_oss", "granitemoe", "deepseek_v3"])
def test_one_normalised_expert_is_refused_under_the_models_own_routing(architecture):
    model = make_causal(architecture, num_experts_per_tok=1)
    specs = find_routers(model)
    require_routers(model, specs, "sar", trains_natively=False)
    with pytest.raises(UsageError, match="its gradient is identically zero; use --sar_routing all"):
        require_routers(model, specs, "sar", trains_natively=True)


@pytest.mark.parametrize("architecture", ["olmoe", "jamba", "deepseek_v2", "llama4"])
def test_one_expert_that_keeps_its_probability_is_not(architecture):
    model = make_causal(architecture, num_experts_per_tok=1)
    require_routers(model, find_routers(model), "sar", trains_natively=True)


def test_the_command_lists_the_embedded_teachers_routers(capsys):
    assert main(["routers"]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.0.mlp.gate  Qwen3MoeTopKRouter  8x192    2 of 8" in shown
    assert "4 routers, 6,144 parameters" in shown
    assert main(["routers", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["name"] for record in records] == [f"model.layers.{layer}.mlp.gate" for layer in range(4)]


def test_the_command_reads_no_weights(tmp_path, capsys):
    make_causal("olmoe").config.save_pretrained(tmp_path)
    assert main(["routers", "--model", str(tmp_path)]) == 0
    assert "OlmoeTopKRouter" in capsys.readouterr().out


def test_the_command_shows_a_dense_model_and_a_router_without_gradient(tmp_path, capsys):
    make_dense().config.save_pretrained(tmp_path)
    assert main(["routers", "--model", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "Dense: no routers\n"
    make_causal("mixtral", num_experts_per_tok=1).config.save_pretrained(tmp_path)
    main(["routers", "--model", str(tmp_path)])
    assert "2 of them have no gradient in the native routing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--model", "./nowhere"], "error: --model ./nowhere: no such directory"),
        (["--modle", "x"], "error: --modle: no such option; did you mean --model?"),
        (["--model", ""], "error: --model '': give a directory or a hub id"),
    ],
)
def test_the_command_refuses_a_mistake_in_one_line(argv, line, capsys):
    assert main(["routers", *argv]) == 2
    assert capsys.readouterr().err == f"{line}\n"


def test_the_records_are_plain_values():
    records = describe_routers(find_routers(make_causal("deepseek_v3")))
    assert json.loads(json.dumps(records)) == records
    assert records[0] | {"name": "", "shapes": {}} == {
        "name": "", "class": "DeepseekV3TopkRouter", "shapes": {}, "num_experts": 4, "top_k": 2, "score": "sigmoid",
        "normalised": True, "scale": 2.5, "routing": "any", "native_gradient": True, "found_by": "class",
        "trainable": 128,
    }  # fmt: skip
