"""A saved pytree read back: into the shapes that are asked for, bit for bit or not at all."""

from typing import Any

import jax
import numpy as np
from etils import epath

_DIFFERENCES_SHOWN = 3


class DifferentError(Exception):
    """What was saved is not of the structure, shapes and dtypes that are asked for."""


def read(item: epath.Path, like: Any, part: str | None) -> Any:
    """What was saved in a directory, or one field of it, as `like` describes it.

    Args:
      item: the directory that orbax wrote.
      like: pytree of arrays or jax.ShapeDtypeStructs; of a part that is a dictionary, of the keys
        that are wanted.
      part: name of a field of the saved pytree; None for all of it.

    Raises:
      DifferentError: with the first differences.
    """
    import orbax.checkpoint as ocp

    wanted = {_key(path, part): leaf for path, leaf in _leaves(like)}
    handler = ocp.PyTreeCheckpointHandler()
    stored = handler.metadata(item).tree
    if part is not None:
        stored = {part: stored[part]} if part in stored else {}
    if part in stored and isinstance(like, dict) and isinstance(stored[part], dict):
        # Such as a network without the schedule that was learned beside it.
        stored[part] = {k: tree for k, tree in stored[part].items() if k in like}
    _require_same(stored, wanted)
    # Asked for in the checkpoint's own structure, which knows no NamedTuples.
    target = jax.tree_util.tree_map_with_path(
        lambda path, _: _on_device(wanted[_key(path)]), stored
    )
    args = ocp.args.PyTreeRestore(
        item=target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=part is not None,
    )
    restored = handler.restore(item, args=args) if wanted else {}
    handler.close()
    by_name = {_key(path): leaf for path, leaf in _leaves(restored)}
    return jax.tree.unflatten(jax.tree.structure(like), [by_name[name] for name in wanted])


def _require_same(stored: Any, wanted: dict[str, Any]) -> None:
    there = {_key(path): _describe(leaf) for path, leaf in _leaves(stored)}
    here = {name: _describe(leaf) for name, leaf in wanted.items()}
    different = [
        f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
        for name in here | there
        if here.get(name) != there.get(name)
    ]
    more = len(different) - _DIFFERENCES_SHOWN
    if different:
        shown = "; ".join(different[:_DIFFERENCES_SHOWN])
        raise DifferentError(shown + (f"; and {more} more" if more > 0 else ""))


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _key(path: Any, part: str | None = None) -> str:
    """A leaf's name, the same for a field, a key and an index: `opt_state/0/mu/conv/kernel`."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return "/".join(filter(None, [part, name]))


def _describe(leaf: Any) -> str:
    return f"{tuple(leaf.shape)} {np.dtype(leaf.dtype)}"


def _on_device(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
