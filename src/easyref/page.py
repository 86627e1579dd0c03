"""Self-contained HTML pages (jinja2): one style, pictures inside, no script, nothing fetched."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

from easyref.images import to_png

if TYPE_CHECKING:
    from PIL import Image

STYLE = """
:root { color-scheme: light }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1d2229; margin: 0;
background: #fff }
main { max-width: 1060px; margin: 0 auto; padding: 40px 24px 72px }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px }
h2 { font-size: 21px; margin: 44px 0 10px }
h3 { font-size: 15px; margin: 26px 0 6px; color: #3c4550 }
p { max-width: 74ch; margin: 8px 0 }
.soft, figcaption { color: #69717c; font-size: 14px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: 7px 9px; border-bottom: 1px solid #e3e6ea; vertical-align: top }
td { white-space: nowrap }
th:first-child, td:first-child, td.words { text-align: left; white-space: normal }
thead th { color: #69717c; font-weight: 600; border-bottom: 2px solid #cfd4da }
.own { font-weight: 700; color: #2f6fb0 }
ul.head { list-style: none; padding: 0; margin: 14px 0 }
ul.head li { padding: 9px 0 9px 8em; border-bottom: 1px solid #e3e6ea; position: relative }
.tag { position: absolute; left: 0; top: 12px; width: 7em; font-size: 12.5px; color: #fff; border-radius: 4px;
  text-align: center; background: #8a929c }
.better { background: #2b7a4b }
.worse { background: #b3402f }
figure { margin: 16px 0 }
img { max-width: 100%; height: auto }
"""


def render(template: str, filters: dict[str, Any], **values: Any) -> bytes:
    """The page, with `style` filled in. A value that is missing is an error."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(filters)
    return environment.from_string(template).render(style=Markup(STYLE), **values).encode()


def data_uri(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(to_png(image)).decode()


def picture(figure: Any) -> Image.Image:
    """A matplotlib figure, drawn and closed."""
    from matplotlib import pyplot as plt
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, bbox_inches="tight")
    plt.close(figure)
    return Image.open(buffer)
