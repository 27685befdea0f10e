"""Builds HTML pages in one file, from the templates in page/, with styles, scripts and plots.

A page loads nothing from elsewhere, and its content security policy allows only its own scripts, by
their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import d2filter
from d2filter.tools import drawing


def render(template: str, drawn: Sequence[tuple[str, str]], **values: Any) -> str:
    """A template with its values, which are escaped, and plots as `drawn` makes them."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    home = Path(__file__).parent / "page"
    scripts = [_bokeh(), (home / "report.js").read_text("utf-8")]
    environment = Environment(
        loader=FileSystemLoader(home), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(template).render(
        **values,
        version=d2filter.__version__,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        # what is made here, and nothing that a user's data could reach, goes in as it is
        css=Markup((home / "report.css").read_text("utf-8")),
        plots=[(name, Markup(text)) for name, text in drawn],
        stand_ins=Markup(_script_json(drawing.STAND_INS)),
        scripts=[Markup(text) for text in scripts],
        script_hashes=Markup(" ".join(f"'sha256-{_sha256(text)}'" for text in scripts)),
    )


def drawn(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Bokeh figures by the name of their place, as JSON."""
    from bokeh.embed import json_item

    return [(name, _script_json(json_item(figure))) for name, figure in figures.items()]


def _script_json(value: Any) -> str:
    """JSON that can stand in a script element whatever strings it holds."""
    return json.dumps(value).replace("<", "\\u003c")


def _bokeh() -> str:
    import bokeh

    path = Path(bokeh.__file__).parent / "server/static/js/bokeh.min.js"
    return path.read_text("utf-8")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
