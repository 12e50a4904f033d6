"""The bound to a given Monte-Carlo error: evaluations are spent where the noise is largest.

A pilot measures the standard deviation of the diffusion term's integrand over time, and how much of
it the control variate explains. Times are then drawn with a density proportional to the remaining
standard deviation (Neyman's allocation), stratified for each example, with unbiased weights.
Replicates of the whole design give the error; they are independent of the pilot and of each other.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from diffusion.statistics.control import GaussianControl
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
PAIRS_PER_BIN = 20
FIRST_REPLICATES = 2
LEAST_FREEDOM = 30  # degrees of freedom of an error: examples times (replicates − 1)
MAX_PER_REPLICATE = 512  # evaluations of an example
SAFETY = 1.25  # factor on the variance that the pilot predicts
CONTROL_EXAMPLES = 10_000


class Plan(NamedTuple):
    """The results of a pilot.

    Attributes:
      proposal: the density of time.
      coefficient: of the control variate, in each bin of time.
      variance: predicted variance, in nats², of one weighted value of the integrand, given its
        example and time. With few strata the spread over time within them adds to it.
      end_variance: the same for one draw of the reconstruction.
      evaluations: network evaluations of the pilot.
    """

    proposal: Proposal
    coefficient: Float[np.ndarray, "bins"]
    variance: float
    end_variance: float
    evaluations: int

    def sizes(self, per_example: float, least: int) -> tuple[int, int]:
        """Splits evaluations into draws of the integrand and of the reconstruction, by their std.

        At most `per_example` in total, but at least `least` of the integrand and one of the
        reconstruction.
        """
        rate_std, end_std = np.sqrt(self.variance), np.sqrt(self.end_variance)
        share = rate_std / (rate_std + end_std) if rate_std + end_std else 0.0
        total = max(int(per_example), least + 1)
        m = int(np.clip(np.rint(total * share), least, total - 1))
        return m, total - m


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
      control: the control variate, such as `fit_control`.
      continuous: the bound as T → ∞ in place of that at T.
    """

    def __init__(self, subject: Subject, control: GaussianControl, continuous: bool = False):
        self.subject, self.continuous = subject, continuous
        self.control = devices.place(control, devices.replicated(devices.mesh()))
        self._rates = programs.make_rates(subject, continuous)
        self._ends = programs.make_ends(subject)

    def rates(self, time: Float[np.ndarray, "n m"], draw: int) -> Rates:
        """The integrand at m times of every example, [n, m] in float64; `draw` numbers noises."""
        if not time.size:
            return Rates(time, time, time)
        slot = np.broadcast_to(np.arange(time.shape[1]), time.shape)

        def run(index):
            points = Points.at(self.subject, time[index], slot[index], self.continuous)
            return self._rates(self.subject, index, points, np.full(len(index), draw), self.control)

        return self.subject.over_examples(run)

    def ends(self, draw: int, m: int) -> tuple[np.ndarray, np.ndarray]:
        """The prior of every example, [n], and m draws of its reconstruction, [n, m]; float64."""
        slot = np.arange(m, dtype=np.int32)

        def run(index):
            slots = np.broadcast_to(slot, (len(index), m))
            return self._ends(self.subject, index, np.full(len(index), draw), slots)

        return self.subject.over_examples(run)


def fit_control(config: ConfigDict, subject: Subject) -> GaussianControl:
    """The control variate of the config's training data."""
    images = splits.load_data(config, "train", splits.some(CONTROL_EXAMPLES)).images
    return GaussianControl.fit(np.asarray(subject.to_data(images)), subject.spacing**2 / 12)


def pilot(estimator: Estimator, times_per_example: int, use_control: bool = True) -> Plan:
    """Draws two noises at each of a few times of each example, to plan the replicates.

    Half the squared difference of the two values estimates the variance of one. The regression of
    the difference on that of the controls gives the coefficient.
    """
    n = estimator.subject.num_examples
    time = jittered(np.random.default_rng([estimator.subject.seed, 0]), n, times_per_example)
    first, second = (estimator.rates(time, draw) for draw in (0, 1))
    num_bins = int(np.clip(time.size // PAIRS_PER_BIN, 1, MAX_BINS))
    bins = Proposal(np.ones(num_bins)).bin(time)
    value, control = first.value - second.value, first.control - second.control

    def per_bin(x):
        return np.bincount(bins.ravel(), x.ravel(), num_bins)

    squared = per_bin(control**2)
    slope = np.divide(per_bin(value * control), squared, where=squared > 0, out=np.zeros(num_bins))
    coefficient = slope if use_control else 0 * slope
    count = np.maximum(per_bin(np.ones_like(value)), 1)
    variance = 0.5 * per_bin((value - coefficient[bins] * control) ** 2) / count
    proposal = Proposal.allocate(np.sqrt(variance))
    predicted = float(np.mean(variance / proposal.density))
    end_variance = float(estimator.ends(0, 2)[1].var(axis=1, ddof=1).mean())
    return Plan(proposal, coefficient, predicted, end_variance, 2 * time.size + 2 * n)


def allocated_bound(
    estimator: Estimator,
    target: float,
    max_evaluations: int,
    pilot_times: int,
    use_control: bool = True,
) -> Allocated:
    """The bound to a Monte-Carlo error of `target` bits/dim, as far as the budget allows.

    Args:
      estimator: draws the terms.
      target: the largest standard error over times and noise, with the examples fixed.
      max_evaluations: of the network, with the pilot; 0 for no limit. The pilot and two replicates
        of one time and one reconstruction per example are always run.
      pilot_times: times per example of the pilot.
      use_control: whether to subtract the control variate.

    Raises:
      RunError: if a term in the pilot is not finite.
    """
    subject = estimator.subject
    n, num_dims = subject.num_examples, subject.num_dims
    # A bound with one level has no KL, so that only the reconstruction is drawn.
    least = int(estimator.continuous or subject.levels.num_timesteps > 1)
    plan = pilot(estimator, least * pilot_times, use_control)
    if not np.isfinite(plan.variance + plan.end_variance):
        raise RunError("a term of the bound is not finite, so its error cannot be predicted")
    budget = max_evaluations or np.inf
    # With draws in proportion to √V their mean over n examples has the variance (Σ √V)²/(n m).
    variance = (np.sqrt(plan.variance) + np.sqrt(plan.end_variance)) ** 2
    wanted = SAFETY * variance * (bits_per_dim(1.0, num_dims) / target) ** 2 / n
    affordable = (budget - plan.evaluations) / n
    per_example = min(wanted, affordable)
    # Enough replicates to estimate the error, each small enough for memory.
    first = max(FIRST_REPLICATES, 1 + -(-LEAST_FREEDOM // n), int(per_example // MAX_PER_REPLICATE))
    first = int(min(first, max(affordable // (least + 1), FIRST_REPLICATES)))
    replicates = _Replicates(estimator, plan, *plan.sizes(per_example / first, least))
    with progress(None, "estimate", "replicate", leave=False) as bar:
        while True:
            replicates.add()
            bar.update()
            if replicates.count < first:
                continue
            result = replicates.result()
            error = result.mc_se(num_dims)
            bar.set_postfix_str(f"Monte-Carlo error ± {error:.5f}")
            # `not error > target` is also true for NaN, with which the loop would never end.
            if not error > target or result.evaluations + n * replicates.size > budget:
                return result


class _Replicates:
    """Replicates of the design: each has m times and `ends` reconstructions per example."""

    def __init__(self, estimator: Estimator, plan: Plan, m: int, ends: int):
        self.estimator, self.plan, self.m, self.ends = estimator, plan, m, ends
        self.diffusion, self.reconstruction, self.prior = [], [], None
        bins = len(plan.proposal.density)
        self.sums = np.zeros((3, bins))  # by bin: of values, of errors, and the number of draws

    @property
    def count(self) -> int:
        return len(self.diffusion)

    @property
    def size(self) -> int:
        """Evaluations of each example in one replicate."""
        return self.m + self.ends

    def add(self) -> None:
        """Draws one more replicate, with its own noise."""
        estimator, proposal = self.estimator, self.plan.proposal
        draw = 2 + self.count  # the pilot has draws 0 and 1
        rng = np.random.default_rng([estimator.subject.seed, draw])
        time = proposal.time(jittered(rng, estimator.subject.num_examples, self.m))
        rates, bins = estimator.rates(time, draw), proposal.bin(time)
        value = rates.value - self.plan.coefficient[bins] * rates.control
        self.diffusion.append((value / proposal.density[bins]).sum(axis=1) / max(self.m, 1))
        self.prior, reconstruction = estimator.ends(draw, self.ends)
        self.reconstruction.append(reconstruction.mean(axis=1))
        for row, x in enumerate((value, rates.eps_error, np.ones_like(value))):
            self.sums[row] += np.bincount(bins.ravel(), x.ravel(), self.sums.shape[1])

    def result(self) -> Allocated:
        """The estimate from all replicates so far."""
        value, error, count = self.sums
        evaluations = self.count * self.estimator.subject.num_examples * self.size
        return Allocated(
            self.prior,
            np.stack(self.diffusion),
            np.stack(self.reconstruction),
            value / np.maximum(count, 1),
            error / np.maximum(count, 1),
            self.plan.evaluations + evaluations,
        )
