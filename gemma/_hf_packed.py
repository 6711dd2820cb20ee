# SPDX-License-Identifier: Apache-2.0
"""INT4 and INT8 weights in safetensors files, in the layout that the library compressed-tensors reads, both directions.

    X.weight                      int8 [out, in]        and X.weight_scale float32 [out, 1]        "int-quantized"
    X.weight_packed               int32 [out, in / 8]   and X.weight_scale, X.weight_shape [2]     "pack-quantized"

Eight 4-bit codes, each plus 8, in an int32, the first in the lowest bits; weight = code * scale, one scale for each
output. In memory (`quants.py`) INT4 has the nibble order of Q4_0, so its bytes are rearranged on the way. config.json
says `quantization_config`. Checked by reading back; no other program has read these files yet.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma._pack_tensors import pack_tensor, runs
from gemma._quants_mixes import plan, recipe
from gemma.checkpoint import HfCheckpoint, TensorInfo
from gemma.errors import CheckpointError, ConfigError, FormatError, ShapeError
from gemma.formats import safetensors as st
from gemma.quants import PackedTensor, QuantType, quantization_error, quantize
from gemma.saving import Job, SavedTensor

PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"
_SCALE_DTYPES = ("F32", "BF16", "F16")
_BITS = {QuantType.INT4: 4, QuantType.INT8: 8}


# ---- reading ---------------------------------------------------------------------------------------------------------


class PackedHfCheckpoint(HfCheckpoint):
    """A Hugging Face checkpoint some of whose weights are codes with scales; they go by their plain names."""

    def __init__(self, path: Path, shards: list[st.Safetensors]):
        super().__init__(path, shards)
        tensors, self._codes = fold(self.tensors)
        self.tensors = types.MappingProxyType(tensors)

    def packed(self, name: str) -> PackedTensor:
        return self._decoded(self.info(name)) if name in self._codes else super().packed(name)

    def _convert(self, info: TensorInfo, out: np.ndarray) -> None:
        if info.name in self._codes:
            self._decoded(info).dequantize(out=out)
        else:
            super()._convert(info, out)

    def _decoded(self, info: TensorInfo) -> PackedTensor:
        return packed_rows(self._sources, self.info(info.name), info, *self._codes[info.name])


def fold(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
    """Tensors of a file with packed weights under their plain names.

    Args:
      tensors: name to `gemma.checkpoint.TensorInfo`.

    Returns:
      The tensors, and for each packed one (scale, shape or None).

    Raises:
      FormatError: codes without a scale, or of another shape or type than the layout's.
    """
    done, scales = dict(tensors), {}
    for name, scale in tensors.items():
        if not name.endswith(f".weight{SCALE}"):
            continue
        plain = name.removesuffix(SCALE)
        codes, shape = done.get(plain + PACKED) or done.get(plain), done.get(plain + SHAPE)
        int4 = codes is not None and codes.name.endswith(PACKED)
        right = codes is not None and codes.dtype == ("I32" if int4 else "I8") and len(codes.shape) == 2
        rows = codes.shape[:1] if right else ()
        if not right or scale.dtype not in _SCALE_DTYPES or scale.shape not in (rows, (*rows, 1)):
            raise FormatError(
                scale.file,
                scale.offset,
                f"{name}: expected one float for each row of int8 codes {plain} or int32 codes {plain}{PACKED}, got "
                f"{scale.dtype} {scale.shape} for {codes and (codes.dtype, codes.shape)}",
            )
        width = codes.shape[1] * (8 if int4 else 1)
        type = "INT4" if int4 else "INT8"
        if int4 and width % QuantType.INT4.block_size:
            raise FormatError(
                codes.file, codes.offset, f"{plain}: rows of {width} 4-bit codes are not whole blocks of 32"
            )
        for old in (plain + PACKED, name, plain + SHAPE):
            done.pop(old, None)
        done[plain] = dataclasses.replace(codes, name=plain, shape=(codes.shape[0], width), dtype=type)
        scales[plain] = (scale, shape)
    return done, scales


def scale_of(info: Any, read: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """The scales as float32 [rows]; `read(offset, nbytes)` gives bytes of their file."""
    raw = read(info.offset, info.nbytes)
    if info.dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(-1)
    return raw.view("<f4" if info.dtype == "F32" else "<f2").astype(np.float32).reshape(-1)


def packed_rows(sources: Mapping[Path, Any], whole: Any, info: Any, scale: Any, shape: Any | None) -> PackedTensor:
    """A packed weight, or some of its rows.

    Args:
      sources: file to open source.
      whole: the TensorInfo of the weight.
      info: that of the rows.
      scale: that of the scales.
      shape: that of `weight_shape`, or None.

    Raises:
      FormatError: `weight_shape` says something else than the codes.
    """
    type = QuantType[info.dtype]
    width = type.row_bytes(info.shape[1])
    if shape is not None:
        said = sources[shape.file].read(shape.offset, shape.nbytes)
        if shape.dtype != "I64" or tuple(said.view("<i8")) != tuple(whole.shape):
            raise FormatError(shape.file, shape.offset, f"{shape.name}: expected int64 {whole.shape}, as the codes are")
    codes = sources[info.file].read(info.offset, info.nbytes).reshape(-1, width)
    first = (info.offset - whole.offset) // width
    scales = scale_of(scale, sources[scale.file].read)[first : first + len(codes)]
    data = from_words(codes) if type is QuantType.INT4 else codes
    return PackedTensor(type, (len(data), info.shape[1]), data, np.ascontiguousarray(scales))


def from_words(raw: np.ndarray) -> np.ndarray:
    """uint8 [rows, in / 2], two neighbours in a byte, to the order of Q4_0: the first 16 of 32 low, the others high."""
    codes = np.stack([raw & 15, raw >> 4], axis=-1).reshape(len(raw), -1, 2, 16)
    return (codes[:, :, 0] | (codes[:, :, 1] << 4)).reshape(len(raw), -1)


def to_words(data: np.ndarray) -> np.ndarray:
    """The inverse, as int32 [rows, in / 8]."""
    parts = data.reshape(len(data), -1, 16)
    codes = np.concatenate([parts & 15, parts >> 4], axis=2).reshape(len(data), -1, 2)
    return np.ascontiguousarray(codes[:, :, 0] | (codes[:, :, 1] << 4)).view("<i4")


# ---- writing ---------------------------------------------------------------------------------------------------------


class Writer:
    """What `_save_safetensors` asks while it writes a quantized folder.

    Raises:
      ConfigError: a recipe that this format does not hold, or an importance matrix.
    """

    def __init__(self, job: Job):
        found = recipe(job.quantize or "int8")
        if found.base not in _BITS or job.imatrix is not None:
            raise ConfigError(
                f"quantize: safetensors hold floats, int8 or int4 (without an importance matrix), got {job.quantize!r}"
            )
        self._job, self._type = job, found.base
        table = {tensor.name: name for name, pairs in job.arrays.items() for tensor, _ in pairs}
        tensors = [pairs[0][0] for pairs in job.arrays.values()]
        chosen = plan(tensors, found.name)
        self._coded = {table[name] for name, type in chosen.items() if type is self._type}
        self._parts: dict[str, str] = {}  # name in the file to the weight's name
        self.saved: dict[str, SavedTensor] = {}

    def specs(self) -> list[st.TensorSpec]:
        """Everything that will be in the files."""
        found = []
        for name in self._job.arrays:
            shape = self._job.shape(name)
            if name not in self._coded:
                found.append(st.TensorSpec(name, self._job.stored_dtype(name), shape))
                continue
            found.append(st.TensorSpec(name + SCALE, np.dtype("<f4"), (shape[0], 1)))
            if self._type is QuantType.INT8:
                found.append(st.TensorSpec(name, np.dtype("i1"), shape))
            else:
                found.append(st.TensorSpec(name + PACKED, np.dtype("<i4"), (shape[0], shape[1] // 8)))
                found.append(st.TensorSpec(name + SHAPE, np.dtype("<i8"), (2,)))
            self._parts |= {spec.name: name for spec in found if spec.name.startswith(name)}
        return found

    def config(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        weights = dict(num_bits=_BITS[self._type], type="int", symmetric=True, strategy="channel", dynamic=False)
        return {
            "quant_method": "compressed-tensors",
            "format": "int-quantized" if self._type is QuantType.INT8 else "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear", "Embedding"], "weights": weights}},
            "ignore": [],
        }

    def read(self, spec: st.TensorSpec) -> Iterator[np.ndarray] | None:
        """One array of the file in runs of rows; None: it is written as floats."""
        weight = self._parts.get(spec.name)
        if weight is None:
            return None
        if spec.name == weight + SHAPE:
            return iter([np.array(self._job.shape(weight), "<i8")])
        return self._codes(weight, spec)

    def _codes(self, weight: str, spec: st.TensorSpec) -> Iterator[np.ndarray]:
        tensor, reader = self._job.arrays[weight][0]
        if len(self._job.arrays[weight]) > 1 or tensor.shape != self._job.shape(weight):
            raise ShapeError(f"{weight}: is not stored as {tensor.name} {tensor.shape}; it cannot be quantized here")
        worst, squares = 0.0, 0.0
        for values, packed in self._packed(tensor, reader):
            if spec.name == weight + SCALE:
                yield packed.scale[:, None]
                continue
            yield packed.data.view(np.int8) if self._type is QuantType.INT8 else to_words(packed.data)
            if values is not None:
                largest, mean = quantization_error(values, packed)
                worst, squares = max(worst, largest), squares + mean * mean * values.size
        if spec.name != weight + SCALE:
            size = int(np.prod(tensor.shape))
            errors = (worst, (squares / size) ** 0.5)
            self.saved[weight] = SavedTensor(
                weight, self._type.name, tensor.shape, spec.nbytes + 4 * spec.shape[0], *errors
            )
        self._job.advance(spec.name, spec.nbytes)

    def _packed(self, tensor: Any, reader: Any) -> Iterator[tuple[np.ndarray | None, PackedTensor]]:
        if reader.dtype == self._type.name:
            yield None, pack_tensor(tensor, reader, self._type)
            return
        try:
            for values in runs(tensor, reader):
                yield values, quantize(values, self._type)
        except CheckpointError as error:
            raise CheckpointError(f"{tensor.name}: {error}") from None


def arrays_of(saved: SavedTensor) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The arrays of a safetensors file that hold one reported tensor: name to (dtype, shape)."""
    if saved.type not in ("INT4", "INT8"):
        return {saved.name: (saved.type, saved.shape)}
    rows, columns = saved.shape
    found: dict[str, tuple[str, tuple[int, ...]]] = {saved.name + SCALE: ("F32", (rows, 1))}
    if saved.type == "INT8":
        return found | {saved.name: ("I8", saved.shape)}
    return found | {saved.name + PACKED: ("I32", (rows, columns // 8)), saved.name + SHAPE: ("I64", (2,))}
