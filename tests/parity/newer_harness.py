# SPDX-License-Identifier: Apache-2.0
"""Pairs of a tiny Hugging Face Gemma 3n or 4 and ours; the configurations are written by hand a second time.

The oracles' query norms are scaled down by sqrt(H), as trained ones are: the attention of these generations has no scale
of its own, and with norms around 1 its scores are so large that two float32 runs of one model differ by 5e-5.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from hf_tiny_oracles import make
from parity_harness import _TINY, TOLERANCE, Pair, Variant, gap

from gemma import weights
from gemma.config import AltUpConfig, ExpertsConfig, GemmaConfig

_ROPE = dict(rope_theta=1e6, rope_local_base_freq=1e4)
_NEWER = _TINY | _ROPE | dict(sliding_window=5, use_post_norms=True, use_qk_norm=True, query_pre_attn_scalar=1.0)
_NEWER |= dict(norm_plus_one=False, use_value_norm=True, final_logit_softcapping=3.0, transpose_gating_einsum=True)
_SHARED = dict(num_hidden_layers=4, layer_pattern="LG", num_kv_shared_layers=2)
_PLE = dict(
    hidden_size_per_layer_input=8, vocab_size_per_layer_input=300
)  # in Gemma 3n, fewer rows than the vocabulary
_3N = _NEWER | _SHARED | _PLE | dict(model_type="gemma3n_text", laurel_rank=8, altup=AltUpConfig())
_3N |= dict(activation_sparsity_pattern=(0.95, 0.5, 0.0, 0.0), mlp_sizes=(100, 100, 60, 100))
_4 = _NEWER | dict(model_type="gemma4_text", global_head_dim=32, partial_rotary_factor=0.25, use_layer_scale=True)
_4E = (
    _4 | _SHARED | _PLE | dict(num_key_value_heads=1, vocab_size_per_layer_input=320, mlp_sizes=(100,) * 2 + (200,) * 2)
)
_4D = _4 | dict(num_hidden_layers=2, layer_pattern="LG", num_global_key_value_heads=1, attention_k_eq_v=True)
_TYPES = ["sliding_attention", "full_attention"]
_FOUR = dict(num_hidden_layers=4, layer_types=_TYPES * 2, num_kv_shared_layers=2, vocab_size_per_layer_input=300)

VARIANTS = {
    "gemma3n": Variant(
        "Gemma 3n text",
        "gemma3n_text",
        _FOUR | dict(activation_sparsity_pattern=[0.95, 0.5, 0.0, 0.0], intermediate_size=list(_3N["mlp_sizes"])),
        GemmaConfig(**_3N),
    ),
    "gemma4_e": Variant("Gemma 4 text", "gemma4_e", _FOUR | dict(vocab_size_per_layer_input=320), GemmaConfig(**_4E)),
    "gemma4_dense": Variant(
        "Gemma 4 text", "gemma4_dense", dict(num_hidden_layers=2, layer_types=_TYPES), GemmaConfig(**_4D)
    ),
    "gemma4_moe": Variant(
        "Gemma 4 text",
        "gemma4_dense",
        dict(num_hidden_layers=2, layer_types=_TYPES)
        | dict(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=16),
        GemmaConfig(**_4D, experts=ExpertsConfig(num_experts=4, top_k=2, intermediate_size=16)),
    ),
}


@functools.cache
def newer(name: str) -> Pair:
    """The pair of a variant, made once per process."""
    variant = VARIANTS[name]
    hf, _ = make(variant.oracle, **variant.kwargs)
    for key, parameter in hf.named_parameters():
        if key.endswith("q_norm.weight"):
            parameter.data.mul_(len(parameter) ** -0.5)
    state = {key: tensor.numpy() for key, tensor in hf.state_dict().items()}
    flat = weights.pack(weights.unpack(state, variant.config, format="hf"), variant.config, format="flax")
    return Pair(variant, hf, flat)


def allowance(its: Pair, prompts) -> float:
    """2e-5, or thrice what the oracle's own cached decode differs from its full forward on these prompts, if more.

    The sparse MLPs of Gemma 3n have a corner at their cut, where a difference in the last bit can grow.
    """
    return max(TOLERANCE, *(3 * its.cached_spread(list(map(int, prompt)), len(prompt) // 2) for prompt in prompts))


def mutated(name: str, tokens, **changes) -> float:
    """How far our logits of a changed configuration are from the oracle's: tokens [T]."""
    from gemma import gm

    its = newer(name)
    config = dataclasses.replace(its.config, **changes)
    model = gm.nn.Transformer.from_config(config, dtype=jnp.float32)
    apply = jax.jit(model.apply, compiler_options={"xla_backend_optimization_level": 0})
    out = apply({"params": its.params}, jnp.asarray(tokens, jnp.int32)[None])
    return gap(np.asarray(out.logits[0], np.float32), its.expected(tokens))
