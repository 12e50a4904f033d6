"""Paths as a user types them."""

import os
import re

from experiments.harness.errors import ConfigError

_BUCKETS = ("gs", "s3", "az", "hf")  # those of etils' epath
_LONGEST = 4096  # bytes: Linux' PATH_MAX


def expanded(path: str, setting: str) -> str:
    """A path with the home directory in place of `~`, which a shell leaves in --workdir=~/run.

    Args:
      path: the path.
      setting: the setting or flag that names it, for error messages.

    Raises:
      ConfigError: if no file system can have such a path.
    """
    home = os.path.expanduser(path)
    scheme = re.match(r"(\w+)://", home)
    if home.startswith("~"):
        remedy = f"there is no user {home.split('/')[0][1:]}; begin with ~/, ./ or /"
    elif scheme and scheme[1] not in _BUCKETS:
        known = ", ".join(f"{name}://" for name in _BUCKETS)
        remedy = f"give a directory of this machine, or a bucket ({known})"
    elif len(os.fsencode(home)) > _LONGEST:
        remedy = f"it has {len(home):,} characters; a path has at most {_LONGEST:,}"
    elif "\0" in home:
        remedy = "a path has no null character"
    else:
        return home
    raise ConfigError(f"{setting} = {path!r}; {remedy}")
