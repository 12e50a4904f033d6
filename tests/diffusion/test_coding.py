"""Bits-back coding: both orders, their grids and what they borrow."""

import jax
import numpy as np
import pytest

from diffusion import decoders
from diffusion.coding import ORDERS, grid_spacing, make_code, peak_debt, pixel_log_probs
from diffusion.exact import distributions
from diffusion.model import DiffusionModel
from diffusion.reverse import Reverse
from diffusion.schedules import linear_log_snr

GREY = decoders.Quantization(5)
LEVEL = np.random.default_rng(0).integers(0, 5, (6, 3))
DATA = distributions.points(np.asarray(GREY.to_data(LEVEL)))
SCHEDULE = linear_log_snr(5.0, -5.0)


def model_of(num_timesteps, variance="beta_tilde", decoder="categorical"):
    p = Reverse(DATA.denoiser, "x_0", variance)
    return DiffusionModel(p, decoders.DECODERS[decoder](GREY), SCHEDULE.levels(num_timesteps))


class Tape:
    """A coder without bits: its pops draw, and pushes after `rewind` must undo them exactly."""

    def __init__(self):
        self.rng, self.pushed, self.popped, self.is_decoder = (
            np.random.default_rng(0),
            [],
            [],
            False,
        )

    def rewind(self):
        self.is_decoder = True

    def push(self, value, *distribution):
        if self.is_decoder:
            self.compare(self.popped.pop(), (value, *distribution))
        else:
            self.pushed.append((value, *distribution))

    def pop(self, gaussian):
        if self.is_decoder:
            return self.give(gaussian)
        k = np.rint(gaussian.mean + gaussian.std * self.rng.normal(size=gaussian.mean.shape))
        self.popped.append((k.astype(np.int64), gaussian))
        return k.astype(np.int64)

    def give(self, *distribution):
        value, *expected = self.pushed.pop()
        self.compare(expected, distribution)
        return value

    push_choice, pop_choice = push, give

    def compare(self, expected, actual):
        for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_timesteps", [1, 2, 5])
def test_a_decoder_undoes_every_operation_in_the_opposite_order(order, num_timesteps):
    """With distributions that agree to the last bit, or the tape complains."""
    code, tape = make_code(model_of(num_timesteps), GREY, order), Tape()
    ORDERS[order].push(tape, code, LEVEL)
    assert len(tape.popped) == num_timesteps
    assert len(tape.pushed) == num_timesteps + 1
    tape.rewind()
    np.testing.assert_array_equal(ORDERS[order].pop(tape, code, LEVEL.shape), LEVEL)
    assert not tape.popped
    assert not tape.pushed


@pytest.mark.parametrize("decoder", decoders.DECODERS)
def test_probabilities_of_pixels_are_those_of_the_decoder(decoder):
    model = model_of(5, decoder=decoder)
    x_1 = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
    log_probs = np.asarray(pixel_log_probs(model, x_1, GREY))
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=-1), 1, rtol=1e-5)
    log_snr = model.levels.step(np.ones(6, np.int32)).log_snr
    x_0_hat = model.reverse.predict("x_0", x_1, log_snr)
    expected = model.decoder(GREY.to_data(LEVEL), x_1, x_0_hat, model.levels)
    chosen = np.take_along_axis(log_probs, LEVEL[..., None], axis=-1)
    np.testing.assert_allclose(chosen.sum(axis=(1, 2)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_every_grid_has_enough_bins_for_every_distribution_on_it(order):
    code = make_code(model_of(7), GREY, order, bins_per_std=8.0)
    k, least = np.zeros(LEVEL.shape, np.int64), np.full(8, np.inf)
    # The distributions that code x_t, by t.
    by_level = {t: [code.reverse(k, t + 1)] for t in range(1, 7)} | {7: [code.prior(k.shape)]}
    for t, distributions_there in by_level.items():
        if order == "bit_swap":
            distributions_there.append(code.transition(k, t) if t > 1 else code.marginal(LEVEL, 1))
        else:
            posterior = code.marginal(LEVEL, 7) if t == 7 else code.posterior(k, LEVEL, t + 1)
            distributions_there.append(posterior)
        least[t] = min(gaussian.std.min() for gaussian in distributions_there)
    np.testing.assert_allclose(least[1:], 8, rtol=1e-5)


def test_bit_swap_borrows_two_latents_and_bb_ans_all():
    """x_1 and x_2 here take about log₂(8 √(2πe)) bits each; all T of bb_ans at least as many."""
    latent = np.log2(8 * np.sqrt(2 * np.pi * np.e))
    for num_timesteps in (10, 100, 1000):
        levels = SCHEDULE.levels(num_timesteps)
        debt = {}
        for name, order in ORDERS.items():
            debt[name] = peak_debt(levels, order, grid_spacing(levels, order, 8.0))
        assert 2 * latent - 1 < debt["bit_swap"] < 2 * latent + 6
        assert debt["bb_ans"] >= num_timesteps * latent * (1 - 1e-9)


def test_a_grid_too_fine_for_float32_is_refused():
    levels = linear_log_snr(30.0, -5.0).levels(10)
    with pytest.raises(ValueError, match=r"the grid of level 1 has a spacing of .* use fewer"):
        grid_spacing(levels, ORDERS["bit_swap"], 8.0)
