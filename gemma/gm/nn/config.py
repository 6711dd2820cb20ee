# SPDX-License-Identifier: Apache-2.0
"""The public names of network configurations, `gm.nn.config`; they are stated in `_config.py`."""

from gemma.gm.nn._config import (
    GEMMA3_ATTENTION_PATTERN,
    AttentionType,
    ModelInfo,
    QueryPreAttentionNormalisation,
    TransformerConfig,
    make_attention_layers_types,
)

__all__ = [
    "GEMMA3_ATTENTION_PATTERN",
    "AttentionType",
    "ModelInfo",
    "QueryPreAttentionNormalisation",
    "TransformerConfig",
    "make_attention_layers_types",
]
