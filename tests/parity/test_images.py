# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 with images: our JAX logits against a tiny random Hugging Face model of the same weights, in float32.

The window is 6 tokens and an image 4 (8 with what surrounds it), so every prompt below runs past the window. Every way
to run a prompt (alone, padded, in a batch, cached, in chunks, over two turns) must give what the oracle gives for the
whole prompt alone.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import torch
from hf_tiny_oracles import make
from image_harness import BEGIN, CONFIG, IMAGE_TOKENS, TOLERANCE, Q, gap, pair, pixels, prompt
from parity_harness import nest
from test_hf import from_table

from gemma import gm, weights
from gemma.gm.utils import _types
from gemma.gm.vision import _vision_utils, plan_chunks
from gemma.hf_config import read_config

PARTS = {1: (5, 9), 2: (3, 2, 8), 3: (4, 1, 6, 12)}  # lengths of the text around 1, 2 and 3 images
MORE = IMAGE_TOKENS.length - 1


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """Tiny programs, each run a few times: compiling them is the cost, so XLA optimizes little."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


supports = pytest.mark.supports("Gemma 3 vision", "JAX", "run")


def rows_of(ids) -> np.ndarray:
    """Where the tokens of a prompt stand after the expansion; a marker: its last token."""
    markers = np.asarray(ids) == BEGIN
    return np.arange(len(ids)) + np.cumsum(markers) * MORE


def test_config_and_weights():
    its = pair()
    ours = read_config(its.hf.config.to_dict())
    assert ours.layers == CONFIG.layers
    assert ours.vision == CONFIG.vision
    assert (ours.mm_tokens_per_image, ours.boi_token_index, ours.eoi_token_index) == (Q, BEGIN, BEGIN + 1)
    table = from_table(its.state, CONFIG)
    assert set(table) == set(its.flat)
    for path, expected in its.flat.items():
        assert np.array_equal(table[path], expected), path
    shapes = jax.eval_shape(its.model.init, jax.random.key(0), jnp.ones((1, 3), jnp.int32))["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(lambda leaf: leaf.shape, its.params)


def test_a_saved_hugging_face_folder_loads(tmp_path):
    its = pair()
    its.hf.save_pretrained(tmp_path)
    loaded = gm.ckpts.load_params(tmp_path)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), loaded, its.params))


def test_the_tower():
    its, pictures = pair(), pixels(3)
    with torch.no_grad():
        tensor = torch.tensor(pictures.transpose(0, 3, 1, 2))
        tower = its.hf.model.vision_tower(pixel_values=tensor).last_hidden_state.numpy()
        soft = its.hf.model.multi_modal_projector(torch.tensor(tower)).numpy()
    vit = its.model.config.vision_encoder.siglip_encoder
    ours = vit.apply({"params": its.params["vision_encoder"]["siglip_encoder"]}, jnp.asarray(pictures))
    assert gap(np.asarray(ours), tower) < TOLERANCE
    assert np.abs(soft).max() > 0.1
    assert gap(np.asarray(its.encode(its.params, pictures)), soft) < TOLERANCE


@pytest.mark.parametrize("count", [pytest.param(n, marks=supports) for n in (1, 2, 3)])
def test_logits(count):
    """As `images` (at the tokens of the prompt); three also as `soft_tokens` (at every token of the expanded prompt)."""
    its, ids, pictures = pair(), prompt(*PARTS[count], seed=count), pixels(count)
    expected = its.expected(ids, pictures)
    out = its.apply(its.params, jnp.asarray(ids[None], jnp.int32), images=jnp.asarray(pictures[None]))
    assert out.logits.shape == (1, len(ids), CONFIG.vocab_size)
    assert gap(np.asarray(out.logits)[0], expected[rows_of(ids)]) < TOLERANCE
    if count == 3:
        soft = its.encode(its.params, jnp.asarray(pictures))
        expanded = jnp.asarray([IMAGE_TOKENS.expand(ids.tolist(), count)], jnp.int32)
        out = its.apply(its.params, expanded, soft_tokens=soft[None])
        assert gap(np.asarray(out.logits)[0], expected) < TOLERANCE


def test_the_picture_and_its_order_matter():
    its, ids, pictures = pair(), prompt(*PARTS[2]), pixels(2)
    there, back = (
        np.asarray(its.apply(its.params, jnp.asarray(ids[None], jnp.int32), images=jnp.asarray(p[None])).logits)
        for p in (pictures, pictures[::-1])
    )
    assert np.abs(there[0, :3] - back[0, :3]).max() == 0  # before the first image nothing knows of it
    assert np.abs(there[0, -1] - back[0, -1]).max() > 100 * TOLERANCE


# Rows with 0 to 3 images and of different lengths, padded with zeros on either side, and black pictures.
ROWS = [(7, 6), (16,), (3, 1, 5, 8), (4, 10), (2, 2, 9), (12,), (5, 5, 3), (6, 2)]


def batch(rows, left: bool):
    """(tokens [B, T], pictures [B, I, ...], [(ids, pictures) of each row])."""
    alone = [(prompt(*row, seed=i), pixels(len(row) - 1, seed=i)) for i, row in enumerate(rows)]
    length, most = max(len(ids) for ids, _ in alone), max(len(p) for _, p in alone)
    tokens = np.zeros((len(rows), length), np.int32)
    pictures = np.zeros((len(rows), most, 56, 56, 3), np.float32)
    for i, (ids, its) in enumerate(alone):
        tokens[i, slice(length - len(ids), None) if left else slice(len(ids))] = ids
        pictures[i, : len(its)] = its
    return tokens, pictures, alone


@supports
@pytest.mark.parametrize(("size", "left"), [(2, True), (8, False), (8, True)], ids=["2-left", "8-right", "8-left"])
def test_a_batch_of_rows_with_different_numbers_of_images(size, left):
    its = pair()
    tokens, pictures, alone = batch(ROWS[-size:] if size == 2 else ROWS, left)
    out = its.apply(its.params, jnp.asarray(tokens), images=jnp.asarray(pictures))
    for row, given, (ids, own) in zip(np.asarray(out.logits), tokens, alone):
        assert gap(row[given != 0], its.expected(ids, own)[rows_of(ids)]) < TOLERANCE
    if size == 8 and left:
        last = its.apply(its.params, jnp.asarray(tokens), images=jnp.asarray(pictures), last=True)
        for end, (ids, own) in zip(np.asarray(last.logits), alone):
            assert gap(end, its.expected(ids, own)[-1]) < TOLERANCE


LAYOUTS = pytest.mark.parametrize("windowed", [False, True], ids=["full", "ring"])


def empty(rows: int, windowed: bool, length: int = 64):
    return pair().model.init_cache(batch_size=rows, dtype=jnp.float32, cache_length=length, windowed=windowed)


@supports
@LAYOUTS
def test_chunks(windowed):
    """Two images, in chunks of at most 8 tokens that cut none, then token by token: every step equals one pass.

    Chunks are padded to 8; the full layout stores the padding and hides it.
    """
    its, ids, pictures = pair(), prompt(3, 2, 8), pixels(2)
    expected = its.expected(ids, pictures)
    expanded, soft = IMAGE_TOKENS.expand(ids.tolist(), 2), its.encode(its.params, jnp.asarray(pictures))
    parts, cache, got, used = plan_chunks(expanded[:-3], limit=8), empty(1, windowed), [], 0
    assert len(parts) > 3
    for part in [*parts, *(slice(n, n + 1) for n in range(len(expanded) - 3, len(expanded)))]:
        chunk = expanded[part]
        images = len(IMAGE_TOKENS.spans(chunk))
        more = dict(soft_tokens=soft[None, used : used + images]) if images else {}
        chunk = jnp.asarray([chunk + [0] * (8 - len(chunk) if len(chunk) > 1 else 0)], jnp.int32)
        out = its.apply(its.params, chunk, cache=cache, **more)
        cache, used = out.cache, used + images
        got.append(np.asarray(out.logits)[0, : part.stop - part.start])
    assert used == 2
    assert gap(np.concatenate(got), expected) < TOLERANCE


@supports
@LAYOUTS
def test_images_of_a_later_turn(windowed):
    """Turn 1 with one image, turn 2 with another (in one row only), then a token each: equal to one pass.

    Rows differ in padding and images, which the full layout has to remember, too. There the images of turn 2 come as
    `soft_tokens`, as samplers give them.
    """
    its = pair()
    first, pictures, alone = batch([(4, 5), (8,)], left=True)
    tokens2, pictures2, alone2 = batch([(3,), (2, 6)], left=False)
    whole = [(np.concatenate([a, b, [17]]), np.concatenate([p, p2])) for (a, p), (b, p2) in zip(alone, alone2)]
    one = its.apply(its.params, jnp.asarray(first), images=jnp.asarray(pictures), cache=empty(2, windowed))
    if windowed:
        two = its.apply(its.params, jnp.asarray(tokens2), images=jnp.asarray(pictures2), cache=one.cache)
    else:
        expanded = [IMAGE_TOKENS.expand(ids.tolist(), len(p)) for ids, p in alone2]
        padded = np.zeros((2, max(map(len, expanded))), np.int32)
        for row, ids in zip(padded, expanded):
            row[: len(ids)] = ids
        soft = its.encode(its.params, pictures2[1])
        soft = jnp.stack([jnp.zeros_like(soft), soft])
        assert soft.shape == (2, 1, Q, CONFIG.hidden_size)
        two = its.apply(its.params, jnp.asarray(padded), soft_tokens=soft, cache=one.cache)
        logits = np.stack([np.asarray(two.logits)[i, (rows_of(t) if t.any() else t)] for i, t in enumerate(tokens2)])
        two = two.replace(logits=logits)
    end = its.apply(its.params, jnp.asarray([[17], [17]], jnp.int32), cache=two.cache)
    for i, (ids, own) in enumerate(whole):
        expected = its.expected(ids, own)[rows_of(ids)]
        parts = [np.asarray(o.logits)[i][t[i] != 0] for o, t in ((one, first), (two, tokens2))]
        got = np.concatenate([*parts, np.asarray(end.logits)[i]])
        assert gap(got, expected) < TOLERANCE


def test_any_batch_dimensions_and_hidden_states():
    its = pair()
    tokens, pictures, alone = batch(ROWS, left=False)
    out = its.apply(
        its.params,
        jnp.asarray(tokens.reshape(2, 4, -1)),
        images=jnp.asarray(pictures.reshape(2, 4, *pictures.shape[1:])),
        hidden=True,
    )
    assert out.hidden_states.shape == (2, 4, tokens.shape[1], CONFIG.hidden_size)
    expected = its.expected(*alone[6])[rows_of(alone[6][0])]
    assert gap(np.asarray(out.logits)[1, 2, : len(expected)], expected) < TOLERANCE
    ids, own = alone[0]
    one = its.apply(its.params, jnp.asarray(ids, jnp.int32), images=jnp.asarray(own[0]))  # [T] and [H, W, C]
    assert gap(np.asarray(one.logits), its.expected(ids, own)[rows_of(ids)]) < TOLERANCE


def test_explicit_positions_and_mask():
    """What `gm.utils` derives for the official samplers says the same as what the model derives itself."""
    its = pair()
    tokens, pictures, alone = batch(ROWS[:3], left=False)
    given = _types.Input(text=jnp.asarray(tokens), images=jnp.asarray(pictures), config=its.model.config.input_config)
    derived = given.attention_mask
    causal = jnp.tril(jnp.ones(derived.shape, bool)) & derived
    for mask, agree in ((derived, True), (causal, False)):
        out = its.apply(
            its.params, jnp.asarray(tokens), images=given.images, positions=given.positions, attention_mask=mask
        )
        for row, (ids, own) in zip(np.asarray(out.logits), alone):
            off = gap(row[: len(ids)], its.expected(ids, own)[rows_of(ids)])
            assert off < TOLERANCE if agree or not len(own) else off > 100 * TOLERANCE


def test_text_only():
    """Without its tower the model is the text model of the same weights."""
    its, ids = pair(), prompt(17)
    from gemma.config import text_only

    model = gm.nn.Transformer.from_config(text_only(CONFIG), dtype=jnp.float32)
    params = {name: tree for name, tree in its.params.items() if name != "vision_encoder"}
    params["embedder"] = {"input_embedding": params["embedder"]["input_embedding"]}
    ours = jax.jit(model.apply)({"params": params}, jnp.asarray(ids[None], jnp.int32))
    assert gap(np.asarray(ours.logits)[0], its.expected(ids)) < TOLERANCE
    assert dataclasses.replace(its.model.config, vision_encoder=None).gemma == text_only(CONFIG)


def test_training_does_not_reach_the_tower():
    its, ids, pictures = pair(), prompt(3, 4), pixels(1)

    @jax.jit
    def grads(params):
        def loss(params):
            return its.model.apply(
                {"params": params}, jnp.asarray(ids[None], jnp.int32), images=pictures[None]
            ).logits.std()

        return jax.grad(loss)(params)

    found = grads(its.params)
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(found["vision_encoder"]))
    for name in ("mm_soft_embedding_norm", "mm_input_projection"):
        assert all(np.abs(np.asarray(leaf)).max() > 0 for leaf in jax.tree.leaves(found["embedder"][name]))


@pytest.mark.parametrize("head", [False, True])
def test_a_tower_of_its_own(head):
    """Stand-alone SigLIP, through the weight table; with its pooling head, too."""
    hf, _ = make("siglip", vision_use_head=head)
    state = {name: tensor.numpy() for name, tensor in hf.state_dict().items()}
    config = read_config(hf.config.to_dict())
    tower = _vision_utils.ViTModel.of(config)
    params = jax.tree.map(jnp.asarray, nest(from_table_sliced(state, config)))
    with torch.no_grad():
        theirs = hf(pixel_values=torch.tensor(pixels(2).transpose(0, 3, 1, 2)))
    expected = theirs.pooler_output if head else theirs.last_hidden_state
    ours = jax.jit(tower.apply)({"params": params}, jnp.asarray(pixels(2)))
    assert gap(np.asarray(ours), expected.numpy()) < TOLERANCE


def from_table_sliced(state, config):
    """As `from_table`, for tensors that Hugging Face fuses along their first axis."""
    tree = {}
    for tensor in weights.tensors(config):
        hf, flax = tensor.slots["hf"], tensor.slots["flax"]
        part = state[hf.name] if hf.rows is None else state[hf.name][slice(*hf.rows)]
        tree[flax.name] = weights.convert(part, hf.axes, flax.axes, tensor.dims)
    return tree


def test_the_plain_way_to_pixels_is_hugging_faces():
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    y, x = np.mgrid[:61, :90]
    picture = np.stack([x * 2, y * 4, (x * y) // 9 % 256], -1).astype(np.uint8)
    processor = Gemma3ImageProcessorPil(size=dict(height=56, width=56))
    theirs = processor(PIL.Image.fromarray(picture), return_tensors="np")["pixel_values"][0]
    assert gap(gm.vision.load_image(picture, size=56).transpose(2, 0, 1), theirs) < 1e-6
