"""What images that a model was not fitted to look like to it: kept, for a later look at how others have drifted."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from loupe.data.manifest import save_table
from loupe.data.prepare import Prepared
from loupe.stages.files import REFERENCE

MOST_IMAGES = 1000

Embed = Callable[
    [UInt8[Tensor, "batch channels height width"]],
    tuple[Float[Tensor, "batch num_values"], Float[Tensor, " batch"] | None],
]


def save_reference(prepared: Prepared, splits: Sequence[str], embed: Embed, folder: Path) -> None:
    """Write reference.parquet into `folder`, a row for each image of these splits: some hundreds are enough.

    Its columns are `image_id`, `path`, `embedding` and, of a detector, `anomaly_score`.

    Args:
        splits: none that what embeds has learnt from.
        embed: gives embeddings and anomaly scores of a batch, None for the latter where there are none.
    """
    rows = np.concatenate([prepared.rows_of(split) for split in splits])[:MOST_IMAGES]
    embeddings: list[np.ndarray] = []
    scores: list[float] = []
    with torch.inference_mode():
        for batch in prepared.read_batches(rows):
            vectors, anomaly_scores = embed(torch.from_numpy(batch))
            embeddings += list(vectors.float().cpu().numpy())
            scores += [] if anomaly_scores is None else anomaly_scores.double().tolist()
    table = prepared.index.iloc[rows][["image_id", "path"]].reset_index(drop=True)
    table["embedding"] = pd.Series(embeddings, dtype="object")
    save_table(table.assign(anomaly_score=scores) if scores else table, folder / REFERENCE)
