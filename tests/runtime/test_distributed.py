"""The settings of several processes, without starting them; with processes: `tests/commands/test_torchrun.py`."""

import pytest

from sar_kd.config.command_line import parse
from sar_kd.config.presets import STABLE
from sar_kd.errors import UsageError
from sar_kd.runtime.distributed import TorchrunGroup


def test_an_option_that_differs_between_ranks_is_shown_as_it_was_given(monkeypatch):
    group = TorchrunGroup.__new__(TorchrunGroup)
    configs = [parse(STABLE, ["--train_file", *files]) for files in (["a.txt"], ["b.txt", "c.txt"])]
    monkeypatch.setattr(group, "all_gather_object", lambda own: configs, raising=False)
    with pytest.raises(UsageError, match=r"^--train_file b.txt c.txt: rank 1 was given this and rank 0 a.txt; start"):
        group.check_same_config(configs[0])
    monkeypatch.setattr(group, "all_gather_object", lambda own: [own, own], raising=False)
    assert group.check_same_config(configs[0]) is configs[0]
