# SPDX-License-Identifier: Apache-2.0
"""`save_params` writes a parameter tree as an Orbax checkpoint; `save_tensors` one that is never in memory as a whole.

Both go through a temporary folder: at the destination there is nothing, or all of it. The files are written by
`_orbax_write.py`, what appears at once is `gemma/_atomic.py`'s; trainers' states are `_checkpoint.py`'s.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from gemma import weights
from gemma._atomic import atomic_folder, check_destination, latest_valid, verify_manifest
from gemma._orbax_folder import write_sidecar
from gemma._tokenizer_write import write_hf_files
from gemma.config import GemmaConfig, T5GemmaConfig
from gemma.errors import CheckpointError
from gemma.gm.ckpts import _detect
from gemma.gm.ckpts._compat import Layout
from gemma.gm.ckpts._leaves import grouped
from gemma.gm.ckpts._orbax import DTYPES, flatten
from gemma.gm.ckpts._orbax_write import Rows, write_orbax
from gemma.saving import SavedTensor, SaveReport

if TYPE_CHECKING:
    from gemma.checkpoint import TokenizerSource
    from gemma.saving import Reader


def save_params(
    params: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    wait_until_finished: bool = False,
    layout: str | Layout = Layout.NESTED,
    config: _detect.AnyConfig | None = None,
    step: int = 0,
    replace: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Saves a nested parameter tree as an Orbax checkpoint.

    When this returns, the checkpoint is complete and on the disk; until then nothing is seen at `path`.

    Args:
      params: nested dictionaries of JAX or numpy arrays, any tree, as `load_params` and `model.init` give it.
      path: a folder that does not exist yet.
      wait_until_finished: accepted; saving always finishes before this returns.
      layout: nested, flat, stacked or kauldron, see `Layout`.
      config: the model's configuration, kept beside the tree. None: found from the shapes if they are a preset's.
      step: the number of the step, kept in the layout kauldron.
      replace: put it in the place of an existing checkpoint.
      progress: called with the arrays written and their number.

    Raises:
      SaveError: (a ValueError and an OSError) `Destination ... already exists`, or it cannot be written.
      CheckpointError: `params` are no tree of arrays, or not those of `config`.
    """
    del wait_until_finished
    target = check_destination(path, replace=replace, folder=True)
    leaves = _arrays(params)
    layout = Layout.of(layout)
    shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    detected = _detect.detect(shapes) if config is None else _detect.Detected(config, "given")
    if config is not None:
        _detect.check(shapes, detected, target, text_only=False)
    length = _pattern_length(detected.config) if layout is Layout.STACKED else 1
    rows = {name: Rows.of(leaf) for name, leaf in leaves.items()}
    with atomic_folder(target, replace=replace) as folder:
        write_orbax(folder, rows, layout=layout, pattern_length=length, step=step, progress=progress)
        if detected.config is not None and detected.source != "shapes":
            write_sidecar(folder, detected.config)


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Iterable[tuple[weights.Tensor, Reader]],
    config: _detect.AnyConfig,
    *,
    layout: str | Layout = Layout.NESTED,
    dtype: Any = None,
    tokenizer: TokenizerSource | None = None,
    replace: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> SaveReport:
    """Saves a model that is read tensor by tensor: the counterpart of `gemma.saving.save` for Orbax folders.

    Args:
      path: a folder that does not exist yet.
      tensors: as `gemma.checkpoint.load_tensors` gives them; one leaf is in memory at a time, and what is being written.
      config: of the model, kept beside the tree.
      layout: as in `save_params`.
      dtype: float32, float16 or bfloat16; None: as stored, packed types as float32.
      tokenizer: kept in the folder.
      replace, progress: as in `save_params`.

    Raises:
      SaveError: the destination exists or cannot be written.
      WeightsMismatch: tensors are missing.
      UnsupportedError: the model has no JAX tree.
    """
    target, layout = check_destination(path, replace=replace, folder=True), Layout.of(layout)
    leaves = grouped(tensors, as_stored=True)
    _detect.check(
        {name: leaf.shape for name, leaf in leaves.items()}, _detect.Detected(config, "given"), target, text_only=False
    )
    length = _pattern_length(config) if layout is Layout.STACKED else 1
    kinds = {name: leaf.dtype if dtype is None else np.dtype(dtype) for name, leaf in leaves.items()}
    rows = {
        name: Rows(leaf.shape, kinds[name], functools.partial(leaf.runs, kinds[name])) for name, leaf in leaves.items()
    }
    with atomic_folder(target, replace=replace) as folder:
        write_orbax(folder, rows, layout=layout, pattern_length=length, progress=progress)
        write_sidecar(folder, config)
        if tokenizer is not None:
            write_hf_files(tokenizer, folder, _vocabulary(config))
    files = tuple(sorted(file for file in target.rglob("*") if file.is_file()))
    titles = {np.dtype(kind): title for title, kind in DTYPES.items()}
    saved = tuple(
        SavedTensor(name, titles[kinds[name]], leaf.shape, math.prod(leaf.shape) * kinds[name].itemsize)
        for name, leaf in leaves.items()
    )
    return SaveReport("orbax", target, files, sum(file.stat().st_size for file in files), saved)


def _vocabulary(config: _detect.AnyConfig) -> int:
    return config.decoder.vocab_size if isinstance(config, T5GemmaConfig) else config.vocab_size


def _arrays(params: Any) -> dict[str, Any]:
    """The leaves of a tree, every one an array that this process can read."""
    if not isinstance(params, Mapping) or not params:
        raise CheckpointError(f"`params`: expected a nested dictionary of arrays, got {type(params).__name__}")
    leaves = flatten(params)
    for name, leaf in leaves.items():
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise CheckpointError(f"{name}: this array was freed (donated or released) and cannot be saved")
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            raise CheckpointError(f"{name}: expected an array, got {type(leaf).__name__}; only arrays can be saved")
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise CheckpointError(
                f"{name}: is spread over several processes; gather it first "
                f"(jax.experimental.multihost_utils.process_allgather) and save from one of them"
            )
        parts = name.split("/")
        if any(not part or part in (".", "..") or not part.isprintable() for part in parts):
            raise CheckpointError(f"{name[:80]!r}: expected printable names without empty parts")
    return leaves


def _pattern_length(config: _detect.AnyConfig | None) -> int:
    if not isinstance(config, GemmaConfig):
        raise CheckpointError("layout 'stacked' is that of a decoder: expected the parameters of one, or pass config=")
    return min(len(config.layer_pattern), config.num_hidden_layers)


__all__ = ["latest_valid", "save_params", "save_tensors", "verify_manifest"]
