"""The command line of `main.py`: the default config, and one line for each mistake.

Nothing here imports JAX, so that help and most mistakes are on the screen at once.
"""

import logging
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from configs import recorded
from configs.base import SETTINGS
from configs.settings import listing
from configs.settings.declaration import Setting, Tuple, suggestion
from experiments.harness.errors import ConfigError, in_short

EXPERIMENTS = ("all", "train", "evaluate", "sample", "variance", "sigma", "spacing")
_ROOT = Path(__file__).parents[2]


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags. Chooses a config if --config is missing; exits at a wrong flag."""
    if {"--helpconfig", "-helpconfig"} & set(argv):
        print(listing.table(SETTINGS))
        raise SystemExit(0)
    defaults = {"config": _default_config(argv), "verbosity": "-1"}  # warnings and worse
    missing = [f"--{k}={v}" for k, v in defaults.items() if _flag_value(argv, k) is None]
    argv = [argv[0], *missing, *argv[1:]]
    config = _flag_value(argv, "config") or ""
    logging.disable(logging.WARNING)
    try:
        _check_is_file(config)
        rest = flags.FLAGS(argv)
        _check_is_config(config)
        _check_tuples(argv)
    except ConfigError as error:
        raise SystemExit(_fail(error)) from error
    except Exception as error:
        raise SystemExit(_fail(_line(error, argv, config))) from error
    logging.disable(logging.NOTSET)
    return rest


def _fail(message: object) -> int:
    """Prints one line to standard error; the exit status of a mistake."""
    print(f"error: {message}", file=sys.stderr)
    return 2


def _line(error: Exception, argv: list[str], config: str) -> str:
    """An error line for an exception in the parsing of flags."""
    path = Path(config.partition(":")[0]).resolve()
    chain = list(_chain(error))
    for cause in chain:
        if isinstance(cause, SyntaxError):
            return f"--config={config}: {cause.filename}, line {cause.lineno}: {cause.msg}"
        for frame in reversed(traceback.extract_tb(cause.__traceback__)):
            if Path(frame.filename).resolve() == path:
                text = in_short(cause).partition(". Other fields present")[0]
                return f"--config={config}: line {frame.lineno}: {text}"
    value = flags.FLAGS["config"].value
    if value is not None and not isinstance(value, ConfigDict):
        return _no_config(config, value)
    message = str(error)
    if "parsing config file" in message or "get_config" in message:
        return f"--config={config}: {in_short(chain[-1])}"
    for name, text in _overrides(argv):
        setting = _SETTINGS.get(name)
        if setting is None and isinstance(error, AttributeError | KeyError):
            if not any(other.startswith(f"{name}.") for other in _SETTINGS):
                hint = suggestion(name, _SETTINGS, cutoff=0.5)
                return f"--config.{name} is no setting{hint and f'; did you mean --config.{hint}?'}"
        elif setting and message.startswith(f"flag --config.{name}={text}:"):
            return f"--config.{name}={text}; it must be {setting.kind.describe()}"
    return " ".join(message.split())


_SETTINGS: dict[str, Setting] = dict(SETTINGS.flat())


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _overrides(argv: list[str]) -> Iterator[tuple[str, str]]:
    """The names and texts of the overrides, such as ("train.batch_size", "64")."""
    for position, argument in enumerate(argv):
        match = re.fullmatch(r"--?(?:no)?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if match:
            following = argv[position + 1] if position + 1 < len(argv) else ""
            yield match[1], following if match[2] is None else match[2]


def _check_tuples(argv: list[str]) -> None:
    """Raises ConfigError for a number in place of a tuple: ml_collections would wrap it."""
    for name, text in _overrides(argv):
        setting = _SETTINGS.get(name)
        if setting and isinstance(setting.kind, Tuple) and re.fullmatch(r"[-+.\d]+\w*", text):
            raise ConfigError(
                f"--config.{name}={text}; it must be {setting.kind.describe()}; write '({text},)'"
            )


def _check_is_config(config: str) -> None:
    """Raises ConfigError unless the config file returned a config."""
    value = flags.FLAGS["config"].value
    if not isinstance(value, ConfigDict):
        raise ConfigError(_no_config(config, value))


def _no_config(config: str, value: object) -> str:
    kind = type(value).__name__
    return f"--config={config}: get_config() returns a {kind}; it must return a ConfigDict"


def _default_config(argv: list[str]) -> str:
    """The work directory's own config where it holds a run, else the digits."""
    workdir = _flag_value(argv, "workdir")
    try:
        recorded.get_config(workdir or "")
    except (OSError, ValueError):  # none, or damaged, which the experiment reports
        return f"{_ROOT}/configs/digits.py"
    except Exception:  # reported by the parsing
        pass
    return f"{_ROOT}/configs/recorded.py:{workdir}"


def _flag_value(argv: list[str], name: str) -> str | None:
    """A flag's value, given as --name=value or as --name value."""
    for position, argument in enumerate(argv):
        match = re.fullmatch(rf"--?{name}(?:=(.*))?", argument, re.DOTALL)
        if match and match[1] is not None:
            return match[1]
        if match and position + 1 < len(argv):
            return argv[position + 1]
    return None


def _check_is_file(config: str) -> None:
    """Raises ConfigError unless the part of --config before a colon is a file."""
    if not Path(config.partition(":")[0]).is_file():
        names = sorted(f"configs/{p.name}" for p in (_ROOT / "configs").glob("[!_]*.py"))
        raise ConfigError(f"--config={config} is no file; known: {', '.join(names)}")
