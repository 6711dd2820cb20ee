# SPDX-License-Identifier: Apache-2.0
"""Learning from pairs of answers: DPO, and the losses beside it.

    python examples/dpo.py                          a tiny random model: everything runs in seconds
    python examples/dpo.py --kind simpo             without a reference model; also orpo, ipo, hinge
    python examples/dpo.py --model demo             the real Gemma 3 270M

`seq2seq.py` shows the trainer; here only what differs. The reference is the model without its adapters, so that no second
copy of the weights exists. As one command: `gemma finetune pairs.jsonl --method dpo`.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp

from gemma import gm, peft
from gemma.chat import Turn

QUESTIONS = ("Are you there?", "May I come in?", "Is it late?", "Can you hear me?")


def pairs() -> gm.data.Examples:
    """A conversation, the better answer and the worse one."""
    return gm.data.Examples.of(
        [gm.data.Preference((Turn("user", question),), chosen="Yes.", rejected="No.") for question in QUESTIONS]
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a path or name; left out: a tiny random model")
    parser.add_argument("--kind", default="dpo", help="dpo, ipo, hinge, orpo, simpo, ...")
    parser.add_argument("--steps", type=int, default=20)
    asked = parser.parse_args(arguments)
    loaded = gm.text.load_model(asked.model) if asked.model else gm.testing.tiny_model()
    loader = gm.data.Loader(pairs(), loaded.tokenizer, batch_size=4, max_length=64)
    batch = next(iter(loader))
    print("tokens of a batch [pair, chosen and rejected, position]:", batch["tokens"].shape)

    model = gm.nn.LoRA(rank=4, model=loaded.model, targets=("attention",), dtype=jnp.float32)
    tokens = jnp.ones((1, 2), jnp.int32)
    fresh = jax.jit(lambda key: peft.split_params(model.init(key, tokens)["params"]).lora)(jax.random.key(0))
    trainer = gm.train.Trainer(
        gm.train.Preference(model, kind=asked.kind),
        peft.merge_params(loaded.params, fresh),
        "lora",
        loader,
        steps=asked.steps,
        optimizer=gm.train.OptimizerConfig(learning_rate=2e-3 if not asked.model else 2e-4),
    )
    for row in trainer.fit().history[:: max(1, asked.steps - 1)]:
        print(
            f"step {row['step']:3}: loss {row['loss']:.3f}, the chosen answer leads by {row['margins']:+.3f}, "
            f"and in {row['accuracies']:.0%} of the pairs"
        )


if __name__ == "__main__":
    main()
