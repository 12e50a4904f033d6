"""Several runs side by side: the settings that differ, and paired differences of their bounds."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from experiments.harness.reports.contents import Contents, Evaluation
from experiments.harness.workdir.dependences import GROUPS, is_named


class Difference(NamedTuple):
    """The bound of a run minus that of the first, on the same examples.

    Attributes:
      name: the run.
      value: the mean difference in bits/dim; None if the two cannot be paired.
      se: its standard error over examples; None for a single example.
      remark: why they are not paired, or how their noise differs; empty if it is the same.
    """

    name: str
    value: float | None
    se: float | None
    remark: str


def differences(contents: Sequence[Contents]) -> tuple[str, list[Difference]]:
    """Each run's bound minus that of the first with an evaluation; and the name of that one.

    Both are empty if fewer than two runs have an evaluation.
    """
    measured = [each for each in contents if each.evaluation is not None]
    if len(measured) < 2:
        return "", []
    first = measured[0]
    return first.name, [difference(first, other) for other in contents if other is not first]


def difference(first: Contents, other: Contents) -> Difference:
    """The mean over examples of the difference of two bounds, paired by example."""
    remark = _obstacle(first, other)
    if remark:
        return Difference(other.name, None, None, remark)
    values = other.arrays.per_example - first.arrays.per_example
    n = len(values)
    se = float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    noise = _different_noise(first.evaluation, other.evaluation)
    remark = f"the noise is not the same: {noise}" if noise else ""
    return Difference(other.name, float(values.mean()), se, remark)


def _obstacle(first: Contents, other: Contents) -> str:
    """Why two bounds cannot be compared example by example; empty if they can."""
    for each in (first, other):
        if each.evaluation is None or each.arrays is None:
            return f"{each.name} has no evaluation with its arrays"
    a, b = first.evaluation, other.evaluation
    if a.split != b.split:
        return f"another split: {a.split} and {b.split}"
    if labels := _differing(_labels(a), _labels(b)):
        return f"only one of the bounds is given the labels ({labels})"
    if data := _differing(_data(a), _data(b)):
        return f"other data: {data}"
    counts = [each.num_examples for each in (a, b)]
    lengths = [len(each.arrays.per_example) for each in (first, other)]
    if len({*counts, *lengths}) > 1:
        return f"another number of examples: {counts[0]} and {counts[1]}"
    return ""


def _labels(evaluation: Evaluation) -> dict[str, Any]:
    return {"evaluate.labels": bool(_mapping(evaluation, "settings").get("evaluate.labels"))}


def _data(evaluation: Evaluation) -> dict[str, Any]:
    """What says which examples a split has: settings, and the fingerprint of its files."""
    settings, files = (_mapping(evaluation, name) for name in ("settings", "files"))
    groups = (*GROUPS["data set"], *GROUPS["images"])
    chosen = {name: value for name, value in settings.items() if is_named(name, groups)}
    fingerprint = f"data of {evaluation.split}"
    return chosen | {fingerprint: files.get(fingerprint)}


def _different_noise(a: Evaluation, b: Evaluation) -> str:
    """The noise of an example at t is a function of (seed, example, t): what differs of these."""
    return _differing(
        *(
            {
                "seed": e.record.get("seed"),
                "T": e.num_timesteps,
                "evaluate.target": _mapping(e, "settings").get("evaluate.target"),
            }
            for e in (a, b)
        )
    )


def _mapping(evaluation: Evaluation, name: str) -> Mapping[str, Any]:
    value = evaluation.record.get(name)
    return value if isinstance(value, dict) else {}


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    names = [name for name in one | other if one.get(name) != other.get(name)]
    return "; ".join(f"{name} {one.get(name)} and {other.get(name)}" for name in names)


def differing_settings(contents: Sequence[Contents]) -> list[tuple[str, list[Any]]]:
    """The settings that are not the same in all runs, with the value of each; None where absent."""
    with_settings = [each.settings for each in contents if each.settings]
    names = sorted({name for settings in with_settings for name in settings})
    return [
        (name, [each.settings.get(name) for each in contents])
        for name in names
        if any(s.get(name) != with_settings[0].get(name) for s in with_settings[1:])
    ]


def distinct_names(paths: Sequence[epath.Path]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    resolved = [os.fspath(path).rstrip("/").split("/") for path in paths]
    for length in range(1, max(map(len, resolved), default=1) + 1):
        names = ["/".join(parts[-length:]) for parts in resolved]
        if len(set(names)) == len(names):
            return names
    return ["/".join(parts) for parts in resolved]
