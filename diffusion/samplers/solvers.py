"""Samplers that solve the probability flow, or the reverse SDE: Euler, Heun, DPM-Solver++.

Euler's and Heun's methods solve dy/dσ̃ = ε̂, where y = x/α and σ̃ = σ/α. The multistep solvers use
the exact solution of the flow, x_s = σ_s/σ_t x_t + α_s ∫ e^{−(h − τ)} x̂_0(τ) dτ over 0 … h, with
h = ½ (λ_s − λ_t), and replace x̂_0(τ) by a polynomial through the predictions of earlier levels. In
all of them the step to the data is x̂_0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from diffusion.gaussian import expand
from diffusion.model import DiffusionModel
from diffusion.samplers.base import Sampler, is_last, no_history, scales
from diffusion.schedules import Array, Step, alpha, sigma


def euler(model: DiffusionModel, **churn: float) -> Sampler:
    """Euler's method on dy/dσ̃ = ε̂: order one. Without churn it is DDIM at η = 0.

    Args:
      model: p.
      **churn: the options of `churned`.
    """

    def step(history, x_t, step, draw):
        del draw
        a_t, s_t = scales(step.log_snr, x_t)
        a_s, s_s = scales(step.log_snr_s, x_t)
        x_0_hat = model.reverse.predict("x_0", x_t, step.log_snr)
        return history, a_s * x_0_hat + s_s / s_t * (x_t - a_t * x_0_hat), x_0_hat

    return churned(Sampler(no_history, step, num_draws=0), **churn)


def heun(model: DiffusionModel, **churn: float) -> Sampler:
    """Heun's method on dy/dσ̃ = ε̂: order two, with two evaluations in each step.

    The step to the data is Euler's, with one evaluation. Karras et al. (2022), algorithm 1, or
    algorithm 2 with churn, for any levels.

    Args:
      model: p.
      **churn: the options of `churned`.
    """

    def step(history, x_t, step, draw):
        del draw
        a_t, s_t = scales(step.log_snr, x_t)
        a_s, s_s = scales(step.log_snr_s, x_t)
        x_0_hat = model.reverse.predict("x_0", x_t, step.log_snr)
        eps_hat = (x_t - a_t * x_0_hat) / s_t

        def move(eps):
            return a_s / a_t * x_t + (s_s - a_s / a_t * s_t) * eps

        def correct():
            euler = move(eps_hat)
            again = model.reverse.predict("x_0", euler, step.log_snr_s)
            return move(0.5 * (eps_hat + (euler - a_s * again) / s_s))

        x_s = jax.lax.cond(is_last(step), lambda: x_0_hat, correct)
        return history, x_s, x_0_hat

    sampler = Sampler(no_history, step, num_draws=0, evaluations=lambda history, n: 2 * n - 1)
    return churned(sampler, **churn)


def churned(
    sampler: Sampler,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = float("inf"),
    churn_noise: float = 1.0,
) -> Sampler:
    """Adds noise before each step, which then starts from the noisier level.

    The noise on y = x/α raises σ̃ = σ/α to (1 + γ) σ̃, which lowers the log-SNR by 2 log(1 + γ). x̂_0
    is a prediction at the noisier level. Karras et al. (2022), algorithm 2, whose S_churn is γ
    times the number of steps.

    Args:
      sampler: a sampler without noise and without history.
      churn: γ, from 0 (no noise) to √2 − 1.
      churn_min: S_tmin, the smallest σ̃ at which noise is added.
      churn_max: S_tmax, the largest.
      churn_noise: S_noise, a factor of the noise's standard deviation; one is consistent.

    Raises:
      ValueError: if churn is out of range.
    """
    if not 0 <= churn <= 2**0.5 - 1:
        raise ValueError(f"churn = {churn:g}; it must lie in 0 … √2 − 1 = 0.4142")
    if not churn:
        return sampler

    def step(history, x_t, step, draw):
        ratio = jnp.exp(-0.5 * step.log_snr)
        is_inside = (ratio >= churn_min) & (ratio <= churn_max)
        shift = jnp.where(is_inside, 2 * np.log1p(churn), 0.0)
        noisier = Step(step.log_snr - shift, step.gap + shift)
        a_t, _ = scales(step.log_snr, x_t)
        a, s = scales(noisier.log_snr, x_t)
        std = s * expand(jnp.sqrt(-jnp.expm1(-shift)), x_t)
        return sampler.step(history, a / a_t * x_t + churn_noise * std * draw(0), noisier, draw)

    return sampler._replace(step=step, num_draws=1)


def dpm_solver_pp_2m(model: DiffusionModel) -> Sampler:
    """DPM-Solver++(2M): the probability flow at order two, with one evaluation in each step.

    x_s = σ_s/σ_t x_t + α_s (1 − e^{−h}) D, where D extrapolates the last two x̂_0 to the middle of
    the step; in the first step it is x̂_0. Lu et al. (2022), algorithm 2.
    """
    return _multistep(model, (_midpoint,))


def dpm_solver_pp_2m_sde(model: DiffusionModel) -> Sampler:
    """SDE-DPM-Solver++(2M): the reverse SDE, with noise in every step but the last.

    x_s = σ_s/σ_t e^{−h} x_t + α_s (1 − e^{−2h}) D + σ_s √(1 − e^{−2h}) z, with the D of
    `dpm_solver_pp_2m`. With D = x̂_0, as in the first step, it is ancestral sampling with β̃. Lu et
    al. (2022), section 6.
    """
    return _multistep(model, (_midpoint,), is_sde=True)


def dpm_solver_pp_3m(model: DiffusionModel) -> Sampler:
    """DPM-Solver++(3M): the probability flow at order three, with one evaluation in each step.

    x̂_0(τ) is replaced by the parabola through the last three predictions, integrated exactly. The
    first step has order one; the second is that of 2M. Lu et al. (2022), appendix B, except that
    the second difference has twice the weight, as Taylor's formula requires: see
    `dpm_solver_pp_3m_published`.
    """
    return _multistep(model, (_midpoint, _parabola))


def dpm_solver_pp_3m_published(model: DiffusionModel) -> Sampler:
    """DPM-Solver++(3M) with the coefficients of the published code, which has order two.

    The second difference has half its correct weight, which leaves a local error of order three.
    """

    def halved(h):
        first, second = _parabola(h)
        return [first, 0.5 * second]

    return _multistep(model, (_midpoint, halved))


class Past(NamedTuple):
    """The history of a multistep solver, latest first.

    Attributes:
      x_0_hats: predictions at earlier levels; zero if there are none yet.
      gaps: the log-SNR steps taken from these levels; zero if there are none yet.
    """

    x_0_hats: tuple[Float[Array, "b *d"], ...]
    gaps: tuple[Float[Array, "b"], ...]

    @classmethod
    def empty(cls, x_T: Float[Array, "b *d"], depth: int) -> "Past":
        """The history before the first step, for `depth` predictions."""
        gaps = jnp.zeros(len(x_T), x_T.dtype)
        return cls((jnp.zeros_like(x_T),) * depth, (gaps,) * depth)

    def forgotten(self) -> "Past":
        """The history before the first step, with this one's shapes."""
        return jax.tree.map(jnp.zeros_like, self)

    def then(self, x_0_hat: Float[Array, "b *d"], gap: Float[Array, "b"]) -> "Past":
        """The history after one more prediction and step; the oldest is dropped."""
        return Past((x_0_hat, *self.x_0_hats)[:-1], (gap, *self.gaps)[:-1])


def earlier_nodes(
    gaps: tuple[Float[Array, "b"], ...], gap: Float[Array, "b"]
) -> tuple[list[Float[Array, "b"]], list[Bool[Array, "b"]]]:
    """The positions of earlier predictions, and which of them exist.

    A position is measured from the level at which the step `gap` starts, in units of `gap`. It is
    meaningless if the prediction does not exist. If `gap` is zero (a step not yet taken) or
    infinite, no prediction counts as existing.
    """
    exists, distance, nodes, existing = (gap > 0) & jnp.isfinite(gap), 0.0, [], []
    for before in gaps:
        exists &= before > 0
        distance += jnp.where(exists, before, 1.0)
        nodes.append(-distance / usable(gap))
        existing.append(exists)
    return nodes, existing


def usable(gap: Float[Array, "b"]) -> Float[Array, "b"]:
    """The gap; one where it is zero or infinite and the result is not used."""
    return jnp.where((gap > 0) & jnp.isfinite(gap), gap, 1.0)


def exact_moments(h: Float[Array, "b"], count: int) -> list[Float[Array, "b"]]:
    """∫ e^{−(h − τ)} (τ/h)^i dτ over 0 … h for i = 1 … count: h i! φ_{i+1}(−h).

    By Gauss-Legendre quadrature with 24 points: the closed forms cancel at small h, and the error
    of the quadrature is below 1e-12 up to h = 40.
    """
    decay = jnp.exp(-h[:, None] * (1 - _POINTS))
    return [h * jnp.sum(_WEIGHTS * _POINTS**i * decay, axis=1) for i in range(1, count + 1)]


_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(24)
_POINTS, _WEIGHTS = 0.5 * (_POINTS + 1), 0.5 * _WEIGHTS


def _midpoint(h):
    """The integral of e^{−(h − τ)} r with r = ½, its value at the middle of the step."""
    return [-0.5 * jnp.expm1(-h)]


def _parabola(h):
    return exact_moments(h, 2)


def extrapolated(
    nodes: list[Float[Array, "b"]],
    existing: list[Bool[Array, "b"]],
    moments: list[list[Float[Array, "b"]]],
) -> list[Float[Array, "b"]]:
    """Quadrature weights w_m: the integral of p is that of p(0) plus Σ_m w_m (p(r_m) − p(0)).

    p is the polynomial through its values at zero and at the existing nodes.

    Args:
      nodes: r_m, distinct and not zero.
      existing: which of the nodes exist; none after the first that does not.
      moments: moments[k − 1][i − 1] is the integral of r^i if k nodes exist.

    Returns:
      A weight for each node, zero for those that do not exist.
    """
    weights = [jnp.zeros_like(node) for node in nodes]
    for k, (exists, k_moments) in enumerate(zip(existing, moments, strict=True), 1):
        with_k = _lagrange_weights(nodes[:k], k_moments) + weights[k:]
        weights = [jnp.where(exists, new, old) for new, old in zip(with_k, weights, strict=True)]
    return weights


def _lagrange_weights(nodes, moments):
    """The integral of r/r_m Π (r − r_j)/(r_m − r_j) over j ≠ m, for each m."""
    weights = []
    for m, node in enumerate(nodes):
        powers = [1 / node]  # the coefficients of r, r², …
        for other in nodes[:m] + nodes[m + 1 :]:
            pairs = zip([0.0, *powers], [*powers, 0.0], strict=True)
            powers = [(lower - other * same) / (node - other) for lower, same in pairs]
        terms = [power * moment for power, moment in zip(powers, moments, strict=True)]
        weights.append(sum(terms[1:], terms[0]))
    return weights


def weighted_differences(
    weights: list[Float[Array, "b"]],
    x_0_hats: list[Float[Array, "b *d"]],
    origin: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """Σ_m w_m (x̂_0 at m − x̂_0 at the origin)."""
    total = jnp.zeros_like(origin)
    for weight, x_0_hat in zip(weights, x_0_hats, strict=True):
        total += expand(weight, origin) * (x_0_hat - origin)
    return total


def _multistep(model, moments, is_sde=False):
    """The solver that extrapolates from len(moments) earlier predictions.

    `moments[k − 1]`, used if k earlier predictions exist, is a function of h. It returns the
    integrals ∫ e^{−(h − τ)} r^i dτ with r = τ/h for i = 1 … k, exact or approximate.

    In the SDE x_t and earlier x̂_0 decay twice as fast as in the flow, and fresh noise replaces the
    noise that x_t loses by that.
    """

    def step(past, x_t, step, draw):
        x_0_hat = model.reverse.predict("x_0", x_t, step.log_snr)
        rate = 1.0 if is_sde else 0.5
        nodes, existing = earlier_nodes(past.gaps, step.gap)
        h = rate * usable(step.gap)
        weights = extrapolated(nodes, existing, [moment(h) for moment in moments])
        ahead = expand(-jnp.expm1(-rate * step.gap), x_t) * x_0_hat
        ahead += weighted_differences(weights, list(past.x_0_hats), x_0_hat)
        fall = sigma(step.log_snr_s) / sigma(step.log_snr)
        if is_sde:
            fall *= jnp.exp(-0.5 * step.gap)
        x_s = expand(fall, x_t) * x_t + expand(alpha(step.log_snr_s), x_t) * ahead
        if is_sde:
            x_s += expand(jnp.sqrt(step.posterior_variance), x_t) * draw(0)
        return past.then(x_0_hat, step.gap), x_s, x_0_hat

    def init(x_T):
        return Past.empty(x_T, len(moments))

    return Sampler(init, step, num_draws=1 if is_sde else 0, forget=Past.forgotten)
