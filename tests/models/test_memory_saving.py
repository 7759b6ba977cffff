"""An offloaded teacher, a 4-bit teacher, and a student with activation checkpointing."""

import copy

import pytest
import torch

from sar_kd.config.command_line import parse
from sar_kd.config.presets import STABLE
from sar_kd.config.sections import GuardConfig, LossConfig, OptimConfig, TeacherMemoryConfig
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.samples import Document
from sar_kd.errors import UsageError
from sar_kd.evaluation.perplexity import evaluate
from sar_kd.losses.objective import Objective
from sar_kd.models.lm_head import backbone_of
from sar_kd.models.loading import LoadedModels, load_models
from sar_kd.models.memory_saving import (
    Offload,
    layers_of,
    offloaded_parameters,
    quantization_options,
    recompute_activations_,
)
from sar_kd.runtime.environment import is_installed
from sar_kd.runtime.precision import Precision, setup_precision
from sar_kd.tokenization.tokenizer_pair import TokenizerPair
from sar_kd.training.guards import StepGuard
from sar_kd.training.optimizer import build_optimizer
from sar_kd.training.step import StepContext, train_step
from train_sar_kd_stable import main as train

CPU = torch.device("cpu")
ALIGNMENTS = pytest.mark.parametrize("alignment", ["auto", "strict", "alm", "uld", "hidden"])


@pytest.fixture(scope="module")
def datasets(byte_tokenizer, sp_tokenizer, corpus_texts):
    documents = [Document(str(i), text) for i, text in enumerate(corpus_texts)]

    def dataset(teacher, **how):
        pair = TokenizerPair(
            sp_tokenizer, teacher, student_vocab_size=len(sp_tokenizer), teacher_vocab_size=len(teacher), **how
        )
        return build_dataset(documents, pair, 24, 60)

    return {
        "auto": dataset(byte_tokenizer, projects=True),
        **{kind: dataset(byte_tokenizer, aligns=True) for kind in ("strict", "alm", "uld", "hidden")},
    }


def _run(datasets, make_student, alignment="auto", dtype=torch.float32, offloads=False, dropout=0.0, recomputes=False):
    """A step and what it is made of, the same for the same arguments."""
    dataset = datasets[alignment]
    student = make_student(len(dataset.pair.student), attention_dropout=dropout).train()
    teacher = make_student(len(dataset.pair.teacher), num_hidden_layers=1, hidden_size=16, intermediate_size=32)
    for model in (student, teacher):
        model.lm_head.weight.data.mul_(20.0)
    teacher = teacher.requires_grad_(False).eval().to(dtype)
    if recomputes:
        recompute_activations_(student, same_dropout=True)
    precision = Precision(CPU, dtype, 1024.0)
    offload = Offload(teacher, backbone_of(teacher), CPU) if offloads else None
    torch.manual_seed(3)
    settings = LossConfig(alpha_kd=0.5, alpha_ce=0.5, alignment=alignment)
    objective = Objective(teacher, student, settings, dataset.aligner, precision, offload)
    optimizer = build_optimizer(student, OptimConfig(student_lr=1e-3), objective.parameters())
    guard = StepGuard(GuardConfig(skip_grad_norm=1e9, skip_rule="fixed"))
    gradients = []
    optimizer.register_step_pre_hook(
        lambda *_: gradients.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    )

    def step(number):
        context = StepContext(objective, optimizer, guard, precision, 1.0)
        return train_step(dataset.micro_batches(number, 2, 3, 0), context)

    return step, student, teacher, offload, gradients, objective, precision, dataset


# An offloaded teacher


@ALIGNMENTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_offloaded_teacher_gives_the_same_losses_and_weights(datasets, make_student, alignment, dtype):
    runs = [_run(datasets, make_student, alignment, dtype, offloads) for offloads in (False, True)]
    for number in range(2):
        plain, offloaded = (run[0](number) for run in runs)
        assert plain == offloaded
        assert plain.verdict.applied
        assert plain.kd_loss > 0
    for a, b in zip(runs[0][1].parameters(), runs[1][1].parameters(), strict=True):
        assert torch.equal(a, b)
    assert runs[1][3].num_transfers == 1  # it was on the device in the first step


def test_the_teacher_is_on_the_device_in_its_forward_and_off_it_in_the_students_step(datasets, make_student):
    step, student, teacher, offload, *_ = _run(datasets, make_student, offloads=True)
    offload.to_cpu_()
    on_cpu = {parameter: parameter.data_ptr() for parameter in offloaded_parameters(teacher)}
    seen = []

    def is_off_device():
        return all(parameter.data_ptr() == place for parameter, place in on_cpu.items())

    teacher.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(("teacher forward", not is_off_device())))
    student.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(("student forward", is_off_device())))
    student.model.layers[0].register_full_backward_hook(lambda *_: seen.append(("student backward", is_off_device())))
    step(0)
    assert [event for event, _ in seen] == ["teacher forward"] * 3 + ["student forward", "student backward"] * 3
    assert all(is_right for _, is_right in seen)
    assert is_off_device()


def test_all_but_the_head_is_offloaded_and_returns_unchanged(make_student):
    for tied in (False, True):
        teacher = make_student(tie_word_embeddings=tied).requires_grad_(False).eval()
        before = {name: value.clone() for name, value in teacher.state_dict().items()}
        names = {
            name for name, value in teacher.named_parameters() if any(value is t for t in offloaded_parameters(teacher))
        }
        stays = {"model.embed_tokens.weight"} if tied else {"lm_head.weight"}
        assert {name for name, _ in teacher.named_parameters()} - names == stays
        offload = Offload(teacher, backbone_of(teacher), CPU)
        for _ in range(2):
            offload.to_cpu_()
            assert not offload.is_on_device
            teacher(input_ids=torch.arange(5)[None])  # a forward brings it back
            assert offload.is_on_device
        assert offload.num_transfers == 2
        assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_precomputed_teacher_outputs_give_the_loss_of_a_teacher_that_is_run(datasets, make_student):
    *_, offload, _, objective, _, dataset = _run(datasets, make_student, offloads=True)
    batch = dataset.batch([0, 1])
    plain = objective(batch).kd.item()
    (teacher_outputs,) = objective.precompute_teacher([batch])
    assert not offload.is_on_device
    precomputed = objective(batch, objective.forward_models(batch, teacher_outputs)).kd.item()
    assert not offload.is_on_device
    again = objective(dataset.batch([0, 1])).kd.item()
    assert plain == precomputed == again
    assert offload.is_on_device


def test_an_evaluation_of_an_offloaded_teacher_moves_it_to_the_device(datasets, make_student):
    step, _, teacher, offload, _, objective, precision, dataset = _run(datasets, make_student, offloads=True)
    batches = list(dataset.token_batches("teacher", 3))
    before = evaluate(teacher, batches, 100, precision, heads=objective.heads).nats
    step(0)
    assert not offload.is_on_device
    assert evaluate(teacher, batches, 100, precision, heads=objective.heads).nats == before


@pytest.mark.slow
def test_a_whole_run_with_an_offloaded_teacher_is_the_run_without(tmp_path, monkeypatch, corpus_texts):
    """On a machine without a GPU the teacher is copied within its memory."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(corpus_texts), encoding="utf-8")
    flags = ["--train_file", str(text), "--block_size", "64", "--train_steps", "3", "--eval_steps", "2"]
    flags += ["--model_dtype", "float16", "--device", "cpu"]
    summaries = [train([*flags, "--output_dir", str(tmp_path / "plain")])]
    monkeypatch.setattr(TeacherMemoryConfig, "offloads_from", lambda self, device: self.offload_teacher_to_cpu)
    summaries.append(train([*flags, "--output_dir", str(tmp_path / "offloaded"), "--offload_teacher_to_cpu"]))
    for name in ("val_loss_final", "val_ppl_start", "teacher_val_ppl", "loss_scale_final"):
        assert summaries[0][name] == summaries[1][name]


# A student that recomputes its activations


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_recomputing_gives_the_same_gradients(datasets, make_student, dtype, dropout):
    found = []
    for recomputes in (False, True):
        step, *_, gradients, _, _, _ = _run(datasets, make_student, dtype=dtype, dropout=dropout, recomputes=recomputes)
        torch.manual_seed(7)
        report = step(0)
        found.append((report.loss, report.grad_norm, gradients[0]))
    assert found[0][:2] == found[1][:2]
    assert len(found[0][2]) == len(found[1][2]) > 0
    assert all(torch.equal(a, b) for a, b in zip(found[0][2], found[1][2], strict=True))


def test_a_second_call_changes_nothing(make_student):
    student = make_student()
    calls = []
    recompute_activations_(student)
    recompute_activations_(student)
    student.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    student(input_ids=torch.arange(5)[None]).logits.sum().backward()
    assert len(calls) == 2


def test_the_option_makes_every_layer_of_the_student_recompute():
    config = parse(STABLE, ["--gradient_checkpointing", "--device", "cpu"])
    models = load_models(config, setup_precision(config.precision, 0))
    calls = []
    for layer in layers_of(models.student):
        layer.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    models.student(input_ids=torch.arange(9)[None]).logits.sum().backward()
    assert len(calls) == 2 * len(layers_of(models.student))
    assert models.offload is None


@pytest.mark.slow
def test_a_run_that_was_short_of_memory_may_resume_with_less(tmp_path, corpus_texts):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(corpus_texts), encoding="utf-8")
    begun = ["--train_file", str(text), "--block_size", "64", "--train_steps", "1", "--device", "cpu"]
    train([*begun, "--output_dir", str(tmp_path / "run")])
    again = ["--resume", "--output_dir", str(tmp_path / "run")]
    memory = parse(STABLE, [*again, "--gradient_checkpointing", "--offload_teacher_to_cpu"]).memory
    assert (memory.gradient_checkpointing, memory.offload_teacher_to_cpu) == (True, True)
    with pytest.raises(UsageError, match="--teacher_quantization nf4: the run to resume has 'off'"):
        parse(STABLE, [*again, "--teacher_quantization", "nf4"])


# A 4-bit teacher


def test_quantization_needs_its_package(monkeypatch):
    monkeypatch.setattr("sar_kd.models.memory_saving.is_installed", lambda package: package != "bitsandbytes")
    with pytest.raises(UsageError, match="--teacher_quantization nf4: needs `pip install bitsandbytes accelerate`"):
        quantization_options("nf4", Precision(CPU, torch.float16, 1.0))
    assert quantization_options("off", Precision(CPU, torch.float16, 1.0)) == {}


def test_a_teacher_in_memory_is_not_quantized(make_student, sp_tokenizer):
    teacher = make_student(len(sp_tokenizer))
    config = parse(STABLE, ["--teacher_quantization", "nf4", "--device", "cpu"])
    loaded = LoadedModels(
        {"teacher_model": (copy.deepcopy(teacher), sp_tokenizer), "student_model": (teacher, sp_tokenizer)}
    )
    with pytest.raises(UsageError, match="--teacher_quantization nf4: the teacher is in memory already"):
        load_models(config, setup_precision(config.precision, 0), loaded=loaded)


@pytest.mark.skipif(not is_installed("bitsandbytes"), reason="bitsandbytes is an extra")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_quantized_teacher_is_near_the_teacher_and_teaches(tmp_path, make_student, sp_tokenizer, corpus_texts, dtype):
    teacher, text = make_student(len(sp_tokenizer), hidden_size=128, intermediate_size=256), tmp_path / "text.txt"
    text.write_text("\n".join(corpus_texts), encoding="utf-8")
    for name, model in (("teacher", teacher), ("student", make_student(len(sp_tokenizer)))):
        model.save_pretrained(tmp_path / name)
        sp_tokenizer.save_pretrained(tmp_path / name)
    flags = ["--teacher_model", str(tmp_path / "teacher"), "--student_model", str(tmp_path / "student")]
    flags += ["--train_file", str(text), "--block_size", "32", "--model_dtype", dtype, "--device", "cpu"]
    config = parse(STABLE, [*flags, "--teacher_quantization", "nf4"])
    quantized = load_models(config, setup_precision(config.precision, 0)).teacher
    sizes = {name: value.dtype for name, value in quantized.named_parameters()}
    assert sizes["model.layers.0.mlp.up_proj.weight"] is torch.uint8
    assert sizes["lm_head.weight"] is getattr(torch, dtype)
    flags += ["--train_steps", "2", "--eval_steps", "2", "--output_dir"]
    whole = train([*flags, str(tmp_path / "whole")])
    nf4 = train([*flags, str(tmp_path / "nf4"), "--teacher_quantization", "nf4"])
    assert nf4["applied"] == 2
    assert whole["teacher_val_ppl"] != nf4["teacher_val_ppl"] == pytest.approx(whole["teacher_val_ppl"], rel=0.05)
