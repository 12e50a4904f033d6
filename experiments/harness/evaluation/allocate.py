"""The bound at a price: evaluations spent where the noise is, until its error is small enough.

A pilot measures the standard deviation of the diffusion term's integrand over time, and how much of
it the control variate explains. Times are then drawn in proportion to what is left (Neyman's
allocation), one to a stratum for each example, with unbiased weights. Replicates of the whole
design, independent of the pilot and of one another, tell its error.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from diffusion.statistics.control import GaussianControl
from diffusion.statistics.standard_errors import bits_per_dim
from diffusion.timesteps import Proposal, jittered
from experiments.harness import devices
from experiments.harness.data import splits
from experiments.harness.data.batches import over_examples
from experiments.harness.errors import RunError
from experiments.harness.evaluation import programs
from experiments.harness.evaluation.programs import Points, Rates
from experiments.harness.processes.progress import progress
from experiments.harness.setup.definition import ModelDefinition

MAX_BINS = 32
PAIRS_PER_BIN = 20
FIRST_REPLICATES = 2
LEAST_FREEDOM = 30  # degrees of freedom of an error: examples times replicates but one
MAX_PER_REPLICATE = 512  # evaluations of an example
SAFETY = 1.25  # on the variance that the pilot foretells
CONTROL_EXAMPLES = 10_000


class Plan(NamedTuple):
    """What a pilot found.

    Attributes:
      proposal: the density of time.
      coefficient: of the control variate, in each bin of time.
      variance: foretold of one weighted value of the integrand given its example and time, in
        nats². With few strata the spread over time within them comes on top.
      end_variance: of one draw of the reconstruction, likewise.
      evaluations: that the pilot used.
    """

    proposal: Proposal
    coefficient: Float[np.ndarray, "bins"]
    variance: float
    end_variance: float
    evaluations: int

    def sizes(self, per_example: float, least: int) -> tuple[int, int]:
        """So many evaluations as draws of the integrand and of the reconstruction, each by its std.

        No more than `per_example` in all, but `least` of the integrand and one reconstruction.
        """
        of_rate, of_end = np.sqrt(self.variance), np.sqrt(self.end_variance)
        share = of_rate / (of_rate + of_end) if of_rate + of_end else 0.0
        whole = max(int(per_example), least + 1)
        m = int(np.clip(np.rint(whole * share), least, whole - 1))
        return m, whole - m


class Allocated(NamedTuple):
    """An estimate of the bound of each example, in nats, from independent replicates.

    Attributes:
      prior: of each example.
      diffusion: in each replicate.
      reconstruction: in each replicate.
      rate: the integrand in equal bins of time, the mean over examples.
      eps_error: ‖ε − ε̂‖², likewise.
      evaluations: of the network, pilot included.
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


class Estimator:
    """Draws the terms of a trained model's bound over a data set.

    Args:
      config: the config.
      definition: the mathematics it names; its schedule, if learned, the learned one.
      params: the networks' parameters.
      dataset: whose bound is estimated.
      continuous: the bound as T → ∞ in place of that at T.
      control: the control variate; None for that of the training data.
    """

    def __init__(
        self,
        config: ConfigDict,
        definition: ModelDefinition,
        params: Any,
        dataset: splits.Dataset,
        continuous: bool = False,
        control: GaussianControl | None = None,
    ):
        mesh = devices.mesh()
        self.config, self.definition, self.dataset = config, definition, dataset
        self.continuous, self.num_examples = continuous, len(dataset.images)
        self.params = devices.place(params, devices.replicated(mesh))
        control = fit_control(config, definition) if control is None else control
        self.control = devices.place(control, devices.replicated(mesh))
        self._rates = programs.make_rates(config, definition, mesh, continuous)
        self._ends = programs.make_ends(config, definition, mesh)

    def rates(self, time: Float[np.ndarray, "n m"], draw: int) -> Rates:
        """The integrand at m times of every example, [n, m] in float64. Noise is of (draw, m)."""
        if not time.size:
            return Rates(time, time, time)
        slot = np.broadcast_to(np.arange(time.shape[1]), time.shape)

        def run(index):
            points = Points.at(self.definition, time[index], slot[index], self.continuous)
            examples, draws = self.dataset.examples(index), np.full(len(index), draw)
            return self._rates(self.params, self.control, examples, index, points, draws)

        return over_examples(run, self.num_examples, self.config.evaluate.batch_size)

    def ends(self, draw: int, m: int) -> tuple[np.ndarray, np.ndarray]:
        """The prior of every example, [n], and m draws of its reconstruction, [n, m]; float64."""
        slot = np.arange(m, dtype=np.int32)

        def run(index):
            examples, draws = self.dataset.examples(index), np.full(len(index), draw)
            slots = np.broadcast_to(slot, (len(index), m))
            return self._ends(self.params, self.definition.levels, examples, index, draws, slots)

        return over_examples(run, self.num_examples, self.config.evaluate.batch_size)


def fit_control(config: ConfigDict, definition: ModelDefinition) -> GaussianControl:
    """The control variate of the training data."""
    images = splits.load_data(config, "train", splits.some(CONTROL_EXAMPLES)).images
    x_0 = np.asarray(definition.quantization.to_data(images))
    return GaussianControl.fit(x_0, definition.quantization.spacing**2 / 12)


def pilot(estimator: Estimator, times_per_example: int, use_control: bool = True) -> Plan:
    """Two noises at each of a few times of each example, to plan the rest by.

    Half the squared difference of the two is the variance of one; their regression on the control's
    difference is its coefficient.
    """
    n, seed = estimator.num_examples, estimator.config.seed
    time = jittered(np.random.default_rng([seed, 0]), n, times_per_example)
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
    foretold = float(np.mean(variance / proposal.density))
    of_ends = float(estimator.ends(0, 2)[1].var(axis=1, ddof=1).mean())
    return Plan(proposal, coefficient, foretold, of_ends, 2 * time.size + 2 * n)


def allocated_bound(
    estimator: Estimator,
    target: float,
    max_evaluations: int,
    pilot_times: int,
    use_control: bool = True,
) -> Allocated:
    """The bound to a Monte-Carlo error of `target` bits/dim, or as near as the budget allows.

    Args:
      estimator: draws the terms.
      target: the largest standard error over times and noise, the examples fixed.
      max_evaluations: of the network, pilot included; 0 for no limit. The pilot and two replicates
        of one time and one reconstruction per example are made in any case.
      pilot_times: times per example of the pilot.
      use_control: whether the control variate is subtracted.

    Raises:
      RunError: if the pilot met a term that is not finite.
    """
    n, rng_seed = estimator.num_examples, estimator.config.seed
    num_dims = int(np.prod(estimator.definition.image_shape))
    # A bound of one level has no KL: then there is nothing to draw but the reconstruction.
    least = int(estimator.continuous or estimator.definition.levels.num_timesteps > 1)
    plan = pilot(estimator, least * pilot_times, use_control)
    if not np.isfinite(plan.variance + plan.end_variance):
        raise RunError("a term of the bound is not finite, so that no error can be foretold")
    budget = max_evaluations or np.inf
    # With draws in proportion to √V their mean over n examples has the variance (Σ √V)²/(n m).
    of_one = (np.sqrt(plan.variance) + np.sqrt(plan.end_variance)) ** 2
    wanted = SAFETY * of_one * (bits_per_dim(1.0, num_dims) / target) ** 2 / n
    affordable = (budget - plan.evaluations) / n
    per_example = min(wanted, affordable)
    # Enough of them for an error to be known by, and each small enough to be held.
    first = max(FIRST_REPLICATES, 1 + -(-LEAST_FREEDOM // n), int(per_example // MAX_PER_REPLICATE))
    first = int(min(first, max(affordable // (least + 1), FIRST_REPLICATES)))
    m, ends = plan.sizes(per_example / first, least)
    draws, done = _Replicates(estimator, plan, m, ends), False
    with progress(None, "estimate", "replicate", leave=False) as bar:
        while not done:
            draws.add(rng_seed)
            bar.update()
            if draws.count < first:
                continue
            result = draws.result()
            error = bits_per_dim(np.sqrt(result.noise_variance.sum()) / n, num_dims)
            bar.set_postfix_str(f"Monte-Carlo error ± {error:.5f}")
            # Not `error <= target`: one that is not finite would never be small enough.
            done = not error > target or result.evaluations + n * draws.size > budget
    return result


class _Replicates:
    """Replicates of the design, as they come."""

    def __init__(self, estimator: Estimator, plan: Plan, m: int, ends: int):
        self.estimator, self.plan, self.m, self.ends = estimator, plan, m, ends
        self.diffusion, self.reconstruction, self.prior = [], [], None
        bins = len(plan.proposal.density)
        self.sums = np.zeros((3, bins))  # of values, of errors, and of draws, by bin

    @property
    def count(self) -> int:
        return len(self.diffusion)

    @property
    def size(self) -> int:
        """Evaluations for each example."""
        return self.m + self.ends

    def add(self, seed: int) -> None:
        """One more, from noise of its own."""
        estimator, proposal = self.estimator, self.plan.proposal
        draw = 2 + self.count  # 0 and 1 are the pilot's
        uniform = jittered(np.random.default_rng([seed, draw]), estimator.num_examples, self.m)
        time = proposal.time(uniform)
        found, bins = estimator.rates(time, draw), proposal.bin(time)
        value = found.value - self.plan.coefficient[bins] * found.control
        self.diffusion.append((value / proposal.density[bins]).sum(axis=1) / max(self.m, 1))
        self.prior, reconstruction = estimator.ends(draw, self.ends)
        self.reconstruction.append(reconstruction.mean(axis=1))
        for row, x in enumerate((value, found.eps_error, np.ones_like(value))):
            self.sums[row] += np.bincount(bins.ravel(), x.ravel(), self.sums.shape[1])

    def result(self) -> Allocated:
        """The estimate so far."""
        value, error, count = self.sums
        made = self.count * self.estimator.num_examples * self.size
        return Allocated(
            self.prior,
            np.stack(self.diffusion),
            np.stack(self.reconstruction),
            value / np.maximum(count, 1),
            error / np.maximum(count, 1),
            self.plan.evaluations + made,
        )
