"""The cost of each estimator of the bound: its variance, and the evaluations for a given error.

Measured on a Gaussian whose bound is known in closed form, and on the model of a work directory.
"""

from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Float
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion.exact.distributions import normal
from diffusion.model import DiffusionModel
from diffusion.reverse import Reverse
from diffusion.schedules import linear_log_snr
from diffusion.statistics.control import Control, GaussianControl
from diffusion.statistics.standard_errors import bits_per_dim
from diffusion.timesteps import Proposal
from experiments.harness import checks, devices, memory
from experiments.harness.data import splits
from experiments.harness.evaluation import estimates, programs
from experiments.harness.evaluation.allocate import Estimator, allocated_bound, fit_controls
from experiments.harness.evaluation.subject import Subject, subject_of
from experiments.harness.pictures import plots
from experiments.harness.seeds import stream
from experiments.harness.setup import trained
from experiments.harness.setup.definition import define_model
from experiments.harness.setup.trained import Run
from experiments.harness.workdir import metrics
from experiments.harness.workdir.files import write_json

GOAL = 0.001  # bits/dim: the error whose cost is reported
CONTROLS = ("", ", Gaussian control", ", Gaussian and pixel controls")  # by their number


class Row(NamedTuple):
    """One estimator of a bound, on one set of examples, in bits/dim.

    Attributes:
      estimator: its name.
      target: its expectation: the bound at T, at infinity, or of K samples.
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


class Case(NamedTuple):
    """A model and examples on which the estimators are compared.

    Attributes:
      name: for people.
      subject: the model and the examples.
      straight: the same model with the straight line between the same ends as its schedule; None
        if the schedule is not learned.
      controls: the control variates of the data, as many as `CONTROLS` names or fewer.
      truth: −log p of the examples in bits/dim, if it is known.
    """

    name: str
    subject: Subject
    straight: Subject | None
    controls: tuple[Control, ...]
    truth: float | None


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Measures every estimator in both cases; prints and writes the tables and the plot."""
    tables = variance(config, workdir)
    print("\n\n".join(to_markdown(name, rows) for name, rows in tables.items()))


def variance(config: ConfigDict, workdir: epath.PathLike) -> dict[str, list[Row]]:
    """The rows of each case by its name. Writes variance.json, variance.md and variance.png.

    Raises:
      ConfigError: for a setting or a checkpoint that does not fit.
    """
    check(config)
    run = trained.load(config, workdir, config.variance.checkpoint)
    tables = {}
    for case in (gaussian_case(config), trained_case(run)):
        tqdm.write(f"{case.name}: {case.subject.num_examples} examples")
        tables[case.name] = measure_all(config, case)
    directory = epath.Path(workdir)
    text = "\n\n".join(to_markdown(name, rows) for name, rows in tables.items()) + "\n"
    (directory / "variance.md").write_text(text)
    plots.plot_costs(
        directory / "variance.png",
        {name: {row.estimator: row.needed for row in rows} for name, rows in tables.items()},
        goal=GOAL,
    )
    metrics.show(workdir, run.step, pictures={"variance": directory / "variance.png"})
    write_json(
        directory / "variance.json",
        {name: [row._asdict() for row in rows] for name, rows in tables.items()},
    )
    return tables


def check(config: ConfigDict) -> None:
    """Raises ConfigError for settings or data that this experiment can't use; compiles nothing."""
    checks.check(config, "variance")
    definition = define_model(config)
    memory.check_memory(config, definition.image_shape, "variance")
    splits.check_split(config, config.variance.split)
    devices.check_batch("config.evaluate.batch_size", config.evaluate.batch_size)


def trained_case(run: Run) -> Case:
    """The model of a run, on the first examples of a split."""
    config, split = run.config, run.config.variance.split
    dataset = splits.load_measured(config, split, splits.first(config.variance.examples))
    subject = subject_of(config, run.definition, run.params, dataset)
    straight = None
    if run.definition.noise_schedule is not None:
        straight = subject_of(config, define_model(config), run.params, dataset)
    name = f"{config.data.name}, {split}, step {run.step}, T = {subject.levels.num_timesteps}"
    name += "" if dataset.labels is None else ", given labels"
    return Case(name, subject, straight, fit_controls(config, subject), None)


def gaussian_case(config: ConfigDict) -> Case:
    """x ~ N(0, diag(4, 1, ¼, 1/100)) with its optimal denoiser and its true p(x_0 | x_1)."""
    variances, n = np.array([4.0, 1.0, 0.25, 0.01]), config.variance.examples
    distribution = normal(np.zeros(4, np.float32), np.diag(variances).astype(np.float32))
    schedule = linear_log_snr(10.0, -10.0)
    levels = schedule.levels(config.variance.num_timesteps)
    reverse = Reverse(distribution.denoiser, "x_0", "beta_tilde")
    model = DiffusionModel(reverse, distribution.decoder(), levels)
    name = f"Gaussian, d = 4, T = {levels.num_timesteps}"
    x_0 = np.asarray(distribution.sample(stream(config.seed, "estimate"), n))
    subject = Subject(
        model=lambda params, labels: model,
        params=(),
        schedule=schedule,
        levels=levels,
        dataset=splits.Dataset(x_0, None, 0, name, ""),
        to_data=lambda x_0: x_0,
        spacing=0.0,
        seed=config.seed,
        batch_size=config.evaluate.batch_size,
        chunk_size=config.evaluate.chunk_size,
    )
    control = GaussianControl.fit(np.asarray(distribution.sample(jax.random.key(0), 500)), 1e-3)
    log_prob = np.asarray(distribution.log_prob(x_0), np.float64)
    return Case(name, subject, None, (control,), float(bits_per_dim(-log_prob.mean(), 4)))


def measure_all(config: ConfigDict, case: Case) -> list[Row]:
    """Every estimator on one case."""
    at_t = Draws(config, case.subject, case.controls, continuous=False)
    at_infinity = Draws(config, case.subject, case.controls, continuous=True)
    rows = [
        *trajectory_rows(config, case.subject),
        at_t.one_log_ratio(),
        at_t.full_sum(),
        *at_t.few_timesteps(),
        *at_infinity.few_timesteps(),
    ]
    if case.straight is not None:
        on_line = Draws(config, case.straight, case.controls, continuous=True)
        on_line.prefix += "straight line, "
        rows += on_line.one_timestep()
    if case.truth is not None:
        rows.append(Row("closed form", "−log p", case.truth, 0.0, 0.0, 0, 0))
    return rows


def trajectory_rows(config: ConfigDict, subject: Subject) -> list[Row]:
    """(13.10) along whole trajectories, one at a time and K at a time."""
    k, num_timesteps = config.variance.num_samples, subject.levels.num_timesteps
    totals = estimates.trajectories(subject, estimates.GROUPS * k)
    one = Estimates.from_draws(totals, num_timesteps)
    several = Estimates.from_draws(estimates.k_sample_bounds(totals), k * num_timesteps)
    return [
        one.row("(13.10), whole trajectory", "T", subject.num_dims),
        several.row(f"{k} trajectories", f"{k} samples", subject.num_dims),
    ]


class Estimates(NamedTuple):
    """Estimates of a bound in nats.

    Attributes:
      mean: over examples and draws.
      variance: of one example's estimate, given the example.
      evaluations: of the network, for one estimate.
      count: the number of estimates.
    """

    mean: float
    variance: float
    evaluations: int
    count: int

    @classmethod
    def from_draws(cls, totals: Float[np.ndarray, "draw n"], evaluations: int) -> "Estimates":
        """From independent draws of the bound of every example."""
        return cls(totals.mean(), totals.var(axis=0, ddof=1).mean(), evaluations, totals.size)

    def row(self, name: str, target: str, num_dims: int) -> Row:
        """Converted to bits/dim."""
        unit = bits_per_dim(1.0, num_dims)
        variance = float(self.variance * unit**2)
        se, needed = float(np.sqrt(variance / self.count)), variance * self.evaluations / GOAL**2
        return Row(name, target, float(self.mean * unit), se, variance, self.evaluations, needed)


class Draws:
    """Estimators of a subject's bound at T, or as T → ∞, from draws of its integrand."""

    def __init__(
        self,
        config: ConfigDict,
        subject: Subject,
        controls: tuple[Control, ...],
        continuous: bool,
    ):
        self.subject, self.pilot_times = subject, config.evaluate.pilot
        self.target, self.prefix = ("∞", "T → ∞: ") if continuous else ("T", "")
        self.estimator = Estimator(subject, controls, continuous)
        self.shape = (subject.num_examples, config.variance.draws)
        self.rng = np.random.default_rng([config.seed, continuous])
        prior, reconstruction = self.estimator.ends(63, config.variance.draws)
        self.ends = prior + reconstruction.mean(axis=1)
        self.ends_variance = reconstruction.var(axis=1, ddof=1).mean()

    def one_log_ratio(self) -> Row:
        """(13.10) at one uniform t: T − 1 times its log-ratio, with the ends of (13.26)."""
        subject, run = self.subject, programs.make_log_ratios(self.subject)
        time = self.rng.random(self.shape)

        def log_ratios(index, slot):
            points = programs.Points.at(subject, time[index, slot], slot, continuous=False)
            return run(subject, index, points, np.full(len(index), 70))

        values = subject.over_draws(log_ratios, self.shape[1])
        # The log-ratios have another term, which telescopes: the sum over t of its expectation is
        # E[log q(x_T | x_0) − log q(x_1 | x_0)] = d/2 log(σ_1²/σ_T²).
        sigma2 = subject.levels.sigma2
        values -= 0.5 * subject.num_dims * np.log(sigma2[1] / sigma2[-1])
        return self.row("(13.10), one t, uniform", values.T, 1)

    def full_sum(self) -> Row:
        """(13.26) with every t, twice."""
        num_terms = self.subject.levels.num_timesteps - 1
        time = np.broadcast_to((np.arange(num_terms) + 0.5) / num_terms, (self.shape[0], num_terms))
        totals = [self.estimator.rates(time, draw).value.mean(axis=1) for draw in (50, 51)]
        return self.row("(13.26), full sum", np.stack(totals), num_terms + 1)

    def few_timesteps(self) -> list[Row]:
        """One timestep per example, drawn in different ways; and allocated ones."""
        counts = range(len(self.estimator.controls) + 1)
        return self.one_timestep() + [self.allocated(num_controls) for num_controls in counts]

    def one_timestep(self) -> list[Row]:
        """One timestep per example: uniform, stratified across examples, and by importance."""
        uniform = self.rng.random(self.shape)
        values = self.estimator.rates(uniform, 60).value
        bins = Proposal(np.ones(32)).bin(uniform).ravel()
        second_moment = np.bincount(bins, values.ravel() ** 2, 32)
        count = np.maximum(np.bincount(bins, minlength=32), 1)
        proposal = Proposal.allocate(np.sqrt(second_moment / count), uniform_share=0.01)
        return [
            self.row("one t, uniform", values.T, 1),
            self.across_batch("one t, stratified", Proposal(np.ones(32)), 61),
            self.across_batch("one t, importance, stratified", proposal, 62),
        ]

    def across_batch(self, name: str, proposal: Proposal, draw: int) -> Row:
        """One time per example, one in each stratum across all examples, by a common shift."""
        n, draws = self.shape
        order = self.rng.permuted(np.tile(np.arange(n), (draws, 1)), axis=1).T
        time = proposal.time(np.mod(order / n + self.rng.random(draws), 1.0))
        values = self.estimator.rates(time, draw).value / proposal.density_at(time)
        # The examples of one draw depend on each other, but the draws do not.
        variance = n * values.mean(axis=0).var(ddof=1) + self.ends_variance
        mean = (values.mean(axis=1) + self.ends).mean()
        return self._named(name, Estimates(mean, variance, 1, n * draws))

    def allocated(self, num_controls: int) -> Row:
        """Several strata per example, more where there is more noise; the pilot is counted."""
        result = allocated_bound(self.estimator, 2 * GOAL, 0, self.pilot_times, num_controls)
        # Per evaluation, so that the rows can be compared.
        variance = result.noise_variance.mean() * result.evaluations / len(result.prior)
        draws = Estimates(result.total.mean(), variance, 1, result.evaluations)
        return self._named(f"allocated{CONTROLS[num_controls]}", draws)

    def row(self, name: str, diffusion: Float[np.ndarray, "draw n"], evaluations: int) -> Row:
        """From independent draws of the diffusion term; the noise of the ends is added."""
        draws = Estimates.from_draws(diffusion + self.ends, evaluations)
        return self._named(name, draws._replace(variance=draws.variance + self.ends_variance))

    def _named(self, name: str, draws: Estimates) -> Row:
        return draws.row(self.prefix + name, self.target, self.subject.num_dims)


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
