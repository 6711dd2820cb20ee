# SPDX-License-Identifier: Apache-2.0
"""What a sampler asks of a model, as a protocol: any class with these members can be sampled from.

The model that the library brings is `_transformer.Transformer`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

from gemma.gm.nn._cache import Cache
from gemma.gm.nn._config import ModelInfo, TransformerConfig
from gemma.gm.typing import Array, Bool, DType, Int, Sharding, UInt8


@runtime_checkable
class TransformerLike(Protocol):
    """A decoder with a cache; `__call__` and `apply` return an `Output`."""

    config: TransformerConfig
    INFO: ClassVar[ModelInfo]

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Fresh variables, `{"params": ...}`."""

    def __call__(
        self,
        tokens: Int[Array, "*B T"],
        *,
        images: UInt8[Array, "*B I H W C"] | None = None,
        positions: Int[Array, "*B T"] | None = None,
        cache: Cache | None = None,
        attention_mask: Bool[Array, "*B T S"] | None = None,
        return_last_only: bool | None = None,
        return_hidden_states: bool | None = None,
    ) -> Any:
        """The forward pass."""

    def apply(self, variables: Any, tokens: Int[Array, "*B T"], **kwargs: Any) -> Any:
        """The forward pass with given variables."""

    def init_cache(
        self, *, batch_size: int, dtype: DType, cache_length: int, sharding: Sharding | None = None
    ) -> Cache:
        """An empty cache."""
