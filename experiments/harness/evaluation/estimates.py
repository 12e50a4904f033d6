"""Further estimates of an evaluation: the bound as T → ∞, the K-sample bound, the ODE's bound.

Each takes (config, subject) and returns numbers for evaluation.json, with both standard errors and
the number of network evaluations.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from diffusion.statistics.standard_errors import bits_per_dim, estimate
from diffusion.trajectory import k_sample_bound
from experiments.harness.evaluation import programs
from experiments.harness.evaluation.allocate import (
    Allocated,
    Estimator,
    allocated_bound,
    fit_controls,
)
from experiments.harness.evaluation.subject import Subject
from experiments.harness.processes.progress import progress

DEFAULT_TARGET = 0.002
GROUPS = 2  # of K trajectories; their difference gives the noise of a K-sample bound
DRAWS = 2  # of the ODE's noise and probes; their difference gives its noise


def continuous(config: ConfigDict, subject: Subject) -> dict[str, Any]:
    """The bound as T → ∞, with evaluations allocated to its Monte-Carlo error."""
    return allocated_summary(allocate(config, subject, continuous=True), subject.num_dims)


def allocate(config: ConfigDict, subject: Subject, continuous: bool = False) -> Allocated:
    """The bound at T, or as T → ∞, to the target and within the budget of the config."""
    settings = config.evaluate
    estimator = Estimator(subject, fit_controls(config, subject), continuous)
    target = settings.target or DEFAULT_TARGET
    return allocated_bound(estimator, target, settings.max_evaluations, settings.pilot)


def allocated_summary(allocated: Allocated, num_dims: int) -> dict[str, Any]:
    """An allocated bound in bits/dim, with its three parts."""

    def mean(nats):
        return float(bits_per_dim(nats.mean(), num_dims))

    return {
        **_summary(allocated.total, allocated.noise_variance, num_dims, allocated.evaluations),
        "prior": mean(allocated.prior),
        "diffusion": mean(allocated.diffusion),
        "reconstruction": mean(allocated.reconstruction),
    }


def k_sample(config: ConfigDict, subject: Subject) -> dict[str, Any]:
    """The importance-weighted bound of K trajectories at its own T, and that of one trajectory."""
    k, num_timesteps = config.evaluate.k_sample.num_samples, config.evaluate.k_sample.num_timesteps
    subject = subject._replace(levels=subject.schedule.levels(num_timesteps))
    totals = trajectories(subject, GROUPS * k)
    bounds = k_sample_bounds(totals)
    num_dims, evaluations = subject.num_dims, totals.size * num_timesteps
    one = estimate(totals.mean(axis=0), totals.var(axis=0, ddof=1) / len(totals), num_dims)
    noise_variance = bounds.var(axis=0, ddof=1) / GROUPS
    return {
        **_summary(bounds.mean(axis=0), noise_variance, num_dims, evaluations),
        "num_samples": k,
        "num_timesteps": num_timesteps,
        "one_sample_bits_per_dim": one.mean,
        "one_sample_bits_per_dim_mc_se": one.mc_se,
    }


def k_sample_bounds(totals: Float[np.ndarray, "draws n"]) -> Float[np.ndarray, "groups n"]:
    """Independent K-sample bounds from the totals of GROUPS · K trajectories."""
    groups = totals.reshape(GROUPS, -1, totals.shape[1])
    return np.stack([np.asarray(k_sample_bound(group), np.float64) for group in groups])


def trajectories(subject: Subject, num_draws: int) -> Float[np.ndarray, "draws n"]:
    """Totals of (13.10) along whole trajectories, in float64 nats."""
    run, cost = programs.make_trajectory(subject), subject.levels.num_timesteps
    total = subject.num_examples * num_draws * cost
    with progress(total, "trajectories", "eval", unit_scale=True, leave=False) as bar:
        return subject.over_draws(lambda *row: run(subject, *row), num_draws, bar, cost).T


def ode(config: ConfigDict, subject: Subject) -> dict[str, Any]:
    """The bound of the probability-flow ODE, from two draws of noise and probes."""
    run, n = programs.make_ode(subject, config.evaluate.ode), subject.num_examples

    def solve(draw):
        return lambda index: run(subject, index, np.full(len(index), draw))

    with progress(DRAWS * n, "ode", "solve", leave=False) as bar:
        draws = [subject.over_examples(solve(draw), bar) for draw in range(DRAWS)]
    bound = jax.tree.map(lambda *arrays: np.concatenate(arrays), *draws)
    num_dims, total = subject.num_dims, bound.total.reshape(DRAWS, n)
    trace_se = np.sqrt((bound.ode.trace_se**2).sum()) / (DRAWS * n)

    def bits(nats):
        return float(bits_per_dim(nats, num_dims))

    noise_variance, evaluations = total.var(axis=0, ddof=1) / DRAWS, bound.ode.evaluations.sum()
    return {
        **_summary(total.mean(axis=0), noise_variance, num_dims, int(evaluations)),
        "trace_se": bits(trace_se),
        "mean_solver_error": bits(bound.ode.solver_error.mean()),
        "failed_solves": int(np.isnan(total).sum()),
        "log_density": bits(bound.ode.log_prob.mean()),
        "entropy": bits(bound.entropy.mean()),
        "scaling": bits(bound.scaling.mean()),
        "reconstruction": bits(bound.reconstruction.mean()),
        "dequantization": config.evaluate.ode.dequantization,
    }


def _summary(
    nats: np.ndarray, noise_variances: np.ndarray, num_dims: int, evaluations: int
) -> dict[str, Any]:
    total = estimate(nats, noise_variances, num_dims)
    return {
        "bits_per_dim": total.mean,
        "bits_per_dim_se": total.se,
        "bits_per_dim_mc_se": total.mc_se,
        "network_evaluations": evaluations,
    }


ESTIMATES: dict[str, Callable[..., dict[str, Any]]] = {
    "continuous": continuous,
    "k_sample": k_sample,
    "ode": ode,
}
