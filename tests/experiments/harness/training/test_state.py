"""The state before the first step."""

import jax

from experiments.harness import seeds
from experiments.harness.setup.params import init_params
from experiments.harness.training.state import first_state, init_state, make_setup
from tests.experiments import tiny


def test_the_first_state_is_that_of_the_initial_parameters():
    """Bit for bit, though its program is compiled without optimisation on a CPU."""
    setup = make_setup(tiny.config("unet"))

    def initial(root):
        return init_state(init_params(setup.definition, root), setup.optimizer)

    root, options = seeds.root(setup.config.seed), {"xla_backend_optimization_level": 3}
    expected = jax.jit(initial, compiler_options=options)(root)
    tiny.assert_bit_equal(first_state(setup), expected)
