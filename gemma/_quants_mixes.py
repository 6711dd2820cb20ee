# SPDX-License-Identifier: Apache-2.0
"""Which type each tensor of a quantized GGUF gets: the standard mixes, by the rules that llama.cpp's quantizer follows.

Vectors and norms stay float32. A mix has a base type and spends more bits where errors hurt most: the embedding (which
is the output matrix too), the values of attention, the way down of the MLP. A row that is not whole super-blocks falls
back to a type with small blocks. The types themselves are in `quants.py`; sensitivities are not measured here.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable

from gemma.errors import ConfigError, ShapeError
from gemma.quants import QuantType
from gemma.weights import Tensor, is_matrix

_T = QuantType
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
# What a row that is not whole blocks falls back to; what still does not fit becomes F16.
_FALLBACK = {_T.Q2_K: _T.Q4_0, _T.Q3_K: _T.Q4_0, _T.Q4_K: _T.Q5_0, _T.Q5_K: _T.Q5_1, _T.Q6_K: _T.Q8_0}


@dataclasses.dataclass(frozen=True)
class Mix:
    """One recipe: its name in lower case, `general.file_type` of its files, and the type of most matrices.

    `pure`: every matrix has that type, the embedding too, and a row that is not whole blocks is an error. Those of
    INT4, INT8 and SFP8 are not for GGUF files: their `file_type` is -1.
    """

    name: str
    file_type: int
    base: QuantType
    pure: bool = False


MIXES: dict[str, Mix] = {
    name: Mix(name, file_type, QuantType[base])
    for name, file_type, base in (
        ("f32", 0, "F32"),
        ("f16", 1, "F16"),
        ("bf16", 32, "BF16"),
        ("q8_0", 7, "Q8_0"),
        ("q6_k", 18, "Q6_K"),
        ("q5_k_m", 17, "Q5_K"),
        ("q5_k_s", 16, "Q5_K"),
        ("q5_1", 9, "Q5_1"),
        ("q5_0", 8, "Q5_0"),
        ("q4_k_m", 15, "Q4_K"),
        ("q4_k_s", 14, "Q4_K"),
        ("q4_1", 3, "Q4_1"),
        ("q4_0", 2, "Q4_0"),
        ("q3_k_l", 13, "Q3_K"),
        ("q3_k_m", 12, "Q3_K"),
        ("q3_k_s", 11, "Q3_K"),
        ("q2_k", 10, "Q2_K"),
    )
}
_ALIASES = {"q5_k": "q5_k_m", "q4_k": "q4_k_m", "q3_k": "q3_k_m", "float32": "f32", "float16": "f16"}
_ALIASES |= {"bfloat16": "bf16"}
# All matrices in one type. `q4_0_pure` is what quantization-aware training in Q4_0 trains; llama.cpp reads such files.
PURE: dict[str, Mix] = {
    "int4": Mix("int4", -1, _T.INT4, pure=True),
    "int8": Mix("int8", -1, _T.INT8, pure=True),
    "sfp8": Mix("sfp8", -1, _T.SFP8, pure=True),
}
_BLOCKS = ("q8_0", "q6_k", "q5_1", "q5_0", "q4_1", "q4_0", "q2_k")
PURE |= {f"{name}_pure": Mix(f"{name}_pure", MIXES[name].file_type, MIXES[name].base, pure=True) for name in _BLOCKS}


def mix(name: str) -> Mix:
    """The mix of a name in any case ("Q4_K_M", "q4_k"); an unknown one is a ConfigError that lists them."""
    found = _recipes().get(_key(name))
    if found is None or found.file_type < 0:
        other = "" if found is None else f"; {found.name} is not a type of GGUF"
        raise _unknown(name, [key for key, recipe in _recipes().items() if recipe.file_type >= 0], other)
    return found


def recipe(name: str) -> Mix:
    """As `mix`, and the recipes that are not for GGUF files: "int4", "int8", "sfp8"."""
    found = _recipes().get(_key(name))
    if found is None:
        raise _unknown(name, list(_recipes()))
    return found


def _recipes() -> dict[str, Mix]:
    return MIXES | PURE


def _key(name: str) -> str:
    key = str(name).lower().replace("-", "_")
    return _ALIASES.get(key, key)


def _unknown(name: str, known: list[str], hint: str = "") -> ConfigError:
    near = difflib.get_close_matches(_key(name), known, n=1)
    hint = hint or (f"; did you mean {near[0]}?" if near else "")
    return ConfigError(f"quantize: expected one of {', '.join(known)}, got {str(name)[:80]!r}{hint}")


def plan(tensors: Iterable[Tensor], name: str, *, importance: bool = False) -> dict[str, QuantType]:
    """The type of every tensor.

    Args:
      tensors: of one model (`gemma.weights.tensors(config)`).
      name: of the mix.
      importance: whether an importance matrix is used; it changes some types of Q4_0 and Q5_0 files.

    Returns:
      Canonical name to type, in the order of `tensors`.

    Raises:
      ShapeError: a pure recipe whose blocks do not divide the rows of a matrix, which is named.
    """
    recipe, tensors = _recipes().get(_key(name)) or mix(name), tuple(tensors)
    untied = any(tensor.name == "head" for tensor in tensors)
    layers = 1 + max((int(m[1]) for m in (_LAYER.fullmatch(t.name) for t in tensors) if m), default=-1)
    queries = max((tensor.dims["N"] for tensor in tensors if tensor.name.endswith(".attn.q")), default=1)
    types = {}
    for tensor in tensors:
        if len(tensor.shape) < 2:
            types[tensor.name] = _T.F32
        elif recipe.base.is_float:
            types[tensor.name] = recipe.base
        elif recipe.pure:
            types[tensor.name] = _whole(tensor, recipe)
        else:
            wanted = _wanted(tensor, recipe, layers, queries, untied, importance)
            types[tensor.name] = fitting(wanted, tensor.shape[-1])
    return types


def _whole(tensor: Tensor, recipe: Mix) -> QuantType:
    """The type of a pure recipe; what belongs to images stays in floats."""
    if not is_matrix(tensor):
        return _T.F32
    if tensor.shape[-1] % recipe.base.block_size:
        raise ShapeError(
            f"{tensor.name}: its rows of {tensor.shape[-1]} values are not whole blocks of {recipe.base.block_size} "
            f"({recipe.base.name}); use int8 or sfp8, or a mix such as q4_0 that falls back"
        )
    return recipe.base


def fitting(type: QuantType, columns: int) -> QuantType:
    """The type itself where rows of `columns` are whole blocks of it, else what takes its place."""
    if columns % type.block_size:
        type = _FALLBACK.get(type, type)
    return _T.F16 if columns % type.block_size else type


def _wanted(tensor: Tensor, recipe: Mix, layers: int, queries: int, untied: bool, importance: bool) -> QuantType:
    base, found = recipe.base, _LAYER.fullmatch(tensor.name)
    if tensor.name == "head" or (tensor.name == "embed" and not untied):
        whole = tensor.shape[-1] % base.block_size == 0
        return _T.Q8_0 if base is _T.Q8_0 or not whole else _T.Q6_K
    if found is None:
        return base
    layer, role = int(found[1]), found[2]
    if role == "attn.v":
        return _of_values(recipe, layer, layers, queries // tensor.dims["K"])
    if role == "mlp.down":
        return _of_down(recipe, layer, layers, importance)
    if role == "attn.o":
        return {"q2_k": _T.Q3_K, "q3_k_m": _T.Q4_K, "q3_k_l": _T.Q5_K}.get(recipe.name, base)
    return base


def _more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and each third one between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _of_values(recipe: Mix, layer: int, layers: int, queries_per_key: int) -> QuantType:
    name, base = recipe.name, recipe.base
    if name == "q2_k":
        return _T.Q4_K if queries_per_key >= 4 else _T.Q3_K
    if name in ("q4_k_m", "q5_k_m"):
        return _T.Q6_K if _more_bits(layer, layers) else base
    if name == "q4_k_s":
        return _T.Q5_K if layer < 4 else base
    if name == "q3_k_m":
        return _T.Q5_K if layer < 2 else _T.Q4_K
    return _T.Q5_K if name == "q3_k_l" else base


def _of_down(recipe: Mix, layer: int, layers: int, importance: bool) -> QuantType:
    name, base = recipe.name, recipe.base
    if name in ("q4_k_m", "q5_k_m"):
        return _T.Q6_K if _more_bits(layer, layers) else base
    early = layer < layers // 8
    if name == "q4_k_s":
        return _T.Q5_K if early else base
    if importance and early and name in ("q4_0", "q5_0"):
        return _T.Q4_1 if name == "q4_0" else _T.Q5_1
    if name == "q3_k_m":
        return _T.Q5_K if layer < layers // 16 else _T.Q4_K
    return {"q2_k": _T.Q3_K, "q3_k_l": _T.Q5_K}.get(name, base)
