# SPDX-License-Identifier: Apache-2.0
"""Search: documents and a question become vectors, and the nearest document is the one with the greatest cosine.

    python examples/search.py --model path/to/embeddinggemma-300m "Which planet is red?"

Without --model a tiny random encoder is used, which knows no language: only a text itself is near to it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemma import embedding, gm
from gemma.testing import ByteTokenizer, tiny_config

DOCUMENTS = [
    ("Venus", "Venus is often called Earth's twin because of its similar size and proximity."),
    ("Mars", "Mars, known for its reddish appearance, is often referred to as the Red Planet."),
    ("Jupiter", "Jupiter, the largest planet in our solar system, has a prominent red spot."),
    ("Saturn", "Saturn, famous for its rings, is sometimes mistaken for the Red Planet."),
]


def tiny_embedder() -> gm.text.TextEmbedder:
    """A random encoder of three layers and 32 numbers, with a tokenizer of bytes."""
    config = tiny_config(
        "gemma3", num_hidden_layers=2, layer_pattern="LG", use_bidirectional_attention=True, embedding_dense=(48, 32)
    )
    model = gm.nn.EmbeddingGemma.from_config(config, dtype=jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32), shapes)
    return gm.text.TextEmbedder(model, params, ByteTokenizer())


def search(embedder: gm.text.TextEmbedder, question: str, dim: int | None) -> list[tuple[float, str]]:
    """The documents and their cosines with the question, the nearest first."""
    # A title is part of a document's prompt, so each document has its own; questions and documents have other prompts.
    documents = np.stack(
        [embedder.embed(text, task="document", title=title, dim=dim, truncate=True) for title, text in DOCUMENTS]
    )
    query = embedder.embed([question], task="query", dim=dim)
    cosines = embedding.cosine(query, documents)[0]
    return sorted(((float(c), title) for c, (title, _) in zip(cosines, DOCUMENTS, strict=True)), reverse=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the guide."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", nargs="?", default="Which planet is known as the Red Planet?")
    parser.add_argument("--model", help="a folder with EmbeddingGemma; none: a tiny random encoder")
    parser.add_argument("--dim", type=int, help="512, 256 or 128 of the 768 numbers")
    options = parser.parse_args(arguments)
    embedder = tiny_embedder() if options.model is None else gm.text.TextEmbedder.load(options.model)

    print(f"question: {options.question}")
    for cosine, title in search(embedder, options.question, options.dim):
        print(f"  {cosine:6.3f}  {title}")

    # The same vectors in any batch, and shorter ones without computing anything again.
    texts = [text for _, text in DOCUMENTS]
    whole = embedder.embed(texts, truncate=True)
    alone = np.stack([embedder.embed(text, truncate=True) for text in texts])
    print(f"alone the same: {bool(np.abs(whole - alone).max() < 1e-5)}")
    half = embedder.width // 2
    print(f"{half} of {embedder.width} numbers: {embedding.shortened(whole, half).shape}")
    nearest = embedding.cosine(whole, whole).argmax(axis=1).tolist()
    print(f"each text is nearest to itself: {nearest == list(range(len(texts)))}")


if __name__ == "__main__":
    main()
