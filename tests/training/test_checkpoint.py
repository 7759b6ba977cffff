"""Checkpoints and the saved student: written whole or not at all, refused if damaged or of another format."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import transformers

from sar_kd.config.sections import GuardConfig, OptimConfig
from sar_kd.data.files.samples import Conversation, Message
from sar_kd.data.tokenized_text import tokenize
from sar_kd.errors import UsageError
from sar_kd.runtime.files import atomic_write, file_digest
from sar_kd.runtime.precision import Precision
from sar_kd.tokenization.tokenizer_pair import TokenizerPair
from sar_kd.training import checkpoint
from sar_kd.training.guards import StepGuard
from sar_kd.training.optimizer import build_optimizer
from sar_kd.training.step import StepContext
from sar_kd.version import RUN_FORMAT
from tests.helpers.runs import equal_weights

CPU = torch.device("cpu")


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def saving(request, tmp_path, make_student):
    """A folder with a checkpoint after step 1, and a state that has moved on since."""
    student = make_student(64, num_hidden_layers=1, tie_word_embeddings=request.param)
    learned, teacher = torch.nn.Linear(3, 2), torch.nn.Linear(2, 3)  # stand-ins that have a state
    objective = SimpleNamespace(student=student, state_dict=learned.state_dict, load_state_dict=learned.load_state_dict)
    precision = Precision(CPU, torch.float16, 1024.0)
    optimizer = build_optimizer(student, OptimConfig())
    context = StepContext(objective, optimizer, StepGuard(GuardConfig()), precision, 1.0)
    checkpoint.save_checkpoint(tmp_path / "checkpoint", context, teacher, checkpoint.TrainerState(step=1))
    learned = [*student.parameters(), *learned.parameters(), *teacher.parameters()]
    former = [parameter.detach().clone() for parameter in learned]
    for parameter in learned:
        parameter.data.add_(1.0)
    return SimpleNamespace(folder=tmp_path / "checkpoint", parts=(context, teacher), former=former, learned=learned)


def _load(saving):
    path, _ = checkpoint.find_checkpoint(saving.folder)
    return checkpoint.load_checkpoint(path, *saving.parts)


class Killed(Exception):
    pass


def _raise(*args, **kwargs):
    raise Killed


def _raise_after_half_a_file(model, path):
    Path(path).write_bytes(b"half")
    raise Killed


@pytest.mark.parametrize(
    ("place", "how"),
    [
        ("safetensors.torch.save_model", _raise_after_half_a_file),
        ("torch.save", _raise),
        ("os.fsync", _raise),
        ("os.rename", _raise),
        ("os.replace", _raise),
    ],
)
def test_a_checkpoint_killed_half_way_leaves_the_former_one(saving, monkeypatch, place, how):
    with monkeypatch.context() as patch:
        patch.setattr(place, how)
        with pytest.raises(Killed):
            checkpoint.save_checkpoint(saving.folder, *saving.parts, checkpoint.TrainerState(step=2))
    assert _load(saving).step == 1
    assert equal_weights([p.data for p in saving.learned], saving.former)


def test_a_checkpoint_killed_while_clearing_up_is_the_new_one(saving, monkeypatch):
    moved = [parameter.detach().clone() for parameter in saving.learned]
    remove = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **how: remove(path, **how) if "ignore_errors" in how else _raise())
        with pytest.raises(Killed):
            checkpoint.save_checkpoint(saving.folder, *saving.parts, checkpoint.TrainerState(step=2), keep=1)
    assert _load(saving).step == 2
    assert equal_weights([p.data for p in saving.learned], moved)


def test_what_a_kill_left_is_cleared_away_by_the_next_checkpoint(saving):
    for name in (".step-00000002.partial", ".step-00000007.partial", "step-00000009"):
        (saving.folder / name).mkdir()
        (saving.folder / name / "student.safetensors").write_bytes(b"half")
    assert _load(saving).step == 1
    checkpoint.save_checkpoint(saving.folder, *saving.parts, checkpoint.TrainerState(step=2))
    assert {path.name for path in saving.folder.iterdir()} == {"latest", "step-00000001", "step-00000002"}


def test_no_checkpoint_at_all_is_a_usage_error(saving, tmp_path):
    with pytest.raises(UsageError, match="no checkpoint"):
        checkpoint.find_checkpoint(tmp_path / "elsewhere")


@pytest.mark.parametrize("found", [None, 1, RUN_FORMAT + 1])
def test_a_checkpoint_of_another_format_is_refused_in_one_line_that_names_the_remedy(saving, found):
    path = saving.folder / "step-00000001"
    counters = json.loads((path / "progress.json").read_text())
    assert counters.pop("format") == RUN_FORMAT
    counters |= {} if found is None else {"format": found}
    (path / "progress.json").write_text(json.dumps(counters))
    digests = json.loads((path / "digests.json").read_text())
    digests["progress.json"] = file_digest(path / "progress.json")
    (path / "digests.json").write_text(json.dumps(digests))
    with pytest.raises(UsageError) as error:
        _load(saving)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"--resume: {path} has format {found or 1} and this version reads format {RUN_FORMAT}")
    assert "--overwrite" in message
    assert not equal_weights([p.data for p in saving.learned], saving.former)  # nothing was loaded


@pytest.mark.parametrize("damage", ["missing", "empty", "elsewhere", "binary"])
def test_without_a_pointer_the_newest_intact_checkpoint_is_taken_and_named(saving, damage):
    checkpoint.save_checkpoint(saving.folder, *saving.parts, checkpoint.TrainerState(step=2))
    checkpoint.save_checkpoint(saving.folder, *saving.parts, checkpoint.TrainerState(step=3))
    (saving.folder / "step-00000003" / "state.pt").write_bytes(b"half")
    pointer = saving.folder / "latest"
    if damage == "missing":
        pointer.unlink()
    else:
        pointer.write_bytes({"empty": b"", "elsewhere": b"../step-00000009", "binary": b"\xff\x00"}[damage])
    path, messages = checkpoint.find_checkpoint(saving.folder)
    assert path.name == "step-00000002"
    (line,) = messages
    assert line.startswith(f"{pointer} is missing or damaged")
    assert line.endswith("step-00000002")
    assert _load(saving).step == 2


# What is in a checkpoint whose digests fit


@pytest.fixture
def stepped(saving):
    """A checkpoint after an update, whose optimizer has moments."""
    context, teacher = saving.parts
    context.objective.student(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.sum().backward()
    context.optimizer.step()
    checkpoint.save_checkpoint(saving.folder, context, teacher, checkpoint.TrainerState(step=2))
    return saving


def _forge(saving, file, change):
    """Change what a file of the last checkpoint holds, and write its new digest."""
    path = saving.folder / "step-00000002" / file
    if file == "state.pt":
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
    elif file == "progress.json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        content = safetensors.torch.load_file(path)
        change(content)
        safetensors.torch.save_file(content, path)
    digests = json.loads((path.parent / "digests.json").read_text())
    (path.parent / "digests.json").write_text(json.dumps(digests | {file: file_digest(path)}))


def _moment(name, value):
    def change(state):
        state["optimizer"]["state"][0][name] = value

    return change


def _scaler(name, value):
    def change(state):
        state["precision"]["scaler"][name] = value

    return change


def _poison(weights):
    next(iter(weights.values())).view(-1)[3] = float("nan")


def _halve(weights):
    name = min(weights)
    weights[name] = weights[name].half()


FORGERIES = {
    "moments of another shape": ("state.pt", _moment("exp_avg", torch.zeros(3)), "exp_avg of parameter 0"),
    "moments of another dtype": ("state.pt", _moment("exp_avg_sq", torch.zeros(64, 32).half()), "exp_avg_sq"),
    "moments that are no tensor": ("state.pt", _moment("exp_avg", "x"), "exp_avg of parameter 0"),
    "moments that are not finite": (
        "state.pt", lambda state: state["optimizer"]["state"][0]["exp_avg"].fill_(float("inf")), "not finite"
    ),
    "second moments below 0": (
        "state.pt", lambda state: state["optimizer"]["state"][0]["exp_avg_sq"].fill_(-1.0), "exp_avg_sq of parameter 0"
    ),
    "a count below 0": ("state.pt", _moment("step", torch.tensor(-5.0)), "step of parameter 0 is below 0"),
    "a count that is a vector": ("state.pt", _moment("step", torch.ones(2)), "step of parameter 0"),
    "a moment too many": ("state.pt", _moment("max_exp_avg_sq", torch.ones(1)), "not AdamW's"),
    "state of no parameter": (
        "state.pt", lambda state: state["optimizer"]["state"].update({999: state["optimizer"]["state"][0]}), "index"
    ),
    "other parameters": ("state.pt", lambda state: state["optimizer"]["param_groups"].pop(), "other parameters"),
    "no groups": ("state.pt", lambda state: state["optimizer"].update(param_groups=None), "NoneType"),
    "a scale that is text": ("state.pt", _scaler("scale", "x"), "scale of the gradient scaler is 'x'"),
    "a scale of inf": ("state.pt", _scaler("scale", float("inf")), "scale of the gradient scaler is inf"),
    "a weight that is not finite": ("student.safetensors", _poison, "is not finite"),
    "a weight in half": ("student.safetensors", _halve, "is torch.float16, the student's is torch.float32"),
    "a step that is text": ("progress.json", lambda found: found["progress"].update(step="2"), "step is '2'"),
    "a value too many": ("progress.json", lambda found: found["progress"].update(steps=2), "unexpected"),
    "guards that are text": ("progress.json", lambda found: found["guard"].update(skipped="x"), "skipped is 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("which", FORGERIES)
def test_a_checkpoint_with_nonsense_in_it_is_refused_although_its_digests_fit(stepped, which):
    file, change, part = FORGERIES[which]
    _forge(stepped, file, change)
    with pytest.raises(UsageError) as error:
        _load(stepped)
    message = str(error.value)
    assert "cannot be read" in message
    assert part in message
    assert "step-00000001 is intact: delete" in message
    assert "\n" not in message


def test_hyperparameters_of_the_optimizer_are_those_of_the_settings(stepped):
    def change(state):
        state["optimizer"]["param_groups"][0] |= {"betas": "x", "lr": None, "eps": -1}

    _forge(stepped, "state.pt", change)
    optimizer = stepped.parts[0].optimizer
    former = [{**group, "params": None} for group in optimizer.param_groups]
    _load(stepped)
    assert [{**group, "params": None} for group in optimizer.param_groups] == former


def test_moments_that_share_memory_in_the_file_do_not_share_it_in_the_optimizer(stepped):
    def change(state):  # AdamW writes into a moment as if each of its elements had a place of its own
        own = state["optimizer"]["state"][0]
        own["exp_avg"] = own["exp_avg_sq"] = torch.full((1,), 0.25).expand(own["exp_avg"].shape)

    _forge(stepped, "state.pt", change)
    _load(stepped)
    moments = next(iter(stepped.parts[0].optimizer.state.values()))
    assert (moments["exp_avg"] == 0.25).all()
    moments["exp_avg"].view(-1)[0] = 1.0
    assert moments["exp_avg"].sum() == 0.25 * moments["exp_avg"].numel() + 0.75
    assert (moments["exp_avg_sq"] == 0.25).all()


class _Other:
    """Pickled, it is no tensor and no number."""


def test_a_checkpoint_that_is_no_checkpoint_is_not_advised_to_be_loaded_nevertheless(stepped):
    _forge(stepped, "state.pt", lambda content: content.update(optimizer=_Other()))
    with pytest.raises(UsageError, match="holds other things than tensors and numbers") as error:
        _load(stepped)
    assert "weights_only" not in str(error.value)


def test_a_text_killed_half_way_leaves_the_former_one(tmp_path, monkeypatch):
    atomic_write(tmp_path / "summary.json", "old")
    monkeypatch.setattr("os.replace", _raise)
    with pytest.raises(Killed):
        atomic_write(tmp_path / "summary.json", "new")
    assert (tmp_path / "summary.json").read_text() == "old"


# The saved student


@pytest.mark.parametrize("templates", ["{{ messages }}", {"default": "{{ messages }}", "tool_use": "{{ tools }}"}])
def test_a_student_is_saved_again_whatever_its_chat_templates(tmp_path, templates, make_student, byte_tokenizer):
    student = make_student(64, num_hidden_layers=1)
    byte_tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokenizer.chat_template = templates
    for _ in range(2):
        checkpoint.save_student(student, tokenizer, tmp_path / "student")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "student")
    assert again.chat_template == templates
    assert not list(tmp_path.glob(".student*"))


CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"


@pytest.mark.parametrize("eos", [None, 7, [7, 9]])
def test_every_token_that_was_learned_as_a_stop_is_saved_in_the_generation_config(
    tmp_path, make_student, byte_tokenizer, eos
):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    messages = (Message("user", "Why?", False), Message("assistant", "So.", True))
    pair = TokenizerPair(tokenizer, tokenizer, student_vocab_size=len(tokenizer), teacher_vocab_size=len(tokenizer))
    text = tokenize([Conversation("talk", messages, False)], pair)
    student = make_student(len(tokenizer), num_hidden_layers=1)
    student.generation_config = transformers.GenerationConfig(eos_token_id=eos)
    for _ in range(2):
        checkpoint.save_student(student, tokenizer, tmp_path / "student", text=text)
    saved = transformers.GenerationConfig.from_pretrained(tmp_path / "student").eos_token_id
    before = eos if isinstance(eos, list) else [tokenizer.eos_token_id if eos is None else eos]
    assert saved == [*before, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_the_default_chat_template_is_saved_with_the_student_that_learned_it(tmp_path, make_student, byte_tokenizer):
    messages = (Message("user", "Why?", False), Message("assistant", "So.", True))
    pair = TokenizerPair(byte_tokenizer, byte_tokenizer, student_vocab_size=600, teacher_vocab_size=600)
    text = tokenize([Conversation("talk", messages, False)], pair)
    checkpoint.save_student(make_student(600, num_hidden_layers=1), byte_tokenizer, tmp_path / "student", text=text)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "student")
    asked = [{"role": "user", "content": "Why?"}]
    answered = [*asked, {"role": "assistant", "content": "So."}]
    prompt = again.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert again.apply_chat_template(answered, return_dict=False) == text.student.ids.tolist()
    assert text.student.ids.tolist()[: len(prompt)] == prompt
    assert text.student.is_target.tolist().index(True) == len(prompt)
    assert byte_tokenizer.chat_template is None


@pytest.mark.parametrize("eos", [None, 2])
def test_a_generation_config_that_is_not_consistent_is_saved_all_the_same(tmp_path, make_student, eos):
    student = make_student(64, num_hidden_layers=1)
    student.generation_config = transformers.GenerationConfig(eos_token_id=eos)
    student.generation_config.temperature = 0.6
    tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=None, save_pretrained=lambda folder: None)
    checkpoint.save_student(student, tokenizer, tmp_path / "student")
    saved = transformers.GenerationConfig.from_pretrained(tmp_path / "student")
    assert (saved.temperature, saved.do_sample, saved.eos_token_id, saved.pad_token_id) == (0.6, True, eos or 1, 1)
