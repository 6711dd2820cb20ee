# SPDX-License-Identifier: Apache-2.0
"""The `config.json` of a T5Gemma 2, read and written; called by `hf_config.py`, which is the one to import.

Its sections: `encoder` holds `text_config` and `vision_config` as a Gemma 3 with images does, `decoder` is a text section
of its own. Reading and writing of those sections are `_hf_read.py` and `_hf_write.py`.
"""

from __future__ import annotations

from typing import Any

from gemma import _hf_write as write
from gemma._hf_json import Section
from gemma._hf_read import IGNORED, build, read_text, read_vision
from gemma.config import GemmaConfig, T5Gemma2Config, preset
from gemma.errors import ConfigError

_TEXT = dict(encoder="t5gemma2_text", decoder="t5gemma2_decoder")
_IMAGE_IDS = ("image_token_index", "boi_token_index", "eoi_token_index")
_DROPOUT = ("dropout_rate", "attention_dropout")


def read_t5gemma2(top: Section) -> T5Gemma2Config:
    """Reads the whole file but for keys without a meaning, which the caller passes over."""
    encoder, decoder = top.section("encoder"), top.section("decoder")
    encoder.only("model_type", "t5gemma2_encoder", why="it is the encoder of a T5Gemma 2")
    fields = _text(encoder.section("text_config"), "encoder", encoder) | _images(encoder, top)
    sides = dict(
        encoder=build(encoder, GemmaConfig, fields), decoder=build(decoder, GemmaConfig, _text(decoder, "decoder", top))
    )
    decoder.finish(IGNORED)
    for key in ("text_config", "vision_config"):
        encoder.take(key)
    encoder.finish(IGNORED)
    for key in ("encoder", "decoder"):
        top.take(key)
    for name in _DROPOUT:
        top.only(name, 0, 0.0, why="no Gemma checkpoint uses dropout")
    rows = top.take("vocab_size", sides["decoder"].vocab_size)
    if rows != sides["decoder"].vocab_size:
        raise top.error("vocab_size", f"expected {sides['decoder'].vocab_size} (decoder.vocab_size), got {rows!r}")
    return build(top, T5Gemma2Config, sides | dict(pad_token_id=sides["decoder"].pad_token_id))


def _text(section: Section, side: str, upper: Section) -> dict[str, Any]:
    section.only("model_type", _TEXT[side], why=f"it is the {side} of a T5Gemma 2")
    fields = read_text(section, "gemma3_text", upper)
    if fields["model_type"] == "gemma3_text":
        fields["model_type"] = "t5gemma2"
    if side == "encoder":
        section.finish(IGNORED)
    return fields


def _images(encoder: Section, top: Section) -> dict[str, Any]:
    default = preset("t5gemma2_270m_270m").encoder
    found: dict[str, Any] = {}
    for name in _IMAGE_IDS:
        outer = top.whole(name, None, 0, 2**24 - 1) if top.has(name) else None
        value = encoder.whole(name, getattr(default, name) if outer is None else outer, 0, 2**24 - 1)
        if outer is not None and outer != value:
            raise top.error(name, f"expected {value} (encoder.{name}), got {outer}")
        found[name] = value
    found["mm_tokens_per_image"] = encoder.whole("mm_tokens_per_image", default.mm_tokens_per_image, 1, 2**16)
    if encoder.has("vision_config"):
        found["vision"] = read_vision(encoder.section("vision_config"), head=False)
    return found


def write_t5gemma2(config: T5Gemma2Config) -> dict[str, Any]:
    """The dictionary that transformers 5 and `read_t5gemma2` read."""
    sides = {}
    for name in ("encoder", "decoder"):
        if write.text_kind(getattr(config, name)) != "gemma3_text":
            raise ConfigError(f"{name}: both sides of a T5Gemma 2 have Gemma 3 layers")
        side = write.write_text(getattr(config, name), "gemma3_text") | dict(model_type=_TEXT[name], dropout_rate=0.0)
        side.pop("use_bidirectional_attention")
        sides[name] = side
    if config.encoder.vision is None:
        raise ConfigError("encoder.vision: expected a tower; transformers has no T5Gemma 2 without one")
    ids = {name: getattr(config.encoder, name) for name in _IMAGE_IDS}
    special = {name: sides["decoder"][name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    tied = dict(tie_word_embeddings=config.decoder.tie_word_embeddings)
    encoder = dict(model_type="t5gemma2_encoder", mm_tokens_per_image=config.encoder.mm_tokens_per_image) | ids | tied
    encoder |= dict(text_config=sides["encoder"], vision_config=write.write_vision(config.encoder.vision))
    top = dict(architectures=["T5Gemma2ForConditionalGeneration"], model_type="t5gemma2", is_encoder_decoder=True)
    top |= dict(vocab_size=config.vocab_size, dropout_rate=0.0, classifier_dropout_rate=0.0, attention_dropout=0.0)
    top |= {name: ids[name] for name in ("image_token_index", "eoi_token_index")} | special | tied
    return top | dict(pad_token_id=config.pad_token_id, encoder=encoder, decoder=sides["decoder"])
