# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on pictures: conversations with images, through the vision tower of a Gemma 3.

    python examples/finetune_images.py               a tiny random model with an encoder for 16 x 16 pixels
    python examples/finetune_images.py --model PATH  a multimodal Gemma 3

`seq2seq.py` shows the trainer, `multimodal.py` how a model looks at pictures. In files, images are given by their paths.
The tower stays as it is; adapters are put on the decoder and on the projection of image features.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from PIL import Image

from gemma import gm, peft
from gemma.chat import Turn

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}


def pictures(folder: Path) -> gm.data.Examples:
    """A question with a picture, and its answer; the marker in the text is where the picture goes."""
    rows = []
    for name, colour in COLOURS.items():
        path = folder / f"{name}.png"
        Image.new("RGB", (32, 32), colour).save(path)
        turns = (Turn("user", "<start_of_image>Which colour?"), Turn("model", name.capitalize()))
        rows.append(gm.data.Conversation(turns, images=(str(path),)))
    return gm.data.Examples.of(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a path or name; left out: a tiny random model")
    parser.add_argument("--steps", type=int, default=30)
    asked = parser.parse_args(arguments)
    loaded = gm.text.load_model(asked.model, text_only=False) if asked.model else gm.testing.tiny_model(images=True)
    if loaded.config.vision is None:
        parser.error(f"{asked.model}: has no vision encoder")
    model = gm.nn.LoRA(
        rank=8, alpha=16, model=loaded.model, targets=("attention", "mlp", "projector"), dtype=jnp.float32
    )
    tokens = jnp.ones((1, 2), jnp.int32)
    with tempfile.TemporaryDirectory() as folder:
        loader = gm.data.Loader(
            pictures(Path(folder)),
            loaded.tokenizer,
            batch_size=4,
            max_length=64,
            image_size=loaded.config.vision.image_size,
        )
        batch = next(iter(loader))
        print("a batch:", {name: array.shape for name, array in batch.items() if name in ("tokens", "images")})
        size = loaded.config.vision.image_size
        blank = jnp.zeros((1, 1, size, size, 3), jnp.uint8)
        marker = loaded.tokenizer.special.start_of_image
        # With a picture, so that the projection is called, too, and gets its adapter.
        shapes = jax.jit(
            lambda key: (
                peft.split_params(
                    model.init(key, jnp.full_like(tokens, marker).at[0, 1].set(1), images=blank)["params"]
                ).lora
            )
        )(jax.random.key(0))
        trainer = gm.train.Trainer(
            gm.train.Supervised(model),
            peft.merge_params(loaded.params, shapes),
            "lora",
            loader,
            steps=asked.steps,
            optimizer=gm.train.OptimizerConfig(learning_rate=5e-3 if not asked.model else 5e-4),
        )
        losses = [row["loss"] for row in trainer.fit().history]
    print(f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")


if __name__ == "__main__":
    main()
