"""Analytic-DPM's Σ_θ: computed from the mean squared error of ε̂ at each noise level.

The error is measured on the training split; nothing is trained. Bao et al. (2022), "Analytic-DPM".
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from diffusion.forward import example_noise
from diffusion.variances import VARIANCES, Variance, from_measured_error
from experiments.harness import devices, seeds
from experiments.harness.data import order, splits
from experiments.harness.processes.progress import progress
from experiments.harness.processes.shared_programs import share
from experiments.harness.setup.definition import ModelDefinition
from experiments.harness.workdir import dependences

ANALYTIC = ("analytic_isotropic", "analytic_diagonal")
ERRORS_FILE = dependences.MEASURED_ERRORS
_DRAW = 2**30  # keeps these noises apart from all others of their stream


def available_variances(config: ConfigDict) -> list[str]:
    """Names of the Σ_θ that a network can have: fixed, analytic, or its own learned one."""
    own = config.model.variance
    names = [name for name in VARIANCES if name == own or not VARIANCES[name]().is_learned]
    return [*names, *ANALYTIC]


def variance_of_errors(
    name: str, log_snr: Float[np.ndarray, "L"], error: Float[np.ndarray, "L *d"]
) -> Variance:
    """The Σ_θ of this name, one of ANALYTIC, from measured errors.

    The isotropic one has a single value at each level, the diagonal one a value per coordinate.
    """
    if name == "analytic_isotropic":
        error = error.mean(axis=tuple(range(1, error.ndim)))
    # A pixel that is the same in every image has error zero, and that has no logarithm.
    return from_measured_error(log_snr, np.maximum(error, np.finfo(np.float32).tiny))


def measure_errors(
    config: ConfigDict, definition: ModelDefinition, params: Any
) -> tuple[Float[np.ndarray, "L"], Float[np.ndarray, "L *d"]]:
    """E[(ε − ε̂)²] of every coordinate over training data, at levels across the schedule.

    Uses `analytic.examples` training examples, each once, with their labels where
    `evaluate.labels` gives a network labels. The noise is a function of (seed, example, level).

    Args:
      config: the config; `analytic` has the number of levels and of examples.
      definition: the model, a learned schedule tabulated.
      params: the networks' parameters.

    Returns:
      The log-SNRs of the levels, falling, and the errors there, both float64.
    """
    # A schedule of a single level has no others.
    num_levels = config.analytic.levels if len(definition.schedule.knots) > 1 else 1
    log_snr = definition.schedule.levels(num_levels).log_snr[1:]
    dataset = splits.load_measured(config, "train", splits.some(config.analytic.examples))
    mesh, n = devices.mesh(), len(dataset.images)
    squared_errors = _make_squared_errors(config, definition, mesh)
    fixed = devices.place((params, seeds.root(config.seed)), devices.replicated(mesh))
    total = np.zeros((num_levels, *definition.image_shape))
    with progress(n * num_levels, "measure Σ", "eval", unit_scale=True, leave=False) as bar:
        for index, mask in order.padded_batches(n, config.evaluate.batch_size):
            examples = dataset.examples(index)
            with jax.default_matmul_precision("highest"):
                sums = squared_errors(
                    *fixed, np.float32(log_snr), examples, index, np.float32(mask)
                )
            total += np.asarray(sums, np.float64)
            bar.update(int(mask.sum()) * num_levels)
    return log_snr, total / n


def _make_squared_errors(
    config: ConfigDict, definition: ModelDefinition, mesh: Mesh
) -> Callable[..., Float[Array, "L *d"]]:
    """(params, root, log_snr [L], examples, index, mask) -> Σ (ε − ε̂)² over unmasked examples."""

    def squared_errors(params, root, log_snr, examples, index, mask):
        x_0 = definition.to_data(examples.images)
        stream = seeds.stream(root, "estimate")
        noise = example_noise(stream, index, definition.image_shape, _DRAW)
        reverse = definition.model(params, examples.labels).reverse
        ones = jnp.ones_like(index)

        def at(level):
            eps, log_snr_here = noise(level * ones), jnp.broadcast_to(log_snr[level], mask.shape)
            error = reverse.squared_eps_error(x_0, eps, log_snr_here)
            return jnp.tensordot(mask, error, 1)

        # Filled up to whole chunks, so that the network is compiled for one shape.
        chunk_size = min(config.evaluate.chunk_size, len(log_snr))
        filled = jnp.minimum(
            jnp.arange(-(-len(log_snr) // chunk_size) * chunk_size), len(log_snr) - 1
        )
        return jax.lax.map(at, filled, batch_size=chunk_size)[: len(log_snr)]

    everywhere, split = devices.replicated(mesh), devices.split_batch(mesh)
    shardings = (everywhere, everywhere, everywhere, split, split, split)
    return share(jax.jit(squared_errors, in_shardings=shardings, out_shardings=everywhere))
