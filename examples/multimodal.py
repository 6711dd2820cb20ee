# SPDX-License-Identifier: Apache-2.0
"""Pictures in prompts: one, several, in batches, in a later turn; crops of long ones; pixels by hand.

    python examples/multimodal.py                                          a tiny random model and drawn pictures
    python examples/multimodal.py --model PATH --image cat.jpg dog.png     a Gemma 3 of 4B or more, your pictures

A picture goes where the prompt says `<start_of_image>`, and there must be as many pictures as marks. It may be a path,
the bytes of a file, a PIL image or an array [H, W, C]; any size and mode. EXIF rotation is applied, an animation is its
first frame, and a picture of too many pixels is refused before it is decoded.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from gemma import gm
from gemma.gm import vision
from gemma.image import insert_crops, read_image


def drawn(shape: str, colour: str, width: int = 320, height: int = 320) -> Image.Image:
    """A picture to ask about."""
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    (pen.ellipse if shape == "circle" else pen.rectangle)(
        (width // 4, height // 4, width * 3 // 4, height * 3 // 4), colour
    )
    return image


def one_and_several(sampler: gm.text.Sampler, pictures: list[Any], count: int) -> None:
    """`images=` of one prompt is a picture, or a list in the order of the marks."""
    one = sampler.sample("<start_of_image> shows", images=pictures[0], max_new_tokens=count)
    print("one:    ", repr(one))
    two = sampler.sample(
        "First <start_of_image>, then <start_of_image>: the difference is", images=pictures[:2], max_new_tokens=count
    )
    print("two:    ", repr(two))
    try:
        sampler.sample("no mark here", images=pictures[0], max_new_tokens=count)
    except ValueError as error:
        print("counted:", error)


def batch(sampler: gm.text.Sampler, pictures: list[Any], count: int) -> None:
    """Of several prompts, one entry each; they need not have the same number of pictures, nor pictures of one size."""
    texts = sampler.sample(
        ["no picture", "<start_of_image> and <start_of_image> are"],
        images=[None, pictures[:2]],
        max_new_tokens=count,
    )
    for text in texts:
        print(repr(text))


def later_turn(loaded: gm.text.LoadedModel, pictures: list[Any], count: int) -> None:
    """In a conversation a picture may come at any turn; the ones before stay in the cache and are not read again."""
    chatbot = gm.text.ChatSampler(
        model=loaded.model,
        params=loaded.params,
        tokenizer=loaded.tokenizer,
        multi_turn=True,
        cache_length=512,
    )
    for prompt, images in (
        ("Here is a picture: <start_of_image> What is it?", pictures[0]),
        ("Which colour?", None),
        ("And this one? <start_of_image>", pictures[1]),
    ):
        print("user: ", prompt)
        print("model:", repr(chatbot.chat(prompt, images=images, max_new_tokens=count)))


def crops(sampler: gm.text.Sampler, picture: Any, count: int) -> None:
    """Every picture is squeezed into a square, so fine print of a long one is lost. Pan and scan shows it in parts, too."""
    prompt, images = insert_crops("<start_of_image> says", [read_image(picture)])
    print("pictures:", [image.shape for image in images])
    print("prompt:  ", prompt)
    print("answer:  ", repr(sampler.sample(prompt, images=images, max_new_tokens=count)))


def pixels(loaded: gm.text.LoadedModel, picture: Any) -> None:
    """The lowest tier: prepared pixels and ids into `model.apply`.

    `load_image` is the plain way (what Hugging Face's processor does), `standardize_image` the way of training, JPEG
    round trip included. Text comes out as long as it went in: the soft tokens of a picture are inside the model.
    """
    side = loaded.config.vision.image_size
    plain = vision.load_image(picture, size=side)  # float32 [H, W, C] in -1..1
    trained = vision.standardize_image(picture, size=side)
    print("the two ways differ by up to", float(np.abs(plain - trained).max()))
    ids = loaded.tokenizer.encode("<start_of_image> shows", add_bos=True)
    # Prepared pixels are floats and taken as they are; uint8 pictures of any size are resized by the model.
    out = loaded.model.apply({"params": loaded.params}, jnp.asarray([ids]), images=jnp.asarray(plain)[None, None])
    print("ids:", len(ids), "- logits:", out.logits.shape, "- tokens per picture:", loaded.config.mm_tokens_per_image)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a file of a model with vision; without it, a tiny random model")
    parser.add_argument("--image", nargs="*", default=[], help="picture files; without them, two drawn shapes")
    parser.add_argument("--max-new-tokens", type=int, default=8)
    chosen = parser.parse_args(arguments)
    loaded = gm.text.load_model(chosen.model, text_only=False) if chosen.model else gm.testing.tiny_model(images=True)
    if loaded.config.vision is None:
        parser.error(f"{chosen.model} has no vision encoder; take a Gemma 3 of 4B, 12B or 27B")
    pictures = [*chosen.image, drawn("circle", "red"), drawn("square", "blue", 500, 300)]
    sampler = gm.text.Sampler(
        model=loaded.model,
        params=loaded.params,
        tokenizer=loaded.tokenizer,
        cache_length=512,
    )
    for title, run in {
        "One picture and several": lambda: one_and_several(sampler, pictures, chosen.max_new_tokens),
        "A batch": lambda: batch(sampler, pictures, chosen.max_new_tokens),
        "A picture in a later turn": lambda: later_turn(loaded, pictures, chosen.max_new_tokens),
        "Crops of a long picture": lambda: crops(sampler, drawn("square", "green", 900, 300), chosen.max_new_tokens),
        "Pixels by hand": lambda: pixels(loaded, pictures[0]),
    }.items():
        print(f"\n== {title}")
        run()


if __name__ == "__main__":
    main()
