"""The lecture's formulas in α and β, corrected as in docs/lecture.md, on the host.

They cancel where the code under test must not, so they are worked in float64 or, where the result
is small against one, in the platform's longest float.
"""

from typing import NamedTuple

import numpy as np
import pytest

needs_long_double = pytest.mark.skipif(
    np.finfo(np.longdouble).eps > 2e-19, reason="α-β formulas cancel without a long double"
)

EPS32 = float(np.finfo(np.float32).eps)
"""Twice the largest relative error of one rounding to float32."""


class Chain(NamedTuple):
    """β_t, α_t and ᾱ_t at t = 0 … T, where t = 0 is the data: β_0 = 0, ᾱ_0 = 1."""

    beta: np.ndarray
    alpha: np.ndarray
    alpha_bar: np.ndarray

    @property
    def previous(self) -> np.ndarray:
        """ᾱ_{t−1}, for t = 1 … T; one at t = 0, where it means nothing."""
        return np.concatenate([self.alpha_bar[:1], self.alpha_bar[:-1]])

    @property
    def posterior_variance(self) -> np.ndarray:
        """β̃_t (13.20), for t = 1 … T."""
        return _from_1((1 - self.previous) * self.beta, 1 - self.alpha_bar)

    @property
    def posterior_of_x_0(self) -> np.ndarray:
        """The factor of x_0 in (13.19), for t = 1 … T."""
        return _from_1(np.sqrt(self.previous) * self.beta, 1 - self.alpha_bar)

    @property
    def posterior_of_x_t(self) -> np.ndarray:
        """The factor of x_t in (13.19), for t = 1 … T."""
        return _from_1(np.sqrt(self.alpha) * (1 - self.previous), 1 - self.alpha_bar)

    @property
    def eps_weight(self) -> np.ndarray:
        """Weight of ‖ε − ε̂‖² in the KL when Σ_θ = β̃: Ho et al. (2020), eq. 12; t = 2 … T."""
        below = 2 * self.posterior_variance * self.alpha * (1 - self.alpha_bar)
        return np.concatenate([[np.nan, np.nan], self.beta[2:] ** 2 / below[2:]])


def _from_1(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], numerator[1:] / denominator[1:]])


def from_betas(betas) -> Chain:
    """The chain of β_1 … β_T."""
    betas = np.asarray(betas)
    beta = np.concatenate([np.zeros(1, betas.dtype), betas])
    return Chain(beta, 1 - beta, np.cumprod(1 - beta))


def from_alpha_bars(alpha_bars) -> Chain:
    """The chain of ᾱ_1 … ᾱ_T."""
    alpha_bars = np.asarray(alpha_bars)
    alpha_bar = np.concatenate([np.ones(1, alpha_bars.dtype), alpha_bars])
    alpha = np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return Chain(1 - alpha, alpha, alpha_bar)


def from_log_snr(log_snr) -> Chain:
    """The chain of λ_1 … λ_T, in long double: there 1 − ᾱ may cancel by 1e13."""
    return from_alpha_bars(1 / (1 + np.exp(-np.asarray(log_snr, np.longdouble))))


def ancestral_step(chain, t, variance, data_mean, data_variance, mean, spread):
    """Mean and variance of x_{t−1} from those of x_t, by the optimal model of N(m, v) data.

    (13.19) with E[x_0 | x_t] = m + g (x_t − √ᾱ m), g = √ᾱ v/(ᾱ v + 1 − ᾱ), and Σ_θ the variance
    named; at t = 1 they are those of x̂_0.
    """
    step_variance = {"beta": chain.beta, "beta_tilde": chain.posterior_variance}[variance]
    root = np.sqrt(chain.alpha_bar[t])
    gain = root * data_variance / (chain.alpha_bar[t] * data_variance + 1 - chain.alpha_bar[t])
    of_x_0, of_x_t = chain.posterior_of_x_0[t], chain.posterior_of_x_t[t]
    if t == 1:
        of_x_0, of_x_t = 1.0, 0.0
    slope = of_x_t + of_x_0 * gain
    mean = slope * mean + of_x_0 * (1 - gain * root) * data_mean
    return mean, slope**2 * spread + (step_variance[t] if t > 1 else 0.0)


def condition(prior_mean, prior_variance, slope, noise_variance, observed):
    """Mean and variance of x given y = slope·x + noise, for scalar Gaussians: precisions add."""
    precision = 1 / prior_variance + slope**2 / noise_variance
    mean = (prior_mean / prior_variance + slope * observed / noise_variance) / precision
    return mean, 1 / precision


def normal_log_prob(x, mean, variance):
    """log N(x; mean, variance), elementwise."""
    return -0.5 * ((x - mean) ** 2 / variance + np.log(2 * np.pi * variance))


def sigma_points(num_dims: int) -> np.ndarray:
    """2d points whose mean of any quadratic is its expectation under N(0, I)."""
    return np.sqrt(num_dims) * np.concatenate([np.eye(num_dims), -np.eye(num_dims)])
