# SPDX-License-Identifier: Apache-2.0
"""Trees of parameters with adapters: taken apart, put together, and folded into the weights and out again.

    original, lora = split_params(params)          # base tree, adapter tree
    params = merge_params(original, lora)
    fused = fuse_params(params, model)             # a base tree that computes what the adapter computes
    params = unfuse_params(fused, lora, model)

A tree is nested dictionaries; an adapter is the dictionary under a key `lora`. Files are `_adapter_files.py`, the
modules that use the trees `_lora.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma import weights
from gemma.errors import CheckpointError, ConfigError
from gemma.gm.ckpts._load import insert
from gemma.gm.ckpts._orbax import flatten
from gemma.gm.nn._quantization import Mapped
from gemma.gm.typing import Array, Params
from gemma.peft._lora import norm
from gemma.peft._spec import EMBEDDER, LoRASpec

_EXACT = jax.lax.Precision.HIGHEST


class SplittedParams(NamedTuple):
    """The base parameters and those of the adapters, each without empty branches."""

    original: dict[str, Any]
    lora: dict[str, Any]


def split_params(params: Params) -> SplittedParams:
    """Takes adapters out of a tree: everything in a dictionary under a key `lora` goes to the second tree."""
    original: dict[str, Any] = {}
    lora: dict[str, Any] = {}
    for name, leaf in flatten(params).items():
        insert(lora if _in_adapter(name) else original, name, leaf)
    return SplittedParams(original, lora)


def merge_params(original: Params, lora: Params) -> dict[str, Any]:
    """The inverse of `split_params`: one tree with the leaves of both.

    Raises:
      CheckpointError: (a ValueError) both trees have the same leaf, or a leaf where the other has a branch.
    """
    first, second = flatten(original), flatten(lora)
    both = sorted(set(first) & set(second))
    both += [
        name for name in second if any("/".join(name.split("/")[:n]) in first for n in range(1, name.count("/") + 1))
    ]
    if both:
        raise CheckpointError(f"merge_params: both trees hold {both[0]} (one of {len(both)}); split one of them first")
    merged: dict[str, Any] = {}
    for name, leaf in (first | second).items():
        insert(merged, name, leaf)
    return merged


def _in_adapter(name: str) -> bool:
    return "lora" in name.split("/")[:-1]


@dataclasses.dataclass(frozen=True)
class Site:
    """One adapter in a tree.

    Attributes:
      path: of the dictionary that holds `a` and `b`.
      weight: the leaf that it changes.
      layer: the name of the layer, as in `LoRASpec`.
      table: it changes a table of embeddings.
    """

    path: str
    weight: str
    layer: str
    table: bool


def sites(names: Mapping[str, Any]) -> list[Site]:
    """The adapters among the leaves of a flat tree (slash name to leaf)."""
    found = {}
    for name in names:
        if _in_adapter(name):
            path = name.rpartition("/")[0]
            found.setdefault(path, site_of(path))
    return list(found.values())


def site_of(path: str) -> Site:
    """The site whose factors are in the dictionary of that path, which ends in `lora`."""
    *parents, _ = path.split("/")
    own = re.fullmatch(r"_LoRAEinsum_(.+)", parents[-1]) if parents else None
    if own is not None:
        weight = "/".join([*parents[:-1], "w" if own[1] == "0" else own[1]])
    else:
        weight = "/".join([*parents, "input_embedding" if parents[-1:] == ["embedder"] else "kernel"])
    layer = layer_of(weight)
    return Site(path, weight, layer, re.search(EMBEDDER, layer) is not None)


def path_of(weight: str) -> str:
    """Where the adapter of a weight is: the inverse of `site_of(path).weight`."""
    *parents, last = weight.split("/")
    own = {"w": ["_LoRAEinsum_0"], "kernel": [], "input_embedding": []}.get(last, [f"_LoRAEinsum_{last}"])
    return "/".join([*parents, *own, "lora"])


def layer_of(weight: str) -> str:
    """The name of the layer that a weight belongs to, as in `LoRASpec`."""
    return re.sub(r"/(w|kernel)$", "", weight)


def fuse_params(params: Params, model: Any = None) -> dict[str, Any]:
    """Folds adapters into the weights: the base model then computes what the adapted one does.

    Args:
      params: a tree with adapters.
      model: the `gm.nn.LoRA` that they belong to, which knows their scale. None: alpha is the rank, as by default.

    Returns:
      The base tree; weights that have no adapter are the same arrays. Sums are float32, weights keep their dtype: in
      bfloat16 a fused weight is rounded once.

    Raises:
      CheckpointError: (a ValueError) no adapter, or one whose weight is missing, packed, or of another shape.
      ConfigError: (a ValueError) an adapter of the embedding's input only, which has no fused form; or adapters over
        `QuantizationAwareWrapper` or `IntWrapper`.
    """
    original, lora = split_params(params)
    return _folded(original, lora, model, _fuse)


def unfuse_params(fused: Params, lora: Params, model: Any = None) -> dict[str, Any]:
    """The inverse of `fuse_params`: takes the adapters' part out of the weights, and returns the tree with adapters.

    Args:
      fused: a base tree that `fuse_params` made.
      lora: the adapters that it was made with.
      model: as in `fuse_params`.

    Raises:
      As `fuse_params`; and CheckpointError where a DoRA adapter is larger than the weight that it changed, so that two
      weights would have given the fused one.
    """
    lora = split_params(lora).lora
    return merge_params(_folded(fused, lora, model, _unfuse), lora)


def _folded(original: Params, lora: Params, model: Any, change: Any) -> dict[str, Any]:
    base, factors = flatten(original), flatten(lora)
    spec, inner = getattr(model, "spec", model), getattr(model, "model", None)
    if isinstance(inner, Mapped):
        raise ConfigError(
            f"model: its adapters sit on the weights that {type(inner).__name__} makes, not on those of this tree: fuse "
            f"into lora.model.seen(base), with the gm.nn.LoRA of the network itself"
        )
    if not factors:
        raise CheckpointError("fuse_params: the tree holds no adapter (no branch named lora)")
    leads = _leads(model)
    for site in sites(factors):
        a, b, weight = (_floats(site, tree, name) for tree, name in (*_names(factors, site), (base, site.weight)))
        scale = 1.0 if spec is None else spec.of(site.layer).scale
        if site.table and isinstance(spec, LoRASpec) and not spec.tie_embedder:
            raise ConfigError(
                f"{site.layer}: this adapter acts on the input alone, but the table is the output head, too"
            )
        lead = contraction(site, a.shape, b.shape, weight.shape, leads.get(site.weight))
        low = in_layout(a, b, lead) * scale
        axes = tuple(range(lead, lead + a.ndim - 1))
        m = factors.get(f"{site.path}/magnitude")
        changed = change(site, weight.astype(jnp.float32), low, axes, None if m is None else jnp.asarray(m))
        base[site.weight] = changed.astype(weight.dtype)
    tree: dict[str, Any] = {}
    for name, leaf in base.items():
        insert(tree, name, leaf)
    return tree


def _names(factors: Mapping[str, Any], site: Site):
    return (factors, f"{site.path}/a"), (factors, f"{site.path}/b")


def _floats(site: Site, tree: Mapping[str, Any], name: str) -> Array:
    leaf = tree.get(name)
    if leaf is None:
        near = [held for held in tree if held.startswith(f"{site.weight.rpartition('/')[0]}/")]
        raise CheckpointError(
            f"{site.path}: expected {name} in the tree; it has {', '.join(near[:4]) or 'nothing there'}"
        )
    if hasattr(leaf, "dequantize") or not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise CheckpointError(f"{name}: is packed ({leaf.dtype}); fuse into float weights, and quantize the result")
    return jnp.asarray(leaf)


def _leads(model: Any) -> dict[str, int]:
    """Weight to the first of its axes that is summed over, for the tensors that the weight table knows."""
    config = getattr(getattr(model, "config", None), "source", None)
    if config is None:
        return {}
    try:
        table = weights.tensors(model.config.gemma)
    except ConfigError:  # sizes that no row describes: the shapes decide
        return {}
    return {t.slots["flax"].name: summed_axis(t) for t in table if "flax" in t.slots and len(t.shape) == 2}


def summed_axis(tensor: weights.Tensor) -> int:
    """The first axis of a tensor's Flax leaf that is summed over with activations."""
    slot = tensor.slots["flax"]
    groups = weights.parse(tensor.axes)
    inner = groups[0] if flipped(tensor) else groups[-1]
    return len(slot.index) + [axis for group in weights.parse(slot.axes) for axis in group].index(inner[0])


def flipped(tensor: weights.Tensor) -> bool:
    """Whether the first canonical axis is the one that activations (or ids) meet: a table, and the image projector."""
    return tensor.part in ("embed", "mm")


def contraction(
    site: Site, a: tuple[int, ...], b: tuple[int, ...], weight: tuple[int, ...], known: int | None = None
) -> int:
    """The first axis of a weight that is summed over, found by the shapes of the factors.

    Raises:
      CheckpointError: the factors do not fit the weight, or fit it in several ways and `known` is none of them.
    """
    inner, outer = a[:-1], b[1:]
    fits = [
        lead
        for lead in range(len(weight) - len(inner) + 1)
        if weight[lead : lead + len(inner)] == inner and weight[:lead] + weight[lead + len(inner) :] == outer
    ]
    if a[-1] != b[0] or not fits:
        raise CheckpointError(
            f"{site.path}: factors {a} and {b} do not fit {site.weight} {weight}: the adapter belongs to another model"
        )
    if len(fits) > 1 and known not in fits:
        raise CheckpointError(f"{site.path}: {site.weight} {weight} could be summed along several axes; pass `model`")
    return known if known in fits else fits[0]


def in_layout(a: Array, b: Array, lead: int) -> Array:
    """`a @ b` as an array in the layout of the weight, float32."""
    low = jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1, precision=_EXACT)
    inner = a.ndim - 1
    return jnp.moveaxis(low, range(inner), range(lead, lead + inner))


def _fuse(site: Site, weight: Array, low: Array, axes: tuple[int, ...], m: Array | None) -> Array:
    moved = weight + low
    if m is None:
        return moved
    own, size = norm(weight, axes), norm(moved, axes)
    factor = m.astype(jnp.float32) * jnp.where(size > 0, own / jnp.where(size > 0, size, 1.0), 1.0)
    return moved * jnp.expand_dims(factor, axes)


def _unfuse(site: Site, fused: Array, low: Array, axes: tuple[int, ...], m: Array | None) -> Array:
    """For DoRA: W = t u - L, where u has the direction of the fused weight and t > 0 makes |W| what it was.

    |W| is |fused| / |m|, and |t u - L| = |W| is a quadratic equation of t for each output channel.
    """
    if m is None:
        return fused - low
    m = m.astype(jnp.float32)
    size = norm(fused, axes)
    own = size / jnp.abs(m)
    larger = jnp.any(norm(low, axes) >= own)
    if bool(larger) or not bool(jnp.all(m != 0)):
        raise CheckpointError(
            f"{site.path}: cannot be taken out again: the adapter is larger than the weight in some channel, or its "
            f"magnitude is zero; keep the base weights instead"
        )
    unit = fused / jnp.expand_dims(size * jnp.sign(m), axes)
    along = jnp.sum(unit * low, axis=axes)
    length = along + jnp.sqrt(jnp.square(along) - jnp.sum(jnp.square(low), axis=axes) + jnp.square(own))
    return unit * jnp.expand_dims(length, axes) - low
