"""`--save_dtype` and `--push_to_hub`: the student of a finished run rounded and uploaded, and what is refused."""

import json
import re

import huggingface_hub
import pytest
import torch
import transformers

from sar_kd.commands import main, train
from sar_kd.models.saved_weights import convert_saved
from tests.helpers.runs import argv_of, inputs, latest_checkpoint, read_json, read_weights, run_script

_INPUTS = inputs
TOKEN = "hf_" + "neverWrittenAnywhere" * 2
SOUND = ("--model_dtype", "float32")


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """Two equal runs: the student of one is saved in float16."""
    folder = tmp_path_factory.mktemp("runs")
    for name, dtype in (("full", "float32"), ("half", "float16")):
        code, out, err = run_script(argv_of(inputs, folder / name, *SOUND, "--save_dtype", dtype, "--overwrite"))
        assert code == 0, err
        (folder / f"{name}.out").write_text("\n".join(out))
    return folder


def test_what_to_type_next_is_the_last_line(runs):
    for name in ("full", "half"):
        for lines in (runs / f"{name}.out", runs / name / "log.txt"):
            starts = [line.split(":")[0] for line in lines.read_text().splitlines()]
            assert starts.count("Next") == 1, lines
            behind = starts[starts.index("Next") + 1 :]
            assert not any(line.startswith(("Saved", "Finished", "  student")) for line in behind)
            assert ("Saved in float16" in starts) == (name == "half")


def test_the_saved_student_is_the_float32_one_rounded(runs):
    full, half = (read_weights(runs / name / "student" / "model.safetensors") for name in ("full", "half"))
    assert full.keys() == half.keys()
    assert {weight.dtype for weight in half.values()} == {torch.float16}
    assert all(torch.equal(half[name], weight.half()) for name, weight in full.items())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(runs / "half" / "student")
    assert loaded.dtype is torch.float16
    assert read_json(runs / "half" / "summary.json")["student_dtype"] == "float16"


def test_the_card_names_the_dtype_and_checkpoints_stay_float32(runs):
    for name, dtype in (("full", "float32"), ("half", "float16")):
        card = (runs / name / "student" / "README.md").read_text()
        assert f"The weights are {dtype} and those of step" in card
        assert ("before they were rounded.\n" in card) == (dtype == "float16")
        saved = read_weights(latest_checkpoint(runs / name) / "student.safetensors")
        assert {weight.dtype for weight in saved.values()} == {torch.float32}


def test_a_run_with_a_rounded_student_goes_on_and_generates(runs, inputs, capsys):
    for name in ("full", "half"):
        argv = ["--resume", "--output_dir", str(runs / name), "--train_steps", "5", "--eval_steps", "1"]
        assert run_script(argv)[0] == 0
    full, half = (read_weights(latest_checkpoint(runs / name) / "student.safetensors") for name in ("full", "half"))
    assert all(torch.equal(half[name], weight) for name, weight in full.items())
    config = read_json(runs / "half" / "student" / "config.json")
    assert config["dtype"] == "float16"
    assert main.main(["generate", str(runs / "half"), "A", "--max_new_tokens", "2", "--device", "cpu"]) == 0


def _overflowing(inputs, make_student, sp_tokenizer):
    student = make_student(len(sp_tokenizer), num_hidden_layers=1)
    student.model.layers[0].input_layernorm.weight.data[3] = -70_000.0
    student.save_pretrained(inputs / "far")
    sp_tokenizer.save_pretrained(inputs / "far")
    return argv_of(inputs, inputs / "far_run", *SOUND, "--save_dtype", "float16", "--overwrite", student="far")


def test_a_student_that_overflows_at_the_start_is_refused_before_the_first_step(inputs, make_student, sp_tokenizer):
    code, _, err = run_script(_overflowing(inputs, make_student, sp_tokenizer))
    assert code == 2
    assert "--save_dtype float16: model.layers.0.input_layernorm.weight holds -70,000" in err[-1]
    assert "65,504" in err[-1]
    assert not (inputs / "far_run" / "metrics.jsonl").exists()


def test_a_student_that_overflows_at_the_end_stays_float32(inputs, make_student, sp_tokenizer, monkeypatch):
    monkeypatch.setattr(train, "check_hand_over", lambda *args: None)
    argv = _overflowing(inputs, make_student, sp_tokenizer)
    code, _, err = run_script(argv)
    assert code == 2
    assert "input_layernorm.weight holds -" in err[-1]
    assert "stays in float32" in err[-1]
    weights = read_weights(inputs / "far_run" / "student" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert read_json(inputs / "far_run" / "summary.json")["status"] == "finished"


def test_nothing_is_touched_where_a_weight_of_a_later_file_overflows(tmp_path, make_student):
    student = make_student(520, num_hidden_layers=2)
    student.model.norm.weight.data[0] = 66_000.0
    student.save_pretrained(tmp_path, max_shard_size="50KB")
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds 66,000"):
        convert_saved("--save_dtype float16", tmp_path, torch.float16)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert convert_saved("--save_dtype bfloat16", tmp_path, torch.bfloat16) == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype is torch.bfloat16
    assert torch.equal(loaded.model.norm.weight, student.model.norm.weight.bfloat16())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(w.numel() * 2 for w in set(loaded.parameters()))


def test_weights_that_become_0_are_counted(tmp_path, make_student):
    student = make_student(520, num_hidden_layers=1)
    student.model.norm.weight.data[:5] = torch.tensor([1e-9, -1e-9, 0.0, 2e-8, 1e-7])
    student.save_pretrained(tmp_path)
    small = sum(int(((w.half() == 0) & (w != 0)).sum()) for w in student.parameters())
    assert convert_saved("", tmp_path, torch.float16) == small >= 3


def test_a_merged_student_is_rounded_and_its_adapter_stays(inputs, tmp_path):
    """Fine-tuned, by an adapter."""
    argv = ["sft", "--student_model", inputs / "student", "--train_file", inputs / "text.txt", "--max_steps", 2]
    argv += ["--block_size", 32, "--lora_rank", 2, "--device", "cpu", "--save_dtype", "bfloat16"]
    assert main.main([*map(str, argv), "--output_dir", str(tmp_path / "run")]) == 0
    merged = read_weights(tmp_path / "run" / "student" / "model.safetensors")
    adapter = read_weights(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in merged.values()} == {torch.bfloat16}
    assert {weight.dtype for weight in adapter.values()} == {torch.float32}
    assert read_json(tmp_path / "run" / "student" / "config.json")["dtype"] == "bfloat16"


class _Hub:
    """What HfApi is asked for; a class of it stands for a hub."""

    uploads: list
    fails = False
    is_private = True

    def create_repo(self, name, *, private, exist_ok):
        self.uploads.append(("create", name, private))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{name}")

    def model_info(self, repo_id):
        return huggingface_hub.hf_api.ModelInfo(id=repo_id, private=self.is_private)

    def upload_folder(self, *, repo_id, folder_path, commit_message, ignore_patterns):
        if self.fails:
            raise OSError(f"401: the token {TOKEN} is not accepted")
        self.uploads.append((repo_id, sorted(path.name for path in folder_path.iterdir())))


@pytest.fixture
def hub(monkeypatch):
    kind = type("Hub", (_Hub,), {"uploads": []})
    monkeypatch.setattr(huggingface_hub, "HfApi", kind)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return kind


def _assert_without_token(folder, *lines):
    assert not [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not [line for line in lines if TOKEN in line]


def test_a_run_uploads_its_student_into_a_private_repository(inputs, tmp_path, hub):
    code, out, err = run_script(argv_of(inputs, tmp_path / "run", *SOUND, "--push_to_hub", "small"))
    assert code == 0, err
    create, (repository, files) = hub.uploads
    assert create == ("create", "small", True)
    assert repository == "me/small"
    assert {"README.md", "model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= set(files)
    assert read_json(tmp_path / "run" / "summary.json")["hub_url"] == "https://huggingface.co/me/small"
    _assert_without_token(tmp_path, *out, *err)


def test_a_failed_upload_costs_nothing_and_names_the_command_that_tries_again(inputs, tmp_path, hub, capsys):
    hub.fails = True
    code, out, err = run_script(argv_of(inputs, tmp_path / "run", *SOUND, "--push_to_hub", "small", "--public"))
    assert code == 2
    assert read_json(tmp_path / "run" / "summary.json")["status"] == "finished"
    again = re.search(r"`(?:python -m sar_kd|sar-kd) (export .*)` tries again", err[-1])[1].split()
    _assert_without_token(tmp_path, *out, *err)
    hub.fails = False
    assert main.main(again) == 0
    assert hub.uploads[-2] == ("create", "small", False)
    captured = capsys.readouterr()
    assert "Uploaded: https://huggingface.co/me/small" in captured.out
    assert read_json(tmp_path / "run" / "summary.json")["hub_url"] == "https://huggingface.co/me/small"
    _assert_without_token(tmp_path, captured.out, captured.err)


def test_a_public_repository_that_is_there_gets_nothing_unless_asked_for(runs, hub, capsys):
    hub.is_private = False
    assert main.main(["export", str(runs / "full"), "--push_to_hub", "small"]) == 2
    assert "is there already, and public; give --public" in capsys.readouterr().err
    assert [each[0] for each in hub.uploads] == ["create"]
    assert main.main(["export", str(runs / "full"), "--push_to_hub", "small", "--public"]) == 0


def test_an_upload_without_a_token_is_refused_before_the_first_step(inputs, tmp_path, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    code, _, err = run_script(argv_of(inputs, tmp_path / "run", *SOUND, "--push_to_hub", "small"))
    assert code == 2
    assert "there is no token; log in with `hf auth login`, or set HF_TOKEN" in err[-1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    code, _, err = run_script(argv_of(inputs, tmp_path / "run", "--push_to_hub", "a/b/c"))
    assert "--push_to_hub a/b/c: must be NAME or OWNER/NAME" in err[-1]
