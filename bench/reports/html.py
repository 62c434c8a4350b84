"""One HTML page that holds a report whole: tables, figures, configurations; it loads nothing."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

TEMPLATE = Path(__file__).with_name("page.html")


def data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def page(sections: list[dict[str, Any]]) -> str:
    """Return the page. Every text is escaped.

    sections: title, head, lines (a list a group of lines of cells), notes, attacks, figures (title
    -> PNG), groups (label, config, provenance).
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["data_url"] = data_url
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(sections=sections)
