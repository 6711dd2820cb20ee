# SPDX-License-Identifier: Apache-2.0
"""A whole decoder in native code: the structs of `native/gemmakit.h` filled from a checkpoint, and its calls.

Gemma 1, 2 and 3, text. Packed weights stay in the mapped file and are used in place; so are float32, float16 and
bfloat16 matrices that the file holds as [out, in]. What a file lays out differently (fused or transposed) is copied
once. Norms become float32 and get their 1. Slots, sampling and everything about requests is above this, in
`serving/_runner_cpu.py`; single products are `_native.py`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gemma import config as configs
from gemma.adapters import AdapterFile
from gemma.checkpoint import Checkpoint, load_tensors
from gemma.config import GemmaConfig
from gemma.errors import CheckpointError, ConfigError, KernelError, SamplingError, UnsupportedError
from gemma.kernels._adapter import GkLayerAdapter, PackedAdapter, SampledWeight, refuse_unserved
from gemma.kernels._model_structs import GkLayer, GkModelConfig, config_struct, layer_struct
from gemma.kernels._native import Context, GkWeight, NativeWeight, library, why_missing

CACHE_TYPES = {"float32": 0, "bfloat16": 1, "int8": 2}  # enum gk_cache_type
CACHE_SHORT = {"f32": "float32", "bf16": "bfloat16", "int8": "int8"}
_FAMILIES = ("gemma", "gemma2", "gemma3", "gemma3_text")
_OUT_OF_MEMORY, _UNSUPPORTED, _NOT_FINITE = -2, -3, -4


@functools.cache
def _library() -> ctypes.CDLL:
    lib = library()
    if lib is None:
        raise KernelError(f"the native model needs the library of gemma.kernels: {why_missing()}")
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    signatures = {
        "gk_model_new": (pointer, pointer, ctypes.POINTER(GkModelConfig), ctypes.POINTER(GkLayer)),
        "gk_model_free": (None, pointer),
        "gk_model_open": (ctypes.c_int, pointer, i32, i64, i32, i64),
        "gk_model_cache_bytes": (i64, pointer),
        "gk_model_prefill": (ctypes.c_int, pointer, i32, pointer, i64),
        "gk_model_step": (ctypes.c_int, pointer, i32, pointer, pointer),
        "gk_model_score": (ctypes.c_int, pointer, i32, pointer, i64),
        "gk_model_chunk_logits": (pointer, pointer),
        "gk_model_logits": (pointer, pointer, i32),
        "gk_model_length": (i64, pointer, i32),
        "gk_model_truncate": (ctypes.c_int, pointer, i32, i64),
        "gk_model_copy": (ctypes.c_int, pointer, i32, i32, i64),
        "gk_model_set_adapter": (ctypes.c_int, pointer, ctypes.POINTER(GkLayerAdapter), i32, ctypes.c_float),
        "gk_model_scale_adapter": (ctypes.c_int, pointer, ctypes.c_float),
        "gk_argmax": (i64, pointer, pointer, i64),
        "gk_top_k": (i64, pointer, pointer, i64, i64, pointer, pointer, ctypes.POINTER(ctypes.c_double)),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def unserved(config: Any) -> str | None:
    """Why the native decoder cannot run a model, as half a sentence; None where it can."""
    if not isinstance(config, GemmaConfig):
        return f"a {type(config).__name__.removesuffix('Config')} model has parts beside a Gemma 1, 2 or 3 text decoder"
    if config.model_type not in _FAMILIES:
        return f"it runs Gemma 1, 2 and 3 text, and this is {config.model_type}"
    if config.use_bidirectional_attention or any(s.bidirectional for s in config.layers):
        return "it runs causal attention, and this model looks both ways"
    for spec in config.layers:
        if spec.rope_fraction != 1.0 or spec.kv_source != spec.index:
            return f"layer {spec.index} rotates a part of its heads or shares keys, which it does not run"
    return None


class NativeModel:
    """A decoder with its cache. Slots count from 0; ids are not checked for their meaning, only for their range.

    with open_checkpoint(path) as checkpoint:
        model = NativeModel(checkpoint, threads=2)
    model.open(slots=1, max_len=4096)
    model.prefill(0, ids)
    model.logits(0).argmax()

    Attributes:
      config: of the text decoder.
      context: the instruction set and the threads that it runs on.
      weight_bytes: that a token's computation reads, the embedding table counted once, an adapter not.
      adapter: the one beside the weights, or None; `set_adapter` changes it.
      adapter_scale: what multiplies its own scales.
      adapter_bytes: of its factors, which every token reads as well.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        config: Any = None,
        threads: int | None = None,
        isa: str | None = None,
        context: Context | None = None,
    ):
        """Binds the weights; the checkpoint may be closed afterwards.

        Args:
          checkpoint: open.
          config: of the checkpoint, where it has been read already.
          threads, isa: as in `Context`.
          context: one to share; None makes one.

        Raises:
          UnsupportedError: a model that native code does not run. WeightsMismatch: it is not the configuration's.
          CheckpointError: NaN or infinity in norms or scales. KernelError: no library.
        """
        config = checkpoint.config() if config is None else config
        why = unserved(config)
        if why is not None:
            raise UnsupportedError(f"{checkpoint.path}: not for the native CPU decoder: {why}; use JAX or PyTorch")
        self._lib = _library()
        self.config = configs.text_only(config)
        self._name = os.fspath(checkpoint.path)
        self._keep: list[Any] = []  # what the structs point to
        readers = {
            tensor.name: (tensor, reader)
            for tensor, reader in load_tensors(checkpoint, config, text_only=True, strict_values=True)
        }
        self._weights: dict[str, NativeWeight] = {}
        weights = {name: self._weight(*found) for name, found in readers.items() if len(found[0].shape) > 1}
        norms = {name: self._norm(found[1]) for name, found in readers.items() if len(found[0].shape) == 1}
        self.weight_bytes = sum(weight.rows * weight.row_bytes for weight in weights.values())
        if "head" in weights:  # of the embedding only a row is read
            self.weight_bytes -= weights["embed"].rows * weights["embed"].row_bytes
        layers = (GkLayer * len(self.config.layers))(*(layer_struct(s, weights, norms) for s in self.config.layers))
        self.context = Context(threads, isa) if context is None else context
        struct = config_struct(self.config, weights, norms)
        self._model = self._lib.gk_model_new(self.context.handle, ctypes.byref(struct), layers)
        if not self._model:
            raise KernelError(f"{self._name}: {self._words()}")
        self._closer = weakref.finalize(self, _free, self._lib, self._model, self.context, os.getpid())
        self.adapter: AdapterFile | None = None
        self.adapter_scale, self.adapter_bytes = 0.0, 0

    def _weight(self, tensor: Any, reader: Any) -> GkWeight:
        try:
            packed: Any = reader.packed()
        except UnsupportedError:  # fused, transposed or padded in the file: a copy in the axes of the product
            packed = np.ascontiguousarray(reader()).reshape(tensor.shape[0], -1)
        weight = NativeWeight(packed)
        scale = getattr(packed, "scale", None)
        if scale is not None and not np.isfinite(scale).all():
            raise CheckpointError(f"{self._name}: {reader.slot.name} has NaN or infinite scales: get an undamaged file")
        self._keep.append(weight)
        self._weights[tensor.name] = weight
        return weight.struct

    def _norm(self, reader: Any) -> int:
        array = reader(np.float32) + np.float32(1)
        self._keep.append(array)
        return array.ctypes.data

    # ---- the cache

    def open(self, slots: int, max_len: int, cache_type: str = "float32", chunk: int = 512) -> None:
        """Makes room for slots x max_len tokens; each slot is empty afterwards.

        Args:
          slots, max_len: at least 1.
          cache_type: "float32", "bfloat16" or "int8".
          chunk: tokens of a prompt that are computed at a time; more need more memory.

        Raises:
          ConfigError: an unknown type. MemoryError.
        """
        if cache_type not in CACHE_TYPES:
            raise ConfigError(f"cache type: expected one of {', '.join(CACHE_TYPES)}, got {cache_type!r}")
        self._check(self._call("gk_model_open", slots, max_len, CACHE_TYPES[cache_type], chunk), "open")

    @property
    def cache_bytes(self) -> int:
        return int(self._call("gk_model_cache_bytes"))

    def length(self, slot: int) -> int:
        """Tokens that a slot holds."""
        return int(self._call("gk_model_length", slot))

    def truncate(self, slot: int, n: int) -> bool:
        """Forgets all but the first n tokens; False, and nothing is changed, where a ring has lost what that needs."""
        return self._kept(self._call("gk_model_truncate", slot, n), "truncate")

    def copy(self, src: int, dst: int, n: int) -> bool:
        """Makes slot `dst` hold the first n tokens of `src`; False as in `truncate`."""
        return self._kept(self._call("gk_model_copy", src, dst, n), "copy")

    def _kept(self, status: int, what: str) -> bool:
        if status == _UNSUPPORTED:
            return False
        self._check(status, what)
        return True

    # ---- an adapter beside the weights

    def set_adapter(self, adapter: AdapterFile | None, *, scale: float = 1.0, check_base: bool = True) -> None:
        """Puts an adapter beside the weights, instead of the one that is there; None takes it away.

        Every slot is empty afterwards: what it held was computed with other weights. After an error nothing has changed.

        Args:
          adapter: bound to this model, from `gemma.adapters.open_adapter`.
          scale: multiplies the adapter's own; 0 turns it off.
          check_base: refuse another base than the one that the adapter was trained on, where it says which.

        Raises:
          UnsupportedError: a kind that only JAX runs. CheckpointError: another base, NaN or infinity.
          WeightsMismatch: tensors that this model does not have, or of another shape. ConfigError: the scale.
        """
        scale = _finite(scale)
        if adapter is None:
            packed, layers, kind = None, None, 0
        else:
            refuse_unserved(adapter)
            adapter.check(self.config)
            if check_base:
                adapter.check_base(self._sampled)
            packed = PackedAdapter(adapter, len(self.config.layers))
            layers, kind = packed.layers, packed.type
        self._check(self._call("gk_model_set_adapter", layers, kind, scale), "set_adapter")
        self.adapter, self.adapter_bytes = adapter, packed.nbytes if packed else 0
        self.adapter_scale = scale if packed else 0.0

    def scale_adapter(self, scale: float) -> None:
        """The adapter that is there with another scale; every slot is empty afterwards.

        Raises:
          ConfigError: no adapter, or not a finite number.
        """
        if self.adapter is None:
            raise ConfigError(f"{self._name}: scale_adapter: there is no adapter; put one there with set_adapter")
        scale = _finite(scale)
        self._check(self._call("gk_model_scale_adapter", scale), "scale_adapter")
        self.adapter_scale = scale

    def _sampled(self, name: str) -> Any:
        weight = self._weights[name]
        return SampledWeight(weight.shape, lambda ids: self.context.rows(weight, ids))

    # ---- computing

    def prefill(self, slot: int, ids: Sequence[int]) -> None:
        """Reads ids after what a slot holds; the logits after the last are kept."""
        array = _ids(ids)
        self._check(self._call("gk_model_prefill", slot, array.ctypes.data, array.size), "prefill")

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """One token for each of several different slots, together."""
        rows, array = _ids(slots), _ids(tokens)
        self._check(self._call("gk_model_step", rows.size, rows.ctypes.data, array.ctypes.data), "step")

    def score(self, slot: int, ids: Sequence[int]) -> np.ndarray:
        """Reads ids after what a slot holds: the logits after each, float32 [n, V], a view until the next call. If that
        is `truncate`, any number of these tokens can be taken back.
        """
        array = _ids(ids)
        self._check(self._call("gk_model_score", slot, array.ctypes.data, array.size), "score")
        address = self._call("gk_model_chunk_logits")
        return _view(address, array.size * self.config.vocab_size).reshape(array.size, -1)

    def logits(self, slot: int) -> np.ndarray | None:
        """After a slot's last token: float32 [V], a view until the slot's next call. None where the slot is empty or
        was shortened, so that nothing has been computed after its last token.
        """
        address = self._call("gk_model_logits", slot)
        return _view(address, self.config.vocab_size) if address else None

    # ---- picking

    def argmax(self, logits: np.ndarray) -> int:
        """The likeliest id, the lowest of equals; -1 where none is finite or one is NaN."""
        return int(self._lib.gk_argmax(self.context.handle, logits.ctypes.data, logits.size))

    def top_k(self, logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, float]:
        """The k likeliest, in order, the lower id first among equals.

        Args:
          logits: float32 [V], contiguous; -inf is an id that cannot come.
          k: how many; fewer come where fewer are finite. 0 is for the sum alone.

        Returns:
          ids int32 [k], logits float32 [k], log sum exp of all of them.

        Raises:
          SamplingError: NaN or +inf, or nothing finite.
        """
        k = min(k, logits.size)
        ids, values, total = np.empty(k, np.int32), np.empty(k, np.float32), ctypes.c_double()
        count = self._lib.gk_top_k(
            self.context.handle, logits.ctypes.data, logits.size, k, ids.ctypes.data, values.ctypes.data, total
        )
        if count < min(k, 1):
            self._not_finite("sampling")
        return ids[:count], values[:count], total.value

    def close(self) -> None:
        """Gives the memory back; the model cannot be used afterwards. Closing twice does no harm."""
        with self.context.lock:
            self._closer()

    def _call(self, name: str, *arguments: Any) -> Any:
        """A function of the library on this model; an error where model or context are closed, or in a forked child."""
        if not self._closer.alive:
            raise KernelError(f"{self._name}: this native model is closed: load it again")
        with self.context.lock:
            _ = self.context.handle
            return getattr(self._lib, name)(self._model, *arguments)

    def _words(self) -> str:
        return (self._lib.gk_last_error() or b"").decode(errors="replace") or "no reason was given"

    def _not_finite(self, what: str) -> None:
        raise SamplingError(
            f"{self._name}: {what}: the logits are not finite: the weights hold NaN or infinity, or every token is "
            f"forbidden; get an undamaged file"
        )

    def _check(self, status: int, what: str) -> None:
        if status >= 0:
            return
        if status == _NOT_FINITE:
            self._not_finite(what)
        if status == _OUT_OF_MEMORY:
            raise MemoryError(f"{what}: {self._words()}")
        raise KernelError(f"{self._name}: {what}: {self._words()}")


def _free(lib: ctypes.CDLL, model: int, context: Context, owner: int) -> None:
    if os.getpid() == owner:  # `context` is an argument so that it outlives the model
        lib.gk_model_free(model)


def _finite(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float, np.number)) or not np.isfinite(scale):
        raise ConfigError(f"scale of the adapter: expected a finite number, got {scale!r}")
    return float(scale)


def _ids(ids: Iterable[int]) -> np.ndarray:
    return np.array(ids, np.int32)


def _view(address: int, count: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))
