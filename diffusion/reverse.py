"""p_θ, the reverse process: what a denoiser's prediction says about x_s given x_t.

A denoiser is a function (x_t, log_snr, condition=None) -> prediction. What it predicts is one of
four linear images of the same thing, given x_t: ε, x_0, v or the score. All of them are scored
by the same error, ‖ε − ε̂‖², computed in the coordinates that the denoiser predicts in.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Float, PyTree

from diffusion.forward import diffuse, posterior
from diffusion.gaussian import Gaussian, expand
from diffusion.schedules import Array, Step, alpha, sigma
from diffusion.variances import VARIANCES, Variance


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
      eps_error_factor: λ -> the factor that takes y − ŷ to ε − ε̂.
    """

    from_pair: Callable
    x_0: Callable
    eps: Callable
    eps_error_factor: Callable


PARAMETERIZATIONS: dict[str, Parameterization] = {
    "eps": Parameterization(
        from_pair=lambda x_0, eps, a, s: eps,
        x_0=lambda y, x_t, a, s: (x_t - s * y) / a,
        eps=lambda y, x_t, a, s: y,
        eps_error_factor=lambda log_snr: jnp.ones_like(log_snr),
    ),
    "x_0": Parameterization(
        from_pair=lambda x_0, eps, a, s: x_0,
        x_0=lambda y, x_t, a, s: y,
        eps=lambda y, x_t, a, s: (x_t - a * y) / s,
        eps_error_factor=lambda log_snr: -jnp.exp(0.5 * log_snr),
    ),
    "v": Parameterization(  # Salimans and Ho (2022), appendix D
        from_pair=lambda x_0, eps, a, s: a * eps - s * x_0,
        x_0=lambda y, x_t, a, s: a * x_t - s * y,
        eps=lambda y, x_t, a, s: s * x_t + a * y,
        eps_error_factor=alpha,
    ),
    "score": Parameterization(  # ∇ log q(x_t | x_0) = −ε/σ
        from_pair=lambda x_0, eps, a, s: -eps / s,
        x_0=lambda y, x_t, a, s: (x_t + s**2 * y) / a,
        eps=lambda y, x_t, a, s: -s * y,
        eps_error_factor=lambda log_snr: -sigma(log_snr),
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


class Outputs(NamedTuple):
    """What a denoiser returned, taken apart.

    Attributes:
      prediction: of the parameterisation, with x_t's shape.
      extra: what Σ_θ is told by, with x_t's shape too; None where there is none.
    """

    prediction: Float[Array, "b *d"]
    extra: Float[Array, "b *d"] | None


class Reverse(NamedTuple):
    """p_θ(x_s | x_t): a denoiser, what it predicts, and the variance Σ_θ of the step.

    Attributes:
      denoiser: (x_t, log_snr, condition) -> prediction. With a learned Σ_θ the last axis is twice
        as long as x_t's, and its second half is what Σ_θ is told by; another Σ_θ ignores it.
      parameterization: a name in PARAMETERIZATIONS.
      variance: Σ_θ, as a `Variance` or a name in VARIANCES.
    """

    denoiser: Denoiser
    parameterization: str = "eps"
    variance: str | Variance = "beta_tilde"

    def outputs(
        self, x_t: Float[Array, "b *d"], log_snr: Float[Array, "b"], condition: PyTree | None = None
    ) -> Outputs:
        """The denoiser's prediction, and what it says of Σ_θ.

        Raises:
          ValueError: if Σ_θ is learned and the denoiser says nothing of it.
        """
        both = self.denoiser(x_t, log_snr, condition)
        if both.shape[-1] == 2 * jnp.shape(x_t)[-1]:
            return Outputs(*jnp.split(both, 2, axis=-1))
        if _variance(self.variance).is_learned:
            raise ValueError(
                f"a learned variance needs a denoiser whose last axis is {2 * jnp.shape(x_t)[-1]} "
                f"long, twice x_t's; it is {both.shape[-1]}"
            )
        return Outputs(both, None)

    def predict(
        self,
        target: str,
        x_t: Float[Array, "b *d"],
        log_snr: Float[Array, "b"],
        condition: PyTree | None = None,
    ) -> Float[Array, "b *d"]:
        """The denoiser's prediction, expressed as ε, x_0, v or the score."""
        prediction = self.outputs(x_t, log_snr, condition).prediction
        return convert(prediction, x_t, log_snr, self.parameterization, target)

    def eps_error_of(
        self,
        prediction: Float[Array, "b *d"],
        x_0: Float[Array, "b *d"],
        eps: Float[Array, "b *d"],
        log_snr: Float[Array, "b"],
    ) -> Float[Array, "b *d"]:
        """ε − ε̂ of a prediction made at x_t = α x_0 + σ ε; exact at high and low log-SNR."""
        a, s = expand(alpha(log_snr), x_0), expand(sigma(log_snr), x_0)
        known = PARAMETERIZATIONS[self.parameterization]
        target = known.from_pair(x_0, eps, a, s)
        return expand(known.eps_error_factor(jnp.asarray(log_snr)), x_0) * (target - prediction)

    def squared_eps_error(
        self,
        x_0: Float[Array, "b *d"],
        eps: Float[Array, "b *d"],
        log_snr: Float[Array, "b"],
        condition: PyTree | None = None,
    ) -> Float[Array, "b *d"]:
        """(ε − ε̂)² at x_t = α x_0 + σ ε, per coordinate."""
        prediction = self.outputs(diffuse(x_0, log_snr, eps), log_snr, condition).prediction
        return self.eps_error_of(prediction, x_0, eps, log_snr) ** 2

    def log_variance_ratio(
        self, step: Step, like: Float[Array, "b *d"], extra: Float[Array, "b *d"] | None = None
    ) -> Float[Array, "b ..."]:
        """r = log(Σ_θ/β̃) of steps to s ≥ 1, shaped to broadcast against `like`."""
        return _variance(self.variance).log_ratio(_expand_step(step, like), extra)

    def step(
        self,
        x_t: Float[Array, "b *d"],
        x_0_hat: Float[Array, "b *d"],
        step: Step,
        extra: Float[Array, "b *d"] | None = None,
    ) -> Gaussian:
        """p_θ(x_s | x_t) = N(S_θ, Σ_θ): the posterior's mean with x̂_0 in the place of x_0.

        Args:
          x_t: noisy sample at time t, in data units.
          x_0_hat: the predicted clean sample.
          step: the log-SNRs of s and t, one per example.
          extra: what the denoiser says of a learned Σ_θ.

        Lecture 13, (13.4). With ε̂ the mean is (x_t − β_t/√(1 − ᾱ_t) ε̂)/√α_t, and with the score s
        it is (x_t + β_t s)/√α_t, whose noise has a variance of about the score's coefficient.
        """
        mean = posterior(x_t, x_0_hat, step).mean
        return Gaussian(mean, _variance(self.variance).of(_expand_step(step, x_t), extra))


def _variance(variance: str | Variance) -> Variance:
    return VARIANCES[variance]() if isinstance(variance, str) else variance


def _expand_step(step: Step, like: Float[Array, "b *d"]) -> Step:
    return Step(expand(step.log_snr, like), expand(step.gap, like))
