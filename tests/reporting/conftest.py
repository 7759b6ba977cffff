"""The pages of these tests have their charts."""

import pytest

from sar_kd.reporting import drawing

_DRAWN = drawing._svg  # conftest.py of all tests has not replaced it yet


@pytest.fixture(scope="module", autouse=True)
def _drawn_charts(_empty_charts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "_svg", _DRAWN)
        yield
