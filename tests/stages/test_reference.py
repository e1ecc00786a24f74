import numpy as np
import pandas as pd

from loupe.data.images import Geometry
from loupe.data.manifest import load_table
from loupe.data.prepare import Prepared
from loupe.stages.reference import save_reference

NUM_IMAGES = 40


def test_the_reference_is_of_the_splits_it_is_asked_for_and_of_no_others(tmp_path):
    images = np.arange(NUM_IMAGES, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 1), np.uint8)
    index = pd.DataFrame(
        {
            "image_id": [f"id{number}" for number in range(NUM_IMAGES)],
            "path": [f"{number}.png" for number in range(NUM_IMAGES)],
            "split": ["train", "val", "calibration", "test"] * (NUM_IMAGES // 4),
        }
    )
    prepared = Prepared(images, images[:0, ..., 0], index, Geometry(8, 8, 1, 8, 8, 8, 8, "crop", "bicubic"))
    save_reference(
        prepared,
        ("calibration", "val"),
        lambda batch: (batch.float().mean((2, 3)), batch.amax((1, 2, 3))),
        tmp_path,
    )
    table = load_table(tmp_path / "reference.parquet")
    numbers = [*range(2, NUM_IMAGES, 4), *range(1, NUM_IMAGES, 4)]
    assert list(table["image_id"]) == [f"id{number}" for number in numbers]
    assert [float(value[0]) for value in table["embedding"]] == numbers
    assert list(table["anomaly_score"]) == numbers
