# SPDX-License-Identifier: Apache-2.0
"""`load_params`: any checkpoint that gemmakit reads, as the nested tree of arrays that the networks of `gm.nn` take.

Each leaf is one host buffer that is handed to JAX; on the CPU it becomes the array without a copy. So at no time more
exists than the parameters and the one tensor that is being read. Where a leaf comes from is `_leaves.py`; renamed and
partial restoring are `_quantization.py` and `_partial.py`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma import config as configs
from gemma import hub
from gemma.errors import CheckpointError, UnsupportedError, WeightsMismatch
from gemma.gm.ckpts import _detect, _quantization
from gemma.gm.ckpts._leaves import VISION, Leaf, aligned_empty, known_config, leaves_of
from gemma.gm.ckpts._load_packed import KEEP, packed_leaves, recipe_of
from gemma.gm.ckpts._orbax import flatten, open_checkpoint
from gemma.gm.nn._packed import Packed
from gemma.gm.typing import DType, Params

_FLOATS = ("float32", "bfloat16", "float16")


def load_params(
    path: str | os.PathLike[str],
    *,
    params: Params | None = None,
    donate: bool = True,
    text_only: bool = False,
    sharding: Any = None,
    quantize: bool | str = False,
    dtype: DType | None = None,
    config: _detect.AnyConfig | None = None,
    importance: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Reads a checkpoint into a nested parameter tree.

    Args:
      path: a GGUF, safetensors, .ckpt or .sbs file, a Hugging Face folder, an Orbax folder in any layout, a
        `CheckpointPath` (which is downloaded if it is not on this machine), or `demo`.
      params: a tree of the same structure whose leaves (arrays, or `jax.ShapeDtypeStruct`) say dtype and sharding.
      donate: free the arrays of `params` before reading; they cannot be used afterwards.
      text_only: leave the vision tower in the file.
      sharding: where the arrays live: one `jax.sharding.Sharding`, a tree of them, which may end above the leaves, or a
        strategy of `gm.sharding`. From an Orbax folder each device reads only its part.
      quantize: a recipe: the matrices come packed (`PackedArray` leaves) and the same networks run them so. "int4",
        "int8", "sfp8", a `gemma.peft.QuantizationMethod`, a mix as of `gemma quantize` ("q4_0", "q4_k_m", ...), or
        "keep", which takes the types of the file as they are. What has its type already keeps its bytes. True: not
        packed, but the kernels named as official quantization-aware training does (`_quantization.qat_name`); with
        `params` their names decide: the tree of `gm.nn.QuantizationAwareWrapper` is the plain one.
      dtype: float32, bfloat16 or float16 for the float parameters of the text model. None: as stored, but float32 for
        packed types and for float16 in files that are not Orbax, since Gemma's activations overflow in it. What belongs
        to vision keeps float32.
      config: of an Orbax folder that does not carry its own and is of no preset's size.
      importance: for a recipe: canonical tensor name to float32 [inputs] (`gemma.imatrix`).

    Returns:
      The tree of `gm.nn`, for example `layer_0/attn/q_einsum/w` [N, D, H]. The table of a Gemma 1 or 2 has 256,128 rows
      as in official checkpoints; rows that a Hugging Face file lacks are zero and their ids must not be sampled (the
      samplers of `gm.text` never do). Adapters and quantized kernels of an Orbax folder come as they were saved.

    Raises:
      CheckpointNotFound, FormatError, WeightsMismatch: nothing there, a broken file, the wrong tensors.
      HubError: a `CheckpointPath` that is not here and cannot be downloaded.
      UnsupportedError: a model without a JAX network, float16 for Gemma 3.
      CheckpointError: (a ValueError) arguments that exclude each other; weights that cannot be quantized.
      ConfigError: an unknown recipe. ShapeError: its blocks do not divide the rows of a matrix.
    """
    _check_arguments(params, sharding, dtype, text_only)
    how = None if isinstance(quantize, bool) or str(quantize).lower() == "none" else recipe_of(quantize)
    _check_packing(params, how, importance)
    path = hub.resolve(path, download=True)
    like = None if params is None else flatten(params)
    with open_checkpoint(path, config=config) as checkpoint:
        check_dtype(dtype, known_config(checkpoint) if dtype is not None else None)
        if like is not None:
            text_only = text_only or not any(name.split("/")[0] == VISION for name in like)
        leaves = leaves_of(checkpoint, text_only=text_only)
        if how is not None:
            return _packed_tree(leaves, known_config(checkpoint), how, importance, dtype, sharding)
        return _float_tree(leaves, like, path, donate, bool(quantize), dtype, sharding)


def _float_tree(leaves, like, path, donate: bool, rename: bool, dtype: DType | None, sharding: Any) -> dict[str, Any]:
    if like is None:
        names = {_quantization.qat_name(name) if rename else name: name for name in leaves}
    else:
        names = match(like, leaves, path)
        if donate:
            free(like)
    if callable(sharding):
        sharding = sharding(_shapes(names, leaves))
    tree: dict[str, Any] = {}
    for name, stored in names.items():
        target = None if like is None else like[name]
        insert(tree, name, read(leaves.pop(stored), name, target, dtype, sharding))
    return tree


def _packed_tree(leaves, config, how: str, importance, dtype: DType | None, sharding: Any) -> dict[str, Any]:
    if callable(sharding):
        sharding = sharding(_shapes({name: name for name in leaves}, leaves))

    def opened(leaf: Leaf, name: str) -> tuple[Any, Any, Any]:
        def floats() -> jax.Array:
            return read(leaf, name, None, dtype, sharding)

        return chosen_dtype(leaf, dtype), floats, _sharding_of(name, sharding)

    tree: dict[str, Any] = {}
    for name, done in packed_leaves(leaves, config, how, importance, opened).items():
        insert(tree, name, done)
    return tree


def check_dtype(dtype: DType | None, config: _detect.AnyConfig | None) -> None:
    """Refuses what is no float type, and float16 where the activations of the model do not fit into it."""
    if dtype is None:
        return
    name = jnp.dtype(dtype).name
    if name not in _FLOATS:
        raise UnsupportedError(f"dtype: expected one of {', '.join(_FLOATS)}, got {name}")
    if name == "float16" and isinstance(config, configs.GemmaConfig) and config.use_qk_norm:
        raise UnsupportedError(
            "float16 cannot run Gemma 3: its activations pass 65504, the largest float16, and the text becomes NaN; "
            "use bfloat16 or float32"
        )


def _check_arguments(params: Any, sharding: Any, dtype: Any, text_only: bool) -> None:
    if params is not None and sharding is not None:
        raise CheckpointError("`sharding` and `params` are mutually exclusive.")
    if params is not None and dtype is not None:
        raise CheckpointError("`dtype` and `params` are mutually exclusive: the dtypes of `params` are followed.")
    if params is None:
        return
    if not isinstance(params, Mapping) or any("/" in key for key in params) or _is_no_tree(params):
        keys = ", ".join(list(params)[:4]) if isinstance(params, Mapping) else type(params).__name__
        raise CheckpointError(
            f"`params` must be a nested tree such as model.init(...)['params'], with the key 'embedder' on top; "
            f"got {keys}"
        )
    if text_only and VISION in params:
        raise CheckpointError("`text_only=True`, but `params` hold a vision encoder: pass one or the other.")


def _check_packing(params: Any, how: str | None, importance: Any) -> None:
    if params is not None and (how is not None or any(isinstance(leaf, Packed) for leaf in flatten(params).values())):
        raise CheckpointError(
            "`params` say dtypes and shardings of floats, and quantize=... makes packed leaves: pass one or the other "
            "(`dtype` and `sharding` go with both)"
        )
    if importance is not None and how in (None, KEEP):
        raise CheckpointError('`importance` is used while quantizing: pass quantize="q4_k_m" or the like with it')


def _is_no_tree(params: Mapping[str, Any]) -> bool:
    """A decoder has an embedder on top; an encoder and decoder have one each."""
    sides = [params.get(side) for side in ("encoder", "decoder")]
    return "embedder" not in params and not all(isinstance(side, Mapping) and "embedder" in side for side in sides)


def match(like: Mapping[str, Any], leaves: Mapping[str, Leaf], path: os.PathLike[str]) -> dict[str, str]:
    """Which leaf of the checkpoint each leaf of `params` is. `params` must ask for exactly what the checkpoint has.

    Raises:
      CheckpointError: they want a vision tower that is not there.
      WeightsMismatch: with every difference.
    """
    if any(name.split("/")[0] == VISION for name in like) and not any(leaf.of_vision for leaf in leaves.values()):
        raise CheckpointError(f"`params` hold a vision encoder, but {path} has none.")
    names = {name: stored_name(name, leaves) for name in like}
    misshaped = [
        f"{name}: expected {tuple(like[name].shape)} (of `params`), got {leaves[stored].shape}"
        for name, stored in names.items()
        if stored in leaves and tuple(like[name].shape) != leaves[stored].shape
    ]
    twice = {stored for stored, count in Counter(names.values()).items() if count > 1}
    missing = sorted(name for name, stored in names.items() if stored not in leaves or stored in twice)
    unexpected = sorted(set(leaves) - set(names.values()))
    if missing or unexpected or misshaped:
        hint = "`params` (its names are the missing ones) ask for another model than the checkpoint holds."
        raise WeightsMismatch(path, missing=missing, unexpected=unexpected, misshaped=misshaped, hint=hint)
    return names


def stored_name(name: str, leaves: Mapping[str, Leaf]) -> str:
    """The leaf of the checkpoint that one of `params` is: the same name, or the same weight under another wrapping."""
    if name in leaves:
        return name
    plain = _detect.plain_name(name)
    if plain is None or plain in leaves:
        return plain or name
    return _quantization.qat_name(plain)


def read(leaf: Leaf, name: str, target: Any, dtype: DType | None, sharding: Any) -> jax.Array:
    """One leaf as an array; `target` (of `params`) decides dtype and place, else the arguments of `load_params`."""
    if target is not None:
        where = getattr(target, "sharding", None)  # a ShapeDtypeStruct may have none, a numpy array has none
        return leaf.array(np.dtype(target.dtype), where)
    return leaf.array(chosen_dtype(leaf, dtype), _sharding_of(name, sharding))


def chosen_dtype(leaf: Leaf, dtype: DType | None) -> np.dtype:
    """What a leaf becomes where the argument `dtype` of `load_params` is this."""
    return leaf.dtype if dtype is None or leaf.of_vision or not leaf.is_float else np.dtype(jnp.dtype(dtype))


def _shapes(names: Mapping[str, str], leaves: Mapping[str, Leaf]) -> dict[str, Any]:
    """The tree that will be read, as shapes, for a strategy to look at."""
    tree: dict[str, Any] = {}
    for name, stored in names.items():
        insert(tree, name, jax.ShapeDtypeStruct(leaves[stored].shape, leaves[stored].dtype))
    return tree


def _sharding_of(name: str, sharding: Any) -> Any:
    for key in name.split("/"):
        if not isinstance(sharding, Mapping):
            break
        if key not in sharding:
            raise CheckpointError(f"`sharding` has no entry for {name}: expected {key!r} among {', '.join(sharding)}")
        sharding = sharding[key]
    return sharding


def insert(tree: dict[str, Any], name: str, leaf: Any) -> None:
    """Puts a leaf into a nested tree under its slash name."""
    *folders, last = name.split("/")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[last] = leaf


def free(like: dict[str, Any]) -> None:
    """Deletes the arrays of `params`; what is left of each says dtype and sharding."""
    for name, array in like.items():
        if isinstance(array, jax.Array):
            like[name] = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
            array.delete()


def release(params: Any) -> int:
    """Frees the memory of a tree's arrays at once, instead of when Python forgets the last name for it.

    Args:
      params: any tree; its arrays cannot be used afterwards. Arrays that were freed before are passed over.

    Returns:
      How many bytes were freed, over all devices of this process.
    """
    freed = 0
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array) and not leaf.is_deleted():
            freed += sum(shard.data.nbytes for shard in leaf.addressable_shards)
            leaf.delete()
    return freed


__all__ = ["aligned_empty", "check_dtype", "load_params", "release"]
