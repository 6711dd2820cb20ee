# SPDX-License-Identifier: Apache-2.0
"""An Orbax folder as a `gemma.checkpoint.Checkpoint`: names of the NESTED tree, shapes, lazily read arrays.

Arrays are read one by one, or in parts, with TensorStore; Orbax's own code, whose restoring reads whole trees, is not
needed. Layouts are `_compat.py`'s, which model it is `_detect.py`'s, putting arrays on devices `_load.py`'s.

A folder is hostile until it is checked: names and shapes are bounded before anything is allocated, a chunk that is
not stored is an error where the format promises all of them, and reading creates no file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from gemma import checkpoint as files
from gemma._orbax_folder import ITEM, METADATA, is_orbax, item_folder, read_sidecar
from gemma.checkpoint import Checkpoint, TensorInfo, TokenizerSource
from gemma.errors import CheckpointError, CheckpointNotFound, FormatError, ShapeError, UnsupportedError
from gemma.gm.ckpts import _detect
from gemma.gm.ckpts import _orbax_checks as checks
from gemma.gm.ckpts._compat import Keys, Layout, Place, layout_of, nested_places

_MOST_AXES = 8
_TITLES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "int4": "I4",
    "uint8": "U8",
    "uint32": "U32",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
DTYPES = {title: np.dtype(getattr(ml_dtypes, name, name)) for name, title in _TITLES.items()}
FLOATS = {np.dtype(name) for name in ("float32", "float16", ml_dtypes.bfloat16)}


def open_checkpoint(
    path: str | os.PathLike[str], *, mmap: bool = True, config: _detect.AnyConfig | None = None
) -> Checkpoint:
    """Opens a checkpoint of any kind: what `gemma.checkpoint.open_checkpoint` opens, and Orbax folders.

    Args:
      path: a file or folder.
      mmap: as there; an Orbax folder is never mapped.
      config: the configuration of an Orbax folder; None: the one saved with it, else found from its shapes.
    """
    if is_orbax(path):
        return OrbaxCheckpoint(path, config=config)
    return files.open_checkpoint(path, mmap=mmap)


class OrbaxCheckpoint(Checkpoint):
    """An Orbax folder in any of the four layouts.

    Attributes:
      layout: of the folder.
      tensors: slash name in the NESTED tree to TensorInfo; arrays outside the tree (an optimizer's state) are not here.
    """

    format = "flax"

    def __init__(self, path: str | os.PathLike[str], *, config: _detect.AnyConfig | None = None):
        path = Path(path)
        folder = item_folder(path.absolute())  # TensorStore wants the whole path
        if folder is None:
            raise CheckpointNotFound(
                f"No item metadata found in {path}: expected an Orbax folder with {METADATA}, here or in {ITEM}/"
            )
        self.folder, self._given = folder, config
        self._identity = self._identify()
        self._context = ts.Context(
            {
                "cache_pool": {"total_bytes_limit": 0},
                "file_io_concurrency": {"limit": 4},
                "data_copy_concurrency": {"limit": 2},
            }
        )
        about = checks.read_metadata(folder)
        self._ocdbt, self._driver = about["ocdbt"], about["driver"]
        checks.check_sizes(path)
        stored = self._stored_keys() if about["keys"] is None or about["complete"] else None
        keys = checks.keys_of(stored, folder) if about["keys"] is None else about["keys"]
        self.layout = layout_of(key[0] for key in (*keys, *about["empty"]))
        wanted = [k for k in keys if self.layout is not Layout.KAULDRON or k[0] == "params"]
        arrays = self._open_arrays(wanted)
        if about["complete"]:
            checks.check_chunks(arrays, stored, folder)
        self._places = nested_places({k: tuple(a.shape) for k, a in arrays.items()}, self.layout, str(folder))
        self._arrays = arrays
        self._last: tuple[str, np.ndarray] | None = None
        tensors = {name: self._info(name, place) for name, place in self._places.items()}
        checks.check_claim(tensors.values(), folder)
        super().__init__(path, {}, tensors, {"layout": str(self.layout)} | about["custom"])

    # ---- what the model is -------------------------------------------------------------------------------------------

    def config(self):
        """The configuration: the one given, the one saved with the tree, or the preset that has exactly these shapes.

        Raises:
          ConfigError: none of them; shapes alone do not say windows, rotary bases and caps.
        """
        found = self.detected()
        return found.require(self.path)

    def detected(self) -> _detect.Detected:
        """What is known about the model, and from where; for binding names and shapes it need not be complete."""
        if self._given is not None:
            return _detect.Detected(self._given, "given")
        for folder in (self.folder, self.folder.parent) if self.folder.name == ITEM else (self.folder,):
            saved = read_sidecar(folder)
            if saved is not None:
                return _detect.Detected(saved, "saved")
        return _detect.detect({name: info.shape for name, info in self.tensors.items()})

    def tokenizer_source(self) -> TokenizerSource | None:
        """A tokenizer file in the folder or right above it, where published archives put it."""
        for folder in dict.fromkeys((self.folder, self.path, self.path.parent)):
            for name, kind in (("tokenizer.model", "sentencepiece"), ("tokenizer.json", "tokenizer.json")):
                if (folder / name).is_file():
                    return TokenizerSource(kind, folder / name)
        return None

    # ---- values ------------------------------------------------------------------------------------------------------

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a leaf as numpy keeps it in memory, uint8 [nbytes]; the file's are compressed."""
        return self.read(name).reshape(-1).view(np.uint8)

    def packed(self, name: str):
        raise UnsupportedError(f"{self.path}: {name}: an Orbax folder holds no packed types; read it as floats")

    def read(self, name: str, dtype=None, out: np.ndarray | None = None) -> np.ndarray:
        """A leaf as an array of its shape.

        Args:
          name: in the NESTED tree.
          dtype: float32, bfloat16 or float16 for float leaves; None keeps what is stored.
          out: a C-contiguous array to fill; its dtype wins.

        Returns:
          `out`, or an array. The last leaf that was read whole is kept, since several tensors may share it: copy before
          you change it.
        """
        info = self.info(name)
        if out is not None:
            if out.shape != info.shape or not out.flags.c_contiguous:
                raise CheckpointError(f"{name}: expected a C-contiguous `out` of shape {info.shape}, got {out.shape}")
            return self.read_part(name, (), out)
        target = DTYPES[info.dtype] if dtype is None else np.dtype(dtype)
        if self._last is None or self._last[0] != name or self._last[1].dtype != target:
            self._last = name, self.read_part(name, (), np.empty(info.shape, target))
        return self._last[1]

    def read_rows(self, name: str, start: int, stop: int, dtype=np.float32) -> np.ndarray:
        """Rows start..stop-1 along the first axis, as a fresh array of float32, bfloat16 or float16."""
        info = self.info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise CheckpointError(f"{self.path}: {name} {info.shape}: no rows {start}..{stop}")
        return self.read_part(name, (slice(start, stop),), np.empty((stop - start, *info.shape[1:]), dtype))

    def read_part(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> np.ndarray:
        """Fills `out` with a part of a leaf; only the chunks that hold it are read.

        Args:
          name: in the NESTED tree.
          index: slices with step 1, one for each leading axis that is cut; () is the whole leaf.
          out: an array of the part's shape; its dtype decides.
        """
        info, place = self.info(name), self._places[name]
        stored = DTYPES[info.dtype]
        if out.dtype != stored and not (out.dtype in FLOATS and (stored in FLOATS or info.dtype == "F64")):
            raise UnsupportedError(f"{self.path}: {name} is {info.dtype} and cannot be read as {out.dtype}")
        if self._identify() != self._identity:
            raise CheckpointError(f"{self.path}: was replaced by another checkpoint while it was read; open it again")
        view = self._arrays[place.keys]
        view = view if place.index is None else view[place.index]
        view = view[index] if index else view
        if tuple(view.shape) != out.shape:
            raise ShapeError(f"{name}: expected `out` of shape {tuple(view.shape)}, got {out.shape}")
        target = ts.array(out)
        view = view[ts.d[:].translate_to[0]] if out.ndim else view
        try:
            target.write(ts.cast(view, target.dtype) if view.dtype != target.dtype else view).result()
        except (ValueError, OSError) as error:
            raise checks.broken(self.folder, f"{name} cannot be read", error) from None
        return out

    def release(self, name: str) -> None:
        """Lets the leaf that was read last leave memory."""
        self.info(name)
        self._last = None

    def close(self) -> None:
        """Closes the folder; arrays handed out before stay readable."""
        self._last, self._arrays = None, {}

    # ---- opening -----------------------------------------------------------------------------------------------------

    def _identify(self) -> tuple[int, int]:
        try:
            status = os.stat(self.folder)
        except OSError:
            return 0, 0
        return status.st_dev, status.st_ino

    def _kvstore(self, path: str = "") -> dict[str, Any]:
        base = dict(driver="file", path=f"{self.folder}/")
        return dict(driver="ocdbt", base=base, path=path) if self._ocdbt else base | dict(path=f"{self.folder}/{path}")

    def _stored_keys(self) -> list[str]:
        """Every key of the store, the names of chunks included."""
        try:
            found = ts.KvStore.open(self._kvstore(), context=self._context).result().list().result()
        except (ValueError, OSError) as error:
            raise checks.broken(self.folder, "its store of arrays cannot be read", error) from None
        if len(found) > checks.MOST_CHUNKS:
            raise FormatError(self.folder, None, f"{len(found)} chunks; expected at most {checks.MOST_CHUNKS}")
        return [key.decode("utf-8", "replace") for key in found]

    def _open_arrays(self, keys: Iterable[Keys]) -> dict[Keys, ts.TensorStore]:
        opening = {}
        for key in keys:
            spec = dict(driver=self._driver, kvstore=self._kvstore(".".join(key) + "/"))
            opening[key] = ts.open(spec, open=True, create=False, read=True, write=False, context=self._context)
        arrays, missing = {}, []
        for key, future in opening.items():
            try:
                arrays[key] = future.result()
            except (ValueError, OSError) as error:
                if "NOT_FOUND" not in str(error):
                    raise checks.broken(self.folder, f"{'/'.join(key)[:200]} cannot be opened", error) from None
                missing.append("/".join(key)[:200])
        if missing:
            names = "".join(f"\n  {name}" for name in missing)
            raise FormatError(self.folder, None, f"{METADATA} names arrays that are not stored:{names}")
        return arrays

    def _info(self, name: str, place: Place) -> TensorInfo:
        array = self._arrays[place.keys]
        shape = tuple(array.shape) if place.index is None else tuple(array.shape)[1:]
        title = _TITLES.get(array.dtype.name)
        if title is None:
            raise UnsupportedError(
                f"{self.folder}: {name} has dtype {array.dtype.name}; expected one of {', '.join(_TITLES)}"
            )
        if len(shape) > _MOST_AXES or any(size >= 1 << 40 for size in shape):
            raise FormatError(self.folder, None, f"{name}: expected at most {_MOST_AXES} axes, got the shape {shape}")
        return TensorInfo(name, shape, title, math.prod(shape) * DTYPES[title].itemsize, self.folder, 0)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested tree as slash names; empty branches vanish."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}/") if isinstance(value, Mapping) else {name: value}
    return flat
