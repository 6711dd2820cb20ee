# SPDX-License-Identifier: Apache-2.0
"""Both cache layouts: what they hold, how large they are, and that they never change an answer."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nn_helpers import QUICK, WINDOW, compiled, ids, tiny

from gemma import gm
from gemma.config import PRESETS
from gemma.gm.nn import _cache

# Sums of two layers in other orders: a few units of float32 on logits of size 1.
SAME = dict(rtol=0, atol=1e-5)
LAYOUTS = pytest.mark.parametrize("windowed", [False, True], ids=["full", "windowed"])


def empty(name, batch, length, windowed, dtype=jnp.float32):
    return tiny(name)[0].init_cache(batch_size=batch, dtype=dtype, cache_length=length, windowed=windowed)


# ---- layout ---------------------------------------------------------------------------------------------------------


def test_the_full_layout():
    cache = gm.nn.Gemma3_270M().init_cache(batch_size=2, dtype=jnp.bfloat16, cache_length=6)
    assert type(cache) is dict
    assert list(cache) == [f"layer_{i}" for i in range(18)]
    for layer in cache.values():
        shapes = {name: (leaf.shape, leaf.dtype.name) for name, leaf in layer.items()}
        assert shapes == {
            "k": ((2, 6, 1, 256), "bfloat16"),
            "v": ((2, 6, 1, 256), "bfloat16"),
            "end_index": ((2,), "int32"),
            "positions": ((2, 6), "int32"),
        }
        assert not any(np.asarray(leaf).any() for leaf in layer.values())


@pytest.mark.parametrize("name", ["Gemma_2B", "Gemma2_9B", "Gemma3_270M", "Gemma3_1B", "Gemma3_27B"])
@pytest.mark.parametrize("length", [100, 5000])
def test_bytes_of_the_windowed_layout(name, length):
    model = getattr(gm.nn, name)()
    cache = jax.eval_shape(
        lambda: model.init_cache(batch_size=3, dtype=jnp.bfloat16, cache_length=length, windowed=True)
    )
    kv = [layer[part] for layer in cache.values() for part in ("k", "v")]
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in kv) == 3 * PRESETS[name.lower()].cache_bytes(length)


def test_a_windowed_cache_survives_jax():
    cache = empty("gemma3", 1, 9, True)
    for other in (jax.tree.map(lambda leaf: leaf, cache), jax.jit(lambda c: c)(cache)):
        assert type(other) is gm.nn.WindowedCache
        assert other.cache_length == 9
        assert list(other) == list(cache)
    path = jax.tree_util.tree_leaves_with_path(cache)[0][0]
    assert jax.tree_util.keystr(path) == "['layer_0']['end_index']"


def test_a_windowed_cache_copied_as_a_dictionary_is_refused():
    with pytest.raises(ValueError, match="it is no WindowedCache"):
        compiled("gemma3")(ids(1, 2), cache=dict(empty("gemma3", 1, 9, True)))


@functools.partial(jax.jit, compiler_options=QUICK)
def store(cache, positions, valid, kv):
    """One chunk into a ring with a window of four; V is -K."""
    _, _, cache = _cache.plan_ring_write(cache, positions, valid, window=4).store(cache, kv, -kv)
    return cache


def test_the_drawing_in_the_docstring():
    """Window 4, tokens a..f: slots e f c d, positions 4 5 2 3."""
    cache = _cache.init_layer(1, 4, 1, 2, jnp.float32, _cache.EMPTY)
    tokens = np.arange(6, dtype=np.float32)[None, :, None, None].repeat(2, -1)
    for start, stop in ((0, 3), (3, 4), (4, 6)):
        positions = np.arange(start, stop, dtype=np.int32)[None]
        cache = store(cache, positions, np.ones((1, stop - start), bool), tokens[:, start:stop])
    np.testing.assert_array_equal(cache["k"][0, :, 0, 0], [4, 5, 2, 3])
    np.testing.assert_array_equal(cache["v"][0, :, 0, 0], [-4, -5, -2, -3])
    np.testing.assert_array_equal(cache["positions"], [[4, 5, 2, 3]])
    np.testing.assert_array_equal(cache["end_index"], [6])


@pytest.mark.parametrize("chunk", [2, 4, 9], ids=["shorter", "equal", "longer"])
def test_a_ring_keeps_the_newest_real_tokens(chunk):
    """Against a list per row: chunks with padding anywhere, rows at different places."""
    rng, rows = np.random.default_rng(chunk), [[], []]
    cache = _cache.init_layer(2, 4, 1, 1, jnp.float32, _cache.EMPTY)
    for start in range(0, 18, chunk):
        valid = rng.random((2, chunk)) < 0.7
        value = np.arange(start, start + chunk, dtype=np.float32) + np.asarray([[100.0], [200.0]], np.float32)
        stand = np.asarray([[len(row)] for row in rows])
        positions = (stand + np.maximum(np.cumsum(valid, 1) - 1, 0)).astype(np.int32)
        cache = store(cache, positions, valid, value[:, :, None, None])
        for row, mask, new in zip(rows, valid, value):
            row.extend(new[mask])
    for b, row in enumerate(rows):
        assert int(cache["end_index"][b]) == len(row)
        for slot in range(4):
            stored = [i for i in range(len(row)) if i % 4 == slot]
            expected = (stored[-1], row[stored[-1]]) if stored else (-1, 0.0)
            assert (int(cache["positions"][b, slot]), float(cache["k"][b, slot, 0, 0])) == expected


# ---- answers --------------------------------------------------------------------------------------------------------

L = 15
CHUNKS = {  # of few sizes, because each size is a program of its own
    "token by token": [1] * L,
    "shorter than the window": [3] * 5,
    "longer than the window": [6, 6, 3],
    "mixed": [3, 1, 6, 1, 3, 1],
    "one shot": [L],
}


@LAYOUTS
@pytest.mark.parametrize("chunks", CHUNKS)
def test_chunks_do_not_change_the_logits(chunks, windowed):
    """With one key head; tests/parity does the same for every family, against Hugging Face."""
    run, tokens = compiled("gemma3"), ids(2, L)
    cache, parts, start = empty("gemma3", 2, 20, windowed), [], 0
    for size in CHUNKS[chunks]:
        out = run(tokens[:, start : start + size], cache=cache)
        cache, start = out.cache, start + size
        parts.append(out.logits)
    np.testing.assert_allclose(np.concatenate(parts, 1), run(tokens).logits, **SAME)
    np.testing.assert_array_equal(cache["layer_0"]["end_index"], [L, L])


def test_rows_at_different_places():
    """Two turns, padded left, right and inside, then decoding; one row pauses. Each row equals itself alone."""
    run, tokens = compiled("gemma3"), ids(2, L)
    alone = run(tokens).logits
    cache, told = empty("gemma3", 2, 20, True), [0, 0]
    layout = [("111111", "11...."), ("...111", "111111"), ("1", "1"), ("1", "."), ("1.1.1.", "..1..1"), (".", "1")]
    for turn in layout:
        chunk = np.zeros((2, len(turn[0])), np.int32)
        places = []
        for b, text in enumerate(turn):
            for t, mark in enumerate(text):
                if mark == "1":
                    chunk[b, t] = tokens[b, told[b]]
                    places.append((b, t, told[b]))
                    told[b] += 1
        out = run(chunk, cache=cache)
        cache = out.cache
        for b, t, n in places:
            np.testing.assert_allclose(out.logits[b, t], alone[b, n], **SAME)
    np.testing.assert_array_equal(cache["layer_0"]["end_index"], told)


def test_last_only_takes_the_last_real_token_of_each_row():
    run, tokens = compiled("gemma3"), ids(2, L)
    tokens[0, 4:] = 0
    tokens[1, :3] = 0
    full, last = run(tokens), run(tokens, return_last_only=True)
    for b, t in ((0, 3), (1, L - 1)):
        np.testing.assert_allclose(last.logits[b], full.logits[b, t], **SAME)


@LAYOUTS
def test_an_explicit_mask_says_the_same_as_the_derived_one(windowed):
    """Columns are slots or token numbers; hiding token 1 from everybody else hides it in both layouts."""
    run, tokens, S = compiled("gemma3"), ids(1, 9), 12
    causal = np.tril(np.ones((9, S), bool))[None]
    hidden = causal.copy()
    hidden[:, 2:, 1] = False
    reference = {kind: run(tokens, attention_mask=m[:, :, :9]).logits for kind, m in dict(c=causal, h=hidden).items()}
    assert np.abs(reference["c"] - reference["h"]).max() > 1e-3
    for kind, mask in (("c", causal), ("h", hidden)):
        cache, start = empty("gemma3", 1, S, windowed), 0
        for stop in (6, 7, 8, 9):
            out = run(tokens[:, start:stop], cache=cache, attention_mask=mask[:, start:stop])
            np.testing.assert_allclose(out.logits, reference[kind][:, start:stop], **SAME)
            cache, start = out.cache, stop


def test_positions_may_start_anywhere():
    """Only distances matter to attention: the same tokens at 1000.. give the same logits up to float32 angles."""
    run, tokens = compiled("gemma3"), ids(2, L)
    positions = np.broadcast_to(np.arange(L, dtype=np.int32) + 1000, (2, L))
    # Angles near 1000 carry 2^-15 of rounding each, which two layers turn into some 1e-4 of logit.
    np.testing.assert_allclose(run(tokens, positions=positions).logits, run(tokens).logits, rtol=0, atol=2e-3)
    first = run(tokens[:, :6], positions=positions[:, :6], cache=empty("gemma3", 2, 20, True))
    np.testing.assert_array_equal(first.cache["layer_0"]["positions"], [[1004, 1005, 1002, 1003]] * 2)


def test_a_cache_may_have_another_dtype_than_the_weights():
    run, tokens = compiled("gemma3"), ids(2, L)
    out = run(tokens, cache=empty("gemma3", 2, 20, True, jnp.bfloat16))
    assert {layer["k"].dtype.name for layer in out.cache.values()} == {"bfloat16"}
    assert out.logits.dtype == jnp.float32
    # Keys and values rounded to 8 bits.
    np.testing.assert_allclose(out.logits, run(tokens).logits, rtol=0, atol=0.1)


def test_logits_do_not_depend_on_the_length_of_the_cache():
    run, tokens = compiled("gemma3"), ids(2, L)
    out = run(tokens, cache=empty("gemma3", 2, 33, True))
    np.testing.assert_allclose(out.logits, run(tokens).logits, **SAME)


@LAYOUTS
def test_a_donated_cache_is_updated_in_place(windowed):
    """Keys and values are aliased to their successors, and a decoding step makes no copy of them."""
    model, variables = tiny("gemma3")
    cache = empty("gemma3", 1, 40, windowed)

    def step(variables, tokens, cache):
        out = model.apply(variables, tokens, cache=cache, return_last_only=True)
        return out.logits, out.cache

    program = jax.jit(step, donate_argnums=2).lower(variables, jnp.ones((1, 1), jnp.int32), cache).compile()
    size = sum(layer[part].nbytes for layer in cache.values() for part in ("k", "v"))
    assert program.memory_analysis().alias_size_in_bytes >= size
    slots = {layer["k"].shape[1] for layer in cache.values()}
    entry = program.as_text()[program.as_text().index("ENTRY") :]
    copies = [line for line in entry.splitlines() if " copy(" in line and any(f"f32[1,{s},1," in line for s in slots)]
    assert not copies, copies


def test_bad_caches_are_named():
    run = compiled("gemma3")
    with pytest.raises(ValueError, match=r"cache\['layer_0'\]: made for 2 rows, but tokens hold 1"):
        run(ids(1, 2), cache=empty("gemma3", 2, 8, True))
    cut = gm.nn.WindowedCache({"layer_0": empty("gemma3", 1, 8, True)["layer_0"]}, cache_length=8)
    with pytest.raises(ValueError, match=r"layer_0 \.\. layer_1; these differ: \['layer_1'\]"):
        run(ids(1, 2), cache=cut)
    with pytest.raises(ValueError, match="cache_length must be at least 1, got 0"):
        empty("gemma3", 1, 0, True)
    with pytest.raises(ValueError, match="Missing `cache_length=` kwarg"):
        tiny("gemma3")[0].config.init_cache(1, cache_length=None)


def test_sharding_of_a_cache():
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    cache = tiny("gemma3")[0].init_cache(batch_size=1, dtype=jnp.float32, cache_length=5, sharding=where, windowed=True)
    assert {leaf.sharding for leaf in jax.tree.leaves(cache)} == {where}
    assert cache["layer_0"]["k"].shape[1] == WINDOW
