"""A report as one HTML page that needs no other file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bco_lightning.checkpoints.folders import written_whole
from bco_lightning.errors import ConfigError, printable
from bco_lightning.figures import to_svg
from bco_lightning.inspection.report import Section


def rendered(template: str, sections: Iterable[Section], **values: Any) -> str:
    """The page as text; whatever users wrote is escaped in it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["printable"] = printable
    drawn = []
    for section in sections:
        figures = [picture() for picture in section.pictures]
        # matplotlib escapes what it is told
        drawn.append((section, [(str(figure.get_label()), Markup(to_svg(figure))) for figure in figures]))  # noqa: S704
    return environment.get_template(template).render(sections=drawn, **values)


def write_text(text: str, path: Path, option: str, replaces: bool = False) -> None:
    """Writes a page into a file, whole or not at all.

    Raises:
        ConfigError: If it cannot be.
    """
    try:
        with written_whole(path, replaces) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(option, f"expected a file to write, found that it cannot be ({error.strerror}).") from error
