# SPDX-License-Identifier: Apache-2.0
"""Configurations that lie, overflow or hide something: one error each, with the file and the field, at once."""

from __future__ import annotations

import copy
import json
import tracemalloc

import pytest

from gemma.config import PRESETS
from gemma.errors import CheckpointNotFound, ConfigError, FormatError, GemmaError
from gemma.hf_config import read_config, write_config
from gemma.testing import tiny_config

NAN, INF = float("nan"), float("inf")

# what is changed in a Gemma 3 text file -> what the message says after the file's name
FIELDS = [
    (dict(use_time_machine=True), "unknown key use_time_machine"),
    (dict(rope_typo=None), "unknown key rope_typo"),
    (dict(hidden_size=-1), "hidden_size: expected a number in 1"),
    (dict(hidden_size=True), "hidden_size: expected a number"),
    (dict(hidden_size=72.0), "hidden_size: expected a whole number, got 72.0"),
    (dict(hidden_size="72"), "hidden_size: expected a number"),
    (dict(hidden_size=[72]), "hidden_size: expected a number"),
    (
        dict(num_hidden_layers=10**9, layer_types=None),
        "num_hidden_layers: expected a number in 1..4096, got 1000000000",
    ),
    (dict(num_hidden_layers=0, layer_types=None), "num_hidden_layers"),
    (dict(num_attention_heads=-4), "num_attention_heads"),
    (dict(num_attention_heads=5), "num_attention_heads 5 is not a multiple"),
    (dict(num_key_value_heads=3), "is not a multiple of num_key_value_heads 3"),
    (dict(head_dim=25, query_pre_attn_scalar=18), "head_dim: expected an even number"),
    (dict(vocab_size=10**12), "vocab_size"),
    (dict(rms_norm_eps=NAN), "rms_norm_eps: expected a number in 1e-12..1, got nan"),
    (dict(rms_norm_eps=0.0), "rms_norm_eps"),
    (dict(sliding_window=0), "sliding_window"),
    (dict(sliding_window=None), "sliding_window must be set"),
    (dict(sliding_window_pattern=0, layer_types=None), "sliding_window_pattern: expected a whole number in 1..4096"),
    (dict(sliding_window_pattern=True), "sliding_window_pattern"),
    (dict(layer_types=["full_attention"] * 6), "layer_types: expected 7 entries .num_hidden_layers., got 6"),
    (dict(layer_types=["full_attention"] * 6 + ["chunked_attention"]), "layer_types: expected a list of"),
    (dict(layer_types="full_attention"), "layer_types: expected a list"),
    (dict(layer_types=[7] * 7), "layer_types: expected a list"),
    (dict(hidden_activation="silu"), "hidden_activation: expected 'gelu_pytorch_tanh'"),
    (dict(hidden_act="relu"), "hidden_act: expected"),
    (dict(attention_bias=True), "attention_bias: .*got True"),
    (dict(attention_dropout=0.1), "attention_dropout: .*got 0.1"),
    (dict(tie_word_embeddings=1), "tie_word_embeddings: expected true or false, got 1"),
    (dict(use_bidirectional_attention="vision"), "use_bidirectional_attention: expected true or false"),
    (dict(eos_token_id=-1), "eos_token_id: expected a token id"),
    (dict(eos_token_id=[]), "eos_token_id: expected a token id"),
    (dict(eos_token_id=[1, True]), "eos_token_id: expected a token id"),
    (dict(bos_token_id="<bos>"), "bos_token_id: expected a token id"),
    (dict(pad_token_id=2**40), "pad_token_id: expected a token id"),
    (dict(query_pre_attn_scalar=0), "query_pre_attn_scalar"),
    (dict(query_pre_attn_scalar=INF), "query_pre_attn_scalar"),
    (dict(final_logit_softcapping=-30.0), "final_logit_softcapping"),
    (dict(final_logit_softcapping=NAN), "final_logit_softcapping"),
    (dict(model_type="gemma9"), "model_type: expected one of gemma, gemma2, gemma3_text, .*got 'gemma9'"),
    (dict(model_type=None), "model_type: expected one of"),
    (dict(model_type=["gemma"]), "model_type: expected one of"),
    (dict(rope_parameters=None, rope_theta=NAN), "rope_theta: expected a number in 1..1e.12, got nan"),
    (dict(rope_parameters=None, rope_theta=-1.0), "rope_theta"),
    (dict(rope_parameters=None, rope_local_base_freq="1e4"), "rope_local_base_freq"),
    (
        dict(rope_parameters=None, rope_scaling=dict(rope_type="yarn", factor=8.0)),
        "rope_scaling.rope_type: expected 'def",
    ),
    (dict(rope_parameters=None, rope_scaling=dict(rope_type="linear")), "rope_scaling.factor: missing"),
    (
        dict(rope_parameters=None, rope_scaling=dict(rope_type="linear", factor=0.0)),
        "rope_scaling_factor: expected a num",
    ),
    (
        dict(rope_parameters=None, rope_scaling=dict(type="linear", factor=NAN)),
        "rope_scaling_factor: expected a number",
    ),
    (dict(rope_parameters=None, rope_scaling=dict(factor=8.0, beta=1)), "unknown key rope_scaling.beta"),
    (dict(rope_parameters=None, rope_scaling="linear"), "rope_scaling: expected a JSON object, got 'linear'"),
    (
        dict(rope_parameters=None, rope_scaling=dict(factor=8.0, partial_rotary_factor=0.25)),
        "partial_rotary_factor: exp",
    ),
    (dict(rope_theta=5.0), "rope_theta: 5.0 here, but 1000000.0 in rope_parameters"),
    (dict(rope_parameters=dict(rope_theta=1e6)), "unknown key rope_parameters.rope_theta"),
    (dict(gemmakit=dict(surprise=1)), "unknown key gemmakit.surprise"),
    (dict(gemmakit=dict(layer_pattern="G")), "gemmakit.layer_pattern: expected the layers of layer_types"),
    (dict(gemmakit=dict(transpose_gating_einsum=1)), "gemmakit.transpose_gating_einsum: expected true or false"),
    (dict(gemmakit=dict(flax_vocab_rows=-1)), "flax_vocab_rows: expected a number"),
]


def values_of(**changes):
    return write_config(tiny_config("gemma3")) | changes


@pytest.mark.parametrize("changes, what", FIELDS, ids=lambda v: str(v)[:60])
def test_fields(changes, what, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values_of(**changes)))
    with pytest.raises(ConfigError, match=what) as caught:
        read_config(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError):
        read_config(values_of(**changes))


def nested(name: str, place: tuple[str, ...], key: str, value):
    values = copy.deepcopy(write_config(PRESETS[name]))
    target = values
    for step in place:
        target = target[step]
    target[key] = value
    return values


NESTED = [
    ("gemma3_4b", (), "text_config", None, "text_config: missing; expected a JSON object"),
    ("gemma3_4b", (), "text_config", [], "text_config: expected a JSON object, got"),
    ("gemma3_4b", (), "vision_config", None, "vision_config: missing"),
    ("gemma3_4b", (), "mm_tokens_per_image", 0, "mm_tokens_per_image: expected a whole number"),
    ("gemma3_4b", (), "image_token_index", -5, "image_token_index: expected a whole number"),
    ("gemma3_4b", ("text_config",), "altup_num_inputs", 4, "unknown key text_config.altup_num_inputs"),
    ("gemma3_4b", ("text_config",), "model_type", "gemma2", "text_config.model_type: expected 'gemma3_text'"),
    ("gemma3_4b", ("text_config",), "hidden_size", 0, "text_config: hidden_size: expected a number"),
    (
        "gemma3_4b",
        ("text_config", "rope_parameters", "full_attention"),
        "rope_type",
        "llama3",
        "full_attention.rope_type",
    ),
    ("gemma3_4b", ("text_config", "rope_parameters", "sliding_attention"), "factor", 2.0, None),
    ("gemma3_4b", ("vision_config",), "hidden_size", None, "vision_config.hidden_size: missing"),
    (
        "gemma3_4b",
        ("vision_config",),
        "num_attention_heads",
        7,
        "vision_config: hidden_size 1152 is not a multiple of 7",
    ),
    (
        "gemma3_4b",
        ("vision_config",),
        "image_size",
        900,
        "vision_config: image_size 900 is not a multiple of patch_size",
    ),
    ("gemma3_4b", ("vision_config",), "hidden_act", "gelu", "vision_config.hidden_act: expected"),
    ("gemma3_4b", ("vision_config",), "model_type", "clip_vision_model", "vision_config.model_type: expected 'siglip"),
    (
        "paligemma2_3b_224",
        ("text_config",),
        "model_type",
        "llama",
        "text_config.model_type: expected 'gemma' or 'gemma2'",
    ),
    ("paligemma2_3b_224", ("text_config",), "num_image_tokens", 9, "text_config.num_image_tokens: expected 256"),
    (
        "paligemma2_3b_224",
        (),
        "projection_dim",
        2048,
        "projection_dim: expected 2304 .text_config.hidden_size., got 2048",
    ),
    (
        "t5gemma_9b_2b",
        ("decoder",),
        "cross_attention_hidden_size",
        1,
        "decoder.cross_attention_hidden_size: expected 3584",
    ),
    ("t5gemma_9b_2b", (), "vocab_size", 7, "vocab_size: expected 256000 .decoder.vocab_size., got 7"),
    ("t5gemma_9b_2b", (), "dropout_rate", 0.1, "dropout_rate: expected 0"),
    ("t5gemma_9b_2b", ("encoder",), "rope_scaling", dict(type="linear", factor=2.0), "encoder.rope_scaling"),
    ("gemma2_2b", (), "rope_scaling", dict(type="linear", factor=2.0), "rope_scaling"),
    ("gemma2_2b", (), "sliding_window_size", 2048, "sliding_window_size: expected the value of sliding_window 4096"),
    ("gemma_2b", (), "sliding_window", 4096, "unknown key sliding_window"),
]


@pytest.mark.parametrize("name, place, key, value, what", NESTED)
def test_nested_fields(name, place, key, value, what):
    values = nested(name, place, key, value)
    if what is None:  # a factor without "linear" has no effect, as in transformers
        assert read_config(values) == PRESETS[name]
        return
    with pytest.raises(ConfigError, match=what):
        read_config(values)


FILES = {
    "empty": (b"", "not valid JSON"),
    "cut": (b'{"model_type": "gemma', "not valid JSON"),
    "trailing": (b'{"model_type": "gemma"} x', "not valid JSON"),
    "a list": (b"[1]", "expected a JSON object"),
    "a number": (b"7", "expected a JSON object"),
    "not UTF-8": (b'{"model_type": "\xff"}', "expected UTF-8"),
    "UTF-16": ('{"model_type": "gemma"}'.encode("utf-16"), "expected UTF-8"),
    "twice": (b'{"model_type": "gemma", "model_type": "gemma2"}', "key 'model_type' appears twice"),
    "twice below": (b'{"text_config": {"a": 1, "a": 2}}', "key 'a' appears twice"),
    "deep": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested at most 16 deep"),
    "deep, open": (b'{"a":' * 100_000, "nested at most 16 deep"),
    "long": (b'{"a": "' + b"x" * 2_000_000 + b'"}', "of at most 1048576 bytes"),
    "a long number": (b'{"hidden_size": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    "a binary": (bytes(range(256)) * 16, "UTF-8|JSON"),
}


@pytest.mark.parametrize("name", FILES)
def test_files(name, tmp_path):
    raw, what = FILES[name]
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=what) as caught:
            read_config(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.path == str(path) and len(str(caught.value)) < 500
    assert peak < 16e6  # of a file of 2 MB at most 1 MB is read, a few times over as text and as values


@pytest.mark.parametrize("place", ["nowhere/config.json", "nowhere"])
def test_no_such_file(place, tmp_path):
    with pytest.raises(CheckpointNotFound, match="no such file"):
        read_config(tmp_path / place)


def test_strings_with_brackets_are_not_depth(tmp_path):
    values = values_of(_name_or_path='a "quoted\\" [[[[[[[[[[[[[[[[[[[[{{{{{{{{{{{{{{{{{{{{')
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path) == tiny_config("gemma3")


@pytest.mark.parametrize("source", [{1: 2}, {"model_type": "gemma", 7: 1}, {}])
def test_odd_dictionaries(source):
    with pytest.raises(ConfigError):
        read_config(source)


def test_every_key_is_accounted_for():
    """Each key of a written file, damaged in turn, is noticed or is one of the allow-list."""
    from gemma._hf_read import IGNORED

    unnoticed = []
    for name in ("gemma_2b", "gemma2_2b", "gemma3_1b"):
        values = write_config(PRESETS[name])
        for key in values:
            try:
                same = read_config(values | {key: {"wrong": ["type"]}}) == PRESETS[name]
            except GemmaError:
                continue
            assert same
            unnoticed.append(key)
    assert set(unnoticed) <= IGNORED, unnoticed
