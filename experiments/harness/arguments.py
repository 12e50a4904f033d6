"""The command line of `main.py`: the default config, and one line for each mistake.

Nothing here imports JAX, so that help and most mistakes are on the screen at once.
"""

import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from decimal import Decimal
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from configs import recorded
from configs.base import SETTINGS
from configs.settings import listing
from configs.settings.declaration import Int, Setting, Tuple, suggestion
from experiments.harness import paths
from experiments.harness.errors import ConfigError, in_short, one_line

EXPERIMENTS = (
    "all",
    "train",
    "evaluate",
    "sample",
    "variance",
    "sigma",
    "spacing",
    "compress",
    "ablate",
    "report",
    "import",
    "export",
)
_ROOT = Path(__file__).parents[2]


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags. Chooses a config if --config is missing; exits at a wrong flag."""
    # An output without ± or a name's bytes, such as a pipe in ASCII, gets \\xb1 in their place.
    if isinstance(sys.stdout, io.TextIOWrapper):  # None where it is closed
        sys.stdout.reconfigure(errors="backslashreplace")
    if {"--helpconfig", "-helpconfig"} & set(argv):
        print(listing.table(SETTINGS))
        raise SystemExit(0)
    logging.disable(logging.WARNING)
    config = ""
    try:
        argv = _completed(argv)
        config = _flag_value(argv, "config")
        flags.FLAGS.set_gnu_getopt()  # flags may follow the further directories of a report
        rest = flags.FLAGS(argv)
        _check_is_config(config)
        _check_tuples(argv)
    except ConfigError as error:
        raise SystemExit(_fail(error)) from error
    except SystemExit as error:  # of --help, or of a config file
        if line := _line_in_file(error, config):
            raise SystemExit(_fail(line)) from error
        raise
    except BrokenPipeError:  # the reader of --help has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except Exception as error:
        raise SystemExit(_fail(_line(error, argv, config))) from error
    logging.disable(logging.NOTSET)
    return rest


def _fail(message: object) -> int:
    """Prints one line to standard error; the exit status of a mistake."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    return 2


def _completed(argv: list[str]) -> list[str]:
    """The arguments with default flags, full paths, and 10000 in place of 1e4.

    Raises:
      ConfigError: if a path cannot be used.
    """
    workdir, config = _flag_value(argv, "workdir"), _flag_value(argv, "config")
    settled = {"verbosity": _flag_value(argv, "verbosity") or "-1"}  # warnings and worse
    if workdir:
        workdir = settled["workdir"] = paths.expanded(workdir, "--workdir")
    settled["config"] = _default_config(workdir) if config is None else _config_path(config)
    rest = argv[:]
    for name, _, places in [*_flags_with_values(argv)][::-1]:
        if name in settled:
            del rest[places]
    return [argv[0], *(f"--{k}={v}" for k, v in settled.items()), *_with_whole_numbers(rest)[1:]]


def _whole(text: str) -> str:
    """10000 for 1e4, and any other text as it is."""
    if re.fullmatch(r"\d+(\.\d*)?e\+?\d\d?", text, re.IGNORECASE):
        number = Decimal(text)
        return str(int(number)) if number == int(number) else text
    return text


def _with_whole_numbers(argv: list[str]) -> list[str]:
    """The arguments with 10000 in place of 1e4, in overrides of whole numbers."""
    written = list(argv)
    for place, name, text in _overrides(argv):
        setting = _SETTINGS.get(name)
        if setting and isinstance(setting.kind, Int):
            written[place] = f"{argv[place].removesuffix(text)}{_whole(text)}"
    return written


def _line(error: Exception, argv: list[str], config: str) -> str:
    """An error line for an exception in the parsing of flags."""
    chain = list(_chain(error))
    for cause in chain:
        if isinstance(cause, SyntaxError) and cause.filename != "<unknown>":
            return f"--config={config}: {cause.filename}, line {cause.lineno}: {cause.msg}"
        if line := _line_in_file(cause, config):
            return line
    value = flags.FLAGS["config"].value
    if value is not None and not isinstance(value, ConfigDict):
        return _no_config(config, value)
    message = str(error)
    if "parsing config file" in message or "get_config" in message:
        return f"--config={config}: {in_short(chain[-1])}"
    for _, name, text in _overrides(argv):
        setting = _SETTINGS.get(name)
        if setting is None and isinstance(error, AttributeError | KeyError | SyntaxError):
            if not any(other.startswith(f"{name}.") for other in _SETTINGS):
                hint = suggestion(name, _SETTINGS, cutoff=0.5)
                return f"--config.{name} is no setting{hint and f'; did you mean --config.{hint}?'}"
        elif setting and message.startswith(f"flag --config.{name}={text}:"):
            return f"--config.{name}={text}; it must be {setting.kind.describe()}"
    return " ".join(message.split())


def _line_in_file(error: BaseException, config: str) -> str:
    """An error line for an exception that the config file raised, else an empty one."""
    path = Path(config.partition(":")[0]).resolve()
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).resolve() == path:
            text = in_short(error).partition(". Other fields present")[0]
            return f"--config={config}: line {frame.lineno}: {text}"
    return ""


_SETTINGS: dict[str, Setting] = dict(SETTINGS.flat())


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _overrides(argv: list[str]) -> Iterator[tuple[int, str, str]]:
    """The overrides: the place of the argument with the text, the name and the text, as "64"."""
    for position, argument in enumerate(argv):
        match = re.fullmatch(r"--?(?:no)?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if match:
            place = position if match[2] is not None else min(position + 1, len(argv) - 1)
            yield place, match[1], argv[place] if match[2] is None else match[2]


def _check_tuples(argv: list[str]) -> None:
    """Raises ConfigError for a number in place of a tuple: ml_collections would wrap it."""
    for _, name, text in _overrides(argv):
        setting = _SETTINGS.get(name)
        if setting and isinstance(setting.kind, Tuple) and re.fullmatch(r"[-+.\d]+\w*", text):
            value = f"({_whole(text)},)"
            raise ConfigError(
                f"--config.{name}={text}; it must be {setting.kind.describe()}; write '{value}'"
            )


def _check_is_config(config: str) -> None:
    """Raises ConfigError unless the config file returned a config."""
    value = flags.FLAGS["config"].value
    if not isinstance(value, ConfigDict):
        raise ConfigError(_no_config(config, value))


def _no_config(config: str, value: object) -> str:
    kind = type(value).__name__
    return f"--config={config}: get_config() returns a {kind}; it must return a ConfigDict"


def _default_config(workdir: str | None) -> str:
    """The work directory's own config where it holds a run, else the digits."""
    try:
        recorded.get_config(workdir or "")
    except (ImportError, OSError, ValueError):  # none, or damaged: the experiment reports it
        return _of_project("configs/digits.py")
    except Exception:  # reported by the parsing
        pass
    return f"{_of_project('configs/recorded.py')}:{workdir}"


def _flag_value(argv: list[str], name: str) -> str | None:
    """A flag's value, given as --name=value or as --name value; of several the last."""
    values = [value for flag, value, _ in _flags_with_values(argv) if flag == name]
    return values[-1] if values else None


def _flags_with_values(argv: list[str]) -> Iterator[tuple[str, str, slice]]:
    """The flags of this program that take a value: name, value, and their arguments' places."""
    for position, argument in enumerate(argv):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name in ("config", "workdir", "verbosity"):
            last = position if equals else position + 1
            if last < len(argv):
                yield name, value if equals else argv[last], slice(position, last + 1)


def _config_path(config: str) -> str:
    """The value of --config, whose file may be named relative to the project.

    Raises:
      ConfigError: if the part before a colon is no file.
    """
    name, colon, argument = config.partition(":")
    with suppress(OSError):  # a name that is too long
        if Path(name).is_file():
            return config
        if name and not os.path.isabs(name) and (_ROOT / name).is_file():
            return _of_project(name) + colon + argument
        if Path(config).is_file():
            raise ConfigError(
                f"--config={config}: a colon separates the file from its argument; give a path "
                "without a colon, such as one relative to the present directory"
            )
    names = sorted(f"configs/{p.name}" for p in (_ROOT / "configs").glob("[!_]*.py"))
    raise ConfigError(f"--config={config} is no file; known: {', '.join(names)}")


def _of_project(name: str) -> str:
    """The path of a file of the project, without a colon, at which --config would be cut."""
    path = str(_ROOT / name)
    path = os.path.relpath(path) if ":" in path else path
    if ":" in path:
        raise ConfigError(
            f"--config={path} has a colon, which separates a file from its argument; run main.py "
            f"in {_ROOT}"
        )
    return path
