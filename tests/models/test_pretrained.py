"""What is loaded has the logits of its files: adapters, heads of their own, GGUF; what is left out is named."""

import json

import peft
import pytest
import safetensors.torch
import torch
import transformers

from sar_kd.config.runs import SftConfig, SftModelConfig
from sar_kd.errors import UsageError
from sar_kd.models import pretrained
from sar_kd.models.loading import load_for_generation, load_meta_model, load_student
from sar_kd.models.model_files import find_model
from sar_kd.models.pretrained import load_model, load_tokenizer
from sar_kd.runtime.precision import Precision
from tests.helpers.gguf_files import write_gguf
from tests.helpers.runs import run_script

TOKENS = torch.arange(24)[None] % 20 + 1


@torch.no_grad()
def _logits(model):
    return model.eval()(input_ids=TOKENS).logits


def _save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def _load(folder, **options):
    return load_model(find_model("student_model", str(folder)), torch.float32, False, **options)[0]


def _adapt(base, folder, **settings):
    """The model with an adapter as after training, which is saved in `folder`."""
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    torch.manual_seed(3)
    for name, value in adapted.named_parameters():
        if "lora_" in name:
            value.data.copy_(0.3 * torch.randn_like(value))
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"], ["embed_tokens"], "all-linear"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapters_folder_is_its_base_model_with_the_adapter(make_student, sp_tokenizer, tied, targets, tmp_path):
    _save(make_student(len(sp_tokenizer), tie_word_embeddings=tied), sp_tokenizer, tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = _logits(base)
    expected = _logits(_adapt(base, tmp_path / "adapter", target_modules=targets, use_dora=targets == ["q_proj"]))
    loaded, tokenizer = load_for_generation("student_model", str(tmp_path / "adapter"), False)
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(_logits(loaded), expected, rtol=1e-4, atol=1e-4)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert tokenizer.get_vocab() == sp_tokenizer.get_vocab()
    loaded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(_logits(_load(tmp_path / "again")), expected, rtol=1e-4, atol=1e-4)
    meta = load_meta_model("student_model", str(tmp_path / "adapter"), False)
    assert meta.get_input_embeddings().weight.shape == loaded.get_input_embeddings().weight.shape


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_does_not_fit_its_base_is_one_line(make_student, sp_tokenizer, tmp_path):
    _save(make_student(len(sp_tokenizer)), sp_tokenizer, tmp_path / "base")
    _adapt(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "a", target_modules=["q_proj"]
    )
    _save(make_student(len(sp_tokenizer), hidden_size=16), sp_tokenizer, tmp_path / "base")
    with pytest.raises(UsageError, match=r"--student_model \S+: cannot be loaded \(its adapter: "):
        _load(tmp_path / "a")
    with pytest.raises(UsageError, match="an adapter cannot be quantized; leave out --lora_quantization"):
        _load(tmp_path / "a", quantization_config=None)


def test_a_head_of_its_own_stays_one_where_the_config_says_tied(make_student, sp_tokenizer, tmp_path):
    student = _save(make_student(len(sp_tokenizer)), sp_tokenizer, tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    (tmp_path / "own" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    loaded = _load(tmp_path / "own")
    torch.testing.assert_close(_logits(loaded), _logits(student))
    assert loaded.config.tie_word_embeddings is False  # or other readers of the saved student would tie them
    tied = _save(make_student(len(sp_tokenizer), tie_word_embeddings=True), sp_tokenizer, tmp_path / "tied")
    loaded = _load(tmp_path / "tied")
    assert loaded.config.tie_word_embeddings is True
    torch.testing.assert_close(_logits(loaded), _logits(tied))


def test_tensors_that_are_no_part_of_the_model_are_counted_and_named(make_student, sp_tokenizer, tmp_path):
    _save(make_student(len(sp_tokenizer), num_hidden_layers=2), sp_tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    config = SftConfig(models=SftModelConfig(student_model=str(tmp_path)))
    note, trainable = load_student(config, Precision(torch.device("cpu"), torch.float32, 1.0)).notes
    assert trainable.startswith("Trainable: ")
    assert "9 tensors in its files are no part of the model, model.layers.1.input_layernorm.weight among them" in note


def test_a_missing_weight_is_named(make_student, sp_tokenizer, tmp_path):
    _save(make_student(len(sp_tokenizer)), sp_tokenizer, tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"1 weights are not in its files, model\.norm\.weight among them"):
        _load(tmp_path)


@pytest.fixture
def gguf_file(make_student, byte_tokenizer, tmp_path):
    """A model and a GGUF file of it."""
    student, path = make_student(len(byte_tokenizer), tie_word_embeddings=False), tmp_path / "gguf" / "tiny.gguf"
    path.parent.mkdir()
    write_gguf(student, byte_tokenizer, path)
    return student, path


def test_a_gguf_file_has_the_weights_and_the_tokenizer_that_were_written(gguf_file, byte_tokenizer, corpus_texts):
    student, path = gguf_file
    files = find_model("student_model", str(path))
    loaded, _ = load_model(files, torch.float32, False)
    torch.testing.assert_close(_logits(loaded), _logits(student), rtol=1e-4, atol=1e-5)
    tokenizer = load_tokenizer(files, False, len(byte_tokenizer))
    assert tokenizer.eos_token == byte_tokenizer.eos_token
    assert tokenizer.get_vocab() == byte_tokenizer.get_vocab()
    for text in corpus_texts:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    meta = load_meta_model("model", str(path.parent), False)
    assert sum(p.numel() for p in meta.parameters()) == sum(p.numel() for p in student.parameters())


def test_the_metadata_of_a_gguf_file_is_parsed_once_until_the_file_is_another(gguf_file, byte_tokenizer, monkeypatch):
    student, path = gguf_file
    parsed, parse = [], pretrained._load_gguf
    monkeypatch.setattr(pretrained, "_load_gguf", lambda *args, **more: parsed.append(args) or parse(*args, **more))
    files = find_model("student_model", str(path))
    for _ in range(2):
        load_meta_model("model", str(path), False)
        load_model(files, torch.float32, False)
        load_tokenizer(files, False, len(byte_tokenizer))
    assert [args for args in parsed if len(args) == 1] == [(str(path),)]
    small = type(student)(type(student.config).from_dict(student.config.to_dict() | {"num_hidden_layers": 1}))
    write_gguf(small, byte_tokenizer, path)
    assert load_model(files, torch.float32, False)[0].config.num_hidden_layers == 1


@pytest.mark.slow
def test_a_student_from_a_gguf_file_learns_and_is_saved_as_safetensors(
    gguf_file, byte_tokenizer, tmp_path, corpus_texts
):
    student, path = gguf_file
    start = _logits(student)
    _save(student, byte_tokenizer, tmp_path / "base")
    _adapt(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        tmp_path / "adapter",
        target_modules=["q_proj"],
    )
    (tmp_path / "text.txt").write_text("\n".join(corpus_texts), encoding="utf-8")
    options = {
        "student_model": path.parent, "teacher_model": tmp_path / "adapter", "train_file": tmp_path / "text.txt",
        "train_steps": 2, "block_size": 32, "student_lr": 1e-3, "device": "cpu", "output_dir": tmp_path / "run",
    }  # fmt: skip
    code, out, err = run_script([word for name, value in options.items() for word in (f"--{name}", str(value))])
    assert (code, err) == (0, [])
    assert any(line.startswith("Student: ") and "; the weights of tiny.gguf dequantized" in line for line in out)
    assert any(
        line.startswith("Teacher: ") and f"; the adapter merged into {tmp_path / 'base'}" in line for line in out
    )
    saved = tmp_path / "run" / "student"
    assert (saved / "model.safetensors").is_file()
    assert not list(saved.glob("*.gguf"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved)
    assert 0 < (_logits(loaded) - start).abs().max() < 1
    assert transformers.AutoTokenizer.from_pretrained(saved).get_vocab() == byte_tokenizer.get_vocab()
