"""A scheduler of diffusers as our settings, and back: β, prediction, Σ_θ and sampler."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from configs.settings.declaration import unknown
from diffusion.schedules import Levels, Schedule, cosine
from experiments.harness.errors import ConfigError

PREDICTIONS = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
VARIANCES = {
    "fixed_small": "beta_tilde",
    "fixed_small_log": "beta_tilde",
    "fixed_large": "beta",
    "fixed_large_log": "beta",
    "learned_range": "learned_range",
}


class Solver(NamedTuple):
    """A scheduler of diffusers.

    Attributes:
      sampler: ours that steps as it does, or that is the closest to it.
      is_same: whether it is the former.
      variance: Σ_θ of its steps; None where they are deterministic or Σ_θ is an option.
      beta_start: diffusers' default.
      beta_end: diffusers' default.
    """

    sampler: str
    is_same: bool = True
    variance: str | None = None
    beta_start: float = 1e-4
    beta_end: float = 0.02


# All share β, and give their networks x_t and the index t − 1: those with a σ scale x_0 + σ̃ ε by α.
_K_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012}
SOLVERS = {
    "DDPMScheduler": Solver("ancestral"),
    "DDIMScheduler": Solver("ddim"),
    "DPMSolverMultistepScheduler": Solver("dpm_solver_pp_2m"),
    "DPMSolverSinglestepScheduler": Solver("dpm_solver_pp_2m", is_same=False),
    "DEISMultistepScheduler": Solver("dpm_solver_pp_2m", is_same=False),
    "UniPCMultistepScheduler": Solver("unipc"),
    "PNDMScheduler": Solver("ddim", is_same=False),
    "EulerDiscreteScheduler": Solver("euler"),
    # σ_up of Karras et al. (2022) is the standard deviation of q(x_s | x_t, x_0).
    "EulerAncestralDiscreteScheduler": Solver("ancestral", variance="beta_tilde"),
    "LMSDiscreteScheduler": Solver("euler", is_same=False),
    "HeunDiscreteScheduler": Solver("heun", **_K_DIFFUSION),
    "KDPM2DiscreteScheduler": Solver("heun", is_same=False, **_K_DIFFUSION),
    "KDPM2AncestralDiscreteScheduler": Solver(
        "ancestral", is_same=False, variance="beta_tilde", **_K_DIFFUSION
    ),
}
# Options that choose the levels of samplers, with our name of the spacing.
SPACINGS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "log_snr",
    "use_beta_sigmas": None,
    "use_lu_lambdas": None,
}
# What another process or another network input would need, with the value that means neither.
ONLY = {
    "use_flow_sigmas": (False, "the process of a flow is not read"),
    "use_dynamic_shifting": (False, "the process of a flow is not read"),
    "timestep_type": ("discrete", "a network that receives ¼ log σ is not read"),
}
QUANTILE = 0.995  # of our dynamic threshold
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
COSINE_OFFSET = 0.008  # of diffusers
# ᾱ_T that stands for zero. A finite λ_T of −36.8 has the limit of every term: the prior's KL is
# 1e-16 of ‖x_0‖²/2, and the last KL, with e = ε − ε̂ = α_T (v − v̂), is ½ SNR_s ‖v − v̂‖² to 1e-16.
ZERO = 1e-16


class Process(NamedTuple):
    """What a scheduler says of p and q.

    Attributes:
      settings: ours by full name, such as "schedule.name".
      assumed: what it does not say and we take for granted, one sentence each.
    """

    settings: dict[str, Any]
    assumed: list[str]


def to_settings(options: Mapping[str, Any]) -> Process:
    """The settings of a scheduler_config.json.

    Raises:
      ConfigError: with one line that names an option which our settings cannot express.
    """
    name = str(options.get("_class_name", ""))
    if name not in SOLVERS:
        raise _refused("_class_name", name, unknown(name, SOLVERS))
    for option, (value, why) in ONLY.items():
        if options.get(option, value) != value:
            raise _refused(option, options[option], f"; {why}")
    solver = SOLVERS[name]
    options = {"beta_start": solver.beta_start, "beta_end": solver.beta_end} | dict(options)
    parameterization = _pick(options, "prediction_type", "epsilon", PREDICTIONS)
    settings, assumed = {"model.parameterization": parameterization}, []
    settings |= _schedule(options)
    settings["schedule.num_timesteps"] = _length(options)
    if options.get("rescale_betas_zero_snr") and parameterization == "eps":
        raise _refused(
            "rescale_betas_zero_snr",
            True,
            "; with prediction_type = 'epsilon' x̂_0 is undefined at the last level, which has no "
            "signal; it needs sample or v_prediction",
        )
    if name == "DDPMScheduler" or options.get("variance_type") is not None:
        settings["model.variance"] = _pick(options, "variance_type", "fixed_small", VARIANCES)
    elif solver.variance is not None:
        settings["model.variance"] = solver.variance
    else:
        settings["model.variance"] = "beta_tilde"
        assumed.append(
            f"Σ_θ = β̃ (beta_tilde): {name} states none, and a deterministic step has no finite "
            "bound; --experiment=sigma compares others"
        )
    sampler, remarks = _sampler(name, options)
    return Process(settings | sampler, assumed + remarks)


def _schedule(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of β: a formula of ours, or a table."""
    start, end = float(options["beta_start"]), float(options["beta_end"])
    name, n = options.get("beta_schedule", "linear"), _length(options)
    is_rescaled, trained = options.get("rescale_betas_zero_snr"), options.get("trained_betas")
    if name not in BETA_SCHEDULES:
        raise _refused("beta_schedule", name, unknown(name, BETA_SCHEDULES))
    formulas = {
        "linear": ("linear_beta", {"beta_start": start, "beta_end": end}),
        "squaredcos_cap_v2": ("cosine", {"offset": COSINE_OFFSET}),
    }
    if name in formulas and trained is None and not is_rescaled:
        ours, values = formulas[name]
        values = {f"schedule.{ours}.{key}": value for key, value in values.items()}
        return {"schedule.name": ours, f"schedule.{ours}.native_timesteps": n, **values}
    tables = {
        "linear": lambda: np.linspace(start, end, n),
        "scaled_linear": lambda: np.linspace(start**0.5, end**0.5, n) ** 2,
        "squaredcos_cap_v2": lambda: cosine(n, COSINE_OFFSET).levels(n).beta[1:],
        "sigmoid": lambda: start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, n))),
    }
    table = tables[name]() if trained is None else np.asarray(trained, np.float64)
    table = zero_terminal_snr(table) if is_rescaled else table
    return {"schedule.name": "betas", "schedule.betas.betas": tuple(table.tolist())}


def _length(options: Mapping[str, Any]) -> int:
    trained = options.get("trained_betas")
    n = options.get("num_train_timesteps", 1000) if trained is None else len(trained)
    if not isinstance(n, int) or n < 3:
        raise _refused("num_train_timesteps", n, "; it must be a whole number, at least 3")
    return n


def zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """β of the schedule whose √ᾱ is shifted and scaled to end in (almost) zero: see `ZERO`.

    √ᾱ_1 stays. Lin et al. (2024), algorithm 1.
    """
    root = np.exp(0.5 * np.cumsum(np.log1p(-betas)))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    root[-1] = ZERO**0.5
    alpha_bar = np.concatenate([[1.0], root**2])
    return 1 - alpha_bar[1:] / alpha_bar[:-1]


def _sampler(name: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings of sampling, which the bound does not depend on."""
    solver, treatment, remarks = SOLVERS[name], "none", []
    settings = {"sample.sampler": solver.sampler}
    if not solver.is_same:
        remarks.append(f"samples are drawn by {solver.sampler}: there is no {name} here")
    for option in (option for option in SPACINGS if options.get(option)):
        if SPACINGS[option] is None:
            remarks.append(f"samples step through evenly spaced levels: {option} is not known here")
        else:
            settings["sample.spacing"] = SPACINGS[option]
    largest = options.get("sample_max_value", 1)
    quantile = options.get("dynamic_thresholding_ratio")
    # clip_sample has the default True in these two schedulers only.
    clips = options.get("clip_sample", name in ("DDPMScheduler", "DDIMScheduler"))
    limit = options.get("clip_sample_range", 1)
    if options.get("thresholding"):
        treatment = "clip" if largest <= 1 else "dynamic"
        if treatment == "dynamic" and (quantile or QUANTILE) != QUANTILE:
            remarks.append(f"the threshold of samples is the quantile {QUANTILE}, not {quantile}")
    elif clips and limit == 1:
        treatment = "clip"
    elif clips:
        remarks.append(f"samples are not clipped: clip_sample_range = {limit} is not 1")
    settings["sample.x_0_treatment"] = treatment
    order = options.get("solver_order", 2)
    if name == "UniPCMultistepScheduler":
        settings["sample.unipc.order"] = order
        settings["sample.unipc.variant"] = options.get("solver_type", "bh2")
    elif name == "DPMSolverMultistepScheduler":
        algorithm = options.get("algorithm_type", "dpmsolver++")
        known = {
            ("dpmsolver++", 1): "ddim",
            ("dpmsolver++", 2): "dpm_solver_pp_2m",
            ("dpmsolver++", 3): "dpm_solver_pp_3m_published",
            ("sde-dpmsolver++", 2): "dpm_solver_pp_2m_sde",
        }
        settings["sample.sampler"] = known.get((algorithm, order), "dpm_solver_pp_2m")
        if (algorithm, order) not in known:
            remarks.append(f"the sampler dpm_solver_pp_2m, for {algorithm} of order {order}")
    return settings, remarks


def _pick(options: Mapping[str, Any], name: str, default: str, known: Mapping[str, str]) -> str:
    value = options.get(name, default)
    if value not in known:
        raise _refused(name, value, unknown(value, known))
    return known[value]


def _refused(option: str, value: Any, why: str) -> ConfigError:
    return ConfigError(f"the scheduler's {option} = {value!r}{why}")


def to_options(config: ConfigDict, schedule: Schedule) -> dict[str, Any]:
    """The scheduler_config.json of a DDPMScheduler.

    Args:
      config: the config of a network that receives the timesteps of a table of β.
      schedule: the schedule that it makes.

    Raises:
      ConfigError: with one line that names a setting which a scheduler cannot express.
    """
    keys = {}
    for setting, known in (("parameterization", PREDICTIONS), ("variance", VARIANCES)):
        value = config.model[setting]
        if value not in known.values():
            choices = ", ".join(dict.fromkeys(known.values()))
            raise ConfigError(
                f"config.model.{setting} = {value!r}; a scheduler of diffusers cannot express it: "
                f"only {choices} can be exported"
            )
        keys[setting] = next(theirs for theirs, ours in known.items() if ours == value)
    name = config.schedule.name
    ours, betas = config.schedule[name], {"beta_schedule": "linear"}
    if name == "linear_beta":
        betas |= {"beta_start": ours.beta_start, "beta_end": ours.beta_end}
    elif name == "cosine" and ours.offset == COSINE_OFFSET:
        betas["beta_schedule"] = "squaredcos_cap_v2"
    else:
        betas["trained_betas"] = Levels.from_log_snr(schedule.knots).beta[1:].tolist()
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": len(schedule.knots),
        **betas,
        "prediction_type": keys["parameterization"],
        "variance_type": keys["variance"],
        "clip_sample": config.sample.x_0_treatment == "clip",
    }
