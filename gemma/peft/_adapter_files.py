# SPDX-License-Identifier: Apache-2.0
"""Adapters of a JAX model as files: saved for PEFT and llama.cpp, and loaded from either.

    peft.save_adapter("my-adapter", params, model)                   # model is a gm.nn.LoRA; "x.gguf" for llama.cpp
    adapter = peft.load_adapter("my-adapter", base, base_params)
    logits = adapter.model.apply({"params": peft.merge_params(base_params, adapter.lora)}, tokens).logits

How the factors of a JAX layer become those of single matrices is `_fused_layers.py`; the files themselves are
`gemma/adapters.py`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from gemma import weights
from gemma.adapters import AdapterFile, LowRank, checksum, open_adapter, refuse_untied, save_adapter_file
from gemma.errors import CheckpointError, ConfigError
from gemma.gm.ckpts._load import insert
from gemma.gm.ckpts._orbax import flatten
from gemma.gm.nn._lora import LoRA
from gemma.gm.nn._quantization import Mapped
from gemma.gm.typing import DType, Params
from gemma.peft import _fused_layers, _tree
from gemma.peft._spec import LoRASpec


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter that is ready to use.

    Attributes:
      model: the base model with this adapter's places: a `gm.nn.LoRA`.
      lora: its parameters, for `merge_params`.
      file: what the file says, in canonical names.
    """

    model: LoRA
    lora: dict[str, Any]
    file: AdapterFile


def save_adapter(
    path: str | os.PathLike[str],
    params: Params,
    model: LoRA,
    *,
    format: str | None = None,
    base_model: str = "",
    replace: bool = False,
) -> AdapterFile:
    """Writes the adapters of a tree.

    Args:
      path: of the folder to be, in PEFT's format; or a file that ends in .gguf, for llama.cpp.
      params: the tree with adapters. With the base weights in it, their checksum is kept, so that the adapter is not
        put on others by mistake; the adapters alone will do, but not for DoRA.
      model: the `gm.nn.LoRA` that they belong to.
      format: "peft" or "gguf"; None: by the name.
      base_model: name of the base, for PEFT: a path or the name of a repository.
      replace: overwrite what is there.

    Returns:
      What was written.

    Raises:
      CheckpointError: (a ValueError) no adapter, NaN, or a tree that is not this model's.
      UnsupportedError: something that the format has no place for; ConfigError: a model that the weight table lacks.
      SaveError: it could not be written.
    """
    adapter = adapter_file(params, model, base_model=base_model)
    save_adapter_file(path, adapter, model.config.gemma, format=format, replace=replace)
    return adapter


def adapter_file(params: Params, model: LoRA, *, base_model: str = "") -> AdapterFile:
    """The adapters of a tree in canonical names and axes; arguments as in `save_adapter`."""
    if not isinstance(model, LoRA):
        raise ConfigError(f"model: expected the gm.nn.LoRA that the parameters belong to, got {type(model).__name__}")
    original, lora = _base(params, model.model), flatten(_tree.split_params(params).lora)
    if not lora:
        raise CheckpointError("save_adapter: the tree holds no adapter (no branch named lora)")
    groups = weights.groups(weights.tensors(model.config.gemma), "flax")
    found: dict[str, LowRank] = {}
    for site in _tree.sites(lora):
        if site.weight not in groups:
            raise CheckpointError(f"{site.path}: the weight table has no {site.weight}; it cannot be saved for others")
        a, b = (np.asarray(lora[f"{site.path}/{part}"]) for part in ("a", "b"))
        m = lora.get(f"{site.path}/magnitude")
        if m is not None:
            if site.weight not in original:
                raise CheckpointError(f"{site.path}: DoRA is saved with the norms of the weights: pass the whole tree")
            m = np.asarray(m, np.float32) * _norms(original, site, a, b, groups[site.weight])
        scale = model.spec.of(site.layer).scale
        found |= _fused_layers.members(site, groups[site.weight], a, b, scale, m)
    order = [tensor.name for tensor in weights.tensors(model.config.gemma) if tensor.name in found]
    spec = model.spec
    return AdapterFile(
        {name: found[name] for name in order},
        use_rslora=spec.use_rslora,
        dropout=spec.dropout,
        tied=spec.tie_embedder,
        base_model=base_model,
        base_checksum=_checksum(original, order, groups),
    )


def _norms(original: Mapping[str, Any], site: _tree.Site, a: np.ndarray, b: np.ndarray, members) -> np.ndarray:
    weight = _dense(original[site.weight])
    lead = _tree.contraction(site, a.shape, b.shape, weight.shape, _tree.summed_axis(members[0]))
    axes = tuple(range(lead, lead + a.ndim - 1))
    return np.sqrt(np.sum(np.square(weight.astype(np.float32)), axis=axes))


def _base(params: Params, model: Any) -> dict[str, Any]:
    """The base weights that an adapter sees, slash name to leaf: behind a wrapper of quantization, the rounded ones."""
    original = _tree.split_params(params).original
    return flatten(model.seen(original) if original and isinstance(model, Mapped) else original)


def _dense(leaf: Any) -> np.ndarray:
    return np.asarray(leaf.dequantize(jnp.float32) if hasattr(leaf, "dequantize") else leaf)


def _checksum(original: Mapping[str, Any], names: Iterable[str], groups: Mapping[str, Any]) -> str:
    values = _canonical(original, set(names), groups)
    return "" if values is None else checksum(values)


def _canonical(base: Mapping[str, Any], names: set[str], groups: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """Some tensors of a flat tree in canonical axes; None if the tree lacks one of them."""
    found = {}
    for leaf_name, members in groups.items():
        wanted = [tensor for tensor in members if tensor.name in names]
        if not wanted:
            continue
        if leaf_name not in base:
            return None
        leaf = _dense(base[leaf_name])
        for tensor in wanted:
            slot = dataclasses.replace(tensor.slots["flax"], shape=leaf.shape)
            value = weights.extract(leaf, tensor, slot)
            found[tensor.name] = weights.fit_rows(value, tensor.shape[0]) if tensor.axes[0] == "V" else value
    return found


def load_adapter(
    path: str | os.PathLike[str],
    model: Any,
    params: Params | None = None,
    *,
    check_base: bool = True,
    dtype: DType | None = None,
) -> Adapter:
    """Reads an adapter for a model.

    A pair of independent PEFT adapters on the key and value projections (or gate and up) of a layer becomes one adapter
    of twice the rank, because the JAX networks keep the two weights in one array.

    Args:
      path: a PEFT folder, or a GGUF adapter.
      model: the base model, such as `gm.nn.Gemma3_1B()`; or `QuantizationAwareWrapper` or `IntWrapper` around it: the
        adapter's base is then the rounded weights.
      params: of the base; with them it is checked that they are those that the adapter was trained on, if the file says.
        A DoRA adapter needs them.
      check_base: False: any base of the right shape will do.
      dtype: of the adapter's parameters; None: as stored.

    Raises:
      CheckpointNotFound, FormatError, UnsupportedError: not there, broken, or of a kind that is not read.
      WeightsMismatch: an adapter of another model. CheckpointError: of another base, or with NaN.
    """
    config = model.config.gemma
    file = open_adapter(path, config)
    base = None if params is None else _base(params, model)
    groups = weights.groups(weights.tensors(config), "flax")
    if base is not None and check_base and file.base_checksum:
        values = _canonical(base, set(file.tensors), groups)
        if values is None:
            raise CheckpointError("params: lack weights that the adapter changes; expected those of the base model")
        file.check_base(values.__getitem__)
    lora: dict[str, Any] = {}
    scales: dict[str, tuple[int, float]] = {}
    for weight, members in groups.items():
        present = {tensor.name: file.tensors[tensor.name] for tensor in members if tensor.name in file.tensors}
        if not present:
            continue
        a, b, scale, m = _fused_layers.joined(members, present)
        leaves = {"a": a, "b": b}
        if m is not None:
            leaves["magnitude"] = _relative(m, weight, base, a, b, members)
        for part, array in leaves.items():
            insert(lora, f"{_tree.path_of(weight)}/{part}", jnp.asarray(array, dtype))
        scales[_tree.layer_of(weight)] = (a.shape[-1], scale)
    spec = _spec(file, scales, groups)
    return Adapter(LoRA.of(spec, model, dtype=dtype or jnp.float32), lora, file)


def _relative(m: np.ndarray, weight: str, base: Mapping[str, Any] | None, a, b, members) -> np.ndarray:
    """A DoRA magnitude as a share of the norm of the base's weight; where that is zero, one."""
    if base is None or weight not in base:
        raise CheckpointError(f"{weight}: a DoRA adapter is loaded with the base's weights: pass `params`")
    own = _norms(base, _tree.site_of(_tree.path_of(weight)), a, b, members)
    m = np.where(np.isnan(m), own, m)  # of members that the adapter does not change
    return np.divide(m, own, out=np.ones_like(own), where=own > 0).astype(np.float32)


def _spec(file: AdapterFile, scales: Mapping[str, tuple[int, float]], groups: Mapping[str, Any]) -> LoRASpec:
    """The spec of an adapter whose layers have these ranks and scales."""
    kinds: dict[str, list[str]] = {}
    for layer in scales:
        kinds.setdefault(_kind(layer), []).append(layer)
    every = [_tree.layer_of(weight) for weight, members in groups.items() if len(members[0].shape) == 2]
    targets, ranks, alphas = [], [], []
    common = next(iter(scales.values()))
    for kind, layers in kinds.items():
        whole = set(layers) == {layer for layer in every if _kind(layer) == kind}
        targets += [f"^{name}$" for name in ([kind] if whole else map(re.escape, layers))]
        alike = len({scales[layer] for layer in layers}) == 1
        for name, layer in [(kind, layers[0])] if alike else [(re.escape(layer), layer) for layer in layers]:
            rank, scale = scales[layer]
            if scales[layer] != common:
                ranks.append((name, rank))
                alphas.append((name, scale * (rank**0.5 if file.use_rslora else rank)))
    rank, scale = common
    return LoRASpec(
        rank=rank,
        alpha=scale * (rank**0.5 if file.use_rslora else rank),
        dropout=file.dropout,
        use_rslora=file.use_rslora,
        use_dora=file.use_dora,
        targets=tuple(targets),
        rank_pattern=tuple(ranks),
        alpha_pattern=tuple(alphas),
        tie_embedder=file.tied,
    )


def _kind(layer: str) -> str:
    """A regular expression for the layers that differ in their numbers only."""
    return re.sub(r"\d+", lambda _: r"\d+", re.escape(layer))


def fuse_adapter(params: Params, file: AdapterFile, config: Any, *, check_base: bool = True) -> dict[str, Any]:
    """Folds an adapter into base parameters, tensor by tensor; the arrays of other weights stay the same.

    Args:
      params: of the base, floats.
      file: from `gemma.adapters.open_adapter`.
      config: of the model, a GemmaConfig.
      check_base: as in `load_adapter`.

    Raises:
      CheckpointError: another base, or packed weights. UnsupportedError: a change of the input embedding alone.
    """
    file.check(config)
    refuse_untied(file)
    base = dict(flatten(params))
    groups = weights.groups(weights.tensors(config), "flax")
    if check_base and file.base_checksum:
        values = _canonical(base, set(file.tensors), groups)
        if values is None:
            raise CheckpointError("params: lack weights that the adapter changes; expected those of the base model")
        file.check_base(values.__getitem__)
    for leaf_name, members in groups.items():
        present = [tensor for tensor in members if tensor.name in file.tensors]
        if present:
            base[leaf_name] = _changed(leaf_name, base[leaf_name], present, file)
    tree: dict[str, Any] = {}
    for name, leaf in base.items():
        insert(tree, name, leaf)
    return tree


def _changed(name: str, leaf: Any, present: Iterable[weights.Tensor], file: AdapterFile) -> Any:
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or hasattr(leaf, "dequantize"):
        raise CheckpointError(f"{name}: is packed; fuse an adapter into float weights, and quantize the result")
    out = np.array(leaf)
    for tensor in present:
        slot = tensor.slots["flax"]
        part = out[slot.index] if slot.index else out
        dims = {**tensor.dims, "V": leaf.shape[0]} if tensor.axes[0] == "V" else tensor.dims
        value = weights.convert(part, slot.axes, tensor.axes, dims)
        rows = min(len(value), tensor.shape[0])
        whole = np.array(value)
        whole[:rows] = file.tensors[tensor.name].apply(weights.fit_rows(value, tensor.shape[0]))[:rows]
        part[...] = weights.convert(whole, tensor.axes, slot.axes, dims)
    return jnp.asarray(out)
