"""A student that is its own teacher, and a prompt that only the teacher sees."""

import copy
import json

import pytest
import torch
from torch.nn import functional

from sar_kd.config.command_line import parse
from sar_kd.config.lora import LoraConfig
from sar_kd.config.presets import STABLE
from sar_kd.config.sections import LossConfig
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.samples import Conversation, Document, Message
from sar_kd.data.teacher_prompt import build_teacher_prompt
from sar_kd.errors import UsageError
from sar_kd.losses.objective import Objective
from sar_kd.models.lora import add_adapter
from sar_kd.models.own_base import WithoutAdapter, adapter_off
from sar_kd.runtime.precision import Precision
from sar_kd.tokenization.tokenizer_pair import TokenizerPair
from train_sar_kd_stable import main as train

pytest.importorskip("peft")

CPU = torch.device("cpu")
PROMPT = "Always answer in one short word."
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DEFAULTING = "{% if messages[0].role != 'system' %}<system>You are helpful.{% endif %}" + TEMPLATE


def _documents(texts):
    chats = [
        Conversation(
            f"chat {i}", (Message("user", texts[2 * i], False), Message("assistant", texts[2 * i + 1], True)), False
        )
        for i in range(3)
    ]
    return [*(Document(f"text {i}", text) for i, text in enumerate(texts[8:14])), *chats]


def _dataset(documents, student, teacher, prompt, **how):
    pair = TokenizerPair(student, teacher, student_vocab_size=len(student), teacher_vocab_size=len(teacher), **how)
    found = build_teacher_prompt(prompt, pair, 200, 24)
    return build_dataset(documents, pair, 48, 120, teacher_prompt=found)


def _with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def _adapted(model):
    torch.manual_seed(5)
    student = add_adapter(model, LoraConfig(lora_rank=4, lora_dropout=0.1)).train()
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return student


def _gradients(student, teacher, batch, dataset, dtype):
    precision = Precision(CPU, dtype, 1024.0)
    settings = LossConfig(alpha_kd=0.7, alpha_ce=0.3, temperature=2.0)
    objective = Objective(teacher, student, settings, dataset.aligner, precision)
    student.zero_grad()
    torch.manual_seed(7)
    terms = objective(batch)
    precision.backward(terms.total)
    return terms, {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_gradients_are_those_with_a_copy_of_the_base_as_teacher(
    make_student, byte_tokenizer, corpus_texts, prompt, dtype
):
    dataset = _dataset(_documents(corpus_texts), byte_tokenizer, byte_tokenizer, prompt)
    base = make_student(len(byte_tokenizer), initializer_range=0.2).to(dtype)
    other = copy.deepcopy(base).requires_grad_(False).eval()
    student = _adapted(base)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    batch = dataset.batch([0, len(dataset) - 1])
    (own, own_grads), (separate, grads) = (
        _gradients(student, teacher, batch, dataset, dtype) for teacher in (WithoutAdapter(student), other)
    )
    assert own.kd > 0
    assert torch.equal(own.total, separate.total)
    assert own_grads.keys() == grads.keys() == trained
    assert all(torch.equal(own_grads[name], grads[name]) for name in grads)
    assert student.training
    assert trained == {name for name, p in student.named_parameters() if p.requires_grad}


def test_without_its_adapter_a_student_is_its_base_also_after_an_error(make_student):
    base = make_student()
    ids = torch.arange(8)[None]
    expected = base.eval()(input_ids=ids).logits
    student = _adapted(base)
    teacher = WithoutAdapter(student)
    assert torch.equal(teacher(input_ids=ids).logits, expected)
    adapted = student.eval()(input_ids=ids).logits
    assert not torch.equal(adapted, expected)
    with pytest.raises(RuntimeError, match="stop"), adapter_off(student):
        raise RuntimeError("stop")
    assert torch.equal(student(input_ids=ids).logits, adapted)
    student.train()
    teacher.eval().requires_grad_(False)
    assert student.training
    assert any(parameter.requires_grad for parameter in student.parameters())


# The prompt


@pytest.mark.parametrize("template", [None, TEMPLATE, DEFAULTING])
@pytest.mark.parametrize("aligned", [False, True])
def test_the_teacher_reads_the_prompt_and_predicts_the_same_tokens(byte_tokenizer, corpus_texts, template, aligned):
    tokenizer = _with_template(byte_tokenizer, template)
    documents = _documents(corpus_texts)
    plain, prompted = (_dataset(documents, tokenizer, tokenizer, text, aligns=aligned) for text in ("", PROMPT))
    assert len(plain) == len(prompted)
    for block in range(len(plain)):
        before, after = plain.batch([block]), prompted.batch([block])
        assert torch.equal(before.student.input_ids, after.student.input_ids)
        assert torch.equal(before.teacher.targets, after.teacher.targets)
        ids = after.teacher.input_ids[0]
        assert PROMPT in tokenizer.decode(ids)
        assert "You are helpful." not in tokenizer.decode(ids)
        # each target is predicted from the token before it, and the pairs are of the same targets
        assert torch.equal(ids[after.teacher.positions + 1], after.teacher.targets)
        shift = len(ids) - len(before.teacher.input_ids[0])
        for name in ("teacher_positions", "teacher_ends"):
            assert torch.equal(getattr(before.alignment, name) + shift, getattr(after.alignment, name))
        assert torch.equal(before.alignment.student_positions, after.alignment.student_positions)


def test_the_loss_with_a_prompt_is_that_of_its_definition(make_student, byte_tokenizer, corpus_texts):
    tokenizer = _with_template(byte_tokenizer, TEMPLATE)
    dataset = _dataset(_documents(corpus_texts), tokenizer, tokenizer, PROMPT)
    teacher, student = (make_student(len(tokenizer), initializer_range=std) for std in (0.3, 0.2))
    teacher, student = teacher.double().eval(), student.double().eval()
    number = len(dataset) - 1
    batch, block = dataset.batch([number]), dataset.blocks[number]
    objective = Objective(
        copy.deepcopy(teacher).float(), copy.deepcopy(student).float(), LossConfig(
            alpha_kd=1.0, alpha_ce=0.0, temperature=2.0, logit_clamp_style="off", loss_clamp_style="off",
        ), dataset.aligner, Precision(CPU, torch.float32, 1.0),
    )  # fmt: skip
    text = tokenizer.decode(dataset.text.student.ids[block.student_start - 1 : block.student_end])
    start = dataset.start_of(block, "student")
    own = [start, *dataset.text.student.ids[block.student_start : block.student_end].tolist()]
    assert text.startswith("<user>")
    seen = tokenizer(f"<system>{PROMPT}", add_special_tokens=False).input_ids + own
    rows = batch.student.positions
    with torch.no_grad():
        p = student(input_ids=torch.tensor([own])).logits[0][rows] / 2
        t = teacher(input_ids=torch.tensor([seen])).logits[0][rows + len(seen) - len(own)] / 2
    expected = 4 * functional.kl_div(p.log_softmax(1), t.log_softmax(1), log_target=True, reduction="sum")
    assert objective(batch).kd.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_conversation_with_a_system_message_of_its_own_is_refused_by_name(byte_tokenizer, corpus_texts):
    tokenizer = _with_template(byte_tokenizer, TEMPLATE)
    messages = Message("system", "Be kind.", False), Message("user", "Hi", False), Message("assistant", "Hello", True)
    documents = [Document("text", corpus_texts[0]), Conversation("chat 7", messages, False)]
    with pytest.raises(UsageError, match="--teacher_system_prompt: chat 7 has a system message"):
        _dataset(documents, tokenizer, tokenizer, PROMPT)


def test_a_prompt_that_leaves_no_room_and_a_file_that_is_not_there_are_refused(byte_tokenizer, tmp_path):
    size = len(byte_tokenizer)
    pair = TokenizerPair(byte_tokenizer, byte_tokenizer, student_vocab_size=size, teacher_vocab_size=size)
    with pytest.raises(
        UsageError, match=r"--teacher_system_prompt: has [0-9]+ tokens, and the teacher takes 64 at most"
    ):
        build_teacher_prompt("word " * 100, pair, 64, 48)
    with pytest.raises(UsageError, match="cannot be read"):
        build_teacher_prompt(f"@{tmp_path}/none.txt", pair, 64, 48)
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    assert build_teacher_prompt(f"@{tmp_path}/prompt.txt", pair, 200, 48) == build_teacher_prompt(PROMPT, pair, 200, 48)


# Runs


def _run(tmp_path, name, *more):
    (tmp_path / "text.txt").write_text("\n".join(f"{i} small things make {i % 7} large ones." for i in range(400)))
    argv = ["--train_file", str(tmp_path / "text.txt"), "--device", "cpu", "--block_size", "48", "--eval_steps", "2"]
    argv += [
        "--warmup_steps",
        "0",
        "--lora_rank",
        "4",
        "--alpha_kd",
        "0.5",
        "--model_dtype",
        "float16",
        "--output_dir",
        str(tmp_path / name),
    ]
    return train([*argv, *more])


@pytest.mark.slow
def test_a_run_with_itself_as_teacher_resumes_bit_for_bit(tmp_path):
    flags = ["--teacher_model", "self", "--teacher_system_prompt", PROMPT]
    whole = _run(tmp_path, "whole", *flags, "--train_steps", "4", "--lr_schedule", "constant")
    _run(tmp_path, "parts", *flags, "--train_steps", "2", "--lr_schedule", "constant")
    resumed = train(["--resume", "--output_dir", str(tmp_path / "parts"), "--train_steps", "4"])
    names = "val_ppl_final", "teacher_val_ppl", "applied"
    assert [resumed[name] for name in names] == [whole[name] for name in names]
    # with its prompt the teacher's perplexity is another than the student's at the start, which is the same model
    assert whole["teacher_val_ppl"] != whole["val_ppl_start"]
    assert whole["applied"] == 4
    files = [json.loads((tmp_path / name / "config.json").read_text())["models"] for name in ("whole", "parts")]
    assert files[0] == files[1]


REFUSED = {
    "--teacher_model self": "--teacher_model self: is the student without its adapter; give --lora_rank",
    "--teacher_model self --lora_rank 4 --alpha_kd 0": "--teacher_model self: is not used, as --alpha_kd is 0",
    "--teacher_model self --lora_rank 4 --routing all": "--teacher_model self: its experts are the student's",
    "--teacher_model self --lora_rank 4 --teacher_device cpu": "--teacher_model self: has no weights of its own",
    "--teacher_cache c --teacher_system_prompt hi": "--teacher_cache c: was made without --teacher_system_prompt",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_does_not_go_together_is_refused_in_one_line(line):
    with pytest.raises(UsageError) as refusal:
        parse(STABLE, line.split())
    assert str(refusal.value).startswith(REFUSED[line])
