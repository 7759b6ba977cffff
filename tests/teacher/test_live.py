"""Whole runs with a mixture-of-experts teacher: its routing, the router update, alarms, and resuming."""

import copy

import pytest
import torch
import transformers

from sar_kd.data.dataset import Dataset
from sar_kd.errors import UsageError
from sar_kd.teacher import live
from sar_kd.teacher.moe import router_metrics
from sar_kd.teacher.moe.discovery import find_routers, router_parameters
from sar_kd.teacher.moe.router_checkpoint import (
    hash_frozen,
    hash_rounded,
    hash_routers,
    load_router_update,
    read_router_update,
    save_router_update,
)
from sar_kd.teacher.moe.router_metrics import find_alarms
from sar_kd.teacher.moe.routing_hooks import Routing
from sar_kd.training import trainer
from tests.helpers.runs import (
    argv_of,
    assert_equal_runs,
    assert_refused,
    inputs,
    interrupting,
    latest_checkpoint,
    read_json,
    read_metrics,
    read_weights,
    run_script,
)

pytestmark = pytest.mark.slow

__all__ = ["inputs"]  # a fixture
IDS = torch.arange(3, 43).view(2, 20)
SAR = ("--routing", "sar", "--sar_routing", "all", "--router_lr", 1e-2)
ROUTER_KEYS = {"router_loss", "router_kl", "router_balance", "router_anchor", "router_entropy", "router_grad_norm"}


def _teacher(inputs, dtype=torch.float16, name="teacher"):
    return transformers.AutoModelForCausalLM.from_pretrained(inputs / name, dtype=dtype).eval()


def _routers_of(model):
    return {name: value.detach().clone() for name, value in router_parameters(find_routers(model)).items()}


def _logits(model, rule):
    with Routing(model, find_routers(model), rule), torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module", params=["two_stage", "joint"])
def finished(request, inputs, tmp_path_factory):
    """Four steps in float16 in which the routers learn: folder, stdout."""
    folder = tmp_path_factory.mktemp("sar") / request.param
    code, out, err = run_script(argv_of(inputs, folder, *SAR, "--sar_schedule", request.param, steps=4))
    assert (code, err) == (0, [])
    return folder, out


def test_a_run_shows_the_routing_and_the_teachers_perplexity(finished):
    _, out = finished
    (line,) = (line for line in out if line.startswith("Routing: sar; 1 routers of 4 experts, 2 of them"))
    assert "128 parameters learn" in line
    assert any(line.startswith("Step 2: Validation PPL") and "router entropy" in line for line in out)
    assert any("router_kl=" in line for line in out)
    assert any(line.strip().startswith("teacher, own routing, end") for line in out)


def test_the_run_log_has_the_routers_metrics(finished):
    folder, _ = finished
    steps, evaluations = read_metrics(folder, "step"), read_metrics(folder, "evaluation")
    assert all(record.keys() >= ROUTER_KEYS for record in steps)
    for record in steps:  # --log_steps 1: the effect of each is measured
        effect = record["router_effect"]
        assert set(effect) == {f"{kind}_kl_{when}" for kind in ("forward", "reverse") for when in ("before", "after")}
        assert effect["forward_kl_after"] != effect["forward_kl_before"] > 0
    assert steps[0]["router_anchor"] == 0.0 < steps[-1]["router_anchor"]
    for record in evaluations:
        assert 0 < record["router_entropy"] <= 1
        (usage,) = record["router_usage"].values()
        assert sum(usage) == pytest.approx(1.0, abs=1e-3)
        assert set(record["router_change"]) == {"model.layers.0.mlp.gate.weight"}
        assert {"teacher_val_ppl_native", "teacher_val_ppl_routed"} <= record.keys()


def test_the_effect_is_measured_at_log_steps_only(inputs, tmp_path):
    assert run_script(argv_of(inputs, tmp_path / "run", *SAR, "--log_steps", 2, steps=4))[0] == 0
    measured = [record["step"] for record in read_metrics(tmp_path / "run", "step") if "router_effect" in record]
    assert measured == [2, 4]


def test_the_summary_has_the_teacher_at_the_start_and_at_the_end(finished, inputs):
    folder, _ = finished
    summary, last = read_json(folder / "summary.json"), read_metrics(folder, "evaluation")[-1]
    assert (summary["routing"], summary["experts"]) == ("sar", "all")
    assert summary["router_final"]["router_entropy"] == last["router_entropy"]
    assert summary["router_final"]["teacher_val_ppl_routed"] != summary["router_start"]["teacher_val_ppl_routed"]
    assert summary["teacher_val_ppl"] == summary["router_start"]["teacher_val_ppl_native"]
    teacher = _teacher(inputs)
    assert summary["frozen_sha256"] == hash_frozen(teacher, _routers_of(teacher))


# The router update


def test_the_update_loads_into_the_same_teacher_and_changes_nothing_else_of_it(finished, inputs, tmp_path):
    folder, _ = finished
    teacher, plain = _teacher(inputs), _teacher(inputs)
    metadata = load_router_update(teacher, folder / "router_update.safetensors")
    assert metadata["base_model"] == str(inputs / "teacher")
    assert (metadata["dtype"], metadata["sar_routing"], metadata["step"]) == ("float16", "all", 4)
    learned, _ = read_router_update(folder / "router_update.safetensors")
    for name, value in teacher.state_dict().items():
        if name in learned:
            assert torch.equal(value, learned[name].half())
            assert not torch.equal(value, plain.state_dict()[name])
        else:
            assert torch.equal(value, plain.state_dict()[name])
    teacher.save_pretrained(tmp_path / "teacher")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.float16).eval()
    for rule in ("native", "all"):
        assert torch.equal(_logits(again, rule), _logits(teacher, rule))


@pytest.mark.parametrize("run_dtype", ["float16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_the_update_loads_into_the_same_teacher_in_another_dtype(inputs, tmp_path, run_dtype, dtype):
    trained = _teacher(inputs, getattr(torch, run_dtype))
    routers = {name: trained.state_dict()[name].float() for name in _routers_of(trained)}
    metadata = {
        "base_model": "it", "dtype": run_dtype, "frozen_sha256": hash_frozen(trained, routers),
        "initial_sha256": hash_routers(routers), "rounded_sha256": hash_rounded(trained, routers),
    }  # fmt: skip
    learned = {name: value + 1.0 for name, value in routers.items()}
    path = tmp_path / "router_update.safetensors"
    save_router_update(path, learned, metadata)
    teacher = _teacher(inputs, dtype)
    if (run_dtype, dtype) == ("float16", torch.bfloat16):
        with pytest.raises(UsageError, match=r"made in float16, .* load it in float16 or float32"):
            load_router_update(teacher, path)
        return
    load_router_update(teacher, path)
    assert all(torch.equal(teacher.state_dict()[name], value.to(dtype)) for name, value in learned.items())
    other = _teacher(inputs, dtype)
    other.get_output_embeddings().weight.data[0] += 1.0
    with pytest.raises(UsageError, match="another teacher"):
        load_router_update(other, path)
    with pytest.raises(UsageError, match="not those that it began with"):
        load_router_update(teacher, path)  # a second time


def test_a_float32_teacher_with_the_update_is_the_runs_own_to_the_bit(inputs, tmp_path):
    folder = tmp_path / "run"
    assert run_script(argv_of(inputs, folder, *SAR, "--model_dtype", "float32", steps=3))[0] == 0
    learned, _ = read_router_update(folder / "router_update.safetensors")
    state = torch.load(latest_checkpoint(folder) / "state.pt", weights_only=True)
    routers = state["teacher"]["router_trainer"]["parameters"]
    assert all(torch.equal(learned[name], routers[name]) for name in routers)
    teacher = _teacher(inputs, torch.float32)
    before = _logits(teacher, "all")
    load_router_update(teacher, folder / "router_update.safetensors")
    assert all(torch.equal(value, learned[name]) for name, value in _routers_of(teacher).items())
    assert not torch.equal(_logits(teacher, "all"), before)


def test_an_update_refuses_every_other_teacher_and_leaves_it_unchanged(finished, inputs, tmp_path):
    folder, _ = finished
    path = folder / "router_update.safetensors"
    other = _teacher(inputs)
    other.model.norm.weight.data[0] += 1.0
    rerouted = _teacher(inputs)
    next(iter(router_parameters(find_routers(rerouted)).values())).data.add_(1.0)
    cases = [
        (other, "made for another teacher; load "),
        (rerouted, "are not those that it began with"),
        (_teacher(inputs, name="dense_teacher"), "has no router model.layers.0.mlp.gate.weight"),
    ]
    for teacher, reason in cases:
        before = copy.deepcopy(teacher.state_dict())
        with pytest.raises(UsageError, match=reason):
            load_router_update(teacher, path)
        assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_file_that_is_no_update_is_refused(finished, inputs, tmp_path):
    folder, _ = finished
    with pytest.raises(UsageError, match="is no router update"):
        load_router_update(_teacher(inputs), folder / "student" / "model.safetensors")
    with pytest.raises(UsageError, match="cannot be read"):
        load_router_update(_teacher(inputs), tmp_path / "nothing")
    (tmp_path / "torn").write_bytes(b"torn")
    with pytest.raises(UsageError, match="cannot be read"):
        load_router_update(_teacher(inputs), tmp_path / "torn")


def test_an_update_is_written_atomically(tmp_path, monkeypatch):
    path = tmp_path / "router_update.safetensors"
    save_router_update(path, {"a": torch.ones(2)}, {"step": 1})
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(UsageError, match=r"cannot be written .*killed"):
        save_router_update(path, {"a": torch.zeros(2)}, {"step": 2})
    values, metadata = read_router_update(path)
    assert (values["a"].tolist(), metadata) == ([1.0, 1.0], {"step": 1})


def test_a_frozen_tensor_that_changes_stops_the_run_before_anything_is_saved(inputs, tmp_path, monkeypatch):
    plain = trainer.train_step

    def meddling(micro_batches, context):
        context.objective.teacher.model.norm.weight.data.add_(1e-2)
        return plain(micro_batches, context)

    monkeypatch.setattr(trainer, "train_step", meddling)
    code, _, err = run_script(argv_of(inputs, tmp_path / "run", *SAR))
    assert code == 3
    assert err[0].startswith("a frozen tensor of the teacher has changed during the run")
    assert not (tmp_path / "run" / "router_update.safetensors").exists()
    assert not (tmp_path / "run" / "checkpoint").exists()


# Resuming


@pytest.mark.parametrize(
    "routing",
    [
        (*SAR, "--sar_schedule", "two_stage"),
        (*SAR, "--sar_schedule", "joint", "--activation_checkpointing"),
        ("--routing", "sar", "--sar_routing", "native"),
        ("--routing", "ka", "--ka_lambda", 0.5),
    ],
    ids=["two_stage", "joint", "native", "ka"],
)
def test_a_resumed_run_equals_one_never_interrupted(inputs, tmp_path, monkeypatch, routing):
    straight, halved = tmp_path / "straight", tmp_path / "halved"
    assert run_script(argv_of(inputs, straight, *routing, steps=6))[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", interrupting(trainer.train_step, 3))
        assert run_script(argv_of(inputs, halved, *routing, steps=6))[0] == 130
    torch.manual_seed(99)
    assert run_script(["--resume", "--output_dir", str(halved)])[0] == 0
    assert_equal_runs(straight, halved)
    if "sar" in routing:
        updates = [read_weights(folder / "router_update.safetensors") for folder in (straight, halved)]
        assert all(torch.equal(value, updates[1][name]) for name, value in updates[0].items())


def test_a_run_cannot_go_on_with_another_teacher(inputs, tmp_path):
    folder = tmp_path / "run"
    assert run_script(argv_of(inputs, folder, *SAR, "--teacher_model", tmp_path / "teacher", steps=2))[0] == 2
    teacher, tokenizer = _teacher(inputs), transformers.AutoTokenizer.from_pretrained(inputs / "teacher")
    for model in (teacher, tokenizer):
        model.save_pretrained(tmp_path / "teacher")
    assert run_script(argv_of(inputs, folder, *SAR, "--teacher_model", tmp_path / "teacher", steps=2))[0] == 0
    teacher.model.norm.weight.data[0] += 1.0
    teacher.save_pretrained(tmp_path / "teacher")
    assert_refused(
        ["--resume", "--output_dir", folder, "--train_steps", 4], "the teacher is not the one that the run began with"
    )


# The choice of the routing


@pytest.mark.parametrize(
    ("more", "routing", "line"),
    [
        ((), "sar", "Routing: sar (--routing auto, because the teacher is a mixture of experts"),
        (
            ("--teacher_model", "dense_teacher"),
            "native",
            "Routing: native (--routing auto, because the teacher is dense",
        ),
        (
            ("--teacher_model", "dense_teacher", "--router_lr", 0.1, "--sar_schedule", "two_stage"),
            "native",
            "--sar_schedule, --router_lr: have no effect, as no router learns",
        ),
        (("--alpha_kd", 0), "native", "Routing: native (--routing auto, because distillation is off"),
        (
            ("--alignment", "hidden"),
            "native",
            "Routing: native (--routing auto, because --alignment hidden compares no",
        ),
    ],
)
def test_auto_is_sar_for_a_mixture_of_experts_and_shows_the_reason(inputs, tmp_path, more, routing, line):
    more = tuple(inputs / part if part == "dense_teacher" else part for part in more)
    code, out, _ = run_script(argv_of(inputs, tmp_path / "run", "--routing", "auto", *more, steps=1))
    assert code == 0
    assert sum(shown.startswith(line) for shown in out) == 1
    assert read_json(tmp_path / "run" / "summary.json")["routing"] == routing
    assert (tmp_path / "run" / "router_update.safetensors").exists() == (routing == "sar")


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (("--routing", "sar", "--teacher_model", "dense_teacher"), ("--routing sar", "dense", "--routing native")),
        (("--routing", "ka", "--teacher_model", "dense_teacher"), ("--routing ka", "dense")),
        (("--routing", "all", "--alpha_kd", 0), ("--routing all", "--alpha_kd is 0")),
        (("--routing", "sar", "--alignment", "hidden"), ("--routing sar", "--alignment hidden", "--routing all")),
        (("--routing", "sar", "--router_patterns", ".*gate_proj"), ("--router_patterns .*gate_proj", "no module")),
        (("--routing", "sar", "--router_patterns", ".*q_proj"), ("--router_patterns", "q_proj", "is no router")),
    ],
)
def test_an_impossible_routing_is_refused_in_one_line(inputs, tmp_path, more, parts):
    more = tuple(inputs / part if part == "dense_teacher" else part for part in more)
    assert_refused(argv_of(inputs, tmp_path / "run", *more), *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("largest", "experts"), [(-1.0, "native"), (1e9, "all")])
def test_sar_keeps_every_expert_active_unless_that_makes_the_teacher_much_worse(
    inputs, tmp_path, monkeypatch, largest, experts
):
    monkeypatch.setattr(live, "MAX_PERPLEXITY_INCREASE", largest)
    code, out, _ = run_script(argv_of(inputs, tmp_path / "run", "--routing", "sar", steps=2))
    assert code == 0
    assert read_json(tmp_path / "run" / "summary.json")["experts"] == experts
    assert any("the routers learn in its own routing instead" in line for line in out) == (experts == "native")


@pytest.mark.parametrize("routing", ["all", "ka"])
def test_a_routing_named_by_the_user_is_used_and_a_much_worse_teacher_is_shown(inputs, tmp_path, monkeypatch, routing):
    monkeypatch.setattr(live, "MAX_PERPLEXITY_INCREASE", -1.0)
    code, out, _ = run_script(argv_of(inputs, tmp_path / "run", "--routing", routing, steps=1))
    assert code == 0
    assert any("the student learns from a weaker teacher" in line for line in out)
    assert read_json(tmp_path / "run" / "summary.json")["experts"] == routing


@pytest.mark.parametrize(("routing", "texts"), [("ka", [0, 0, 1, 1]), ("all", [0, 1, 2, 3])])
def test_ka_uses_the_same_text_in_several_steps(inputs, tmp_path, monkeypatch, routing, texts):
    read, plain = [], Dataset.micro_blocks

    def reading(self, step, *args):
        read.append(step)
        return plain(self, step, *args)

    monkeypatch.setattr(Dataset, "micro_blocks", reading)
    assert run_script(argv_of(inputs, tmp_path / "run", "--routing", routing, steps=4))[0] == 0
    assert read == [0, *texts]  # the check before the first step reads that of the first


# Alarms


def _measured(**changes):
    names = ("teacher_val_ppl_native", "teacher_val_ppl_routed", "router_entropy")
    return dict(zip(names, (40.0, 50.0, 0.8), strict=True)) | changes


@pytest.mark.parametrize(
    ("now", "names"),
    [
        ({}, []),
        ({"teacher_val_ppl_native": 40.7, "teacher_val_ppl_routed": 50.9, "router_entropy": 0.41}, []),
        ({"teacher_val_ppl_native": 40.9}, ["drift_native"]),
        ({"teacher_val_ppl_routed": 51.1}, ["drift_routed"]),
        ({"teacher_val_ppl_routed": float("nan")}, ["drift_routed"]),
        ({"router_entropy": 0.39}, ["entropy"]),
        ({"teacher_val_ppl_native": 41.0, "router_entropy": 0.1}, ["drift_native", "entropy"]),
    ],
)
def test_alarms_are_two_percent_of_perplexity_and_half_of_the_entropy(now, names):
    assert [name for name, _ in find_alarms(_measured(), _measured(**now))] == names


@pytest.mark.parametrize("stops", [True, False])
def test_an_alarm_is_shown_once_and_stops_the_routers_on_demand(inputs, tmp_path, monkeypatch, stops):
    monkeypatch.setattr(router_metrics, "MIN_ENTROPY_RATIO", 1.5)  # whatever the routers do
    folder, more = tmp_path / "run", ("--router_stop_on_drift",) if stops else ()
    code, out, _ = run_script(argv_of(inputs, folder, *SAR, *more, steps=6))
    assert code == 0
    assert sum("alarm, the routers' entropy fell" in line for line in out) == 1
    summary, steps = read_json(folder / "summary.json"), read_metrics(folder, "step")
    assert "entropy" in summary["router_alarms"]
    assert summary["router_stopped_at"] == (2 if stops else None)
    assert ["router_loss" in record for record in steps] == [True, True, *([not stops] * 4)]
    changes = [next(iter(record["router_change"].values())) for record in read_metrics(folder, "evaluation")]
    assert (changes[0] == changes[-1]) == stops
