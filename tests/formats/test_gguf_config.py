# SPDX-License-Identifier: Apache-2.0
"""GGUF metadata to configurations: every published text size from the keys that converters write; refusals."""

from __future__ import annotations

import dataclasses
import os
import struct

import numpy as np
import pytest
from test_gguf import ARRAY, STRING, build, pair, tensor

from gemma.checkpoint import open_checkpoint
from gemma.config import PRESETS, GemmaConfig
from gemma.errors import ConfigError, FormatError, UnsupportedError, WeightsMismatch

U32, F32, BOOL, I32 = 4, 6, 7, 5
EMBED, HEAD = "token_embd.weight", "output.weight"


def keys_of(config: GemmaConfig, arch: str) -> dict[str, tuple[int, object]]:
    """The metadata that llama.cpp's converter writes for a model."""
    keys = {
        "context_length": (U32, config.max_position_embeddings),
        "embedding_length": (U32, config.hidden_size),
        "block_count": (U32, config.num_hidden_layers),
        "feed_forward_length": (U32, config.intermediate_size),
        "attention.head_count": (U32, config.num_attention_heads),
        "attention.head_count_kv": (U32, config.num_key_value_heads),
        "attention.key_length": (U32, config.head_dim),
        "attention.value_length": (U32, config.head_dim),
        "attention.layer_norm_rms_epsilon": (F32, config.rms_norm_eps),
    }
    if arch == "gemma2":
        keys["attn_logit_softcapping"] = (F32, config.attn_logit_softcapping)
        keys["final_logit_softcapping"] = (F32, config.final_logit_softcapping)
    if arch != "gemma":
        keys["attention.sliding_window"] = (U32, config.sliding_window)
    if arch == "gemma3":
        keys["rope.freq_base"] = (F32, config.rope_theta)
        if config.rope_scaling_factor != 1.0:
            keys["rope.scaling.type"] = (STRING, "linear")
            keys["rope.scaling.factor"] = (F32, config.rope_scaling_factor)
    full = {"general.architecture": (STRING, arch), "general.type": (STRING, "model")}
    full |= {f"{arch}.{key}": value for key, value in keys.items()}
    ids = dict(bos=config.bos_token_id, eos=config.eos_token_id, padding=config.pad_token_id, unknown=3)
    return full | {f"tokenizer.ggml.{name}_token_id": (U32, value) for name, value in ids.items()}


@pytest.fixture
def read(tmp_path):
    def run(keys: dict, rows: int = 64, width: int = 32, extra=()):
        """A file whose embedding is a hole in a sparse file, so that published sizes cost nothing."""
        path = tmp_path / "model.gguf"
        tensors = [tensor(EMBED, (width, rows), 8, 0), *extra]
        data = build([pair(key, kind, value) for key, (kind, value) in keys.items()], tensors)
        path.write_bytes(data)
        os.truncate(path, len(data) + rows * width // 32 * 34 + 65_536)
        with open_checkpoint(path) as checkpoint:
            return checkpoint.config(), checkpoint.tokenizer_source()

    return run


ARCHS = {"gemma_": "gemma", "gemma2_": "gemma2", "gemma3_": "gemma3"}
TEXT = [(arch, name) for prefix, arch in ARCHS.items() for name in PRESETS if name.startswith(prefix)]


@pytest.mark.parametrize(("arch", "name"), TEXT)
def test_published_sizes(read, arch, name):
    preset = PRESETS[name]
    expected = dataclasses.replace(preset, vision=None, model_type={"gemma3": "gemma3_text"}.get(arch, arch))
    rows = 262_144 if arch == "gemma3" else preset.vocab_size  # the file's rows are the tokenizer's
    expected = dataclasses.replace(expected, vocab_size=rows)
    config, source = read(keys_of(preset, arch), rows, preset.hidden_size)
    assert config == expected
    assert source is None


def test_the_real_twin_lends_what_a_file_leaves_out(read):
    """Gemma 3 4B without its RoPE scaling, Gemma 2 without window and caps: files that exist."""
    preset = PRESETS["gemma3_4b"]
    keys = {k: v for k, v in keys_of(preset, "gemma3").items() if "rope" not in k}
    config, _ = read(keys, 512, preset.hidden_size)
    assert config.rope_scaling_factor == 8.0 and config.rope_theta == 1e6
    preset = PRESETS["gemma2_27b"]
    keys = {k: v for k, v in keys_of(preset, "gemma2").items() if "cap" not in k and "window" not in k}
    config, _ = read(keys, 512, preset.hidden_size)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping, config.sliding_window) == (50.0, 30.0, 4096)
    assert config.query_pre_attn_scalar == 144.0


TINY = GemmaConfig(
    **dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=7, num_attention_heads=2),
    **dict(num_key_value_heads=1, head_dim=16, max_position_embeddings=128, sliding_window=8, layer_pattern="LG"),
    **dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0, rope_theta=1e6),
)


def test_a_size_that_is_not_published(read):
    config, _ = read(keys_of(TINY, "gemma3"))
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (7, 32, 64)
    assert [s.attention[0] for s in config.layers] == list("lllllgl")
    assert config.layers[0].rope_base == 10_000.0 and config.layers[5].rope_base == 1e6
    assert config.query_pre_attn_scalar is None and config.use_qk_norm and config.use_post_norms
    assert config.rms_norm_eps == 1e-6, "a FLOAT32 becomes the decimal it stands for"
    config, _ = read(keys_of(TINY, "gemma2"))
    assert config.layer_pattern == "LG" and config.query_pre_attn_scalar is None and not config.use_qk_norm
    config, _ = read(keys_of(TINY, "gemma"))
    assert config.layer_pattern == "G" and config.sliding_window is None and not config.use_post_norms


def test_what_a_file_may_state_itself(read):
    keys = keys_of(TINY, "gemma3")
    more = {
        "gemma3.attention.sliding_window_pattern": (ARRAY, (BOOL, [1, 1, 0, 1, 1, 1, 0])),
        "gemma3.rope.freq_base_swa": (F32, 5000.0),
        "gemma3.attention.scale": (F32, 168.0**-0.5),
        "gemma3.final_logit_softcapping": (F32, 20.0),
        "gemma3.rope.scaling.type": (STRING, "linear"),
        "gemma3.rope.scaling.factor": (F32, 4.0),
        "tokenizer.ggml.eot_token_id": (U32, 6),
    }
    config, _ = read(keys | more)
    assert config.layer_pattern == "LLGLLLG" and config.rope_local_base_freq == 5000.0
    assert config.query_pre_attn_scalar == pytest.approx(168.0, rel=1e-6)
    assert config.final_logit_softcapping == 20.0 and config.attn_logit_softcapping is None
    assert config.rope_scaling_factor == 4.0 and config.end_token_ids == (1, 6)
    config, _ = read(keys | {"gemma3.attention.sliding_window_pattern": (U32, 3)})
    assert config.layer_pattern == "LLG"
    defaults = {k: v for k, v in keys.items() if not k.endswith(("head_count_kv", "key_length", "value_length"))}
    config, _ = read(defaults)
    assert config.num_key_value_heads == 2 and config.head_dim == 16


def test_a_head_of_its_own_is_untied(read):
    config, _ = read(keys_of(TINY, "gemma3"), extra=[tensor(HEAD, (32, 64), 8, 4096)])
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    ("key", "value", "error", "rule"),
    [
        ("block_count", (F32, 7.0), FormatError, r"block_count: expected a whole number in 1\.\.4096, got FLOAT32"),
        ("block_count", (U32, 10**9), FormatError, "got UINT32 1000000000"),
        ("block_count", None, FormatError, "block_count is missing"),
        ("attention.head_count_kv", (ARRAY, (U32, [1, 1])), FormatError, r"got ARRAY of UINT32 \[2\]"),
        ("attention.head_count_kv", (I32, -1), FormatError, "got INT32 -1"),
        ("attention.value_length", (U32, 8), FormatError, "expected the key length 16, got UINT32 8"),
        ("attention.layer_norm_rms_epsilon", (F32, float("nan")), FormatError, "expected a finite FLOAT32"),
        ("attention.layer_norm_rms_epsilon", (F32, -1.0), ConfigError, r"model\.gguf: .*rms_norm_eps"),
        ("attention.sliding_window", None, FormatError, "sliding_window is missing"),
        ("attention.scale", (F32, 0.0), FormatError, "attention.scale: expected a number in"),
        ("attention.sliding_window_pattern", (ARRAY, (BOOL, [1, 1])), FormatError, "with 7 items"),
        ("rope.freq_base", (U32, 10000), FormatError, "got UINT32 10000"),
        ("rope.scaling.type", (STRING, "yarn"), UnsupportedError, "got 'yarn'"),
    ],
)  # fmt: skip
def test_refused_by_key(read, key, value, error, rule):
    keys = keys_of(TINY, "gemma3")
    keys.pop(f"gemma3.{key}", None)
    with pytest.raises(error, match=rule) as caught:
        read(keys | ({} if value is None else {f"gemma3.{key}": value}))
    assert "model.gguf" in str(caught.value)


@pytest.mark.parametrize(
    ("general", "rule"),
    [
        ({"general.architecture": (STRING, "llama")}, "architecture 'llama'"),
        ({"general.architecture": (STRING, "gemma3n")}, "architecture 'gemma3n'"),
        ({"general.type": (STRING, "adapter")}, "type 'adapter'"),
        ({"split.count": (2, 3)}, "split GGUF"),
    ],
)
def test_other_kinds_of_files(read, general, rule):
    with pytest.raises(UnsupportedError, match=rule):
        read(keys_of(TINY, "gemma3") | general)


def vocabulary(rows: int = 64) -> dict:
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>"] + [f"p{i}" for i in range(rows - 4)]
    types = [3, 3, 3, 2] + [1] * (rows - 4)
    return {
        "tokenizer.ggml.model": (STRING, "llama"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, pieces)),
        "tokenizer.ggml.scores": (ARRAY, (F32, [float(-i) for i in range(rows)])),
        "tokenizer.ggml.token_type": (ARRAY, (I32, types)),
        "tokenizer.ggml.add_bos_token": (BOOL, 1),
    }


def test_vocabulary(read):
    _, source = read(keys_of(TINY, "gemma3") | vocabulary())
    assert source.kind == "gguf" and source.path.name == "model.gguf"
    assert source.pieces[:5] == ["<pad>", "<eos>", "<bos>", "<unk>", "p0"] and len(source.pieces) == 64
    assert source.scores.dtype == np.float32 and source.scores[7] == -7.0
    assert source.types.dtype == np.int32 and source.types[:5].tolist() == [3, 3, 3, 2, 1]
    assert source.special == {"pad": 0, "eos": 1, "bos": 2, "unk": 3} and source.flags == {"add_bos_token": True}


def change(key, index, value):
    keys = vocabulary()
    keys[f"tokenizer.ggml.{key}"][1][1][index] = value
    return keys


@pytest.mark.parametrize(
    ("keys", "error", "rule"),
    [
        (change("tokens", 9, "p0"), FormatError, "duplicate piece 'p0'"),
        (change("tokens", 9, ""), FormatError, "id 9 is empty"),
        (change("scores", 9, float("inf")), FormatError, "not for id 9"),
        (change("token_type", 9, 7), FormatError, r"types 1\.\.6, got 7 for id 9"),
        (change("token_type", 9, 6), FormatError, "id 9 is of type BYTE: expected <0x00>"),
        (vocabulary(63), WeightsMismatch, "embed: expected 63 rows"),
        (vocabulary() | {"tokenizer.ggml.scores": (ARRAY, (0, [1] * 64))}, FormatError, r"got ARRAY of UINT8 \[64\]"),
        (vocabulary() | {"tokenizer.ggml.model": (STRING, "gpt2")}, UnsupportedError, "got 'gpt2'"),
        (vocabulary() | {"tokenizer.ggml.bos_token_id": (U32, 64)}, FormatError, r"in 0\.\.63, got UINT32 64"),
        (vocabulary() | {"tokenizer.ggml.add_bos_token": (U32, 1)}, FormatError, "expected a BOOL, got UINT32 1"),
    ],
)  # fmt: skip
def test_vocabularies_that_lie(read, keys, error, rule):
    with pytest.raises(error, match=rule):
        read(keys_of(TINY, "gemma3") | keys)


def test_a_string_table_that_is_cut(tmp_path):
    """The count is right and the walk is bounded: the last string claims more than the file has."""
    keys = keys_of(TINY, "gemma3") | vocabulary()
    data = build([pair(key, kind, value) for key, (kind, value) in keys.items()])
    at = data.index(b"p59") - 8
    (tmp_path / "x.gguf").write_bytes(data[:at] + struct.pack("<Q", 2**63) + data[at + 8 :])
    with pytest.raises(FormatError, match="item 63 has length 9223372036854775808") as caught:
        open_checkpoint(tmp_path / "x.gguf")
    assert caught.value.offset == at
