"""One HTML file from a template: style and pictures inside, nothing fetched from anywhere."""

from __future__ import annotations

from importlib import resources
from typing import Any


def render(template: str, **values: Any) -> str:
    """The page made of ``templates/TEMPLATE``. Values are text and are escaped.

    Pictures come ready as SVG; the templates mark them ``|safe``.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("secateur.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    style = resources.files("secateur.report").joinpath("templates", "page.css")
    return environment.get_template(template).render(style=style.read_text("utf-8"), **values)
