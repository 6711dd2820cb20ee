# SPDX-License-Identifier: Apache-2.0
"""Pictures in prompts, batches and later turns: sampling equals whole forward passes of the network with all of them."""

from __future__ import annotations

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gemma import chat, testing
from gemma.config import SiglipVisionConfig
from gemma.errors import ContextFull, PromptError
from gemma.gm import nn, text, vision
from gemma.serving._runner_jax import JaxRunner
from gemma.serving.runner import StepIn

TOKENIZER = testing.ByteTokenizer()
MARKER, SIDE = 7, 8  # <start_of_image> of the tokenizer of bytes; pixels
ENDS = (1, 6)


@pytest.fixture(scope="module")
def model():
    tower = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=SIDE, patch_size=2
    )
    config = testing.tiny_config(
        "gemma3",
        num_hidden_layers=2,
        layer_pattern="LG",
        vision=tower,
        mm_tokens_per_image=4,
        boi_token_index=MARKER,
        eoi_token_index=8,
        image_token_index=9,
    )
    return nn.Transformer.from_config(config, dtype=jnp.float32)


@pytest.fixture(scope="module")
def params(model):
    tokens = jnp.ones((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(0)
    random = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), leaf.dtype), shapes)
    random["embedder"]["input_embedding"] *= 0.1  # a tied head would otherwise repeat the last token
    return random


@pytest.fixture(scope="module")
def sampler(model, params):
    return text.Sampler(
        model=model, params=params, tokenizer=TOKENIZER, cache_length=128, pad_length=(16, 32), max_out_length=8
    )


@pytest.fixture(scope="module")
def naive(model, params):
    """Greedy continuation by whole forward passes over ids with markers and all their pictures at once."""

    @jax.jit
    def forward(tokens, images):
        return model.apply({"params": params}, tokens, images=images).logits

    def run(ids: list[int], images, count: int) -> list[int]:
        made: list[int] = []
        while len(made) < count and not (made and made[-1] in ENDS):
            tokens = np.zeros((1, 96), np.int32)
            tokens[0, : len(ids) + len(made)] = [*ids, *made]
            pictures = np.zeros((1, 3, SIDE, SIDE, 3), np.uint8)
            for i, image in enumerate(images):
                pictures[0, i] = image
            logits = np.array(forward(tokens, pictures)[0, len(ids) + len(made) - 1])
            logits[[0, 7, 8]] = -np.inf
            logits[TOKENIZER.vocab_size :] = -np.inf
            made.append(int(logits.argmax()))
        return made

    return run


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


A, B, C = (picture(seed) for seed in range(3))


def ids_of(spelled: str) -> list[int]:
    return TOKENIZER.encode(spelled, add_bos=True)


def made(out, b: int | None = None) -> list[int]:
    return [int(i) for i in (out.tokens if b is None else out.tokens[b]) if i]


def test_one_two_and_three_pictures(sampler, naive):
    for spelled, images in (("a <start_of_image> b", [A]), ("<start_of_image>x<start_of_image>", [A, B])):
        out = sampler.sample(spelled, images=images, max_new_tokens=4, return_state=True)
        assert made(out) == naive(ids_of(spelled), images, 4)
        assert out.state.transcripts == [ids_of(spelled) + made(out)]
        assert len(set(made(out))) > 1
        other = sampler.sample(spelled, images=[C] * len(images), max_new_tokens=4, return_state=True)
        assert not np.allclose(out.logprobs, other.logprobs, atol=1e-3)
    # More ids than one chunk holds: no chunk cuts a picture.
    spelled = "a long text before <start_of_image>, <start_of_image> and <start_of_image> behind it"
    out = sampler.sample(spelled, images=[A, B, C], max_new_tokens=4, return_state=True)
    assert made(out) == naive(ids_of(spelled), [A, B, C], 4)


def test_a_batch_equals_each_alone(sampler, naive):
    prompts = ["no picture", "one <start_of_image>", "<start_of_image> and <start_of_image> are two"]
    images = [None, [A], [B, C]]
    out = sampler.sample(prompts, images=images, max_new_tokens=4, return_state=True)
    for b, (prompt, pictures) in enumerate(zip(prompts, images)):
        assert made(out, b) == naive(ids_of(prompt), pictures or [], 4)
    pieces = list(sampler.sample(prompts, images=images, max_new_tokens=4, stream=True))
    assert ["".join(row) for row in zip(*pieces)] == out.text


def test_a_picture_in_a_later_turn(model, params, naive):
    chatbot = text.ChatSampler(
        model=model, params=params, tokenizer=TOKENIZER, multi_turn=True, cache_length=128, max_out_length=8
    )
    transcript, held = [], []
    for said, images in (("hi <start_of_image>", A), ("more", None), ("<start_of_image><start_of_image>?", [B, C])):
        count = said.count("<start_of_image>")
        turn = chat.encode_chat(TOKENIZER, [chat.Turn("user", said)], images=count).ids
        if transcript:
            closing = [] if transcript[-1] == 6 else [6]
            turn = [*closing, *TOKENIZER.encode("\n"), *turn[1:]]
        held += [] if images is None else images if isinstance(images, list) else [images]
        chatbot.chat(said, images=images, max_new_tokens=2)
        transcript += turn
        transcript += naive(transcript, held, 2)
        assert chatbot.last_state.transcripts == [transcript]
    assert len(held) == 3


def test_sliding_drops_pictures_with_their_turns(model, params, naive):
    chatbot = text.ChatSampler(
        model=model, params=params, tokenizer=TOKENIZER, multi_turn=True, cache_length=128, max_out_length=2,
        context_policy="slide",
    )  # fmt: skip
    images = [A, B, C, A, B]
    for image in images:
        chatbot.chat("<start_of_image> seen?", images=image)
    state = chatbot.last_state
    assert state.dropped.any()
    [ids] = state.transcripts
    left = ids.count(MARKER)
    assert 0 < left < len(images)
    assert ids[-2:] == naive(ids[:-2], images[-left:], 2)


def test_kinds_of_picture(sampler):
    spelled = "what <start_of_image> is"
    expected = sampler.sample(spelled, images=A, max_new_tokens=4)
    stream = io.BytesIO()
    Image.fromarray(A).save(stream, "PNG")
    prepared = vision.load_image(A, size=SIDE)
    for images in ([A], A[None], jnp.asarray(A), Image.fromarray(A), stream.getvalue(), [stream.getvalue()], prepared):
        assert sampler.sample(spelled, images=images, max_new_tokens=4) == expected
    larger = np.repeat(np.repeat(A, 2, axis=0), 2, axis=1)
    sampler.sample(spelled, images=larger, max_new_tokens=2)
    both = sampler.sample([spelled, spelled], images=np.stack([A, A]), max_new_tokens=4)
    assert both == [expected] * 2 == sampler.sample([spelled] * 2, images=np.stack([A, A])[:, None], max_new_tokens=4)
    assert sampler.sample([spelled] * 2, images=[A, [A]], max_new_tokens=4) == both


@pytest.mark.parametrize(
    ("prompt", "images", "says"),
    [
        ("none", [A], "0 <start_of_image> and comes with 1 images"),
        ("<start_of_image>", None, "1 <start_of_image> and comes with 0 images"),
        ("<start_of_image>" * 2, [A], "2 <start_of_image> and comes with 1 images"),
        ("<start_of_image>", [A, B], "1 <start_of_image> and comes with 2 images"),
        (["x", "<start_of_image>"], [A], "one entry per prompt, 2 in all"),
        (["x", "<start_of_image>"], [A, None], "prompt 0 has 0"),
        ("<start_of_image>", [b"no picture"], r"images\[0\]: not a readable picture"),
        (["<start_of_image>"], [["/no/such/file.png"]], r"images\[0\]\[0\]"),
    ],
)
def test_pictures_and_markers_are_counted(sampler, prompt, images, says):
    with pytest.raises(PromptError, match=says):
        sampler.sample(prompt, images=images, max_new_tokens=2)


def test_turns_count_their_markers(sampler, model, params):
    chatbot = text.ChatSampler(model=model, params=params, tokenizer=TOKENIZER, cache_length=64, max_out_length=4)
    with pytest.raises(PromptError, match="1 images came, but the user turns hold 0 image markers"):
        chatbot.chat("look", images=[A])
    chatbot.chat("<start_of_image> is text here", max_new_tokens=1)
    assert MARKER not in chatbot.last_state.transcripts[0]


def test_a_turn_that_fails_changes_nothing(model, params):
    chatbot = text.ChatSampler(
        model=model, params=params, tokenizer=TOKENIZER, multi_turn=True, cache_length=128, max_out_length=8
    )
    chatbot.chat("hi <start_of_image>", images=A, max_new_tokens=2)
    turns, transcripts = list(chatbot.turns), chatbot.last_state.transcripts
    with pytest.raises(PromptError, match=r"images\[0\]: not a readable picture"):
        chatbot.chat("<start_of_image>", images=[b"no picture"])
    with pytest.raises(ContextFull) as caught:  # the text alone would have room
        chatbot.chat("<start_of_image>" * 30, images=[A] * 30)
    assert caught.value.used > caught.value.limit == model.config.gemma.max_position_embeddings > 30
    assert (chatbot.turns, chatbot.last_state.transcripts) == (turns, transcripts)


def test_a_picture_is_encoded_once(sampler, monkeypatch):
    from gemma.gm.text import _loop

    calls, original = [], _loop.encode
    monkeypatch.setattr(_loop, "encode", lambda *args: calls.append(1) or original(*args))
    state = sampler.sample("<start_of_image>", images=A, max_new_tokens=2, return_state=True).state
    sampler.sample("x", last_state=state, max_new_tokens=2)
    sampler.sample(["<start_of_image>"] * 2, images=[A, B], max_new_tokens=2, num_samples=2)
    assert len(calls) == 3


def test_the_runner_takes_pictures(model, params, naive):
    runner = JaxRunner(model, params, slots=2, max_len=64, buckets=(16, 32))
    tokens = vision.ImageTokens.of(model.config)
    spelled = ids_of("a <start_of_image> b <start_of_image>")
    ids, expected = tokens.expand(spelled, 2), naive(spelled, [A, B], 3)
    pixels = vision.load_images([A, B], size=SIDE)
    runner.prefill(1, ids, 0, images=pixels)
    token, got = int(np.where(np.isin(np.arange(320), [0, 7, 8]), -np.inf, runner.logits(1)).argmax()), []
    for _ in range(3):
        got.append(token)
        [out] = runner.step([StepIn(1, token)])
        token = out.token
    assert got == expected
    runner.copy_prefix(1, 0, len(ids))
    whole = runner.logits(0)
    runner.free(0)
    first = ids.index(-2) + tokens.soft + 3
    runner.prefill(0, ids[:first], 0, images=pixels[:1])
    runner.prefill(0, ids[first:], first, images=pixels[1:])
    np.testing.assert_allclose(runner.logits(0), whole, atol=2e-5)
    with pytest.raises(PromptError, match="1 images are 4 soft tokens"):
        runner.prefill(0, [5, 6], len(ids), images=pixels[:1])
