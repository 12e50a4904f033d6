"""The bound as T → ∞: its closed form, its limit, and what of the schedule it depends on."""

import jax
import numpy as np
import pytest

from diffusion import bound, schedules
from diffusion.exact import distributions
from diffusion.reverse import Reverse
from diffusion.schedules import Schedule
from tests.diffusion import oracles, problems

pytestmark = pytest.mark.usefixtures("quick_compiles")

CURVED = Schedule(10 - 20 * np.linspace(0, 1, 200) ** 1.7)


def diffusion_term(model, schedule, x_0, eps, num_points):
    """The mean over time by the midpoint rule."""
    time = (np.arange(num_points) + 0.5) / num_points
    log_snr, slope = schedule.log_snr(time), schedule.slope(time)

    @jax.jit
    def rates(log_snr, slope):
        def at(pair):
            full = [np.ones(len(x_0)) * value for value in pair]
            return bound.continuous_rate(model, x_0, eps, *full).kl.mean()

        return jax.lax.map(at, (log_snr, slope)).mean()

    return float(rates(log_snr, slope))


def sigma_points():
    points = oracles.sigma_points(8)
    return points[:, :4] * np.sqrt([4.0, 1.0, 0.25, 0.01]), points[:, 4:]


@pytest.mark.parametrize("schedule", [schedules.linear_log_snr(10.0, -10.0), CURVED])
def test_diffusion_term_is_the_mutual_information_whatever_the_interior(schedule, float64):
    """½ ∫ Σ SNR v/(1 + SNR v) dλ = I(x; x_1) − I(x; x_T), for any schedule between the ends."""
    data = distributions.normal(np.zeros(4), np.diag([4.0, 1.0, 0.25, 0.01]))
    model = Reverse(data.denoiser, "x_0")
    expected = data.mutual_information(10.0) - data.mutual_information(-10.0)
    # The midpoint rule's error at 2000 points is (20/2000)²/24 of the integrand's curvature.
    found = diffusion_term(model, schedule, *sigma_points(), 2000)
    assert found == pytest.approx(expected, rel=2e-5)


def test_the_interior_is_free_for_any_model(float64):
    model = problems.imperfect()
    straight, curved = (
        diffusion_term(model, schedule, *sigma_points(), 4000)
        for schedule in (schedules.linear_log_snr(10.0, -10.0), CURVED)
    )
    assert curved == pytest.approx(straight, rel=1e-4)


def test_discrete_bounds_fall_to_it_as_1_over_t(float64):
    x_0, eps = sigma_points()
    model = Reverse(problems.testbed().denoiser, "x_0")
    schedule = schedules.linear_log_snr(10.0, -10.0)
    limit = diffusion_term(model, schedule, x_0, eps, 8000)
    sizes = (100, 200, 400, 800)
    gaps = []
    for num_steps in sizes:
        levels = schedule.levels(num_steps + 1)
        t = np.broadcast_to(np.arange(2, num_steps + 2), (len(x_0), num_steps))
        run = jax.jit(
            lambda levels=levels, t=t: (
                bound.terms_at(
                    problems.without_decoder(model, levels),
                    x_0,
                    t,
                    problems.constant(eps),
                    chunk_size=50,
                ).kl
            )
        )
        gaps.append(float(run().mean(0).sum()) - limit)
    assert np.polyfit(np.log(sizes), np.log(gaps), 1)[0] == pytest.approx(-1, abs=0.05)


def test_slope_is_the_derivative_between_knots():
    schedule = Schedule(np.array([4.0, 1.0, 0.5, -3.0]))
    time = np.array([0.0, 0.1, 0.34, 0.5, 0.7, 1.0])
    expected = [-9.0, -9.0, -1.5, -1.5, -10.5, -10.5]
    np.testing.assert_allclose(schedule.slope(time), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="no continuous time"):
        schedules.from_betas([0.5]).slope(time)
