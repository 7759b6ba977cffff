"""The table of what fits a card: the shapes are the published ones, and its rows are plans."""

import importlib.util
from pathlib import Path

import pytest
import torch

from sar_kd.config.presets import MODES
from sar_kd.config.runs import Config
from sar_kd.preflight.memory_plan import plan

pytestmark = pytest.mark.slow

PATH = Path(__file__).parent.parent.parent / "benchmarks" / "fit_table.py"


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location("fit_table", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_shapes_have_the_published_number_of_parameters(table):
    for name, (_, _, billions) in table.MODELS.items():
        count = sum(parameter.numel() for parameter in table.model(name).parameters())
        assert count / 1e9 == pytest.approx(billions, abs=0.001), name


def test_an_adapter_of_qwen3_1_7b_fits_a_t4_under_a_4_bit_teacher_of_8_billion_and_all_weights_do_not(table):
    with table.card():
        adapter = table.plan_of("Qwen3-1.7B", "Qwen3-8B", 512, "adapter", "4 bits")
        assert adapter.available == int(14.7 * 2**30)
        assert adapter.verdict == "fits"
        assert table.plan_of("Qwen3-1.7B", "Qwen3-8B", 512, "adapter over nf4", "4 bits").needed < adapter.needed
        weights = sum(parameter.numel() for parameter in table.model("Qwen3-1.7B").parameters())
        assert 16 * weights > adapter.available


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adafactor"])
def test_another_optimizer_changes_a_plan_as_planning_with_it_does(table, monkeypatch, optimizer):
    small = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 2, "num_key_value_heads": 2}
    shape = ("LlamaConfig", {**small, "num_hidden_layers": 2, "vocab_size": 5000}, 0.0)
    monkeypatch.setitem(table.MODELS, "small", shape)
    models, cpu = {"student": table.model("small"), "teacher": table.model("small")}, torch.device("cpu")

    def planned(name: str):
        values = {"block_size": 64, "device": "cpu", "optimizer": name}
        return plan(Config.from_options({**MODES["balanced"], **values}, "balanced"), models, cpu, torch.float32)

    changed, expected = table.with_optimizer(planned("adamw"), "small", optimizer), planned(optimizer)
    for one, other in zip(changed.phases, expected.phases, strict=True):
        if one.name != "update" or optimizer == "adafactor":  # on a CPU bitsandbytes holds more than on a GPU
            assert one.bytes == other.bytes
