"""The one exception that a user's mistake raises."""


class ConfigError(ValueError):
    """A setting, file or work directory that cannot be used as given.

    The message is one line that names the setting, its value and what would be right; `main.py`
    prints it without a traceback and exits with status 2.
    """


class RunError(RuntimeError):
    """A run that has to stop though its settings were fine, such as one whose loss is not finite.

    The message is one line that says what happened, where, and what is left; `main.py` prints it
    without a traceback and exits with status 1.
    """
