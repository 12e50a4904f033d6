"""p_θ, the reverse process: what a denoiser's prediction says about x_s given x_t.

A denoiser is a function (x_t, log_snr, condition=None) -> prediction. What it predicts is one of
four linear images of the same thing, given x_t: ε, x_0, v or the score. All of them are scored
by the same error, ‖ε − ε̂‖², computed in the coordinates that the denoiser predicts in.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Float, PyTree

from diffusion.forward import diffuse, posterior
from diffusion.gaussian import Gaussian, expand
from diffusion.schedules import Array, Step, alpha, sigma


class Denoiser(Protocol):
    """A network, a closed-form optimum or a lambda: its prediction has x_t's shape."""

    def __call__(
        self, x_t: Float[Array, "b *d"], log_snr: Float[Array, "b"], condition: PyTree | None = None
    ) -> Float[Array, "b *d"]: ...


class Parameterization(NamedTuple):
    """How a prediction y relates to x_0 and ε, where x_t = α x_0 + σ ε.

    Attributes:
      from_pair: (x_0, ε, α, σ) -> y.
      x_0: (y, x_t, α, σ) -> x_0.
      eps: (y, x_t, α, σ) -> ε.
      eps_error_weight: λ -> the factor that takes ‖y − ŷ‖² to ‖ε − ε̂‖².
    """

    from_pair: Callable
    x_0: Callable
    eps: Callable
    eps_error_weight: Callable


PARAMETERIZATIONS: dict[str, Parameterization] = {
    "eps": Parameterization(
        from_pair=lambda x_0, eps, a, s: eps,
        x_0=lambda y, x_t, a, s: (x_t - s * y) / a,
        eps=lambda y, x_t, a, s: y,
        eps_error_weight=lambda log_snr: jnp.ones_like(log_snr),
    ),
    "x_0": Parameterization(
        from_pair=lambda x_0, eps, a, s: x_0,
        x_0=lambda y, x_t, a, s: y,
        eps=lambda y, x_t, a, s: (x_t - a * y) / s,
        eps_error_weight=jnp.exp,
    ),
    "v": Parameterization(  # Salimans and Ho (2022), appendix D
        from_pair=lambda x_0, eps, a, s: a * eps - s * x_0,
        x_0=lambda y, x_t, a, s: a * x_t - s * y,
        eps=lambda y, x_t, a, s: s * x_t + a * y,
        eps_error_weight=jax.nn.sigmoid,
    ),
    "score": Parameterization(  # ∇ log q(x_t | x_0) = −ε/σ
        from_pair=lambda x_0, eps, a, s: -eps / s,
        x_0=lambda y, x_t, a, s: (x_t + s**2 * y) / a,
        eps=lambda y, x_t, a, s: -s * y,
        eps_error_weight=lambda log_snr: jax.nn.sigmoid(-log_snr),
    ),
}


def convert(
    prediction: Float[Array, "b *d"],
    x_t: Float[Array, "b *d"],
    log_snr: Float[Array, "b"],
    source: str,
    target: str,
) -> Float[Array, "b *d"]:
    """A prediction of `source` as a prediction of `target`, both names of parameterisations."""
    if source == target:
        return prediction
    a, s = expand(alpha(log_snr), x_t), expand(sigma(log_snr), x_t)
    known = PARAMETERIZATIONS[source]
    x_0, eps = known.x_0(prediction, x_t, a, s), known.eps(prediction, x_t, a, s)
    return PARAMETERIZATIONS[target].from_pair(x_0, eps, a, s)


class Variance(NamedTuple):
    """A choice of Σ_θ for the steps to s ≥ 1.

    Attributes:
      of: Step -> Σ_θ, one per example.
      log_ratio: Step -> log(Σ_θ/β̃), formed without cancellation.
    """

    of: Callable[[Step], Float[Array, "b"]]
    log_ratio: Callable[[Step], Float[Array, "b"]]


VARIANCES: dict[str, Variance] = {
    "beta_tilde": Variance(
        of=lambda step: step.posterior_variance, log_ratio=lambda step: jnp.zeros_like(step.gap)
    ),
    "beta": Variance(of=lambda step: step.beta, log_ratio=lambda step: step.log_beta_ratio),
}


class Reverse(NamedTuple):
    """p_θ(x_s | x_t): a denoiser, what it predicts, and the variance Σ_θ of the step.

    Attributes:
      denoiser: (x_t, log_snr, condition) -> prediction.
      parameterization: a name in PARAMETERIZATIONS.
      variance: a name in VARIANCES.
    """

    denoiser: Denoiser
    parameterization: str = "eps"
    variance: str = "beta_tilde"

    def predict(
        self,
        target: str,
        x_t: Float[Array, "b *d"],
        log_snr: Float[Array, "b"],
        condition: PyTree | None = None,
    ) -> Float[Array, "b *d"]:
        """The denoiser's prediction, expressed as ε, x_0, v or the score."""
        prediction = self.denoiser(x_t, log_snr, condition)
        return convert(prediction, x_t, log_snr, self.parameterization, target)

    def squared_eps_error(
        self,
        x_0: Float[Array, "b *d"],
        eps: Float[Array, "b *d"],
        log_snr: Float[Array, "b"],
        condition: PyTree | None = None,
    ) -> Float[Array, "b *d"]:
        """(ε − ε̂)² at x_t = α x_0 + σ ε, per coordinate; exact at high and at low log-SNR."""
        prediction = self.denoiser(diffuse(x_0, log_snr, eps), log_snr, condition)
        return self.eps_error_of(prediction, x_0, eps, log_snr)

    def eps_error_of(
        self,
        prediction: Float[Array, "b *d"],
        x_0: Float[Array, "b *d"],
        eps: Float[Array, "b *d"],
        log_snr: Float[Array, "b"],
    ) -> Float[Array, "b *d"]:
        """(ε − ε̂)² of a prediction that the denoiser has made at x_t = α x_0 + σ ε."""
        a, s = expand(alpha(log_snr), x_0), expand(sigma(log_snr), x_0)
        known = PARAMETERIZATIONS[self.parameterization]
        target = known.from_pair(x_0, eps, a, s)
        weight = known.eps_error_weight(jnp.asarray(log_snr))
        return expand(weight, x_0) * (target - prediction) ** 2


def reverse_step(
    x_t: Float[Array, "b *d"], x_0_hat: Float[Array, "b *d"], step: Step, variance: str
) -> Gaussian:
    """p_θ(x_s | x_t) = N(S_θ, Σ_θ I): the posterior's mean with x̂_0 in the place of x_0.

    Lecture 13, (13.4). With ε̂ the mean is (x_t − β_t/√(1 − ᾱ_t) ε̂)/√α_t, and with the score s
    it is (x_t + β_t s)/√α_t, whose noise has a variance of about the score's coefficient.
    """
    mean = posterior(x_t, x_0_hat, step).mean
    return Gaussian(mean, expand(VARIANCES[variance].of(step), x_t))
