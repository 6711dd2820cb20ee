# SPDX-License-Identifier: Apache-2.0
"""Our PyTorch model beside a tiny Hugging Face oracle with the same weights; the pairs are those of tests/parity."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from parity_harness import pair

from gemma._torch.cache import WindowedKVCache
from gemma.modeling_gemma import GemmaForCausalLM, KVCache


@functools.cache
def model(name: str) -> GemmaForCausalLM:
    """Ours, with the oracle's state dict as it is, the copy of the tied head included."""
    its = pair(name)
    ours = GemmaForCausalLM(its.config).eval()
    ours.load_state_dict(its.hf.state_dict())
    return ours


def cache(kind: str, config, batch: int, length: int = 40, **options):
    if kind == "growing":
        return KVCache()
    return WindowedKVCache(config.layers, batch, length, **options)


@torch.no_grad()
def logits(network: GemmaForCausalLM, tokens, **call) -> np.ndarray:
    """tokens [B, T] to float32 [B, T, V]."""
    return network(input_ids=torch.as_tensor(np.asarray(tokens), dtype=torch.long), **call)["logits"].float().numpy()


def fed(network: GemmaForCausalLM, tokens, cuts, kv_cache, mask=None) -> np.ndarray:
    """The logits of all tokens [B, T], read in the chunks that `cuts` make; masks hold all columns so far."""
    edges = [0, *cuts, tokens.shape[1]]
    parts = []
    for start, stop in itertools.pairwise(edges):
        call = {} if mask is None else dict(attention_mask=torch.as_tensor(mask[:, :stop]))
        parts.append(logits(network, tokens[:, start:stop], kv_cache=kv_cache, **call))
    return np.concatenate(parts, 1)
