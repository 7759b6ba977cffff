"""The hub's errors as one line each, from a hub of our own that answers as the real one does, and from none at all."""

import errno
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from sar_kd.config.sections import DataConfig
from sar_kd.data.files import sources
from sar_kd.errors import UsageError
from sar_kd.runtime.hub import explain_hub_error, offline_variable

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
_LOAD = """
import json, sys
from sar_kd.errors import UsageError
from sar_kd.models.loading import load_meta_model
lines = []
for name in sys.argv[1:]:
    try:
        load_meta_model("teacher_model", name, False)
    except UsageError as error:
        lines.append(str(error))
print(json.dumps(lines))
"""


class _Hub(BaseHTTPRequestHandler):
    """Answers as the hub does: 401 for what is not there or private, 403 for what is gated."""

    def do_HEAD(self):
        gated = "/gated/" in self.path
        self.send_response(403 if gated else 401)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub():
    """The address of a hub on this machine."""
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def _lines(tmp_path, *names, **environment) -> list[str]:
    """The errors for these models, from a process of its own: the hub's address is read when it is imported."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings = {**others, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), **environment}
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, *names], env=settings, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_a_model_that_is_not_there_and_one_that_is_gated_have_different_errors(hub, tmp_path):
    missing, gated = _lines(tmp_path, "nobody/nothing", "gated/model", HF_ENDPOINT=hub)
    assert missing.startswith("--teacher_model nobody/nothing: cannot be loaded (no such model on the hub")
    assert gated.startswith("--teacher_model gated/model: cannot be loaded (gated; accept its terms")
    assert "HF_TOKEN" in gated
    assert not any("\n" in line for line in (missing, gated))


def test_an_absent_network_and_a_forbidden_one_have_different_errors(tmp_path):
    (absent,) = _lines(tmp_path, "some/model", HF_ENDPOINT="http://127.0.0.1:9")
    (forbidden,) = _lines(tmp_path, "some/model", HF_HUB_OFFLINE="1")
    assert "(no such directory here, not in the cache, and no network; fetch it elsewhere with " in absent
    assert "`hf download some/model`" in absent
    assert "not in the cache, and HF_HUB_OFFLINE=1 forbids the network" in forbidden


@pytest.mark.parametrize(("value", "is_offline"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_the_network_is_forbidden_by_the_hubs_own_variable(monkeypatch, value, is_offline):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert offline_variable() == (f"HF_HUB_OFFLINE={value}" if is_offline else "")


def test_a_folder_that_is_there_is_not_called_missing(tmp_path):
    line = explain_hub_error(ConnectionError(), str(tmp_path))
    assert line.startswith("not in the cache, and no network")


def test_a_full_disk_during_the_download_is_named():
    error = ValueError("could not fetch")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert explain_hub_error(error, "a/b").startswith("no room on the disk for the download")


def test_an_error_of_another_kind_keeps_its_own_first_line():
    assert explain_hub_error(ValueError("broken header\nat byte 7"), "a/b") == "broken header"
    assert explain_hub_error(KeyError(), "a/b") == "KeyError"


@pytest.mark.parametrize(
    ("package", "expected"),
    [
        (
            "import nowhere_to_be_found",
            "`datasets` is installed but cannot be imported (No module named 'nowhere_to_be_found')",
        ),
        ("raise ImportError('numpy is too old')", "cannot be imported (numpy is too old)"),
        (None, "is the folder"),
    ],
    ids=["a part is missing", "a part is old", "a folder of that name"],
)
def test_a_half_installed_datasets_is_one_line_with_the_remedy(tmp_path, monkeypatch, package, expected):
    (tmp_path / "datasets").mkdir()
    if package:
        (tmp_path / "datasets" / "__init__.py").write_text(package)
    for name in [name for name in sys.modules if name.split(".")[0] == "datasets"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UsageError) as caught:
        sources.load_documents(DataConfig(dataset_name="wikitext"))
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    line = str(caught.value)
    assert line.startswith("--dataset_name wikitext: ")
    assert expected in line
    assert "pip install" in line
    assert "\n" not in line
