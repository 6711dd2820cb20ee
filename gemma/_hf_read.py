# SPDX-License-Identifier: Apache-2.0
"""The readers behind `hf_config.read_config`: one function per `model_type`, every key of the file accounted for.

Bounded parsing is in `_hf_json.py`, writing in `_hf_write.py`. Absent keys take the defaults of the configuration
classes of transformers 5. `auto_map` is never followed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gemma._hf_json import Section
from gemma.config import PRESETS, GemmaConfig, PaliGemmaConfig, SiglipVisionConfig, T5GemmaConfig
from gemma.errors import ConfigError

AnyConfig = GemmaConfig | PaliGemmaConfig | T5GemmaConfig | SiglipVisionConfig

# Keys that change nothing that is computed: bookkeeping, and the generation settings that transformers 4 wrote here.
_BOOKKEEPING = """
    architectures auto_map torch_dtype dtype transformers_version use_cache initializer_range initializer_factor
    cache_implementation _name_or_path _commit_hash _attn_implementation _attn_implementation_autoset
    attn_implementation quantization quantization_config compression_config model_type id2label label2id
    num_labels problem_type return_dict output_hidden_states output_attentions output_scores
    chunk_size_feed_forward is_encoder_decoder is_decoder add_cross_attention torchscript pruned_heads
    finetuning_task task_specific_params tokenizer_class prefix bad_words_ids begin_suppress_tokens
    suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length
    min_length num_beam_groups num_beams num_return_sequences remove_invalid_values repetition_penalty
    return_dict_in_generate sep_token_id decoder_start_token_id temperature tf_legacy_loss tie_encoder_decoder
    top_k top_p typical_p use_bfloat16 pretraining_tp unsloth_fixed unsloth_version projector_hidden_act
    _vocab_size yes_token_index no_token_index classifier_dropout_rate
"""
IGNORED = frozenset(_BOOKKEEPING.split())
OWN_KEY = "gemmakit"  # our key for what config.json has no word for
OWN_FIELDS = (
    "flax_vocab_rows",
    "transpose_gating_einsum",
    "layer_pattern",
    "sliding_window",
    "query_pre_attn_scalar",
    "rope_local_base_freq",
    "model_type",
    "embedding_dense",
)
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "attention_bias",
    "attention_dropout",
)
_ID_LIMIT = 2**24


def _defaults(kind: str) -> GemmaConfig:
    """The class defaults of transformers, which old files rely on: theirs of Gemma 2 and 3 are Gemma 2 2B's sizes."""
    if kind == "gemma":
        return GemmaConfig()
    two = PRESETS["gemma2_2b"]
    if kind != "gemma3_text":
        return two
    sizes = {name: getattr(two, name) for name in (*SIZES, "sliding_window")}
    three = PRESETS["gemma3_4b"]
    sizes |= dict(vocab_size=three.vocab_size, max_position_embeddings=three.max_position_embeddings)
    return dataclasses.replace(three, vision=None, rope_scaling_factor=1.0, model_type=kind, **sizes)


def build(section: Section, cls: type, fields: Mapping[str, Any]):
    """Constructs a configuration; what its own checks refuse is reported with the file and the place in it."""
    try:
        return cls(**fields)
    except ConfigError as error:
        raise section.error("", str(error).removeprefix(f"{cls.__name__}.")) from None


def ids(section: Section, upper: Section | None, default: GemmaConfig) -> dict[str, Any]:
    """Special ids; those at the top of a nested file win, because generation reads them there."""
    found = {}
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        for place in (section, upper):
            value = None if place is None else place.take(name)
            if value is None:
                continue
            many = list(value) if name == "eos_token_id" and isinstance(value, (list, tuple)) else [value]
            if not 1 <= len(many) <= 64 or any(type(i) is not int or not 0 <= i < _ID_LIMIT for i in many):
                raise place.error(name, f"expected a token id in 0..{_ID_LIMIT - 1}, got {str(value)[:80]!r}")
            found[name] = value if type(value) is int else tuple(many)
        found.setdefault(name, getattr(default, name))
    return found


def activation(section: Section, kind: str) -> None:
    # Early Gemma 1 files say "gelu" and mean the tanh form.
    names = ("gelu_pytorch_tanh", "gelu_tanh", *(("gelu",) if kind == "gemma" else ()))
    for key in ("hidden_activation", "hidden_act"):
        section.only(key, *names, why="no Gemma uses another activation")


def rope(section: Section, kind: str, default: GemmaConfig) -> dict[str, Any]:
    """RoPE bases and the scale of global layers, from either spelling; when both are there they must agree."""
    theta, local = section.take("rope_theta"), section.take("rope_local_base_freq") if kind == "gemma3_text" else None
    factor = _scaling(section.section("rope_scaling"), theta=False)[1] if section.has("rope_scaling") else None
    section.take("rope_scaling")
    if section.has("rope_parameters"):
        new = section.section("rope_parameters")
        if kind == "gemma3_text":
            kinds = ("full_attention", "sliding_attention")
            (theta2, factor2), (local2, local_factor) = (
                _scaling(new.section(name), theta=True) if new.has(name) else (None, None) for name in kinds
            )
            for name in kinds:
                new.take(name)
            new.finish(())
            if local_factor not in (None, 1, 1.0):
                raise new.error("sliding_attention.factor", f"expected 1 on local layers, got {local_factor!r}")
            local = agree(section, "rope_local_base_freq", local, local2)
        else:
            theta2, factor2 = _scaling(new, theta=True)
        theta, factor = agree(section, "rope_theta", theta, theta2), agree(section, "rope_scaling", factor, factor2)
    if kind in ("gemma2", "t5_gemma_module") and factor not in (None, 1, 1.0):
        raise section.error("rope_scaling.factor", f"expected 1: {kind} has no scaled positions; got {factor!r}")
    return dict(
        rope_theta=default.rope_theta if theta is None else theta,
        rope_local_base_freq=default.rope_local_base_freq if local is None else local,
        rope_scaling_factor=1.0 if factor is None else factor,
    )


def agree(section: Section, key: str, old: Any, new: Any) -> Any:
    if old is not None and new is not None and old != new:
        raise section.error(key, f"{old!r} here, but {new!r} in rope_parameters; expected one value")
    return old if new is None else new


def _scaling(section: Section, *, theta: bool) -> tuple[Any, Any]:
    """(base, factor) of a `rope_scaling` or one entry of `rope_parameters`; only plain and linear scaling exist."""
    kind = section.take("rope_type")
    kind = section.take("type", kind) if kind is None else kind
    section.only("type", kind, why="it contradicts rope_type")
    if kind not in (None, "default", "linear"):
        raise section.error("rope_type", f"expected 'default' or 'linear', got {kind!r}")
    section.only("partial_rotary_factor", 1, 1.0, why="the whole head rotates in Gemma 1 to 3")
    base = section.take("rope_theta") if theta else None
    factor = section.take("factor")
    if kind == "linear" and factor is None:
        raise section.error("factor", "missing; linear scaling needs a number")
    section.finish(())
    return base, factor if kind == "linear" else None


def pattern(section: Section, kind: str, layers: Any, default: str) -> str:
    """`layer_pattern`: the generation's own pattern if it gives these layer types, else the shortest that does."""
    period = None
    for key in ("_sliding_window_pattern", "sliding_window_pattern"):
        period = section.whole(key, period, 1, 4096) if kind == "gemma3_text" else None
    natural = default if period is None else "L" * (period - 1) + "G"
    types = section.take("layer_types")
    if types is None:
        return natural
    words = {"sliding_attention": "L", "full_attention": "G"}
    if not isinstance(types, (list, tuple)) or any(not isinstance(t, str) or t not in words for t in types):
        raise section.error("layer_types", f"expected a list of {' and '.join(words)}, got {str(types)[:80]!r}")
    if len(types) != layers or not types:
        raise section.error("layer_types", f"expected {layers} entries (num_hidden_layers), got {len(types)}")
    letters = "".join(words[t] for t in types)
    return natural if _repeats(natural, letters) else shortest_pattern(letters)


def _repeats(pattern: str, letters: str) -> bool:
    return all(letter == pattern[at % len(pattern)] for at, letter in enumerate(letters))


def shortest_pattern(letters: str) -> str:
    """The shortest beginning that, repeated, gives all of "LLGLLGL": "LLG"."""
    return next(letters[:n] for n in range(1, len(letters) + 1) if _repeats(letters[:n], letters))


def _jax_facts(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What only the JAX checkpoints know, from the preset of the same sizes; `OWN_KEY` overrides it."""
    known = [side for c in PRESETS.values() for side in _decoders(c)]
    rows = next((c.flax_vocab_rows for c in known if c.vocab_size == fields["vocab_size"]), None)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers")
    turned = kind == "gemma3_text"
    for c in known:
        if c.use_qk_norm == (kind == "gemma3_text") and all(getattr(c, name) == fields[name] for name in sizes):
            turned = c.transpose_gating_einsum
    return dict(flax_vocab_rows=rows, transpose_gating_einsum=turned)


def _decoders(config: Any) -> tuple[GemmaConfig, ...]:
    if isinstance(config, T5GemmaConfig):
        return config.encoder, config.decoder
    return (config.text_config if isinstance(config, PaliGemmaConfig) else config,)


def read_text(section: Section, kind: str, upper: Section | None = None, *, prefix_lm: bool = False) -> dict[str, Any]:
    """The fields of a GemmaConfig from one text section, which is used up; the caller adds what is above it.

    Args:
      section: the section, without its `model_type`.
      kind: "gemma", "gemma2", "gemma3_text" or "t5_gemma_module".
      upper: the section around it, whose special ids and tie count first.
      prefix_lm: a PaliGemma decoder: its own causal flag is void, the prefix decides.
    """
    default = _defaults(kind)
    fields: dict[str, Any] = {name: section.take(name, getattr(default, name)) for name in SIZES}
    fields |= dict(model_type=kind, use_post_norms=kind != "gemma", use_qk_norm=kind == "gemma3_text")
    fields |= ids(section, upper, default) | rope(section, kind, default)
    activation(section, kind)
    tie = section.flag("tie_word_embeddings", True)
    fields["tie_word_embeddings"] = tie if upper is None else upper.flag("tie_word_embeddings", tie)
    both_ways = section.flag("use_bidirectional_attention", False) and not prefix_lm
    fields["use_bidirectional_attention"] = both_ways
    section.only("dropout_rate", 0, 0.0, why="no Gemma checkpoint uses dropout")
    if kind != "gemma":
        fields |= _gemma2_fields(section, kind, fields, default)
    own = section.section(OWN_KEY) if section.has(OWN_KEY) else None
    fields |= _jax_facts(kind, fields) | ({} if own is None else own_fields(own, fields))
    return fields


def _gemma2_fields(section: Section, kind: str, fields: Mapping[str, Any], default: GemmaConfig) -> dict[str, Any]:
    """What Gemma 2 brought: soft-caps (null is none, absent is the generation's), query scale, local layers."""
    found: dict[str, Any] = {}
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        found[name] = section.nullable(name, getattr(default, name))
    scalar = section.take("query_pre_attn_scalar", default.head_dim)
    found["query_pre_attn_scalar"] = None if scalar == fields["head_dim"] else scalar
    old_name = section.take("sliding_window_size")  # the first Gemma 2 files have both
    window = section.nullable("sliding_window", default.sliding_window if old_name is None else old_name)
    if old_name is not None and old_name != window:
        raise section.error("sliding_window_size", f"expected the value of sliding_window {window!r}, got {old_name!r}")
    if fields["use_bidirectional_attention"] and type(window) is int and window % 2:
        window = 2 * (window - 1)  # transformers halved the published value, W // 2 + 1, and saved the result
    letters = pattern(section, kind, fields["num_hidden_layers"], default.layer_pattern)
    return found | dict(layer_pattern=letters, sliding_window=window if "L" in letters else None)


def own_fields(own: Section, fields: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: own.nullable(name, None) for name in OWN_FIELDS if own.present(name)}
    own.finish(())
    turned = found.get("transpose_gating_einsum", False)
    if not isinstance(turned, bool):
        raise own.error("transpose_gating_einsum", f"expected true or false, got {turned!r}")
    for name, kinds in (("layer_pattern", str), ("model_type", str)):
        if not isinstance(found.get(name, ""), kinds):
            raise own.error(name, f"expected text, got {found[name]!r}")
    layers = fields["num_hidden_layers"]
    mine, theirs = found.get("layer_pattern"), fields.get("layer_pattern", "G")
    if mine is not None and isinstance(layers, int) and 0 < layers <= 4096:
        differ = not mine or any(mine[i % len(mine)] != theirs[i % len(theirs)] for i in range(layers))
        if differ:
            raise own.error("layer_pattern", f"expected the layers of layer_types ({theirs!r}), got {mine[:80]!r}")
    return found


def _read_gemma(top: Section, kind: str) -> GemmaConfig:
    fields = read_text(top, kind)
    return build(top, GemmaConfig, fields)


def _read_gemma3(top: Section, kind: str) -> GemmaConfig:
    text = top.section("text_config")
    text.only("model_type", "gemma3_text", why="it is the decoder of Gemma 3")
    fields = read_text(text, "gemma3_text", top)
    fields["model_type"] = "gemma3" if fields["model_type"] == "gemma3_text" else fields["model_type"]
    default = GemmaConfig()
    fields["mm_tokens_per_image"] = top.whole("mm_tokens_per_image", default.mm_tokens_per_image, 1, 2**16)
    for name in ("image_token", "boi_token", "eoi_token"):
        fields[f"{name}_index"] = _index(top, name, getattr(default, f"{name}_index"))
    fields["vision"] = read_vision(top.section("vision_config"), head=False)
    config = build(text, GemmaConfig, fields)
    text.finish(IGNORED)
    return config


def _index(section: Section, name: str, default: int) -> int:
    """transformers has two spellings of one field, `image_token_index` and `image_token_id`."""
    newer = section.take(f"{name}_id")
    return section.whole(f"{name}_index", default if newer is None else newer, 0, _ID_LIMIT - 1)


def read_vision(section: Section, *, head: bool) -> SiglipVisionConfig:
    """A SigLIP tower. The sizes must be there; `head` is what an absent `vision_use_head` means."""
    section.only("model_type", "siglip_vision_model", why="only SigLIP towers are read")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    for name in sizes:
        if not section.has(name):
            raise section.error(name, "missing; a vision tower states its sizes")
    others = ("num_channels", "image_size", "layer_norm_eps", "attention_dropout", "num_image_tokens", "projection_dim")
    fields = {name: section.take(name) for name in (*sizes, *others) if section.has(name)}
    fields["vision_use_head"] = section.flag("vision_use_head", head)
    activation(section, "siglip_vision_model")
    config = build(section, SiglipVisionConfig, fields)
    section.finish(IGNORED)
    return config


def _read_siglip(top: Section, kind: str) -> SiglipVisionConfig:
    if kind == "siglip":  # the pair of towers; its text tower is not part of the family
        top.take("text_config")
        return read_vision(top.section("vision_config"), head=True)
    return read_vision(top, head=True)


def read_paligemma(top: Section, window: bool) -> PaliGemmaConfig:
    """PaliGemma 1 or 2, by the `model_type` of its text section; `window` keeps local layers."""
    text = top.section("text_config")
    kind = text.take("model_type", "gemma")
    if kind not in ("gemma", "gemma2"):
        raise text.error("model_type", f"expected 'gemma' or 'gemma2', got {kind!r}")
    tokens = text.take("num_image_tokens")
    fields = read_text(text, kind, top, prefix_lm=True)
    if kind == "gemma2" and not window:
        fields |= dict(layer_pattern="G", sliding_window=None)
    config = build(text, GemmaConfig, fields)
    text.finish(IGNORED)
    vision = read_vision(top.section("vision_config"), head=False)
    if tokens is not None and tokens != vision.num_patches:
        raise text.error("num_image_tokens", f"expected {vision.num_patches} (patches of the tower), got {tokens!r}")
    default, width = PaliGemmaConfig(), config.hidden_size
    outer = dict(
        text_config=config,
        vision_config=vision,
        image_token_index=_index(top, "image_token", default.image_token_index),
        vocab_size=top.take("vocab_size", config.vocab_size),
        projection_dim=top.take("projection_dim", width),
        hidden_size=top.take("hidden_size", width),
        ignore_index=top.take("ignore_index", default.ignore_index),
        pad_token_id=config.pad_token_id,
        tokenizer_vocab_size=top.take("tokenizer_vocab_size", default.tokenizer_vocab_size),
    )
    if outer["projection_dim"] != width:
        raise top.error(
            "projection_dim", f"expected {width} (text_config.hidden_size), got {outer['projection_dim']!r}"
        )
    return build(top, PaliGemmaConfig, outer)


def _read_t5gemma(top: Section, kind: str) -> T5GemmaConfig:
    sides = {}
    for name, upper in (("encoder", None), ("decoder", top)):
        section = top.section(name)
        section.only("model_type", "t5_gemma_module", why="both sides of a T5Gemma are")
        width = section.take("cross_attention_hidden_size")
        fields = read_text(section, "t5_gemma_module", upper)
        sides[name] = build(section, GemmaConfig, fields)
        section.finish(IGNORED)
        if name == "decoder" and width not in (None, sides["encoder"].hidden_size):
            expected = sides["encoder"].hidden_size
            raise section.error("cross_attention_hidden_size", f"expected {expected} (the encoder's), got {width!r}")
    for name in ("dropout_rate", "attention_dropout"):
        top.only(name, 0, 0.0, why="no Gemma checkpoint uses dropout")
    rows = top.take("vocab_size", sides["decoder"].vocab_size)
    if rows != sides["decoder"].vocab_size:
        raise top.error("vocab_size", f"expected {sides['decoder'].vocab_size} (decoder.vocab_size), got {rows!r}")
    return build(top, T5GemmaConfig, sides | dict(pad_token_id=sides["decoder"].pad_token_id))


READERS = {
    "gemma": _read_gemma,
    "gemma2": _read_gemma,
    "gemma3_text": _read_gemma,
    "gemma3": _read_gemma3,
    "shieldgemma2": _read_gemma3,
    "t5gemma": _read_t5gemma,
    "siglip_vision_model": _read_siglip,
    "siglip": _read_siglip,
}
