"""Code during which no garbage in cycles is looked for."""

import gc

import pytest

from sar_kd.runtime.garbage import no_garbage_collection


@pytest.mark.parametrize("is_on", [True, False])
def test_the_collection_is_as_before_after_an_error_too(is_on):
    try:
        gc.enable() if is_on else gc.disable()
        with no_garbage_collection(), no_garbage_collection():
            assert not gc.isenabled()
        assert gc.isenabled() is is_on
        with pytest.raises(ValueError, match="x"), no_garbage_collection():
            raise ValueError("x")
        assert gc.isenabled() is is_on
    finally:
        gc.enable()


def test_it_decorates_a_function():
    assert no_garbage_collection()(gc.isenabled)() is False
    assert gc.isenabled()
