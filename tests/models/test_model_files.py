"""Nonsense in a model's files is one line that names the file, soon; a model's name stands for the right files."""

import json
import os
import re
import shutil
import time

import pytest
import safetensors.torch
import torch

from sar_kd.config.runs import SftConfig, SftModelConfig
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.samples import Document
from sar_kd.errors import UsageError
from sar_kd.models import model_files
from sar_kd.models.loading import load_for_generation, load_meta_model, load_student
from sar_kd.models.model_files import check_files, find_model
from sar_kd.runtime.precision import Precision


@pytest.fixture(scope="module")
def healthy(tmp_path_factory, make_student, sp_tokenizer):
    folder = tmp_path_factory.mktemp("healthy")
    make_student(len(sp_tokenizer)).save_pretrained(folder)
    sp_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(healthy, tmp_path):
    return shutil.copytree(healthy, tmp_path / "model")


def _edit(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def _line(load, *args) -> str:
    """The one line of a refusal."""
    started = time.process_time()
    with pytest.raises(UsageError) as caught:
        load(*args)
    assert time.process_time() - started < 10
    line = str(caught.value)
    assert "\n" not in line
    return line


def _meta(folder):
    return load_meta_model("student_model", str(folder), False)


def _load(folder):
    return load_for_generation("student_model", str(folder), False)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads in config.json is 0, which has to be a whole number"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers in config.json is 1,000,000, and its weights are 21 tensors"),
        ({"num_hidden_layers": -1}, "num_hidden_layers in config.json is -1"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers in config.json is 1.5"),
        ({"vocab_size": "x"}, "vocab_size in config.json is 'x'"),
        ({"hidden_size": 0}, "hidden_size in config.json is 0"),
        (
            {"hidden_size": 10**9},
            "model.embed_tokens.weight is [520, 32] in the weights and [520, 1000000000] by config.json, where "
            "hidden_size is 1000000000; put back the config.json that these weights were saved with",
        ),
        ({"num_key_value_heads": 3}, "config.json and weights do not belong together"),
        ({"max_position_embeddings": -1}, "max_position_embeddings in config.json is -1"),
        ({"hidden_act": "nope"}, "cannot be loaded (config.json: KeyError: 'nope')"),
        ({"rms_norm_eps": "x"}, "Field 'rms_norm_eps' expected float, got str"),
        ({"num_attention_heads": 7}, "The hidden size (32) is not a multiple of the number of attention heads (7)"),
        ({"auto_map": {"AutoConfig": "a.B"}, "model_type": "zork"}, "runs only with --trust_remote_code; read that"),
    ],
)
def test_a_config_that_cannot_be_is_one_line(folder, entries, expected):
    _edit(folder / "config.json", **entries)
    line = _line(_meta, folder)
    assert line.startswith(f"--student_model {folder}: ")
    assert expected in line


@pytest.mark.parametrize("load", [_meta, _load])
def test_a_quantization_that_transformers_would_ignore_is_refused_and_a_known_one_is_not(folder, load):
    _edit(folder / "config.json", quantization_config={"quant_method": "three-bit", "bits": 3})
    line = _line(load, folder)
    assert line.startswith(
        f"--student_model {folder}: is quantized by 'three-bit' (quantization_config in config.json)"
    )
    _edit(folder / "config.json", quantization_config={"bits": 3})
    assert "no `quant_method` attribute" in _line(load, folder)
    _edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    _meta(folder)


def test_a_million_layers_without_weights_are_refused_too(folder):
    (folder / "model.safetensors").unlink()
    _edit(folder / "config.json", num_hidden_layers=10**6)
    assert "num_hidden_layers in config.json is 1,000,000, and no model has as many" in _line(_meta, folder)
    _edit(folder / "config.json", num_hidden_layers=2)
    _meta(folder)  # of a cached teacher's, say


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(("entry", "expected"), [("vocab_size", [600, 32]), ("hidden_size", [520, 600])])
def test_weights_of_another_size_are_named_with_both_sizes(folder, kind, entry, expected):
    if kind == "bin":
        torch.save(safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    _edit(folder / "config.json", **{entry: 600})
    line = _line(_load, folder)
    assert f".weight is [520, 32] in the weights and {expected} by config.json, where {entry} is 600" in line
    assert line.endswith("put back the config.json that these weights were saved with")


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"3", b"\xff\xfe", b'{"a":' * 10**5])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_damaged_json_file_is_named(folder, name, text):
    (folder / name).write_bytes(text)
    assert f"{name} is damaged (" in _line(_load, folder)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d["model"].update(merges=[["zzz", "qqq"]]), "(tokenizer.json: Token `zzz` out of vocabulary"),
        (lambda d: d["model"]["vocab"].update({"a": -5}), "(tokenizer.json: invalid value: integer `-5`"),
        (lambda d: d["model"].update(vocab="x"), '(tokenizer.json: invalid type: string "x"'),
        (lambda d: d.clear(), "cannot be loaded (its tokenizer: KeyError: 'added_tokens')"),
    ],
)
def test_a_tokenizer_that_cannot_be_is_one_line(folder, change, expected):
    path = folder / "tokenizer.json"
    definition = json.loads(path.read_text())
    change(definition)
    path.write_text(json.dumps(definition))
    assert expected in _line(_load, folder)


def _added(content, number):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return lambda d: d["added_tokens"].append({"id": number, "content": content, "special": True, **flags})


def _with(**entries):
    return lambda definition: definition.update(entries)


_NO_CHANGE = {"direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
_REPLACE = {"type": "Replace", "pattern": {"Regex": "."}}
NONSENSE = {
    "prefix longer than tokens": lambda d: d["model"].update(continuing_subword_prefix="@" * 30),
    "charsmap of nothing": _with(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////wAAAAA="}),
    "second sequence alone": _with(
        post_processor={"type": "TemplateProcessing", "single": [{"Sequence": {"id": "B", "type_id": 0}}], "pair": [],
                        "special_tokens": {}}
    ),
    "empty added token": _added("", 3),
    "added token of a huge id": _added("<x>", 2**32 - 1),
    "long added token": _added("x" * 10**6, 3),
    "padding to ten million": _with(padding={"strategy": {"Fixed": 10**7}, "pad_to_multiple_of": None, **_NO_CHANGE}),
    "padding to multiples of 0": _with(padding={"strategy": "BatchLongest", "pad_to_multiple_of": 0, **_NO_CHANGE}),
    "truncation to 0": _with(
        truncation={"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 5}
    ),
    "split at nothing": _with(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": ""}, "behavior": "Removed", "invert": False}
    ),
    "no letter z": lambda d: d["model"].update(
        unk_token="@@", merges=[], vocab={t: i for t, i in d["model"]["vocab"].items() if t not in ("z", "<0x7A>")}
    ),
    "no vocabulary": lambda d: d["model"].update(vocab={}, merges=[]),
    "huge ids": lambda d: d["model"]["vocab"].update({t: 2**31 + i for i, t in enumerate([*d["model"]["vocab"]][-5:])}),
    "every character made twenty": _with(
        normalizer={"type": "Sequence", "normalizers": [{**_REPLACE, "content": "x" * 20}] * 3}
    ),
    "every character removed": _with(normalizer={**_REPLACE, "content": ""}),
    "nested normalizers": _with(normalizer=json.loads('{"type":"Sequence","normalizers":[' * 300 + "]}" * 300)),
    "decoder that strips all": _with(decoder={"type": "Strip", "content": " ", "start": 10**9, "stop": 10**9}),
}  # fmt: skip
"""Damages of tokenizer.json under which the Rust code of tokenizers may panic, loop or load something useless"""

LINES = {
    "no vocabulary": "its tokenizer fails on plain text (Unk token",
    "no letter z": "its tokenizer fails on plain text (Unk token",
    "huge ids": "its tokenizer has id 2,147,483,652 in its vocabulary, and no model has as many",
    "every character made twenty": "its tokenizer makes 400 characters of 1 (its normalizer)",
}
"""What some of them are told"""

NONSENSE_CONFIGS = [
    {"head_dim": 0}, {"head_dim": 3}, {"rope_parameters": 5}, {"rope_parameters": {"rope_type": "nope"}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, {"eos_token_id": 10**9}, {"eos_token_id": "x"},
    {"eos_token_id": -3}, {"model_type": 5}, {"architectures": 5}, {"dtype": "float99"}, {"quantization_config": 5},
    {"tie_word_embeddings": "maybe"}, {"intermediate_size": 10**12}, {"text_config": 5}, {"vocab_size": 1},
]  # fmt: skip


@pytest.mark.parametrize("damage", [*NONSENSE, *NONSENSE_CONFIGS], ids=str)
def test_no_nonsense_ends_in_a_traceback_or_takes_long(folder, damage):
    path = folder / ("config.json" if isinstance(damage, dict) else "tokenizer.json")
    definition = json.loads(path.read_text())
    definition.update(damage) if isinstance(damage, dict) else NONSENSE[damage](definition)
    path.write_text(json.dumps(definition))
    config = SftConfig(models=SftModelConfig(student_model=str(folder)))
    line, started = "", time.process_time()
    try:
        models = load_student(config, Precision(torch.device("cpu"), torch.float32, 1.0))
        build_dataset([Document("a", "The river rose in the night.\n" * 20)], models.tokenizers, 16, 16)
    except UsageError as error:
        line = str(error)
    assert "\n" not in line
    assert LINES.get(str(damage), "") in line
    assert time.process_time() - started < 20


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_hundred_thousand_added_tokens_are_refused_before_they_are_read(folder, name):
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokens = [{"id": 1000 + i, "content": f"<{i}>", **token} for i in range(10**5)]
    in_config = {"added_tokens_decoder": {str(token.pop("id")): token for token in map(dict, tokens)}}
    _edit(folder / name, **({"added_tokens": tokens} if name == "tokenizer.json" else in_config))
    assert f"{name} adds 100,000 tokens, and the model has 520 ids" in _line(_load, folder)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: os.truncate(f / "model.safetensors", 5000), "model.safetensors is damaged (Error while"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors is damaged (Error while"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights (model.safetensors)"),
        (lambda f: (f / "config.json").unlink(), "cannot be loaded (no config.json in it)"),
        (lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], "has no tokenizer ("),
    ],
)
def test_a_damaged_or_missing_file_is_named(folder, damage, expected):
    damage(folder)
    assert expected in _line(_load, folder)


def test_the_folder_of_a_run_is_refused_with_its_student(folder):
    (folder / "config.json").write_text(json.dumps({"format": 3, "mode": "precise", "models": {}}))
    (folder / "student").mkdir()
    assert f"is the folder of a run; give the student in it, {folder / 'student'}" in _line(_load, folder)


def test_missing_shards_and_a_damaged_index_are_named(folder):
    index = folder / "model.safetensors.index.json"
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    assert "model-2.safetensors is missing, which model.safetensors.index.json names" in _line(_load, folder)
    index.write_text(json.dumps({"weight_map": 3}))
    assert "model.safetensors.index.json is damaged (it has no weight_map)" in _line(_load, folder)


def test_pickled_junk_is_one_line(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"junk")
    assert "cannot be loaded (its weights: " in _line(_load, folder)


def test_an_error_begins_with_the_title_that_is_given(folder):
    (folder / "model.safetensors").write_bytes(b"")
    line = _line(load_for_generation, "student_model", str(folder), False, torch.float32, f"generate {folder}")
    assert line.startswith(f"generate {folder}: model.safetensors is damaged")


def test_a_healthy_folder_passes_and_padded_or_missing_sizes_do(folder):
    check_files(find_model("student_model", str(folder)))
    _load(folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file({**weights, "other": torch.ones(3)}, folder / "model.safetensors", {"format": "pt"})
    _edit(folder / "config.json", max_position_embeddings=None)
    with pytest.raises(UsageError, match="max_position_embeddings"):  # transformers' own check, in one line
        _load(folder)


# Which files a name stands for


def test_a_file_that_is_no_gguf_file_is_refused(folder):
    line = _line(find_model, "teacher_model", str(folder / "model.safetensors"))
    assert "is a file; give the folder that it is in, or a .gguf file" in line


def test_a_gguf_file_and_a_folder_with_one_are_the_same_model(tmp_path, monkeypatch):
    monkeypatch.setattr(model_files, "is_installed", lambda package: True)
    path = tmp_path / "model.Q4_1.gguf"
    path.write_bytes(b"GGUF" + bytes(20))
    by_file, by_folder = (find_model("teacher_model", str(name)) for name in (path, tmp_path))
    assert by_file.location == by_folder.location == str(tmp_path)
    assert by_file.arguments == by_folder.arguments == {"gguf_file": "model.Q4_1.gguf"}
    check_files(by_file)
    path.write_bytes(b"junk")
    assert "model.Q4_1.gguf is damaged (it does not begin as a GGUF file)" in _line(check_files, by_file)
    (tmp_path / "other.gguf").touch()
    assert "holds 2 GGUF files; give one of them: model.Q4_1.gguf, other.gguf" in _line(
        find_model, "teacher_model", str(tmp_path)
    )
    assert "no such file" in _line(find_model, "teacher_model", "absent.gguf")


def test_a_model_in_both_formats_is_the_folder(folder, monkeypatch):
    monkeypatch.setattr(model_files, "is_installed", lambda package: True)
    (folder / "model.gguf").touch()
    assert find_model("teacher_model", str(folder)).arguments == {}
    (folder / "model.safetensors").unlink()  # a folder of GGUF files with a config beside them
    assert find_model("teacher_model", str(folder)).arguments == {"gguf_file": "model.gguf"}


def test_without_gguf_there_is_one_line_that_names_the_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(model_files, "is_installed", lambda package: False)
    (tmp_path / "model.gguf").touch()
    assert "a GGUF file needs `pip install gguf sentencepiece protobuf`" in _line(find_model, "model", str(tmp_path))


def test_an_adapter_left_beside_a_whole_model_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    line = _line(find_model, "student_model", str(folder))
    assert re.search(
        r"holds a whole model and an adapter \(adapter_config.json\); delete the adapter, or move it", line
    )


def test_an_adapter_without_a_base_model_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "names no base model (base_model_name_or_path)" in _line(find_model, "student_model", str(tmp_path))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "./nowhere"}))
    assert "its base model ./nowhere: no such directory" in _line(find_model, "student_model", str(tmp_path))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    assert f"its base model {tmp_path} is an adapter too" in _line(find_model, "student_model", str(tmp_path))
