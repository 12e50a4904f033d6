"""Autoregressive models of the digits without a network, on the splits of configs/digits.py.

    python -m benchmarks.digits_references

p(x) = ∏_i p(x_i | x_1 … x_{i−1}) over the 64 pixels in raster order, each factor a classifier of 17
grey levels from scikit-learn. Its probabilities are mixed with the pixel's marginal on the training
set, with the weight that is best on the validation set; without that, a grey level that no tree
has seen would have probability zero. The likelihood is exact, so the numbers stand beside a bound.
"""

import time
from collections.abc import Callable

import joblib
import numpy as np
from jaxtyping import Float, Int
from sklearn.base import ClassifierMixin
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from experiments.harness.data import splits

LEVELS = 17
WEIGHTS = (0.003, 0.01, 0.02, 0.05, 0.1, 0.2)

Levels = Int[np.ndarray, "n 64"]
Probabilities = Float[np.ndarray, "n 64 17"]

MODELS: dict[str, Callable[[], ClassifierMixin]] = {
    "logistic regression": lambda: make_pipeline(
        StandardScaler(), LogisticRegression(C=0.03, max_iter=500)
    ),
    "extra trees": lambda: ExtraTreesClassifier(
        200, criterion="entropy", min_samples_leaf=3, max_features=0.5, random_state=0
    ),
}


def main() -> None:
    """Prints a table in bits/dim, with standard errors over test examples."""
    train, validation, test = (_load(split) for split in ("train", "validation", "test"))
    marginal = _marginal(train)
    both = np.concatenate([validation, test])
    print("| model of a pixel given those before it | test bits/dim | seconds |")
    print("| --- | --- | --- |")
    _print("none: the marginal alone", marginal[np.newaxis], test, 0.0)
    for name, make in MODELS.items():
        began = time.monotonic()
        conditionals = _conditionals(make, train, both)
        at_validation, at_test = np.split(conditionals, [len(validation)])
        bits = [_bits(_mixed(at_validation, marginal, w), validation).mean() for w in WEIGHTS]
        weight = WEIGHTS[np.argmin(bits)]
        seconds = time.monotonic() - began
        _print(name, _mixed(at_test, marginal, weight), test, seconds)


def _load(split: str) -> Levels:
    return np.asarray(splits.load("digits", split).images, np.int64).reshape(-1, 64)


def _marginal(train: Levels) -> Float[np.ndarray, "64 17"]:
    """Of each pixel, half a count added to each level (Jeffreys)."""
    counts = (train[:, :, np.newaxis] == np.arange(LEVELS)).sum(axis=0) + 0.5
    return counts / counts.sum(axis=1, keepdims=True)


def _conditionals(make: Callable[[], ClassifierMixin], train: Levels, x: Levels) -> Probabilities:
    """p(x_i | x_1 … x_{i−1}) of every level, at the pixels before i of each example."""

    def of_pixel(i: int) -> Float[np.ndarray, "n 17"]:
        probabilities = np.zeros((len(x), LEVELS))
        levels = np.unique(train[:, i])
        if i == 0 or len(levels) == 1:  # nothing to learn from, or nothing to tell apart
            probabilities[:] = np.bincount(train[:, i], minlength=LEVELS) / len(train)
        else:
            fitted = make().fit(train[:, :i], train[:, i])
            probabilities[:, levels] = fitted.predict_proba(x[:, :i])
        return probabilities

    pixels = joblib.Parallel(n_jobs=-1)(joblib.delayed(of_pixel)(i) for i in range(64))
    return np.stack(pixels, axis=1)


def _mixed(
    conditionals: Probabilities, marginal: Float[np.ndarray, "64 17"], w: float
) -> Probabilities:
    return (1 - w) * conditionals + w * marginal


def _bits(probabilities: Probabilities, x: Levels) -> Float[np.ndarray, "n"]:
    """−log₂ p(x) / 64 of each example."""
    chosen = np.take_along_axis(
        np.broadcast_to(probabilities, (len(x), *probabilities.shape[1:])), x[..., np.newaxis], 2
    )
    return -np.log2(chosen[..., 0]).mean(axis=1)


def _print(name: str, probabilities: Probabilities, test: Levels, seconds: float) -> None:
    bits = _bits(probabilities, test)
    error = bits.std(ddof=1) / np.sqrt(len(bits))
    print(f"| {name} | {bits.mean():.3f} ± {error:.3f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
