# SPDX-License-Identifier: Apache-2.0
"""Packed weights as PyTorch modules: the bytes of a GGUF stay as they are, and products run on them, on a CPU.

A packed matrix is three entries of a state dict, in the place of `<name>.weight`:

    <name>.data    uint8 [O, W]   the bytes of every row, as `gemma.quants.PackedTensor` has them
    <name>.scale   float32        only of INT8 and INT4 ([O]) and SFP8 ([1])
    <name>.type    int32 []       how it is stored: GGUF's number, or 1000 SFP8, 1001 INT8, 1002 INT4

They are buffers: constants, not trained; gradients flow through them to the activations. `load.py` fills them from a
checkpoint, `load_packed_state_dict` from a state dict. The arithmetic is `gemma/kernels/_torch.py`. Axis letters: D
inputs, O outputs, V vocabulary, W bytes of a row.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gemma.errors import CheckpointError
from gemma.kernels import _torch as ops
from gemma.quants import PackedTensor

_NUMBERS = {type: number for number, type in ops.TYPES.items()}


class PackedWeight(NamedTuple):
    """A packed matrix [O, D] as `linear` takes it in the place of a tensor.

    Attributes:
      data, scale, type, cols: as the operators of `gemma/kernels/_torch.py` take them.
      dtype: of the activations that meet it.
    """

    data: Tensor
    scale: Tensor | None
    type: int
    cols: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.cols

    @property
    def device(self) -> torch.device:
        return self.data.device

    def product(self, x: Tensor) -> Tensor:
        """`x @ W.T`: [..., D] to [..., O], in x's dtype."""
        call = ops.product if ops.plain(x) else ops.packed_matmul
        return call(x, self.data, self.scale, self.type, self.cols)

    def gradient(self, dy: Tensor) -> Tensor:
        """`dy @ W`: [..., O] to [..., D], in dy's dtype."""
        return ops.packed_matmul_grad(dy, self.data, self.scale, self.type, self.cols)

    def rows(self, ids: Tensor) -> Tensor:
        """`W[ids]` in the activations' dtype: integers [...] to [..., D]."""
        call = ops.rows if ops.plain(ids) else ops.packed_rows
        return call(ids, self.data, self.scale, self.type, self.cols).to(self.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [O, D]; each value rounded once."""
        every = torch.arange(self.data.shape[0], dtype=torch.int32)
        return ops.rows(every, self.data, self.scale, self.type, self.cols).to(dtype)


class _Packed(nn.Module):
    """What a packed layer and a packed embedding share: the buffers, and how they are saved and loaded."""

    def __init__(self, packed: PackedTensor, dtype: torch.dtype):
        super().__init__()
        self.type_id, self.cols = _NUMBERS[packed.type], packed.shape[-1]
        self.register_buffer("data", _shared(packed.data))
        self.register_buffer("scale", None if packed.scale is None else _shared(packed.scale))
        # Follows `module.to(dtype)`, so that it always says which dtype the activations have.
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def weight(self) -> PackedWeight:
        return PackedWeight(self.data, self.scale, self.type_id, self.cols, self._like.dtype)

    def extra_repr(self) -> str:
        return f"{ops.TYPES[self.type_id].name} [{self.data.shape[0]}, {self.cols}]"

    def _apply(self, fn, recurse=True):
        """Moves; of a new dtype only the activations' is taken, scales stay float32."""
        scale, self.scale = self.scale, None
        super()._apply(fn, recurse)
        self.scale = None if scale is None else fn(scale.view(torch.int32)).view(torch.float32)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}type"] = torch.tensor(self.type_id, dtype=torch.int32)

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        """Takes the tensors themselves: what is here may be a view of a file, which cannot be written into."""
        names = ["data", "type"] + ([] if self.scale is None else ["scale"])
        absent = [f"{prefix}{name}" for name in names if f"{prefix}{name}" not in state]
        known = {f"{prefix}{name}" for name in ("data", "scale", "type")}
        unexpected += [key for key in state if key.startswith(prefix) and key not in known]
        if absent:
            missing += absent
            return
        type_id, data, scale = int(state[f"{prefix}type"]), state[f"{prefix}data"], state.get(f"{prefix}scale")
        if data.shape[0] != self.data.shape[0]:
            errors.append(f"{prefix}data: expected {self.data.shape[0]} rows, got {tuple(data.shape)}")
            return
        try:
            ops.check(data, scale, type_id, self.cols)
        except ValueError as error:
            errors.append(f"{prefix}{error}")
            return
        device = self._like.device
        self.type_id, self.data = type_id, data.detach().to(device)
        self.scale = None if scale is None else scale.detach().to(device)


class PackedLinear(_Packed):
    """`x @ W.T` with a packed matrix, without a bias."""

    def __init__(self, packed: PackedTensor, dtype: torch.dtype = torch.float32):
        super().__init__(packed, dtype)
        self.in_features, self.out_features = self.cols, self.data.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.product(x)


class PackedEmbedding(_Packed):
    """Token ids to rows of a packed matrix [V, D], scaled by sqrt(D) rounded to the activations' dtype."""

    def __init__(self, packed: PackedTensor, dtype: torch.dtype = torch.float32):
        super().__init__(packed, dtype)
        self.num_embeddings, self.embedding_dim = self.data.shape[0], self.cols

    def forward(self, input_ids: Tensor) -> Tensor:
        rows = self.weight.rows(input_ids)
        return rows * torch.full((), self.embedding_dim**0.5, dtype=rows.dtype, device=rows.device)


def replace(model: nn.Module, name: str, packed: PackedTensor, dtype: torch.dtype) -> None:
    """Puts a packed module in the place of the layer or embedding that owns the parameter `name`."""
    path = name.removesuffix(".weight")
    owner = model.get_submodule(path)
    kind = PackedEmbedding if isinstance(owner, (nn.Embedding, PackedEmbedding)) else PackedLinear
    model.set_submodule(path, kind(packed, dtype).train(owner.training))


def load_packed_state_dict(model: nn.Module, state: Mapping[str, Any]) -> nn.Module:
    """Loads, strictly, a state dict that holds packed matrices into a model that may not have them yet.

    Args:
      model: GemmaForCausalLM or a model like it, of the same configuration; parameters on the meta device get the
        state dict's tensors themselves. The activations' dtype is that of the state dict's norms.
      state: from `model.state_dict()` of a packed model.

    Returns:
      The model.

    Raises:
      CheckpointError: no packed matrix in it, or one that its name, shape or type does not fit. RuntimeError: as
        `load_state_dict`, if names or shapes of the others do not fit. Packed layers are in their places then.
    """
    found = [key.removesuffix(".data") for key in state if key.endswith(".data") and state[key].dtype == torch.uint8]
    floats = {value.dtype for value in state.values() if value.is_floating_point() and value.ndim == 1}
    dtype = torch.bfloat16 if torch.bfloat16 in floats else torch.float32
    if not found:
        raise CheckpointError("the state dict holds no packed matrix (<name>.data as uint8): use load_state_dict")
    made = []
    for name in found:
        try:
            owner = model.get_submodule(name)
            type = ops.TYPES[int(state[f"{name}.type"])]
            shape = (state[f"{name}.data"].shape[0], owner.weight.shape[1])
            if shape != tuple(owner.weight.shape):
                raise CheckpointError(f"expected {tuple(owner.weight.shape)}, got {shape[0]} rows")
            scale = state.get(f"{name}.scale")
            packed = PackedTensor(type, shape, state[f"{name}.data"].numpy(), None if scale is None else scale.numpy())
        except (AttributeError, KeyError, CheckpointError, ValueError) as error:
            raise CheckpointError(f"{name}: this packed matrix does not fit the model: {error}") from error
        made.append((f"{name}.weight", packed))
    for name, packed in made:
        replace(model, name, packed, dtype)
    model.load_state_dict(state, assign=True)
    return model


def _shared(array: np.ndarray) -> Tensor:
    """A tensor over the same memory. PyTorch warns of memory that cannot be written; nothing here writes into it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
