# SPDX-License-Identifier: Apache-2.0
"""The PyTorch parity check must be seen to fail: every named defect moves the logits past its tolerance.

As in tests/mutations, the defects are data: facts of the configuration, weights as a wrong converter would leave them,
functions of our modules, masks and positions of the call, and what one cached step leaves to the next.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from parity_harness import BASES, TOLERANCE, gap, pair, ragged
from torch_harness import cache, fed, logits, model

from gemma import modeling_gemma
from gemma._torch import attention, masks
from gemma._torch import cache as caches
from gemma.modeling_gemma import GemmaEmbedding, GemmaForCausalLM, GemmaRMSNorm, GemmaRotaryEmbedding

IDS = ragged((19,))[0]  # [1, 19]: almost four windows long
ALL = "gemma1 gemma2 gemma3"


def build(base: str, config=None, state=None) -> GemmaForCausalLM:
    """The base model with another configuration or other weights; what the configuration lacks is left out."""
    network = GemmaForCausalLM(config or pair(base).config).eval()
    state = state or model(base).state_dict()
    wanted = network.state_dict()
    network.load_state_dict({key: state.get(key, value) for key, value in wanted.items()})
    return network


def distance(network: GemmaForCausalLM, base: str, **call) -> float:
    return gap(logits(network, IDS, **call)[0], pair(base).expected(IDS[0]))


def cases(table):
    return [(name, base) for name, (bases, _) in table.items() for base in bases.split()]


@pytest.mark.parametrize("base", BASES)
def test_the_sound_model_agrees(base):
    assert distance(build(base), base) < TOLERANCE


CONFIG = {
    "query scale from the head size": ("gemma2 gemma3", dict(query_pre_attn_scalar=None)),
    "query scale 27B": ("gemma1", dict(query_pre_attn_scalar=18.0)),
    "no attention cap": ("gemma2", dict(attn_logit_softcapping=None)),
    "no final cap": ("gemma2", dict(final_logit_softcapping=None)),
    "attention cap where none belongs": ("gemma1 gemma3", dict(attn_logit_softcapping=5.0)),
    "final cap where none belongs": ("gemma1 gemma3", dict(final_logit_softcapping=3.0)),
    "caps exchanged": ("gemma2", dict(attn_logit_softcapping=3.0, final_logit_softcapping=5.0)),
    "window + 1": ("gemma2 gemma3", dict(sliding_window=6)),
    "window - 1": ("gemma2 gemma3", dict(sliding_window=4)),
    "local and global layers exchanged": ("gemma2", dict(layer_pattern="GL")),
    "pattern shifted": ("gemma3", dict(layer_pattern="LLLLGL")),
    "every layer global": ("gemma2 gemma3", dict(layer_pattern="G")),
    "RoPE bases exchanged": ("gemma3", dict(rope_theta=1e4, rope_local_base_freq=1e6)),
    "one RoPE base for all layers": ("gemma3", dict(rope_local_base_freq=None)),
    "another RoPE base": ("gemma1 gemma2", dict(rope_theta=1e6)),
    "no RoPE factor": ("gemma3", dict(rope_scaling_factor=1.0)),
    "no query and key norms": ("gemma3", dict(use_qk_norm=False)),
    "no post norms": ("gemma2 gemma3", dict(use_post_norms=False)),
    "epsilon 1e-5": ("gemma3", dict(rms_norm_eps=1e-5)),
}


@pytest.mark.parametrize(("name", "base"), cases(CONFIG))
def test_configuration_defect(name, base):
    assert distance(build(base, dataclasses.replace(pair(base).config, **CONFIG[name][1])), base) > TOLERANCE


def on(suffix: str, change):
    """A defect that applies `change` to every tensor whose name holds `suffix`."""
    return lambda state: {key: change(value) if suffix in key else value for key, value in state.items()}


def exchange(one: str, other: str):
    """A defect that exchanges the tensors of two names."""

    def defect(state):
        partner = {key: key.replace(a, b) for key in state for a, b in ((one, other), (other, one)) if a in key}
        assert partner, f"nothing is called {one} or {other}"
        return {key: state[partner.get(key, key)] for key in state}

    return defect


def heads(weight):
    """Rows of the next head, of size 24."""
    return weight.roll(24, 0)


def interleaved(weight):
    """Rotary pairs (2j, 2j+1) where halves (j, j + H/2) belong."""
    return weight.view(-1, 2, 12, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


WEIGHTS = {
    "the 1 + is dropped": (ALL, on("norm.weight", lambda w: w - 1)),
    "the 1 + is added twice": (ALL, on("norm.weight", lambda w: w + 1)),
    "the 1 + is dropped in the final norm": (ALL, on("model.norm.weight", lambda w: w - 1)),
    "the 1 + is dropped in query norms": ("gemma3", on("q_norm", lambda w: w - 1)),
    "norms of attention and MLP exchanged": ("gemma1", exchange(".input_layernorm", ".post_attention_layernorm")),
    "pre and post attention norms exchanged": (
        "gemma2 gemma3",
        exchange(".input_layernorm", ".post_attention_layernorm"),
    ),
    "pre and post MLP norms exchanged": ("gemma2 gemma3", exchange(".pre_feedforward", ".post_feedforward")),
    "post attention norm used before the MLP": (
        "gemma2 gemma3",
        exchange(".post_attention_layernorm", ".pre_feedforward_layernorm"),
    ),
    "query and key norms exchanged": ("gemma3", exchange("q_norm", "k_norm")),
    "K and V exchanged": (ALL, exchange("k_proj", "v_proj")),
    "gate and up exchanged": (ALL, exchange("gate_proj", "up_proj")),
    "query heads permuted": (ALL, on("q_proj", heads)),
    "key heads permuted": ("gemma2 gemma3", on("k_proj", heads)),
    "output heads permuted": (ALL, on("o_proj", lambda w: w.roll(24, 1))),
    "interleaved rotary pairs": (ALL, on("q_proj", interleaved)),
    "layers exchanged": (ALL, exchange("layers.0.", "layers.1.")),
    "vocabulary shifted by one": (ALL, on("embed_tokens", lambda w: w.roll(1, 0))),
    "weights rounded to bfloat16": (ALL, on("", lambda w: w.bfloat16().float())),
}


@pytest.mark.parametrize(("name", "base"), cases(WEIGHTS))
def test_weight_defect(name, base):
    state = model(base).state_dict()
    changed = WEIGHTS[name][1](state)
    assert any(not torch.equal(changed[key], state[key]) for key in state), "the defect changed nothing"
    assert distance(build(base, state=changed), base) > TOLERANCE


def replace(owner, name: str, make):
    """A defect that replaces what `owner` calls `name` by `make(original)`."""
    return lambda monkeypatch: monkeypatch.setattr(owner, name, make(getattr(owner, name)))


def kwargs(**changes):
    return lambda f: lambda *a, **k: f(*a, **(k | {key: change(k[key]) for key, change in changes.items()}))


CODE = {
    "erf GELU": (
        ALL,
        replace(modeling_gemma.F, "gelu", lambda f: lambda x, approximate: f(x, approximate="none")),
    ),
    "no embedding scale": (ALL, replace(GemmaEmbedding, "forward", lambda f: lambda self, x: f(self, x) / 72**0.5)),
    "norms centre their input": (
        ALL,
        replace(GemmaRMSNorm, "forward", lambda f: lambda self, x: f(self, x - x.mean(-1, keepdim=True))),
    ),
    "no rotation": (ALL, replace(modeling_gemma, "rotate", lambda f: lambda x, rope: x)),
    "rotation backwards": (
        ALL,
        replace(modeling_gemma, "rotate", lambda f: lambda x, rope: f(x, (rope[0], -rope[1]))),
    ),
    "every other position": (
        ALL,
        replace(GemmaRotaryEmbedding, "forward", lambda f: lambda self, at: f(self, at // 2 * 2)),
    ),
    "the future is seen": (
        ALL,
        replace(masks, "visible", lambda f: lambda q, k, **o: f(q + 100, k, **(o | dict(window=None)))),
    ),
    "one token of the future is seen": (ALL, replace(masks, "visible", lambda f: lambda q, k, **o: f(q + 1, k, **o))),
    "the query scale is left out": (
        ALL,
        replace(modeling_gemma, "attend", kwargs(scale=lambda scale: 1.0)),
    ),
    "the cap comes after the mask": (
        "gemma2",
        replace(attention.torch, "softmax", lambda f: lambda x, d: f(5 * torch.tanh(x.clamp(min=-1e9) / 5), d)),
    ),
}


@pytest.mark.parametrize(("name", "base"), cases(CODE))
def test_code_defect(name, base, monkeypatch):
    pair(base).expected(IDS[0])  # before anything is replaced
    network = model(base)
    # With its own positions given, the model draws every mask itself.
    call = dict(position_ids=torch.arange(IDS.shape[1])[None])
    assert distance(network, base, **call) < TOLERANCE
    CODE[name][1](monkeypatch)
    assert distance(network, base, **call) > TOLERANCE


def test_an_offset_of_positions_is_no_defect():
    """Rotations and windows are relative: the check does not cry at everything."""
    assert distance(model("gemma3"), "gemma3", position_ids=torch.arange(100, 119)[None]) < TOLERANCE


# ---- the cache ------------------------------------------------------------------------------------------------------

WHOLE = np.random.default_rng(11).integers(3, 290, (3, 19))
PADDED = WHOLE.copy()
PADDED[0, :5] = PADDED[0, 12:16] = PADDED[2, 5:10] = 0
Cache = caches.WindowedKVCache


def cached_distance() -> float:
    got = fed(model("gemma3"), PADDED, (8, 16, 17, 18), cache("windowed", pair("gemma3").config, 3), PADDED != 0)
    return max(gap(a[row != 0], pair("gemma3").expected(row[row != 0])) for a, row in zip(got, PADDED))


def stale(f):
    def defect(self, positions, valid):
        before = self._counts.clone()
        f(self, positions, valid)
        self._counts.copy_(before)

    return defect


def moved(field: str, change):
    """A defect in the plan of every write."""

    def make(f):
        return lambda self, *a: {n: w._replace(**{field: change(getattr(w, field), n)}) for n, w in f(self, *a).items()}

    return make


CACHE = {
    "ring index off by one in chunks": replace(Cache, "_chunk", moved("slots", lambda slots, n: (slots + 1) % n)),
    "ring index off by one in steps": replace(Cache, "_step", moved("slots", lambda slots, n: (slots + 1) % n)),
    "counts not advanced": replace(Cache, "prepare", stale),
    "padding stored as if it were tokens": replace(
        Cache, "_chunk", lambda f: lambda self, positions, valid: f(self, positions, None)
    ),
    "positions restart with every chunk": replace(Cache, "token_counts", lambda f: lambda self: None),
    "earlier tokens hidden": replace(
        Cache, "_step", moved("positions", lambda table, n: torch.where(table == table.max(), table, -1))
    ),
}


@pytest.fixture
def sound():
    allowed = max(TOLERANCE, 3 * pair("gemma3").cached_spread(WHOLE[1].tolist(), 16))
    assert cached_distance() < allowed
    return allowed


@pytest.mark.parametrize("name", CACHE)
def test_cache_defect(name, sound, monkeypatch):
    CACHE[name](monkeypatch)
    assert cached_distance() > sound
