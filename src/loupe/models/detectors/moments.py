"""Mean and covariance of more vectors than fit in memory."""

import torch
from jaxtyping import Float
from torch import Tensor


class Moments:
    """Sums of vectors and of their outer products, in float64 so that their difference keeps its digits.

    Those of two sets of vectors add up to those of both.
    """

    def __init__(self, num_channels: int, device: torch.device) -> None:
        self.count = 0
        self.total = torch.zeros(num_channels, dtype=torch.float64, device=device)
        self.outer = torch.zeros(num_channels, num_channels, dtype=torch.float64, device=device)

    def add(self, vectors: Float[Tensor, "num_vectors channels"]) -> None:
        """Take more of them in."""
        values = vectors.double()
        self.count += len(values)
        self.total += values.sum(dim=0)
        self.outer += values.T @ values

    def __add__(self, other: "Moments") -> "Moments":
        both = Moments(len(self.total), self.total.device)
        both.count = self.count + other.count
        both.total = self.total + other.total
        both.outer = self.outer + other.outer
        return both

    @property
    def mean(self) -> Float[Tensor, " channels"]:
        return self.total / self.count

    @property
    def covariance(self) -> Float[Tensor, "channels channels"]:
        """Divided by the number of vectors."""
        return self.outer / self.count - torch.outer(self.mean, self.mean)


def flatten_places(level: Float[Tensor, "batch channels rows columns"]) -> Float[Tensor, "num_places channels"]:
    """Each place of each image as one vector."""
    return level.permute(0, 2, 3, 1).reshape(-1, level.shape[1])
