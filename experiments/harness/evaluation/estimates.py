"""What else an evaluation can say of a model: its bound as T → ∞, the K-sample bound, the ODE's.

Each takes (config, definition, params, dataset) and returns numbers for evaluation.json, with both
standard errors and the network evaluations that they took.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion.statistics.standard_errors import bits_per_dim, estimate
from diffusion.trajectory import k_sample_bound
from experiments.harness import devices
from experiments.harness.data import splits
from experiments.harness.data.batches import over_examples
from experiments.harness.evaluation import programs
from experiments.harness.evaluation.allocate import Allocated, Estimator, allocated_bound
from experiments.harness.processes.progress import progress
from experiments.harness.setup.definition import ModelDefinition

DEFAULT_TARGET = 0.002
GROUPS = 2  # of K trajectories, whose difference tells the noise of a K-sample bound
DRAWS = 2  # of an ODE's noise and probes, likewise


def continuous(
    config: ConfigDict, definition: ModelDefinition, params: Any, dataset: splits.Dataset
) -> dict[str, Any]:
    """The bound as T → ∞, evaluations allocated to its Monte-Carlo error."""
    estimator = Estimator(config, definition, params, dataset, continuous=True)
    return allocated_summary(allocate(config, estimator), definition)


def allocate(config: ConfigDict, estimator: Estimator) -> Allocated:
    """To the config's target and budget."""
    settings = config.evaluate
    target = settings.target or DEFAULT_TARGET
    return allocated_bound(estimator, target, settings.max_evaluations, settings.pilot)


def allocated_summary(found: Allocated, definition: ModelDefinition) -> dict[str, Any]:
    """An allocated bound in bits/dim, in its three parts."""
    num_dims = int(np.prod(definition.image_shape))
    return {
        **_summary(found.total, found.noise_variance, num_dims, found.evaluations),
        "prior": float(bits_per_dim(found.prior.mean(), num_dims)),
        "diffusion": float(bits_per_dim(found.diffusion.mean(), num_dims)),
        "reconstruction": float(bits_per_dim(found.reconstruction.mean(), num_dims)),
    }


def k_sample(
    config: ConfigDict, definition: ModelDefinition, params: Any, dataset: splits.Dataset
) -> dict[str, Any]:
    """The importance-weighted bound of K trajectories at its own T, beside that of one."""
    k, num_timesteps = config.evaluate.k_sample.num_samples, config.evaluate.k_sample.num_timesteps
    totals = trajectories(config, definition, params, dataset, num_timesteps, GROUPS * k)
    bounds = k_sample_bounds(totals)
    num_dims = int(np.prod(definition.image_shape))
    one = estimate(totals.mean(axis=0), totals.var(axis=0, ddof=1) / len(totals), num_dims)
    return {
        **_summary(
            bounds.mean(axis=0),
            bounds.var(axis=0, ddof=1) / GROUPS,
            num_dims,
            totals.size * num_timesteps,
        ),
        "num_samples": k,
        "num_timesteps": num_timesteps,
        "one_sample_bits_per_dim": one.mean,
        "one_sample_bits_per_dim_mc_se": one.mc_se,
    }


def k_sample_bounds(totals: np.ndarray) -> np.ndarray:
    """Independent K-sample bounds [group, n], of GROUPS · K trajectories' totals."""
    groups = totals.reshape(GROUPS, -1, totals.shape[1])
    return np.stack([np.asarray(k_sample_bound(group), np.float64) for group in groups])


def trajectories(
    config: ConfigDict,
    definition: ModelDefinition,
    params: Any,
    dataset: splits.Dataset,
    num_timesteps: int,
    num_draws: int,
) -> np.ndarray:
    """Totals of (13.10) along whole trajectories, [draw, n] in float64 nats."""
    mesh = devices.mesh()
    run = programs.make_trajectory(config, definition, mesh)
    params = devices.place(params, devices.replicated(mesh))
    levels, n = definition.schedule.levels(num_timesteps), len(dataset.images)
    num_rows, smallest = num_draws * n, config.evaluate.batch_size
    # Draws and examples side by side: a batch is as large as elsewhere a chunk of timesteps.
    batch_size = min(smallest * config.evaluate.chunk_size, -(-num_rows // smallest) * smallest)

    def totals(row):
        draw, index = row // n, row % n
        return run(params, levels, dataset.examples(index), index, draw)

    cost = num_timesteps
    with progress(num_rows * cost, "trajectories", "eval", unit_scale=True, leave=False) as bar:
        return over_examples(totals, num_rows, batch_size, bar, cost).reshape(num_draws, n)


def ode(
    config: ConfigDict, definition: ModelDefinition, params: Any, dataset: splits.Dataset
) -> dict[str, Any]:
    """The probability-flow ODE's bound on the grey levels, from two draws of noise and probes."""
    mesh, n = devices.mesh(), len(dataset.images)
    run = programs.make_ode(config, definition, mesh)
    params = devices.place(params, devices.replicated(mesh))
    draws = []
    with progress(DRAWS * n, "ode", "solve", leave=False) as bar:
        for draw in range(DRAWS):

            def solve(index, draw=draw):
                examples, of_rows = dataset.examples(index), np.full(len(index), draw)
                return run(params, definition.levels, examples, index, of_rows)

            draws.append(over_examples(solve, n, config.evaluate.batch_size, bar))
    bound = jax.tree.map(lambda *arrays: np.concatenate(arrays), *draws)
    num_dims = int(np.prod(definition.image_shape))
    total, solver_error = bound.total.reshape(DRAWS, n), bound.ode.solver_error.mean()
    trace_se = np.sqrt((bound.ode.trace_se**2).sum()) / (DRAWS * n)
    return {
        **_summary(
            total.mean(axis=0),
            total.var(axis=0, ddof=1) / DRAWS,
            num_dims,
            int(bound.ode.evaluations.sum()),
        ),
        "trace_se": float(bits_per_dim(trace_se, num_dims)),
        "mean_solver_error": float(bits_per_dim(solver_error, num_dims)),
        "failed_solves": int(np.isnan(total).sum()),
        "log_density": float(bits_per_dim(bound.ode.log_prob.mean(), num_dims)),
        "entropy": float(bits_per_dim(bound.entropy.mean(), num_dims)),
        "scaling": float(bits_per_dim(bound.scaling.mean(), num_dims)),
        "reconstruction": float(bits_per_dim(bound.reconstruction.mean(), num_dims)),
        "dequantization": config.evaluate.ode.dequantization,
    }


def _summary(
    nats: np.ndarray, noise_variances: np.ndarray, num_dims: int, evaluations: int
) -> dict[str, Any]:
    found = estimate(nats, noise_variances, num_dims)
    return {
        "bits_per_dim": found.mean,
        "bits_per_dim_se": found.se,
        "bits_per_dim_mc_se": found.mc_se,
        "network_evaluations": evaluations,
    }


ESTIMATES: dict[str, Callable[..., dict[str, Any]]] = {
    "continuous": continuous,
    "k_sample": k_sample,
    "ode": ode,
}
