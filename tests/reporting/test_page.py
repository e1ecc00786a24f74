import base64
import io

import jinja2
import pytest
from PIL import Image

from loupe.reporting.page import embed_picture, render_page, save_page, shrink_picture


def read_embedded(uri):
    kind, _, content = uri.partition(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


@pytest.fixture
def write_template(tmp_path, monkeypatch):
    """Makes a template that fills the frame of the reports, and the environment that finds it."""
    from loupe.reporting import page

    def write_template(main):
        text = '{% extends "base.html.jinja" %}{% block title %}t{% endblock %}{% block head %}h{% endblock %}'
        (tmp_path / "some.html.jinja").write_text(f"{text}{{% block main %}}{main}{{% endblock %}}")
        own = page._build_environment.__wrapped__()
        own.loader = jinja2.ChoiceLoader([own.loader, jinja2.FileSystemLoader(tmp_path)])
        monkeypatch.setattr(page, "_build_environment", lambda: own)
        return "some.html.jinja"

    return write_template


@pytest.mark.parametrize(("size", "shown"), [((400, 200), (100, 50)), ((200, 400), (50, 100)), ((400, 1), (100, 1))])
def test_a_picture_is_embedded_whole_and_as_small_as_asked_for(draw, size, shown):
    assert read_embedded(embed_picture(draw(0, size), 100)).size == shown


@pytest.mark.parametrize(("side", "shown"), [(8, 96), (33, 99), (34, 34), (99, 99)])
def test_a_tiny_picture_is_enlarged_by_a_whole_factor_and_others_are_not(draw, side, shown):
    assert read_embedded(embed_picture(draw(0, (side, side)), 100)).size == (shown, shown)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_pictures_of_all_modes_are_embedded(draw, mode):
    assert read_embedded(embed_picture(draw(0, mode=mode), 100)).format == "JPEG"


def test_shrinking_does_not_change_its_picture(draw):
    picture = draw(0, (400, 200))
    shrink_picture(picture, 100)
    assert picture.size == (400, 200)


def test_text_is_escaped_in_content_and_in_attributes(write_template):
    name = """<script>alert(1)</script>"'"""
    page = render_page(write_template('<p title="{{ name }}">{{ name }}</p>'), {"name": name})
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;") == 2


def test_a_value_that_a_template_lacks_is_an_error(write_template):
    with pytest.raises(jinja2.UndefinedError, match="name"):
        render_page(write_template("{{ name }}"), {})


def test_every_report_forbids_scripts_and_the_network(write_template):
    page = render_page(write_template(""), {})
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page


def test_saving_a_page_makes_its_folder_and_leaves_nothing_else(tmp_path):
    save_page("a “page”", tmp_path / "reports" / "data.html")
    assert (tmp_path / "reports" / "data.html").read_text(encoding="utf-8") == "a “page”"
    assert [file.name for file in (tmp_path / "reports").iterdir()] == ["data.html"]
