"""The mutations that hold the stress suite to account still apply to the package; running them is a benchmark."""

import importlib.util
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location("guard_mutations", ROOT / "benchmarks" / "guard_mutations.py")
guard_mutations = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(guard_mutations)


@pytest.mark.parametrize("mutation", guard_mutations.MUTATIONS, ids=lambda mutation: mutation.guard.replace(" ", "_"))
def test_a_mutation_applies_and_leaves_python(mutation, tmp_path):
    (tmp_path / mutation.module).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "sar_kd" / mutation.module, tmp_path / mutation.module)
    guard_mutations.mutate(tmp_path, mutation)
    changed = (tmp_path / mutation.module).read_text(encoding="utf-8")
    compile(changed, mutation.module, "exec")
    assert changed != (ROOT / "sar_kd" / mutation.module).read_text(encoding="utf-8")
