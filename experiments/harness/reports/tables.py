"""The tables and sentences of a report, as texts that the templates escape."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.harness.reports.contents import Contents, Evaluation
from experiments.harness.reports.reading import number

NOTHING = "–"  # in place of a number that there is not


class Table(NamedTuple):
    """A table of texts.

    Attributes:
      head: the heads of its columns.
      rows: its rows.
    """

    head: list[str]
    rows: list[list[str]]


def bits(value: float | None) -> str:
    """Bits/dim with four digits; of an unknown error, a dash."""
    return NOTHING if value is None else f"{value:.4f}"


def value(setting: Any) -> str:
    """A setting's value as one writes it in JSON; of a missing one, a dash."""
    return NOTHING if setting is None else json.dumps(setting, ensure_ascii=False)


def result(evaluation: Evaluation) -> dict[str, Any]:
    """The bound with its errors, its terms and further estimates."""
    parts, total = evaluation.parts, sum(evaluation.parts.values())
    is_split = total > 0 and min(parts.values()) >= 0
    record = evaluation.record
    uniform = number(record.get("uniform_bits_per_dim"))
    settings = record.get("settings")
    labels = isinstance(settings, dict) and settings.get("evaluate.labels")
    return {
        "evaluation": evaluation,
        "unit": "bits/dim given labels" if labels else "bits/dim",
        "shares": {n: 100 * v / total for n, v in parts.items()} if is_split else {},
        "uniform": uniform,
        "is_worse": uniform is not None and evaluation.bits_per_dim > uniform,
        "cost": number(record.get("network_evaluations")),
        "seconds": duration(number(record.get("seconds"))),
        "estimates": _estimates(record),
        "quality": _quality(record.get("quality")),
    }


_ESTIMATES = {
    "continuous": "the bound as T → ∞",
    "k_sample": "the importance-weighted bound of several trajectories",
    "ode": "the likelihood of the probability-flow ODE, a bound too",
}


def _estimates(record: Mapping[str, Any]) -> Table:
    rows = []
    for name, meaning in _ESTIMATES.items():
        estimate = record.get(name)
        if isinstance(estimate, dict):
            keys = ("bits_per_dim", "bits_per_dim_se", "bits_per_dim_mc_se")
            rows.append([name, *(bits(number(estimate.get(key))) for key in keys), meaning])
    return Table(["estimate", "bits/dim", "± over examples", "± over noise", "what it is"], rows)


def _quality(quality: Any) -> Table:
    names = ("frechet", "frechet_mc_se", "kernel", "kernel_mc_se", "precision", "recall")
    names += ("num_samples", "sampler", "num_timesteps", "features", "split")
    quality = quality if isinstance(quality, dict) else {}
    rows = [[name, _short(quality[name])] for name in names if name in quality]
    return Table(["sample quality", ""], rows)


def _short(entry: Any) -> str:
    return f"{entry:.5g}" if isinstance(entry, float) else str(entry)


def status(contents: Contents) -> str:
    """How far a run is, in a sentence; empty for a directory without a training."""
    if contents.source:
        return "an imported network, which was not trained here"
    step, sessions = contents.step, contents.sessions
    total = contents.settings.get("train.num_steps")
    if step is None:
        return "the training has not logged a step yet" if sessions else ""
    of = f" of {total:,}" if isinstance(total, int) else ""
    text = f"step {step:,}{of}"
    if sessions and "outcome" not in sessions[-1]:
        return f"{text}; the last session has no recorded end: it is running, or was killed"
    if sessions and sessions[-1]["outcome"] != "finished":
        return f"{text}; the last session ended by {sessions[-1]['outcome']}"
    return text


def evaluations(contents: Contents) -> Table:
    """Every evaluation that the directory keeps, in the order of time."""
    head = ["split", "T", "Σ_θ", "step", "bits/dim", "± over examples", "± over noise", "time"]
    by_time = sorted(contents.evaluations.values(), key=_time)
    rows = [
        [
            each.split,
            f"{each.num_timesteps:,}",
            _sigma(each),
            f"{each.step:,}",
            bits(each.bits_per_dim),
            bits(each.bits_per_dim_se),
            bits(each.bits_per_dim_mc_se),
            _time(each),
        ]
        for each in by_time
    ]
    return Table(head, rows)


def _sigma(evaluation: Evaluation) -> str:
    settings = evaluation.record.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    return str(settings.get("evaluate.variance") or settings.get("model.variance") or NOTHING)


def _time(evaluation: Evaluation) -> str:
    environment = evaluation.record.get("environment")
    return _clock(environment.get("time") if isinstance(environment, dict) else None)


def _clock(time: Any) -> str:
    """An ISO time in UTC as date and minutes."""
    return str(time)[:16].replace("T", " ") if time else NOTHING


def settings(contents: Contents) -> Table:
    """The settings that differ from the defaults."""
    rows = [[name, value(now), value(default)] for name, now, default in contents.changed]
    return Table(["setting", "value", "default"], rows)


def sessions(contents: Contents) -> Table:
    """When the training ran, on what, and how it ended."""
    head = ["started (UTC)", "from step", "took", "ended", "devices", "versions", "commit"]
    rows = [
        [
            _clock(each.get("time")),
            str(each.get("step", NOTHING)),
            duration(each.get("seconds")),
            str(each.get("outcome", "no recorded end")),
            _devices(each),
            _versions(each),
            _commit(each),
        ]
        for each in contents.sessions
    ]
    return Table(head, rows)


def _devices(session: Mapping[str, Any]) -> str:
    processes = session.get("num_processes", 1)
    text = f"{session.get('num_devices', '?')} × {session.get('device', '?')}"
    return text if processes == 1 else f"{text}, {processes} processes"


def _versions(session: Mapping[str, Any]) -> str:
    names = ("python", "jax", "jaxlib", "flax", "numpy")
    return ", ".join(f"{name} {session[name]}" for name in names if name in session)


def _commit(session: Mapping[str, Any]) -> str:
    commit = session.get("commit")
    changed = " with changes" if session.get("is_changed") else ""
    return f"{str(commit)[:10]}{changed}" if commit else NOTHING


def facts(contents: Contents) -> Table:
    """Data, parameters, total time, speed, and where an imported network is from."""
    rows = []
    if contents.data:
        shape = contents.data.get("image_shape")
        shape = " × ".join(map(str, shape)) if isinstance(shape, list) else "?"
        count, name = contents.data.get("num_examples", "?"), contents.settings.get("data.name", "")
        rows.append(["training data", f"{name}: {count} images of {shape}"])
    rows += [[f"imported: {name}", value(entry)] for name, entry in contents.source.items()]
    rows += [[f"parts for {name}", value(entry)] for name, entry in contents.parts.items()]
    if contents.sessions:
        parameters = number(contents.sessions[-1].get("num_parameters"))
        rows.append(["parameters", NOTHING if parameters is None else f"{parameters:,.0f}"])
        rows.append(["training time", training_time(contents)])
        rows.append(["sessions", str(len(contents.sessions))])
    rows.append(["directory", str(contents.path)])
    return Table(["", ""], rows)


def training_time(contents: Contents) -> str:
    """The sum of the sessions; at least that of those whose end is recorded."""
    seconds = [s["seconds"] for s in contents.sessions if s.get("seconds") is not None]
    if not seconds:
        return NOTHING
    unknown = len(contents.sessions) - len(seconds)
    return f"{'more than ' if unknown else ''}{duration(sum(seconds))}"


def duration(seconds: float | None) -> str:
    """Seconds for people."""
    if seconds is None:
        return NOTHING
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def side_by_side(runs: Sequence[Contents]) -> Table:
    """The results of several runs; a column that no run fills is left out."""
    head = ["run", "bits/dim", "± over examples", "± over noise", "prior", "diffusion"]
    head += ["reconstruction", "on", "T", "at step", "trained to", "validation", "images/s", "time"]
    columns = zip(head, *map(_row, runs), strict=True)
    head, *rows = zip(*(c for c in columns if set(c[1:]) != {NOTHING}), strict=True)
    return Table(list(head), list(map(list, rows)))


def _row(run: Contents) -> list[str]:
    evaluation = run.evaluation
    measured = [NOTHING] * 9
    if evaluation is not None:
        errors = evaluation.bits_per_dim_se, evaluation.bits_per_dim_mc_se
        measured = [bits(v) for v in (evaluation.bits_per_dim, *errors)]
        measured += [bits(part) for part in evaluation.parts.values()]
        measured += [f"{evaluation.num_examples} {evaluation.split}", str(evaluation.num_timesteps)]
        measured.append(f"{evaluation.step:,}")
    nothing = (None, [])
    validation = run.curves.get("validation_bits_per_dim", nothing)[1]
    speed = run.curves.get("images_per_second", nothing)[1]
    return [
        run.name,
        *measured,
        NOTHING if run.step is None else f"{run.step:,}",
        bits(min(validation)) if len(validation) else NOTHING,
        f"{np.median(speed):,.0f}" if len(speed) else NOTHING,
        training_time(run),
    ]
