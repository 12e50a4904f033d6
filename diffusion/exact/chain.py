"""The linear-Gaussian chain: a latent-variable model with closed forms of log p, ELBO and gap.

log p(x_0) = ELBO + KL(q(z|x_0) ‖ p(z|x_0)) with z = (x_1 … x_T): the recap of lecture 13.1. The
three are computed independently, so that the equation is a test: log p from the marginals of p,
from x_T down to x_0; the ELBO from the posteriors of q (13.26); the gap from the transitions of q.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from diffusion.schedules import Array, Levels


class LinearGaussianChain(NamedTuple):
    """p: x_T ~ N(0, 1), x_{t−1} | x_t ~ N(slope_t x_t + offset_t, variance_t) for t = T … 1.

    The step at t = 1 is the decoder, a density. Coordinates are independent and follow the same
    scalar chain. All arrays are float64 on the host.

    Attributes:
      slope: for t = 1 … T.
      offset: for t = 1 … T.
      variance: for t = 1 … T, positive.
      levels: the noise levels of q, the forward process.
    """

    slope: Float[np.ndarray, "T"]
    offset: Float[np.ndarray, "T"]
    variance: Float[np.ndarray, "T"]
    levels: Levels

    @classmethod
    def from_denoiser(
        cls,
        gain: Float[Array, "T"],
        offset: Float[Array, "T"],
        levels: Levels,
        variance: Float[Array, "T-1"],
        decoder_variance: float,
    ) -> "LinearGaussianChain":
        """The chain of an affine denoiser, x̂_0 = gain_t x_t + offset_t.

        The mean of a step is that of q(x_{t−1} | x_t, x_0) with x̂_0 for x_0 (13.4); at t = 1, x̂_0.

        Args:
          gain: for t = 1 … T.
          offset: for t = 1 … T.
          levels: T noise levels.
          variance: Σ_θ for t = 2 … T.
          decoder_variance: the variance of p(x_0 | x_1).

        Raises:
          ValueError: if a variance is not positive.
        """
        variance = np.append(decoder_variance, np.asarray(variance, np.float64))
        if not np.all(variance > 0):
            t = int(np.argmin(variance > 0)) + 1
            raise ValueError(f"the variance at t = {t} is {variance[t - 1]:g}; it must be positive")
        weight_t, weight_0 = _posterior_weights(levels)
        slope = weight_t + weight_0 * np.asarray(gain, np.float64)
        return cls(slope, weight_0 * np.asarray(offset, np.float64), variance, levels)

    def log_prob(self, x_0: Float[Array, "b d"]) -> Float[np.ndarray, "b"]:
        """log p(x_0), in nats."""
        mean, variance = (moment[0] for moment in self.marginals())
        squared = (np.asarray(x_0, np.float64) - mean) ** 2
        return -0.5 * (squared / variance + np.log(2 * np.pi * variance)).sum(axis=-1)

    def elbo(self, x_0: Float[Array, "b d"]) -> Float[np.ndarray, "b"]:
        """The ELBO (13.26) in nats: reconstruction − Σ_t E_q KL_t − KL(q(x_T|x_0) ‖ p(x_T))."""
        x_0 = np.asarray(x_0, np.float64)[..., None]
        levels = self.levels
        alpha, sigma2 = np.sqrt(levels.alpha_bar), levels.sigma2
        weight_t, weight_0 = _posterior_weights(levels)
        # The difference of the means of q and p is affine in x_t, which is normal given x_0.
        weight_t = weight_t - self.slope
        mean = (weight_t * alpha[1:] + weight_0) * x_0 - self.offset
        squared = mean**2 + weight_t**2 * sigma2[1:]
        first = self.variance[0]
        # At t = 1 the posterior is the point mass at x_0, and this is the decoder's squared error.
        reconstruction = -0.5 * (squared[..., 0] / first + np.log(2 * np.pi * first))
        kl = _expected_kl(levels.posterior_variance[2:], self.variance[1:], squared[..., 1:])
        prior = _expected_kl(sigma2[-1], 1.0, (alpha[-1] * x_0[..., 0]) ** 2)
        return (reconstruction - kl.sum(axis=-1) - prior).sum(axis=-1)

    def gap(self, x_0: Float[Array, "b d"]) -> Float[np.ndarray, "b"]:
        """KL(q(z|x_0) ‖ p(z|x_0)) = log p(x_0) − ELBO, in nats.

        Given x_0 both are Markov chains from x_0 to x_T, so it is the sum over t of the expected
        KL(q(x_t|x_{t−1}) ‖ p(x_t|x_{t−1})), where p(x_t|x_{t−1}) follows from Bayes' rule.
        """
        x_0 = np.asarray(x_0, np.float64)[..., None]
        levels = self.levels
        alpha, sigma2 = np.sqrt(levels.alpha_bar), levels.sigma2
        p_mean, p_variance = self.marginals()
        gain = self.slope * p_variance[1:] / p_variance[:-1]
        variance = self.variance * p_variance[1:] / p_variance[:-1]
        # The difference of the means is affine in x_{t−1}, which is normal given x_0.
        weight_s = alpha[1:] / alpha[:-1] - gain
        mean = weight_s * alpha[:-1] * x_0 - (p_mean[1:] - gain * p_mean[:-1])
        squared = mean**2 + weight_s**2 * sigma2[:-1]
        return _expected_kl(levels.beta[1:], variance, squared).sum(axis=(-2, -1))

    def marginals(self) -> tuple[Float[np.ndarray, "levels"], Float[np.ndarray, "levels"]]:
        """Mean and variance of x_t under p, for t = 0 … T."""
        mean, variance = np.zeros(len(self.slope) + 1), np.ones(len(self.slope) + 1)
        for t in range(len(self.slope), 0, -1):
            slope = self.slope[t - 1]
            mean[t - 1] = slope * mean[t] + self.offset[t - 1]
            variance[t - 1] = slope**2 * variance[t] + self.variance[t - 1]
        return mean, variance


def _posterior_weights(
    levels: Levels,
) -> tuple[Float[np.ndarray, "T"], Float[np.ndarray, "T"]]:
    """The weights of x_t and x_0 in the mean of q(x_{t−1} | x_t, x_0) (13.19); 0 and 1 at t = 1."""
    alpha, gap = np.sqrt(levels.alpha_bar), levels.gap[1:]
    return alpha[:-1] / alpha[1:] * np.exp(-gap), -alpha[:-1] * np.expm1(-gap)


def _expected_kl(
    variance: Float[np.ndarray, "..."] | float,
    other: Float[np.ndarray, "..."] | float,
    squared: Float[np.ndarray, "..."],
) -> Float[np.ndarray, "..."]:
    """E KL(N(m, variance) ‖ N(m', other)) of scalars, from squared = E (m − m')²."""
    log_ratio = np.log(variance / other)
    return 0.5 * (np.expm1(log_ratio) - log_ratio + squared / other)
