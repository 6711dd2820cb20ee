# SPDX-License-Identifier: Apache-2.0
"""A parity check must be seen to fail: every named defect below moves the logits past the tolerance of test_hf.py.

The defects are data. `CONFIG` changes a fact of the configuration, `WEIGHTS` the parameters as a wrong converter would,
`CODE` replaces a function of our modules, `CALL` passes wrong masks or positions, `CACHE` breaks what one step leaves to
the next. Each is compared with the same oracle forward that the sound model agrees with. Other weights run through one
compilation. What changes the program runs op by op (`jax.disable_jit`): no compiled trace outlives a defect, and dozens of
programs need no compilations; as it is slow, such a defect is put into one network that has the trait.
"""

from __future__ import annotations

import dataclasses
import functools
import sys

import flax.linen
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from parity_harness import BASES, TOLERANCE, gap, nest, pair, ragged
from test_hf import Cached, allowance

from gemma import gm
from gemma.gm.nn import _attention, _cache, _plan, _transformer

IDS = ragged((19,))[0]  # [1, 19]: almost four windows long


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """Hundreds of small programs, each run a few times: compiling them is the cost."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def forward(base: str, *, config=None, flat=None, **call) -> np.ndarray:
    """Our logits [19, V] of the base model, with some of it replaced."""
    its = pair(base)
    if flat is not None:
        return its.logits(IDS, jax.tree.map(jnp.asarray, nest(flat)))[0]
    model = gm.nn.Transformer.from_config(config or its.config, dtype=jnp.float32)
    with jax.disable_jit():
        out = model.apply({"params": its.params}, jnp.asarray(IDS), **call)
    return np.asarray(out.logits, np.float32)[0]


def distance(base: str, **changes) -> float:
    return gap(forward(base, **changes), pair(base).expected(IDS[0]))


@pytest.mark.parametrize("base", BASES)
def test_the_sound_model_agrees(base):
    assert distance(base) < TOLERANCE
    assert distance(base, flat=pair(base).flat) < TOLERANCE


# ---- configuration --------------------------------------------------------------------------------------------------

CONFIG = {
    "query scale from the head size": ("gemma3", dict(query_pre_attn_scalar=None)),
    "query scale 27B": ("gemma1", dict(query_pre_attn_scalar=18.0)),
    "no attention cap": ("gemma2", dict(attn_logit_softcapping=None)),
    "no final cap": ("gemma2", dict(final_logit_softcapping=None)),
    "attention cap where none belongs": ("gemma3", dict(attn_logit_softcapping=5.0)),
    "final cap where none belongs": ("gemma1", dict(final_logit_softcapping=3.0)),
    "caps exchanged": ("gemma2", dict(attn_logit_softcapping=3.0, final_logit_softcapping=5.0)),
    "window + 1": ("gemma2", dict(sliding_window=6)),
    "window - 1": ("gemma3", dict(sliding_window=4)),
    "local and global layers exchanged": ("gemma2", dict(layer_pattern="GL")),
    "pattern of five inverted": ("gemma3", dict(layer_pattern="GGGGGL")),
    "pattern of five shifted": ("gemma3", dict(layer_pattern="LLLLGL")),
    "every layer global": ("gemma2", dict(layer_pattern="G")),
    "RoPE bases exchanged": ("gemma3", dict(rope_theta=1e4, rope_local_base_freq=1e6)),
    "one RoPE base for all layers": ("gemma3", dict(rope_local_base_freq=None)),
    "another RoPE base": ("gemma1", dict(rope_theta=1e6)),
    "no RoPE factor": ("gemma3", dict(rope_scaling_factor=1.0)),
    "no query and key norms": ("gemma3", dict(use_qk_norm=False)),
    "no post norms": ("gemma2", dict(use_post_norms=False)),
    "epsilon 1e-5": ("gemma3", dict(rms_norm_eps=1e-5)),
}


@pytest.mark.parametrize(
    ("name", "base"), [(name, base) for name, (bases, _) in CONFIG.items() for base in bases.split()]
)
def test_configuration_defect(name, base):
    config = dataclasses.replace(pair(base).config, **CONFIG[name][1])
    assert distance(base, config=config) > TOLERANCE


@pytest.mark.parametrize("base", BASES)
def test_a_misread_gate_layout_never_runs(base):
    its = pair(base).config
    config = dataclasses.replace(its, transpose_gating_einsum=not its.transpose_gating_einsum)
    with pytest.raises(Exception, match=r"(?i)shape|dimension|size"):
        forward(base, config=config)


# ---- weights --------------------------------------------------------------------------------------------------------


def on(suffix: str, change):
    """A defect that applies `change` to every tensor whose path ends in `suffix`."""
    return lambda flat: {path: change(leaf) if path.endswith(suffix) else leaf for path, leaf in flat.items()}


def exchange(one: str, other: str):
    """A defect that exchanges the tensors of two names within every layer."""

    def defect(flat):
        partner = {path: path.replace(a, b) for path in flat for a, b in ((one, other), (other, one)) if a in path}
        assert partner, f"nothing is called {one} or {other}"
        return {path: flat[partner.get(path, path)] for path in flat}

    return defect


def swap_halves(leaf):
    return leaf[::-1]


def next_row(leaf):
    return np.roll(leaf, 1, axis=0)


def interleave(leaf):
    """H as pairs (2j, 2j+1) where halves (j, j + H/2) belong: a llama-style permutation of the last axis."""
    *lead, h = leaf.shape
    return leaf.reshape(*lead, 2, h // 2).swapaxes(-1, -2).reshape(leaf.shape)


def heads_and_sizes_mixed(leaf):
    """[N, H, D] filled from rows that run over H first."""
    n, h, d = leaf.shape
    return leaf.reshape(h, n, d).swapaxes(0, 1).copy()


def as_bfloat16(leaf):
    return leaf.astype(ml_dtypes.bfloat16).astype(np.float32)


ALL = "gemma1 gemma2 gemma3"
WEIGHTS = {
    "the 1 + is dropped": (ALL, on("norm/scale", lambda w: w - 1)),
    "the 1 + is added twice": (ALL, on("norm/scale", lambda w: w + 1)),
    "the 1 + is dropped in the final norm": (ALL, on("final_norm/scale", lambda w: w - 1)),
    "the 1 + is dropped in query norms": ("gemma3", on("_query_norm/scale", lambda w: w - 1)),
    "the 1 + is dropped in key norms": ("gemma3", on("_key_norm/scale", lambda w: w - 1)),
    "attention and MLP norms exchanged": (ALL, exchange("/pre_attention_norm", "/pre_ffw_norm")),
    "pre and post attention norms exchanged": (
        "gemma2 gemma3",
        exchange("/pre_attention_norm", "/post_attention_norm"),
    ),
    "pre and post MLP norms exchanged": ("gemma2 gemma3", exchange("/pre_ffw_norm", "/post_ffw_norm")),
    "post attention norm used before the MLP": ("gemma2 gemma3", exchange("/post_attention_norm", "/pre_ffw_norm")),
    "query and key norms exchanged": ("gemma3", exchange("/_query_norm", "/_key_norm")),
    "K and V exchanged": (ALL, on("attn/kv_einsum/w", swap_halves)),
    "gate and up exchanged": (ALL, on("mlp/gating_einsum", swap_halves)),
    "query heads permuted": (ALL, on("attn/q_einsum/w", next_row)),
    "key heads permuted": ("gemma2 gemma3", on("attn/kv_einsum/w", lambda w: w[:, ::-1])),
    "output heads permuted": (ALL, on("attn/attn_vec_einsum/w", next_row)),
    "heads and head sizes mixed in the output": (ALL, on("attn/attn_vec_einsum/w", heads_and_sizes_mixed)),
    "interleaved rotary pairs in the queries": (ALL, on("attn/q_einsum/w", interleave)),
    "layers exchanged": (ALL, exchange("layer_0/", "layer_1/")),
    "vocabulary shifted by one": (ALL, on("embedder/input_embedding", next_row)),
    "weights rounded to bfloat16": (ALL, on("", as_bfloat16)),
}


@pytest.mark.parametrize(("name", "base"), [(n, base) for n, (bases, _) in WEIGHTS.items() for base in bases.split()])
def test_weight_defect(name, base):
    flat = pair(base).flat
    changed = WEIGHTS[name][1](flat)
    assert any(not np.array_equal(changed[path], flat[path]) for path in flat), "the defect changed nothing"
    assert distance(base, flat=changed) > TOLERANCE


# ---- code -----------------------------------------------------------------------------------------------------------


def rebind(monkeypatch, name: str, make) -> None:
    """Replaces a function by `make(original)` under its name wherever one of our JAX modules holds it."""
    holders = [m for key, m in sys.modules.items() if key.startswith("gemma.gm") and name in vars(m)]
    assert holders, f"no module of gemma.gm holds {name}"
    changed = make(vars(holders[0])[name])
    for module in holders:
        monkeypatch.setattr(module, name, changed)


def in_method(cls: str, method: str, make):
    """A defect that replaces a method of a public class of gm.nn by `make(original)`."""

    def apply(monkeypatch):
        owner = getattr(gm.nn, cls)
        monkeypatch.setattr(owner, method, make(getattr(owner, method)))

    return apply


def erf_gelu(monkeypatch):
    exact = functools.partial(jax.nn.gelu, approximate=False)
    for module in (jax.nn, flax.linen):
        monkeypatch.setattr(module, "gelu", lambda x, approximate=True: exact(x))


def in_function(name: str, make):
    """A defect that replaces a function of our modules by `make(original)`."""
    return lambda monkeypatch: rebind(monkeypatch, name, make)


def neighbours_as_pairs(rotate):
    """Pairs (2j, 2j+1) where (j, j + H/2) belong."""

    def rotate_neighbours(x, sin, cos):
        split = x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape)
        return rotate(split, sin, cos).reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)

    return rotate_neighbours


BFLOAT16_SCALE = float(np.float32(np.sqrt(72)).astype(ml_dtypes.bfloat16)) / float(np.sqrt(72))
CODE = {
    "erf GELU": ("gemma1", erf_gelu),
    "no embedding scale": ("gemma2", in_method("Embedder", "encode", lambda f: lambda self, x: f(self, x) / 72**0.5)),
    "embedding scale rounded to bfloat16": (
        "gemma1",
        in_method("Embedder", "encode", lambda f: lambda self, x: f(self, x) * BFLOAT16_SCALE),
    ),
    "logits scaled as well": (
        "gemma1",  # without a final cap, which takes another way
        in_method("Embedder", "decode", lambda f: lambda self, x: f(self, x) * 72**0.5),
    ),
    "norms centre their input": (
        "gemma2",
        in_method("RMSNorm", "__call__", lambda f: lambda self, x: f(self, x - x.mean(-1, keepdims=True))),
    ),
    "no rotation": ("gemma1", in_function("rotate", lambda rotate: lambda x, sin, cos: x)),
    "rotation backwards": ("gemma2", in_function("rotate", lambda rotate: lambda x, sin, cos: rotate(x, -sin, cos))),
    "neighbours rotate as pairs": ("gemma3", in_function("rotate", neighbours_as_pairs)),
    "every other position": ("gemma1", in_function("rope_table", lambda f: lambda pos, **k: f(pos // 2 * 2, **k))),
}


@pytest.mark.parametrize(("name", "base"), [(n, base) for n, (bases, _) in CODE.items() for base in bases.split()])
def test_code_defect(name, base, monkeypatch):
    pair(base).expected(IDS[0])  # before anything is replaced
    CODE[name][1](monkeypatch)
    assert distance(base) > TOLERANCE


# ---- the call -------------------------------------------------------------------------------------------------------

T = IDS.shape[1]
STEPS = np.arange(T)
CALL = {
    "the future is seen": ("gemma1", dict(attention_mask=np.ones((1, T, T), bool))),
    "one token of the future is seen": (
        "gemma2",
        dict(attention_mask=STEPS[None, :, None] + 1 >= STEPS[None, None, :]),
    ),
    "the first token is hidden": (
        "gemma3",
        dict(attention_mask=np.tril(np.ones((1, T, T), bool)) & ((STEPS > 0) | (STEPS[:, None] == 0))),
    ),
    "positions all zero": ("gemma2", dict(positions=np.zeros((1, T), np.int32))),
    "positions reversed": ("gemma1", dict(positions=STEPS[None, ::-1].astype(np.int32).copy())),
}


@pytest.mark.parametrize(("name", "base"), [(n, base) for n, (bases, _) in CALL.items() for base in bases.split()])
def test_call_defect(name, base):
    assert distance(base, **jax.tree.map(jnp.asarray, CALL[name][1])) > TOLERANCE


@pytest.mark.parametrize("base", BASES)
def test_a_common_offset_of_positions_is_no_defect(base):
    """Rotations and windows are relative: the check does not cry at everything."""
    causal = jnp.asarray(np.tril(np.ones((1, T, T), bool)))
    shifted = jnp.asarray(STEPS[None] + 100, jnp.int32)
    assert distance(base, positions=shifted, attention_mask=causal) < TOLERANCE


# ---- the cache ------------------------------------------------------------------------------------------------------

# Two prefill chunks, then a single token; few shapes, because every one is compiled. `PADDED` has padding on both sides
# and in the middle of what is fed: its rows hold 8, 17 and 12 tokens. The rows of `WHOLE` hold 17, over three windows.
SIZES = (8, 8, 1)
WHOLE = np.random.default_rng(11).integers(3, 290, (3, sum(SIZES)))
PADDED = WHOLE.copy()
PADDED[0, :5] = PADDED[0, 12:16] = PADDED[2, 5:10] = 0


class Eager:
    """What `Cached` uses of a pair, without a jit around the model."""

    def __init__(self, its):
        self.model, self.params, self.config = its.model, its.params, its.config

    def apply(self, params, tokens, **call):
        return self.model.apply({"params": params}, tokens, **call)


def cached_distance(layout: str) -> float:
    """max |ours - the oracle's| over all real tokens, fed in chunks.

    Layouts: `ring`; `full`, whose masks and positions the caller gives; `derived`: full, and the model derives both.
    """
    its, tokens = pair("gemma3"), WHOLE if layout == "derived" else PADDED
    run = Cached(Eager(its), len(tokens), windowed=layout == "ring")
    run.windowed = layout != "full"  # from here on: whether masks and positions are left to the model
    ours = np.concatenate([run.feed(chunk) for chunk in np.split(tokens, np.cumsum(SIZES)[:-1], axis=1)], axis=1)
    return max(gap(got[row != 0], its.expected(row[row != 0])) for got, row in zip(ours, tokens))


@functools.cache
def cached_tolerance() -> float:
    return allowance(pair("gemma3"), WHOLE[0], sum(SIZES[:2]))


def replace(module, name: str, make):
    """A defect that replaces what `module` calls `name` by `make(original)`."""
    return lambda monkeypatch: monkeypatch.setattr(module, name, make(getattr(module, name)))


def not_advanced(plan_write):
    return lambda cache, *args, **kwargs: plan_write(cache, *args, **kwargs).replace(end_index=cache["end_index"])


def written_first(plan_write):
    def defect(*args, **kwargs):
        write = plan_write(*args, **kwargs)
        return write.replace(read_first=False) if isinstance(write, _cache.ChunkWrite) else write

    return defect


def padding_counts(plan_write):
    return lambda cache, pos, valid, **kwargs: plan_write(cache, pos, jnp.ones_like(valid), **kwargs)


@dataclasses.dataclass
class StoresUnrotated:
    """A write that shows the chunk's keys to its queries as they should be, and stores them without their rotation."""

    plan: _plan.LayerPlan

    def store(self, cache, k, v):
        seen_k, seen_v, _ = self.plan.write.store(cache, k, v)
        plain = _attention.rotate(k, -self.plan.sin, self.plan.cos)
        return seen_k, seen_v, self.plan.write.store(cache, plain, v)[2]


def before_rope(plan_layer):
    def defect(*args, **kwargs):
        plan = plan_layer(*args, **kwargs)
        return plan.replace(write=StoresUnrotated(plan))

    return defect


def window_in_slots(mask):
    return lambda queries, keys, window, **k: mask(queries, jnp.arange(keys.shape[1])[None, :], window, **k)


def earlier_slots_hidden(mask):
    def defect(start, stored, *more):
        return mask(start, stored, *more) & (jnp.arange(stored.shape[1]) >= start)[None, None, :]

    return defect


CACHE = {
    "ring index off by one": (
        "ring",
        replace(_cache, "newest_number", lambda f: lambda count, slots: jnp.roll(f(count, slots), 1, axis=1)),
    ),
    "ring's end_index not advanced": ("ring", replace(_cache, "plan_ring_write", not_advanced)),
    "full layout's end_index not advanced": ("full", replace(_cache, "plan_block_write", not_advanced)),
    "padding stored as if it were tokens": ("ring", replace(_cache, "plan_ring_write", padding_counts)),
    "ring written before it is read": ("ring", replace(_cache, "plan_ring_write", written_first)),
    "positions restart with every chunk": (
        "ring",
        replace(
            _transformer,
            "_positions",
            lambda f: lambda valid, cache: _transformer._pos_utils.build_positions_from_mask(valid),
        ),
    ),
    "keys stored before their rotation": ("ring", replace(_plan, "plan_layer", before_rope)),
    "window counted in slots": ("full", replace(_plan, "window_mask", window_in_slots)),
    "earlier slots hidden": ("derived", replace(_plan, "_block_mask", earlier_slots_hidden)),
}


@pytest.mark.parametrize("layout", ["ring", "full", "derived"])
def test_the_sound_cache_agrees(layout):
    assert cached_distance(layout) < cached_tolerance()


@pytest.mark.parametrize("name", CACHE)
def test_cache_defect(name, monkeypatch):
    layout, apply = CACHE[name]
    apply(monkeypatch)
    assert cached_distance(layout) > cached_tolerance()
