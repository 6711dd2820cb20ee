# SPDX-License-Identifier: Apache-2.0
"""The parity check of images must be seen to fail: every named defect moves the logits past its tolerance.

As in test_mutations.py: `WEIGHTS` changes parameters as a wrong converter would, `CODE` replaces a function, `PIXELS`
what the tower is given, `CACHE` how a prompt is read in chunks. All are compared with the oracle that the sound model
agrees with. What changes the program runs op by op, so that no compiled trace outlives a defect.
"""

from __future__ import annotations

import functools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_harness import BEGIN, CONFIG, IMAGE_TOKENS, TOLERANCE, gap, nest, pair, pixels, prompt

from gemma.gm.nn import _cache, _images, _modules, _plan, _transformer
from gemma.gm.utils import _attention_mask
from gemma.gm.vision import _preprocess, _token_utils, _vision, _vision_utils, plan_chunks

IDS, PIXELS_2 = prompt(3, 2, 8), pixels(2)
EXPANDED = IMAGE_TOKENS.expand(IDS.tolist(), 2)
PLACES = np.arange(len(IDS)) + np.cumsum(IDS == BEGIN) * (IMAGE_TOKENS.length - 1)


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """Many small programs, each run a few times: compiling them is the cost."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@functools.cache
def expected() -> np.ndarray:
    return pair().expected(IDS, PIXELS_2)


def distance(flat=None, pictures=PIXELS_2, jitted=False) -> float:
    """max |ours - the oracle's| at the tokens of the prompt."""
    its = pair()
    params = its.params if flat is None else jax.tree.map(jnp.asarray, nest(flat))
    tokens, pictures = jnp.asarray(IDS[None], jnp.int32), jnp.asarray(pictures[None])
    if jitted:
        out = its.apply(params, tokens, images=pictures)
    else:
        with jax.disable_jit():
            out = its.model.apply({"params": params}, tokens, images=pictures)
    return gap(np.asarray(out.logits)[0], expected()[PLACES])


def test_the_sound_model_agrees():
    assert distance() < TOLERANCE
    assert distance(flat=pair().flat, jitted=True) < TOLERANCE


# ---- weights --------------------------------------------------------------------------------------------------------


def on(suffix: str, change):
    """A defect that applies `change` to every tensor whose path ends in `suffix`."""

    def defect(flat):
        assert any(path.endswith(suffix) for path in flat), f"nothing ends in {suffix}"
        return {path: change(leaf) if path.endswith(suffix) else leaf for path, leaf in flat.items()}

    return defect


def exchange(one: str, other: str):
    """A defect that exchanges the tensors of two names."""

    def defect(flat):
        partner = {path: path.replace(a, b) for path in flat for a, b in ((one, other), (other, one)) if a in path}
        assert partner, f"nothing is called {one} or {other}"
        return {path: flat[partner.get(path, path)] for path in flat}

    return defect


ATTENTION = "MultiHeadDotProductAttention_0"
WEIGHTS = {
    "patch rows and columns exchanged": on("embedding/kernel", lambda w: w.transpose(1, 0, 2, 3)),
    "colours reversed": on("embedding/kernel", lambda w: w[:, :, ::-1]),
    "no bias of the patches": on("embedding/bias", np.zeros_like),
    "position table shifted by one": on("pos_embedding", lambda w: np.roll(w, 1, axis=1)),
    "position table by columns": on(
        "pos_embedding", lambda w: w.reshape(1, 4, 4, -1).transpose(0, 2, 1, 3).reshape(w.shape)
    ),
    "norms of the tower exchanged": exchange("LayerNorm_0", "LayerNorm_1"),
    "1 + in a LayerNorm": on("LayerNorm_0/scale", lambda w: w + 1),
    "no biases of the LayerNorms": on("LayerNorm_1/bias", np.zeros_like),
    "queries and keys exchanged": exchange("/query/kernel", "/key/kernel"),
    "keys and values exchanged": exchange("/key/", "/value/"),
    "heads permuted": on("value/kernel", lambda w: np.roll(w, 1, axis=1)),
    "heads and head sizes mixed": on("out/kernel", lambda w: w.transpose(1, 0, 2).reshape(w.shape)),
    "no bias of the output": on("out/bias", np.zeros_like),
    "layers of the tower exchanged": exchange("encoderblock_0/", "encoderblock_1/"),
    "the last norm without its bias": on("encoder_norm/bias", np.zeros_like),
    "the 1 + is dropped in the soft-token norm": on("mm_soft_embedding_norm/scale", lambda w: w - 1),
    "rows of the projection shifted": on("mm_input_projection/w", lambda w: np.roll(w, 1, axis=0)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weight_defect(name):
    flat = pair().flat
    changed = WEIGHTS[name](flat)
    assert any(not np.array_equal(changed[path], flat[path]) for path in flat), "the defect changed nothing"
    assert distance(flat=changed, jitted=True) > TOLERANCE


# ---- pixels ---------------------------------------------------------------------------------------------------------

PIXELS = {
    "images in reverse order": lambda x: x[::-1],
    "rows and columns exchanged": lambda x: x.swapaxes(1, 2),
    "upside down": lambda x: x[:, ::-1],
    "colours reversed": lambda x: x[..., ::-1],
    "0..1 instead of -1..1": lambda x: (x + 1) / 2,
    "8 bits": lambda x: np.rint((x + 1) * 127.5) / 127.5 - 1,
}


@pytest.mark.parametrize("name", PIXELS)
def test_pixel_defect(name):
    assert distance(pictures=np.ascontiguousarray(PIXELS[name](PIXELS_2), np.float32), jitted=True) > TOLERANCE


# ---- code -----------------------------------------------------------------------------------------------------------


def replace(owner, name: str, make):
    """A defect that replaces what `owner` calls `name` by `make(original)`."""
    return lambda monkeypatch: monkeypatch.setattr(owner, name, make(getattr(owner, name)))


def pooled(order: str):
    """Another way to make Q vectors of the patches."""

    def make(_):
        def pool(self, x):
            B, P, E = x.shape
            Q = self.output_length
            if order == "runs of patches":
                return x.reshape(B, Q, P // Q, E).mean(2)
            grid = x.reshape(B, 2, 2, 2, 2, E)
            if order == "maximum":
                return grid.max((2, 4)).reshape(B, Q, E)
            if order == "columns first":
                return grid.mean((2, 4)).transpose(0, 2, 1, 3).reshape(B, Q, E)
            return grid[:, :, 0, :, 0].reshape(B, Q, E)  # one patch of each square

        return pool

    return make


def whole_block(groups):
    """Also the tokens around an image's soft tokens see each other both ways."""

    def defect(tokens, images):
        found = groups(tokens, images)
        wide = found
        for shift in (-1, -2, 1, 2):
            wide = jnp.maximum(wide, jnp.roll(found, shift, axis=1))
        return wide

    return defect


def erf_gelu(monkeypatch):
    """In the tower only: its module calls flax's gelu under this name."""
    exact = functools.partial(jax.nn.gelu, approximate=False)

    class Linen:
        def __getattr__(self, name):
            return (lambda x, approximate=True: exact(x)) if name == "gelu" else getattr(flax.linen, name)

    monkeypatch.setattr(_vision_utils, "nn", Linen())


def unscaled(attend):
    return lambda q, k, v: attend(q * q.shape[-1] ** 0.5, k, v)


def misplaced(merge):
    return lambda x, tokens, soft: merge(x, jnp.roll(tokens, 1, axis=1), soft)


POOL = functools.partial(replace, _vision.VisionExit, "__call__")
ROOT = CONFIG.hidden_size**0.5
CODE = {
    "images are causal": replace(_images, "groups", lambda f: lambda tokens, images: None),
    "images see each other": replace(_images, "groups", lambda f: lambda t, i: (f(t, i) > 0).astype(jnp.int32)),
    "the frame of an image is bidirectional": replace(_images, "groups", whole_block),
    "everything is bidirectional": replace(_images, "groups", lambda f: lambda t, i: jnp.ones_like(t)),
    "pooling by runs of patches": POOL(pooled("runs of patches")),
    "maximum pooling": POOL(pooled("maximum")),
    "pooled columns first": POOL(pooled("columns first")),
    "one patch of four": POOL(pooled("first")),
    "no soft-token norm": replace(
        _modules.Embedder, "encode_vision", lambda f: lambda self, x: self.mm_input_projection("...QE,ED->...QD", x)
    ),
    "image vectors scaled like text": replace(
        _modules.Embedder, "encode_vision", lambda f: lambda self, x: f(self, x) * ROOT
    ),
    "image vectors divided by sqrt(D)": replace(
        _modules.Embedder, "encode_vision", lambda f: lambda self, x: f(self, x) / ROOT
    ),
    "erf GELU in the tower": erf_gelu,
    "no scale in the tower's attention": replace(_vision_utils, "attend", unscaled),
    "image vectors one token late": replace(_images, "merge", misplaced),
    "image vectors not merged": replace(_images, "merge", lambda f: lambda x, tokens, soft: x),
    "images take no positions": replace(
        _transformer,
        "_positions",
        lambda f: lambda valid, cache: f(valid & (jnp.asarray(EXPANDED)[None] >= 0), cache),
    ),
    "patches cut by columns": replace(
        _preprocess,
        "patchify_images",
        lambda f: lambda images, **k: f(images, **k).reshape(-1, 4, 4, 588).swapaxes(1, 2).reshape(-1, 16, 588),
    ),
    "another newline": replace(_token_utils, "DOUBLE_NEW_LINE", lambda f: 107),
    "no newlines": replace(
        _token_utils,
        "image_sequence",
        lambda f: lambda count, start, end: [0, start, *[-2] * count, end, 0],
    ),
    "logits before the image": replace(
        _token_utils,
        "remove_mm_logits",
        lambda f: lambda *, logits, tokens, **k: logits[:, : tokens.shape[1]],
    ),
}


@pytest.mark.parametrize("name", CODE)
def test_code_defect(name, monkeypatch):
    expected()  # before anything is replaced
    CODE[name](monkeypatch)
    assert distance() > TOLERANCE


# ---- the cache ------------------------------------------------------------------------------------------------------

LIMIT = 24  # both images in one chunk, which is four windows long


@functools.cache
def soft_tokens():
    return pair().encode(pair().params, jnp.asarray(PIXELS_2))


def chunked_distance(layout: str, parts=None) -> float:
    """max |ours - the oracle's| of the expanded prompt, read in padded chunks.

    Layouts: `full`; `ring`, whose global layer is longer than the prompt; in both, padding stands inside.
    """
    its, got, used = pair(), [], 0
    cache = its.model.init_cache(batch_size=1, dtype=jnp.float32, cache_length=64, windowed=layout == "ring")
    for part in parts or plan_chunks(EXPANDED, limit=LIMIT):
        chunk = EXPANDED[part]
        images = len(IMAGE_TOKENS.spans(chunk))
        soft = jnp.roll(soft_tokens(), -used, axis=0)[None]  # those that the chunk has no place for are not used
        chunk = jnp.asarray([[0, *chunk, *[0] * (LIMIT - len(chunk))]], jnp.int32)
        # Traced anew each time; a jit keeps what is known about the tokens, and so their check, out of the program.
        run = jax.jit(lambda params, *a: its.model.apply({"params": params}, a[0], soft_tokens=a[1], cache=a[2]))
        out = run(its.params, chunk, soft, cache)
        cache, used = out.cache, used + images
        got.append(np.asarray(out.logits)[0, 1 : 1 + part.stop - part.start])
    return gap(np.concatenate(got), expected())


CACHE = {
    "groups of a ring's chunk dropped": ("ring", replace(_plan, "_key_groups", lambda f: lambda g, w: 0 * f(g, w))),
    "groups of a ring's chunk shifted": (
        "ring",
        replace(_plan, "_key_groups", lambda f: lambda g, w: jnp.roll(f(g, w), 1, axis=1)),
    ),
    "groups of the full layout dropped": (
        "full",
        replace(_plan, "_block_mask", lambda f: lambda start, stored, length, groups: f(start, stored, length, None)),
    ),
    "padding of the full layout forgotten": (
        "full",
        replace(
            _cache, "plan_block_write", lambda f: lambda cache, positions, valid: f(cache, positions, valid | True)
        ),
    ),
    "positions of the full layout counted in slots": (
        "full",
        replace(_cache, "next_position", lambda f: lambda cache: cache["layer_0"]["end_index"]),
    ),
    "images of a chunk are one": (
        "ring",
        replace(_attention_mask, "run_numbers", lambda f: lambda marked: marked.astype(jnp.int32)),
    ),
}


@pytest.mark.parametrize("layout", ["ring", "full"])
def test_sound_chunks_agree(layout):
    assert chunked_distance(layout) < TOLERANCE


@pytest.mark.parametrize("name", CACHE)
def test_cache_defect(name, monkeypatch):
    expected(), soft_tokens()
    layout, apply = CACHE[name]
    apply(monkeypatch)
    assert chunked_distance(layout) > TOLERANCE


def test_a_chunk_that_cuts_an_image_is_wrong():
    """Why `plan_chunks` exists: grouping ends with the chunk, so the first half of an image misses the second."""
    first, last = IMAGE_TOKENS.spans(EXPANDED)[0]
    cut = [slice(0, first + 2), slice(first + 2, len(EXPANDED))]
    assert last > first + 2
    assert chunked_distance("ring", [slice(0, last), slice(last, len(EXPANDED))]) < TOLERANCE
    assert chunked_distance("ring", cut) > TOLERANCE
