"""Every run of these tests has a dry run of its own."""

import pytest

from sar_kd.preflight import memory_plan
from sar_kd.preflight.dry_run import dry_run


@pytest.fixture(scope="module", autouse=True)
def _own_dry_runs(_one_dry_run_of_each_run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_plan, "dry_run", dry_run)
        yield
