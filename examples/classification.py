# SPDX-License-Identifier: Apache-2.0
"""Classification with the words of the model itself: no new layer, each class is one token that means what it says.

    python examples/classification.py               a tiny random model: everything runs in seconds
    python examples/classification.py --model demo  the real Gemma 3 270M

`seq2seq.py` shows the trainer; here only what differs. As one command, with a table of texts and labels:
`gemma finetune reviews.csv --method classify`, and `gemma eval demo --data test.csv --adapter ...` for its accuracy.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp

from gemma import gm, peft

GOOD = ("I loved it", "A great film", "Very good", "What a joy", "Wonderful cast", "So much fun")
BAD = ("I hated it", "A dull film", "Very bad", "What a bore", "Terrible cast", "So much noise")


def texts(start: int, stop: int) -> gm.data.Examples:
    rows = [gm.data.Labelled(text, "positive") for text in GOOD[start:stop]]
    return gm.data.Examples.of(rows + [gm.data.Labelled(text, "negative") for text in BAD[start:stop]])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a path or name; left out: a tiny random model")
    parser.add_argument("--steps", type=int, default=30)
    asked = parser.parse_args(arguments)
    loaded = gm.text.load_model(asked.model) if asked.model else gm.testing.tiny_model()
    # The text of one token for each label. The tiny model knows letters only.
    labels = {"negative": "N", "positive": "P"} if not asked.model else ["negative", "positive"]
    shared = dict(labels=labels, max_length=64)
    loader = gm.data.Loader(texts(0, 4), loaded.tokenizer, batch_size=8, **shared)
    held_out = gm.data.Loader(texts(4, 6), loaded.tokenizer, batch_size=8, epochs=1, buckets=loader.buckets, **shared)
    print("labels and their tokens:", loader.labels)

    model = gm.nn.LoRA(rank=8, alpha=16, model=loaded.model, targets=("attention", "mlp"), dtype=jnp.float32)
    tokens = jnp.ones((1, 2), jnp.int32)
    fresh = jax.jit(lambda key: peft.split_params(model.init(key, tokens)["params"]).lora)(jax.random.key(0))
    objective = gm.train.Classification(model, loader.label_ids, among_labels=True)
    trainer = gm.train.Trainer(
        objective,
        peft.merge_params(loaded.params, fresh),
        "lora",
        loader,
        steps=asked.steps,
        eval_loader=held_out,
        optimizer=gm.train.OptimizerConfig(learning_rate=5e-3 if not asked.model else 5e-4),
    )
    history = trainer.fit().history
    steps = [row for row in history if "loss" in row]
    print(f"training: {steps[0]['accuracy']:.0%} right at first, {steps[-1]['accuracy']:.0%} at the end")
    print(f"held out: {history[-1]['eval_accuracy']:.0%} right, loss {history[-1]['eval_loss']:.3f}")


if __name__ == "__main__":
    main()
