"""The head of a classifier, fitted to what its frozen backbone makes of the images."""

import logging
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import StratifiedKFold
from torch import nn

from loupe.data.loading import PreparedDataset, build_loader
from loupe.errors import ConfigError
from loupe.evaluation.calibration import compute_calibrated_loss
from loupe.models.classifiers import Classifier
from loupe.training.trainer import choose_num_workers

# Inverse strengths of the head's L2 penalty, times the number of images: on photos and on clothes alike val chose 100.
PENALTIES = (10.0, 100.0, 1_000.0, 10_000.0)
ENOUGH_VAL_IMAGES, NUM_FOLDS = 200, 5
MAX_ITERATIONS = 100
AT_ONCE = 32  # of images that features are computed of: a CPU takes a quarter less time for each than with 128
JUDGED_BY = "val/calibrated_loss"  # what is lowest at a classifier's best epoch

log = logging.getLogger(__name__)


class FrozenFeatures:
    """What the frozen backbone makes of the images, which heads are fitted to; logistic regression needs no rate.

    The penalty is chosen once, and the head that val judges has not seen val.
    """

    def __init__(self, classifier: Classifier, versions: Sequence[PreparedDataset], val: PreparedDataset) -> None:
        """Computes the features, chooses the penalty and fits the head that val is to judge.

        Args:
            versions: the training images, plain and, each time anew, augmented.

        Raises:
            ConfigError: if the network ends in something else than one linear layer, or a convolution that is one.
        """
        if not isinstance(classifier.head, nn.Linear | nn.Conv2d) or classifier.head.bias is None:
            raise ConfigError(
                f"{classifier.config.backbone} ends in no linear layer that could be fitted alone: set "
                "train_classifier.recipe to scratch or scratch_augmented, or choose another backbone"
            )
        log.info("the head alone, on features of the frozen backbone")
        self.classifier = classifier
        self.parts = [compute_features(classifier, dataset, epoch) for epoch, dataset in enumerate(versions)]
        self.val = compute_features(classifier, val)
        plain, targets = _join([self.parts[0], self.val])
        folds = _list_folds(targets, len(versions[0]))
        self.penalty, self.head = _choose_penalty(plain, targets, folds)
        if len(folds) > 1 or len(versions) > 1:  # else it is fitted to just these already
            self.head = _fit_head(*_join(self.parts), self.penalty)

    def compute_metrics(self) -> dict[str, float]:
        """Of an epoch, with the penalty as `head_penalty`."""
        features, targets = _join(self.parts)
        probabilities = self.head.predict_proba(self.val[0])
        metrics = {
            "train/loss": log_loss(targets, self.head.predict_proba(features), labels=self.head.classes_),
            "val/loss": log_loss(self.val[1], probabilities, labels=self.head.classes_),
            JUDGED_BY: compute_calibrated_loss(self.val[1], probabilities),
            "val/accuracy": accuracy_score(self.val[1], self.head.classes_[probabilities.argmax(axis=1)]),
            "head_penalty": self.penalty,
        }
        return {name: float(value) for name, value in metrics.items()}

    def set_head(self) -> None:
        """Give the classifier the head that val has judged."""
        _set_head(self.classifier.head, self.head)

    def set_final_head(self) -> None:
        """Give it the head to be kept, which is fitted to val too: that has judged by now, and is images as well."""
        _set_head(self.classifier.head, _fit_head(*_join([*self.parts, self.val]), self.penalty))


def _join(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    features, targets = (np.concatenate(part) for part in zip(*parts, strict=True))
    return features, targets


def _choose_penalty(
    features: Float[np.ndarray, "num_images num_features"],
    targets: Int64[np.ndarray, " num_images"],
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[float, LogisticRegression]:
    """The one of PENALTIES with the least log loss, and the head that was fitted with it to the last fold.

    Args:
        folds: positions of images that a head is fitted to, and of those that it is judged by.
    """
    least = np.inf
    for penalty in PENALTIES:
        losses = []
        for fitted, judged in folds:
            head = _fit_head(features[fitted], targets[fitted], penalty)
            losses.append(log_loss(targets[judged], head.predict_proba(features[judged]), labels=head.classes_))
        if np.mean(losses) >= least:
            break  # a weaker one would fit the training images only better still
        best, least = (penalty, head), np.mean(losses)
    return best


def _list_folds(targets: Int64[np.ndarray, " num_images"], num_train: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Train and val; where val is too small to choose by, parts of both together take turns."""
    positions = np.arange(len(targets))
    num_folds = min(NUM_FOLDS, int(np.bincount(targets).min()))
    if len(targets) - num_train >= ENOUGH_VAL_IMAGES or num_folds < 2:
        return [(positions[:num_train], positions[num_train:])]
    return list(StratifiedKFold(num_folds, shuffle=True, random_state=0).split(positions, targets))


def _fit_head(features: np.ndarray, targets: np.ndarray, penalty: float) -> LogisticRegression:
    """A fit that ends before it has converged is judged by val like the others; for `penalty` see PENALTIES."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=penalty / len(targets), max_iter=MAX_ITERATIONS).fit(features, targets)


def _set_head(layer: nn.Module | tuple[nn.Module, ...], head: LogisticRegression) -> None:
    """Two classes have one row of coefficients: the second's against the first's."""
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    weights, biases = (torch.from_numpy(values).float() for values in (head.coef_, head.intercept_))
    if len(head.classes_) == 2:
        weights, biases = torch.cat([-weights, weights]) / 2, torch.cat([-biases, biases]) / 2
    with torch.no_grad():
        layer.weight.copy_(weights.view_as(layer.weight))
        assert layer.bias is not None  # FrozenFeatures refuses others
        layer.bias.copy_(biases)


@torch.inference_mode()
def compute_features(
    classifier: Classifier, dataset: PreparedDataset, epoch: int = 0
) -> tuple[Float[np.ndarray, "num_images num_features"], Int64[np.ndarray, " num_images"]]:
    """What the head sees of each image, and the targets; augmented as in that epoch, where the dataset augments."""
    loader = build_loader(dataset, AT_ONCE, shuffle=False, num_workers=choose_num_workers())
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    classifier.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    device = next(classifier.parameters()).device
    features, targets = [], []
    for images, batch_targets in loader:
        features.append(classifier.compute_features(images.to(device)).float().cpu().numpy())
        targets.append(batch_targets.cpu().numpy())
    return np.concatenate(features), np.concatenate(targets)
