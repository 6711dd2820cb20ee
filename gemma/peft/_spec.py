# SPDX-License-Identifier: Apache-2.0
"""What an adapter is, as data: rank, scale, and which layers it sits on. Frozen and hashable; no array is here.

A layer is named by the path of its weight without the last `w` or `kernel`: `layer_3/attn/q_einsum`,
`layer_3/mlp/gating_einsum`, `embedder/input_embedding`. The modules are `_lora.py`, trees `_tree.py`, files
`_adapter_files.py`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

from gemma.errors import ConfigError

# What a layer is for, by its path.
ROLES: Mapping[str, str] = {
    "attention": r"(^|/)layer_\d+/(self_|cross_)?attn/",
    "mlp": r"(^|/)layer_\d+/mlp\d*/",
    "embedder": r"(^|/)embedder/input_embedding$",
    "vision": r"(^|/)vision_encoder/",
    "projector": r"(^|/)embedder/mm_input_projection$",
    "router": r"router",
}
_NOT_BY_DEFAULT = ("embedder", "router")  # a router has as many outputs as there are ways: four, in Gemma 3n
EMBEDDER = ROLES["embedder"]


@dataclasses.dataclass(frozen=True)
class Place:
    """The adapter of one layer; the low-rank part is multiplied by `scale`."""

    rank: int
    alpha: float
    scale: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRASpec:
    """An adapter without its numbers.

    Attributes:
      rank: r, of every layer that `rank_pattern` does not name.
      alpha: the low-rank part is multiplied by alpha / r. None: alpha is r.
      dropout: share of the activations that the adapter does not see in training.
      use_rslora: multiply by alpha / sqrt(r) instead; alpha is then sqrt(r) where it is None.
      use_dora: rescale output channels by a trained magnitude.
      targets: roles ("attention", "mlp", "embedder", "vision", "projector", "router") and regular expressions that are
        searched for in the names of layers. None: every layer with a weight, except the embedding table and routers.
      rank_pattern: (regular expression, rank) pairs that match a layer's whole name; the first that does counts.
      alpha_pattern: likewise, alphas.
      tie_embedder: an adapter of the embedding table also acts on the output head, which is the same table. False: on
        the input alone; such an adapter cannot be fused.
    """

    rank: int
    alpha: float | None = None
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    targets: tuple[str, ...] | None = None
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    tie_embedder: bool = True

    def __post_init__(self):
        for name in ("rank_pattern", "alpha_pattern"):
            pairs = getattr(self, name)
            pairs = pairs.items() if isinstance(pairs, Mapping) else pairs or ()
            object.__setattr__(self, name, tuple((str(key), value) for key, value in pairs))
        object.__setattr__(self, "targets", as_targets(self.targets))
        for rank in (self.rank, *(value for _, value in self.rank_pattern)):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ConfigError(f"rank: expected a whole number of at least 1, got {rank!r}")
        for alpha in (self.alpha, *(value for _, value in self.alpha_pattern)):
            if alpha is not None and not (_is_number(alpha) and math.isfinite(alpha)):
                raise ConfigError(f"alpha: expected a finite number, got {alpha!r}")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout: expected a number in 0 <= dropout < 1, got {self.dropout!r}")
        for pattern, _ in (*self.rank_pattern, *self.alpha_pattern):
            compiled(pattern)

    def of(self, layer: str) -> Place:
        """The adapter of a layer that is a target."""
        rank = next((value for key, value in self.rank_pattern if re.fullmatch(key, layer)), self.rank)
        root = math.sqrt(rank) if self.use_rslora else rank
        alpha = next((value for key, value in self.alpha_pattern if re.fullmatch(key, layer)), self.alpha)
        alpha = root if alpha is None else alpha
        return Place(rank, float(alpha), float(alpha) / root)

    def wants(self, layer: str) -> bool:
        """Whether a layer is a target."""
        if self.targets is None:
            return not any(matches(role, layer) for role in _NOT_BY_DEFAULT)
        return any(matches(target, layer) for target in self.targets)

    def is_named(self, layer: str) -> bool:
        """Whether `rank_pattern` gives the layer a rank of its own."""
        return any(re.fullmatch(key, layer) for key, _ in self.rank_pattern)


def as_targets(targets: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """Targets as a tuple; one that is no role must be a regular expression."""
    if targets is None:
        return None
    found = (targets,) if isinstance(targets, str) else tuple(targets)
    if not found or not all(isinstance(target, str) and target for target in found):
        raise ConfigError(f"targets: expected roles ({', '.join(ROLES)}) or regular expressions, got {targets!r}")
    for target in found:
        if target not in ROLES:
            compiled(target)
    return found


def matches(target: str, layer: str) -> bool:
    """Whether a role or regular expression means a layer."""
    return re.search(ROLES.get(target, target), layer) is not None


def compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression, or an error that quotes it."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{pattern!r}: not a regular expression ({error}); roles are {', '.join(ROLES)}") from None


def check_met(targets: Iterable[str], layers: Iterable[str]) -> None:
    """Refuses targets that mean none of the layers."""
    layers = list(layers)
    missed = [target for target in targets if not any(matches(target, layer) for layer in layers)]
    if missed:
        kinds = sorted({re.sub(r"\d+", "*", layer) for layer in layers})
        raise ConfigError(
            f"targets: {', '.join(map(repr, missed))} names no layer of this model; roles are {', '.join(ROLES)}; its "
            f"layers are {', '.join(kinds) or 'none'}"
        )


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
