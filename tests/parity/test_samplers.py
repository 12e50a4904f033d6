"""Our samplers against diffusers' schedulers: every state of a trajectory.

Both get the same network, noise levels and noise. The levels are theirs, read back from their
timesteps: λ = log(ᾱ/(1 − ᾱ)) of their `alphas_cumprod`, or −2 log of their `sigmas`, which are our
σ̃ = σ/α. The network is told λ, so that a timestep that they round does not matter.

Their tables are float32 values, taken as they are, and all arithmetic is float64, except that Euler
and DPM-Solver++ round the state to float32 in every step. So these agree to a few roundings of 6e-8
of the largest value, since the network pulls states to the modes of the data and forgets the rest.
The others agree to float64's rounding.

Where conventions differ:

- Last step. Ours goes to the data and is x̂_0. So do theirs by default, with `set_alpha_to_one` and
  `final_sigmas_type="zero"`. Otherwise they end at the table's first level, which is our trajectory
  over one more level, short of its last step.
- DDPM's `fixed_large` adds noise in the last step too, unless it starts at timestep 0; ours, never.
  `fixed_small` is clamped there to 1e-20, which is noise of 1e-10.
- `clip_sample` is our "clip". DDIM keeps the network's own ε̂ beside a clipped x̂_0; ours is what the
  clipped x̂_0 leaves of x_t, which is their `use_clipped_model_output`. `thresholding` is "dynamic"
  with a large `sample_max_value`; at the default of 1 it is "clip" once more.
- Spacing of timesteps, and their `steps_offset`, choose levels, which are an argument of ours.
  Between timesteps Euler and Heun interpolate σ̃. DDIM steps to timestep − ⌊1000/n⌋, which is the
  next of its timesteps with "leading" spacing, and with "trailing" where n divides 1000; otherwise
  it steps to levels that it does not visit.
- Euler and Heun hold y = x/α. They would start from noise times `init_noise_sigma`, which is
  √(1 + σ̃²) with "leading" spacing and σ̃ with the others, short of q(x_T) by one part in 2 σ̃².
  Here both start from the same x_T.
- `lower_order_final` lowers the order of the last steps: in DPM-Solver++ below 15 steps, in UniPC
  always. A step to the data is x̂_0 at every order; in UniPC with `bh1`, theirs is NaN.
- DPM-Solver++(3M) is our `dpm_solver_pp_3m_published`. `dpm_solver_pp_3m` gives the second
  difference twice the weight.
- Euler with churn evaluates the network before the noise is added; ours, after it, as Karras et al.
  (2022) do. Theirs is given the output that it would have asked for. Their Heun has no churn.
"""

import copy
import functools
import itertools
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import decoders, schedules, spacing
from diffusion.exact import distributions
from diffusion.model import DiffusionModel
from diffusion.reverse import Reverse, convert
from diffusion.samplers import base, registry, treatments

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TOLERANCE_FLOAT32 = 2e-6
"""Of a state's largest absolute value, against those that round states to float32."""

TOLERANCE_FLOAT64 = 1e-9
"""Against the others; DDPM's noise of 1e-10 in the last step is below it."""

SHAPE = (2, 3, 5, 3)
DIMENSION = int(np.prod(SHAPE[1:]))
RNG = np.random.default_rng(0)
MIXTURE = distributions.Mixture(
    np.array([0.5, 0.3, 0.2]),
    RNG.normal(scale=0.8, size=(3, DIMENSION)),
    np.stack([np.diag(RNG.uniform(0.02, 0.5, DIMENSION)) for _ in range(3)]),
)
NOISE = RNG.normal(size=(40, *SHAPE))


def network(x_t, log_snr, condition=None):
    """The optimal ε̂ of a mixture, nonlinear in x_t; x̂_0 goes beyond ±1."""
    del condition
    flat = x_t.reshape(len(x_t), DIMENSION)
    eps_hat = convert(MIXTURE.denoiser(flat, log_snr), flat, log_snr, "x_0", "eps")
    return eps_hat.reshape(x_t.shape)


def network_with_variance(x_t, log_snr, condition=None):
    """The same, and a place in the range from β̃ to β for every coordinate."""
    return jnp.concatenate([network(x_t, log_snr), jnp.tanh(2 * x_t)], axis=-1)


def scheduler_of(name, num_steps, **config):
    scheduler = getattr(diffusers, name)(num_train_timesteps=1000, **config)
    scheduler.set_timesteps(num_steps)
    # The same values, so that float32 rounds nothing that is worked out from them.
    for table in ("alphas_cumprod", "final_alpha_cumprod", "one", "sigmas"):
        if hasattr(scheduler, table):
            setattr(scheduler, table, getattr(scheduler, table).double())
    return scheduler


def log_snrs_of(scheduler):
    """λ at every evaluation, and at the end."""
    if hasattr(scheduler, "sigmas"):
        with np.errstate(divide="ignore"):
            return -2 * np.log(scheduler.sigmas.double().numpy())
    final = getattr(scheduler, "final_alpha_cumprod", torch.tensor(1.0))
    alpha_bar = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], final[None]])
    alpha_bar = alpha_bar.double().numpy()
    with np.errstate(divide="ignore"):
        return np.log(alpha_bar) - np.log1p(-alpha_bar)


def levels_of(scheduler):
    log_snr = np.unique(log_snrs_of(scheduler))
    return schedules.Levels.from_log_snr(log_snr[np.isfinite(log_snr)][::-1])


def to_torch(x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def to_numpy(x):
    return x.permute(0, 2, 3, 1).double().numpy()


def their_states(scheduler, denoiser, monkeypatch, **step_options):
    """x after every step, [steps, b, h, w, c]."""
    module = sys.modules[type(scheduler).__module__]
    evaluate = jax.jit(denoiser)
    log_snr, alpha = log_snrs_of(scheduler), 1.0
    if scheduler.init_noise_sigma > 1:  # their state is y = x/α
        alpha = np.exp(-0.5 * np.logaddexp(0.0, -log_snr))
    alpha = np.broadcast_to(alpha, log_snr.shape)
    last = levels_of(scheduler).num_timesteps
    x, states = to_torch(NOISE[last] / alpha[0]), []
    for i, timestep in enumerate(scheduler.timesteps):
        noise = to_torch(NOISE[last - 1 - i])
        monkeypatch.setattr(
            module,
            "randn_tensor",
            lambda _, dtype, noise=noise, **__: noise.to(dtype),
            raising=False,
        )
        x_t, level = to_numpy(scheduler.scale_model_input(x, timestep)), log_snr[i]
        if step_options.get("s_churn"):
            x_t, level = churned(scheduler, timestep, x, **step_options)
        output = to_torch(evaluate(x_t, np.full(len(x_t), level)))
        x = scheduler.step(output, timestep, x, **step_options).prev_sample
        # Heun's every second evaluation is in the middle of a step.
        if getattr(scheduler, "state_in_first_order", True) or i + 2 == len(log_snr):
            states.append(alpha[i + 1] * to_numpy(x))
    return np.stack(states)


def churned(scheduler, timestep, y, **step_options):
    """x̂ and λ̂ after the noise of an Euler step: y + (σ̃_s − σ̂) ε̂ tells ŷ at ε̂ = 0, and σ̂ at 1."""
    at_0, at_1 = (
        copy.deepcopy(scheduler).step(eps_hat, timestep, y, **step_options).prev_sample.double()
        for eps_hat in (torch.zeros_like(y), torch.ones_like(y))
    )
    next_sigma = scheduler.sigmas[list(scheduler.timesteps).index(timestep) + 1].double()
    sigma = float(next_sigma - (at_1 - at_0).mean())
    return to_numpy(at_0) / np.sqrt(1 + sigma**2), -2 * np.log(sigma)


def our_states(name, levels, denoiser, **options):
    """x_{T−1} … x_0, [T, b, h, w, c]."""
    return compiled(name, denoiser, tuple(options.items()))(levels)


@functools.cache
def compiled(name, denoiser, options):
    """The sampler, to be compiled once for all levels of the same number."""
    options = dict(options)
    reverse = Reverse(denoiser, "eps", options.pop("variance", "beta_tilde"))
    model = DiffusionModel(reverse, decoders.gaussian(1.0), schedules.linear_beta().levels(2))
    model = treatments.treated(model, options.pop("x_0_treatment", "none"))
    sampler = registry.SAMPLERS[name](model, **options)

    def noise(t):
        return jnp.asarray(NOISE)[t, jnp.arange(SHAPE[0])]

    @jax.jit
    def states(levels):
        inner = tuple(range(levels.num_timesteps - 1, 0, -1))
        made = base.sample(sampler, levels, noise, SHAPE[0], inner)
        return jnp.concatenate([made.x_t, made.x_0[None]])

    return lambda levels: np.array(states(levels))


def errors(actual, expected):
    """The largest error of each state, over its largest value."""
    axes = tuple(range(1, expected.ndim))
    return np.abs(actual - expected).max(axes) / np.abs(expected).max(axes)


class Case(NamedTuple):
    """Two names for one trajectory: ours, with what it is given, and theirs."""

    ours: str
    theirs: str
    num_steps: int = 17
    config: Mapping = MappingProxyType({})
    options: Mapping = MappingProxyType({})
    step_options: Mapping = MappingProxyType({})


DDPM, DDIM = "DDPMScheduler", "DDIMScheduler"
EULER, HEUN = "EulerDiscreteScheduler", "HeunDiscreteScheduler"
ANCESTRAL = "EulerAncestralDiscreteScheduler"
MULTISTEP, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
IN_FLOAT32 = (EULER, ANCESTRAL, MULTISTEP)
BARE = {"clip_sample": False}
DYNAMIC = {"thresholding": True, "sample_max_value": 100.0}
KARRAS = {"use_karras_sigmas": True}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
SAME_ORDER = SIGMA_MIN | {"lower_order_final": False}
BH1 = {"solver_type": "bh1"}
CLIPPED = {"x_0_treatment": "clip"}  # an option of ours
LEADING = {"timestep_spacing": "leading"}
LINSPACE = {"timestep_spacing": "linspace"}
TRAILING = {"timestep_spacing": "trailing"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
ORDER_3 = {"solver_order": 3}

CASES = {
    "DDPM": Case("ancestral", DDPM, 17, BARE),
    "DDPM, linspace": Case("ancestral", DDPM, 17, BARE | LINSPACE),
    "DDPM, trailing": Case("ancestral", DDPM, 17, BARE | TRAILING),
    "DDPM, clipped": Case("ancestral", DDPM, 17, {}, CLIPPED),
    "DDPM, thresholded": Case("ancestral", DDPM, 17, DYNAMIC, {"x_0_treatment": "dynamic"}),
    "DDPM, beta": Case(
        "ancestral", DDPM, 17, BARE | {"variance_type": "fixed_large"}, {"variance": "beta"}
    ),
    "DDPM, learned": Case(
        "ancestral",
        DDPM,
        config=BARE | {"variance_type": "learned_range"},
        options={"variance": "learned_range", "denoiser": network_with_variance},
    ),
    "DDIM": Case("ddim", DDIM, 17, BARE),
    "DDIM, eta 1": Case("ddim", DDIM, 17, BARE, {"eta": 1.0}, {"eta": 1.0}),
    "DDIM, eta 0.4": Case("ddim", DDIM, 17, BARE, {"eta": 0.4}, {"eta": 0.4}),
    "DDIM, clipped": Case("ddim", DDIM, 17, {}, CLIPPED, {"use_clipped_model_output": True}),
    "DDIM, trailing": Case("ddim", DDIM, 20, BARE | TRAILING),
    "DDIM, not to the data": Case(
        "ddim", DDIM, 16, BARE | {"set_alpha_to_one": False, "steps_offset": 1}
    ),
    "DDIM, eta 1, is Euler's ancestral": Case("ddim", ANCESTRAL, 17, {}, {"eta": 1.0}),
    "Euler": Case("euler", EULER),
    "Euler, Karras": Case("euler", EULER, 17, KARRAS),
    "Euler, not to the data": Case("euler", EULER, 16, SIGMA_MIN | LEADING | {"steps_offset": 1}),
    "Euler, churn": Case(
        "euler",
        EULER,
        config=KARRAS,
        options={"churn": 0.3, "churn_min": 0.05, "churn_max": 50.0, "churn_noise": 1.01},
        step_options={"s_churn": 0.3 * 17, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.01},
    ),
    "Euler, most churn": Case(
        "euler", EULER, options={"churn": 2**0.5 - 1}, step_options={"s_churn": 1e6}
    ),
    "Heun": Case("heun", HEUN),
    "Heun, leading": Case("heun", HEUN, 17, LEADING),
    "Heun, Karras": Case("heun", HEUN, 17, KARRAS),
    "Heun, clipped": Case("heun", HEUN, 17, {"clip_sample": True}, CLIPPED),
    "2M": Case("dpm_solver_pp_2m", MULTISTEP),
    "2M, Karras": Case("dpm_solver_pp_2m", MULTISTEP, 17, KARRAS),
    "2M, Lu": Case("dpm_solver_pp_2m", MULTISTEP, 17, {"use_lu_lambdas": True}),
    "2M, few steps": Case("dpm_solver_pp_2m", MULTISTEP, 7),
    "2M, clipped": Case("dpm_solver_pp_2m", MULTISTEP, 17, {"thresholding": True}, CLIPPED),
    "2M, not to the data": Case("dpm_solver_pp_2m", MULTISTEP, 16, SIGMA_MIN),
    "2M SDE": Case("dpm_solver_pp_2m_sde", MULTISTEP, 17, SDE),
    "2M SDE, Karras": Case("dpm_solver_pp_2m_sde", MULTISTEP, 17, SDE | KARRAS),
    "2M SDE, not to the data": Case("dpm_solver_pp_2m_sde", MULTISTEP, 16, SDE | SIGMA_MIN),
    "3M": Case("dpm_solver_pp_3m_published", MULTISTEP, 17, ORDER_3),
    "3M, Karras": Case("dpm_solver_pp_3m_published", MULTISTEP, 17, ORDER_3 | KARRAS),
    "3M, not to the data": Case("dpm_solver_pp_3m_published", MULTISTEP, 16, ORDER_3 | SIGMA_MIN),
    "3M, few steps": Case(
        "dpm_solver_pp_3m_published", MULTISTEP, 7, ORDER_3 | {"lower_order_final": False}
    ),
    "UniPC": Case("unipc", UNIPC),
    "UniPC, Karras": Case("unipc", UNIPC, 17, KARRAS),
    "UniPC, clipped": Case("unipc", UNIPC, 17, {"thresholding": True}, CLIPPED),
    "UniPC, order 1": Case("unipc", UNIPC, 17, {"solver_order": 1}, {"order": 1}),
    "UniPC, bh1": Case("unipc", UNIPC, 16, BH1 | SAME_ORDER, {"variant": "bh1"}),
    "UniPC, order 3": Case("unipc", UNIPC, 16, ORDER_3 | SAME_ORDER, {"order": 3}),
    "UniPC, order 3, bh1": Case(
        "unipc", UNIPC, 16, ORDER_3 | SAME_ORDER | BH1, {"order": 3, "variant": "bh1"}
    ),
}


@pytest.mark.parametrize("case", list(CASES.values()), ids=list(CASES))
def test_every_state_is_theirs(case, float64, monkeypatch):
    """Where theirs end short of the data, our last step is one more."""
    options = {"denoiser": network} | case.options
    scheduler = scheduler_of(case.theirs, case.num_steps, **case.config)
    levels = levels_of(scheduler)
    expected = their_states(scheduler, options["denoiser"], monkeypatch, **case.step_options)
    assert len(expected) == case.num_steps
    actual = our_states(case.ours, levels, **options)
    to_data = np.isinf(log_snrs_of(scheduler)[-1])
    assert len(actual) == case.num_steps + (not to_data)
    tolerance = TOLERANCE_FLOAT32 if case.theirs in IN_FLOAT32 else TOLERANCE_FLOAT64
    assert np.all(errors(actual[: case.num_steps], expected) < tolerance)


def test_different_samplers_are_told_apart(float64):
    """Else the agreement above would mean little: they part by 1000 times the larger tolerance."""
    levels = levels_of(scheduler_of(EULER, 17))
    made = [
        our_states(name, levels, network, **options)
        for name, options in [
            ("ancestral", {}),
            ("ancestral", {"variance": "beta"}),
            ("ddim", {}),
            ("ddim", {"eta": 0.4}),
            ("ddim", {"x_0_treatment": "clip"}),
            ("euler", {"churn": 2**0.5 - 1}),
            ("heun", {}),
            ("dpm_solver_pp_2m", {}),
            ("dpm_solver_pp_2m_sde", {}),
            ("dpm_solver_pp_3m", {}),
            ("dpm_solver_pp_3m_published", {}),
            ("unipc", {}),
            ("unipc", {"variant": "bh1"}),
            ("unipc", {"order": 3}),
        ]
    ]
    for one, other in itertools.combinations(made, 2):
        assert errors(one, other).max() > 1000 * TOLERANCE_FLOAT32


def test_their_large_variance_adds_noise_in_the_last_step(float64, monkeypatch):
    """√β_1 of it, β_1 = 1 − ᾱ_1, to the mean at which ours stops."""
    scheduler = scheduler_of(DDPM, 17, variance_type="fixed_large", **BARE, **TRAILING)
    levels = levels_of(scheduler)
    expected = their_states(scheduler, network, monkeypatch)
    actual = our_states("ancestral", levels, network, variance="beta")
    actual[-1] += np.sqrt(levels.sigma2[1]) * NOISE[0]
    assert np.all(errors(actual, expected) < TOLERANCE_FLOAT64)


@pytest.mark.parametrize(
    ("name", "theirs", "num_levels", "config"),
    [
        ("uniform", DDPM, 17, LINSPACE),
        ("karras", EULER, 17, KARRAS),
        ("log_snr", EULER, 17, {"use_exponential_sigmas": True}),
    ],
)
def test_spacings_have_names_there_too(name, theirs, num_levels, config):
    """Their ᾱ are float32: 6e-8 of rounding, where 1 − ᾱ is 1e-4, moves λ by almost 1e-3.

    They round half a timestep to the even one, ours up; with 17 levels there is none.
    """
    ours = spacing.SPACINGS[name](schedules.linear_beta(), num_levels)
    expected = levels_of(scheduler_of(theirs, num_levels, **config)).log_snr[1:]
    np.testing.assert_allclose(ours.log_snr[1:], expected, rtol=0, atol=1e-3)
