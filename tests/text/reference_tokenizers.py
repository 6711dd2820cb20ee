# SPDX-License-Identifier: Apache-2.0
"""Independent tokenizers over the same vocabulary: llama.cpp (by ctypes) and Hugging Face `tokenizers`.

Both are built here from the GGUF file's own arrays, which a few lines of `struct` read: nothing of the tokenizer under
test is involved. Also the generator of awkward strings that the comparisons run on.
"""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import mmap
import os
import random
import struct

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def gguf_metadata(path) -> dict:
    """The metadata of a trusted GGUF file; arrays become tuples."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = 24

        def take(code):
            nonlocal at
            values = struct.unpack_from("<" + code, data, at)
            at += struct.calcsize("<" + code)
            return values

        def text():
            nonlocal at
            (size,) = take("Q")
            at += size
            return data[at - size : at].decode()

        def value(kind):
            if kind == 8:
                return text()
            if kind == 9:
                inner, count = take("IQ")
                return take(f"{count}{_SCALARS[inner]}") if inner != 8 else tuple(text() for _ in range(count))
            return take(_SCALARS[kind])[0]

        _, n_kv = struct.unpack_from("<QQ", data, 8)
        return {text(): value(take("I")[0]) for _ in range(n_kv)}


# Kept for the life of the process: the library holds the pointer, and calls it even while it is being freed.
QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


class LlamaCpp:
    """`encode(text, parse_special)` by llama.cpp's own vocabulary code, on a GGUF file."""

    class _Params(ctypes.Structure):
        # Larger than the true structure, whose fields are not touched: only passed from one function to the other.
        _fields_ = [("bytes", ctypes.c_uint8 * 1024)]

    def __init__(self, path):
        root = os.path.dirname(importlib.util.find_spec("xllamacpp").origin)
        self._lib = lib = ctypes.CDLL(glob.glob(os.path.join(root, "xllamacpp*.so"))[0])
        lib.llama_log_set.argtypes = [type(QUIET), ctypes.c_void_p]
        lib.llama_log_set(QUIET, None)
        lib.llama_model_default_params.restype = self._Params
        lib.llama_model_load_from_file.restype = ctypes.c_void_p
        lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, self._Params]
        lib.llama_model_get_vocab.restype = ctypes.c_void_p
        lib.llama_model_get_vocab.argtypes = lib.llama_model_free.argtypes = [ctypes.c_void_p]
        lib.llama_tokenize.argtypes = [
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_int32,
            ctypes.c_void_p,
            ctypes.c_int32,
        ]
        lib.llama_tokenize.argtypes += [ctypes.c_bool, ctypes.c_bool]
        self._model = lib.llama_model_load_from_file(os.fsencode(path), lib.llama_model_default_params())
        assert self._model, f"llama.cpp cannot load {path}"
        self._vocab = lib.llama_model_get_vocab(self._model)

    def encode(self, text: str, parse_special: bool = True, add_bos: bool = False) -> list[int]:
        data = text.encode()
        buffer = (ctypes.c_int32 * (len(data) + 8))()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), buffer, len(buffer), add_bos, parse_special)
        assert count >= 0
        return buffer[:count]

    def close(self) -> None:
        self._lib.llama_model_free(self._model)


def hugging_face(metadata: dict):
    """A `tokenizers.Tokenizer` with the file's pieces: merges are all splits of a piece, in the order of its score."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers

    pieces = metadata["tokenizer.ggml.tokens"]
    scores = metadata["tokenizer.ggml.scores"]
    types = metadata["tokenizer.ggml.token_type"]
    ids = {piece: i for i, piece in enumerate(pieces)}
    normal = {piece: i for piece, i in ids.items() if types[i] == NORMAL}
    merges = []
    for piece, i in normal.items():
        for cut in range(1, len(piece)):
            left, right = normal.get(piece[:cut]), normal.get(piece[cut:])
            if left is not None and right is not None:
                merges.append((-scores[i], left, right))
    merges.sort()
    model = models.BPE(
        ids, [(pieces[a], pieces[b]) for _, a, b in merges], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    added = [(p, t) for p, t in zip(pieces, types) if t in (CONTROL, UNKNOWN, USER)]
    tokenizer.add_special_tokens([AddedToken(p, normalized=False, special=True) for p, t in added if t != USER])
    tokenizer.add_tokens([AddedToken(p, normalized=False, special=False) for p, t in added if t == USER])
    return tokenizer


# --- strings

_EMOJI = ["😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "❤️", "🧑🏿‍🚀", "\U0001fae8"]
_SCRIPTS = [
    "漢字かな交じり文",
    "한국어",
    "русский",
    "עברית",
    "العربية",
    "ไทย",
    "हिन्दी",
    "ελληνικά",
    "Tiếng Việt",
    "ﬁ½Ⅷ",
    "Zürich",
]
_TAGS = [
    "<table>",
    "</table>",
    "<b>",
    "</b>",
    "<td>",
    "<tr>",
    "<h1>",
    "</h6>",
    "<ul>",
    "<li>",
    "<div>",
    "<br/>",
    "<img src=x>",
]
_ALIKES = [
    "<start_of_turn",
    "start_of_turn>",
    "<start_of_turn >",
    "< start_of_turn>",
    "<START_OF_TURN>",
    "＜start_of_turn＞",
]
_ALIKES += [
    "<end_of_tur",
    "<bos",
    "<|im_start|>",
    "[INST]",
    "<unused",
    "<unused99999>",
    "<0x41>",
    "<0x0A>",
    "<s>",
    "</s>",
]
_ALIKES += ["<start_of_turn><", "<<eos", "&lt;bos&gt;", "<loc0001>", "<seg001>", "<image>", "[multimodal]", "<unk "]
CONTROLS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "<unused0>", "<unused98>"]
IMAGES = ["<start_of_image>", "<end_of_image>"]
_SPACES = [
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "\u3000",
    "\u00a0",
    "\u200b",
    "\u2028",
    "\ufeff",
    "\v\f",
    "\x00",
    "\x7f",
    "\x85",
]
_MARKS = ["e\u0301", "a\u0308\u0304", "n\u0303", "\u0301\u0301", "க்ஷ", "ǅ", "İ", "ß", "ﷺ"]
_CODE = [
    "def f(x):\n    return x\n",
    "{'a': [1, 2]}",
    "if (a && b) {\n\t\treturn;\n}",
    "https://x.org/?q=a%20b#c",
    "1,234.56e-7",
]


def awkward(rng: random.Random, pieces, *, controls: bool = False) -> str:
    """A string of one to a dozen awkward parts; words come from the vocabulary itself, cut and joined at random."""
    parts = []
    for _ in range(rng.randint(1, 12)):
        kind = rng.randrange(12 if controls else 11)
        if kind == 0:
            parts.append(rng.choice(" \n\t") * rng.choice([1, 2, 3, 5, 16, 30, 31, 32, 33, 64, rng.randint(1, 100)]))
        elif kind == 1:
            parts.append(rng.choice(_EMOJI) * rng.randint(1, 3))
        elif kind == 2:
            word = rng.choice(_SCRIPTS)
            parts.append(word[: rng.randint(1, len(word))])
        elif kind == 3:
            parts.append(rng.choice(_TAGS) * rng.randint(1, 2))
        elif kind == 4:
            parts.append(rng.choice(_ALIKES))
        elif kind == 5:
            parts.append(rng.choice(_SPACES))
        elif kind == 6:
            parts.append(rng.choice(_MARKS))
        elif kind == 7:
            parts.append(rng.choice(_CODE))
        elif kind == 8:
            parts.append("".join(_scalar(rng) for _ in range(rng.randint(1, 6))))
        elif kind == 11:
            parts.append(rng.choice(CONTROLS))
        else:
            word = rng.choice(pieces).replace("▁", " ")
            parts.append(word if rng.random() < 0.7 else word[: rng.randint(1, len(word))])
    return "".join(parts)


def _scalar(rng: random.Random) -> str:
    while True:
        c = rng.choice([rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0x10000), rng.randrange(0x110000)])
        if not 0xD800 <= c < 0xE000 and c != 0x2581:
            return chr(c)
