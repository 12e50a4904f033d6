"""On a CPU a training step works on one vector that holds all arrays of the network.

The optimizer, the average of the parameters and the tests for NaN are a few operations for each
array, and even a small network has more than a hundred. For one vector they are compiled, and run,
in a fraction of the time.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import devices
from experiments.harness.setup.params import abstract_params
from experiments.harness.training.state import (
    TrainingSetup,
    TrainState,
    abstract_state,
    state_shardings,
)


class Packing:
    """Packs parameters, their average, moments and gradients of the network into vectors.

    On an accelerator, on several devices, and for parameters of several dtypes it changes nothing.
    """

    def __init__(self, setup: TrainingSetup):
        self._params, self._state = abstract_params(setup.definition), abstract_state(setup)
        self._layout, mesh = state_shardings(setup), setup.mesh
        network = self._params["network"]
        leaves, self._shapes = jax.tree.leaves(network), _shapes(network)
        self._ends = np.cumsum([leaf.size for leaf in leaves])
        is_one_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
        self._is_used = is_one_cpu and len({leaf.dtype for leaf in leaves}) == 1
        self.shardings = devices.replicated(mesh) if self._is_used else self._layout

    def of_gradients(self, gradients: Callable[..., Any]) -> Callable[..., Any]:
        """The same function of (root, state, …), of a packed state and with packed gradients."""

        def packed(root, state, *rest):
            state = state._replace(params=self._unpack(state.params, self._params, jnp))
            batch, grads = gradients(root, state, *rest)
            return batch, self._pack(grads, jnp)

        return packed

    def pack(self, state: TrainState) -> TrainState:
        """The state with a vector for each network, laid out as `shardings` says."""
        return devices.place(self._pack(state, np), self.shardings) if self._is_used else state

    def abstract(self) -> TrainState:
        """Shapes and dtypes of a packed state; where nothing is packed, shardings too."""
        if not self._is_used:
            return self._state
        return jax.eval_shape(lambda state: self._pack(state, jnp), self._state)

    def unpack(self, state: TrainState) -> TrainState:
        """The state that was packed. Its arrays are copies: steps donate the packed ones."""
        if not self._is_used:
            return state
        copies = jax.tree.map(np.array, state)
        return devices.place(self._unpack(copies, self._state, np), self._layout)

    def _pack(self, tree: Any, np_or_jnp: ModuleType) -> Any:
        def to_vector(node):
            if not self._is_network(node):
                return node
            return np_or_jnp.concatenate([np_or_jnp.ravel(leaf) for leaf in jax.tree.leaves(node)])

        return jax.tree.map(to_vector, tree, is_leaf=self._is_network)

    def _unpack(self, tree: Any, like: Any, np_or_jnp: ModuleType) -> Any:
        def to_arrays(target, node):
            if not self._is_network(target):
                return node
            leaves, structure = jax.tree.flatten(target)
            parts = zip(np_or_jnp.split(node, self._ends[:-1]), leaves, strict=True)
            return structure.unflatten([part.reshape(leaf.shape) for part, leaf in parts])

        return jax.tree.map(to_arrays, like, tree, is_leaf=self._is_network)

    def _is_network(self, node: Any) -> bool:
        return self._is_used and _shapes(node) == self._shapes


def _shapes(tree: Any) -> tuple[Any, list[tuple[int, ...]]]:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [np.shape(leaf) for leaf in leaves]
