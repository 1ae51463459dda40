"""From the logits of a click model to calibrated ones: Platt's line, or an isotonic curve.

A calibration is a strictly increasing function of the logit alone, so no ranking changes; the
probability is its sigmoid. It is fitted on the validation part, after training.

platt      slope * logit + offset
isotonic   linear between at most 64 knots, and beyond the outermost with Platt's slope

Shapes: N samples, B requests, C candidates, K knots.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from contract.bundle import CalibrationMethod
from training.errors import TrainingError
from training.metrics import Labels, Scores

MAX_KNOTS = 64
# What a device adds up in another order differs by about 1e-6 in a logit. A steeper calibration
# would make more of it than a bundle allows.
MAX_SLOPE = 20.0
# In logits; closer knots tell nothing more, and 1 / gap has to be a float16.
_MIN_GAP = 1e-2
_MAX_PRIOR_LOGIT = 15.0
_MAX_NEWTON_STEPS = 100
_MIN_NEWTON_STEP = 1e-10
# Slows no step that matters, and lets none be undefined.
_RIDGE = 1e-12


class Calibration(nn.Module):
    """A strictly increasing, piecewise linear function from logits to logits.

    `knots`, `values`: K >= 1 ascending logits, at least 0.01 apart, and what they become,
    ascending as well; `slope` > 0 holds below the first and above the last. A line has one knot:
    `values[0] + slope * (logit - knots[0])`. `method`: how it was fitted; "none" only moves logits.

    >>> line = Calibration("platt", slope=0.5, knots=[0.0], values=[-1.0])
    >>> line(torch.tensor([[-2.0, 0.0, 4.0]]))
    tensor([[-2., -1.,  1.]])
    """

    slope: Tensor
    first_knot: Tensor
    last_knot: Tensor
    first_value: Tensor
    starts: Tensor
    inverse_gaps: Tensor
    rises: Tensor

    def __init__(
        self,
        method: CalibrationMethod,
        *,
        slope: float,
        knots: Sequence[float],
        values: Sequence[float],
    ) -> None:
        super().__init__()
        assert slope > 0
        assert len(knots) == len(values) >= 1
        self.method = method
        # As they were given: what was rounded to float32 is not to be rounded again.
        self._slope, self._knots, self._values = slope, list(knots), list(values)
        knots_K, values_K = np.array(knots), np.array(values)
        for name, numbers in {
            "slope": np.array(slope),
            "first_knot": knots_K[0],
            "last_knot": knots_K[-1],
            "first_value": values_K[0],
            "starts": knots_K[:-1],
            "inverse_gaps": 1 / np.diff(knots_K),
            "rises": np.diff(values_K),
        }.items():
            self.register_buffer(name, torch.tensor(numbers, dtype=torch.float32))

    def forward(self, logits_BC: Tensor) -> Tensor:
        """Return calibrated logits float32 [B, C]; any other shape will do as well."""
        beyond_BC = torch.relu(logits_BC - self.last_knot) - torch.relu(self.first_knot - logits_BC)
        calibrated_BC = self.first_value + self.slope * beyond_BC
        if not len(self.rises):
            return calibrated_BC
        # How far each segment is behind a logit, from 0 to 1. No term falls as the logit grows, so
        # neither does their rounded sum: differences of steep hinges would not keep the order.
        passed_BCK = torch.clamp((logits_BC[..., None] - self.starts) * self.inverse_gaps, 0, 1)
        return calibrated_BC + (passed_BCK * self.rises).sum(dim=-1)

    def shifted(self, offset: float) -> "Calibration":
        """Return the calibration that adds `offset` to what this one gives."""
        values = [value + offset for value in self._values]
        return Calibration(self.method, slope=self._slope, knots=self._knots, values=values)

    def as_fields(self) -> dict[str, Any]:
        """Return the constructor's arguments, of plain numbers."""
        return {
            "method": self.method,
            "slope": self._slope,
            "knots": self._knots,
            "values": self._values,
        }


def unchanged() -> Calibration:
    """Return the calibration that leaves logits as they are."""
    return Calibration("none", slope=1.0, knots=[0.0], values=[0.0])


def fit(method: CalibrationMethod, labels_N: Labels, logits_N: Scores) -> Calibration:
    """Return the calibration of a model by N samples that it was not trained on.

    Raises TrainingError where they do not tell: labels of one kind only, logits that are all equal
    or not finite, or that rank clicks below the rest; and where a logit would have to be stretched
    by more than MAX_SLOPE.
    """
    if method == "none":
        return unchanged()
    clicks_N, x_N = labels_N > 0, logits_N.astype(np.float64)
    if clicks_N.all() or not clicks_N.any():
        raise TrainingError("the validation part holds one label only")
    if not np.isfinite(x_N).all() or np.ptp(x_N) == 0:
        raise TrainingError("the logits are all equal, or not finite")
    slope, offset = _platt(clicks_N, x_N)
    if slope <= 0:
        raise TrainingError("the validation part is ranked no better than at random")
    if slope > MAX_SLOPE:
        raise TrainingError(
            f"the logits hardly differ: they had to be stretched by {slope:.3g}, "
            f"allowed are {MAX_SLOPE:g}"
        )
    if method == "platt":
        return Calibration(method, slope=slope, knots=[0.0], values=[offset])
    knots_K, values_K = _isotonic(clicks_N, x_N, slope, offset)
    return Calibration(method, slope=slope, knots=knots_K.tolist(), values=values_K.tolist())


def negative_sampling_rate(click_rate: float, n_negatives: int) -> float:
    """Return which share of the negatives of real traffic `n_negatives` a click are.

    Of traffic with a `click_rate`, (1 - click_rate) / click_rate negatives come with each click.
    Adding the logarithm of the rate to the logit of a model that has learned from the samples gives
    that of the traffic (He et al. 2014, "Practical lessons from predicting clicks on ads at
    Facebook", section 6.3), as far as what was sampled is like what is shown there.

    >>> round(negative_sampling_rate(0.02, 7), 6)  # of 49
    0.142857
    """
    return n_negatives * click_rate / (1 - click_rate)


def _platt(clicks_N: NDArray[np.bool_], x_N: NDArray[np.float64]) -> tuple[float, float]:
    """Return slope and offset of least log-loss, against Platt's smoothed targets.

    Platt 1999, "Probabilistic outputs for support vector machines", section 2.2; Newton's method
    with backtracking, as Lin, Lin and Weng 2007 advise. Smoothed targets keep the optimum finite
    where a logit separates the labels.
    """
    n_clicks = int(clicks_N.sum())
    n_others = len(clicks_N) - n_clicks
    targets_N = np.where(clicks_N, (n_clicks + 1) / (n_clicks + 2), 1 / (n_others + 2))
    # Centred and scaled, so that one size of step suits both parameters.
    center, scale = x_N.mean(), x_N.std()
    design_N2 = np.stack([(x_N - center) / scale, np.ones_like(x_N)], axis=1)

    def loss(parameters: NDArray[np.float64]) -> float:
        logits_N = design_N2 @ parameters
        return float((np.logaddexp(0, logits_N) - targets_N * logits_N).mean())

    parameters = np.array([0.0, math.log((n_clicks + 1) / (n_others + 1))])
    for _ in range(_MAX_NEWTON_STEPS):
        probabilities_N = _sigmoid(design_N2 @ parameters)
        gradient = design_N2.T @ (probabilities_N - targets_N) / len(x_N)
        weights_N1 = (probabilities_N * (1 - probabilities_N))[:, None]
        hessian = design_N2.T @ (weights_N1 * design_N2) / len(x_N)
        step = np.linalg.solve(hessian + _RIDGE * np.eye(2), gradient)
        before = loss(parameters)
        while np.abs(step).max() > _MIN_NEWTON_STEP and loss(parameters - step) > before:
            step /= 2
        parameters -= step
        if np.abs(step).max() <= _MIN_NEWTON_STEP:
            break
    slope = parameters[0] / scale
    return float(slope), float(parameters[1] - slope * center)


def _isotonic(
    clicks_N: NDArray[np.bool_], x_N: NDArray[np.float64], slope: float, offset: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return knots and values [K] of the isotonic regression of clicks on logits.

    Adjacent violators are pooled among 64 bins of equal size, each with one more sample that clicks
    as Platt's line says: so no rate is 0 or 1, and a bin of few clicks is not taken at its word. A
    pool is one knot at its mean logit, and between knots the curve is linear (centred isotonic
    regression, Oron and Flournoy 2017): it keeps the order of all logits, as a step does not.
    """
    order = np.argsort(x_N, kind="stable")
    x_N, clicks_N = x_N[order], clicks_N[order]
    # Equal logits stay in one bin.
    starts_K = np.unique(np.searchsorted(x_N, x_N[:: -(-len(x_N) // MAX_KNOTS)]))
    sizes_K = np.diff(starts_K, append=len(x_N))
    centers_K = np.add.reduceat(x_N, starts_K) / sizes_K
    line_K = np.clip(slope * centers_K + offset, -_MAX_PRIOR_LOGIT, _MAX_PRIOR_LOGIT)
    clicks_K = np.add.reduceat(clicks_N.astype(np.float64), starts_K) + _sigmoid(line_K)
    # Each pool's samples, sum of logits, clicks.
    pools_K3 = np.stack([sizes_K + 1, (sizes_K + 1) * centers_K, clicks_K], axis=1)
    while True:
        samples_K, sums_K, clicks_K = pools_K3.T
        knots_K, values_K = sums_K / samples_K, np.log(clicks_K / (samples_K - clicks_K))
        rises, gaps = np.diff(values_K), np.diff(knots_K)
        if (rises <= 0).any():
            pooled = int(rises.argmin())
        elif (gaps < _MIN_GAP).any():
            pooled = int(gaps.argmin())
        elif (rises > MAX_SLOPE * gaps).any():
            pooled = int((rises / gaps).argmax())
        else:
            return knots_K, values_K
        pools_K3[pooled] += pools_K3[pooled + 1]
        pools_K3 = np.delete(pools_K3, pooled + 1, axis=0)


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0, -logits))
