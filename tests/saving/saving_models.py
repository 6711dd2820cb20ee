# SPDX-License-Identifier: Apache-2.0
"""Tiny models whose rows are whole blocks, their vocabulary, and a checkpoint of any of them."""

from __future__ import annotations

import numpy as np

from gemma.checkpoint import TokenizerSource
from gemma.testing import tiny_config, tiny_pieces

# 256-wide rows take K types; 96 falls back to types of 32 and 72 to halves.
WIDE = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64, vocab_size=320)
MIXED = dict(hidden_size=96, intermediate_size=256, num_attention_heads=4, head_dim=32, vocab_size=320)


def text_config(family: str, sizes: dict = WIDE, **changes):
    """A decoder that every reader of a GGUF understands: its query scale is that of its head size."""
    scale = {} if family == "gemma" else dict(query_pre_attn_scalar=None)
    return tiny_config(family, **sizes | scale | changes)


def tiny_source(vocab_size: int = 320) -> TokenizerSource:
    """`tiny_pieces` as a GGUF has them."""
    pieces, scores, types = zip(*tiny_pieces(vocab_size), strict=True)
    special = dict(pad=0, eos=1, bos=2, unk=3)
    flags = dict(add_bos_token=True, add_eos_token=False, add_space_prefix=False)
    scores, types = np.array(scores, np.float32), np.array(types, np.int32)
    return TokenizerSource("gguf", None, list(pieces), scores, types, special, flags)
