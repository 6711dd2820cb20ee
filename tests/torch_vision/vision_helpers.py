# SPDX-License-Identifier: Apache-2.0
"""A small PaliGemma vocabulary and configuration, and pictures, for the tests of this folder. No torch here."""

from __future__ import annotations

import functools
import json

import numpy as np

from gemma.config import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig
from gemma.tokenizer import Tokenizer

SPACE = "\u2581"
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
LOCS = [f"<loc{n:04d}>" for n in range(1024)]
SEGS = [f"<seg{n:03d}>" for n in range(128)]
BYTES = [f"<0x{n:02X}>" for n in range(256)]
LETTERS = [*"abcdefghijklmnopqrstuvwxyz.,;?!0123456789", SPACE, "\n", "\n\n"]
MERGES = [("\n", "\n")]
BASE = [*SPECIAL, *BYTES, *LETTERS]
FIRST_LOC = len(BASE)
IMAGE_ID = FIRST_LOC + 1024 + 128

VISION = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_channels=3,
    image_size=56,
    patch_size=14,
)


def pieces(order=(LOCS, SEGS, ["<image>"])) -> list[str]:
    return [*BASE, *(piece for group in order for piece in group)]


def tokenizer_json(path, vocabulary: list[str]) -> None:
    """A `tokenizer.json` of these pieces, as Hugging Face's converters write it."""
    added = [*SPECIAL, *LOCS, *SEGS, "<image>"]
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    unescape = dict(type="Replace", pattern=dict(String=SPACE), content=" ")
    content = dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=[dict(id=ids[p], content=p, special=p in SPECIAL, **flags) for p in added if p in ids],
        normalizer=dict(type="Replace", pattern=dict(String=" "), content=SPACE),
        pre_tokenizer=None,
        post_processor=None,
        decoder=dict(type="Sequence", decoders=[unescape, dict(type="ByteFallback"), dict(type="Fuse")]),
        model=dict(
            type="BPE",
            dropout=None,
            unk_token="<unk>",
            continuing_subword_prefix=None,
            end_of_word_suffix=None,
            fuse_unk=True,
            byte_fallback=True,
            ignore_merges=False,
            vocab=ids,
            merges=[list(pair) for pair in MERGES],
        ),
    )
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


@functools.lru_cache(maxsize=8)
def _tokenizer(folder, vocabulary: tuple[str, ...]) -> Tokenizer:
    path = folder / f"{len(vocabulary)}-{hash(vocabulary) % 10**8}.json"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_json(path, list(vocabulary))
    return Tokenizer.from_file(path.rename(_own_folder(path) / "tokenizer.json"))


def _own_folder(path):
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    return folder


def tokenizer(folder, vocabulary: list[str] | None = None) -> Tokenizer:
    return _tokenizer(folder, tuple(pieces() if vocabulary is None else vocabulary))


def config(**changes) -> PaliGemmaConfig:
    rows = IMAGE_ID + 8
    text = GemmaConfig(
        vocab_size=rows,
        hidden_size=72,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=24,
        max_position_embeddings=256,
    )
    fields = dict(
        vision_config=SiglipVisionConfig(**VISION),
        text_config=text,
        image_token_index=IMAGE_ID,
        vocab_size=rows,
        projection_dim=72,
        hidden_size=72,
        tokenizer_vocab_size=IMAGE_ID,
    )
    return PaliGemmaConfig(**fields | changes)


def picture(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
