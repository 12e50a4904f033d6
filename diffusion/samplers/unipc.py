"""UniPC: a predictor and a corrector of the probability flow that share one evaluation a step.

Both start from x_s = σ_s/σ_t x_t + α_s ∫ e^{−(h − τ)} x̂_0(τ) dτ over 0 … h, with
h = ½ (λ_s − λ_t), and put polynomials through predictions in the place of x̂_0(τ).
"""

import jax.numpy as jnp
from jaxtyping import PyTree

from diffusion.gaussian import expand
from diffusion.reverse import Reverse
from diffusion.samplers.base import Sampler, predict_x_0
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
"""B(h)/2: what stands for ∫ e^{−(h − τ)} τ/h dτ where a straight line is integrated."""


def unipc(
    reverse: Reverse,
    x_0_treatment: str = "none",
    condition: PyTree | None = None,
    order: int = 2,
    variant: str = "bh2",
) -> Sampler:
    """UniPC-p, predicting x̂_0: order p + 1, one evaluation a step.

    The prediction at x_t first corrects the step that made x_t, by the polynomial through it and
    the p before it (UniC-p). Then the polynomial through the last p makes x_s (UniP-p). The first
    steps are of lower order. Zhao et al. (2023), algorithms 1 and 2 with B(h) and, as published,
    ρ = ½ for the predictor of order two and the corrector of order one.

    x_t is corrected by what the corrector adds to the predictor, so that x before need not be
    remembered. x̂_0 of the corrected x_t is never worked out.

    Args:
      reverse: the model.
      x_0_treatment: a name in X_0_TREATMENTS.
      condition: passed to the denoiser.
      order: p: 1, 2 or 3.
      variant: B(h), "bh1" or "bh2"; they differ where ρ = ½ only.

    Raises:
      ValueError: if the order or the variant is none of these.
    """
    if order not in ORDERS:
        raise ValueError(f"order = {order}; UniPC's is 1, 2 or 3")
    if variant not in VARIANTS:
        raise ValueError(f"variant = {variant!r}; UniPC's are {', '.join(VARIANTS)}")

    def moments(h, count):
        """Of 1 … count nodes."""
        return [VARIANTS[variant](h), *(exact_moments(h, k) for k in range(2, count + 1))][:count]

    def correction(past, x_0_hat):
        """What UniC adds to the x_t that UniP made, over α_t."""
        (origin, *x_0_hats), (gap, *gaps) = past
        nodes, are_known = earlier_nodes(tuple(gaps), gap)
        h = 0.5 * usable(gap)
        made = extrapolated(nodes, are_known, moments(h, order - 1))
        now = jnp.ones_like(gap)
        better = extrapolated([now, *nodes], [gap > 0, *are_known], moments(h, order))
        change = [better[0], *(new - old for new, old in zip(better[1:], made, strict=True))]
        return weighted_differences(change, [x_0_hat, *x_0_hats], origin)

    def step(past, x_t, step, draw):
        del draw
        x_0_hat = predict_x_0(reverse, x_0_treatment, x_t, step.log_snr, condition)
        x_t = x_t + expand(alpha(step.log_snr), x_t) * correction(past, x_0_hat)
        nodes, are_known = earlier_nodes(past.gaps[:-1], step.gap)
        weights = extrapolated(nodes, are_known, moments(0.5 * usable(step.gap), order - 1))
        ahead = expand(-jnp.expm1(-0.5 * step.gap), x_t) * x_0_hat
        ahead += weighted_differences(weights, list(past.x_0_hats[:-1]), x_0_hat)
        fall = expand(sigma(step.log_snr_s) / sigma(step.log_snr), x_t)
        x_s = fall * x_t + expand(alpha(step.log_snr_s), x_t) * ahead
        return past.then(x_0_hat, step.gap), x_s, x_0_hat

    return Sampler(lambda x_T: Past.empty(x_T, order), step, num_draws=0, forget=Past.forgotten)
