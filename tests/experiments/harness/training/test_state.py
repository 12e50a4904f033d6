"""The state before the first step."""

import jax

from experiments.harness import seeds
from experiments.harness.setup.params import init_params
from experiments.harness.training.state import first_state, init_state, make_setup
from tests.experiments import tiny


def test_the_first_state_is_that_of_the_initial_parameters():
    """Bit for bit, though its program is compiled in a hurry."""
    setup = make_setup(tiny.config("unet"))

    def initial(root):
        return init_state(init_params(setup.definition, root), setup.optimizer)

    expected = jax.jit(initial)(seeds.root(setup.config.seed))
    tiny.assert_bit_equal(first_state(setup), expected)
