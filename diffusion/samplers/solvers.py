"""Samplers that solve the probability flow, or the reverse SDE: Euler, Heun, DPM-Solver++.

Euler's and Heun's methods solve dy/dσ̃ = ε̂, where y = x/α and σ̃ = σ/α. The multistep ones start
from the flow's exact formula x_s = σ_s/σ_t x_t + α_s ∫ e^{−(h − τ)} x̂_0(τ) dτ over 0 … h, with
h = ½ (λ_s − λ_t), and put a polynomial through the predictions of earlier levels in the place of
x̂_0(τ). A step to the data is x̂_0 itself in all of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, PyTree

from diffusion.gaussian import expand
from diffusion.reverse import Reverse
from diffusion.samplers.base import Sampler, is_last, no_history, predict_x_0, scales
from diffusion.schedules import Array, Step, alpha, sigma


def euler(
    reverse: Reverse,
    x_0_treatment: str = "none",
    condition: PyTree | None = None,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = float("inf"),
    churn_noise: float = 1.0,
) -> Sampler:
    """Euler's method on dy/dσ̃ = ε̂: order one. Without churn it is DDIM at η = 0.

    The options are those of `churned`, which raises its errors.
    """

    def step(history, x_t, step, draw):
        del draw
        a_t, s_t = scales(step.log_snr, x_t)
        a_s, s_s = scales(step.log_snr_s, x_t)
        x_0_hat = predict_x_0(reverse, x_0_treatment, x_t, step.log_snr, condition)
        return history, a_s * x_0_hat + s_s / s_t * (x_t - a_t * x_0_hat), x_0_hat

    sampler = Sampler(no_history, step, num_draws=0)
    return churned(sampler, churn, churn_min, churn_max, churn_noise)


def heun(
    reverse: Reverse,
    x_0_treatment: str = "none",
    condition: PyTree | None = None,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = float("inf"),
    churn_noise: float = 1.0,
) -> Sampler:
    """Heun's method on dy/dσ̃ = ε̂: order two, two evaluations a step.

    The last step, to the data, is Euler's, with one evaluation. Karras et al. (2022), algorithm 1,
    or 2 with churn, for whatever levels the sampler is given. The options are those of `churned`,
    which raises its errors.
    """

    def step(history, x_t, step, draw):
        del draw
        a_t, s_t = scales(step.log_snr, x_t)
        a_s, s_s = scales(step.log_snr_s, x_t)
        x_0_hat = predict_x_0(reverse, x_0_treatment, x_t, step.log_snr, condition)
        eps_hat = (x_t - a_t * x_0_hat) / s_t

        def move(eps):
            return a_s / a_t * x_t + (s_s - a_s / a_t * s_t) * eps

        def correct():
            euler = move(eps_hat)
            again = predict_x_0(reverse, x_0_treatment, euler, step.log_snr_s, condition)
            return move(0.5 * (eps_hat + (euler - a_s * again) / s_s))

        x_s = jax.lax.cond(is_last(step), lambda: x_0_hat, correct)
        return history, x_s, x_0_hat

    sampler = Sampler(no_history, step, num_draws=0, evaluations=lambda history, n: 2 * n - 1)
    return churned(sampler, churn, churn_min, churn_max, churn_noise)


def churned(
    sampler: Sampler,
    churn: float,
    churn_min: float = 0.0,
    churn_max: float = float("inf"),
    churn_noise: float = 1.0,
) -> Sampler:
    """Noise is added before each step, which is then so much longer.

    σ̃ = σ/α is raised to (1 + γ) σ̃, which lowers the log-SNR by 2 log(1 + γ), by noise of that
    variance on y = x/α. Karras et al. (2022), algorithm 2, whose S_churn is γ times the number of
    steps. x̂_0 is then a prediction at the raised level.

    Args:
      sampler: one that takes no noise and remembers nothing of x.
      churn: γ, from 0, which changes nothing, to √2 − 1.
      churn_min: S_tmin, the least σ̃ at which noise is added.
      churn_max: S_tmax, the largest.
      churn_noise: S_noise, the standard deviation of the noise in units of the right one.

    Raises:
      ValueError: if churn is out of range.
    """
    if not 0 <= churn <= 2**0.5 - 1:
        raise ValueError(f"churn = {churn:g}; it must lie in 0 … √2 − 1 = 0.4142")
    if not churn:
        return sampler

    def step(history, x_t, step, draw):
        ratio = jnp.exp(-0.5 * step.log_snr)
        acts = (ratio >= churn_min) & (ratio <= churn_max)
        rise = jnp.where(acts, 2 * np.log1p(churn), 0.0)
        higher = Step(step.log_snr - rise, step.gap + rise)
        a_t, _ = scales(step.log_snr, x_t)
        a, s = scales(higher.log_snr, x_t)
        added = s * expand(jnp.sqrt(-jnp.expm1(-rise)), x_t)
        return sampler.step(history, a / a_t * x_t + churn_noise * added * draw(0), higher, draw)

    return sampler._replace(step=step, num_draws=1)


def dpm_solver_pp_2m(
    reverse: Reverse, x_0_treatment: str = "none", condition: PyTree | None = None
) -> Sampler:
    """DPM-Solver++(2M): the probability flow at order two, one evaluation a step.

    x_s = σ_s/σ_t x_t + α_s (1 − e^{−h}) D, with D the last two x̂_0 carried half a step forward, and
    x̂_0 itself in the first step. Lu et al. (2022), algorithm 2.
    """
    return _multistep(reverse, x_0_treatment, condition, (_midpoint,))


def dpm_solver_pp_2m_sde(
    reverse: Reverse, x_0_treatment: str = "none", condition: PyTree | None = None
) -> Sampler:
    """SDE-DPM-Solver++(2M): the reverse SDE, with noise in every step but the last.

    x_s = σ_s/σ_t e^{−h} x_t + α_s (1 − e^{−2h}) D + σ_s √(1 − e^{−2h}) z, D as in
    `dpm_solver_pp_2m`; with D = x̂_0, as in the first step, it is ancestral sampling with β̃. Lu et
    al. (2022), section 6.
    """
    return _multistep(reverse, x_0_treatment, condition, (_midpoint,), is_sde=True)


def dpm_solver_pp_3m(
    reverse: Reverse, x_0_treatment: str = "none", condition: PyTree | None = None
) -> Sampler:
    """DPM-Solver++(3M): the probability flow at order three, one evaluation a step.

    x̂_0(τ) is the parabola through the last three, integrated exactly. The first step is of order
    one and the second is that of 2M. Lu et al. (2022), appendix B; the second difference has the
    factor of two that Taylor's formula gives it, and that `dpm_solver_pp_3m_published` lacks.
    """
    return _multistep(reverse, x_0_treatment, condition, (_midpoint, _parabola))


def dpm_solver_pp_3m_published(
    reverse: Reverse, x_0_treatment: str = "none", condition: PyTree | None = None
) -> Sampler:
    """DPM-Solver++(3M) with the coefficients in use elsewhere: order two.

    The second difference enters with half its weight, so that a term of the local error's order
    three is left.
    """

    def halved(h):
        first, second = _parabola(h)
        return [first, 0.5 * second]

    return _multistep(reverse, x_0_treatment, condition, (_midpoint, halved))


class Past(NamedTuple):
    """What a multistep solver remembers: the latest first.

    Attributes:
      x_0_hats: predictions at earlier levels, zero where there is none yet.
      gaps: the steps in log-SNR that followed them; zero where there is none yet.
    """

    x_0_hats: tuple[Float[Array, "b *d"], ...]
    gaps: tuple[Float[Array, "b"], ...]

    @classmethod
    def empty(cls, x_T: Float[Array, "b *d"], depth: int) -> "Past":
        """Of the last `depth` predictions."""
        gaps = jnp.zeros(len(x_T), x_T.dtype)
        return cls((jnp.zeros_like(x_T),) * depth, (gaps,) * depth)

    def forgotten(self) -> "Past":
        """As before the first step."""
        return jax.tree.map(jnp.zeros_like, self)

    def then(self, x_0_hat: Float[Array, "b *d"], gap: Float[Array, "b"]) -> "Past":
        """After a prediction and the step that followed it, with the oldest forgotten."""
        return Past((x_0_hat, *self.x_0_hats)[:-1], (gap, *self.gaps)[:-1])


def earlier_nodes(
    gaps: tuple[Float[Array, "b"], ...], gap: Float[Array, "b"]
) -> tuple[list[Float[Array, "b"]], list[Bool[Array, "b"]]]:
    """Where earlier predictions lie, in units of `gap` from the level that it starts at; and which.

    Those that are not there yet have nodes of no meaning. None count for a gap of zero, which is
    one that has not been, or for an infinite one.
    """
    known, distance, nodes, are_known = (gap > 0) & jnp.isfinite(gap), 0.0, [], []
    for before in gaps:
        known &= before > 0
        distance += jnp.where(known, before, 1.0)
        nodes.append(-distance / usable(gap))
        are_known.append(known)
    return nodes, are_known


def usable(gap: Float[Array, "b"]) -> Float[Array, "b"]:
    """The gap, or one where it is zero or infinite and what is made of it does not count."""
    return jnp.where((gap > 0) & jnp.isfinite(gap), gap, 1.0)


def exact_moments(h: Float[Array, "b"], count: int) -> list[Float[Array, "b"]]:
    """∫ e^{−(h − τ)} (τ/h)^i dτ over 0 … h for i = 1 … count: h i! φ_{i+1}(−h).

    By Gauss-Legendre at 24 points, which loses no digits at small h as the closed forms do; its own
    error is below 1e-12 up to h = 40.
    """
    decay = jnp.exp(-h[:, None] * (1 - _POINTS))
    return [h * jnp.sum(_WEIGHTS * _POINTS**i * decay, axis=1) for i in range(1, count + 1)]


_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(24)
_POINTS, _WEIGHTS = 0.5 * (_POINTS + 1), 0.5 * _WEIGHTS


def _midpoint(h):
    """The slope integrated as if p were everywhere what it is at h/2."""
    return [-0.5 * jnp.expm1(-h)]


def _parabola(h):
    return exact_moments(h, 2)


def extrapolated(
    nodes: list[Float[Array, "b"]],
    are_known: list[Bool[Array, "b"]],
    moments: list[list[Float[Array, "b"]]],
) -> list[Float[Array, "b"]]:
    """What each value p(r_m) − p(0) adds to the integral of the polynomial p through them and p(0).

    Args:
      nodes: r_m, distinct and not zero.
      are_known: which of them count; none after the first that does not.
      moments: [k − 1][i − 1] is the integral of r^i where k nodes count.

    Returns:
      A weight for each node, zero for those that do not count.
    """
    weights = [jnp.zeros_like(node) for node in nodes]
    for k, (known, of_powers) in enumerate(zip(are_known, moments, strict=True), 1):
        with_k = _lagrange_weights(nodes[:k], of_powers) + weights[k:]
        weights = [jnp.where(known, new, old) for new, old in zip(with_k, weights, strict=True)]
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


def _multistep(reverse, x_0_treatment, condition, moments, is_sde=False):
    """The solver that extrapolates from as many earlier predictions as there are moments.

    `moments` holds, for one earlier prediction, for two, …, functions of h: the weights of r, r², …
    in ∫ e^{−(h − τ)} p(τ/h) dτ, exact or by a simpler rule.

    In the SDE x_t and earlier x̂_0 decay twice as fast as in the flow, and the noise that x_t loses
    beyond the flow is drawn anew.
    """

    def step(past, x_t, step, draw):
        x_0_hat = predict_x_0(reverse, x_0_treatment, x_t, step.log_snr, condition)
        rate = 1.0 if is_sde else 0.5
        nodes, are_known = earlier_nodes(past.gaps, step.gap)
        weights = extrapolated(nodes, are_known, [of(rate * usable(step.gap)) for of in moments])
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
