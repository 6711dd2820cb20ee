# SPDX-License-Identifier: Apache-2.0
"""`linear`: the one function through which activations meet a weight, and the layer that holds one."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma.errors import CheckpointError

if TYPE_CHECKING:
    from gemma._torch.packed import PackedWeight

# Low-precision products that this CPU has instructions for; the others PyTorch computes row by row.
_NATIVE = {
    torch.bfloat16: torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}
_MANY_ROWS = 8  # from here on, widening a weight to float32 costs less than row by row
_FEW_ROWS = 32  # from two to here, the native kernels' product of bfloat16 is the fastest; one row costs the same
_BLOCK = 1 << 22  # weights widened at once
_WORTH_SPLITTING = 1 << 18  # weights; below, starting threads costs more than they save
_PARTS = 8  # of a weight that threads share; more parts than threads cost nothing


def linear(x: Tensor, weight: Tensor | PackedWeight) -> Tensor:
    """`x @ weight.T`: activations [..., I] and a weight [O, I] to [..., O], in the weight's dtype.

    On a CPU it takes ways around three slow ones of PyTorch: one row of float32 runs on one thread only, two to eight
    rows are computed as if they were many, and bfloat16 without instructions for it is computed row by row. A packed
    weight (`packed.py`) has its own product.
    """
    if not isinstance(weight, Tensor):
        return weight.product(x)
    if weight.device.type != "cpu" or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return F.linear(x, weight)
    rows, out = x.numel() // x.shape[-1], weight.shape[0]
    if weight.dtype == torch.float32 and x.dtype == torch.float32:
        if rows == 1 and out % _PARTS == 0 and weight.numel() >= _WORTH_SPLITTING and weight.is_contiguous():
            column = x.reshape(1, -1).t()  # these strides, or PyTorch multiplies by hand
            parts = torch.bmm(weight.view(_PARTS, out // _PARTS, -1), column.expand(_PARTS, -1, 1))
            return parts.view(*x.shape[:-1], out)
        if 1 < rows <= _MANY_ROWS and out >= weight.shape[1]:
            return torch.mm(weight, x.reshape(rows, -1).t()).t().contiguous().view(*x.shape[:-1], out)
    elif not _NATIVE.get(weight.dtype, True):
        if 1 < rows <= _FEW_ROWS and weight.dtype == x.dtype == torch.bfloat16 and weight.is_contiguous():
            ops = _kernels()
            if ops is not None:
                return (ops.product_bf16 if ops.plain(x) else ops.linear_bf16)(x, weight)
        if rows >= _MANY_ROWS:
            return _widened(x, weight)
    return F.linear(x, weight)


def times(dy: Tensor, weight: Tensor | PackedWeight) -> Tensor:
    """`dy @ weight`, the gradient of `linear` with respect to its activations: [..., O] to [..., I]."""
    return dy.to(weight.dtype) @ weight if isinstance(weight, Tensor) else weight.gradient(dy)


@functools.cache
def _kernels() -> Any:
    """The operators over the native kernels, loaded when they are first needed; None where there are none."""
    from gemma.kernels import _torch as ops

    return ops if ops.available() else None


def _widened(x: Tensor, weight: Tensor) -> Tensor:
    """The product in float32, rounded once; a block of the weight at a time is float32."""
    wide = x.float()
    size = max(1, _BLOCK // weight.shape[1])
    parts = [F.linear(wide, block.float()).to(weight.dtype) for block in weight.split(size)]
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


class GemmaLinear(nn.Linear):
    """`x @ weight.T`, without a bias."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def drop_tied_copy(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook before `load_state_dict`: takes out the head's copy of a tied embedding, which must be the same.

    Raises:
      CheckpointError: it is another matrix: the model that was saved is not tied.
    """
    copy = state.pop(f"{prefix}lm_head.weight", None)
    names = [f"{prefix}{name}" for name, value in model.named_parameters() if value is model.head_weight]
    table = state.get(names[0]) if copy is not None and names else None
    if table is not None and copy is not table and not copy.is_meta and not torch.equal(copy, table):
        raise CheckpointError(
            f"{prefix}lm_head.weight differs from {names[0]}, but the configuration ties them: set tie_word_embeddings "
            f"to false in the configuration"
        )
