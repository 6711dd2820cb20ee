# SPDX-License-Identifier: Apache-2.0
"""Weights into PyTorch modules: strict, tensor by tensor, nothing half-loaded.

Every module's parameters have Hugging Face's names, so one function serves them all. What is in a file is
`gemma/checkpoint.py`'s business, which names there are `gemma/weights`'. Each parameter is one fresh buffer that the
reader fills; a module on the meta device needs no more memory than its parameters and the tensor being read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gemma import _quants_mixes, hub, quants, weights
from gemma import config as configs
from gemma.adapters import AdapterFile, refuse_untied
from gemma.checkpoint import Checkpoint, load_tensors, open_checkpoint
from gemma.errors import UnsupportedError, WeightsMismatch
from gemma.quants import PackedTensor, QuantType

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gemma._load_tensors import TensorReader

_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}
M = TypeVar("M", bound=nn.Module)


class _NoFilling(TorchFunctionMode):
    """Initial values are not computed: what would fill a tensor leaves it as it is."""

    _FILLING = frozenset({Tensor.fill_, Tensor.normal_, Tensor.uniform_, Tensor.zero_})

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self._FILLING or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Modules built inside have parameters on the meta device: shapes, no memory.

    `torch.device("meta")` alone would do; but random values of no memory go through Python in PyTorch, which for their
    sake imports its compiler: some 800 modules, 70 MB and several seconds of every start.
    """
    with torch.device("meta"), _NoFilling():
        yield


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    config: Any,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    text_only: bool = False,
    quantize: str | None = None,
) -> None:
    """Replaces every parameter of a module by the checkpoint's.

    Build the module under `without_values()`, and at no time more than its parameters and one tensor exists. On any
    error the module is as it was before.

    Args:
      model: its parameters have the names of the "hf" column of the weight table (the first spelling).
      checkpoint: open, of any format.
      config: the checkpoint's configuration.
      dtype: float32, bfloat16 or float16, or its name. None: bfloat16 if all matrices are stored so, else float32.
      device: where the parameters live.
      text_only: the module is the text decoder alone; leave a vision tower in the file.
      quantize: None: every tensor becomes a parameter of `dtype`. "keep": matrices stay packed as the file holds them,
        without a copy where it is mapped. A type or mix ("Q8_0", "q4_k_m", "INT8", ...): matrices of that type stay,
        others are quantized to it. Layers and embeddings become those of `packed.py`, which run on a CPU; `dtype` is
        then that of the activations and norms.

    Raises:
      WeightsMismatch: tensors that are missing, unexpected or of the wrong shape, in the file or in the module.
      UnsupportedError: a dtype that the model cannot run in, or matrices that cannot be packed so.
      ConfigError: `quantize` is not a name of a type or mix.
    """
    dtype = check_dtype(dtype, config)
    tensors = list(load_tensors(checkpoint, config, text_only=text_only))
    own = configs.text_only(config) if text_only and isinstance(config, configs.GemmaConfig) else config
    names = {tensor.name: tensor.slots["hf"].name for tensor in weights.tensors(own)}
    shapes = {names[tensor.name]: tensor.shape for tensor, _ in tensors}
    _check_module(model, shapes, checkpoint)
    if dtype is None:
        stored = {reader.dtype for tensor, reader in tensors if len(tensor.shape) > 1}
        dtype = torch.bfloat16 if stored == {"BF16"} else torch.float32
    types = _packed_types([tensor for tensor, _ in tensors], quantize, device)
    state, packed = {}, {}
    for tensor, reader in tensors:
        if tensor.name in types:
            packed[names[tensor.name]] = _read_packed(reader, types[tensor.name])
            continue
        buffer = torch.empty(tensor.shape, dtype=dtype)
        reader(out=as_numpy(buffer))
        checkpoint.release(reader.slot.name)
        state[names[tensor.name]] = buffer.to(device)
    for name, value in state.items():
        _assign(model, name, value)
    if packed:
        from gemma._torch import packed as modules  # only who wants packed weights waits for the native kernels

        for name, value in packed.items():
            modules.replace(model, name, value, dtype)


def fuse_adapter(model: nn.Module, path: str | os.PathLike[str], adapter: AdapterFile) -> None:
    """Folds a LoRA adapter into the float parameters of a text decoder: float32 sums, rounded once.

    Args:
      model: with a `config`, loaded from `path`; its matrices may not be packed.
      adapter: bound to that configuration.

    Raises:
      CheckpointError: the adapter was trained on another base. UnsupportedError: it changes the input embedding alone.
    """
    refuse_untied(adapter)
    with open_checkpoint(path) as checkpoint:  # as the file has them: a checksum knows no float16
        readers = {t.name: reader for t, reader in load_tensors(checkpoint, checkpoint.config(), text_only=True)}
        adapter.check_base(lambda name: readers[name](np.float32))
    table = adapter.check(model.config)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, low in adapter.tensors.items():
            parameter = parameters[table[name].slots["hf"].name]
            parameter.copy_(torch.from_numpy(low.apply(parameter.detach().float().cpu().numpy())))


def _packed_types(
    tensors: Sequence[weights.Tensor], quantize: str | None, device: torch.device | str
) -> dict[str, QuantType | None]:
    """Canonical names of the tensors to be packed, each with its type; None: as it is stored."""
    if quantize is None:
        return {}
    if torch.device(device).type != "cpu":
        raise UnsupportedError(f"quantize={quantize!r}: packed weights run on the CPU, not on {device}: leave it out")
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    if any(tensor.name.startswith("vision.") for tensor in matrices):
        raise UnsupportedError("quantize: an image tower cannot be packed here; load the text decoder alone")
    if quantize == "keep":
        return dict.fromkeys((tensor.name for tensor in matrices), None)
    type = QuantType.__members__.get(str(quantize).upper())
    if type is not None and type.has_scale:  # a type of no GGUF mix
        return {tensor.name: _quants_mixes.fitting(type, tensor.shape[-1]) for tensor in matrices}
    types = _quants_mixes.plan(tensors, quantize)
    return {tensor.name: types[tensor.name] for tensor in matrices}


def _read_packed(reader: TensorReader, type: QuantType | None) -> PackedTensor:
    """A tensor in a type: its bytes in the file where they are of that type, else quantized."""
    plain = type is None and QuantType[reader.dtype].is_float
    if type is None or reader.dtype == type.name:
        try:
            return reader.packed()
        except UnsupportedError:  # laid out differently in the file: floats can be read in order, codes cannot
            if type is None and not plain:
                raise
    packed = quants.quantize(reader(None if plain else np.float32), QuantType[reader.dtype] if plain else type)
    reader.release()
    return packed


def text_from_pretrained(
    cls: type[M],
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantize: str | None = None,
) -> M:
    """A text model of class `cls` (built from a GemmaConfig) with the weights of a checkpoint, in evaluation mode.

    Args:
      cls: GemmaForCausalLM, or a class like it.
      path: what `gemma.hub.resolve` takes: a file, a folder, or `demo`. Of Gemma 3 with images, the text decoder.
      dtype, device, quantize: as in `load_weights`.

    Raises:
      HubError, CheckpointError, WeightsMismatch: the checkpoint cannot be found or used.
      UnsupportedError: it holds a model that does not continue text, or the dtype does not fit.
    """
    path = hub.resolve(path)
    with open_checkpoint(path) as checkpoint:
        config = checkpoint.config()
        if not isinstance(config, configs.GemmaConfig) or config.use_bidirectional_attention:
            kind = type(config).__name__.removesuffix("Config")
            hint = "; see paligemma.modeling_paligemma" if isinstance(config, configs.PaliGemmaConfig) else ""
            hint = "; see docs/t5gemma.md" if isinstance(config, configs.T5GemmaConfig) else hint
            raise UnsupportedError(
                f"{path}: holds a {kind} model that does not continue text; expected a Gemma decoder{hint}"
            )
        with without_values():
            model = cls(configs.text_only(config))
        load_weights(model, checkpoint, config, dtype=dtype, device=device, text_only=True, quantize=quantize)
    return model.eval()


def check_dtype(dtype: torch.dtype | str | None, config: Any) -> torch.dtype | None:
    """The dtype, also by its name: refuses what is no float type, and float16 where activations do not fit into it."""
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if dtype is not None and dtype not in _NUMPY:
        expected = ", ".join(str(known).removeprefix("torch.") for known in _NUMPY)
        raise UnsupportedError(f"dtype: expected one of {expected}, got {dtype}")
    if dtype == torch.float16 and getattr(config, "use_qk_norm", False):
        raise UnsupportedError(
            "float16 cannot run Gemma 3: its activations pass 65504, the largest float16, and the text becomes NaN; "
            "use bfloat16 or float32"
        )
    return dtype


def as_numpy(tensor: Tensor) -> np.ndarray:
    """A CPU tensor's memory as an array; bfloat16 through its bits, which torch's own conversion refuses."""
    dtype = np.dtype(_NUMPY[tensor.dtype])
    return tensor.view(torch.uint8 if tensor.ndim else tensor.dtype).numpy().view(dtype)


def _check_module(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint) -> None:
    """The module must have exactly the tensors that will be read; every difference is listed."""
    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    misshaped = [
        f"{name}: expected {own[name]} (of the module), got {shape}"
        for name, shape in shapes.items()
        if name in own and own[name] != tuple(shape)
    ]
    missing, unexpected = sorted(set(own) - set(shapes)), sorted(set(shapes) - set(own))
    if missing or unexpected or misshaped:
        hint = "the module was built from another configuration than the checkpoint's"
        raise WeightsMismatch(checkpoint.path, missing=missing, unexpected=unexpected, misshaped=misshaped, hint=hint)


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    """Puts a tensor in a parameter's place; who was frozen stays so."""
    *path, last = name.split(".")
    owner = model.get_submodule(".".join(path))
    setattr(owner, last, nn.Parameter(value, requires_grad=getattr(owner, last).requires_grad))
