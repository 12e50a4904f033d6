"""The exact bound of a trained model over every example of a split, with its standard errors."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments.harness import checks, devices, memory
from experiments.harness.data import splits
from experiments.harness.evaluation.curves import Curves, allocated_curves, full_curves, write
from experiments.harness.evaluation.estimates import ESTIMATES, allocate, allocated_summary
from experiments.harness.evaluation.full_bound import full_bound, summary
from experiments.harness.evaluation.subject import Subject, subject_of
from experiments.harness.processes import distributed
from experiments.harness.sampling import quality, sampler
from experiments.harness.setup import trained
from experiments.harness.setup.definition import (
    ModelDefinition,
    check_levels,
    define_model,
    require_grey_levels,
)
from experiments.harness.workdir import dependences, metrics, provenance, record, sessions
from experiments.harness.workdir.files import append_jsonl, replace, write_json

RESULT_FILE = dependences.EVALUATION


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Evaluates what the work directory holds and prints the result."""
    print(result_line(evaluate(config, workdir)))


def evaluate(config: ConfigDict, workdir: epath.PathLike, checked: bool = False) -> dict[str, Any]:
    """The bound of the EMA weights, written to the work directory.

    With the full sum over t, or to the Monte-Carlo error `evaluate.target`. Every example counts
    once, with a noise that is a function of (seed, example, t): beyond rounding the numbers depend
    neither on the batch size nor on the devices. Writes a line of
    evaluations.jsonl, and files in evaluations/: KEY.json, KEY.npz with the arrays, and two plots,
    where KEY is a fingerprint of what the result depends on. The work directory's evaluation.json,
    evaluation.npz and plots are copies of those of the main job's settings.

    Args:
      config: its model, schedule and decoder are measured; `evaluate` says on what.
      workdir: holds the checkpoints.
      checked: whether the config has passed `check`.

    Returns:
      The content of evaluation.json; docs/results.md lists it.

    Raises:
      ConfigError: for a setting or a checkpoint that does not fit.
    """
    if not checked:
        check(config)
    loaded = trained.load(config, workdir, config.evaluate.checkpoint)
    run = loaded.with_variance(config.evaluate.variance)
    if "quality" in config.evaluate.also:
        sampled = loaded.with_variance(config.sample.variance)
        sampled.levels(config.sample.num_timesteps)  # raises now if it has no such levels
    dataset = splits.load_measured(config, config.evaluate.split)
    start = time.monotonic()
    subject = subject_of(config, run.definition, run.params, dataset)
    result, curves = _measure(config, subject)
    result |= {
        "num_examples": subject.num_examples,
        "split": config.evaluate.split,
        "checkpoint": config.evaluate.checkpoint,
        "num_timesteps": subject.levels.num_timesteps,
        "seed": config.seed,
        **provenance.identity(
            RESULT_FILE, config, run.step, workdir, data=splits.fingerprints(config)
        ),
    }
    if (quantization := run.definition.quantization) is not None:
        result["uniform_bits_per_dim"] = float(np.log2(quantization.num_levels))
    for name in config.evaluate.also:
        if name != "quality":
            result[name] = ESTIMATES[name](config, subject)
    if "quality" in config.evaluate.also:
        result["quality"] = quality.sample_quality(sampled)
    result["environment"] = sessions.environment(run.params)
    result["seconds"] = round(time.monotonic() - start, 1)
    parts = result["prior"], result["reconstruction"]
    stem = stem_of(run.workdir, result)
    write(stem, curves, run.definition, *parts)
    write_json(f"{stem}.json", result)
    append_jsonl(run.workdir / "evaluations.jsonl", result)
    recorded = record.recorded_config(workdir)
    if recorded is None or not provenance.differences(RESULT_FILE, recorded, config):
        _copy_to_main(run.workdir, stem)
        _to_tensorboard(run.workdir, result)
    else:
        tqdm.write(f"kept in {stem}.json; {RESULT_FILE} is of the main job's settings")
    return result


def stem_of(workdir: epath.PathLike, result: dict[str, Any]) -> epath.Path:
    """The path of a result's files up to their endings: each distinct evaluation has its own."""
    directory = epath.Path(workdir) / record.EVALUATIONS
    directory.mkdir(exist_ok=True)
    key = provenance.fingerprint(*(result[part] for part in ("step", "settings", "files")))
    return directory / key


def _copy_to_main(workdir: epath.Path, stem: epath.Path) -> None:
    """Copies an evaluation's files to the names of the main job's; the result is the last."""
    if distributed.is_first():
        for name in ("evaluation.npz", "kl_per_timestep.png", "rate_distortion.png", RESULT_FILE):
            ending = name.removeprefix("evaluation") if "evaluation" in name else f"_{name}"
            replace(workdir / name, epath.Path(f"{stem}{ending}").read_bytes())


def _to_tensorboard(workdir: epath.Path, result: dict[str, Any]) -> None:
    """Shows the main job's evaluation in TensorBoard, with its errors and plots."""
    split, parts = result["split"], ("prior", "diffusion", "reconstruction")
    estimates = {"": result} | {f"{name}/": result[name] for name in ESTIMATES if name in result}
    scalars = {
        f"{split}/{prefix}{name}": value
        for prefix, estimate in estimates.items()
        for name, value in estimate.items()
        if "bits_per_dim" in name or (estimate is result and name in parts)
    }
    plots = ("kl_per_timestep", "rate_distortion")
    pictures = {f"{split}/{name}": workdir / f"{name}.png" for name in plots}
    metrics.show(workdir, result["step"], scalars, pictures)


def _measure(config: ConfigDict, subject: Subject) -> tuple[dict[str, Any], Curves]:
    """The bound at T, with the full sum over t or to the Monte-Carlo error `evaluate.target`."""
    num_dims, levels = subject.num_dims, subject.levels
    if config.evaluate.target:
        allocated = allocate(config, subject)
        curves = allocated_curves(allocated, levels, num_dims)
        return allocated_summary(allocated, num_dims), curves
    terms, noise_variances = full_bound(subject, config.evaluate.replicates)
    result = summary(terms, noise_variances, num_dims)
    replicates = min(config.evaluate.replicates, levels.num_timesteps - 1)
    cost = levels.num_timesteps + replicates + 1
    result["network_evaluations"] = subject.num_examples * cost
    return result, full_curves(terms, num_dims)


def check(config: ConfigDict) -> None:
    """Raises ConfigError for settings or data that `evaluate` can't use; compiles nothing."""
    also = ("sample",) if "quality" in config.evaluate.also else ()
    checks.check(config, "evaluate", *also)
    check_fit(config, define_model(config))


def check_fit(config: ConfigDict, definition: ModelDefinition) -> None:
    """Raises ConfigError unless checked settings fit the data and the devices."""
    memory.check_memory(config, definition.image_shape, "evaluate")
    devices.check_batch("config.evaluate.batch_size", config.evaluate.batch_size)
    splits.check_split(config, config.evaluate.split)
    also, ode = config.evaluate.also, config.evaluate.ode
    if "ode" in also and ode.dequantization == "uniform":
        setting = "evaluate.ode.dequantization"
        require_grey_levels(definition, setting, ode.dequantization, "use noise")
    if "quality" in also:
        require_grey_levels(definition, "evaluate.also", also, "leave out quality")
        sampler.check(config, definition)
        quality.check(config)
    if "k_sample" in config.evaluate.also:
        check_levels(config, definition, "evaluate.k_sample.num_timesteps")


def result_line(result: dict[str, Any]) -> str:
    """The result as one line for people, and one more for each further estimate."""
    unit = "bits/dim given labels" if result["settings"].get("evaluate.labels") else "bits/dim"

    def line(name, estimate, detail):
        values = {key: _show(value) for key, value in estimate.items() if "bits_per_dim" in key}
        return (
            f"{name} {unit} {values['bits_per_dim']} ± {values['bits_per_dim_se']} "
            f"({detail}, Monte-Carlo error ± {values['bits_per_dim_mc_se']}, "
            f"{estimate['network_evaluations']:,} network evaluations"
        )

    names = ("prior", "diffusion", "reconstruction")
    parts = ", ".join(f"{name} {_show(result[name])}" for name in names)
    detail = f"{parts}), {result['num_examples']} examples, T = {result['num_timesteps']}"
    lines = [line(result["split"], result, detail) + _worse_than_uniform(result)]
    for name, describe in _DETAILS.items():
        if name in result:
            lines.append(line(f"  {name}", result[name], f"{describe(result[name])})"))
    if "quality" in result:
        lines.append(f"  quality {quality.line(result['quality'])}")
    return "\n".join(lines)


def _worse_than_uniform(result: dict[str, Any]) -> str:
    """A remark if the bound or a term exceeds the bits/dim of uniformly distributed pixels."""
    # Neither in the files of older versions nor in those of continuous data.
    uniform = result.get("uniform_bits_per_dim", np.inf)
    remedies = {
        "prior": "the last level has too little noise",
        "diffusion": "the network predicts badly",
        "reconstruction": "the first level has too much noise, or x̂_0 is bad there",
        "bits_per_dim": "the terms together",
    }
    worse = [f"{name}: {why}" for name, why in remedies.items() if (result[name] or 0) > uniform]
    if not worse:
        return ""
    return f"; warning: worse than the {_show(uniform)} of uniform pixels ({'; '.join(worse)})"


_DETAILS: dict[str, Callable[[dict[str, Any]], str]] = {
    "continuous": lambda _: "the bound as T → ∞",
    "k_sample": lambda k_sample: (
        f"{k_sample['num_samples']} trajectories at T = {k_sample['num_timesteps']}; "
        f"one alone {_show(k_sample['one_sample_bits_per_dim'])}"
    ),
    "ode": lambda ode: (
        f"{ode['dequantization']} dequantisation; trace ± {_show(ode['trace_se'])}, "
        f"solver ± {_show(ode['mean_solver_error'])}, {ode['failed_solves']} solves failed"
    ),
}


def _show(value: float | None) -> str:
    """An error that can't be estimated, such as that of one example, is NaN; in a file null."""
    return "unknown" if value is None or np.isnan(value) else f"{value:.4f}"
