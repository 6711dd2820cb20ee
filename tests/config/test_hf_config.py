# SPDX-License-Identifier: Apache-2.0
"""`config.json` of every generation, in and out; Hugging Face's own classes are the oracle of what is written."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hf_tiny_oracles import BUILD
from published import PUBLISHED
from transformers import AutoConfig

from gemma.config import (
    PRESETS,
    GemmaConfig,
    PaliGemmaConfig,
    SiglipVisionConfig,
    T5Gemma2Config,
    T5GemmaConfig,
    text_only,
)
from gemma.errors import ConfigError
from gemma.hf_config import read_config, write_config
from gemma.testing import tiny_config

ORACLES = ("gemma1", "gemma2", "gemma3_text", "embeddinggemma", "gemma3")
ORACLES += ("paligemma1", "paligemma2", "t5gemma", "t5gemma_unbalanced", "t5gemma2", "siglip")

SAME = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
SAME += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "bos_token_id", "pad_token_id")
TOWER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")


def comparable(config):
    """Without what a file of another time cannot know: image tokens and projection noted in the tower."""
    if isinstance(config, PaliGemmaConfig):
        return dataclasses.replace(
            config, vision_config=dataclasses.replace(config.vision_config, num_image_tokens=None)
        )
    return config


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_the_presets(name, tmp_path):
    preset, values = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    for source in (values, tmp_path, tmp_path / "config.json", str(tmp_path)):
        assert comparable(read_config(source)) == PRESETS[preset]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_writing(name):
    values = json.loads(json.dumps(write_config(PRESETS[name])))
    assert read_config(values) == PRESETS[name]
    assert '"gemmakit"' not in json.dumps(values)  # the presets need no key of our own


def hf_of(values: dict):
    return AutoConfig.for_model(**values)


def agree(theirs, ours: GemmaConfig) -> None:
    """One decoder of transformers, loaded from our file, has our numbers."""
    for name in SAME:
        assert getattr(theirs, name) == getattr(ours, name), name
    eos = theirs.eos_token_id
    assert (tuple(eos) if isinstance(eos, list) else (eos,)) == ours.end_token_ids
    if not hasattr(theirs, "layer_types"):  # Gemma 1
        assert theirs.rope_parameters["rope_theta"] == ours.rope_theta and theirs.hidden_act == "gelu_pytorch_tanh"
        return
    assert theirs.hidden_activation == "gelu_pytorch_tanh"
    assert (theirs.attn_logit_softcapping, theirs.final_logit_softcapping) == (
        ours.attn_logit_softcapping,
        ours.final_logit_softcapping,
    )
    keyed = "full_attention" in theirs.rope_parameters
    for spec, kind in zip(ours.layers, theirs.layer_types, strict=True):
        assert {"local": "sliding_attention", "global": "full_attention"}[spec.attention] == kind
        rope = theirs.rope_parameters[kind] if keyed else theirs.rope_parameters
        assert rope["rope_theta"] == spec.rope_base and rope.get("factor", 1.0) == spec.rope_scale
        assert theirs.query_pre_attn_scalar**-0.5 == spec.query_scale
        if spec.attention == "local":
            seen = spec.window // 2 + 1 if spec.bidirectional else spec.window
            assert theirs.sliding_window == seen


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_reads_what_we_write(name):
    ours = PRESETS[name]
    theirs = hf_of(write_config(ours))
    if isinstance(ours, GemmaConfig) and ours.is_classic:  # of Gemma 3n and 4: test_hf_config_newer.py
        agree(theirs.text_config if ours.vision else theirs, ours)
    if isinstance(ours, T5Gemma2Config):
        agree(theirs.encoder.text_config, ours.encoder)
        agree(theirs.decoder, ours.decoder)
        assert theirs.eoi_token_index == theirs.encoder.eoi_token_index == 256000
    elif isinstance(ours, T5GemmaConfig):
        agree(theirs.encoder, ours.encoder)
        agree(theirs.decoder, ours.decoder)
        assert theirs.decoder.cross_attention_hidden_size == ours.encoder.hidden_size
    if isinstance(ours, PaliGemmaConfig):
        agree(theirs.text_config, ours.text_config)
        assert theirs.image_token_index == 257152 and theirs.projection_dim == ours.text_config.hidden_size
    vision = getattr(ours, "vision", getattr(ours, "vision_config", None))
    if vision is not None:
        for field in TOWER:
            assert getattr(theirs.vision_config, field) == getattr(vision, field)
        assert theirs.vision_config.vision_use_head is False
    again = read_config(theirs.to_dict())  # and what transformers makes of it is still the preset
    assert comparable(again) == ours


@pytest.mark.parametrize("name", ORACLES)
def test_oracle_configurations(name):
    """Each tiny oracle: what transformers dumps, we read; what we write of it, transformers reads as the same."""
    _, theirs = BUILD[name]()
    ours = read_config(theirs.to_dict())
    again = hf_of(write_config(ours))
    assert read_config(again.to_dict()) == ours
    if isinstance(ours, SiglipVisionConfig):
        assert ours == SiglipVisionConfig(48, 80, 2, 4, 3, 56, 14)
    elif isinstance(ours, T5GemmaConfig):
        for side in ("encoder", "decoder"):
            section = getattr(theirs, side)
            agree(getattr(section, "text_config", section), getattr(ours, side))
            assert getattr(ours, side).sliding_window == 5
    elif isinstance(ours, GemmaConfig):
        agree(theirs.text_config if ours.vision else theirs, ours)
        assert ours.use_qk_norm == (name not in ("gemma1", "gemma2")) and ours.use_post_norms == (name != "gemma1")
    else:
        assert ours.image_token_index == 310 and ours.text_config.layer_pattern == "G"
        assert not ours.text_config.use_bidirectional_attention  # the prefix decides, not the flag


def test_paligemma_window_only_if_asked():
    _, theirs = BUILD["paligemma2"]()
    values = theirs.to_dict()
    assert {s.window for s in read_config(values).text_config.layers} == {None}
    kept = read_config(values, paligemma_window=True)
    agree(theirs.text_config, kept.text_config)
    assert read_config(write_config(kept), paligemma_window=True) == kept


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(eos_token_id=(1, 106)),
        dict(num_hidden_layers=1),
        dict(tie_word_embeddings=False),
        dict(flax_vocab_rows=384, transpose_gating_einsum=True),
        dict(flax_vocab_rows=384, transpose_gating_einsum=False),
        dict(query_pre_attn_scalar=24.0),
        dict(model_type="gemma-of-mine"),
    ],
    ids=str,
)
def test_tiny_configurations_survive_writing(family, changes):
    config = tiny_config(family, **changes)
    values = json.loads(json.dumps(write_config(config)))
    assert read_config(values) == config
    agree(hf_of(values), config)


@pytest.mark.parametrize(
    "pattern, window", [("L", 7), ("LLG", 5), ("GL", 3), ("G", None), ("LLLLLLG", 2), ("GGLGGGG", 3)]
)
@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_any_layer_pattern_survives(family, pattern, window):
    config = tiny_config(family, layer_pattern=pattern, sliding_window=window, num_hidden_layers=7)
    values = write_config(config)
    assert read_config(values) == config
    del values["layer_types"]
    if "sliding_window_pattern" in values:
        values.pop("gemmakit", None)
        assert read_config(values).layers == config.layers


def test_shortest_pattern_of_layer_types():
    values = write_config(tiny_config("gemma3", layer_pattern="LG"))
    values.pop("gemmakit", None), values.pop("sliding_window_pattern")
    assert read_config(values).layer_pattern == "LG"


def test_text_only_of_a_multimodal_model_survives():
    config = text_only(PRESETS["gemma3_4b"])
    values = write_config(config)
    assert values["model_type"] == "gemma3_text" and read_config(values) == config


def test_new_spelling_alone():
    """A file of transformers 5 has only `rope_parameters`; older keys next to it must agree with it."""
    values = write_config(PRESETS["gemma3_4b"])
    text = values["text_config"]
    for key in ("rope_theta", "rope_scaling", "rope_local_base_freq"):
        del text[key]
    assert read_config(values) == PRESETS["gemma3_4b"]
    text["rope_local_base_freq"] = 5e4
    with pytest.raises(ConfigError, match=r"text_config.rope_local_base_freq: 50000.0 here, but 10000.0 in rope_param"):
        read_config(values)


def test_special_ids_at_the_top_win():
    """Instruction-tuned Gemma 3 files have the set of end tokens at the top only."""
    values = write_config(PRESETS["gemma3_4b"]) | dict(eos_token_id=[1, 106])
    config = read_config(values)
    assert config.eos_token_id == (1, 106) and read_config(write_config(config)) == config


def test_bookkeeping_changes_nothing_and_code_is_never_run(tmp_path):
    values = write_config(PRESETS["gemma3_1b"]) | dict(
        auto_map={"AutoConfig": "evil--config.Config"}, torch_dtype="float16", use_cache=False, quantization_config={}
    )
    assert read_config(values) == PRESETS["gemma3_1b"]


@pytest.mark.parametrize(
    "changes, what",
    [
        (dict(query_pre_attn_scalar=18.5), "query_pre_attn_scalar: transformers stores a whole number, got 18.5"),
        (dict(use_post_norms=False), "use_qk_norm without use_post_norms"),
        (
            dict(rope_local_base_freq=None, rope_theta=1e6, use_qk_norm=False),
            "cannot express rope_scaling_factor|expected 1",
        ),
    ],
)
def test_what_no_class_can_express(changes, what):
    with pytest.raises(ConfigError, match=what):
        write_config(tiny_config("gemma3", **changes))


@pytest.mark.parametrize(
    "family, changes, field",
    [
        ("gemma", dict(final_logit_softcapping=30.0), "final_logit_softcapping .30.0, not None"),
        ("gemma", dict(query_pre_attn_scalar=18.0), "query_pre_attn_scalar"),
        ("gemma", dict(layer_pattern="LG", sliding_window=5), "layer_pattern .'LG', not 'G'.*sliding_window"),
        ("gemma2", dict(rope_local_base_freq=1e5), "rope_local_base_freq"),
    ],
)
def test_nothing_that_computes_hides_in_our_own_key(family, changes, field):
    """transformers passes over "gemmakit", so it may hold only what changes no number."""
    with pytest.raises(ConfigError, match=f"cannot express .*{field}"):
        write_config(tiny_config(family, **changes))
