"""What the network predicts: the noise eps, the velocity v, or the data x0.

    xt = alpha * x0 + sigma * eps,    v = alpha * eps - sigma * x0        ([PD] appendix D)

The three are linear views of one another at a given xt, so the objective needs `training_target` and everything after
the network needs `to_x0` and `eps_of_x0`. All arguments broadcast: alpha and sigma are (B, 1, 1, 1) or scalars.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Prediction = Literal["eps", "v", "x0"]
PREDICTIONS = ("eps", "v", "x0")


def training_target(prediction: Prediction, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network is regressed on for a sample made of x0 and eps.

    Raises:
        ValueError: if `prediction` is none of eps, v, x0.
    """
    if prediction == "eps":
        return eps
    if prediction == "v":
        return alpha * eps - sigma * x0
    if prediction == "x0":
        return x0
    raise ValueError(f"prediction={prediction!r} is unknown; allowed: {', '.join(PREDICTIONS)}")


def to_x0(prediction: Prediction, output: Tensor, xt: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The data that a network output claims: x0 = (xt - sigma eps) / alpha = alpha xt - sigma v."""
    if prediction == "eps":
        return (xt - sigma * output) / alpha
    if prediction == "v":
        return alpha * xt - sigma * output
    if prediction == "x0":
        return output
    raise ValueError(f"prediction={prediction!r} is unknown; allowed: {', '.join(PREDICTIONS)}")


def eps_of_x0(x0: Tensor, xt: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that xt holds if its data is x0: eps = (xt - alpha x0) / sigma. Undefined where sigma = 0."""
    return (xt - alpha * x0) / sigma
