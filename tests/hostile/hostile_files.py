# SPDX-License-Identifier: Apache-2.0
"""Writers of GGUF, safetensors and SentencePiece files, made to lie on demand. `struct` only.

Written from the descriptions of the formats, not from the readers under test: a reader and a writer that share a
misunderstanding would agree with each other. Each GGUF field is remembered by name and byte position (`marks`), so a
fault is "put this value there". The valid files are tiny but complete models: everything can be read from them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import struct
from pathlib import Path

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)
SCALARS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}

# name: (ggml id, weights per block, bytes per block)
GGML = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34), "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "BF16": (30, 1, 2),
}  # fmt: skip
IQ_TYPES = {
    "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19, "IQ4_NL": 20, "IQ3_S": 21, "IQ2_S": 22, "IQ4_XS": 23,
    "IQ1_M": 29,
}  # fmt: skip


@dataclasses.dataclass
class Blob:
    """A file's bytes and where its fields are: `marks[name] = (offset, width)`."""

    data: bytearray
    marks: dict[str, tuple[int, int]]
    header_end: int  # first byte after the last tensor description
    data_start: int  # first byte of the tensor data
    ends: tuple[int, ...]  # end of every tensor's bytes, absolute

    def patch(self, mark: str, value: int) -> Blob:
        """A copy with one integer field replaced (little-endian, modulo its width)."""
        at, width = self.marks[mark]
        data = bytearray(self.data)
        data[at : at + width] = (value % (1 << (8 * width))).to_bytes(width, "little")
        return dataclasses.replace(self, data=data)

    def at(self, mark: str) -> int:
        return self.marks[mark][0]


class _Writer:
    def __init__(self):
        self.out, self.marks = bytearray(), {}

    def mark(self, name: str | None, width: int) -> None:
        if name is not None:
            self.marks.setdefault(name, (len(self.out), width))

    def put(self, code: str, value, name: str | None = None) -> None:
        self.mark(name, struct.calcsize("<" + code))
        self.out += struct.pack("<" + code, value)

    def text(self, value: bytes, name: str | None = None) -> None:
        self.put("Q", len(value), None if name is None else f"{name}.len")
        self.mark(None if name is None else f"{name}.bytes", len(value))
        self.out += value

    def value(self, kind: int, value, name: str | None = None) -> None:
        if kind == STR:
            self.text(value if isinstance(value, bytes) else value.encode(), name)
        elif kind == ARR:
            inner, items = value
            self.put("I", inner, f"{name}.inner")
            self.put("Q", len(items), f"{name}.count")
            if inner in SCALARS:
                self.mark(f"{name}.items", len(items) * struct.calcsize("<" + SCALARS[inner]))
                self.out += struct.pack(f"<{len(items)}{SCALARS[inner]}", *items)
            else:
                for i, item in enumerate(items):
                    self.value(inner, item, f"{name}[{i}]")
        else:
            self.put(SCALARS[kind], value, f"{name}.value")


@dataclasses.dataclass
class TensorSpec:
    name: str
    dims: tuple[int, ...]  # GGUF order: contracting axis first
    type: str
    data: bytes


def gguf_bytes(
    keys: list[tuple[str, int, object]],
    tensors: list[TensorSpec],
    *,
    version: int = 3,
    magic: bytes = b"GGUF",
    alignment: int = 32,
    offsets: dict[str, int] | None = None,
) -> Blob:
    """A GGUF file. `keys` are (name, type, value), an array's value (element type, items); `offsets` overrides."""
    w = _Writer()
    w.mark("magic", 4)
    w.out += magic
    w.put("I", version, "version")
    w.put("Q", len(tensors), "n_tensors")
    w.put("Q", len(keys), "n_kv")
    for i, (key, kind, value) in enumerate(keys):
        where = key if f"{key}.type" not in w.marks else f"{key}#{i}"
        w.text(key.encode(), f"{where}.key")
        w.put("I", kind, f"{where}.type")
        w.value(kind, value, where)
    position, places = 0, []
    for t in tensors:
        places.append(position)
        position += -(-len(t.data) // alignment) * alignment
    for i, (t, place) in enumerate(zip(tensors, places)):
        where = t.name if f"{t.name}.n_dims" not in w.marks else f"{t.name}#{i}"
        w.text(t.name.encode(), f"{where}.name")
        w.put("I", len(t.dims), f"{where}.n_dims")
        for j, dim in enumerate(t.dims):
            w.put("Q", dim, f"{where}.dim{j}")
        w.put("I", GGML[t.type][0], f"{where}.ggml")
        w.put("Q", (offsets or {}).get(t.name, place), f"{where}.offset")
    header_end = len(w.out)
    w.out += b"\0" * (-header_end % alignment)
    start = len(w.out)
    ends = []
    for t, place in zip(tensors, places):
        w.out += b"\0" * (start + place - len(w.out)) + t.data
        ends.append(len(w.out))
    w.out += b"\0" * (-len(w.out) % alignment)
    return Blob(w.out, w.marks, header_end, start, tuple(ends))


def pack_random(rng: np.random.Generator, kind: str, dims: tuple[int, ...], scale: float = 0.05) -> bytes:
    """Valid bytes of one tensor; quantized types get random quants and small scales (a Q8_0 block is d and 32 int8)."""
    count = int(np.prod(dims, dtype=object))
    if kind == "F32":
        return (rng.standard_normal(count) * scale).astype("<f4").tobytes()
    if kind == "F16":
        return (rng.standard_normal(count) * scale).astype("<f2").tobytes()
    if kind == "BF16":
        return (rng.standard_normal(count) * scale).astype("<f4").view("<u2")[1::2].tobytes()
    if kind == "Q8_0":
        d = np.full((count // 32, 1), 1e-3, "<f2").view(np.uint8)
        return np.concatenate([d, rng.integers(0, 256, (count // 32, 32), dtype=np.uint8)], 1).tobytes()
    _, block, size = GGML[kind]
    return rng.integers(0, 60, count // block * size, dtype=np.uint8).tobytes()


# --- a vocabulary in the layout of Gemma 3, and one in that of Gemma 1 and 2

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_MERGES = ["▁t", "he", "in", "▁the", "er", "on", "▁a", "us", "user", "mo", "de", "model", "▁w", "or", "ld", "▁world"]
_MERGES += ["hello", "el", "hel", "lo", "▁hello", "us", "odel", "se", "del", "orld"]


def vocabulary(family: int = 3, words: int = 10**6) -> tuple[list[str], list[float], list[int]]:
    """(pieces, scores, types). `words` caps the merged pieces, for the smallest possible file."""
    head = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    if family == 3:
        head += ["[multimodal]"] + [f"<unused{i}>" for i in range(99)]
    else:
        head += ["<2mass>", "[@BOS@]"] + [f"<unused{i}>" for i in range(99)]
    head += ["<start_of_turn>", "<end_of_turn>"]
    runs = ["\n" * n for n in range(1, 6)] + [" " * n for n in range(2, 6)] + ["<table>", "</b>"]
    if family == 3:
        runs += ["<start_of_image>", "<end_of_image>"]
    pieces = head + runs + [f"<0x{i:02X}>" for i in range(256)]
    types = [CONTROL] * len(head) + [USER] * len(runs) + [BYTE] * 256
    types[3] = UNKNOWN
    scores = [-1000.0] * (len(head) + len(runs)) + [0.0] * 256
    merged = list(dict.fromkeys(_MERGES))[:words]
    letters = ["▁"] + [chr(c) for c in range(33, 127)] + list("éüß日本語") if words else ["▁", "a", "b"]
    for rank, piece in enumerate(merged + letters):
        pieces.append(piece)
        scores.append(-float(rank))
        types.append(NORMAL)
    return pieces, scores, types


# --- the tiny Gemma 3

SIZES = dict(layers=2, width=32, mlp=64, heads=2, kv=1, head_dim=16, window=8, context=64)


def gguf_keys(pieces=None, scores=None, types=None, *, arch: str = "gemma3") -> list[tuple[str, int, object]]:
    s = SIZES
    keys = [
        ("general.architecture", STR, arch),
        ("general.name", STR, "tiny"),
        ("general.alignment", U32, 32),
        (f"{arch}.context_length", U32, s["context"]),
        (f"{arch}.embedding_length", U32, s["width"]),
        (f"{arch}.block_count", U32, s["layers"]),
        (f"{arch}.feed_forward_length", U32, s["mlp"]),
        (f"{arch}.attention.head_count", U32, s["heads"]),
        (f"{arch}.attention.head_count_kv", U32, s["kv"]),
        (f"{arch}.attention.key_length", U32, s["head_dim"]),
        (f"{arch}.attention.value_length", U32, s["head_dim"]),
        (f"{arch}.attention.layer_norm_rms_epsilon", F32, 1e-6),
        (f"{arch}.attention.sliding_window", U32, s["window"]),
        (f"{arch}.rope.freq_base", F32, 1e6),
    ]
    if pieces is not None:
        keys += [
            ("tokenizer.ggml.model", STR, "llama"),
            ("tokenizer.ggml.tokens", ARR, (STR, pieces)),
            ("tokenizer.ggml.scores", ARR, (F32, scores)),
            ("tokenizer.ggml.token_type", ARR, (I32, types)),
            ("tokenizer.ggml.bos_token_id", U32, 2),
            ("tokenizer.ggml.eos_token_id", U32, 1),
            ("tokenizer.ggml.unknown_token_id", U32, 3),
            ("tokenizer.ggml.padding_token_id", U32, 0),
            ("tokenizer.ggml.add_bos_token", BOOL, 1),
            ("tokenizer.ggml.add_space_prefix", BOOL, 0),
        ]
    return keys


def gguf_tensors(rows: int, *, seed: int = 0) -> list[TensorSpec]:
    s, rng = SIZES, np.random.default_rng(seed)
    out: list[TensorSpec] = []

    def add(name, dims, kind):
        out.append(TensorSpec(name, dims, kind, pack_random(rng, kind, dims)))

    add("token_embd.weight", (s["width"], rows), "Q8_0")
    q, kv = s["heads"] * s["head_dim"], s["kv"] * s["head_dim"]
    for i in range(s["layers"]):
        for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            add(f"blk.{i}.{norm}.weight", (s["width"],), "F32")
        for norm in ("attn_q_norm", "attn_k_norm"):
            add(f"blk.{i}.{norm}.weight", (s["head_dim"],), "F32")
        add(f"blk.{i}.attn_q.weight", (s["width"], q), "F32")
        add(f"blk.{i}.attn_k.weight", (s["width"], kv), "F16")
        add(f"blk.{i}.attn_v.weight", (s["width"], kv), "BF16")
        add(f"blk.{i}.attn_output.weight", (q, s["width"]), "Q8_0")
        add(f"blk.{i}.ffn_gate.weight", (s["width"], s["mlp"]), "Q4_0")
        add(f"blk.{i}.ffn_up.weight", (s["width"], s["mlp"]), "Q8_0")
        add(f"blk.{i}.ffn_down.weight", (s["mlp"], s["width"]), "Q8_0")
    add("output_norm.weight", (s["width"],), "F32")
    return out


def tiny_gguf(*, keys=None, tensors=None, family: int = 3, words: int = 10**6, **options) -> Blob:
    """A complete tiny Gemma 3 with its vocabulary."""
    pieces, scores, types = vocabulary(family, words)
    keys = gguf_keys(pieces, scores, types) if keys is None else keys
    return gguf_bytes(keys, gguf_tensors(len(pieces)) if tensors is None else tensors, **options)


def small_gguf() -> Blob:
    """The smallest header that holds every kind of field; three tensors, one of them quantized."""
    rng = np.random.default_rng(1)
    specs = [("a.weight", (32, 2), "Q8_0"), ("b.weight", (8,), "F32"), ("c.weight", (64, 4), "Q4_0")]
    keys = [
        ("general.architecture", STR, "gemma3"),
        ("general.alignment", U32, 32),
        ("x.flag", BOOL, 1),
        ("x.list", ARR, (F32, [1.0, 2.0, 3.0])),
        ("x.names", ARR, (STR, ["a", "bc", ""])),
        ("x.big", U64, 7),
        ("x.small", I8, -1),
        ("x.double", F64, 0.5),
    ]
    return gguf_bytes(keys, [TensorSpec(n, d, k, pack_random(rng, k, d)) for n, d, k in specs])


def replaced(keys, name: str, kind: int | None = None, value=None) -> list:
    """`keys` with one entry's type and value replaced, or removed where `kind` is None."""
    assert any(key == name for key, _, _ in keys), name
    if kind is None:
        return [entry for entry in keys if entry[0] != name]
    return [(k, kind, value) if k == name else (k, t, v) for k, t, v in keys]


# --- safetensors

SAFE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def safetensors_bytes(tensors: dict[str, tuple[str, tuple[int, ...], bytes]], metadata=None) -> bytes:
    """A valid file: u64 header length, JSON header, then the bytes of the tensors without gaps."""
    header, position = {}, 0
    if metadata is not None:
        header["__metadata__"] = metadata
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
        position += len(data)
    return raw_safetensors(json.dumps(header).encode(), b"".join(data for _, _, data in tensors.values()))


def raw_safetensors(header: bytes, body: bytes = b"", *, length: int | None = None, pad: bool = True) -> bytes:
    if pad and length is None:
        header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def hf_config(rows: int, **changes) -> dict:
    """The `config.json` of the tiny Gemma 3, in the spelling that published checkpoints have."""
    s = SIZES
    config = dict(
        architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", vocab_size=rows, hidden_size=s["width"],
        intermediate_size=s["mlp"], num_hidden_layers=s["layers"], num_attention_heads=s["heads"],
        num_key_value_heads=s["kv"], head_dim=s["head_dim"], max_position_embeddings=s["context"], rms_norm_eps=1e-6,
        sliding_window=s["window"], sliding_window_pattern=6, rope_theta=1e6, rope_local_base_freq=1e4,
        query_pre_attn_scalar=s["head_dim"], attention_bias=False, attention_dropout=0.0, rope_scaling=None,
        hidden_activation="gelu_pytorch_tanh", attn_logit_softcapping=None, final_logit_softcapping=None,
        tie_word_embeddings=True, bos_token_id=2, eos_token_id=1, pad_token_id=0, torch_dtype="float32",
        transformers_version="4.50.0", use_cache=True, initializer_range=0.02, cache_implementation="hybrid",
    )  # fmt: skip
    return config | changes


def hf_tensors(rows: int, *, seed: int = 0, dtype: str = "F32") -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    s, rng = SIZES, np.random.default_rng(seed)
    q, kv = s["heads"] * s["head_dim"], s["kv"] * s["head_dim"]
    shapes = {"model.embed_tokens.weight": (rows, s["width"]), "model.norm.weight": (s["width"],)}
    for i in range(s["layers"]):
        p = f"model.layers.{i}."
        shapes |= {p + f"self_attn.{n}_proj.weight": (w, s["width"]) for n, w in (("q", q), ("k", kv), ("v", kv))}
        shapes |= {p + "self_attn.o_proj.weight": (s["width"], q)}
        shapes |= {p + f"self_attn.{n}_norm.weight": (s["head_dim"],) for n in "qk"}
        shapes |= {p + f"mlp.{n}_proj.weight": (s["mlp"], s["width"]) for n in ("gate", "up")}
        shapes |= {p + "mlp.down_proj.weight": (s["width"], s["mlp"])}
        norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        shapes |= {p + f"{n}_layernorm.weight": (s["width"],) for n in norms}
    return {n: (dtype, shape, pack_random(rng, dtype, shape)) for n, shape in shapes.items()}


def write_hf(folder: Path, *, rows: int = 40, tensors=None, config: dict | None = None, shards: int = 1) -> Path:
    """A Hugging Face folder, in one file or in `shards` with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(rows) if config is None else config))
    tensors = hf_tensors(rows) if tensors is None else tensors
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors, {"format": "pt"}))
        return folder
    names, where = sorted(tensors), {}
    for k in range(shards):
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: tensors[n] for n in names[k::shards]}
        (folder / file).write_bytes(safetensors_bytes(part, {"format": "pt"}))
        where |= dict.fromkeys(part, file)
    total = sum(len(data) for _, _, data in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# --- SentencePiece model files


def varint(value: int) -> bytes:
    out = bytearray()
    value %= 1 << 64
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, payload: bytes | int | float) -> bytes:
    """One protobuf field: a float is fixed32, an int a varint, bytes are length-delimited."""
    if isinstance(payload, float):
        return varint(number << 3 | 5) + struct.pack("<f", payload)
    if isinstance(payload, int):
        return varint(number << 3) + varint(payload)
    return varint(number << 3 | 2) + varint(len(payload)) + payload


@functools.cache
def _piece(piece: str | bytes, score: float, kind: int) -> bytes:
    text = piece.replace(" ", "▁").encode() if isinstance(piece, str) else piece
    return field(1, field(1, text) + field(2, score) + field(3, kind))


def sentencepiece_bytes(pieces=None, scores=None, types=None, *, family: int = 3, model_type: int = 2) -> bytes:
    """A ModelProto: pieces (1), trainer (2: BPE, byte fallback, special ids), normalizer (3: identity)."""
    if pieces is None:
        pieces, scores, types = vocabulary(family)
    out = bytearray()
    for piece, score, kind in zip(pieces, scores, types):
        out += _piece(piece, float(score), kind)
    trainer = field(3, model_type) + field(4, len(pieces)) + field(35, int(BYTE in types))
    trainer += field(40, 3) + field(41, 2) + field(42, 1) + field(43, 0)
    trainer += field(45, b"<unk>") + field(46, b"<bos>") + field(47, b"<eos>") + field(48, b"<pad>")
    return bytes(out) + field(2, trainer) + field(3, field(1, b"identity") + field(3, 0) + field(4, 0) + field(5, 1))


def tokenizer_json(pieces=None, scores=None, types=None, *, family: int = 3) -> dict:
    """The same vocabulary in the `tokenizer.json` layout of published Gemma checkpoints."""
    if pieces is None:
        pieces, scores, types = vocabulary(family)
    ids = {p: i for i, p in enumerate(pieces)}
    merges = []
    for p, score, kind in zip(pieces, scores, types):
        cuts = range(1, len(p)) if kind == NORMAL else ()
        merges += [(-score, ids[p[:k]], ids[p[k:]], p[:k], p[k:]) for k in cuts if p[:k] in ids and p[k:] in ids]
    added = [
        dict(id=i, content=p, single_word=False, lstrip=False, rstrip=False, normalized=False, special=t != USER)
        for i, (p, t) in enumerate(zip(pieces, types))
        if t in (CONTROL, UNKNOWN, USER)
    ]
    return dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=added,
        normalizer=dict(type="Replace", pattern=dict(String=" "), content="▁"),
        pre_tokenizer=dict(type="Split", pattern=dict(String=" "), behavior="MergedWithPrevious", invert=False),
        post_processor=None,
        decoder=dict(
            type="Sequence",
            decoders=[
                dict(type="Replace", pattern=dict(String="▁"), content=" "),
                dict(type="ByteFallback"),
                dict(type="Fuse"),
            ],
        ),
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
            merges=[[left, right] for *_, left, right in sorted(merges)],
        ),
    )
