"""HTML and Markdown from the templates in `templates/`."""

from __future__ import annotations

import functools
from typing import Any

import jinja2


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("sar_kd.reporting"),
        autoescape=jinja2.select_autoescape(),  # .html, not .md
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(template: str, **values: Any) -> str:
    """A template filled with these values; in HTML they are escaped."""
    return _environment().get_template(template).render(values)
