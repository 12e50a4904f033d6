"""Programs of the same operations are compiled once; whatever differs gives another program."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness.processes import shared_programs
from experiments.harness.processes.shared_programs import share

X = np.linspace(-1.0, 1.0, 6, dtype=np.float32)


@pytest.fixture(autouse=True)
def no_programs():
    """Other tests' programs are forgotten, so that each count starts from zero."""
    shared_programs._programs.clear()


def scaled(by):
    """A new function at each call, as each run makes its own."""
    return share(jax.jit(lambda x: x * by))


def test_new_functions_of_the_same_operations_share_a_program():
    for _ in range(3):
        np.testing.assert_array_equal(scaled(np.float32(2))(X), 2 * X)
    assert len(shared_programs._programs) == 1


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_other_constants_give_another_program(array):
    """Small and large ones, of NumPy and of JAX, also inside a loop."""
    for size in (1, 6, 100_000):
        x = np.ones(size, np.float32)
        for by in (2.0, 3.0):
            constant = array(np.full(size, by, np.float32))
            np.testing.assert_array_equal(scaled(constant)(x), by * x)
            loop = share(
                jax.jit(lambda x, c=constant: jax.lax.fori_loop(0, 2, lambda _, y: y * c, x))
            )
            np.testing.assert_array_equal(loop(x), by**2 * x)
    assert len(shared_programs._programs) == 12


def test_code_that_is_changed_under_the_same_name_gives_another_program():
    for function in (lambda x: x + 1, lambda x: x - 1):

        def network(x, function=function):
            return function(x)

        np.testing.assert_array_equal(share(jax.jit(network))(X), function(X))


def test_one_function_serves_several_shapes_types_and_structures():
    total = share(jax.jit(lambda tree: jax.tree.map(jnp.sum, tree)))
    assert total({"a": X, "b": X[:2]}) == {"a": X.sum(), "b": X[:2].sum()}
    assert total({"a": X[:3], "c": np.int32([1, 2])}) == {"a": X[:3].sum(), "c": 3}
    assert total((X, X[:2])) == (X.sum(), X[:2].sum())
    other = share(jax.jit(lambda tree: list(jax.tree.map(jnp.sum, tree))))
    assert other((X, X[:2])) == [X.sum(), X[:2].sum()]


def test_a_program_that_calls_python_is_not_shared():
    """Its text is the same whichever function it calls."""
    for by in (2, 3):
        on_host = share(
            jax.jit(lambda x, by=by: jax.pure_callback(lambda x: by * x, jax.typeof(x), x))
        )
        np.testing.assert_array_equal(on_host(jnp.asarray(X)), by * X)
    assert not shared_programs._programs


def test_few_programs_are_kept_those_used_last(monkeypatch):
    monkeypatch.setattr(shared_programs, "MAX_PROGRAMS", 2)
    for by in (1.0, 2.0, 1.0, 3.0):
        scaled(np.float32(by))(X)
    one, three = shared_programs._programs.values()
    assert (one(X) == X).all()
    assert (three(X) == 3 * X).all()


def test_a_program_with_large_constants_is_not_kept():
    scaled(np.ones(2**22, np.float32) + np.arange(2**22, dtype=np.float32))(np.float32(1))
    assert not shared_programs._programs


def test_other_settings_of_jax_give_another_program():
    """Of one shared function, and of two of the same operations."""
    function = share(jax.jit(lambda x: x @ x))
    for precision in ("highest", "bfloat16"):
        with jax.default_matmul_precision(precision):
            function(X)
    assert len(shared_programs._programs) == 2
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        share(jax.jit(lambda x: x @ x))(X)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    assert len(shared_programs._programs) == 3


# Two such programs at once would wait for one another, from some hundred KiB of arguments on.
CALLS = """
import jax, numpy as np
from experiments.harness.processes import cores
from experiments.harness.processes.shared_programs import share
cores.num_cores = lambda: 2
ask = lambda x: jax.pure_callback(lambda a: 2 * np.asarray(a), jax.typeof(x), x)
program = share(jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda i, y: ask(y) / 2, x)))
x = np.ones((256, 1024), np.float32)
assert (cores.in_parts(program, x) == x).all()
"""


def test_programs_that_call_python_do_not_wait_for_one_another():
    subprocess.run([sys.executable, "-c", CALLS], check=True, timeout=120)
