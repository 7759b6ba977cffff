"""The run folder: one run in it from before anything is looked at, and only a run's own files are ever deleted."""

import json
from types import SimpleNamespace

import pytest

from sar_kd.config.sections import TrainConfig
from sar_kd.errors import UsageError
from sar_kd.runtime import run_folder
from sar_kd.runtime.run_folder import RUN_FILES, check_run_folder, clear_run_folder, hold_run_folder, holds_run

RUN = {"format": 2, "mode": "balanced", "train": {}}
MODEL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def _train(folder, **values):
    return TrainConfig(output_dir=str(folder), **values)


def _fill(folder, config, *names):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for name in names:
        (folder / name).write_text(name)


def test_a_run_holds_its_folder_before_anything_is_in_it_and_a_second_one_is_refused_at_once(tmp_path):
    train = _train(tmp_path / "runs" / "a")
    with hold_run_folder(train):
        for more in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(UsageError, match="is running in it"), hold_run_folder(_train(train.output_dir, **more)):
                pass
    assert list(tmp_path.iterdir()) == []  # nothing was written, so the folders are gone
    with hold_run_folder(train):
        _fill(tmp_path / "runs" / "a", RUN)
    with pytest.raises(UsageError, match="holds a run; --resume"), hold_run_folder(train):
        pass
    assert [path.name for path in (tmp_path / "runs" / "a").iterdir()] == ["config.json"]


def test_a_run_that_is_refused_leaves_the_folders_that_were_there(tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(UsageError, match="of another check"), hold_run_folder(_train(tmp_path / "runs" / "a" / "b")):
        raise UsageError("of another check")
    assert [path.name for path in tmp_path.rglob("*")] == ["runs"]


@pytest.mark.parametrize("more", [{}, {"overwrite": True}, {"resume": True}], ids=str)
@pytest.mark.parametrize("config", [MODEL, [], "{", "\xff{", "[" * 10**5], ids=["model", "list", "cut", "odd", "deep"])
def test_a_folder_whose_config_is_not_a_runs_is_refused_and_kept(tmp_path, config, more):
    _fill(tmp_path / "model", config, "model.safetensors")
    refused = pytest.raises(UsageError, match="holds no run, and is not empty")
    with refused, hold_run_folder(_train(tmp_path / "model", **more)):
        pass
    assert (tmp_path / "model" / "model.safetensors").read_text() == "model.safetensors"


def test_a_damaged_config_is_a_runs_where_its_metrics_lie_beside_it(tmp_path):
    _fill(tmp_path, "{", "metrics.jsonl")
    assert holds_run(tmp_path)
    check_run_folder(tmp_path, _train(tmp_path, overwrite=True))
    with pytest.raises(UsageError, match="holds a run"):
        check_run_folder(tmp_path, _train(tmp_path))


def test_only_a_runs_own_files_are_deleted(tmp_path):
    _fill(tmp_path, RUN, "metrics.jsonl", "notes.txt", ".report.html.partial")
    for name in ("student", "checkpoint", "data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    assert clear_run_folder(tmp_path) == ["data", "notes.txt"]
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "data", "notes.txt"}
    assert {"student", "checkpoint", "metrics.jsonl"} < set(RUN_FILES)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):
        with pytest.raises(UsageError, match=r"--output_dir .*cannot be written"), hold_run_folder(_train(folder)):
            pass


def test_rank_zero_takes_the_folder_for_all(tmp_path, monkeypatch):
    ranks = [SimpleNamespace(on_rank_zero=act) for act in (lambda act: act(), lambda act: None)]
    taken = []
    monkeypatch.setattr(run_folder.FolderLock, "acquire", lambda lock: taken.append(lock.folder))
    for group in ranks:
        with hold_run_folder(_train(tmp_path / "run"), group):
            assert taken == [tmp_path / "run"]
