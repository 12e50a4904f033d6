"""Which Σ_θ a trained network is measured or sampled with; one of them from its measured errors.

Analytic-DPM's Σ needs the mean squared error of the network's ε̂ at each noise level, and no
training. It is measured on the training split, once for a checkpoint, and kept in the work
directory. Bao et al. (2022), "Analytic-DPM".
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from diffusion.forward import example_noise
from diffusion.variances import VARIANCES, of_measured_error
from experiments.harness import checks, devices
from experiments.harness.data import order, splits
from experiments.harness.data.splits import Examples
from experiments.harness.errors import ConfigError
from experiments.harness.processes.progress import progress
from experiments.harness.seeds import stream
from experiments.harness.setup.definition import ModelDefinition
from experiments.harness.workdir import provenance
from experiments.harness.workdir.files import write_npz

ANALYTIC = ("analytic_isotropic", "analytic_diagonal")
SIGMAS = (*VARIANCES, *ANALYTIC)
ERRORS_FILE = provenance.MEASURED_ERRORS
_DRAW = 2**30  # sets these noises apart from all others of their stream


def check(config: ConfigDict, name: str, setting: str) -> None:
    """Raises ConfigError unless the network has the Σ_θ of this name; compiles nothing.

    Args:
      config: the config.
      name: one of SIGMAS, or empty for the model's own.
      setting: where the name was given, for the message.
    """
    checks.pick(("", *SIGMAS), name, setting)
    own = config.model.variance
    if name in VARIANCES and VARIANCES[name]().is_learned and name != own:
        fixed = [n for n in SIGMAS if n in ANALYTIC or not VARIANCES[n]().is_learned]
        raise ConfigError(
            f"{setting} = {name!r} is for a network that was trained with it, and this one's "
            f"config.model.variance is {own!r}; use {', '.join(dict.fromkeys([*fixed, own]))}"
        )
    checks.check_positive(config, "analytic.examples")
    remedy = "it must be at least 2"
    checks.check_setting(config, "analytic.levels", lambda n: n >= 2, remedy)


def choose(
    config: ConfigDict,
    name: str,
    setting: str,
    definition: ModelDefinition,
    params: Any,
    step: int,
    workdir: epath.PathLike,
) -> ModelDefinition:
    """The definition with the Σ_θ of this name.

    Args:
      config: the config.
      name: one of SIGMAS, or empty for the model's own.
      setting: where the name was given, for error messages.
      definition: the mathematics; its schedule, if learned, the learned one.
      params: the networks' parameters.
      step: the step that they are of.
      workdir: keeps the measured errors of an analytic Σ_θ; must be writable for that.

    Raises:
      ConfigError: for an unknown name, or for a learned Σ_θ that the network does not have.
    """
    check(config, name, setting)
    if not name:
        return definition
    if name in VARIANCES:
        return definition._replace(variance=VARIANCES[name]())
    log_snr, error = measured_errors(config, definition, params, step, workdir)
    if name == "analytic_isotropic":
        error = error.mean(axis=tuple(range(1, error.ndim)))
    # An error of zero, at a pixel that is the same in every image, has no logarithm.
    error = np.maximum(error, np.finfo(np.float32).tiny)
    return definition._replace(variance=of_measured_error(log_snr, error))


def measured_errors(
    config: ConfigDict, definition: ModelDefinition, params: Any, step: int, workdir: epath.PathLike
) -> tuple[Float[np.ndarray, "L"], Float[np.ndarray, "L *d"]]:
    """E[(ε − ε̂)²] of every coordinate over the training split, at levels over the schedule.

    Of the first `analytic.examples` examples, each once, with its label where `evaluate.labels`
    gives a network labels, and with noise that is a function of
    (seed, example, level). Kept in eps_errors.npz, and measured anew where that is of something
    else.

    Args:
      config: the config; `analytic` says at how many levels, and on how many examples.
      definition: the mathematics; its schedule, if learned, the learned one.
      params: the networks' parameters.
      step: the step that they are of.
      workdir: where the errors are kept.

    Returns:
      The log-SNRs of the levels, falling, and the errors there, both float64.
    """
    path = epath.Path(workdir) / ERRORS_FILE
    identity = provenance.identity(ERRORS_FILE, config, step)
    if path.exists():
        with path.open("rb") as file, np.load(file) as saved:
            if provenance.is_same(json.loads(str(saved["identity"])), identity):
                return saved["log_snr"], saved["error"]
    log_snr, error = _measure(config, definition, params)
    write_npz(path, log_snr=log_snr, error=error, step=step, identity=json.dumps(identity))
    return log_snr, error


def _measure(
    config: ConfigDict, definition: ModelDefinition, params: Any
) -> tuple[Float[np.ndarray, "L"], Float[np.ndarray, "L *d"]]:
    # A schedule of a single level has no others.
    num_levels = config.analytic.levels if len(definition.schedule.knots) > 1 else 1
    log_snr = definition.schedule.levels(num_levels).log_snr[1:]
    dataset = splits.load_measured(config, "train", splits.some(config.analytic.examples))
    mesh, n = devices.mesh(), len(dataset.images)
    squared_errors = _make_squared_errors(config, definition, mesh)
    params = devices.place(params, devices.replicated(mesh))
    total = np.zeros((num_levels, *definition.image_shape))
    at = np.float32(log_snr)
    with progress(n * num_levels, "measure Σ", "eval", unit_scale=True, leave=False) as bar:
        for index, mask in order.padded_batches(n, config.evaluate.batch_size):
            with jax.default_matmul_precision("highest"):
                summed = squared_errors(
                    params, at, dataset.examples(index), index, np.float32(mask)
                )
            total += np.asarray(summed, np.float64)
            bar.update(int(mask.sum()) * num_levels)
    return log_snr, total / n


def _make_squared_errors(
    config: ConfigDict, definition: ModelDefinition, mesh: Mesh
) -> Callable[[Any, Array, Examples, Int[Array, "b"], Float[Array, "b"]], Float[Array, "L *d"]]:
    """(params, log_snr [L], examples, index, mask) -> Σ (ε − ε̂)² over the unmasked examples."""
    root = stream(config.seed, "estimate")

    def squared_errors(params, log_snr, examples, index, mask):
        x_0 = definition.quantization.to_data(examples.images)
        noise = example_noise(root, index, definition.image_shape, _DRAW)
        reverse = definition.reverse(params, labels=examples.labels)
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
    shardings = (everywhere, everywhere, split, split, split)
    return jax.jit(squared_errors, in_shardings=shardings, out_shardings=everywhere)
