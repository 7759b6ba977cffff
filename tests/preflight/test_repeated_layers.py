"""Layers that are not run change no phase of a plan."""

import pytest
import torch
import transformers

from sar_kd.config.presets import MODES
from sar_kd.config.runs import Config
from sar_kd.models.memory_saving import layers_of
from sar_kd.preflight import memory_plan, repeated_layers
from sar_kd.preflight.dry_run import dry_run
from sar_kd.preflight.memory_plan import plan
from tests.helpers.cut_models import CONFIGS

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
DEPTH = 8


def _models(family: str) -> dict:
    kind, settings = CONFIGS[family]
    depth = dict.fromkeys({"num_hidden_layers", "n_layer"} & settings.keys(), DEPTH)
    windows = {"layer_types": (settings["layer_types"] * 2)[:DEPTH]} if "layer_types" in settings else {}
    config = getattr(transformers, kind)(vocab_size=500, **{**settings, **depth, **windows})
    with torch.device("meta"):
        return {role: transformers.AutoModelForCausalLM.from_config(config) for role in ("teacher", "student")}


def _config(**flags) -> Config:
    values = {"per_device_batch_size": 4, "block_size": 64, "device": "cpu", **flags}
    return Config.from_options({**MODES["balanced"], **values}, "balanced")


@pytest.mark.parametrize(
    ("family", "dtype", "flags"),
    [
        ("llama", torch.float16, {"gradient_checkpointing": True, "grad_accum_steps": 2}),
        ("llama", torch.float16, {"lora_rank": 4}),
        ("gemma3", torch.float32, {}),  # windows in every other layer
        ("gpt2", torch.float16, {"teacher_quantization": "nf4"}),
        ("qwen3_moe", torch.float32, {"routing": "all"}),
    ],
)
def test_every_phase_is_as_large_as_with_all_layers(family, dtype, flags):
    models, config = _models(family), _config(**flags)
    short, whole = (dry_run(config, models, CPU, dtype, runs_every_layer=every) for every in (False, True))
    for one, other in zip(short, whole, strict=True):
        assert one.name == other.name
        assert one.total == pytest.approx(other.total, rel=0.02)
        for category in ("teacher", "student", "gradients", "optimizer"):
            assert one.bytes[category] == pytest.approx(other.bytes[category], rel=0.01, abs=20_000)


def test_of_layers_that_are_alike_three_are_run_in_each_forward(monkeypatch):
    models, ran = _models("llama"), []
    run = transformers.models.llama.modeling_llama.LlamaAttention.forward
    monkeypatch.setattr(
        transformers.models.llama.modeling_llama.LlamaAttention,
        "forward",
        lambda self, *args, **kwargs: (ran.append(self.layer_idx), run(self, *args, **kwargs))[1],
    )
    assert len(layers_of(models["student"])) == DEPTH
    plan(_config(), models, CPU, torch.float32)
    assert set(ran) == {0, 1, DEPTH - 1}


def test_layers_that_fail_one_without_the_other_are_all_run(monkeypatch):
    def fail(*args):
        raise KeyError("states of the layer before")

    models = _models("llama")
    expected = plan(_config(), models, CPU, torch.float32).peak
    monkeypatch.setattr(repeated_layers._Calls, "run", fail)
    assert memory_plan.plan(_config(), models, CPU, torch.float32).peak.total == pytest.approx(expected.total, rel=0.01)
