"""The page on the data, as the stage writes it and as a browser shows it."""

import re
import shutil

import grimp
import pytest
from PIL import Image

from loupe.config import load_params
from loupe.errors import ValidationError
from loupe.stages.files import DATA_REPORT, VALIDATION, WORST_IMAGES
from loupe.stages.ingest import ingest
from loupe.stages.validate import validate

HOSTILE_LABEL = "<script>alert(1)<"
HOSTILE_FILE = """"><img src=x onerror=alert(2)>'.png"""


@pytest.fixture(scope="module")
def check(repository):
    """Runs ingest and validate in a folder; gives the page, and the error if the images can't be trained on."""

    def check(root, place):
        params = load_params(repository / "params.yaml")
        params = params.model_copy(update={"ingest": params.ingest.model_copy(update={"source": str(root)})})
        place.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            ingest(params)
            try:
                validate(params)
            except ValidationError as error:
                return place / DATA_REPORT, error
        return place / DATA_REPORT, None

    return check


@pytest.fixture(scope="module")
def faulty(tmp_path_factory, write, draw, check):
    """The page on a folder with hostile names, two broken files, one content under two labels, and leaking splits."""
    folder = tmp_path_factory.mktemp("faulty")
    root = folder / "pets"
    for label, start in (("cat", 0), (HOSTILE_LABEL, 100)):
        for number in range(6):
            write(root / "train" / label / f"{number}.png", start + number, (96, 80))
        write(root / "test" / label / "6.png", start + 6, (96, 80))
    write(root / "train" / "cat" / HOSTILE_FILE, 50, (96, 80))
    shutil.copyfile(root / "train" / "cat" / "0.png", root / "test" / "cat" / "copy.png")
    draw(1, (96, 80)).save(root / "test" / "cat" / "like.jpg", quality=60)
    shutil.copyfile(root / "train" / "cat" / "2.png", root / "train" / HOSTILE_LABEL / "swapped.png")
    Image.new("L", (96, 80), 100).save(root / "train" / "cat" / "flat.png")
    for number in range(2):
        (root / "train" / "cat" / f"broken{number}.png").write_bytes(b"no image")
    page, error = check(root, folder / "project")
    assert error is not None
    return page


def test_the_page_is_written_though_the_images_cant_be_trained_on(faulty):
    text = faulty.read_text(encoding="utf-8")
    sentence = "Every file decodes as one image (up to 1% may be set aside)"
    assert f"These images can’t be trained on: 2 files fail “{sentence}”" in text
    for name in ("train/cat/broken0.png", "train/cat/0.png", "test/cat/copy.png"):
        assert name in text


def test_the_headline_figures_are_visible(faulty, show):
    page, *_ = show(faulty)
    shown = dict(zip(page.locator(".figures dt").all_inner_texts(), page.locator(".figures dd").all(), strict=True))
    expected = {"images": "19", "labels": "2", "set aside": "2", "critical": "2", "leaking pairs": "2"}
    for name, number in expected.items():
        assert shown[name].is_visible()
        assert shown[name].inner_text() == number, name
    assert page.locator(".verdict").is_visible()


def test_every_picture_is_shown_and_has_a_text(faulty, show):
    page, *_ = show(faulty)
    assert page.locator("img").count() > 20
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0 && image.alt)")


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_window(faulty, show, width):
    page, *_ = show(faulty, width)
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_the_page_asks_for_nothing_and_complains_of_nothing(faulty, show):
    _, requested, told = show(faulty)
    assert [url for url in requested if not url.startswith("data:")] == [faulty.as_uri()]
    assert told == []


def test_hostile_names_are_shown_as_text(faulty, show):
    page, _, told = show(faulty)
    assert page.locator("script").count() == 0
    assert page.locator("[onerror]").count() == 0
    assert page.locator("#counts tbody th").all_inner_texts()[1].strip() == HOSTILE_LABEL
    assert page.get_by_alt_text(f"train/cat/{HOSTILE_FILE}").count() > 0
    assert told == []


def test_leaking_pairs_stand_side_by_side_with_their_splits(faulty, show):
    page, *_ = show(faulty)
    pairs = page.locator("#leaks .pair")
    assert pairs.count() == 2
    first = pairs.nth(0)
    assert first.locator("img").count() == 2
    assert first.locator("strong").all_inner_texts() == ["train", "test"]
    assert "test/cat/copy.png" in first.inner_text()
    left, right = (picture.bounding_box() for picture in first.locator("img").all())
    assert left["y"] == right["y"]


def test_what_the_page_links_to_is_there(faulty):
    links = [link for link in re.findall(r'href="([^"]+)"', faulty.read_text(encoding="utf-8")) if link[0] != "#"]
    assert set(links) - {"data:,"} == {"data_docs/index.html", VALIDATION.name}
    assert all((faulty.parent / link).is_file() for link in links if link != "data:,")


def test_good_images_have_a_page_without_leaks_and_quarantine(check, class_folders, tmp_path):
    page, error = check(class_folders, tmp_path / "project")
    text = page.read_text(encoding="utf-8")
    assert error is None
    assert "These images can be trained on" in text
    assert 'id="leaks"' not in text
    assert 'id="quarantine"' not in text


def test_the_same_images_give_the_same_page(check, mvtec, tmp_path):
    first, second = (check(mvtec, tmp_path / name)[0] for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_a_folder_in_which_no_file_decodes_has_a_page(check, tmp_path):
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    (tmp_path / "pets" / "cat" / "a.png").write_bytes(b"no image")
    page, error = check(tmp_path / "pets", tmp_path / "project")
    assert error is not None
    assert "no image could be read" in page.read_text(encoding="utf-8")


def test_an_image_that_has_gone_since_ingest_is_named_and_not_shown(repository, class_folders, tmp_path, monkeypatch):
    Image.new("L", (24, 20), 100).save(class_folders / "cat" / "flat.png")
    params = load_params(repository / "params.yaml")
    params = params.model_copy(update={"ingest": params.ingest.model_copy(update={"source": str(class_folders)})})
    monkeypatch.chdir(tmp_path)
    ingest(params)
    (class_folders / "cat" / "flat.png").unlink()
    validate(params)
    assert "cat/flat.png" in DATA_REPORT.read_text(encoding="utf-8")
    assert WORST_IMAGES.is_file()


def test_validating_needs_neither_torch_nor_albumentations():
    """They take longer to import than the stage takes to run."""
    graph = grimp.build_graph("loupe", include_external_packages=True)
    assert not graph.find_upstream_modules("loupe.stages.validate") & {"torch", "albumentations", "timm"}
