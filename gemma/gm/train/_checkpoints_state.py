# SPDX-License-Identifier: Apache-2.0
"""The arrays of a training state on disk: a tree as named leaves, compared, written and read one leaf at a time.

    opt_state/0/mu/layer_0/attn/q_einsum/lora/a      the name of a leaf: fields, keys and places, joined by "/"

They are written as Orbax writes a tree (`gm/ckpts/_orbax_write.py`) and read with TensorStore: of a leaf that is spread
over devices each process reads the parts of its own. Rules, checksums and other files of a step are elsewhere
(`_checkpoints.py`, `_checkpoints_files.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from gemma.errors import CheckpointError, TrainingError, WeightsMismatch
from gemma.gm.ckpts._leaves import aligned_empty
from gemma.gm.ckpts._orbax_write import Rows, write_orbax
from gemma.gm.train._checkpoints_files import Spec

_PIECE = 1 << 26  # bytes that leave an accelerator at a time


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name; None and empty branches vanish.

    Raises:
      TrainingError: a leaf that is no array, or names that cannot be told apart.
    """
    leaves: dict[str, Any] = {}
    stored: dict[str, str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts = [_part(key) for key in path]
        name = "/".join(parts) or "value"
        if any(not part or part in (".", "..") or not part.isprintable() for part in parts):
            raise TrainingError(f"{name!r:.200}: expected printable names without empty parts in the state")
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TrainingError(f"{name}: expected an array, got {type(leaf).__name__}; only arrays can be saved")
        key = ".".join(name.split("/"))  # as the array is called in the store
        if key in stored:
            raise TrainingError(f"{name} and {stored[key]}: these names are the same on disk; rename one of them")
        leaves[name], stored[key] = leaf, name
    return leaves


def _part(key: Any) -> str:
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            return str(getattr(key, field))
    return str(key)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def spec_of(leaf: Any) -> Spec:
    """Dtype and shape as saved; a random key is the numbers in it."""
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return np.dtype(leaf.dtype).name, tuple(leaf.shape)


def total_bytes(tree: Any) -> int:
    """Bytes of all leaves, wherever they are."""
    specs = [spec_of(leaf) for leaf in named(tree).values()]
    return sum(math.prod(shape) * jnp.dtype(dtype).itemsize for dtype, shape in specs)


# ---- writing -----------------------------------------------------------------------------------------------------


class Sent:
    """The leaves of a state on their way to the disk: each is fetched once, in order, in all processes alike."""

    def __init__(self, leaves: Mapping[str, Any]):
        self._leaves, self._left = leaves, list(leaves)

    def rows(self) -> dict[str, Rows]:
        return {name: self._row(name, leaf) for name, leaf in self._leaves.items()}

    def _row(self, name: str, leaf: Any) -> Rows:
        dtype, shape = spec_of(leaf)
        return Rows(shape, jnp.dtype(dtype), lambda: [self._fetch(name)])

    def _fetch(self, name: str) -> np.ndarray:
        self._left.remove(name)
        return np.ascontiguousarray(host(self._leaves[name]))

    def rest(self) -> None:
        """Receives what was not fetched, if it comes from other processes."""
        while self._left:
            leaf = self._leaves[self._left.pop(0)]
            if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
                host(leaf)


def write(folder: Path, sent: Sent) -> None:
    """Writes the leaves into a new folder."""
    folder.mkdir()
    write_orbax(folder, sent.rows())


def host(leaf: Any) -> np.ndarray:
    """A leaf in host memory; JAX keeps no copy of it. One that is spread over processes is gathered: all must call this.

    Raises:
      TrainingError: the array was freed.
    """
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    if leaf.is_deleted():
        raise TrainingError(
            "an array of the state was freed (donated to a step) and cannot be saved: pass the new state"
        )
    leaf = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    if leaf.is_fully_replicated:
        return _fetch(leaf.addressable_data(0))
    if not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    out = np.empty(leaf.shape, leaf.dtype)
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            out[shard.index] = _fetch(shard.data)
    return out


def _fetch(array: jax.Array) -> np.ndarray:
    """An array of one device. `np.asarray` would leave a second copy in the array itself, on an accelerator."""
    if next(iter(array.devices())).platform == "cpu":
        return np.asarray(array)  # its own memory
    if not array.ndim or not array.size:
        return np.asarray(array.copy())
    out = np.empty(array.shape, array.dtype)
    rows = max(1, _PIECE // max(1, array.nbytes // array.shape[0]))
    for start in range(0, array.shape[0], rows):
        size = min(rows, array.shape[0] - start)
        out[start : start + size] = np.asarray(jax.lax.dynamic_slice_in_dim(array, start, size))
    return out


# ---- reading -----------------------------------------------------------------------------------------------------


def compare(folder: Path, saved: Mapping[str, Spec], like: Any) -> None:
    """Raises WeightsMismatch with every difference between what is saved and what is expected."""
    wanted = {name: spec_of(leaf) for name, leaf in named(like).items()}
    misshaped = [
        f"{name}: expected {_shown(spec)}, got {_shown(saved[name])}"
        for name, spec in wanted.items()
        if name in saved and saved[name] != spec
    ]
    missing = [f"{name}: {_shown(spec)}" for name, spec in wanted.items() if name not in saved]
    unexpected = [f"{name}: {_shown(spec)}" for name, spec in saved.items() if name not in wanted]
    if missing or unexpected or misshaped:
        raise WeightsMismatch(
            folder,
            missing=missing,
            unexpected=unexpected,
            misshaped=misshaped,
            hint="The step was saved by a run with another model, method or optimizer: resume with the settings of that "
            "run, or start a new one in another folder. Nothing was restored.",
        )


def _shown(spec: Spec) -> str:
    return f"{spec[0]}{list(spec[1])}"


def read(folder: Path, saved: Mapping[str, Spec], like: Any) -> Any:
    """The leaves of a folder, as a tree like `like` (which has been compared), or nested dictionaries of numpy arrays."""
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_concurrency": {"limit": 4}})
    if like is None:
        tree: dict[str, Any] = {}
        for name, spec in saved.items():
            *above, last = name.split("/")
            branch = tree
            for part in above:
                branch = branch.setdefault(part, {})
            branch[last] = _Stored(folder, name, spec, context).part(())
        return tree
    leaves = named(like)
    values = [_placed(_Stored(folder, name, saved[name], context), leaf) for name, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(like), values)


class _Stored:
    """A leaf on disk."""

    def __init__(self, folder: Path, name: str, spec: Spec, context: ts.Context):
        self.name, self.folder = name, folder
        self.dtype, self.shape = jnp.dtype(spec[0]), tuple(spec[1])
        path = ".".join(name.split("/")) + "/"
        kvstore = dict(driver="ocdbt", base=dict(driver="file", path=f"{folder}/"), path=path)
        try:
            self._array = ts.open(
                dict(driver="zarr", kvstore=kvstore), open=True, create=False, read=True, context=context
            ).result()
        except (ValueError, OSError) as error:
            raise self._broken(error) from None
        if tuple(self._array.shape) != self.shape or self._array.dtype.name != self.dtype.name:
            raise CheckpointError(
                f"{folder}: {name}: expected {_shown(spec)}, got {self._array.dtype.name}{list(self._array.shape)}"
            )

    def part(self, index: Iterable[slice]) -> np.ndarray:
        """The leaf, or what an index of slices cuts out."""
        index = tuple(index)
        spans = [cut.indices(size)[:2] for cut, size in zip(index, self.shape)]
        out = aligned_empty((*(stop - start for start, stop in spans), *self.shape[len(spans) :]), self.dtype)
        view = self._array[tuple(slice(*span) for span in spans)] if spans else self._array
        try:
            ts.array(out).write(view[ts.d[:].translate_to[0]] if out.ndim else view).result()
        except (ValueError, OSError) as error:
            raise self._broken(error) from None
        return out

    def _broken(self, error: Exception) -> CheckpointError:
        reason = str(error).splitlines()[0][:200]
        return CheckpointError(f"{self.folder}: {self.name} cannot be read ({reason}); restore another step")


def _placed(stored: _Stored, leaf: Any) -> Any:
    """The leaf where its counterpart is."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        return stored.part(())
    sharding = getattr(leaf, "sharding", None)
    if isinstance(leaf, jax.Array) and not leaf.committed:
        sharding = None
    if sharding is not None and len(sharding.device_set) > 1:
        if _is_key(leaf):
            raise TrainingError(f"{stored.name}: a random key that is spread over devices; keep its data (key_data)")
        held: dict[Any, np.ndarray] = {}

        def part(index: tuple[slice, ...]) -> np.ndarray:
            spans = tuple(cut.indices(size)[:2] for cut, size in zip(index, stored.shape))
            if spans not in held:  # what several devices hold is read once
                held[spans] = stored.part(index)
            return held[spans]

        return jax.make_array_from_callback(stored.shape, sharding, part)
    # A copy of its own: a step that donates its state must not write into memory that numpy thinks it owns.
    array = jax.device_put(stored.part(()), sharding, may_alias=False)
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else array
