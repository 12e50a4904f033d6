"""Settings for every test: shape annotations checked at run time, and how JAX runs.

Nothing forces a platform, so the same tests run on a CPU and on a GPU.
"""

import os
import pathlib

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Bounds are computed with full-precision matrix products; a GPU's default is TensorFloat-32.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

# Programs compiled once serve every worker and the next run, which takes a third of the time.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".jax_cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook(["diffusion", "models", "experiments"], "beartype.beartype")


@pytest.fixture
def float64():
    """Double precision on the device, for identities that must hold to rounding."""
    with jax.enable_x64(True):
        yield
