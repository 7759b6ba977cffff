"""The name of the program in messages: what works where it is typed."""

import ast
import sys
from pathlib import Path

import pytest

from sar_kd.config import installation
from sar_kd.config.installation import as_called_here, program_name

ROOT = Path(__file__).parents[2]
WITHOUT_A_NAME = {
    "config",  # its help and recipes are shown through `as_called_here`
    "commands/build_embedded.py",  # the card of the models
    "reporting/diagnoses.py",  # advice about logs of other programs too
    "reporting/log_diagnosis.py",
}


@pytest.mark.parametrize(
    ("called", "folder", "path", "expected"),
    [
        ("/usr/bin/sar-kd", "/", [], "sar-kd"),
        (f"{ROOT}/sar_kd/__main__.py", "/", [], "python -m sar_kd"),
        ("train_sar_kd_stable.py", ROOT, [], "python -m sar_kd"),
        (f"{ROOT}/train_sar_kd_stable.py", "/", [], f"PYTHONPATH={ROOT} python -m sar_kd"),
        # Installed, or on PYTHONPATH: `-m` finds it anywhere.
        ("ipykernel_launcher.py", "/", [str(ROOT)], "python -m sar_kd"),
    ],
)
def test_the_name_is_what_can_be_typed_there(called, folder, path, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", [called])
    monkeypatch.setattr(sys, "path", ["/first", *path])
    monkeypatch.setattr(installation.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.chdir(folder)
    assert program_name() == expected
    assert as_called_here("make it with `sar-kd cache`") == f"make it with `{expected} cache`"


def test_where_only_python3_is_there_it_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["__main__.py"])
    monkeypatch.setattr(installation.shutil, "which", lambda name: None)
    assert program_name() == "python3 -m sar_kd"


def test_no_message_has_a_name_that_may_not_be_there():
    """Every text of the package that is no docstring."""
    found = []
    for path in sorted((ROOT / "sar_kd").rglob("*.py")):
        name = path.relative_to(ROOT / "sar_kd").as_posix()
        if name in WITHOUT_A_NAME or name.split("/")[0] in WITHOUT_A_NAME:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        # A text that stands alone as a statement is a docstring.
        alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        found += [
            (name, node.value)
            for node in texts
            if id(node) not in alone and any(part in node.value for part in ("`sar-kd ", "-m sar_kd ", "sar-kd["))
        ]
    assert not found
