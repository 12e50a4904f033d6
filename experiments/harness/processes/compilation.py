"""Compiled programs, kept on disk for the next run."""

import hashlib
import os
import pathlib
import platform
import shutil
import sys
import warnings

import jax

MAX_BYTES = 2 * 2**30
MIN_SECONDS = 0.2  # programs that compile faster are compiled anew
_ERROR = "persistent compilation cache entry for"


def keep_programs() -> None:
    """Has JAX keep compiled programs in the user's cache directory for later runs.

    JAX's settings go first: JAX_COMPILATION_CACHE_DIR names another directory,
    JAX_COMPILATION_CACHE_MAX_SIZE the bytes after which the programs that were not used for the
    longest time are removed, and JAX_ENABLE_COMPILATION_CACHE=false keeps nothing. JAX's key of a
    program has its operations, the versions of jax and jaxlib, and the flags of XLA; each kind of
    CPU has a directory of its own. A directory that cannot be used gives one warning, and a damaged
    or full one is emptied.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    directory = cache_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise PermissionError("it is not writable")
    except OSError as error:
        _warn(f"compiled programs cannot be kept in {directory} ({error})")
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    if jax.config.jax_compilation_cache_max_size < 0:
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    _empty_on_error(directory)


def for_one_call() -> dict[str, int] | None:
    """Options of `jax.jit` for a program that runs once, quicker to compile on a CPU."""
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


def cache_directory() -> pathlib.Path:
    """Where programs for this kind of CPU are kept."""
    default = pathlib.Path.home() / ".cache"
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or default)
    kind = hashlib.sha256(_cpu().encode()).hexdigest()[:12]
    return root / "diffusion-latent-variable-models" / f"programs-{platform.machine()}-{kind}"


def _cpu() -> str:
    """The instruction sets of the CPU, for which programs are compiled."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    features = (line for line in lines if line.startswith(("flags", "Features")))
    return next(features, platform.processor())


def _empty_on_error(directory: pathlib.Path) -> None:
    """Has JAX's first warning of a damaged or full cache empty it; the others are silent."""
    show, errors = warnings.showwarning, []

    def showwarning(message, *args, **kwargs):
        if _ERROR not in str(message):
            show(message, *args, **kwargs)
            return
        errors.append(str(message).split(": ", 1)[-1])
        if len(errors) == 1:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True, exist_ok=True)
            _warn(f"{directory} could not be read or written and is emptied ({errors[0]})")

    warnings.showwarning = showwarning


def _warn(message: str) -> None:
    print(f"warning: {message}; programs are compiled anew", file=sys.stderr)
