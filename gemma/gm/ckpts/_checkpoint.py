# SPDX-License-Identifier: Apache-2.0
"""The transforms that put saved parameters into the state of a trainer.

Loading itself is `_load.py`, saving `_save.py`; their functions have this module's path in the official package, so they
are here too. A state is anything with `params`: a trainer's dataclass with `replace`, a dictionary with
the key "params", or a plain parameter tree. Nothing here imports a trainer.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Protocol

import jax

from gemma.errors import CheckpointError
from gemma.gm.ckpts._load import insert, load_params, release
from gemma.gm.ckpts._orbax import flatten
from gemma.gm.ckpts._save import save_params

__all__ = ["AnchoredPolicyLoader", "LoadCheckpoint", "SkipLoRA", "load_params", "release", "save_params"]


# ---- states ------------------------------------------------------------------------------------------------------------


class _Transform(Protocol):
    def transform(self, state: Any) -> Any: ...


def _params_of(state: Any) -> Mapping[str, Any]:
    found = getattr(state, "params", None)
    if found is None and isinstance(state, Mapping):
        found = state.get("params", state)
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"state: expected a tree of parameters, or something that holds one as `params`; got {type(state).__name__}"
        )
    return found


def _with_params(state: Any, params: Mapping[str, Any]) -> Any:
    if isinstance(state, Mapping):
        return {**state, "params": params} if "params" in state else params
    if hasattr(state, "replace"):
        return state.replace(params=params)
    if dataclasses.is_dataclass(state):
        return dataclasses.replace(state, params=params)
    raise CheckpointError(
        f"state: a {type(state).__name__} cannot be given new parameters; expected a dataclass or dict"
    )


class _StateTransform:
    """What a trainer calls after it made its optimizer: nothing changes there."""

    def transform_after_optimizer(self, state: Any) -> Any:
        return state


@dataclasses.dataclass(frozen=True)
class LoadCheckpoint(_StateTransform):
    """Replaces the parameters of a state by those of a checkpoint; dtypes and shardings stay those of the state.

    Attributes:
      path: as in `load_params`.
      quantize: as in `load_params`.
    """

    path: str | os.PathLike[str]
    quantize: bool = False

    def transform(self, state: Any) -> Any:
        """The state with loaded parameters; its old arrays are freed first."""
        return _with_params(state, load_params(self.path, params=_params_of(state), quantize=self.quantize))


@dataclasses.dataclass(frozen=True)
class SkipLoRA(_StateTransform):
    """Applies a transform to the base parameters only; those of the adapters (below a key `lora`) stay as they are.

    Attributes:
      wrapped: for example `LoadCheckpoint(path=...)`.
    """

    wrapped: _Transform

    def transform(self, state: Any) -> Any:
        """The state with transformed base parameters."""
        base: dict[str, Any] = {}
        adapters: dict[str, Any] = {}
        for name, leaf in flatten(_params_of(state)).items():
            insert(adapters if "lora" in name.split("/")[:-1] else base, name, leaf)
        done = _params_of(self.wrapped.transform(_with_params(state, base)))
        merged: dict[str, Any] = {}
        for name, leaf in (flatten(done) | flatten(adapters)).items():
            insert(merged, name, leaf)
        return _with_params(state, merged)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnchoredPolicyLoader(_StateTransform):
    """Loads the two models of preference training, whose parameters are {"policy": ..., "anchor": ...}.

    Attributes:
      policy: transforms the parameters of the policy.
      anchor: transforms those of the anchor; None: they become a copy of the policy's.
    """

    policy: _Transform
    anchor: _Transform | None = None

    def transform(self, state: Any) -> Any:
        """The state with both models loaded."""
        params = _params_of(state)
        if set(params) != {"policy", "anchor"}:
            raise CheckpointError(
                f"expected parameters with the keys 'policy' and 'anchor', got {', '.join(sorted(params)) or 'none'}"
            )
        policy = _params_of(self.policy.transform(_with_params(state, params["policy"])))
        if self.anchor is None:
            like, copies = flatten(params["anchor"]), flatten(policy)
            _check_twins(like, copies)
            anchor: dict[str, Any] = {}
            for name, leaf in copies.items():  # a copy: the policy's arrays are donated by the first training step
                insert(anchor, name, jax.device_put(leaf.copy(), getattr(like[name], "sharding", None)))
        else:
            anchor = _params_of(self.anchor.transform(_with_params(state, params["anchor"])))
        return _with_params(state, {"policy": policy, "anchor": anchor})


def _check_twins(anchor: Mapping[str, Any], policy: Mapping[str, Any]) -> None:
    """A copy fits only if both are the same model."""
    differ = sorted(set(anchor) ^ set(policy))
    differ += [name for name in anchor if name in policy and tuple(anchor[name].shape) != tuple(policy[name].shape)]
    if differ:
        raise CheckpointError(
            f"policy and anchor are different models, so `anchor` must say what to load: {', '.join(differ)}"
        )
