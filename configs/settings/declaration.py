"""The types that settings are declared with; `training.py` and `results.py` declare them.

A declaration holds the default, the kind of value with its range or choices, and one line of help.
Checks, error lines, `--helpconfig` and `docs/settings.md` are all made from it. Nothing here
imports JAX.
"""

import dataclasses
import difflib
import functools
import importlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

LONGEST = 80  # characters of a value that an error line shows


class Kind(Protocol):
    """A set of permitted values."""

    def describe(self) -> str:
        """The permitted values in a few words, such as "a whole number, at least 1"."""

    def problem(self, value: Any) -> str | None:
        """None for a permitted value; else the end of an error line that begins with the value."""


@dataclasses.dataclass(frozen=True)
class Int:
    """Whole numbers in an interval, such as "[1, inf)". A bool or a float is none."""

    interval: str

    def describe(self) -> str:
        return f"a whole number{_in_words(self.interval)}"

    def problem(self, value: Any) -> str | None:
        is_int = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, float) and value.is_integer() and _is_in(value, self.interval):
            return f"{_must_be(self)}; write {int(value)}"
        return None if is_int and _is_in(value, self.interval) else _must_be(self)


@dataclasses.dataclass(frozen=True)
class Float:
    """Finite numbers in an interval, such as "[0, 1)". Whole numbers are permitted, a bool is not.

    An interval that is closed at "inf" or "-inf" permits infinity. NaN is never permitted.
    """

    interval: str = "(-inf, inf)"

    def describe(self) -> str:
        finite = "finite " if "inf)" in self.interval or "(-inf" in self.interval else ""
        return f"a {finite}number{_in_words(self.interval)}"

    def problem(self, value: Any) -> str | None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if is_number and _is_in(value, self.interval) else _must_be(self)


@dataclasses.dataclass(frozen=True)
class Bool:
    """True or False."""

    def describe(self) -> str:
        return "True or False"

    def problem(self, value: Any) -> str | None:
        return None if isinstance(value, bool) else _must_be(self)


@dataclasses.dataclass(frozen=True)
class Text:
    """Any text."""

    def describe(self) -> str:
        return "text"

    def problem(self, value: Any) -> str | None:
        return None if isinstance(value, str) else _must_be(self)


class Choice:
    """One of several names or numbers.

    Args:
      entries: names or numbers; a text "package.module:REGISTRY" stands for all names that are in
        that registry at the time of the check. The module is imported only then.
    """

    def __init__(self, *entries: str | int):
        self.entries = entries

    def choices(self) -> list[str | int]:
        """All permitted values."""
        choices = []
        for entry in self.entries:
            names = registry(entry)
            choices += [entry] if names is None else names
        return choices

    def describe(self) -> str:
        return "one of " + ", ".join(str(name) or "''" for name in self.choices())

    def problem(self, value: Any) -> str | None:
        choices = self.choices()
        if value in choices and not isinstance(value, bool | float):
            return None
        return unknown(value, choices)


@dataclasses.dataclass(frozen=True)
class Name:
    """Full names of settings, such as "train.beta2", and of groups with a dot, such as "train."."""

    def describe(self) -> str:
        return "the name of a setting, or of a group with a dot"

    def problem(self, value: Any) -> str | None:
        settings = [name for name, _ in importlib.import_module("configs.base").SETTINGS.flat()]
        is_group = str(value).endswith(".") and any(s.startswith(str(value)) for s in settings)
        if value in settings or is_group:
            return None
        hint = suggestion(str(value), settings)
        return f" is no setting{hint and f'; did you mean {hint}?'}"


@dataclasses.dataclass(frozen=True)
class Tuple:
    """Tuples of any length with entries of one kind.

    Attributes:
      element: the kind of each entry.
      min_length: the fewest entries.
      distinct: whether no entry may occur twice.
    """

    element: Kind
    min_length: int = 0
    distinct: bool = False

    def describe(self) -> str:
        least = f" of at least {self.min_length}" if self.min_length else ""
        distinct = ", all different" if self.distinct else ""
        return f"a tuple{least}{distinct}; each entry {self.element.describe()}"

    def problem(self, value: Any) -> str | None:
        if not isinstance(value, tuple) or len(value) < self.min_length:
            return _must_be(self)
        for entry in value:
            problem = self.element.problem(entry)
            if problem:
                return f": entry {shown(entry)}{problem}"
        if self.distinct and len(set(value)) < len(value):
            return _must_be(self)
        return None


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of a study: a tuple of (axis, values).

    The values are a tuple of values of the setting that names the axis, or a dictionary from a
    value's name to settings: ("objective", {"bound": {"train.objective": "vlb"}, …}). Only this
    form is checked here; `experiments/harness/study/axes.py` checks names and values of settings.
    """

    def describe(self) -> str:
        return (
            "a tuple of (setting, (value, …)) or (axis, {value's name: {setting: value, …}, …}), "
            "with different names"
        )

    def problem(self, value: Any) -> str | None:
        if not isinstance(value, tuple) or not all(_is_axis(entry) for entry in value):
            return _must_be(self)
        names = [name for name, _ in value]
        return None if len(set(names)) == len(names) else _must_be(self)


def _is_axis(entry: Any) -> bool:
    """Whether an entry is a name with a tuple, or with a dictionary of dictionaries."""
    if not isinstance(entry, tuple) or len(entry) != 2 or not isinstance(entry[0], str):
        return False
    name, values = entry
    if isinstance(values, dict):
        is_named = all(isinstance(key, str) and key for key in values)
        return bool(name) and is_named and all(isinstance(v, dict) for v in values.values())
    return bool(name) and isinstance(values, tuple)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting: its default, the kind of value that it takes, and one line of help."""

    default: Any
    kind: Kind
    help: str


class Group:
    """Settings and groups by name, with one line of help.

    A group "linear_beta" beside a setting "name" holds the options of that choice.
    """

    def __init__(self, help: str = "", /, **members: "Setting | Group"):
        self.help, self.members = help, members

    def defaults(self) -> dict[str, Any]:
        """The defaults as nested dictionaries."""
        return {
            name: member.defaults() if isinstance(member, Group) else member.default
            for name, member in self.members.items()
        }

    def flat(self, prefix: str = "") -> Iterator[tuple[str, Setting]]:
        """Every setting with its full name, such as "train.batch_size"."""
        for name, member in self.members.items():
            if isinstance(member, Group):
                yield from member.flat(f"{prefix}{name}.")
            else:
                yield prefix + name, member


def problems(config: Mapping[str, Any], group: Group, prefix: str = "") -> Iterator[str]:
    """An error line for each setting that differs from its declaration.

    A choice may have been registered at run time, with an options group of its name or without. Of
    such a group, which is not declared, only the numbers are checked: they must be finite.

    Args:
      config: nested mappings of settings.
      group: the declaration.
      prefix: the full name of the group with a dot, or empty.
    """
    for name in group.members:
        if name not in config:
            yield f"config.{prefix}{name} is missing; configs/base.py declares it"
    for name, value in config.items():
        member, full = group.members.get(name), f"config.{prefix}{name}"
        if isinstance(member, Setting):
            problem = member.kind.problem(value)
            if problem:
                yield f"{full} = {shown(value)}{problem}"
        elif isinstance(member, Group):
            if isinstance(value, Mapping) or hasattr(value, "items"):
                yield from problems(value, member, f"{prefix}{name}.")
            else:
                yield f"{full} = {shown(value)}; it must be a group of settings"
        elif name in _choices(group):
            for path, number in _numbers(value, full):
                if not math.isfinite(number):
                    yield f"{path} = {number}; it must be a finite number"
        else:
            hint = suggestion(name, group.members)
            yield f"{full} is no setting{hint and f'; did you mean config.{prefix}{hint}?'}"


def undeclared(config: Mapping[str, Any], group: Group, prefix: str = "") -> Iterator[str]:
    """The full names of settings and groups that no declaration has.

    The options of a registered choice are left out, as in `problems`, which has the same arguments.
    """
    for name, value in config.items():
        member = group.members.get(name)
        if isinstance(member, Group) and hasattr(value, "items"):
            yield from undeclared(value, member, f"{prefix}{name}.")
        elif member is None and name not in _choices(group):
            yield prefix + name


def registry(entry: str | int) -> Any:
    """The registry that "package.module:REGISTRY" names; None for any other entry of a choice."""
    module, colon, name = str(entry).partition(":")
    return getattr(importlib.import_module(module), name) if colon else None


def value_of(config: Any, name: str) -> Any:
    """The value of a setting, such as "train.beta2"."""
    return functools.reduce(getattr, name.split("."), config)


def unknown(value: Any, choices: Iterable[Any]) -> str:
    """The end of an error line for a value that is none of the choices."""
    choices = [str(choice) or "''" for choice in choices]
    hint = suggestion(str(value), choices)
    return f" is unknown; known: {', '.join(choices)}{hint and f'; did you mean {hint}?'}"


def suggestion(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """The name that a misspelt one resembles most; empty where it resembles none."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)), "")


def shown(value: Any) -> str:
    """A value on one line, shortened."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no whole number of more than 4300 digits
        text = "a value with a number of thousands of digits"
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _must_be(kind: Kind) -> str:
    return f"; it must be {kind.describe()}"


def _choices(group: Group) -> set[str | int]:
    """Every name that a setting of this group can choose."""
    kinds = [member.kind for member in group.members.values() if isinstance(member, Setting)]
    kinds = [kind.element if isinstance(kind, Tuple) else kind for kind in kinds]
    return {name for kind in kinds if isinstance(kind, Choice) for name in kind.choices()}


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    """Every float in a group or tuple, with the path to it."""
    if isinstance(value, float):
        yield path, value
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from _numbers(entry, path)
    elif hasattr(value, "items"):
        for name, entry in value.items():
            yield from _numbers(entry, f"{path}.{name}")


def _is_in(value: float, interval: str) -> bool:
    """Whether a number lies in an interval; NaN lies in none."""
    low, high = (_number(end) for end in interval[1:-1].split(","))
    is_above = low <= value if interval[0] == "[" else low < value
    return is_above and (value <= high if interval[-1] == "]" else value < high)


def _number(text: str) -> float:
    base, _, power = text.strip().partition("^")
    return int(base) ** int(power) if power else float(base)


def _in_words(interval: str) -> str:
    """An interval after "a number": ", at least 1" or " in [0, 1)"."""
    low, high = (end.strip() for end in interval[1:-1].split(","))
    if "inf" in low and "inf" in high:
        return ""
    if "inf" in high:
        return f", at least {low}" if interval[0] == "[" else f" above {low}"
    if "inf" in low:
        return f", at most {high}" if interval[-1] == "]" else f" below {high}"
    return f" in {interval}"


POSITIVE, NOT_NEGATIVE = Float("(0, inf)"), Float("[0, inf)")
COUNT, COUNT_OR_NONE = Int("[1, 10^9]"), Int("[0, 10^9]")
STEPS, STEPS_OR_NONE = Int("[1, 10^12]"), Int("[0, 10^12]")
LEVELS = Int("[1, 10^7]")
"""Noise levels: a table of 80 MB at most."""
