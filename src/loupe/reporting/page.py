"""One HTML file that holds all it shows: no network, no script but its own, pictures inside."""

import base64
import hashlib
import io
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

QUALITY = 82  # of JPEG, 1 to 95
TINY = 3  # what fits so often into the room that it has is enlarged


def render_page(template: str, values: Mapping[str, object]) -> str:
    """Fill a template of this package. All text is escaped; a value that the template lacks is an error.

    Args:
        template: its file's name, such as `data.html.jinja`.
    """
    return _build_environment().get_template(template).render(values)


@cache
def _build_environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("loupe.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = "{:,}".format
    environment.filters["percent"] = "{:.1%}".format
    environment.filters["digest"] = _compute_digest
    return environment


def _compute_digest(script: str) -> str:
    """By which a page's policy allows one script and no other, as Content Security Policy writes it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode('ascii')}"


def shrink_picture(image: Image.Image, max_side: int) -> Image.Image:
    """A grey or RGB copy, its longer side at most `max_side` pixels. Transparency is left out, as models leave it out.

    Hamming's filter takes half of the bicubic's time here, and an eye sees no difference at this size.
    """
    shown = image.copy() if image.mode in ("L", "RGB") else image.convert("RGB")
    shown.thumbnail((max_side, max_side), Image.Resampling.HAMMING, reducing_gap=1.0)
    return shown


def embed_picture(image: Image.Image, max_side: int) -> str:
    """A JPEG of the picture as a data URI, its longer side at most `max_side` pixels.

    A tiny picture is enlarged by a whole factor, so that its pixels are seen as they are.
    """
    shown = shrink_picture(image, max_side)
    factor = max_side // max(shown.size)
    if factor >= TINY:
        shown = shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)
    content = io.BytesIO()
    shown.save(content, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"


def save_page(page: str, path: Path) -> None:
    """Write a page whole: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(path)
