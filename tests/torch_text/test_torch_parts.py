# SPDX-License-Identifier: Apache-2.0
"""Single operations against naive ones, and the faces of the modules: masks, caches, products, what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from parity_harness import BASES, gap, pair
from torch_harness import cache, fed, logits, model

from gemma._torch import linear as products
from gemma._torch.attention import attend
from gemma._torch.cache import WindowedKVCache
from gemma._torch.masks import visible
from gemma.errors import CheckpointError, ConfigError, ContextFull, PromptError, ShapeError
from gemma.modeling_gemma import GemmaEmbedding, GemmaForCausalLM, GemmaRMSNorm, GemmaRotaryEmbedding, KVCache, rotate
from gemma.testing import tiny_config

RNG = np.random.default_rng(0)


def normal(*shape) -> torch.Tensor:
    return torch.from_numpy(RNG.standard_normal(shape).astype(np.float32))


# ---- operations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_rms_norm(size):
    norm = GemmaRMSNorm(24, 1e-6)
    x, w = normal(3, 24) * size, normal(24)
    norm.weight.data = w
    wide = x.double().numpy()
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * (1 + w.double().numpy())
    np.testing.assert_allclose(norm(x).detach().numpy(), expected, rtol=2e-6, atol=1e-6)
    low = norm.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    with torch.no_grad():
        by_hand = x.bfloat16().float()
        by_hand = by_hand * torch.rsqrt(by_hand.square().mean(-1, keepdim=True) + 1e-6) * (1 + w.bfloat16().float())
    assert torch.equal(low, by_hand.bfloat16())  # rounded once, at the end


@pytest.mark.parametrize(("base", "scale", "fraction"), [(1e4, 1.0, 1.0), (1e6, 8.0, 1.0), (1e6, 1.0, 0.25)])
def test_rope(base, scale, fraction):
    positions = torch.tensor([[0, 1, 257, 30_001]])
    cos, sin = GemmaRotaryEmbedding(16, base, scale, fraction)(positions)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (1, 1, 4, 16)
    x = normal(1, 2, 4, 16)
    got = rotate(x, (cos, sin)).double().numpy()
    for t, position in enumerate(positions[0].tolist()):
        for j in range(8):
            angle = position / base ** (2 * j / 16) / scale if j < int(fraction * 8) else 0.0
            a, b = x[0, :, t, j].double().numpy(), x[0, :, t, j + 8].double().numpy()
            # An angle of 30,000 in float32 is known to 0.001.
            np.testing.assert_allclose(got[0, :, t, j], a * np.cos(angle) - b * np.sin(angle), atol=5e-3)
            np.testing.assert_allclose(got[0, :, t, j + 8], b * np.cos(angle) + a * np.sin(angle), atol=5e-3)


def test_rope_does_not_round_positions_in_bfloat16():
    network = GemmaForCausalLM(tiny_config("gemma3")).bfloat16()
    cos, _ = next(iter(network.model._rotations.values()))(torch.tensor([[256, 257]]))
    assert cos.dtype == torch.float32 and not torch.equal(cos[..., 0, :], cos[..., 1, :])


def test_the_embedding_scale_is_rounded_to_the_weights():
    table = GemmaEmbedding(5, 640)
    assert torch.equal(table(torch.tensor([3])), table.weight[3:4] * np.float32(640**0.5))
    low = table.bfloat16()(torch.tensor([3]))
    assert torch.equal(low, (low.new_tensor(25.25) * table.weight[3:4]))


def naive_attention(q, k, v, mask, scale, softcap):
    B, N, T, H = q.shape
    out = np.zeros((B, N, T, H))
    for b in range(B):
        for n in range(N):
            head = n // (N // k.shape[1])
            for t in range(T):
                scores = k[b, head].astype(float) @ q[b, n, t] * scale
                scores = softcap * np.tanh(scores / softcap) if softcap else scores
                scores = np.where(mask[b, 0, t], scores, -np.inf)
                weights = np.exp(scores - scores.max())
                out[b, n, t] = weights / weights.sum() @ v[b, head]
    return out


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("heads", "keys"), [(4, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("T", [1, 5])
def test_attend(T, heads, keys, softcap, monkeypatch):
    monkeypatch.setattr("gemma._torch.attention._QUERY_BLOCK", 2)
    q, k, v = normal(2, heads, T, 8), normal(2, keys, 7, 8), normal(2, keys, 7, 8)
    mask = RNG.random((2, 1, T, 7)) < 0.6
    mask[..., 3] = True
    got = attend(q, k, v, torch.from_numpy(mask), scale=0.4, softcap=softcap)
    expected = naive_attention(q.numpy(), k.numpy(), v.numpy(), mask, 0.4, softcap)
    np.testing.assert_allclose(got.numpy(), expected, atol=3e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attend_without_a_mask_is_causal(softcap):
    q, k, v = normal(1, 2, 6, 8), normal(1, 1, 6, 8), normal(1, 1, 6, 8)
    mask = np.tril(np.ones((1, 1, 6, 6), bool))
    got = attend(q, k, v, None, scale=0.3, softcap=softcap)
    np.testing.assert_allclose(got, naive_attention(q.numpy(), k.numpy(), v.numpy(), mask, 0.3, softcap), atol=3e-6)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_visible(window, bidirectional):
    keys = np.array([[0, 1, -1, 2, 3, 4, 5], [9, 3, 4, 5, 6, 7, 8]])  # one row with padding, one ring
    queries, groups = keys[:, -3:], np.array([[1, 1, 0], [0, 2, 2]])
    got = visible(*map(torch.from_numpy, (queries, keys)), window=window, bidirectional=bidirectional,
                  groups=torch.from_numpy(groups)).numpy()  # fmt: skip
    for b, t, s in np.ndindex(got.shape):
        d = queries[b, t] - keys[b, s]
        own = s - 4  # the last three keys are the queries' own
        together = own >= 0 and groups[b, t] == groups[b, own] > 0
        if bidirectional:
            expected = window is None or abs(d) < window // 2 + 1
        else:
            expected = (d >= 0 or together) and (window is None or d < window)
        assert got[b, t, s] == (expected and keys[b, s] >= 0), (b, t, s)


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products(dtype, rows, monkeypatch):
    """Every way around PyTorch's slow ones gives the product; low precision is rounded once from float32."""
    monkeypatch.setattr(products, "_WORTH_SPLITTING", 1)
    monkeypatch.setattr(products, "_BLOCK", 100)
    monkeypatch.setattr(products, "_NATIVE", {torch.bfloat16: False, torch.float16: False})
    monkeypatch.setattr(products, "_PARTS", 2)
    x, w = normal(1, rows, 24).to(dtype), normal(30, 24).to(dtype)
    with torch.no_grad():
        got = products.linear(x, w)
    assert got.dtype == dtype and got.shape == (1, rows, 30) and got.is_contiguous()
    expected = x.double() @ w.double().T
    error = dict(atol=1e-5, rtol=0) if dtype == torch.float32 else dict(atol=1e-2, rtol=2**-8)
    np.testing.assert_allclose(got.double(), expected, **error)


def test_products_keep_gradients():
    x, w = normal(2, 3, 24).requires_grad_(), normal(30, 24).requires_grad_()
    products.linear(x, w).sum().backward()
    np.testing.assert_allclose(w.grad, x.detach().sum((0, 1)).expand(30, -1), rtol=1e-5)


# ---- caches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("length", [3, 5, 40])
def test_cache_bytes_are_exact(name, length):
    config = pair(name).config
    held = WindowedKVCache(config.layers, 2, length, dtype=torch.bfloat16)
    assert held.nbytes == 2 * config.cache_bytes(length, 2)


def test_nothing_is_copied_per_token(monkeypatch):
    its = pair("gemma3")
    held = cache("windowed", its.config, 2)
    tokens = RNG.integers(3, 290, (2, 12))
    logits(model("gemma3"), tokens, kv_cache=held)
    places = [t.data_ptr() for t in (*held.keys, *held.values)]
    sizes = []
    real = torch.cat
    monkeypatch.setattr(
        torch, "cat", lambda parts, *a, **k: sizes.append(sum(p.numel() for p in parts)) or real(parts, *a, **k)
    )
    logits(model("gemma3"), tokens[:, :1], kv_cache=held)
    assert max(sizes) <= 2 * 4 * 24  # the two halves that RoPE joins: of this token alone
    assert places == [t.data_ptr() for t in (*held.keys, *held.values)]


def test_a_full_cache_raises_and_stays_usable():
    its, network = pair("gemma3"), model("gemma3")
    held = cache("windowed", its.config, 1, 10)
    tokens = RNG.integers(3, 290, (1, 12))
    first = fed(network, tokens[:, :9], (4,), held)
    with pytest.raises(ContextFull) as caught:
        logits(network, tokens[:, 9:11], kv_cache=held)
    assert (caught.value.used, caught.value.limit) == (11, 10)
    last = logits(network, tokens[:, 9:10], kv_cache=held)
    assert gap(np.concatenate([first, last], 1)[0], its.expected(tokens[0, :10])) < 2e-5
    with pytest.raises(ContextFull):
        logits(network, tokens[:, :1], kv_cache=held)


def test_rows_share_memory():
    its, network = pair("gemma3"), model("gemma3")
    held = cache("windowed", its.config, 3)
    prompts = [RNG.integers(3, 290, n) for n in (4, 17, 9)]
    for b, prompt in enumerate(prompts):
        logits(network, prompt[None], kv_cache=held.rows(b, b + 1))
    step = RNG.integers(3, 290, (3, 1))
    got = logits(network, step, kv_cache=held.rows(0, 3))
    for row, prompt, token in zip(got, prompts, step):
        assert gap(row, its.expected([*prompt, *token])[-1:]) < 2e-5


def test_a_cache_of_another_dtype_rounds():
    its, network = pair("gemma3"), model("gemma3")
    tokens = RNG.integers(3, 290, (1, 14))
    at_once = fed(network, tokens, (), cache("windowed", its.config, 1, dtype=torch.bfloat16))
    by_one = fed(network, tokens, range(1, 14), cache("windowed", its.config, 1, dtype=torch.bfloat16))
    # Now and then a value is rounded the other way; keys that only some of the steps round would all differ.
    rounding = np.abs(at_once[0] - its.expected(tokens[0])).mean()
    assert 1e-5 < rounding < 1e-2
    assert np.abs(at_once - by_one).mean() < 0.1 * rounding


def test_static_steps_equal_others():
    its, network = pair("gemma3"), model("gemma3")
    tokens = RNG.integers(3, 290, (2, 15))
    held = cache("windowed", its.config, 2)
    logits(network, tokens[:, :7], kv_cache=held)
    held.static = True
    got = np.concatenate([logits(network, tokens[:, t : t + 1], kv_cache=held) for t in range(7, 15)], 1)
    for row, ids in zip(got, tokens):
        assert gap(row, its.expected(ids)[7:]) < 2e-5


def test_a_cache_filled_by_hand():
    """`update` alone, as the decoder document shows it; then a model call on top."""
    config = pair("gemma1").config
    by_hand, through = KVCache(), KVCache()
    network, tokens = model("gemma1"), RNG.integers(3, 290, (1, 6))
    logits(network, tokens[:, :5], kv_cache=through)
    for i in range(config.num_hidden_layers):
        keys, _ = by_hand.update(through.keys[i], through.values[i], i)
    assert keys.shape[-2] == by_hand.num_items() == 5
    assert gap(logits(network, tokens[:, 5:], kv_cache=by_hand)[0], pair("gemma1").expected(tokens[0])[-1:]) < 2e-5
    with pytest.raises(ShapeError, match="layers come in order"):
        KVCache().update(keys, keys, 1)


# ---- what is refused ------------------------------------------------------------------------------------------------

IDS = torch.tensor([[3, 4, 5]])
WRONG = {
    "either input_ids or inputs_embeds, got none": (ShapeError, dict()),
    "got both": (ShapeError, dict(input_ids=IDS, inputs_embeds=torch.zeros(1, 3, 72))),
    "expected integers": (ShapeError, dict(input_ids=IDS.float())),
    r"inputs_embeds: expected \[B, T, 72\]": (ShapeError, dict(inputs_embeds=torch.zeros(1, 3, 71))),
    r"0\.\.319, got 320": (PromptError, dict(input_ids=IDS + 315)),
    r"0\.\.319, got -2": (PromptError, dict(input_ids=IDS - 5)),
    "attention_mask: expected 1 rows": (ShapeError, dict(input_ids=IDS, attention_mask=torch.ones(1, 2))),
    "input_ids: expected a torch.Tensor, got list": (ShapeError, dict(input_ids=[[3, 4]])),
    "attention_mask: expected a torch.Tensor, got list": (ShapeError, dict(input_ids=IDS, attention_mask=[[1] * 3])),
    "position_ids": (ShapeError, dict(input_ids=IDS, position_ids=torch.zeros(1, 2, dtype=torch.long))),
    "token_groups": (ShapeError, dict(input_ids=IDS, token_groups=torch.zeros(1, 2))),
    "labels: expected integers": (ShapeError, dict(input_ids=IDS, labels=IDS[:, :2])),
    "labels: expected ids": (PromptError, dict(input_ids=IDS, labels=IDS + 1000)),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    error, call = WRONG[message]
    with pytest.raises(error, match=message):
        model("gemma3")(**call)


@pytest.mark.parametrize("kind", ["growing", "windowed"])
def test_another_batch_than_the_cache_holds(kind):
    held = cache(kind, pair("gemma3").config, 1)
    logits(model("gemma3"), IDS, kv_cache=held)
    with pytest.raises(ShapeError, match="rows"):
        logits(model("gemma3"), IDS.expand(2, -1), kv_cache=held)


def test_float16():
    with pytest.raises(ConfigError, match="float16"):
        logits(GemmaForCausalLM(tiny_config("gemma3")).half(), IDS)
    assert np.isfinite(logits(GemmaForCausalLM(tiny_config("gemma2")).half(), IDS)).all()


def test_a_state_dict_whose_head_is_not_tied():
    state = pair("gemma1").hf.state_dict() | {"lm_head.weight": torch.zeros(320, 72)}
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        GemmaForCausalLM(pair("gemma1").config).load_state_dict(state)


def test_shared_keys_are_refused():
    layers = [dataclasses.replace(spec, kv_source=0) for spec in tiny_config("gemma3").layers]
    with pytest.raises(ConfigError, match="share"):
        WindowedKVCache(layers, 1, 8)
