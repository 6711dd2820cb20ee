# SPDX-License-Identifier: Apache-2.0
"""What is wrong in the official package and must be right here, one test each. Those of training are not here."""

from __future__ import annotations

import json
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from official_models import Small, call

from gemma import gm, testing
from gemma.errors import ContextFull

# ---- second turns ---------------------------------------------------------------------------------------------------


def likeliest(model, params, tokens, banned=()):
    """[T], the likeliest next token at each place of one pass over `tokens`."""
    padded = np.zeros(64, np.int32)
    padded[: len(tokens)] = tokens
    logits = np.array(call(model, params, jnp.asarray(padded)).logits)[: len(tokens)]
    logits[:, [0, *banned]] = -np.inf
    return logits.argmax(-1)


@pytest.mark.parametrize("count", [1, 3, 9])
def test_second_turn_equals_one_pass(small, sampler, count):
    """The continuation of a state is that of the whole transcript: no position is lost, none attended twice.

    Together the turns are longer than the local layer's window, so each of them is seen through it.
    """
    ends = (1, 2)
    sample, encode = sampler(forbidden_tokens=ends).sample, gm.testing.DummyTokenizer().encode
    first = sample("Hello world", max_new_tokens=count, return_state=True)
    second = sample("My name is !", max_new_tokens=5, last_state=first.state, return_state=True)
    made = [out.tokens.tolist() for out in (first, second)]
    assert [len(tokens) for tokens in made] == [count, 5]
    transcript = [2, *encode("Hello world"), *made[0], *encode("My name is !"), *made[1]]
    best = likeliest(*small, transcript, ends)
    assert best[2 : 2 + count].tolist() == made[0]
    assert best[-6:-1].tolist() == made[1]
    assert first.state.transcripts[0] + encode("My name is !") + made[1] == transcript


def test_no_token_sees_the_future(small):
    """Changing a later token of the second prompt changes nothing before it."""
    model, params = small

    def run(tokens, cache, held):
        places = held + jnp.arange(len(tokens))
        mask = jnp.arange(16)[None, None, :] <= places[None, :, None]
        tokens = jnp.asarray([tokens])
        return call(model, params, tokens, cache=cache, positions=places[None], attention_mask=mask)

    cache = run([2, 7, 6], model.init_cache(batch_size=1, dtype=jnp.float32, cache_length=16), 0).cache
    a, b = run([9, 5, 4], cache, 3).logits, run([9, 5, 11], cache, 3).logits
    np.testing.assert_array_equal(a[:, :2], b[:, :2])
    assert not np.allclose(a[:, 2], b[:, 2])
    whole = call(model, params, jnp.asarray([[2, 7, 6, 9, 5, 4]])).logits
    np.testing.assert_allclose(a, whole[:, 3:], rtol=0, atol=1e-5)


def test_chat_equals_the_transcript(talker):
    """Three turns of a chat, each as if the conversation so far were one prompt."""
    model, params, tokenizer = talker
    settings = dict(model=model, params=params, tokenizer=tokenizer, cache_length=256, max_out_length=16)
    chat = gm.text.ChatSampler(multi_turn=True, **settings)
    once = gm.text.Sampler(**settings)
    transcript = ""
    for prompt in ("hi", "who?", "a longer one"):
        transcript += f"<start_of_turn>user\n{prompt}<end_of_turn>\n<start_of_turn>model\n"
        out = once.sample(transcript, max_new_tokens=6, return_state=True)
        expected = out.text.removesuffix("<end_of_turn>")
        assert chat.chat(prompt, max_new_tokens=6) == expected
        transcript += tokenizer.decode(out.tokens.tolist()).removesuffix("<end_of_turn>") + "<end_of_turn>\n"


# ---- one process, several models ------------------------------------------------------------------------------------


def test_interceptors_do_not_leak(small):
    """What wraps one model is not remembered for the next one: nothing is cached across interceptors."""
    model, params = small
    seen = []

    def counted(next_function, args, kwargs, context):
        seen.append(type(context.module).__name__)
        return next_function(*args, **kwargs)

    def apply():
        return jax.eval_shape(lambda: model.apply({"params": params}, jnp.asarray([[3, 4, 5]])))

    apply()
    assert not seen
    for _ in range(2):  # a second wrapper is asked as well, although the call is the same
        with nn.intercept_methods(counted):
            apply()
        assert "Einsum" in seen
        seen.clear()
    apply()
    assert not seen


def test_other_flax_modules_are_left_alone():
    """`self.param(name, init)` without a shape works in any module, whatever was imported before."""
    before = "import flax.linen as nn; before = nn.Module.param; from gemma.gm import nn as ours; ours.Gemma3_4B();"
    subprocess.run([sys.executable, "-c", f"{before} assert nn.Module.param is before"], check=True)

    class Scale(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x * self.param("scale", lambda key: jnp.ones(()))

    assert Scale().init_with_output(jax.random.key(0), jnp.ones((1,)))[0].shape == (1,)


# ---- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("marks", "images"), [(2, 1), (0, 1), (1, 2)])
def test_images_and_placeholders_are_counted(marks, images):
    """A mismatch is an error that names both counts; neither garbled nor ignored."""
    model = gm.nn.Gemma3_4B()
    start = int(gm.text.Gemma3Tokenizer.special_tokens.START_OF_IMAGE)
    tokens = np.array([[2, *[start] * marks, 7, 8]])
    with pytest.raises(ValueError, match=rf"(?s){marks}.*{images}|{images}.*{marks}"):
        model.apply({"params": {}}, tokens, images=np.zeros((1, images, 8, 8, 3), np.uint8))


# ---- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["ß", "a😀b", "漢字"])
def test_streaming_never_splits_a_character(text):
    """The tokenizer's own streaming decoder, as the samplers use it: no replacement characters, nothing lost."""
    tokenizer = testing.ByteTokenizer()
    stream = tokenizer.stream()
    parts = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join([*parts, stream.flush()]) == text and "\N{REPLACEMENT CHARACTER}" not in "".join(parts)


def test_streamed_equals_returned(talker):
    """In random bytes too the streamed text is the returned one."""
    model, params, tokenizer = talker
    sampler = gm.text.Sampler(model=model, params=params, tokenizer=tokenizer, cache_length=128, max_out_length=16)
    call = dict(prompt="abc", max_new_tokens=16, sampling=gm.text.RandomSampling(temperature=3.0))
    for rng in range(2):
        assert "".join(sampler.sample(stream=True, rng=rng, **call)) == sampler.sample(rng=rng, **call)


def test_a_full_cache_is_an_error(small):
    """Where the official loop ends silently, or overwrites the tail: an error with the counts."""
    model, params = small
    cache = model.init_cache(batch_size=1, dtype=jnp.float32, cache_length=4)
    with pytest.raises(ContextFull, match="4"):
        model.apply({"params": params}, jnp.ones((1, 5), jnp.int32), cache=cache)


def test_batches_equal_single_prompts(small, sampler):
    prompts = ["Hello world !", "My name is Hello there world !"]
    alone = [sampler().sample(prompt, max_new_tokens=8) for prompt in prompts]
    assert sampler().sample(prompts, max_new_tokens=8) == alone


# ---- tools ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression", ["__import__('os').system('true')", "().__class__.__base__", "9**9**9", "open('/etc/passwd')"]
)
def test_the_calculator_evaluates_no_code(expression):
    out = gm.tools.OneShotToolManager(tools=[gm.tools.Calculator()]).maybe_execute_tool(
        json.dumps({"tool_name": "calculator", "expression": expression})
    )
    assert out is None or "root:" not in out.text
    assert gm.tools.Calculator().call(expression="sqrt(16) + 2**3").strip().endswith("12")


def test_the_file_explorer_stays_in_its_root(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "secret.txt").write_text("hidden words")
    (tmp_path / "root/link").symlink_to(tmp_path / "secret.txt")
    manager = gm.tools.OneShotToolManager(tools=[gm.tools.FileExplorer(root=tmp_path / "root")])
    for path in ("../secret.txt", str(tmp_path / "secret.txt"), "link"):
        asked = json.dumps({"tool_name": "fileexplorer", "method": "cat", "path": path})
        out = manager.maybe_execute_tool(asked)
        assert out is not None and "hidden words" not in out.text


def test_json_that_is_no_call():
    """JSON without `tool_name` is text of the model, or a mistake that it is told; never a KeyError."""
    out = gm.tools.OneShotToolManager(tools=[gm.tools.Calculator()]).maybe_execute_tool('{"a": 1}')
    assert out is None or "tool_name" in out.text
    out = gm.tools.OneShotToolManager(tools=[gm.tools.Calculator()]).maybe_execute_tool('{"tool_name": "nothing"}')
    assert "Unknown (or unregistered) tool" in out.text


def test_the_system_prompt_comes_once(talker):
    """With `multi_turn=True` of the sampler, the second turn does not bring it again."""
    model, params, tokenizer = talker
    sampler = gm.text.ToolSampler(
        model=model,
        params=params,
        tokenizer=tokenizer,
        tools=gm.tools.Calculator(),
        multi_turn=True,
        cache_length=2048,
        max_out_length=16,
    )
    sampler.chat("hi", max_new_tokens=2)
    sampler.chat("again", max_new_tokens=2)
    said = [turn.text for turn in sampler.turns if type(turn).__name__ == "UserTurn"]
    assert "calculator" in said[0] and said[1] == "again"


def test_float16_is_refused():
    """Gemma 3 overflows it: an error where the model is made or called, never a text of NaN."""
    with pytest.raises(ValueError, match="float16"):
        model = Small(dtype=jnp.float16)
        jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))
