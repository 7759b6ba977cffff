"""Students trained on conversations, and what `generate --chat` writes: what the template and the tokenizer write."""

import contextlib
import copy
import io
import json

import pytest
import torch
import transformers

from sar_kd.commands.main import main
from sar_kd.data.chat.encoding import chat_prompt_ids
from sar_kd.tokenization.backends import encode

pytestmark = pytest.mark.slow

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace(
    "{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
)
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{{ m.content }}<|return|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
INSTRUCTION = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ANSWERS = {f"What follows {first}?": f"{second}." for first, second in zip("AFKPT", "BGLQU", strict=True)}


def _with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    return tokenizer


def _save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _run(*argv):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main([str(word) for word in argv]) == 0, err.getvalue()
    return out.getvalue()


def _train(command, folder, *more):
    return _run(
        command, "--train_file", folder / "chat.jsonl", "--validation_file", folder / "held_out.jsonl",
        "--device", "cpu", "--model_dtype", "float32", "--warmup_steps", 5, "--per_device_batch_size", 5,
        "--grad_accum_steps", 1, "--block_size", 64, "--eval_steps", 50, *more,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    examples = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in ANSWERS.items()
    ]
    for name in ("chat", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    return tmp_path


@pytest.mark.parametrize(
    ("template", "written"),
    [(CHATML, ""), (THINKING, "<think>\n\n</think>\n\n"), (HARMONY, "final"), (INSTRUCTION, " ")],
)
def test_what_a_template_writes_before_an_answer_is_written_and_ended(
    folder, make_student, byte_tokenizer, template, written
):
    tokenizer = _with_template(byte_tokenizer, template)
    _save(folder / "model", make_student(len(tokenizer), hidden_size=64), tokenizer)
    run = folder / "run"
    out = _train("sft", folder, "--student_model", folder / "model", "--output_dir", run, "--train_steps", 150,
                 "--learning_rate", 1e-2)  # fmt: skip
    assert f'generate {run} "Hello" --chat\n' in out
    for question, answer in list(ANSWERS.items())[:2]:
        out = _run("generate", run / "student", question, "--chat", "--max_new_tokens", 40, "--json", "--device", "cpu")
        assert json.loads(out)["model"] == written + answer


def test_without_cross_entropy_a_fresh_student_writes_the_tokens_of_its_tokenizer(
    folder, make_student, byte_tokenizer, sp_tokenizer
):
    teacher, student = (_with_template(tokenizer, CHATML) for tokenizer in (byte_tokenizer, sp_tokenizer))
    _save(folder / "model", make_student(len(teacher), hidden_size=64), teacher)
    _save(folder / "fresh", make_student(len(student), hidden_size=64), student)
    _train("sft", folder, "--student_model", folder / "model", "--output_dir", folder / "teacher", "--train_steps", 150,
           "--learning_rate", 1e-2)  # fmt: skip
    _train("train", folder, "--teacher_model", folder / "teacher" / "student", "--student_model", folder / "fresh",
           "--mode", "precise", "--alpha_ce", 0, "--alpha_kd", 1, "--temperature", 1, "--student_lr", 1e-2,
           "--train_steps", 200, "--output_dir", folder / "run")  # fmt: skip
    load = transformers.AutoModelForCausalLM.from_pretrained
    taught, learned = load(folder / "teacher" / "student").eval(), load(folder / "run" / "student").eval()
    vocabulary = student.get_vocab()
    num_twins = 0
    for question, answer in ANSWERS.items():
        wanted, found = _probs(taught, teacher, question, answer), _probs(learned, student, question, answer)
        (written, *_), byte = encode(student, [answer])[0], vocabulary[f"<0x{ord(answer[0]):02X}>"]
        assert found[0][written] == pytest.approx(wanted[0][encode(teacher, [answer])[0][0]], abs=0.05)
        if byte != written:  # "Q" is no piece of this vocabulary, and its byte is what the tokenizer writes
            num_twins += 1
            assert found[0][byte] < 0.01
        assert found[1][vocabulary["<|im_end|>"]] > 0.9
        assert found[1][vocabulary["</s>"]] < 0.01
    assert num_twins >= 3


def _probs(model, tokenizer, question, answer):
    """The distributions over the first token of an answer, and over what follows it."""
    prompt = chat_prompt_ids(tokenizer, question)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + encode(tokenizer, [answer])[0]])).logits[0]
    return [logits[i].softmax(0).numpy() for i in (len(prompt) - 1, -1)]
