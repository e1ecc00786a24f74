"""Feeding prepared images to training: augmented by (seed, epoch, image), whatever the number of workers."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import albumentations as A
import numpy as np
import pandas as pd
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from loupe.data.batched import BatchedAugmentation, Flip, Move
from loupe.data.transforms import augment_image, list_batched_steps

SMALL_SIDE = 48  # pixels; a CPU moves larger images faster one at a time

log = logging.getLogger(__name__)

Batch = tuple[UInt8[Tensor, "batch channels height width"], Int64[Tensor, " batch"]]


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, position): the epoch travels with each position, so that workers need no shared state."""

    def __init__(self, num_images: int, seed: int, shuffle: bool) -> None:
        self.num_images = num_images
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[tuple[int, int]]:
        positions = np.arange(self.num_images)
        if self.shuffle:
            np.random.default_rng((self.seed, self.epoch)).shuffle(positions)
        return ((self.epoch, int(position)) for position in positions)


class PreparedDataset(Dataset[Batch]):
    """Images and targets, fetched a batch at a time."""

    def __init__(
        self,
        images: UInt8[np.ndarray, "num_all height width channels"],
        rows: Int64[np.ndarray, " num_images"],
        targets: Int64[np.ndarray, " num_images"],
        augmentation: A.Compose | None,
        seed: int,
    ) -> None:
        self.images = images
        self.rows = rows
        self.targets = torch.from_numpy(targets)
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Batch:
        positions = np.array([position for _, position in keys])
        images = self.images[self.rows[positions]]
        if self.augmentation is not None:
            images = np.stack(
                [
                    augment_image(self.augmentation, image, (self.seed, *key))
                    for image, key in zip(images, keys, strict=True)
                ]
            )
        batch = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        return batch, self.targets[torch.from_numpy(positions)]

    def without_augmentation(self) -> "PreparedDataset":
        """The same images as they are."""
        return PreparedDataset(self.images, self.rows, self.targets.numpy(), None, self.seed)

    def join(self, other: "PreparedDataset") -> "PreparedDataset":
        """The images of both, which were prepared together; all are augmented as these are."""
        rows, targets = np.concatenate([self.rows, other.rows]), torch.cat([self.targets, other.targets])
        return PreparedDataset(self.images, rows, targets.numpy(), self.augmentation, self.seed)

    def draw(self, num_images: int) -> "PreparedDataset":
        """About so many of the images, plain: the same share of each class, at least one; all, if there are fewer."""
        order = np.random.default_rng(self.seed).permutation(len(self))
        targets = self.targets.numpy()[order]
        places = pd.Series(targets).groupby(targets).cumcount().to_numpy()
        drawn = np.sort(order[places * len(self) < num_images * np.bincount(targets)[targets]])
        return PreparedDataset(self.images, self.rows[drawn], self.targets.numpy()[drawn], None, self.seed)


class ResidentDataset(Dataset[Batch]):
    """Images whole on one device: a batch is picked and augmented there, and nothing is copied to it."""

    def __init__(self, dataset: PreparedDataset, device: torch.device) -> None:
        """Its augmentation, if any, must be one of `list_batched_steps`."""
        images = torch.from_numpy(np.ascontiguousarray(dataset.images[dataset.rows]))
        self.images = images.to(device).permute(0, 3, 1, 2)
        self.targets = dataset.targets.to(device)
        self.augmentation = BatchedAugmentation(_list_steps(dataset) or [], len(dataset), dataset.seed, device)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Batch:
        device = self.targets.device
        # From pinned memory, so that to fetch a batch does not wait for the steps before it.
        positions = torch.tensor([position for _, position in keys], pin_memory=device.type == "cuda")
        positions = positions.to(device, non_blocking=True)
        images = self.images[positions]
        if self.augmentation.steps:
            images = self.augmentation(images, keys[0][0], positions)
        return images, self.targets[positions]


def _list_steps(dataset: PreparedDataset) -> list[Flip | Move] | None:
    """How whole batches are augmented; None where one image at a time has to be."""
    return [] if dataset.augmentation is None else list_batched_steps(dataset.augmentation)


def build_loader(dataset: PreparedDataset, batch_size: int, shuffle: bool, num_workers: int) -> DataLoader[Batch]:
    """A loader whose order and augmentation follow from the dataset's seed and the epoch alone.

    Where whole batches can be augmented, a set that a GPU has room for goes there whole, and one of small images stays
    in this process; otherwise workers augment one image at a time.
    """
    device = _choose_residence(dataset)
    num_workers = 0 if device else num_workers
    place = f"lie on the {device.type} whole" if device else f"come in batches, by {num_workers or 'no'} workers"
    log.info("%d images of %s %s", len(dataset), " x ".join(map(str, dataset.images.shape[1:])), place)
    return DataLoader(
        ResidentDataset(dataset, device) if device else dataset,
        batch_size=batch_size,
        sampler=EpochSampler(len(dataset), dataset.seed, shuffle),
        collate_fn=_keep,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available() and not device,
        # Of one image there are no batch statistics.
        drop_last=shuffle and (len(dataset) >= 2 * batch_size or (len(dataset) % batch_size == 1 and len(dataset) > 1)),
    )


def _choose_residence(dataset: PreparedDataset) -> torch.device | None:
    """Where the set lies whole. A quarter of a GPU's free memory is room enough: the rest is for the network."""
    if _list_steps(dataset) is None:
        return None
    if torch.cuda.is_available():
        num_bytes = len(dataset) * int(np.prod(dataset.images.shape[1:]))
        return torch.device("cuda") if num_bytes <= torch.cuda.mem_get_info()[0] // 4 else None
    is_small = max(dataset.images.shape[1:3]) <= SMALL_SIDE and not isinstance(dataset.images, np.memmap)
    return torch.device("cpu") if is_small else None


def _keep(batch: Any) -> Any:
    """The dataset has collated the batch itself."""
    return batch
