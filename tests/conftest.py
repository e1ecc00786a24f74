"""What the tests share: small real images, and folders of them in the three layouts."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

# Debian's Chromium, which asks its makers for nothing on its own.
CHROMIUM_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

Draw = Callable[..., Image.Image]
Write = Callable[..., Path]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def draw() -> Draw:
    """Makes an image whose content follows from its seed; size is (width, height)."""

    def draw(seed: int, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode)

    return draw


@pytest.fixture(scope="session")
def write(draw: Draw) -> Write:
    """Draws an image and saves it, with the folders above it."""

    def write(path: Path, seed: int, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(seed, size, mode).save(path)
        return path

    return write


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium; without one the test is skipped, or fails where LOUPE_NEEDS_BROWSER is set.

    Each module has its own: as long as Playwright runs, nothing else in this thread can start an event loop.
    """
    path = shutil.which("chromium")
    if path is None:
        give_up = pytest.fail if os.environ.get("LOUPE_NEEDS_BROWSER") else pytest.skip
        give_up("there is no chromium here: `make browser` installs Debian's, as root")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def show(browser: Browser) -> Iterator[Callable[..., tuple[Page, list[str], list[str]]]]:
    """Opens a page at a width, and gives it with what it requested and what its console and dialogs said."""
    contexts: list[BrowserContext] = []

    def show(path: Path, width: int = 1400, scheme: str = "light") -> tuple[Page, list[str], list[str]]:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        requested: list[str] = []
        told: list[str] = []
        page.on("request", lambda request: requested.append(request.url))
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("dialog", lambda dialog: (told.append(dialog.message), dialog.dismiss()))
        page.goto(path.as_uri())
        return page, requested, told

    yield show
    for context in contexts:
        context.close()


@pytest.fixture
def class_folders(tmp_path: Path, write: Write) -> Path:
    """Six images of cats and six of dogs."""
    root = tmp_path / "pets"
    for number in range(6):
        write(root / "cat" / f"{number}.png", number)
        write(root / "dog" / f"{number}.png", 100 + number)
    return root


@pytest.fixture
def split_folders(tmp_path: Path, write: Write) -> Path:
    """Of each of two labels four images to train on, two of val and two of test."""
    root = tmp_path / "pets"
    for offset, (split, num_images) in enumerate((("train", 4), ("val", 2), ("test", 2))):
        for number in range(num_images):
            write(root / split / "cat" / f"{number}.png", 10 * offset + number)
            write(root / split / "dog" / f"{number}.png", 100 + 10 * offset + number)
    return root


@pytest.fixture
def mvtec(tmp_path: Path, write: Write) -> Path:
    """Eight good bolts to train on; at test three good ones, three scratched ones with masks, two dents without."""
    root = tmp_path / "bolts"
    for number in range(8):
        write(root / "train" / "good" / f"{number}.png", number)
    for number in range(3):
        write(root / "test" / "good" / f"{number}.png", 20 + number)
        write(root / "test" / "scratch" / f"{number}.png", 30 + number)
        mask = np.zeros((20, 24), np.uint8)
        mask[4 * number : 4 * number + 4, 8:16] = 255
        path = root / "ground_truth" / "scratch" / f"{number}_mask.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)
    for number in range(2):
        write(root / "test" / "dent" / f"{number}.png", 40 + number)
    return root


@pytest.fixture(scope="session")
def read() -> Callable[[Path], tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]]:
    """Lists and decodes a folder: its manifest, quality and quarantine."""
    from loupe.data.manifest import build_facts, build_manifest
    from loupe.data.sources import list_images

    def read(root: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
        listing = list_images(root)
        return build_manifest(listing, build_facts(root, listing))

    return read


@pytest.fixture(scope="session")
def divide() -> Callable[..., pd.DataFrame]:
    """Assigns splits to a manifest in which no two contents look alike."""
    from loupe.data.split import Fractions, assign_splits, list_contents

    def divide(
        manifest: pd.DataFrame, fractions: tuple[float, float, float] = (0.2, 0.2, 0.2), seed: int = 0
    ) -> pd.DataFrame:
        contents = list_contents(manifest)
        return assign_splits(contents.assign(cluster=range(len(contents))), Fractions(*fractions), seed)

    return divide


@pytest.fixture(scope="session")
def tabulate() -> Callable[..., pd.DataFrame]:
    """Makes a manifest from (content, label, given split) triples; equal contents get equal ids."""

    def tabulate(
        triples: Iterable[tuple[str, str, str | None]], size: tuple[int, int] = (24, 20), mode: str = "RGB"
    ) -> pd.DataFrame:
        table = pd.DataFrame(triples, columns=["content", "label", "given_split"], dtype="str")
        contents = table.pop("content")
        return table.assign(
            image_id=[hashlib.sha256(content.encode()).hexdigest() for content in contents],
            path=[f"{row:04d}_{content}.png" for row, content in enumerate(contents)],
            group=pd.Series(None, table.index, dtype="str"),
            mask_path=pd.Series(None, table.index, dtype="str"),
            width=size[0],
            height=size[1],
            mode=mode,
            bits=float("nan"),
            phash="0" * 16,
            num_bytes=100,
        )

    return tabulate
