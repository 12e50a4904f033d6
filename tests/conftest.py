"""Settings for every test: shape annotations checked at run time, and how JAX runs.

Nothing forces a platform, so the same tests run on a CPU and on a GPU.
"""

import gc
import os
import pathlib
import sys
from collections.abc import Iterator

import jax
import jaxtyping
import pytest

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Bounds are computed with full-precision matrix products; a GPU's default is TensorFloat-32.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

# Programs compiled once serve every worker and the next run, which takes a third of the time.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".jax_cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Tracing makes many small objects that live long: collecting garbage at every 700th of them takes a
# tenth of a test's time.
gc.set_threshold(50_000, 10, 10)
jaxtyping.install_import_hook(["diffusion", "models", "experiments"], "beartype.beartype")

# With these last, one worker would run alone at the end.
LONGEST = (
    "tests/test_notebooks.py",
    "tests/experiments/harness/processes/test_distributed.py",
    "tests/experiments/test_surviving.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the longest files, in their order; the rest stay as collected."""
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(LONGEST)))


@pytest.fixture
def float64():
    """Double precision on the device, for identities that must hold to rounding."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def quick_compiles() -> Iterator[dict[str, str]]:
    """Programs compiled in a hurry: optimising them would take longer than all that they run.

    The value is the environment in which another process compiles the very same programs.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    path = os.pathsep.join(sys.path)
    yield os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": path}
    jax.config.update("jax_disable_most_optimizations", False)
