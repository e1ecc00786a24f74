"""What the drill rests on; `make drill` is the drill itself."""

import numpy as np
import pytest
from PIL import Image

from loupe.config import parse_params
from pipelines.drill import COARSE, FINE, SIDE, build_params, draw_shape, draw_shapes


def test_the_drills_params_are_params():
    params = parse_params(build_params({"train_classifier.epochs": 1}))
    assert (params.ingest.source, params.train_classifier.epochs) == ("shapes", 1)


def test_stripes_are_seen_at_full_size_alone():
    """How far neighbouring columns differ amid a square: much more with stripes, and no more once they are halved."""

    def measure(shape, side):
        image = draw_shape(shape, np.random.default_rng(0)).resize((side, side), Image.Resampling.BILINEAR)
        middle = slice(3 * side // 8, 5 * side // 8)
        return np.abs(np.diff(np.asarray(image).astype(float)[middle, middle], axis=1)).mean()

    assert SIDE == FINE
    assert measure("striped_square", FINE) > 4 * measure("square", FINE)
    assert measure("striped_square", COARSE) == pytest.approx(measure("square", COARSE), rel=0.2)


def test_new_images_are_others(tmp_path):
    draw_shapes(tmp_path / "old", 3, seed=0)
    draw_shapes(tmp_path / "new", 3, seed=1)
    old, new = ({path.read_bytes() for path in (tmp_path / name).rglob("*.png")} for name in ("old", "new"))
    assert len(old) == len(new) == 9
    assert not old & new
