"""UniPC: a predictor and a corrector of the probability flow that share one evaluation per step.

Both use x_s = σ_s/σ_t x_t + α_s ∫ e^{−(h − τ)} x̂_0(τ) dτ over 0 … h, with h = ½ (λ_s − λ_t), and
replace x̂_0(τ) by a polynomial through predictions.
"""

import jax.numpy as jnp

from diffusion.gaussian import expand
from diffusion.model import DiffusionModel
from diffusion.samplers.base import Sampler
from diffusion.samplers.solvers import (
    Past,
    earlier_nodes,
    exact_moments,
    extrapolated,
    usable,
    weighted_differences,
)
from diffusion.schedules import alpha, sigma

ORDERS = (1, 2, 3)
VARIANTS = {
    "bh1": lambda h: [0.5 * h],
    "bh2": lambda h: [-0.5 * jnp.expm1(-h)],
}
"""h -> B(h)/2, which approximates ∫ e^{−(h − τ)} τ/h dτ in the integral of a straight line."""


def unipc(model: DiffusionModel, order: int = 2, variant: str = "bh2") -> Sampler:
    """UniPC-p with predictions of x_0: order p + 1, with one evaluation in each step.

    The prediction at x_t first corrects the step to x_t, by the polynomial through it and the p
    predictions before it (UniC-p). Then the polynomial through the last p predictions gives x_s
    (UniP-p). The first steps have lower order. Zhao et al. (2023), algorithms 1 and 2 with B(h)
    and, as published, ρ = ½ for the predictor of order two and the corrector of order one.

    The correction of x_t is the difference between corrector and predictor, which does not need the
    previous x. x̂_0 at the corrected x_t is never evaluated.

    Args:
      model: p.
      order: p, from 1 to 3.
      variant: B(h), "bh1" or "bh2"; they differ only where ρ = ½.

    Raises:
      ValueError: for another order or variant.
    """
    if order not in ORDERS:
        raise ValueError(f"order = {order}; it must be 1, 2 or 3")
    if variant not in VARIANTS:
        raise ValueError(f"variant = {variant!r}; it must be one of {', '.join(VARIANTS)}")

    def moments(h, count):
        """The moments for 1 … count nodes."""
        return [VARIANTS[variant](h), *(exact_moments(h, k) for k in range(2, count + 1))][:count]

    def correction(past, x_0_hat):
        """The difference between UniC's x_t and UniP's, divided by α_t."""
        (origin, *x_0_hats), (gap, *gaps) = past
        nodes, existing = earlier_nodes(tuple(gaps), gap)
        h = 0.5 * usable(gap)
        predictor = extrapolated(nodes, existing, moments(h, order - 1))
        now = jnp.ones_like(gap)
        corrector = extrapolated([now, *nodes], [gap > 0, *existing], moments(h, order))
        pairs = zip(corrector[1:], predictor, strict=True)
        change = [corrector[0], *(new - old for new, old in pairs)]
        return weighted_differences(change, [x_0_hat, *x_0_hats], origin)

    def step(past, x_t, step, draw):
        del draw
        x_0_hat = model.reverse.predict("x_0", x_t, step.log_snr)
        x_t = x_t + expand(alpha(step.log_snr), x_t) * correction(past, x_0_hat)
        nodes, existing = earlier_nodes(past.gaps[:-1], step.gap)
        weights = extrapolated(nodes, existing, moments(0.5 * usable(step.gap), order - 1))
        ahead = expand(-jnp.expm1(-0.5 * step.gap), x_t) * x_0_hat
        ahead += weighted_differences(weights, list(past.x_0_hats[:-1]), x_0_hat)
        fall = expand(sigma(step.log_snr_s) / sigma(step.log_snr), x_t)
        x_s = fall * x_t + expand(alpha(step.log_snr_s), x_t) * ahead
        return past.then(x_0_hat, step.gap), x_s, x_0_hat

    return Sampler(lambda x_T: Past.empty(x_T, order), step, num_draws=0, forget=Past.forgotten)
