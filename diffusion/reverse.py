"""p_θ(x_s | x_t), the reverse process, from a denoiser's prediction and a variance Σ_θ.

A denoiser is a function (x_t, log_snr, condition=None) -> prediction. It predicts ε, x_0, v or the
score; given x_t each is a linear function of any other. The error is ‖ε − ε̂‖² for all four,
computed in the coordinates of the prediction.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Float, PyTree

from diffusion.forward import diffuse, posterior
from diffusion.gaussian import Gaussian, expand
from diffusion.schedules import Array, Numbers, Step, alpha, floats, sigma
from diffusion.variances import VARIANCES, Variance


class Denoiser(Protocol):
    """A network, a closed-form optimum or a lambda. The prediction has x_t's shape."""

    def __call__(
        self, x_t: Float[Array, "b *d"], log_snr: Float[Array, "b"], condition: PyTree | None = None
    ) -> Float[Array, "b *d"]: ...


class Parameterization(NamedTuple):
    """How a prediction y relates to x_0 and ε, where x_t = α x_0 + σ ε.

    Attributes:
      from_pair: (x_0, ε, α, σ) -> y.
      x_0: (y, x_t, α, σ) -> x_0.
      eps: (y, x_t, α, σ) -> ε.
      eps_error_factor: λ -> (ε − ε̂)/(y − ŷ).
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
    log_snr: Numbers,
    source: str,
    target: str,
) -> Float[Array, "b *d"]:
    """Converts a prediction from one parameterisation to another, both by name."""
    if source == target:
        return prediction
    a, s = expand(alpha(log_snr), x_t), expand(sigma(log_snr), x_t)
    rule = PARAMETERIZATIONS[source]
    x_0, eps = rule.x_0(prediction, x_t, a, s), rule.eps(prediction, x_t, a, s)
    return PARAMETERIZATIONS[target].from_pair(x_0, eps, a, s)


class Outputs(NamedTuple):
    """A denoiser's output, split into its two parts.

    Attributes:
      prediction: in the reverse process's parameterisation, with x_t's shape.
      extra: the input of a learned Σ_θ, with x_t's shape; None if the denoiser has no such output.
    """

    prediction: Float[Array, "b *d"]
    extra: Float[Array, "b *d"] | None

    def joined(self) -> Float[Array, "b ..."]:
        """One array, as a denoiser returns it: prediction, then extra, along the last axis."""
        if self.extra is None:
            return self.prediction
        return jnp.concatenate([self.prediction, self.extra], axis=-1)


class Reverse(NamedTuple):
    """p_θ(x_s | x_t): a denoiser, what it predicts, and the variance Σ_θ of the step.

    Attributes:
      denoiser: (x_t, log_snr, condition) -> prediction. With a learned Σ_θ the last axis is twice
        as long as x_t's; its second half, the `extra`, determines Σ_θ. A fixed Σ_θ ignores it.
      parameterization: a name in PARAMETERIZATIONS.
      variance: Σ_θ, as a `Variance` or a name in VARIANCES.
      condition: the denoiser's third argument, such as class labels; None for no condition.
    """

    denoiser: Denoiser
    parameterization: str = "eps"
    variance: str | Variance = "beta_tilde"
    condition: PyTree | None = None

    def given(self, condition: PyTree | None) -> "Reverse":
        """p_θ(x_s | x_t, condition); None removes the condition."""
        return self._replace(condition=condition)

    def outputs(self, x_t: Float[Array, "b *d"], log_snr: Numbers) -> Outputs:
        """Calls the denoiser and splits its output into the prediction and the extra.

        Raises:
          ValueError: if Σ_θ is learned and the denoiser has no extra output.
        """
        log_snr = jnp.broadcast_to(floats(log_snr), jnp.shape(x_t)[:1])
        both = self.denoiser(x_t, log_snr, self.condition)
        if both.shape[-1] == 2 * jnp.shape(x_t)[-1]:
            return Outputs(*jnp.split(both, 2, axis=-1))
        if _variance(self.variance).is_learned:
            raise ValueError(
                f"a learned variance needs a denoiser whose last axis is {2 * jnp.shape(x_t)[-1]} "
                f"long, twice x_t's; it is {both.shape[-1]}"
            )
        return Outputs(both, None)

    def predict(
        self, target: str, x_t: Float[Array, "b *d"], log_snr: Numbers
    ) -> Float[Array, "b *d"]:
        """The denoiser's prediction, converted to `target`: eps, x_0, v or score."""
        prediction = self.outputs(x_t, log_snr).prediction
        return convert(prediction, x_t, log_snr, self.parameterization, target)

    def eps_error(
        self,
        prediction: Float[Array, "b *d"],
        x_0: Float[Array, "b *d"],
        eps: Float[Array, "b *d"],
        log_snr: Numbers,
    ) -> Float[Array, "b *d"]:
        """ε − ε̂ for a prediction at x_t = α x_0 + σ ε, accurate at high and at low log-SNR."""
        a, s = expand(alpha(log_snr), x_0), expand(sigma(log_snr), x_0)
        rule = PARAMETERIZATIONS[self.parameterization]
        target = rule.from_pair(x_0, eps, a, s)
        return expand(rule.eps_error_factor(floats(log_snr)), x_0) * (target - prediction)

    def squared_eps_error(
        self, x_0: Float[Array, "b *d"], eps: Float[Array, "b *d"], log_snr: Numbers
    ) -> Float[Array, "b *d"]:
        """(ε − ε̂)² at x_t = α x_0 + σ ε, per coordinate."""
        prediction = self.outputs(diffuse(x_0, log_snr, eps), log_snr).prediction
        return self.eps_error(prediction, x_0, eps, log_snr) ** 2

    def log_variance_ratio(
        self, step: Step, like: Float[Array, "b *d"], extra: Float[Array, "b *d"] | None = None
    ) -> Float[Array, "b ..."]:
        """r = log(Σ_θ/β̃) for steps to s ≥ 1, shaped to broadcast against `like`."""
        return _variance(self.variance).log_ratio(_expand_step(step, like), extra)

    def step(
        self,
        x_t: Float[Array, "b *d"],
        x_0_hat: Float[Array, "b *d"],
        step: Step,
        extra: Float[Array, "b *d"] | None = None,
    ) -> Gaussian:
        """p_θ(x_s | x_t) = N(S_θ, Σ_θ); S_θ is the mean of q(x_s | x_t, x_0) with x̂_0 for x_0.

        Args:
          x_t: noisy sample at time t, in data units.
          x_0_hat: the predicted clean sample.
          step: the log-SNRs of s and t, one per example.
          extra: the denoiser's extra output, for a learned Σ_θ.

        Lecture 13, (13.4). In terms of ε̂ the mean is (x_t − β_t/√(1 − ᾱ_t) ε̂)/√α_t, and in terms
        of the score s it is (x_t + β_t s)/√α_t.
        """
        mean = posterior(x_t, x_0_hat, step).mean
        return Gaussian(mean, _variance(self.variance).value(_expand_step(step, x_t), extra))


def _variance(variance: str | Variance) -> Variance:
    return VARIANCES[variance]() if isinstance(variance, str) else variance


def _expand_step(step: Step, like: Float[Array, "b *d"]) -> Step:
    return Step(expand(step.log_snr, like), expand(step.gap, like))
