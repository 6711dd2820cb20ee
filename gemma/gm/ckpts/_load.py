# SPDX-License-Identifier: Apache-2.0
"""`load_params`: any checkpoint that gemmakit reads, as the nested tree of arrays that the networks of `gm.nn` take.

Each leaf is one host buffer, filled tensor by tensor and handed to JAX; on the CPU it becomes the array without a copy.
So at no time more exists than the parameters and the one tensor that is being read. What is in a file is
`gemma/checkpoint.py`'s business, where a tensor goes in the tree `gemma/weights`'.

    kv_einsum/w  [2, K, D, H]        [0] <- layers.3.attn.k  (K H) D
                                     [1] <- layers.3.attn.v  (K H) D
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma import config as configs
from gemma import hub, weights
from gemma.checkpoint import Checkpoint, TensorReader, load_tensors, open_checkpoint
from gemma.errors import CheckpointError, UnsupportedError, WeightsMismatch
from gemma.gm.typing import DType, Params

_FLOATS = ("float32", "bfloat16", "float16")
_ALIGNMENT = 64  # bytes; XLA's CPU client takes buffers that start at a multiple of it as they are
# Released checkpoints keep what follows the vision tower in float32; the networks expect it so.
_ALWAYS_FLOAT32 = ("vision_encoder", "mm_input_projection", "mm_soft_embedding_norm")
_ORBAX_FILES = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "checkpoint")

Leaf = tuple[str, list[tuple[weights.Tensor, TensorReader]]]


def load_params(
    path: str | os.PathLike[str],
    *,
    params: Params | None = None,
    donate: bool = True,
    text_only: bool = False,
    sharding: Any = None,
    quantize: bool = False,
    dtype: DType | None = None,
) -> dict[str, Any]:
    """Reads a checkpoint into a nested parameter tree.

    Args:
      path: what `gemma.hub.resolve` takes: a GGUF or safetensors file, a Hugging Face folder, or `demo`.
      params: a tree of the same structure whose leaves (arrays, or `jax.ShapeDtypeStruct`) say dtype and sharding.
      donate: free the arrays of `params` before reading; they cannot be used afterwards.
      text_only: leave the vision tower in the file.
      sharding: where the arrays live: one `jax.sharding.Sharding`, or a tree of them.
      quantize: not available for these files; it belongs to official checkpoints.
      dtype: float32, bfloat16 or float16 for all text parameters. None: as stored, but float32 for packed types and
        for float16, in which Gemma's activations overflow. What belongs to vision is float32.

    Returns:
      The tree of `gm.nn`, for example `layer_0/attn/q_einsum/w` [N, D, H]. The table of a Gemma 1 or 2 has 256,128 rows
      as in official checkpoints; rows that a Hugging Face file lacks are zero and their ids must not be sampled (the
      samplers of `gm.text` never do).

    Raises:
      CheckpointNotFound, FormatError, WeightsMismatch: nothing there, a broken file, the wrong tensors.
      UnsupportedError: an Orbax checkpoint, a model without a JAX network, float16 for Gemma 3.
      CheckpointError: (a ValueError) arguments that exclude each other.
    """
    _check_arguments(params, sharding, quantize, dtype, text_only)
    path = hub.resolve(path)
    _refuse_orbax(path)
    with open_checkpoint(path) as checkpoint:
        config = _config(checkpoint)
        check_dtype(dtype, config)
        like = None if params is None else _flatten(params)
        if like is not None:
            text_only = _check_structure(like, config, text_only, path)
            if donate:
                _free(like)
        tree: dict[str, Any] = {}
        for name, parts in _leaves(checkpoint, config, text_only):
            target = None if like is None else like[name]
            array = _read_leaf(name, parts, config, np.dtype(_dtype_of(name, parts, target, dtype)))
            where = _sharding_of(name, sharding, target)
            _insert(tree, name, jax.device_put(array, where, may_alias=True))
    return tree


def check_dtype(dtype: DType | None, config: configs.GemmaConfig) -> None:
    """Refuses what is no float type, and float16 where the activations of the model do not fit into it."""
    if dtype is None:
        return
    name = jnp.dtype(dtype).name
    if name not in _FLOATS:
        raise UnsupportedError(f"dtype: expected one of {', '.join(_FLOATS)}, got {name}")
    if name == "float16" and config.use_qk_norm:
        raise UnsupportedError(
            "float16 cannot run Gemma 3: its activations pass 65504, the largest float16, and the text becomes NaN; "
            "use bfloat16 or float32"
        )


def _check_arguments(params: Any, sharding: Any, quantize: bool, dtype: Any, text_only: bool) -> None:
    if params is not None and sharding is not None:
        raise CheckpointError("`sharding` and `params` are mutually exclusive.")
    if params is not None and dtype is not None:
        raise CheckpointError("`dtype` and `params` are mutually exclusive: the dtypes of `params` are followed.")
    if quantize:
        raise UnsupportedError(
            "quantize=True renames the leaves of an official checkpoint for quantization-aware training, which is not "
            "available yet; leave it out"
        )
    if params is None:
        return
    if not isinstance(params, Mapping) or any("/" in key for key in params) or "embedder" not in params:
        keys = ", ".join(list(params)[:4]) if isinstance(params, Mapping) else type(params).__name__
        raise CheckpointError(
            f"`params` must be a nested tree such as model.init(...)['params'], with the key 'embedder' on top; "
            f"got {keys}"
        )
    if text_only and "vision_encoder" in params:
        raise CheckpointError("`text_only=True`, but `params` hold a vision encoder: pass one or the other.")


def _refuse_orbax(path: Path) -> None:
    if path.is_dir() and any((path / name).exists() for name in _ORBAX_FILES):
        raise UnsupportedError(
            f"{path}: an Orbax checkpoint, which is not read yet; expected a .gguf or .safetensors file, or a Hugging "
            f"Face folder with the same weights"
        )


def _config(checkpoint: Checkpoint) -> configs.GemmaConfig:
    config = checkpoint.config()
    if not isinstance(config, configs.GemmaConfig):
        raise UnsupportedError(
            f"{checkpoint.path}: holds a {type(config).__name__.removesuffix('Config')} model; gm.ckpts reads Gemma "
            f"text models and Gemma 3"
        )
    return config


def _leaves(checkpoint: Checkpoint, config: configs.GemmaConfig, text_only: bool) -> Iterator[Leaf]:
    """Each leaf of the tree with the tensors that make it up, in the table's order."""
    leaves: dict[str, list[tuple[weights.Tensor, TensorReader]]] = {}
    for tensor, reader in load_tensors(checkpoint, config, text_only=text_only):
        leaves.setdefault(tensor.slots["flax"].name, []).append((tensor, reader))
    yield from leaves.items()


def _dtype_of(name: str, parts: list, target: Any, dtype: DType | None) -> Any:
    if target is not None:
        return target.dtype
    if any(part in name.split("/") for part in _ALWAYS_FLOAT32):
        return np.float32
    if dtype is not None:
        return jnp.dtype(dtype)
    stored = {reader.dtype for _, reader in parts}
    return jnp.bfloat16 if stored == {"BF16"} else np.float32


def _read_leaf(name: str, parts: list, config: configs.GemmaConfig, dtype: np.dtype) -> np.ndarray:
    """One leaf, filled slot by slot."""
    shape = parts[0][0].slots["flax"].shape
    rows = config.table_rows
    if name == "embedder/input_embedding" and shape[0] < rows:
        shape = (rows, *shape[1:])  # the JAX table is padded
    buffer = aligned_empty(shape, dtype)
    for tensor, reader in parts:
        slot = tensor.slots["flax"]
        part = buffer[slot.index] if slot.index else buffer
        if slot.rows is not None:
            part = part[slice(*slot.rows)]
        filled = part[: tensor.shape[0]] if tensor.name == "embed" else part
        if slot.axes == tensor.axes:
            reader(out=filled)
        else:
            filled[...] = weights.convert(reader(dtype), tensor.axes, slot.axes, tensor.dims)
        part[len(filled) :] = 0
    return buffer


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised C-contiguous array that JAX can take over without copying."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _sharding_of(name: str, sharding: Any, target: Any) -> Any:
    if target is not None:
        return getattr(target, "sharding", None)  # a ShapeDtypeStruct may have none, a numpy array has none
    if isinstance(sharding, Mapping):
        for key in name.split("/"):
            sharding = sharding[key]
    return sharding


def _check_structure(like: Mapping[str, Any], config: configs.GemmaConfig, text_only: bool, path: Path) -> bool:
    """`params` must ask for exactly what the checkpoint has; lists every difference. Returns whether text only."""
    vision = any(name.startswith("vision_encoder/") for name in like)
    if vision and config.vision is None:
        raise CheckpointError(f"`params` hold a vision encoder, but {path} has none.")
    text_only = text_only or not vision
    if text_only:
        config = configs.text_only(config)
    expected = weights.expected(config, "flax")
    table = "embedder/input_embedding"
    expected[table] = (config.table_rows, *expected[table][1:])
    misshaped = [
        f"{name}: expected {tuple(like[name].shape)} (of `params`), got {shape}"
        for name, shape in expected.items()
        if name in like and tuple(like[name].shape) != shape
    ]
    missing, unexpected = sorted(set(like) - set(expected)), sorted(set(expected) - set(like))
    if missing or unexpected or misshaped:
        hint = "`params` (its names are the missing ones) ask for another model than the checkpoint holds."
        raise WeightsMismatch(path, missing=missing, unexpected=unexpected, misshaped=misshaped, hint=hint)
    return text_only


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}/") if isinstance(value, Mapping) else {name: value}
    return flat


def _insert(tree: dict[str, Any], name: str, leaf: jax.Array) -> None:
    *folders, last = name.split("/")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[last] = leaf


def _free(like: dict[str, Any]) -> None:
    """Deletes the arrays of `params`; what is left of each says dtype and sharding."""
    for name, array in like.items():
        if isinstance(array, jax.Array):
            like[name] = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
            array.delete()
