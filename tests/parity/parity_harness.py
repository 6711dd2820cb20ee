# SPDX-License-Identifier: Apache-2.0
"""Pairs of one tiny random Hugging Face model and ours, holding the same weights; shared by the parity tests.

The configurations and the weight layout (`hand_tree`) are written by hand from the published descriptions, on purpose a
second time: `gemma.hf_config` and `gemma.weights` are compared with them. Axis letters: B batch, T tokens, N query
heads, K key heads, H head size, D width, F MLP width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from hf_tiny_oracles import make

from gemma import gm
from gemma.config import GemmaConfig

# float32, one thread: the same model computed twice in another order of additions differs by 1e-6 to 4e-6 (the oracles'
# own cached-against-full and eager-against-sdpa spreads); the smallest structural error that is looked for here, an
# epsilon of 1e-5, changes the logits by 3.9e-5. 2e-5 lies between the two.
TOLERANCE = 2e-5
WINDOW = 5
LENGTHS = (WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3, 19)  # below, at and above the window, and far above it

# As few layers as show every kind: two, local global local, one period of five to one, and a period cut off.
_TINY = dict(vocab_size=320, hidden_size=72, intermediate_size=100, num_hidden_layers=2, head_dim=24)
_TINY |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, eos_token_id=1)
_G1 = _TINY | dict(model_type="gemma", layer_pattern="G", num_key_value_heads=1)
_G2 = _TINY | dict(model_type="gemma2", layer_pattern="LG", sliding_window=WINDOW, use_post_norms=True)
_G2 |= dict(num_hidden_layers=3)
_G2 |= dict(query_pre_attn_scalar=18.0, attn_logit_softcapping=5.0, final_logit_softcapping=3.0)
_G3 = _TINY | dict(model_type="gemma3_text", layer_pattern="LLLLLG", sliding_window=WINDOW, num_hidden_layers=6)
_G3 |= dict(use_post_norms=True, use_qk_norm=True, query_pre_attn_scalar=18.0, transpose_gating_einsum=True)
_G3 |= dict(rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling_factor=8.0)

_NO_SCALING = {
    "full_attention": dict(rope_type="default", rope_theta=1e6),
    "sliding_attention": dict(rope_type="default", rope_theta=1e4),
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One oracle (its name and keyword arguments in hf_tiny_oracles) and the configuration that must equal it."""

    family: str
    oracle: str
    kwargs: dict[str, Any]
    config: GemmaConfig


def _variant(family: str, oracle: str, base: dict[str, Any], hf: dict[str, Any] | None = None, **ours: Any) -> Variant:
    config = GemmaConfig(**base | ours)
    return Variant(family, oracle, dict(num_hidden_layers=config.num_hidden_layers) | (hf or {}), config)


VARIANTS = {
    "gemma1": _variant("Gemma 1", "gemma1", _G1),  # K = 1, as in the 2B
    "gemma1_mha": _variant(  # K == N, as in the 7B: one fused qkv kernel
        "Gemma 1", "gemma1", _G1, dict(num_key_value_heads=4), num_key_value_heads=4
    ),
    "gemma2": _variant("Gemma 2", "gemma2", _G2),  # K = 2; the query scale is (D/N)^-0.5, as in the 27B; H = 24 is not
    "gemma2_rows": _variant(  # transposed gating as in the 9B and 27B; a JAX table with more rows than the vocabulary
        "Gemma 2", "gemma2", _G2, flax_vocab_rows=328, transpose_gating_einsum=True
    ),
    "gemma2_9b": _variant(  # the query scale is H^-0.5
        "Gemma 2", "gemma2", _G2, dict(query_pre_attn_scalar=24), query_pre_attn_scalar=None
    ),
    "gemma3": _variant("Gemma 3 text", "gemma3_text", _G3),  # as the 4B and larger: RoPE scaling 8 on global layers
    "gemma3_mqa": _variant(  # as the 270M and 1B: K = 1, no RoPE scaling; the pattern is cut off after a local layer
        "Gemma 3 text",
        "gemma3_text",
        _G3,
        dict(num_key_value_heads=1, rope_parameters=_NO_SCALING, query_pre_attn_scalar=24),
        num_key_value_heads=1,
        num_hidden_layers=7,
        rope_scaling_factor=1.0,
        query_pre_attn_scalar=None,
        transpose_gating_einsum=False,
    ),
}
BASES = ("gemma1", "gemma2", "gemma3")


def hand_tree(state: dict[str, np.ndarray], config: GemmaConfig) -> dict[str, np.ndarray]:
    """{nested Flax path: array} of a Hugging Face text state dict, written out tensor by tensor."""
    n, k, h, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
    table = state["model.embed_tokens.weight"]  # [V, D]
    extra = config.table_rows - len(table)
    rows = np.random.default_rng(7).standard_normal((extra, d)).astype(np.float32)  # random: a use of them shows
    tree = {"embedder/input_embedding": np.concatenate([table, rows]), "final_norm/scale": state["model.norm.weight"]}
    norms = dict(input_layernorm="pre_attention_norm", post_attention_layernorm="pre_ffw_norm")
    if config.use_post_norms:  # the same name is another norm: Gemma 1's second norm stands before the MLP
        norms["post_attention_layernorm"] = "post_attention_norm"
        norms |= dict(pre_feedforward_layernorm="pre_ffw_norm", post_feedforward_layernorm="post_ffw_norm")
    if config.use_qk_norm:
        norms |= {"self_attn.q_norm": "attn/_query_norm", "self_attn.k_norm": "attn/_key_norm"}
    for i in range(config.num_hidden_layers):
        hf = functools.partial(lambda name, prefix: state[f"{prefix}.{name}.weight"], prefix=f"model.layers.{i}")
        ours = f"layer_{i}"
        q = hf("self_attn.q_proj").reshape(n, h, d).transpose(0, 2, 1)  # [N, D, H]
        key, value = (hf(f"self_attn.{x}_proj").reshape(k, h, d).transpose(0, 2, 1) for x in "kv")  # [K, D, H]
        if k == n:
            tree[f"{ours}/attn/qkv_einsum/w"] = np.stack([q, key, value])
        else:
            tree[f"{ours}/attn/q_einsum/w"] = q
            tree[f"{ours}/attn/kv_einsum/w"] = np.stack([key, value])
        tree[f"{ours}/attn/attn_vec_einsum/w"] = hf("self_attn.o_proj").reshape(d, n, h).transpose(1, 2, 0)  # [N, H, D]
        gating = np.stack([hf("mlp.gate_proj"), hf("mlp.up_proj")])  # [2, F, D]
        tree[f"{ours}/mlp/gating_einsum"] = gating if config.transpose_gating_einsum else gating.transpose(0, 2, 1)
        tree[f"{ours}/mlp/linear"] = hf("mlp.down_proj").T  # [F, D]
        for source, target in norms.items():
            tree[f"{ours}/{target}/scale"] = hf(source)
    return tree


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """{"a/b": x} as {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        functools.reduce(lambda node, name: node.setdefault(name, {}), parents, tree)[last] = leaf
    return tree


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """The inverse of `nest`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(getattr(k, "key", k)) for k in path): np.asarray(leaf) for path, leaf in leaves}


@dataclasses.dataclass(eq=False)
class Pair:
    """An oracle and our model with its weights."""

    variant: Variant
    hf: Any
    flat: dict[str, np.ndarray]  # the oracle's weights, in our layout

    @property
    def config(self) -> GemmaConfig:
        return self.variant.config

    @functools.cached_property
    def model(self) -> gm.nn.Transformer:
        return gm.nn.Transformer.from_config(self.config, dtype=jnp.float32)

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        return jax.tree.map(jnp.asarray, nest(self.flat))

    @functools.cached_property
    def state(self) -> dict[str, np.ndarray]:
        return {name: tensor.numpy() for name, tensor in self.hf.state_dict().items()}

    @functools.lru_cache(maxsize=64)  # noqa: B019  (pairs live as long as the session)
    def _expected(self, ids: tuple[int, ...]) -> np.ndarray:
        with torch.no_grad():
            return self.hf(input_ids=torch.tensor([ids])).logits[0].numpy()

    def expected(self, ids) -> np.ndarray:
        """The oracle's logits of one sequence alone: ids [T] -> [T, V]."""
        return self._expected(tuple(int(i) for i in ids))

    def cached_spread(self, ids, start: int) -> float:
        """How far the oracle's own cached decode is from its full forward on ids [T], decoding from `start`."""
        with torch.no_grad():
            out = self.hf(input_ids=torch.tensor([ids[:start]]), use_cache=True)
            rows = [out.logits[0]]
            for token in ids[start:]:
                out = self.hf(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
                rows.append(out.logits[0])
        return float(np.abs(torch.cat(rows).numpy() - self.expected(ids)).max())

    @functools.cached_property
    def apply(self):
        """The jitted `model.apply`, with (params, tokens, **kwargs) as arguments.

        XLA's program is the one that users run; only LLVM is told not to polish it, which halves the compile time. The
        tests of the real model leave that out.
        """
        return jax.jit(
            lambda params, tokens, static=(), **kwargs: self.model.apply(
                {"params": params}, tokens, **kwargs, **dict(static)
            ),
            static_argnames="static",
            compiler_options={"xla_backend_optimization_level": 0},
        )

    def logits(self, tokens, params=None, **kwargs) -> np.ndarray:
        """Our logits: tokens [B, T] -> float32 [B, T, V]."""
        out = self.apply(self.params if params is None else params, jnp.asarray(tokens, jnp.int32), **kwargs)
        return np.asarray(out.logits, np.float32)[..., : self.config.vocab_size]


@functools.cache
def pair(name: str) -> Pair:
    """The pair of a variant, made once per process."""
    variant = VARIANTS[name]
    hf, _ = make(variant.oracle, **variant.kwargs)
    state = {key: tensor.numpy() for key, tensor in hf.state_dict().items()}
    return Pair(variant, hf, hand_tree(state, variant.config))


def ragged(lengths=LENGTHS, *, left: bool = False, seed: int = 3) -> tuple[np.ndarray, list[np.ndarray]]:
    """Random prompts of those lengths: (padded with 0 to [B, T], the prompts themselves)."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, 290, n) for n in lengths]
    table = np.zeros((len(lengths), max(lengths)), np.int32)
    for row, prompt in zip(table, prompts):
        row[slice(-len(prompt), None) if left else slice(len(prompt))] = prompt
    return table, prompts


def gap(ours: np.ndarray, theirs: np.ndarray) -> float:
    """max |ours - theirs|; NaN counts as infinitely far."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    difference = np.abs(ours.astype(np.float64) - theirs)
    return float(np.where(np.isnan(difference), np.inf, difference).max())


def flatten_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """{nested path: shape} of a tree of arrays or shapes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(getattr(k, "key", k)) for k in path): tuple(leaf.shape) for path, leaf in leaves}
