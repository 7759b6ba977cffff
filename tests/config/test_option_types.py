"""The options of the Python functions, as types: they are those of the command line, each with its own kind."""

import typing

import pytest

from sar_kd.config import option_types
from sar_kd.config.commands import CACHE, SFT
from sar_kd.config.fields import options_of
from sar_kd.config.presets import MODES, STABLE

PARAMETERS = {"teacher_model", "student_model", "train_file", "validation_file", "output_dir", "json"}


def _type_of(item, kind):
    if item.metadata["choices"]:
        return f"Literal[{', '.join(repr(choice) for choice in item.metadata['choices'])}]"
    if kind in (bool, int, float, str):
        return kind.__name__ + (" | Literal['auto']" if item.metadata["auto"] else "")
    return "Sequence[str]"


@pytest.mark.parametrize(
    ("name", "command", "parameters"),
    [
        ("DistillOptions", STABLE, PARAMETERS),
        ("SftOptions", SFT, PARAMETERS),
        ("CacheOptions", CACHE, PARAMETERS - {"student_model"} | {"teacher_cache"}),
    ],
)
def test_every_option_is_a_typed_argument(name, command, parameters):
    found = {
        key: annotation.__forward_arg__.replace('"', "'")
        for key, annotation in getattr(option_types, name).__annotations__.items()
    }
    options = options_of(command.sections.values())
    expected = {item.name: _type_of(item, kind) for item, kind in options if item.name not in parameters}
    assert {key: " ".join(kind.split()) for key, kind in found.items()} == expected


def test_the_modes_are_those_of_the_command_line():
    assert typing.get_args(option_types.Mode) == tuple(MODES)
