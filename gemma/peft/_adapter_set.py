# SPDX-License-Identifier: Apache-2.0
"""Several adapters on one model: named, switched and mixed by weights without compiling anything again.

    both = peft.AdapterSet({"french": french, "polite": polite})
    params = peft.merge_params(base, both.lora({"french": 1.0, "polite": 0.5}))
    both.model.apply({"params": params}, tokens)             # the same program for every choice of weights

The adapters stand side by side along the rank; a weight is multiplied into the factor `b`. One adapter at a time needs
nothing of this: its tree is merged in place of another of the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from gemma.errors import ConfigError
from gemma.gm.ckpts._load import insert
from gemma.gm.ckpts._orbax import flatten
from gemma.gm.nn._lora import LoRA
from gemma.gm.typing import Array
from gemma.peft import _tree
from gemma.peft._adapter_files import Adapter
from gemma.peft._spec import LoRASpec


class AdapterSet:
    """Adapters of one base model.

    Args:
      adapters: name to adapter, from `load_adapter`, or made of (`gm.nn.LoRA`, tree) pairs.

    Attributes:
      names: of the adapters.
      model: the base model with room for all of them.

    Raises:
      ConfigError: (a ValueError) adapters of different models, or DoRA, whose parts cannot be added.
    """

    def __init__(self, adapters: Mapping[str, Adapter | tuple[LoRA, Mapping[str, Any]]]):
        pairs = {name: (it.model, it.lora) if isinstance(it, Adapter) else it for name, it in adapters.items()}
        if not pairs:
            raise ConfigError("AdapterSet: expected at least one adapter")
        self.names = tuple(pairs)
        first = next(iter(pairs.values()))[0]
        for name, (model, _) in pairs.items():
            if model.model != first.model:
                raise ConfigError(f"AdapterSet: {name!r} is an adapter of another model than {self.names[0]!r}")
            if model.use_dora:
                raise ConfigError(f"AdapterSet: {name!r} is a DoRA adapter, which cannot be added to others; fuse it")
        self._parts: dict[str, list[tuple[str, Array, Array, float]]] = {}
        for name, (model, tree) in pairs.items():
            flat = flatten(_tree.split_params(tree).lora)
            for site in _tree.sites(flat):
                part = (name, flat[f"{site.path}/a"], flat[f"{site.path}/b"], model.spec.of(site.layer).scale)
                self._parts.setdefault(site.path, []).append(part)
        tables = [name for path, parts in self._parts.items() if _tree.site_of(path).table for name, *_ in parts]
        ties = {pairs[name][0].tie_embedder for name in tables} or {True}
        if len(ties) > 1:
            raise ConfigError(f"AdapterSet: {', '.join(tables)} differ in tie_embedder, so no one model has them all")
        layers = {
            _tree.site_of(path).layer: sum(part[1].shape[-1] for part in parts) for path, parts in self._parts.items()
        }
        spec = LoRASpec(
            rank=max(layers.values()),
            targets=tuple(f"^{layer}$" for layer in layers),
            rank_pattern=tuple(layers.items()),
            dropout=first.dropout,
            tie_embedder=ties.pop(),
        )
        self.model = LoRA.of(spec, first.model, dtype=first.dtype)

    def lora(self, weights: Mapping[str, float] | None = None) -> dict[str, Any]:
        """The parameters of a mixture.

        Args:
          weights: name to the factor of that adapter; those that are not named are off. None: all count fully.

        Raises:
          ConfigError: (a ValueError) an unknown name, or a weight that is no finite number.
        """
        weights = dict.fromkeys(self.names, 1.0) if weights is None else dict(weights)
        for name, value in weights.items():
            if name not in self.names:
                raise ConfigError(f"{name!r}: no such adapter; there are {', '.join(self.names)}")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ConfigError(f"{name}: expected a finite number as its weight, got {value!r}")
        tree: dict[str, Any] = {}
        for path, parts in self._parts.items():
            dtype = jnp.result_type(*(part[2] for part in parts)) if len(parts) > 1 else parts[0][2].dtype
            a = [jnp.asarray(part[1], dtype) for part in parts]
            b = [
                (jnp.asarray(part, jnp.float32) * (scale * weights.get(name, 0.0))).astype(dtype)
                for name, _, part, scale in parts
            ]
            insert(tree, f"{path}/a", jnp.concatenate(a, axis=-1))
            insert(tree, f"{path}/b", jnp.concatenate(b, axis=0))
        return tree
