"""Eight equally likely vectors and their optimal denoiser: the length approaches log₂ 8 bits."""

import jax
import numpy as np
import pytest

from diffusion import decoders, reverse, schedules
from diffusion.bound import bound
from diffusion.coding import ORDERS, make_code
from diffusion.exact.distributions import points
from diffusion.forward import example_noise
from diffusion.model import DiffusionModel
from experiments.harness.compression.ledger import Ledger
from experiments.harness.compression.stack import Stack

pytest.importorskip("constriction")

GREY = decoders.Quantization(17)
VECTORS = np.random.default_rng(0).integers(0, 17, (8, 4))
DATA = points(np.asarray(GREY.to_data(VECTORS)))
BATCHES = np.random.default_rng(1).permutation(np.arange(2048) % 8).reshape(2, 1024)


def lengths(num_timesteps, order):
    """Bits an example: of the stream, and the bound's mean; with the error of their difference."""
    p = reverse.Reverse(DATA.denoiser, "x_0", "beta_tilde")
    levels = schedules.linear_log_snr(10.0, -10.0).levels(num_timesteps)
    model = DiffusionModel(p, decoders.categorical(GREY), levels)
    code, stack = make_code(model, GREY, order), Stack(0)
    ledger = Ledger(stack)
    for batch in BATCHES:
        ledger.start(len(batch))
        ORDERS[order].push(ledger, code, VECTORS[batch])
    words = stack.words()
    decoder = Stack(0, words, stack.num_initial)
    for batch in BATCHES[::-1]:
        decoded = ORDERS[order].pop(decoder, code, VECTORS[batch].shape)
        np.testing.assert_array_equal(decoded, VECTORS[batch])
    assert decoder.holds_initial()
    number = np.arange(BATCHES.size)
    x_0 = GREY.to_data(VECTORS[BATCHES.ravel()])
    noise = example_noise(jax.random.key(2), number, (4,))
    total = jax.jit(lambda x_0: bound(model, x_0, noise, 10).total)(x_0)
    excess = (ledger.density - np.asarray(total)) / np.log(2)
    net = 32 * (len(words) - stack.num_initial) / BATCHES.size
    return net, float(np.mean(total)) / np.log(2), excess.std() / np.sqrt(len(excess))


@pytest.mark.parametrize("order", ORDERS)
def test_the_length_approaches_log_2_k_from_above(order):
    gaps = []
    for num_timesteps in (10, 40, 160):
        net, bound, error = lengths(num_timesteps, order)
        assert abs(net - bound) < 4 * error + 0.002 * bound
        gaps.append(net - 3)
    assert gaps[0] > 4 * gaps[1] > 0
    assert -4 * error < gaps[2] < 0.15 + 4 * error
