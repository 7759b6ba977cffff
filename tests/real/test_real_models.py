"""SmolLM2-135M-Instruct and Gemma 3 270M: GGUF in, float16 of a teacher that overflows it, tokenizers that lack bytes.

`pytest -m real` runs these; `tests/helpers/real_models.py` says where the models come from. Each takes one to three
minutes of one core.
"""

import json
import math

import gguf
import pytest
import torch
import transformers

from sar_kd import embedded
from sar_kd.commands.main import main
from sar_kd.runtime.precision import Precision
from tests.helpers.real_models import NAMES, evaluate_beginnings, gguf_file, model_path
from tests.helpers.runs import read_json, read_metrics, read_weights, run_script

pytestmark = pytest.mark.real
NUM_DOCUMENTS = 25
SMOLLM2_LACKS = [0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2]


@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="session")
def texts(scratch):
    """A little English documentation to train on, and less that is held out; as options."""
    found = {}
    for option, split, count in (("train_file", "transfer", 8), ("validation_file", "validation", 1)):
        (text,) = embedded.read_text(split)
        documents = [document[:1000] for document in text.values() if len(document) > 1000][:count]
        found[option] = scratch / f"{split}.jsonl"
        found[option].write_text("".join(json.dumps({"text": each}) + "\n" for each in documents), encoding="utf-8")
    return found


def _run(teacher, student, texts, out, **more):
    """A run of the script with short blocks; returns its printed lines."""
    options = {
        "teacher_model": teacher, "student_model": student, **texts, "block_size": 64, "train_steps": 1,
        "warmup_steps": 1, "per_device_batch_size": 1, "grad_accum_steps": 1, "device": "cpu", "output_dir": out,
        **more,
    }  # fmt: skip
    code, lines, errors = run_script([word for name, value in options.items() for word in (f"--{name}", str(value))])
    assert (code, errors) == (0, [])
    return lines


@pytest.mark.parametrize(("teacher", "student"), [NAMES, NAMES[::-1]])
def test_a_gguf_file_is_a_teacher_and_a_folder_with_one_a_student_that_is_saved(
    teacher, student, texts, scratch, tmp_path
):
    teacher, student = gguf_file(teacher, scratch), gguf_file(student, scratch)
    folder, out = tmp_path / "folder", tmp_path / "run"
    folder.mkdir()
    (folder / student.name).symlink_to(student)
    lines = _run(teacher, folder, texts, out, student_lr=1e-5)
    for role, path in (("Teacher", teacher), ("Student", student)):
        assert any(line.startswith(f"{role}: ") and f"the weights of {path.name} dequantized" in line for line in lines)
    assert not list((out / "student").glob("*.gguf"))
    saved = read_weights(out / "student" / "model.safetensors")
    # Beside the file as the `gguf` package alone reads it: one step moves a weight by the learning rate at most.
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(student).tensors}
    for written, name in (("token_embd", "embed_tokens"), ("blk.0.ffn_down", "layers.0.mlp.down_proj")):
        tensor = tensors[f"{written}.weight"]
        start = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        assert 0 < (saved[f"model.{name}.weight"] - start).abs().max() < 2e-5
    again = transformers.AutoModelForCausalLM.from_pretrained(out / "student", dtype=torch.float32)
    assert all(torch.equal(value, saved[name]) for name, value in again.state_dict().items() if name in saved)


@pytest.mark.parametrize("name", NAMES)
def test_float16_has_the_bits_per_byte_of_float32(name, scratch):
    path, found = model_path(name, scratch), {}
    for dtype in (torch.float32, torch.float16):
        found[dtype] = evaluate_beginnings(path, Precision(torch.device("cpu"), dtype, 1.0), NUM_DOCUMENTS)
        print(f"{name} in {dtype}: {found[dtype].bits_per_byte:.5f} bits per byte, {found[dtype].num_tokens:,} tokens")
    whole, half = found.values()
    assert whole.num_nonfinite == half.num_nonfinite == 0
    assert 0.9 < whole.bits_per_byte < 1.3
    assert half.bits_per_byte == pytest.approx(whole.bits_per_byte, abs=1e-3)


def test_a_teacher_beyond_float16s_range_teaches_in_every_step(texts, scratch, tmp_path):
    gemma, smollm2 = (model_path(name, scratch) for name in ("gemma3", "smollm2"))
    lines = _run(gemma, smollm2, texts, tmp_path, model_dtype="float16", train_steps=4, mode="precise")
    steps = read_metrics(tmp_path, "step")
    assert len(steps) == 4
    for step in steps:
        assert step["applied"]
        assert 0 < step["kd_loss"] < math.inf
        assert step["teacher_positions"] > 0
        assert step["teacher_rows_dropped"] == step["teacher_rows_infinite"] == 0
    assert 0 < read_json(tmp_path / "summary.json")["teacher_val_bits_per_byte"] < 2
    assert not any("teacher_dropped" in line for line in lines)


def test_the_audit_names_the_bytes_that_a_vocabulary_lacks(texts, scratch, capsys):
    gemma, smollm2 = (str(model_path(name, scratch)) for name in ("gemma3", "smollm2"))
    argv = ["audit", "--teacher_model", gemma, "--student_model", smollm2, "--train_file", str(texts["train_file"])]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"Bytes that no token of the student's vocabulary holds: {bytes(SMOLLM2_LACKS).hex(' ')}" in lines
    assert not any("the teacher's vocabulary holds" in line for line in lines)
    assert main([*argv, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["student_lacks"], record["teacher_lacks"]) == (SMOLLM2_LACKS, [])
    assert record["skipped_bytes"] == 0
    assert record["strict"] > 0.5
