"""What a work directory holds, as values; nothing is computed that it does not hold."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from configs.base import SETTINGS
from experiments.harness.reports.reading import Picture, Reader, number, required, vector
from experiments.harness.workdir import record, sessions
from experiments.harness.workdir.dependences import EVALUATION
from experiments.harness.workdir.metrics import METRICS_FILE
from experiments.harness.workdir.parts import PARTS_FILE
from experiments.harness.workdir.provenance import flatten

STUDY_FILE = "ablation.json"
CELLS = "cells"  # the directory of a study's runs
_SHOWN = 4  # pictures of samples during training

Curve = tuple[np.ndarray, np.ndarray]
"""Training steps and the values at these steps."""


class Evaluation(NamedTuple):
    """The bound of a split, in bits/dim. Errors that are not known are None.

    Attributes:
      split: the split.
      bits_per_dim: the mean over examples.
      bits_per_dim_se: its standard error over examples.
      bits_per_dim_mc_se: its standard error over noise.
      parts: prior, diffusion and reconstruction.
      num_examples: the number of examples.
      num_timesteps: T.
      step: the step of the checkpoint.
      record: the file's content.
    """

    split: str
    bits_per_dim: float
    bits_per_dim_se: float | None
    bits_per_dim_mc_se: float | None
    parts: dict[str, float]
    num_examples: int
    num_timesteps: int
    step: int
    record: Mapping[str, Any]


class Arrays(NamedTuple):
    """The bound by timestep and by example.

    Attributes:
      log_snr: at t = 1 … T.
      kl: at t = 2 … T, in bits/dim.
      kl_se: its standard error; None if unknown.
      rmse: of x̂_0(x_t) at t = 1 … T, in grey levels.
      per_example: the bound of each example, in bits/dim.
    """

    log_snr: np.ndarray
    kl: np.ndarray
    kl_se: np.ndarray | None
    rmse: np.ndarray
    per_example: np.ndarray


class Document(NamedTuple):
    """A table or text of an experiment, as Markdown, with the plots of the same name.

    Attributes:
      name: the file's name without its ending, such as sigma.
      text: Markdown; None if there is only a plot.
      plot: the plot; None if there is none.
    """

    name: str
    text: str | None
    plot: Picture | None


class Contents(NamedTuple):
    """What a directory holds. Missing and damaged parts are None or empty.

    Attributes:
      path: the directory.
      name: its name in the page.
      settings: of config.json, flat.
      changed: the settings that differ from the defaults: name, value, default.
      config_changes: (step, changes) of a resumed run's settings.
      curves: the training's curves by the names in metrics.jsonl.
      sessions: the sessions of training, each as its two lines merged.
      data, source, parts: the content of data.json, import.json and parts.json.
      evaluation: that of the settings in config.json.
      arrays: its arrays.
      evaluations: all that are kept, by the name of their file.
      documents: tables and plots of the other experiments.
      samples: pictures by the name of their file in samples/, without ending.
      progress: pictures of samples during training, by step.
      problems: a line for each file that is damaged.
    """

    path: epath.Path
    name: str
    settings: dict[str, Any]
    changed: list[tuple[str, Any, Any]]
    config_changes: list[tuple[int, list[str]]]
    curves: dict[str, Curve]
    sessions: list[dict[str, Any]]
    data: dict[str, Any]
    source: dict[str, Any]
    parts: dict[str, Any]
    evaluation: Evaluation | None
    arrays: Arrays | None
    evaluations: dict[str, Evaluation]
    documents: list[Document]
    samples: dict[str, Picture]
    progress: dict[int, Picture]
    problems: list[str]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        numbers = (self.settings, self.curves, self.evaluation, self.evaluations, self.problems)
        return not any((*numbers, self.documents, self.samples, self.progress, self.sessions))

    @property
    def is_study(self) -> bool:
        """Whether it holds a study, whose cells are work directories of their own."""
        return (self.path / STUDY_FILE).exists() or (self.path / CELLS).is_dir()

    @property
    def step(self) -> int | None:
        """The last step in the log."""
        return max((int(steps[-1]) for steps, _ in self.curves.values()), default=None)


def read_contents(directory: epath.PathLike, name: str | None = None) -> Contents:
    """Reads a directory that may be anything: a finished run, one in training, or none.

    Args:
      directory: the directory.
      name: its name in the page; by default its last part.
    """
    path = epath.Path(directory)
    reader = Reader(path)
    settings = reader.parsed(record.CONFIG_FILE, flatten) or {}
    evaluation, arrays = _main_evaluation(reader)
    evaluations = {
        file: reader.parsed(file, parse_evaluation)
        for file in reader.names(f"{record.EVALUATIONS}/*.json")
    }
    return Contents(
        path=path,
        name=name or path.resolve().name,
        settings=settings,
        changed=list(_changed(settings)),
        config_changes=_config_changes(reader),
        curves=curves(reader.lines(METRICS_FILE)),
        sessions=_sessions(reader.lines(sessions.SESSIONS_FILE)),
        data=reader.parsed(record.DATA_FILE, dict) or {},
        source=reader.parsed(record.IMPORT_FILE, dict) or {},
        parts=reader.parsed(PARTS_FILE, dict) or {},
        evaluation=evaluation,
        arrays=arrays,
        evaluations={file: kept for file, kept in evaluations.items() if kept is not None},
        documents=_documents(reader),
        samples=_samples(reader),
        progress=_progress(reader),
        problems=reader.problems,
    )


def curves(lines: list[dict[str, Any]]) -> dict[str, Curve]:
    """The numbers of the lines of metrics.jsonl by name, in the order of their steps."""
    points = {}
    for line in lines:
        if (step := number(line.get("step"))) is not None:
            for name, entry in line.items():
                if name != "step" and (value := number(entry)) is not None:
                    points.setdefault(name, {})[int(step)] = value
    return {
        name: (np.array(sorted(values)), np.array([values[step] for step in sorted(values)]))
        for name, values in points.items()
    }


def _main_evaluation(reader: Reader) -> tuple[Evaluation | None, Arrays | None]:
    """The evaluation in evaluation.json, and its arrays if they belong to it."""
    name = EVALUATION.removesuffix(".json") + ".npz"
    evaluation = reader.parsed(EVALUATION, parse_evaluation)
    arrays = reader.parsed(name, _parse_arrays)
    if evaluation is not None and arrays is not None:
        mean, bits = arrays.per_example.mean(), evaluation.bits_per_dim
        if len(arrays.per_example) == evaluation.num_examples and np.isclose(mean, bits, 1e-6):
            return evaluation, arrays
        reader.problems.append(f"{reader.directory / name} is of another evaluation; left out")
    return evaluation, None


def parse_evaluation(saved: Mapping[str, Any]) -> Evaluation:
    """An evaluation from its file; raises an error of a missing or wrong entry."""
    return Evaluation(
        split=str(saved["split"]),
        bits_per_dim=required(saved, "bits_per_dim"),
        bits_per_dim_se=number(saved["bits_per_dim_se"]),
        bits_per_dim_mc_se=number(saved["bits_per_dim_mc_se"]),
        parts={n: required(saved, n) for n in ("prior", "diffusion", "reconstruction")},
        num_examples=int(required(saved, "num_examples")),
        num_timesteps=int(required(saved, "num_timesteps")),
        step=int(required(saved, "step")),
        record=saved,
    )


def _parse_arrays(saved: Mapping[str, np.ndarray]) -> Arrays:
    log_snr, kl, rmse = (vector(saved, name) for name in ("log_snr", "kl", "x_0_rmse"))
    kl_se = vector(saved, "kl_se") if "kl_se" in saved else kl
    if not len(log_snr) == len(rmse) == len(kl) + 1 == len(kl_se) + 1:
        raise ValueError("the lengths of its arrays do not fit each other")
    per_example = vector(saved, "bits_per_dim_per_example")
    return Arrays(log_snr, kl, kl_se if "kl_se" in saved else None, rmse, per_example)


def _changed(settings: Mapping[str, Any]):
    """The settings that differ from the defaults; a setting of a part has no default."""
    defaults = flatten(SETTINGS.defaults())
    for name, value in sorted(settings.items()):
        if name not in defaults or value != defaults[name]:
            yield name, value, defaults.get(name)


def _config_changes(reader: Reader) -> list[tuple[int, list[str]]]:
    changes = []
    for line in reader.lines(record.CHANGES_FILE):
        if (step := number(line.get("step"))) is not None and isinstance(line.get("changes"), list):
            changes.append((int(step), [str(change) for change in line["changes"]]))
    return changes


def _sessions(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each session's first line, with the seconds and the outcome of its last one, if it ended."""
    sessions = []
    for line in lines:
        if line.get("event") == "start":
            sessions.append(dict(line))
        elif sessions and line.get("event") == "end" and "outcome" not in sessions[-1]:
            ended = {"outcome": line.get("outcome"), "seconds": number(line.get("seconds"))}
            sessions[-1] |= ended | {"ended": line.get("time")}
    return sessions


def _documents(reader: Reader) -> list[Document]:
    """Tables and plots that experiments left: in the directory, in samples/ and compressed/."""
    documents = {}
    for pattern in ("*.md", "samples/*.md", "compressed/*.md"):
        for file in reader.names(pattern):
            documents[file.removesuffix(".md")] = reader.text(file)
    for file in reader.names("*.png"):
        documents.setdefault(file.removesuffix(".png"))
    return [Document(name, text, reader.picture(f"{name}.png")) for name, text in documents.items()]


def _samples(reader: Reader) -> dict[str, Picture]:
    """The pictures in samples/ that are neither of the training nor beside a table."""
    stems = [file.removesuffix(".png") for file in reader.names("samples/*.png")]
    tables = {file.removesuffix(".md") for file in reader.names("samples/*.md")}
    pictures = {
        stem.partition("/")[2]: reader.picture(f"{stem}.png")
        for stem in stems
        if stem not in tables and not stem.startswith("samples/step_")
    }
    return {name: picture for name, picture in pictures.items() if picture is not None}


def _progress(reader: Reader) -> dict[int, Picture]:
    """Some pictures of samples during training, the first and the last among them."""
    names = reader.names("samples/step_*.png")
    chosen = sorted(set(np.linspace(0, len(names) - 1, _SHOWN).round().astype(int)))
    pictures = {}
    for name in (names[i] for i in chosen if names):
        step = name.removesuffix(".png").rpartition("_")[2]
        if step.isdigit() and (picture := reader.picture(name)) is not None:
            pictures[int(step)] = picture
    return pictures
