# SPDX-License-Identifier: Apache-2.0
"""`QuantizationAwareWrapper` and `IntWrapper`: a model that sees its parameters through a function.

    model = gm.nn.QuantizationAwareWrapper(method="int4", model=gm.nn.Gemma3_1B())     trains on the grid of the file
    model = gm.nn.IntWrapper(model=gm.nn.Gemma3_1B(), dtype=jnp.int8)                  runs `peft.quantize`d parameters

No layer is replaced: before each call the tree of parameters is mapped, inside of the program. Which leaves are matrices
and along which axes they are summed says the weight table, the same one that the exporters use; so what is trained is
what is shipped. Packed parameters (`load_params(quantize=...)`) need no wrapper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gemma import weights
from gemma._pack_tensors import sfp8_groups
from gemma.errors import ConfigError, ShapeError
from gemma.gm.nn._packed import Packed
from gemma.gm.typing import Array, DType
from gemma.peft import _quantization as quantization
from gemma.peft import _quantization_methods as methods
from gemma.peft._quantization_methods import QuantizationMethod


class Mapped(nn.Module):
    """A model in whose place this one stands: same tree, same arguments, same attributes."""

    def __post_init__(self):
        if isinstance(getattr(self.model, "model", None), nn.Module):
            raise ConfigError(
                f"{type(self).__name__}: expected a network of gm.nn, got a {type(self.model).__name__} around one; "
                f"wrappers of quantization are the inner ones: gm.nn.LoRA(model=gm.nn.{type(self).__name__}(...)). Over a "
                f'packed base, gm.ckpts.load_params(path, quantize="int4"), LoRA needs no other wrapper'
            )
        super().__post_init__()

    def setup(self):
        nn.share_scope(self, self.model)

    def network(self) -> nn.Module:
        """The model, in the scope of this wrapper: to call a method is what makes Flax run `setup`."""
        return self.model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model with the parameters that it shall see."""
        return self._mapped("__call__", args, kwargs)

    def encode_images(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `encode_images`, likewise."""
        return self._mapped("encode_images", args, kwargs)

    def _mapped(self, method: str, args: tuple, kwargs: dict) -> Any:
        def call(model: nn.Module) -> Any:
            return getattr(model, method)(*args, **kwargs)

        def seen(variables: Mapping[str, Any]) -> Mapping[str, Any]:
            return {**variables, "params": self.seen(variables["params"])} if "params" in variables else variables

        if self.is_initializing():
            return self._initialized(call)
        return nn.map_variables(call, "params", trans_in_fn=seen, mutable=False)(self.model)

    def _initialized(self, call: Any) -> Any:
        return call(self.model)

    def seen(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """The parameters that the model is called with."""
        raise AssertionError

    def clone(self, *, parent=None, _deep_clone=False, _reset_names=False, **updates: Any) -> Any:
        """A copy with other fields; those that the wrapper does not have are the model's."""
        own = {name: value for name, value in updates.items() if name in type(self).__dataclass_fields__}
        rest = {name: value for name, value in updates.items() if name not in own}
        if rest:
            own["model"] = own.get("model", self.model).clone(**rest)
        return super().clone(parent=parent, _deep_clone=_deep_clone, _reset_names=_reset_names, **own)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "model" not in self.__dict__:
            return super().__getattr__(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)

    def __kontext_keys__(self) -> dict[str, str | None]:
        """Where a trainer finds the inputs of the model."""
        return self.model.__kontext_keys__()


class QuantizationAwareWrapper(Mapped, kw_only=True):
    """A model whose matrices, the embedding included, are rounded in the forward pass; gradients pass straight through.

    The values are those of the file that `gemma quantize --to int4` (int8, q4_0_pure, sfp8) writes of the parameters,
    bit for bit in float32. Norms, biases and a vision tower keep their values. The tree of parameters is the model's.

    Attributes:
      method: a `gemma.peft.QuantizationMethod` or its name.
      model: a network of `gm.nn`.
    """

    method: QuantizationMethod | str = QuantizationMethod.NONE
    model: nn.Module

    def __post_init__(self):
        object.__setattr__(self, "method", QuantizationMethod(self.method))
        super().__post_init__()

    def seen(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """The parameters on the method's grid."""
        return on_grid(params, self.model.config, self.method)


def on_grid(params: Mapping[str, Any], config: Any, method: QuantizationMethod | str) -> dict[str, Any]:
    """A tree whose matrices hold what their packed form stands for; the gradient is that of `params`.

    Args:
      params: of a network of `gm.nn`; packed leaves are on their grid already.
      config: of the model, a GemmaConfig or the network's.
      method: how to round.

    Raises:
      ShapeError: the blocks of the method do not divide the rows of a matrix, which is named.
    """
    method = QuantizationMethod(method)
    if method is QuantizationMethod.NONE:
        return dict(params)
    matrices = weights.matrices(getattr(config, "gemma", config))
    found = {name: leaf for name in matrices if (leaf := _leaf(params, name)) is not None}
    rows = {
        name: matrices[name].canonical(matrices[name].rows_of(jax.lax.stop_gradient(jnp.asarray(leaf))))
        for name, leaf in found.items()
        if not isinstance(leaf, Packed)
    }
    scales = _sfp8_scales([pair for pairs in rows.values() for pair in pairs]) if method.value == "sfp8" else {}
    done = _copy(params)
    for name, pairs in rows.items():
        parts = [methods.on_grid(part, method, scale=scales.get(t.name), name=t.name) for t, part in pairs]
        whole = matrices[name].leaf_of(jnp.concatenate(parts) if len(parts) > 1 else parts[0])
        _put(done, name, quantization.straight_through(found[name], whole))
    return done


def _sfp8_scales(pairs: list[tuple[Any, Array]]) -> dict[str, Array]:
    """The scale of each tensor; those that the `.sbs` format holds as one share theirs."""
    peaks = {tensor.name: methods.peak(part) for tensor, part in pairs}
    scales: dict[str, Array] = {}
    for group in sfp8_groups([tensor for tensor, _ in pairs]).values():
        scale = methods.sfp8_scale(jnp.max(jnp.stack([peaks[tensor.name] for tensor in group])))
        scales |= {tensor.name: scale for tensor in group}
    return scales


class IntWrapper(Mapped, kw_only=True):
    """A model that runs parameters of `gemma.peft.quantize`: integer kernels, each with its scale.

    Its own `init` makes such a tree, of random weights. Leaves that are no such kernels are taken as they are.

    Attributes:
      model: a network of `gm.nn`.
      dtype: of the kernels that `init` makes, int4 or int8.
    """

    model: nn.Module
    dtype: DType = jnp.int4

    def __post_init__(self):
        if jnp.dtype(self.dtype) not in (jnp.int4, jnp.int8):
            raise ConfigError(f"dtype: expected int4 or int8, got {jnp.dtype(self.dtype).name}")
        super().__post_init__()

    def seen(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """The parameters with their kernels as floats, in the dtype of the embedding."""
        table = _leaf(params, "embedder/input_embedding")
        return _floats(params, jnp.dtype(jnp.float32) if table is None else table.dtype, "")

    def _initialized(self, call: Any) -> Any:
        method = {4: QuantizationMethod.INT4, 8: QuantizationMethod.INT8}[jnp.iinfo(self.dtype).bits]
        config = self.model.config

        def kept(variables: Mapping[str, Any]) -> Mapping[str, Any]:
            params = variables.get("params")
            if not params or _is_quantized(params):
                return variables
            return {**variables, "params": quantization.quantize(params, method=method, config=config)}

        def seen(variables: Mapping[str, Any]) -> Mapping[str, Any]:
            return {**variables, "params": self.seen(variables["params"])} if "params" in variables else variables

        mapped = nn.map_variables(call, "params", trans_in_fn=seen, trans_out_fn=kept, init=True, mutable=True)
        return mapped(self.model)


_INT = "_IntEinsum_"


def _is_quantized(node: Any) -> bool:
    return isinstance(node, Mapping) and any(key.startswith(_INT) or _is_quantized(node[key]) for key in node)


def _is_int_leaf(node: Any) -> bool:
    kernel = node.get("kernel") if isinstance(node, Mapping) else None
    return "scale" in (node or ()) and kernel is not None and jnp.issubdtype(kernel.dtype, jnp.integer)


def _floats(node: Any, dtype: DType, path: str) -> Any:
    """Kernels with scales as the float leaves that they stand for."""
    if not isinstance(node, Mapping):
        return node
    if _is_int_leaf(node) and not path.rstrip("/").split("/")[-1].startswith(_INT):
        return {"w": _weight(node, dtype, path)} | {
            key: _floats(leaf, dtype, f"{path}{key}/") for key, leaf in node.items() if key not in ("kernel", "scale")
        }
    done: dict[str, Any] = {}
    for key, leaf in node.items():
        if key.startswith(_INT):
            name = key.removeprefix(_INT)
            done["w" if name == "0" else name] = _weight(leaf, dtype, f"{path}{key}/")
        elif key in ("gating_einsum", "linear") and _is_int_leaf(leaf):
            done[key] = _weight(leaf, dtype, f"{path}{key}/")
        else:
            done[key] = _floats(leaf, dtype, f"{path}{key}/")
    return done


def _weight(node: Mapping[str, Any], dtype: DType, path: str) -> Array:
    if set(node) != {"kernel", "scale"}:
        raise ShapeError(f"{path[:-1]}: expected kernel and scale, got {', '.join(sorted(node))}")
    kernel, scale = node["kernel"], node["scale"]
    if scale.ndim != kernel.ndim or any(have not in (1, size) for have, size in zip(scale.shape, kernel.shape)):
        raise ShapeError(f"{path}scale: {tuple(scale.shape)} does not spread over the kernel {tuple(kernel.shape)}")
    return quantization.int_weight(kernel, scale, dtype)


def _leaf(params: Mapping[str, Any], name: str) -> Any:
    node: Any = params
    for key in name.split("/"):
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return node


def _copy(node: Any) -> Any:
    """New dictionaries, the same leaves."""
    return {key: _copy(value) for key, value in node.items()} if isinstance(node, Mapping) else node


def _put(tree: dict[str, Any], name: str, leaf: Any) -> None:
    *folders, last = name.split("/")
    for folder in folders:
        tree = tree[folder]
    tree[last] = leaf
