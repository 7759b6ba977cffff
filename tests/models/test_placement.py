"""A teacher on another device, or spread over CPU memory and disk: what it computes stays the same."""

import contextlib
import io
import json
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn

from sar_kd.commands import main
from sar_kd.config.command_line import parse
from sar_kd.config.commands import CACHE
from sar_kd.config.placement import TeacherPlacementConfig
from sar_kd.config.presets import STABLE
from sar_kd.config.sections import PairConfig
from sar_kd.errors import UsageError
from sar_kd.evaluation.nonfinite import replay
from sar_kd.models import loading, placement
from sar_kd.models.lm_head import LMHead, forward_to_lm_head
from sar_kd.models.loading import load_teacher
from sar_kd.models.memory_saving import layers_of
from sar_kd.models.placement import describe_spread, limits_of, spread_over_devices
from sar_kd.preflight.dry_run import dry_run
from sar_kd.runtime import environment
from sar_kd.runtime.precision import Precision
from train_sar_kd_stable import main as train

CPU, CUDA, META = map(torch.device, ("cpu", "cuda", "meta"))
SPREAD = ["--teacher_device_map", "auto", "--teacher_max_memory"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_student, make_teacher, byte_tokenizer, corpus_texts):
    """Saved models with one tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("models")
    size = len(byte_tokenizer)
    models = {
        "student": make_student(size, num_hidden_layers=1),
        "dense": make_student(size, num_hidden_layers=4, initializer_range=0.3),
        "tied": make_student(size, num_hidden_layers=4, initializer_range=0.3, tie_word_embeddings=True),
        "experts": make_teacher(num_hidden_layers=4, initializer_range=0.3),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        byte_tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text("\n".join(corpus_texts), encoding="utf-8")
    return folder


def _limit(folder, name, num_layers, dtype=torch.float32):
    """`--teacher_max_memory` with room for so many layers in CPU memory."""
    model = loading.load_meta_model("teacher_model", str(folder / name), False)
    unique = {id(parameter): parameter.numel() for parameter in model.parameters()}
    layers = layers_of(model)
    size = sum(parameter.numel() for parameter in layers[0].parameters())
    rest = sum(unique.values()) - len(layers) * size
    return f"cpu={((rest + (num_layers + 0.5) * size) * dtype.itemsize) / 1e6:.6f}MB"


def _spread_teacher(folder, name, dtype=torch.float32, num_layers=1):
    config = TeacherPlacementConfig(
        teacher_device_map="auto", teacher_max_memory=(_limit(folder, name, num_layers, dtype),)
    )
    notes = []
    teacher, *_ = load_teacher(PairConfig(teacher_model=str(folder / name)), Precision(CPU, dtype, 1.0), config, notes)
    return teacher, notes


def _cache(folder, name, out, dtype, *more):
    argv = ["--teacher_model", str(folder / name), "--train_file", str(folder / "text.txt"), "--device", "cpu"]
    argv += ["--block_size", "32", "--teacher_cache", str(out), "--model_dtype", dtype, "--teacher_top_k", "8"]
    with contextlib.redirect_stdout(io.StringIO()):
        main.start(CACHE, [*argv, "--per_device_batch_size", "3", *more])
    return {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["dense", "tied", "experts"])
def test_a_spread_teacher_gives_the_same_cache_byte_for_byte(folder, tmp_path, name, dtype):
    whole = _cache(folder, name, tmp_path / "whole", dtype)
    limit = _limit(folder, name, 1, getattr(torch, dtype))
    assert _cache(folder, name, tmp_path / "spread", dtype, *SPREAD, limit) == whole


@pytest.mark.parametrize("name", ["dense", "tied", "experts"])
def test_of_the_layers_on_the_disk_one_tensor_is_loaded_at_a_time(folder, name):
    teacher, notes = _spread_teacher(folder, name)
    assert notes == ["Teacher: of its 4 layers 1 in CPU memory, 3 on the disk (--teacher_device_map)"]
    on_disk = [layer for layer in layers_of(teacher) if any(weight.is_meta for weight in layer.parameters())]
    assert on_disk == layers_of(teacher)[1:]
    loaded = []

    def count(module, *_):
        weights = [weight for layer in on_disk for weight in layer.parameters() if not weight.is_meta]
        loaded.append({id(weight) for weight in weights} == {id(w) for w in module.parameters(recurse=False)})

    owners = [m for layer in on_disk for m in layer.modules() if list(m.parameters(recurse=False))]
    for module in owners:  # an inner hook, where its weights are there
        module._old_forward = _counted(module._old_forward, module, count)
    teacher(input_ids=torch.arange(6)[None], use_cache=False)
    assert len(loaded) == len(owners)
    assert all(loaded)
    assert all(weight.is_meta for layer in on_disk for weight in layer.parameters())


def _counted(forward, module, count):
    def run(*args, **kwargs):
        count(module)
        return forward(*args, **kwargs)

    return run


def _losses(folder, out, *more):
    argv = ["--teacher_model", str(folder / "dense"), "--student_model", str(folder / "student"), "--device", "cpu"]
    argv += ["--train_file", str(folder / "text.txt"), "--block_size", "32", "--alpha_kd", "0.5", "--train_steps", "3"]
    argv += ["--eval_steps", "3", "--log_steps", "1", "--output_dir", str(out), "--model_dtype", "float32"]
    summary = train([*argv, *more])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = "loss", "kd_loss", "grad_norm", "val_loss", "teacher_val_ppl"
    return summary["teacher_val_ppl"], [[line[name] for name in names if name in line] for line in lines]


def test_a_run_and_its_evaluations_have_the_same_numbers_with_a_spread_teacher(folder, tmp_path):
    whole = _losses(folder, tmp_path / "whole")
    assert any(whole[1])
    assert _losses(folder, tmp_path / "spread", *SPREAD, _limit(folder, "dense", 1)) == whole
    assert _losses(folder, tmp_path / "named", "--teacher_device", "cpu") == whole


def test_a_weight_on_the_disk_that_is_not_finite_is_refused_by_name(folder, tmp_path):
    path = tmp_path / "bad"
    path.mkdir()
    for file in (folder / "dense").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    weights = safetensors.torch.load_file(path / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"][0, 0] = torch.nan
    safetensors.torch.save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"its weight model\.layers\.3\.mlp\.up_proj\.weight holds 1 values"):
        _spread_teacher(tmp_path, "bad")


@pytest.mark.parametrize(("dtype", "verdict"), [(torch.float32, "weights or data"), (torch.float16, "offloaded")])
def test_a_replay_names_the_module_of_a_spread_teacher(folder, dtype, verdict):
    teacher, _ = _spread_teacher(folder, "dense", dtype)
    layer = layers_of(teacher)[2]
    layer.mlp.down_proj.register_forward_hook(lambda module, args, output: output * torch.inf)
    found, *_ = replay(teacher, torch.arange(6)[None], Precision(CPU, dtype, 1.0))
    assert found["first_bad_module"]["name"] == "model.layers.2.mlp.down_proj"
    assert found["verdict"] == verdict


# Where the layers go


def _fake_machine(monkeypatch, free, processes=1):
    gpus = [SimpleNamespace(number=number) for number in free if number != "cpu"]
    monkeypatch.setattr(environment, "find_gpus", lambda: gpus)
    monkeypatch.setattr(
        environment, "free_memory", lambda device: free["cpu" if device.type == "cpu" else device.index]
    )
    monkeypatch.setattr(placement, "current_process_group", lambda: SimpleNamespace(size=processes))


@pytest.fixture
def model(make_student):
    return make_student(512, num_hidden_layers=6, tie_word_embeddings=True)


def _where(model, config, **how):
    settings = {"device": CUDA, "dtype": torch.float16, "has_student": False} | how
    places = spread_over_devices(model, config, **settings)
    assert all(place == 0 for name, place in places.items() if "layers" not in name) or settings["device"] is CPU
    return [place for name, place in places.items() if "layers" in name]


def test_layers_fill_the_gpus_then_cpu_memory_then_the_disk(model, monkeypatch):
    layer = 2 * sum(parameter.numel() for parameter in layers_of(model)[0].parameters())
    rest = 2 * sum(parameter.numel() for parameter in model.parameters()) - 6 * layer
    free = {0: (rest + 2.5 * layer) / 0.9, 1: 1.5 * layer / 0.9, "cpu": 2.2 * layer / 0.8}
    _fake_machine(monkeypatch, free)
    auto = TeacherPlacementConfig(teacher_device_map="auto")
    assert _where(model, auto) == [0, 0, 1, "cpu", "cpu", "disk"]
    assert describe_spread(model, spread_over_devices(model, auto, CUDA, torch.float16, False)) == (
        "Teacher: of its 6 layers 2 on cuda:0, 1 on cuda:1, 2 in CPU memory, 1 on the disk (--teacher_device_map)"
    )
    assert _where(model, auto, has_student=True) == [1, "cpu", "cpu", "disk", "disk", "disk"]
    _fake_machine(monkeypatch, free, processes=2)  # the other GPU is the other rank's, half of the memory too
    assert _where(model, auto, has_student=True) == ["cpu", *["disk"] * 5]
    given = TeacherPlacementConfig(teacher_device_map="auto", teacher_max_memory=("cuda:0=1GB", "cpu=0MB"))
    assert _where(model, given, has_student=True) == [0] * 6
    _fake_machine(monkeypatch, {"cpu": (2 * rest + 10 * layer) / 0.8})
    assert _where(model, auto, device=CPU, dtype=torch.float32) == ["cpu"] * 5 + ["disk"]


def test_a_limit_below_what_is_outside_the_layers_is_refused(model, monkeypatch):
    _fake_machine(monkeypatch, {0: 1e9, "cpu": 1e9})
    config = TeacherPlacementConfig(teacher_device_map="auto", teacher_max_memory=("cuda:0=0.01MB",))
    with pytest.raises(UsageError, match=r"--teacher_max_memory cuda:0=0\.01MB: the teacher's embeddings and LM head"):
        _where(model, config)
    with pytest.raises(UsageError, match="--teacher_device_map auto: the teacher's layers are not known"):
        _where(nn.Linear(2, 2), TeacherPlacementConfig(teacher_device_map="auto"))


def test_sizes_are_read_in_decimal_and_binary_units():
    sizes = ("cuda:1=1.5GB", "cpu=2GiB", "cuda:0=3mb")
    config = TeacherPlacementConfig(teacher_device_map="auto", teacher_max_memory=sizes)
    assert limits_of(config) == {1: 1_500_000_000, "cpu": 2 * 2**30, 0: 3_000_000}
    config = TeacherPlacementConfig(teacher_device_map="auto", teacher_max_memory=("CPU=1GB", "CUDA:0=6gib"))
    assert limits_of(config) == {"cpu": 10**9, 0: 6 * 2**30}


# Refusals

REFUSED = {
    "--teacher_device gpu": "--teacher_device gpu: must be cpu, cuda or cuda:N",
    "--teacher_device cpu --teacher_device_map auto": "--teacher_device cpu: --teacher_device_map chooses the devices",
    "--teacher_device_map auto --teacher_max_memory 6GB": "--teacher_max_memory 6GB: must be devices with sizes",
    "--teacher_device cpu --offload_teacher_to_cpu": "--offload_teacher_to_cpu: moves the teacher to the student's",
    "--teacher_device_map auto --offload_teacher_to_cpu": "--offload_teacher_to_cpu: moves the teacher",
    "--teacher_device_map auto --teacher_quantization nf4": "--teacher_quantization nf4: cannot be spread",
    "--teacher_device_map auto --routing sar": "--routing sar: --teacher_device_map auto puts the teacher elsewhere",
    "--teacher_device cpu --routing sar": "--routing sar: --teacher_device cpu puts the teacher elsewhere",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_does_not_go_together_is_refused_in_one_line(line):
    with pytest.raises(UsageError) as refusal:
        parse(STABLE, line.split())
    assert str(refusal.value).startswith(REFUSED[line])


def test_a_missing_package_says_what_to_install(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(environment, "is_installed", lambda package: package != "accelerate")
    argv = ["cache", "--teacher_model", str(folder / "dense"), "--train_file", str(folder / "text.txt")]
    assert main.main([*argv, "--teacher_cache", str(tmp_path / "cache"), "--teacher_device_map", "auto"]) == 2
    assert capsys.readouterr().err == "error: --teacher_device_map auto: needs `pip install accelerate`\n"


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--teacher_device cuda:1: this PyTorch sees 0 CUDA devices; give cpu"):
        placement.device_of_teacher(TeacherPlacementConfig(teacher_device="cuda:1"), CPU)


def test_many_blocks_pass_a_spread_teacher_at_once_unless_the_number_is_given():
    assert parse(CACHE, []).cache.per_device_batch_size == 4
    assert parse(CACHE, ["--teacher_device_map", "auto"]).cache.per_device_batch_size == 32
    given = ["--teacher_device_map", "auto", "--per_device_batch_size", "8"]
    assert parse(CACHE, given).cache.per_device_batch_size == 8


# On a device that is not here


def test_a_teacher_on_another_device_gets_its_input_there_and_its_states_come_back():
    places = []

    class States:
        def flatten(self, *_):
            return self

        def to(self, device):
            places.append(("states", device))
            return torch.zeros(3, 2)

    class Backbone(nn.Module):
        def forward(self, input_ids, use_cache):
            places.append(("input", input_ids.device))
            return SimpleNamespace(last_hidden_state=States())

    class Far(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_model, self.lm_head = Backbone(), nn.Linear(2, 5, device="meta")

        def get_output_embeddings(self):
            return self.lm_head

    entered = []

    @contextlib.contextmanager
    def autocast_on(device):
        entered.append(device)
        yield

    precision = SimpleNamespace(device=CPU, on=lambda device: SimpleNamespace(autocast=lambda: autocast_on(device)))
    logits, _ = forward_to_lm_head(Far(), LMHead(torch.ones(5, 2)), torch.zeros(1, 3, dtype=torch.long), precision)
    assert places == [("input", META), ("states", CPU)]
    assert entered == [META]
    assert logits.states.device == CPU


def test_the_plan_counts_what_of_a_spread_teacher_is_on_the_device(make_student):
    models = {"student": make_student(300), "teacher": make_student(300, num_hidden_layers=3)}
    layer = 4 * sum(parameter.numel() for parameter in layers_of(models["teacher"])[0].parameters())
    rest = 4 * 2 * 300 * 32
    flags = ["--block_size", "32", "--alpha_kd", "0.5", *SPREAD, f"cpu={(rest + 1.5 * layer) / 1e6:.6f}MB"]
    for phase in dry_run(parse(STABLE, flags), models, CPU, torch.float32):
        assert phase.bytes["teacher"] == pytest.approx(rest + layer, rel=0.01)
