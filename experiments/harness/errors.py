"""The errors that a user is told in one line."""

import errno
import re

_LONGEST = 300  # characters without a space between them


def one_line(message: object) -> str:
    """A message for a terminal: one line, no control characters, and no value of great length."""
    text = " ".join(str(message).split())
    text = re.sub(rf"\S{{{_LONGEST},}}", lambda word: f"{word[0][:150]}…{word[0][-50:]}", text)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class _OneLine(Exception):
    """An error whose text is `one_line`."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class ConfigError(_OneLine, ValueError):
    """A setting, file or work directory that cannot be used as given.

    The message is one line that names the setting, its value and what would be right; `main.py`
    prints it without a traceback and exits with status 2.
    """


class RunError(_OneLine, RuntimeError):
    """A run that has to stop though its settings were fine, such as one whose loss is not finite.

    The message is one line that says what happened, where, and what is left; `main.py` prints it
    without a traceback and exits with status 1.
    """


def in_short(error: Exception) -> str:
    """An error in a few words."""
    text = " ".join(str(error).split())
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text:
        return "no space left on the device"
    return f"{type(error).__name__}: {text[:150]}" if text else type(error).__name__
