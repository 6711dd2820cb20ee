# SPDX-License-Identifier: Apache-2.0
"""`LoRA`: a model whose layers carry low-rank adapters. The model itself is not changed and can be used beside it.

    model = gm.nn.LoRA(rank=8, model=gm.nn.Gemma3_270M(), targets=("attention", "mlp"))
    params = model.init(key, tokens)["params"]
    params["layer_0"]["attn"]["q_einsum"] == {"w": ..., "_LoRAEinsum_0": {"lora": {"a": ..., "b": ...}}}

Layers are replaced while the model runs, in the wrapper's own calls only (`gemma/peft/_interception.py`); the modules
that are called instead are `gemma/peft/_lora.py`. Splitting, fusing and saving parameters is `gemma.peft`, too.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.core.scope import Scope

from gemma.errors import ConfigError
from gemma.gm.nn import _layers, _modules, _quantization
from gemma.gm.typing import Array, DType
from gemma.peft import _einsum_utils, _lora
from gemma.peft._interception import ModuleInterceptor
from gemma.peft._spec import LoRASpec, check_met

_METHODS = ("__call__", "encode", "logits")  # the last two: of an embedding table


class LoRA(nn.Module, kw_only=True):
    """A model with an adapter on its layers; it takes the arguments and has the attributes of the model.

    Attributes:
      rank: r.
      model: for example `gm.nn.Gemma3_1B()`; or `QuantizationAwareWrapper` or `IntWrapper` around it, which see the base
        weights and leave the adapter in floats. Packed weights (`load_params(quantize=...)`) need no wrapper.
      dtype: in which adapters are created.
      verbose: print the layers that are replaced.
      alpha: see `gemma.peft.LoRASpec`, likewise the next seven.
      dropout: see there.
      use_rslora: see there.
      use_dora: see there.
      targets: see there. None: every layer of the decoder, of a vision tower and what joins them.
      rank_pattern: see there.
      alpha_pattern: see there.
      tie_embedder: see there.
      deterministic: no dropout. None: dropout in calls that are given `rngs={"dropout": key}`.
    """

    rank: int
    model: nn.Module
    dtype: DType = jnp.bfloat16
    verbose: bool = False
    alpha: float | None = None
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    targets: tuple[str, ...] | None = None
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    tie_embedder: bool = True
    deterministic: bool | None = None

    @classmethod
    def of(cls, spec: LoRASpec, model: nn.Module, **fields: Any) -> LoRA:
        """The wrapper that a spec describes; `fields` are `dtype`, `verbose` and `deterministic`."""
        return cls(model=model, **vars(spec), **fields)

    def __post_init__(self):
        spec = self.spec  # checks everything
        if isinstance(self.model, LoRA):
            raise ConfigError(
                "model: expected a network of gm.nn, or QuantizationAwareWrapper or IntWrapper around one, got a LoRA; "
                "several adapters on one model are gemma.peft.AdapterSet"
            )
        for name in ("targets", "rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, getattr(spec, name))
        super().__post_init__()

    @property
    def spec(self) -> LoRASpec:
        """The adapter as data."""
        names = LoRASpec.__dataclass_fields__
        return LoRASpec(**{name: getattr(self, name) for name in names})

    def setup(self):
        # First the inner scopes: a network that was asked for later would find the name of its scope taken.
        network = self.model.network() if isinstance(self.model, _quantization.Mapped) else None
        nn.share_scope(self, self.model)
        if network is not None:
            nn.share_scope(self, network)

    def __call__(self, *args: Any, deterministic: bool | None = None, **kwargs: Any) -> Any:
        """Calls the model with its adapters; `deterministic` goes before the field of that name."""
        return self._adapted("__call__", deterministic, args, kwargs)

    def encode_images(self, *args: Any, deterministic: bool | None = None, **kwargs: Any) -> Any:
        """The model's `encode_images`, with its adapters."""
        return self._adapted("encode_images", deterministic, args, kwargs)

    def clone(self, *, parent=None, _deep_clone=False, _reset_names=False, **updates: Any) -> LoRA:
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

    def _adapted(self, method: str, deterministic: bool | None, args: tuple, kwargs: dict) -> Any:
        quiet = self.deterministic if deterministic is None else deterministic
        layers: dict[str, bool] = {}
        replace = functools.partial(_replace, self.spec, self.dtype, quiet, layers, len(self.path))
        with ModuleInterceptor(replace, methods=_METHODS):
            result = getattr(self.model, method)(*args, **kwargs)
        if self.is_initializing() and method == "__call__":
            if self.targets is not None:
                check_met(self.targets, layers)
            elif not any(layers.values()):
                raise ConfigError(f"LoRA: {type(self.model).__name__} has no layer that an adapter could sit on")
            if self.verbose:
                for layer, wanted in layers.items():
                    print(f"{'LoRA' if wanted else '    '} {layer}")
        return result


def _replace(
    spec: LoRASpec, dtype: DType, deterministic: bool | None, layers: dict[str, bool], depth: int, module: nn.Module
) -> Any:
    """What is called instead of a module, or None; `layers` learns every layer that could have an adapter.

    Args:
      depth: length of the wrapper's own path, which is no part of a layer's name.
    """
    name = _weight_name(module)
    if name is None:
        return None
    layer = "/".join((*module.path[depth:], *([] if name in ("w", "kernel") else [name])))
    layers[layer] = spec.wants(layer)
    if not layers[layer]:
        return None
    place = spec.of(layer)
    fields = dict(rank=place.rank, dtype=dtype, scale=place.scale, dropout=spec.dropout, use_dora=spec.use_dora)
    fields |= dict(deterministic=deterministic, wrapped=module, any_rank=spec.is_named(layer))
    if isinstance(module, _modules.Embedder):
        if spec.use_dora:
            raise ConfigError(f"{layer}: DoRA is defined for layers, not for a table of embeddings; leave it out")
        if not spec.is_named(layer):
            _lora.check_rank(place.rank, module.vocab_size, module.embed_dim, layer)
        return _Table(module, place.rank, dtype, place.scale, spec.tie_embedder)
    if isinstance(module, nn.Dense):
        return _lora.LoRADense(**fields)
    if isinstance(module, nn.DenseGeneral):
        return _lora.LoRADenseGeneral(**fields)
    if isinstance(module, nn.Einsum):
        return _lora.LoRAEinsum(**fields)
    # Two layers of an MLP are leaves of one scope: their adapters need different names.
    own = "_LoRAEinsum_0" if module.weight_name == "w" else f"_LoRAEinsum_{module.weight_name}"
    return _LoRAEinsum(name=own, **fields)


def _weight_name(module: nn.Module) -> str | None:
    """The parameter that an adapter of this module would change; None for a module that holds no such weight."""
    if isinstance(module, _layers.Einsum):
        return module.weight_name
    if isinstance(module, (nn.Dense, nn.DenseGeneral, nn.Einsum)):
        return "kernel"
    return "input_embedding" if isinstance(module, _modules.Embedder) else None


class _LoRAEinsum(_lora.Wrapper, kw_only=True):
    """`gm.nn.Einsum` with an adapter, which keeps the wrapper's name: w, _LoRAEinsum_0/lora/{a, b}."""

    @nn.compact
    def __call__(self, eqn: str, x: Array) -> Array:
        y = self.wrapped(eqn, x)
        adapter = _lora.LoRAEinsumAdapter(einsum_str=eqn, shape=self.wrapped.shape, **self.factors)
        return self.joined(y, x, adapter, _einsum_utils.parse(eqn), self.wrapped.weight_name, None)


class _Table:
    """An embedding table with an adapter: input_embedding, lora/{a [V, r], b [r, D]}.

    It is no Flax module: the methods of an embedder are not compact, so none could have one as a child. The factors are
    parameters of a scope below the embedder's.
    """

    def __init__(self, wrapped: nn.Module, rank: int, dtype: DType, scale: float, tied: bool):
        self._wrapped, self._scale, self._tied = wrapped, scale, tied
        scope: Scope = wrapped.scope.push("lora", reuse=True)
        shapes = dict(vocab_size=wrapped.vocab_size, embed_dim=wrapped.embed_dim)
        self._factors = _TableAdapter(rank=rank, dtype=dtype, parent=scope, **shapes)

    def encode(self, x: Array) -> Array:
        """As the embedder's: embeddings scaled by sqrt(D)."""
        rows = self._wrapped.encode(x)
        a, b = self._factors()
        low = _layers.weight_einsum("...r,rD->...D", a[x], b) * (self._scale * self._wrapped.embed_dim**0.5)
        return _lora._add(rows, low, 1.0)

    def logits(self, x: Array) -> Array:
        """As the embedder's, float32."""
        logits = self._wrapped.logits(x)
        a, b = self._factors()
        if not self._tied:
            return logits
        wide = jnp.float32
        low = _layers.weight_einsum("...D,rD->...r", x, b, accumulate=wide)
        return logits + _layers.weight_einsum("...r,Vr->...V", low, a, accumulate=wide) * self._scale


class _TableAdapter(_lora.Adapter, kw_only=True):
    """The factors of an embedding table. `b` starts random and `a` at zero, as PEFT has it: rows are looked up in `a`."""

    vocab_size: int
    embed_dim: int

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        a = self.leaf("a", nn.initializers.zeros_init(), (self.vocab_size, self.rank))
        b = self.leaf("b", nn.initializers.normal(1.0), (self.rank, self.embed_dim))
        return a, b
