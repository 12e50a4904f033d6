"""The bound to a given Monte-Carlo error: evaluations are spent where the noise is largest.

A pilot measures the standard deviation of the diffusion term's integrand over time, and how much of
it the control variates explain. Times are then drawn with a density proportional to the remaining
standard deviation (Neyman's allocation), stratified for each example, with unbiased weights. The
pilot's curve of the integrand over time, whose mean is known, takes out the spread within strata.

Replicates of the whole design give the estimate and its error. They are independent of the pilot
and of each other, and the pilot alone determines how many there are: a rule that stops once an
estimated error is small enough prefers errors that are estimated too low (Stein, 1945).
"""

import copy
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion.statistics.control import Control, GaussianControl, PixelControl
from diffusion.statistics.standard_errors import bits_per_dim
from diffusion.timesteps import Proposal, jittered
from experiments.harness import devices
from experiments.harness.data import splits
from experiments.harness.errors import RunError
from experiments.harness.evaluation import programs
from experiments.harness.evaluation.programs import Points, Rates
from experiments.harness.evaluation.subject import Subject
from experiments.harness.processes.progress import progress

MAX_BINS = 32
LEAST_PAIRS = 50  # of the pilot, for a regression
DRAWS_PER_BIN = 400  # of the curves; a bin where times are rare has a twentieth of them
PILOT_EXAMPLES, PILOT_ENDS = 1000, 200  # at most: for the integrand and the reconstruction
LEAST_REPLICATES = 2
LEAST_FREEDOM = 300  # degrees of freedom of an error: examples times (replicates − 1)
LEAST_PER_REPLICATE, MAX_PER_REPLICATE = 8, 512  # evaluations of an example
MARGIN = 1.25  # factor on the variance that the pilot predicts
CONTROL_EXAMPLES = 10_000
UNLIMITED = 10**18  # evaluations
LEAST_VARIANCE = 1e-6  # of a direction of continuous data, as a share of the mean variance


class Plan(NamedTuple):
    """The results of a pilot.

    Attributes:
      proposal: the density of time.
      coefficients: of the control variates, in each bin of time.
      curve: the mean integrand over examples at the edges of the bins, linear between them.
      variance: predicted variance, in nats², of one weighted value of the integrand, given its
        example and time. The spread over time within strata, from the curve, adds to it.
      end_variance: the same for one draw of the reconstruction.
      evaluations: network evaluations of the pilot.
    """

    proposal: Proposal
    coefficients: Float[np.ndarray, "bins c"]
    curve: Float[np.ndarray, "bins+1"]
    variance: float
    end_variance: float
    evaluations: int

    def diffusion(self, rates: Rates, time: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "n"]:
        """The diffusion term from the integrand at stratified times with the proposal's density."""
        controls = rates.controls[..., : self.coefficients.shape[1]]
        explained = (self.coefficients[self.proposal.bin(time)] * controls).sum(axis=-1)
        edges = np.linspace(0, 1, len(self.curve))
        residual = rates.value - explained - np.interp(time, edges, self.curve)
        estimate = (residual / self.proposal.density_at(time)).sum(axis=1) / max(time.shape[1], 1)
        # The mean over time of the curve, which is linear between the edges.
        return estimate + 0.5 * (self.curve[1:] + self.curve[:-1]).mean()

    def design(self, wanted: float, affordable: float, n: int, least: int) -> "Design":
        """The replicates for a number of evaluations per example.

        Args:
          wanted: evaluations per example that the target needs.
          affordable: those that the budget allows. At least two replicates of `least` times and one
            reconstruction are planned anyway.
          n: the number of examples.
          least: times of an example in one replicate, at least.
        """
        per_example = min(wanted, affordable)
        # Enough replicates to estimate the error, each small enough for memory.
        memory = np.ceil(per_example / MAX_PER_REPLICATE)
        freedom = min(1 + -(-LEAST_FREEDOM // n), per_example // LEAST_PER_REPLICATE)
        replicates = max(freedom, memory, LEAST_REPLICATES)
        size = max(min(np.ceil(wanted / replicates), affordable // replicates), least + 1)
        # In proportion to the standard deviations.
        rate_std, end_std = np.sqrt(self.variance), np.sqrt(self.end_variance)
        share = rate_std / (rate_std + end_std) if rate_std + end_std else 0.0
        times = int(np.clip(np.rint(size * share), least, size - 1))
        # What is left of a tight budget.
        replicates = max(replicates, min(np.ceil(wanted / size), affordable // size))
        return Design(times, int(size) - times, int(replicates))


class Design(NamedTuple):
    """The draws of an estimate.

    Attributes:
      times: of each example in one replicate.
      ends: reconstructions of each example in one replicate.
      replicates: their number.
    """

    times: int
    ends: int
    replicates: int


class Allocated(NamedTuple):
    """An estimate of the bound of each example, in nats, from independent replicates.

    Attributes:
      prior: of each example.
      diffusion: of each example in each replicate.
      reconstruction: of each example in each replicate.
      rate: the integrand in equal bins of time, the mean over examples.
      eps_error: ‖ε − ε̂‖² in the same bins.
      evaluations: of the network, with the pilot.
    """

    prior: Float[np.ndarray, "n"]
    diffusion: Float[np.ndarray, "r n"]
    reconstruction: Float[np.ndarray, "r n"]
    rate: Float[np.ndarray, "bins"]
    eps_error: Float[np.ndarray, "bins"]
    evaluations: int

    @property
    def total(self) -> Float[np.ndarray, "n"]:
        """The bound on −log p."""
        return self.prior + (self.diffusion + self.reconstruction).mean(axis=0)

    @property
    def noise_variance(self) -> Float[np.ndarray, "n"]:
        """Variance of each total, given its example."""
        replicates = self.diffusion + self.reconstruction
        return replicates.var(axis=0, ddof=1) / len(replicates)

    def mc_se(self, num_dims: int) -> float:
        """Standard error of the mean total over times and noise, in bits/dim."""
        se = np.sqrt(self.noise_variance.sum()) / len(self.prior)
        return float(bits_per_dim(se, num_dims))


class Estimator:
    """Draws the terms of a subject's bound.

    Args:
      subject: the model and the examples.
      controls: the control variates, such as `fit_controls`.
      continuous: the bound as T → ∞ in place of that at T.
    """

    def __init__(self, subject: Subject, controls: tuple[Control, ...], continuous: bool = False):
        self.subject, self.continuous = subject, continuous
        self.controls = devices.place(controls, devices.replicated(devices.mesh()))
        self._rates = programs.make_rates(subject, continuous)
        self._ends = programs.make_ends(subject)

    def on_some(self, limit: int) -> "Estimator":
        """The same for at most `limit` of the examples, evenly spaced."""
        estimator = copy.copy(self)
        estimator.subject = self.subject.some(limit)
        return estimator

    def rates(self, time: Float[np.ndarray, "n m"], draw: int, bar: tqdm | None = None) -> Rates:
        """The integrand at m times of every example, [n, m] in float64; `draw` numbers noises."""
        if not time.size:
            return Rates(time, np.zeros((*time.shape, len(self.controls))), time)

        def run(index, slot):
            points = Points.at(self.subject, time[index, slot], slot, self.continuous)
            draws = np.full(len(index), draw)
            return self._rates(self.subject, index, points, draws, self.controls)

        return self.subject.over_draws(run, time.shape[1], bar)

    def ends(self, draw: int, m: int, bar: tqdm | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The prior of every example, [n], and m draws of its reconstruction, [n, m]; float64."""

        def run(index, slot):
            return self._ends(self.subject, index, np.full(len(index), draw), slot)

        prior, reconstruction = self.subject.over_draws(run, m, bar)
        return prior[:, 0], reconstruction


def fit_controls(config: ConfigDict, subject: Subject) -> tuple[Control, ...]:
    """The control variates of the config's training data, or of a part of it."""
    images = splits.load_data(config, "train", splits.some(CONTROL_EXAMPLES)).images
    if not subject.spacing:  # continuous data, which have no grey levels for the second control
        return (GaussianControl.fit(images, LEAST_VARIANCE * float(images.var())),)
    values = np.asarray(subject.to_data(np.arange(subject.dataset.num_levels)))
    gaussian = GaussianControl.fit(values[images], subject.spacing**2 / 12)
    return gaussian, PixelControl.fit(images, values, gaussian)


def pilot(estimator: Estimator, times_per_example: int, num_controls: int | None = None) -> Plan:
    """Draws two noises at each of a few times of some examples, to plan the replicates.

    Half the squared difference of the two values estimates the variance of one. The regression of
    the difference on those of the controls gives the coefficients.

    Args:
      estimator: draws the terms.
      times_per_example: times at which it draws.
      num_controls: how many of the control variates are used, from the first; None: all.

    Raises:
      RunError: if a term is not finite.
    """
    some = estimator.on_some(PILOT_EXAMPLES)
    rng = np.random.default_rng([estimator.subject.seed, 0])
    time = jittered(rng, some.subject.num_examples, times_per_example)
    first, second = (some.rates(time, draw) for draw in (0, 1))
    ends = some.on_some(PILOT_ENDS).ends(0, 2)[1]
    value, controls = first.value - second.value, first.controls - second.controls
    if not (np.isfinite(value).all() and np.isfinite(ends).all()):
        raise RunError("a term of the bound is not finite, so its error cannot be predicted")
    is_enough = time.size >= LEAST_PAIRS
    controls = controls[..., : num_controls if is_enough else 0]
    num_bins = int(np.clip(np.cbrt(time.size), 1, MAX_BINS))
    bins = Proposal(np.ones(num_bins)).bin(time)

    def per_bin(x):
        sums = np.zeros((num_bins, *x.shape[2:]))
        np.add.at(sums, bins, x)
        return sums

    products = per_bin(controls[..., None] * controls[..., None, :])
    inverse = np.linalg.pinv(products, rcond=1e-10, hermitian=True)
    moments = per_bin(controls * value[..., None])
    coefficients = (inverse @ moments[..., None])[..., 0]
    rest = value - (coefficients[bins] * controls).sum(axis=-1)
    # Of new draws with these coefficients: more than the mean square of the pilot's residuals.
    count, fitted = per_bin(np.ones_like(value)), controls.shape[-1]
    variance = 0.5 * per_bin(rest**2) / np.maximum(count, 1)
    variance *= (count + fitted) / np.maximum(count - fitted, 1)
    proposal = Proposal.allocate(np.sqrt(variance), uniform_share=0.05)
    edges = np.arange(num_bins + 1)
    hats = np.maximum(1 - np.abs(time.reshape(-1, 1) * num_bins - edges), 0)
    means = 0.5 * (first.value + second.value)
    return Plan(
        proposal=proposal,
        coefficients=coefficients,
        curve=np.linalg.lstsq(hats, is_enough * means.ravel())[0],
        variance=float(np.mean(variance / proposal.density)),
        end_variance=float(ends.var(axis=1, ddof=1).mean()),
        evaluations=2 * time.size + ends.size,
    )


def allocated_bound(
    estimator: Estimator,
    target: float,
    max_evaluations: int,
    pilot_times: int,
    num_controls: int | None = None,
) -> Allocated:
    """The bound to a Monte-Carlo error of `target` bits/dim, as far as the budget allows.

    The pilot fixes the number of evaluations, with a margin. The error that the replicates then
    show is reported as it is, even if it is larger than the target.

    Args:
      estimator: draws the terms.
      target: the standard error over times and noise, with the examples fixed.
      max_evaluations: of the network, with the pilot; 0 for no limit. The pilot and two replicates
        of one time and one reconstruction per example are always run.
      pilot_times: times per example of the pilot.
      num_controls: how many of the control variates are used, from the first; None: all.

    Raises:
      RunError: if a term in the pilot is not finite.
    """
    subject = estimator.subject
    n, num_dims = subject.num_examples, subject.num_dims
    # A bound with one level has no KL, so that only the reconstruction is drawn.
    least = int(estimator.continuous or subject.levels.num_timesteps > 1)
    plan = pilot(estimator, least * pilot_times, num_controls)
    # With draws in proportion to √V their mean over n examples has the variance (Σ √V)²/(n m).
    variance = (np.sqrt(plan.variance) + np.sqrt(plan.end_variance)) ** 2
    wanted = MARGIN * variance * (bits_per_dim(1.0, num_dims) / target) ** 2 / n
    affordable = ((max_evaluations or UNLIMITED) - plan.evaluations) / n
    return _replicate(estimator, plan, plan.design(wanted, affordable, n, least))


def _replicate(estimator: Estimator, plan: Plan, design: Design) -> Allocated:
    """Draws the replicates, each with its own times and noise."""
    n, proposal = estimator.subject.num_examples, plan.proposal
    times = n * design.times * design.replicates
    curve = Proposal(np.ones(int(np.clip(times // DRAWS_PER_BIN, 1, MAX_BINS))))
    sums = np.zeros((3, len(curve.density)))  # by bin: of weights, values and errors
    evaluations = times + n * design.ends * design.replicates
    diffusion, reconstruction = [], []
    with progress(evaluations, "estimate", "eval", unit_scale=True, leave=False) as bar:
        for replicate in range(design.replicates):
            draw = 2 + replicate  # the pilot has draws 0 and 1
            rng = np.random.default_rng([estimator.subject.seed, draw])
            time = proposal.time(jittered(rng, n, design.times))
            rates, weight = estimator.rates(time, draw, bar), 1 / proposal.density_at(time)
            diffusion.append(plan.diffusion(rates, time))
            prior, ends = estimator.ends(draw, design.ends, bar)
            reconstruction.append(ends.mean(axis=1))
            for row, x in enumerate((weight, weight * rates.value, weight * rates.eps_error)):
                sums[row] += np.bincount(curve.bin(time).ravel(), x.ravel(), sums.shape[1])
    rate, eps_error = sums[1:] / np.where(sums[0], sums[0], 1)
    return Allocated(
        prior=prior,
        diffusion=np.stack(diffusion),
        reconstruction=np.stack(reconstruction),
        rate=rate,
        eps_error=eps_error,
        evaluations=plan.evaluations + evaluations,
    )
