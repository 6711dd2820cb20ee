# SPDX-License-Identifier: Apache-2.0
"""The language decoder under the import path that PaliGemma users expect: `gemma/modeling_gemma.py`, re-exported.

It also answers to `from modeling_gemma import ...` from inside this folder, as scripts that lie beside it write it.
"""

from gemma.config import GemmaConfig
from gemma.modeling_gemma import (
    GemmaAttention,
    GemmaDecoderLayer,
    GemmaForCausalLM,
    GemmaMLP,
    GemmaModel,
    GemmaRMSNorm,
    GemmaRotaryEmbedding,
    KVCache,
)

__all__ = [
    "GemmaAttention",
    "GemmaConfig",
    "GemmaDecoderLayer",
    "GemmaForCausalLM",
    "GemmaMLP",
    "GemmaModel",
    "GemmaRMSNorm",
    "GemmaRotaryEmbedding",
    "KVCache",
]
