"""Thresholds from normal calibration images alone, and what they stand for."""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from jaxtyping import Float
from scipy.special import lambertw
from scipy.stats import beta, betabinom

from loupe.errors import ConfigError

USUAL_RATE = 0.05
LEVEL = 0.9  # of the range that is said of the realised rate
LARGEST_DENOMINATOR = 10**9  # of rates as fractions: 1/13 is then 1/13, and 0.7 is 7/10, which binary ones are not


@dataclass(frozen=True)
class Threshold:
    """What a threshold stands for; rates are parts of new normal images that score above it, in (0, 1).

    `rate` is what it promises on average over calibration sets, at most `asked_rate` where the images are enough for
    that. This one calibration set has its own rate, which lies between `low_rate` and `high_rate` in LEVEL of all.
    """

    value: float
    asked_rate: float
    rate: float
    low_rate: float
    high_rate: float
    num_calibration: int

    def compute_chance(self, num_flagged: int, num_normal: int) -> float:
        """How likely at least so many of that many new normal images score above it; in [0, 1].

        Near 0 they are unlike the calibration images. Over calibration sets and new images together the number follows
        a beta-binomial distribution.
        """
        allowed = round(self.rate * (self.num_calibration + 1))
        return float(betabinom.sf(num_flagged - 1, num_normal, allowed, self.num_calibration + 1 - allowed))

    def describe(self) -> str:
        """What it stands for, in words."""
        images = f"{self.num_calibration:,} normal calibration image{'s' * (self.num_calibration > 1)}"
        words = (
            f"On average at most {to_percent(self.rate)} of new normal images score above it, by {images}. "
            f"A threshold from so many comes to between {to_percent(self.low_rate)} and "
            f"{to_percent(self.high_rate)} of false alarms, {LEVEL:.0%} of the time."
        )
        if is_supported(self.asked_rate, self.num_calibration):
            return words
        return f"{words} {to_percent(self.asked_rate)} was asked for, but {describe_lowest_rate(self.num_calibration)}."


def to_percent(rate: float) -> str:
    """A rate in [0, 1] with two digits that count."""
    return f"{float(f'{100 * rate:.2g}'):g}%"


def compute_threshold(scores: Float[np.ndarray, " num_images"], false_alarm_rate: float) -> float:
    """The split-conformal threshold: a new normal image scores above it with at most the stated probability.

    It is the ceil((n + 1)(1 - rate))-th smallest of n calibration scores (Vovk, Gammerman and Shafer, "Algorithmic
    Learning in a Random World", 2005). Where n is too small for the rate it is the largest score, and the rate that
    it then stands for is 1 / (n + 1).

    Args:
        scores: anomaly scores of normal images that the model was not trained on.
        false_alarm_rate: in (0, 1).

    Raises:
        ValueError: if there are no scores.
    """
    if scores.size == 0:
        raise ValueError("scores must hold at least one normal calibration image, got none")
    return float(np.sort(scores)[-_count_allowed(scores.size, false_alarm_rate)])


def explain_threshold(scores: Float[np.ndarray, " num_images"], false_alarm_rate: float) -> Threshold:
    """What the threshold of `compute_threshold` stands for, from the same calibration scores.

    Where the k-th largest of n scores is the threshold, the realised rate follows the distribution Beta(k, n + 1 - k)
    over calibration sets (Vovk, "Conditional validity of inductive conformal predictors", 2012), if no scores are tied;
    with ties it is lower.
    """
    allowed, num_calibration = _count_allowed(scores.size, false_alarm_rate), scores.size
    low, high = beta.interval(LEVEL, allowed, num_calibration + 1 - allowed)
    return Threshold(
        value=compute_threshold(scores, false_alarm_rate),
        asked_rate=false_alarm_rate,
        rate=allowed / (num_calibration + 1),
        low_rate=float(low),
        high_rate=float(high),
        num_calibration=num_calibration,
    )


def _count_allowed(num_calibration: int, rate: float) -> int:
    """Which of the calibration scores is the threshold, counted from the largest, that being 1."""
    allowed = math.floor((num_calibration + 1) * _to_fraction(rate))
    return min(max(allowed, 1), num_calibration)


def _to_fraction(rate: float) -> Fraction:
    return Fraction(rate).limit_denominator(LARGEST_DENOMINATOR)


def is_supported(false_alarm_rate: float, num_calibration: int) -> bool:
    """Whether so few calibration images can promise so low a rate: n of them promise no less than 1 / (n + 1)."""
    return (num_calibration + 1) * _to_fraction(false_alarm_rate) >= 1


def describe_lowest_rate(num_calibration: int) -> str:
    """The lowest rate that so many calibration images can promise, in words."""
    images = f"{num_calibration:,} calibration image{'s' * (num_calibration > 1)}"
    lowest = f"1/{num_calibration + 1} = {1 / (num_calibration + 1):.3f}"
    return f"with {images} the lowest rate that can be promised is {lowest}"


def check_false_alarm_rate(false_alarm_rate: float, num_calibration: int) -> None:
    """Refuse a rate that was asked for and can't be promised.

    Raises:
        ConfigError: if it is no rate, or there are too few calibration images; says how many it takes.
    """
    if not 0 < false_alarm_rate < 1:
        raise ConfigError(f"a false_alarm_rate must lie between 0 and 1, got {false_alarm_rate:g}")
    if not is_supported(false_alarm_rate, num_calibration):
        needed = math.ceil(1 / (_to_fraction(false_alarm_rate) or Fraction(false_alarm_rate))) - 1
        raise ConfigError(
            f"a false_alarm_rate of {false_alarm_rate:g} takes at least {needed:,} normal calibration images: "
            f"{describe_lowest_rate(num_calibration)}; set a higher rate or `auto`, or raise split.calibration_fraction"
        )


def choose_false_alarm_rate(num_calibration: int) -> float:
    """What `auto` stands for: USUAL_RATE, or the lowest rate that so many calibration images can promise."""
    return max(USUAL_RATE, 1 / (num_calibration + 1))


def choose_rate_by_cost(cost_false_alarm: float, cost_miss: float, anomalous_fraction: float) -> float:
    """The highest rate of false alarms that can pay, where only normal images are known.

    An image with the conformal p-value p (the part of normal images that score as high) is worth a flag where
    (1 - fraction) cost_false_alarm <= fraction cost_miss f(p), f being the density of p among anomalous images. That
    is not known; assumed is that it falls as q p^(q - 1) for some q in (0, 1), which q being left open. The most that
    any such f can be is 1 / (-e p ln p) (Sellke, Bayarri and Berger, "Calibration of p values for testing precise
    null hypotheses", The American Statistician 55, 2001), and the rate is the p at which even that no longer pays.
    A detector that separates less well than assumed is served by a lower rate, and none by a higher one.

    Args:
        cost_false_alarm: of flagging one normal image, positive, in the unit of `cost_miss`.
        cost_miss: of passing one anomalous image, positive.
        anomalous_fraction: how many of the images are expected to be anomalous, in (0, 1).

    Returns:
        In (0, 1 / e).

    Raises:
        ConfigError: if it would pay to flag every image unseen.
    """
    stake = anomalous_fraction * cost_miss / ((1 - anomalous_fraction) * cost_false_alarm)
    if stake >= 1:
        raise ConfigError(
            f"with a miss at {cost_miss:g}, a false alarm at {cost_false_alarm:g} and {anomalous_fraction:.2%} of "
            f"anomalous images it pays to flag every image, which takes no detector: check the costs"
        )
    return float(np.exp(lambertw(-stake / math.e, -1).real))  # the lower branch: p is below 1 / e
