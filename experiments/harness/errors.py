"""The errors that a user is told in one line."""

import errno


class _OneLine(Exception):
    """Escapes what no terminal should get, such as the control characters of a file's name."""

    def __str__(self) -> str:
        return "".join(
            c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in super().__str__()
        )


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
