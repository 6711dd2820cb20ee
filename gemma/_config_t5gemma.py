# SPDX-License-Identifier: Apache-2.0
"""The two encoder-decoders of the family, T5Gemma and T5Gemma 2. Import them from `gemma.config`.

Both sides are decoders of `_config_gemma.py`; what an encoder's layers see is `encoder_layers`, since a published
config.json does not say it. The presets are in `config.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gemma._config_gemma import GemmaConfig, LayerSpec
from gemma._validate import from_mapping
from gemma.errors import ConfigError

WINDOWS = ("hf", "deepmind")


@dataclasses.dataclass(frozen=True)
class T5GemmaConfig:
    """An encoder and a decoder of Gemma blocks; decoder layers add cross-attention over the encoder's width."""

    encoder: GemmaConfig
    decoder: GemmaConfig
    pad_token_id: int = 0

    def __post_init__(self):
        for side in ("encoder", "decoder"):
            value = getattr(self, side)
            if isinstance(value, Mapping):
                object.__setattr__(self, side, GemmaConfig.from_dict(value))
            if getattr(self, side).use_bidirectional_attention:
                raise ConfigError(
                    f"{side}.use_bidirectional_attention: expected False; an encoder sees both ways by being the encoder"
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> T5GemmaConfig:
        return from_mapping(cls, values)

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @property
    def num_parameters(self) -> int:
        d, width = self.decoder.hidden_size, self.encoder.hidden_size
        cross = sum(
            2 * d * s.num_heads * s.head_dim + 2 * width * s.num_kv_heads * s.head_dim + 2 * d
            for s in self.decoder.layers
        )
        return self.encoder.num_parameters + self.decoder.num_parameters + cross


@dataclasses.dataclass(frozen=True)
class T5Gemma2Config(T5GemmaConfig):
    """An encoder of Gemma 3 blocks, which may read images, and a decoder whose attention looks at its own tokens and at
    the encoder's with the same weights. One embedding table serves both sides and the head; `<end_of_image>` has an
    embedding of its own. The vision tower and the ids of images are the encoder's.
    """

    def __post_init__(self):
        super().__post_init__()
        shared = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")
        for name in (*shared, "flax_vocab_rows"):
            ours, theirs = getattr(self.encoder, name), getattr(self.decoder, name)
            if ours != theirs:
                raise ConfigError(f"decoder.{name}: expected {ours!r}, that of the encoder, got {theirs!r}")
        if self.decoder.vision is not None:
            raise ConfigError("decoder.vision: images are read by the encoder; expected None")

    @property
    def num_parameters(self) -> int:
        table = self.decoder.vocab_size * self.decoder.hidden_size
        return self.encoder.num_parameters + self.decoder.num_parameters - table + self.decoder.hidden_size


def encoder_layers(config: T5GemmaConfig, *, window: str = "hf") -> tuple[LayerSpec, ...]:
    """What each layer of the encoder does: both ways, and in a local layer as far as its window reaches.

    With a window of W, a T5Gemma's local layers see W positions each way in Hugging Face's code (`window="hf"`) and
    W - 1 in the official JAX code ("deepmind"); a T5Gemma 2's see (W + 1) // 2 - 1 before and W // 2 after.
    """
    if window not in WINDOWS:
        raise ConfigError(f"window: expected one of {', '.join(map(repr, WINDOWS))}, got {window!r}")

    def both_ways(spec: LayerSpec) -> LayerSpec:
        reach = None
        if spec.window is not None and isinstance(config, T5Gemma2Config):
            reach = ((spec.window + 1) // 2 - 1, spec.window // 2)
        elif spec.window is not None:
            reach = (spec.window if window == "hf" else spec.window - 1,) * 2
        return dataclasses.replace(spec, bidirectional=True, reach=reach)

    return tuple(map(both_ways, config.encoder.layers))
