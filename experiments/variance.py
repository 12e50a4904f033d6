"""What each estimator of one bound costs: its variance, and the evaluations for a given error.

On a Gaussian whose bound is known in closed form, and on what a work directory holds.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion.exact.distributions import NormalData
from diffusion.schedules import linear_log_snr
from diffusion.statistics.control import GaussianControl
from diffusion.statistics.standard_errors import bits_per_dim
from diffusion.timesteps import Proposal
from diffusion.variances import beta_tilde
from experiments.harness import checks, devices
from experiments.harness.data import splits
from experiments.harness.data.batches import over_examples
from experiments.harness.evaluation import estimates, programs
from experiments.harness.evaluation.allocate import Estimator, allocated_bound, fit_control
from experiments.harness.pictures import plots
from experiments.harness.seeds import stream
from experiments.harness.setup import trained
from experiments.harness.setup.definition import ModelDefinition, define_model
from experiments.harness.setup.trained import Run
from experiments.harness.workdir.files import write_json

GOAL = 0.001  # bits/dim: the error whose cost is told


class Row(NamedTuple):
    """One estimator of a bound on one set of examples, in bits/dim.

    Attributes:
      estimator: its name.
      target: what its mean is: the bound at T, at infinity, or of K samples.
      mean: over examples and draws.
      se: of the mean, over times and noise with the examples fixed.
      variance: of one example's estimate, given the example.
      evaluations: of the network, for that one estimate.
      needed: evaluations for an error of `GOAL`.
    """

    estimator: str
    target: str
    mean: float
    se: float
    variance: float
    evaluations: int
    needed: float


class Subject(NamedTuple):
    """A model and the examples that its bound is estimated on.

    Attributes:
      name: for people.
      definition: the mathematics; its schedule, if learned, the learned one.
      straight: the same with a straight line for a schedule that is learned, between the ends
        that it started from; None where the schedule is not learned.
      params: the networks' parameters.
      dataset: the examples.
      control: the control variate of the data.
      truth: −log p of the examples in bits/dim, where it is known.
    """

    name: str
    definition: ModelDefinition
    straight: ModelDefinition | None
    params: Any
    dataset: splits.Dataset
    control: GaussianControl
    truth: float | None


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Measures every estimator on both subjects; prints and writes the tables and the plot."""
    tables = variance(config, workdir)
    print("\n\n".join(to_markdown(name, rows) for name, rows in tables.items()))


def variance(config: ConfigDict, workdir: epath.PathLike) -> dict[str, list[Row]]:
    """The rows of each subject. Writes variance.json, variance.md and variance.png.

    Raises:
      ConfigError: for a setting or a checkpoint that does not fit.
    """
    check(config)
    run = trained.load(config, workdir, config.variance.checkpoint)
    tables = {}
    for subject in (gaussian(config), of_run(run)):
        tqdm.write(f"{subject.name}: {len(subject.dataset.images)} examples")
        tables[subject.name] = measure_all(config, subject)
    directory = epath.Path(workdir)
    text = "\n\n".join(to_markdown(name, rows) for name, rows in tables.items()) + "\n"
    (directory / "variance.md").write_text(text)
    plots.plot_costs(
        directory / "variance.png",
        {name: {row.estimator: row.needed for row in rows} for name, rows in tables.items()},
        goal=GOAL,
    )
    write_json(
        directory / "variance.json",
        {name: [row._asdict() for row in rows] for name, rows in tables.items()},
    )
    return tables


def check(config: ConfigDict) -> None:
    """Raises ConfigError for settings or data that this experiment can't use; compiles nothing."""
    checks.check(config, "variance")
    define_model(config)
    splits.check_split(config, config.variance.split)
    devices.check_batch("config.evaluate.batch_size", config.evaluate.batch_size)


def of_run(run: Run) -> Subject:
    """The work directory's model on the first examples of a split."""
    config, definition = run.config, run.definition
    split, n = config.variance.split, config.variance.examples
    dataset = splits.load_measured(config, split, splits.first(n))
    name = f"{config.data.name}, {split}, step {run.step}, T = {definition.levels.num_timesteps}"
    name += "" if dataset.labels is None else ", given labels"
    control = fit_control(config, definition)
    straight = None if definition.noise_schedule is None else define_model(config)
    return Subject(name, definition, straight, run.params, dataset, control, None)


class _ClosedForm:
    """Stands where a network does: E[x_0 | x_t] of a distribution."""

    def __init__(self, distribution: NormalData):
        self.denoiser = distribution.denoiser

    def apply(self, variables, x_t, log_snr, condition=None, **settings):
        del variables, settings
        return self.denoiser(x_t, log_snr, condition)


class _Continuous:
    """Stands where a quantisation does: the data are what they are."""

    spacing = 0.0

    def to_data(self, x):
        return x


def gaussian(config: ConfigDict) -> Subject:
    """x ~ N(0, diag(4, 1, ¼, 1/100)) with its optimal denoiser and its true p(x_0 | x_1)."""
    variances, n = np.array([4.0, 1.0, 0.25, 0.01]), config.variance.examples
    distribution = NormalData(np.zeros(4, np.float32), np.diag(variances).astype(np.float32))
    schedule = linear_log_snr(10.0, -10.0)
    definition = ModelDefinition(
        schedule=schedule,
        levels=schedule.levels(config.variance.num_timesteps),
        noise_schedule=None,
        network=_ClosedForm(distribution),
        parameterization="x_0",
        variance=beta_tilde(),
        quantization=_Continuous(),
        decoder=distribution.decoder(),
        image_shape=(4,),
    )
    x_0 = np.asarray(distribution.sample(stream(config.seed, "estimate"), n))
    truth = -np.asarray(distribution.log_prob(x_0), np.float64).mean()
    control = GaussianControl.fit(np.asarray(distribution.sample(jax.random.key(0), 500)), 1e-3)
    name = f"Gaussian, d = 4, T = {config.variance.num_timesteps}"
    truth = float(bits_per_dim(truth, 4))
    dataset = splits.Dataset(x_0, None, 0, name, "")
    return Subject(name, definition, None, {"network": {}}, dataset, control, truth)


def measure_all(config: ConfigDict, subject: Subject) -> list[Row]:
    """Every estimator on one subject."""
    at_t = Draws(config, subject, subject.definition, continuous=False)
    at_infinity = Draws(config, subject, subject.definition, continuous=True)
    rows = [
        *of_trajectories(config, subject),
        one_log_ratio(config, subject, at_t),
        at_t.full_sum(),
        *at_t.few_timesteps(),
        *at_infinity.few_timesteps(),
    ]
    if subject.straight is not None:
        on_line = Draws(config, subject, subject.straight, continuous=True)
        on_line.prefix += "straight line, "
        rows += on_line.one_timestep()
    if subject.truth is not None:
        rows.append(Row("closed form", "−log p", subject.truth, 0.0, 0.0, 0, 0))
    return rows


def of_trajectories(config: ConfigDict, subject: Subject) -> list[Row]:
    """(13.10) along whole trajectories, one at a time and K at a time."""
    k, num_timesteps = config.variance.num_samples, subject.definition.levels.num_timesteps
    totals = estimates.trajectories(
        config,
        subject.definition,
        subject.params,
        subject.dataset,
        num_timesteps,
        estimates.GROUPS * k,
    )
    bounds = estimates.k_sample_bounds(totals)
    return [
        _row(subject, "(13.10), whole trajectory", "T", totals, num_timesteps),
        _row(subject, f"{k} trajectories", f"{k} samples", bounds, k * num_timesteps),
    ]


class Draws:
    """Estimators of one subject's bound at T, or at infinity, from draws of its integrand."""

    def __init__(
        self, config: ConfigDict, subject: Subject, definition: ModelDefinition, continuous: bool
    ):
        self.config, self.subject = config, subject
        self.target, self.prefix = ("∞", "T → ∞: ") if continuous else ("T", "")
        self.estimator = Estimator(
            config, definition, subject.params, subject.dataset, continuous, subject.control
        )
        self.shape = (len(subject.dataset.images), config.variance.draws)
        self.rng = np.random.default_rng([config.seed, continuous])
        prior, reconstruction = self.estimator.ends(63, config.variance.draws)
        self.ends = prior + reconstruction.mean(axis=1)
        self.ends_variance = reconstruction.var(axis=1, ddof=1).mean()

    def full_sum(self) -> Row:
        """(13.26) with every t, twice."""
        num_terms = self.subject.definition.levels.num_timesteps - 1
        time = np.broadcast_to((np.arange(num_terms) + 0.5) / num_terms, (self.shape[0], num_terms))
        totals = np.stack(
            [self.estimator.rates(time, draw).value.mean(axis=1) for draw in (50, 51)]
        )
        return self.row("(13.26), full sum", totals, num_terms + 1)

    def few_timesteps(self) -> list[Row]:
        """One timestep per example, drawn in different ways; and allocated ones."""
        return self.one_timestep() + [self.allocated(control) for control in (False, True)]

    def one_timestep(self) -> list[Row]:
        """One timestep per example: uniform, stratified across them, and by importance."""
        uniform = self.rng.random(self.shape)
        values = self.estimator.rates(uniform, 60).value
        rms = Proposal(np.ones(32)).bin(uniform)
        second = np.bincount(rms.ravel(), values.ravel() ** 2, 32)
        count = np.bincount(rms.ravel(), minlength=32)
        proposal = Proposal.allocate(np.sqrt(second / np.maximum(count, 1)), uniform_share=0.01)
        ways = (("stratified", Proposal(np.ones(32)), 61), ("importance, stratified", proposal, 62))
        rows = [self.row("one t, uniform", values.T, 1)]
        return rows + [self.across_batch(f"one t, {name}", p, draw) for name, p, draw in ways]

    def across_batch(self, name: str, proposal: Proposal, draw: int) -> Row:
        """One time per example, one to a stratum across all the examples, by a common shift."""
        n, draws = self.shape
        order = self.rng.permuted(np.tile(np.arange(n), (draws, 1)), axis=1).T
        time = proposal.time(np.mod(order / n + self.rng.random(draws), 1.0))
        values = self.estimator.rates(time, draw).value / proposal.density_at(time)
        # The examples depend on one another within a batch, and batches do not.
        variance = n * values.mean(axis=0).var(ddof=1) + self.ends_variance
        mean = (values.mean(axis=1) + self.ends).mean()
        name = self.prefix + name
        return _summary(self.subject, name, self.target, mean, variance, 1, n * draws)

    def allocated(self, use_control: bool) -> Row:
        """Several strata for each example, evaluations where the noise is; the pilot counted."""
        found = allocated_bound(
            self.estimator, 2 * GOAL, 0, self.config.evaluate.pilot, use_control
        )
        n, evaluations = len(found.prior), found.evaluations
        # Per evaluation, so that the rows compare.
        variance = found.noise_variance.mean() * evaluations / n
        name = self.prefix + ("allocated, control variate" if use_control else "allocated")
        return _summary(
            self.subject, name, self.target, found.total.mean(), variance, 1, evaluations
        )

    def row(self, name: str, diffusion: np.ndarray, evaluations: int) -> Row:
        """From independent draws of the diffusion term, [draw, n]; the ends' noise is added."""
        name = self.prefix + name
        return _row(self.subject, name, self.target, diffusion + self.ends, evaluations, self)


def one_log_ratio(config: ConfigDict, subject: Subject, draws: Draws) -> Row:
    """(13.10) at one uniform t: T − 1 times its log-ratio; the ends are those of (13.26)."""
    mesh = devices.mesh()
    run = programs.make_log_ratios(config, subject.definition, mesh)
    n, num_draws = draws.shape
    time = draws.rng.random(draws.shape)
    slot = np.broadcast_to(np.arange(num_draws), time.shape)

    def log_ratios(index):
        points = programs.Points.at(subject.definition, time[index], slot[index], continuous=False)
        examples, draw = subject.dataset.examples(index), np.full(len(index), 70)
        return run(draws.estimator.params, examples, index, points, draw)

    values = over_examples(log_ratios, n, config.evaluate.batch_size)
    # With the means of what telescopes, so that the two ends are those of (13.26).
    return draws.row("(13.10), one t, uniform", (values + _telescoped(subject)[:, None]).T, 1)


def _telescoped(subject: Subject) -> np.ndarray:
    """E[log q(x_1 | x_0) − log q(x_T | x_0)] of each example, in nats: what the steps sum to less.

    Both are Gaussians of dimension d, so it is d/2 log(σ_T²/σ_1²) for all.
    """
    sigma2 = subject.definition.levels.sigma2
    num_dims = np.prod(subject.definition.image_shape)
    return np.full(len(subject.dataset.images), 0.5 * num_dims * np.log(sigma2[-1] / sigma2[1]))


def _row(
    subject: Subject,
    name: str,
    target: str,
    totals: np.ndarray,
    evaluations: int,
    draws: Draws | None = None,
) -> Row:
    """From independent draws of the bound, [draw, n] in nats."""
    variance = totals.var(axis=0, ddof=1).mean() + (draws.ends_variance if draws else 0.0)
    return _summary(subject, name, target, totals.mean(), variance, evaluations, totals.size)


def _summary(
    subject: Subject,
    name: str,
    target: str,
    mean: float,
    variance: float,
    evaluations: int,
    num_estimates: int,
) -> Row:
    """A row from the mean and the variance of one estimate in nats, of which so many were made."""
    num_dims = int(np.prod(subject.definition.image_shape))
    one = bits_per_dim(1.0, num_dims)
    variance = float(variance * one**2)
    return Row(
        name,
        target,
        float(mean * one),
        float(np.sqrt(variance / num_estimates)),
        variance,
        evaluations,
        variance * evaluations / GOAL**2,
    )


def to_markdown(name: str, rows: list[Row]) -> str:
    """A table for people."""
    lines = [
        f"**{name}**",
        "",
        "| estimator | of the bound at | bits/dim | variance per example | evaluations | "
        f"for ± {GOAL} |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        numbers = (
            f"{row.mean:.4f} ± {row.se:.4f} | {row.variance:.3g} | {row.evaluations:,} | "
            f"{_rounded(row.needed):,}"
            if row.evaluations
            else f"{row.mean:.4f} | | |"
        )
        lines.append(f"| {row.estimator} | {row.target} | {numbers} |")
    return "\n".join(lines)


def _rounded(number: float) -> int:
    """To two digits."""
    digits = max(int(np.floor(np.log10(max(number, 1)))) - 1, 0)
    return int(round(number, -digits))
