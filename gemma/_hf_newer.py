# SPDX-License-Identifier: Apache-2.0
"""The `config.json` of Gemma 3n and Gemma 4: their readers and writers, for `hf_config.py`.

Only the text model is read: a multimodal file gives the configuration of its decoder, and its towers are passed over,
as their weights are. Absent keys take the defaults of the classes of transformers 5. Earlier generations are in
`_hf_read.py` and `_hf_write.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gemma._hf_json import Section
from gemma._hf_read import IGNORED, OWN_KEY, SIZES, activation, agree, build, ids, own_fields, pattern, rope
from gemma._hf_write import COPIED, layer_types
from gemma.config import PRESETS, AltUpConfig, ExpertsConfig, GemmaConfig
from gemma.errors import ConfigError

# What a multimodal file says about the parts that are not read.
_TOWERS = (
    *("vision_config", "audio_config", "audio_soft_tokens_per_image", "vision_soft_tokens_per_image"),
    *("boi_token_id", "eoi_token_id", "image_token_id", "boa_token_id", "eoa_token_id", "eoa_token_index"),
    *("audio_token_id", "video_token_id"),
)
_WIDTHS = 2**24


def _default(kind: str) -> GemmaConfig:
    """The class defaults of transformers: those of Gemma 3n are E4B's sizes, those of Gemma 4 mostly Gemma 2 2B's."""
    if kind == "gemma3n_text":
        return PRESETS["gemma3n_e4b"]
    two = PRESETS["gemma2_2b"]
    sizes = {name: getattr(two, name) for name in ("hidden_size", "intermediate_size", "num_key_value_heads")}
    base = dataclasses.replace(PRESETS["gemma4_e4b"], num_kv_shared_layers=0, **sizes)
    return dataclasses.replace(base, num_hidden_layers=30, num_attention_heads=8, final_logit_softcapping=None)


def _common(section: Section, kind: str, upper: Section | None) -> tuple[GemmaConfig, dict[str, Any]]:
    default = _default(kind)
    names = [name for name in SIZES if name != "intermediate_size"]
    fields: dict[str, Any] = {name: section.take(name, getattr(default, name)) for name in names}
    fields |= {name: getattr(default, name) for name in ("use_post_norms", "use_qk_norm", "use_value_norm")}
    fields |= dict(norm_plus_one=False, query_pre_attn_scalar=1.0, transpose_gating_einsum=True, model_type=kind)
    fields |= ids(section, upper, default)
    activation(section, kind)
    tie = section.flag("tie_word_embeddings", True)
    fields["tie_word_embeddings"] = tie if upper is None else upper.flag("tie_word_embeddings", tie)
    fields["final_logit_softcapping"] = section.nullable("final_logit_softcapping", default.final_logit_softcapping)
    fields["sliding_window"] = section.take("sliding_window", default.sliding_window)
    fields["num_kv_shared_layers"] = section.take("num_kv_shared_layers", default.num_kv_shared_layers)
    for name in ("hidden_size_per_layer_input", "vocab_size_per_layer_input"):
        fields[name] = section.take(name, getattr(default, name)) or None
    if fields["hidden_size_per_layer_input"] is None:
        fields["vocab_size_per_layer_input"] = None
    return default, fields


def _finish(section: Section, fields: dict[str, Any]) -> GemmaConfig:
    own = section.section(OWN_KEY) if section.has(OWN_KEY) else None
    rows = {c.vocab_size: c.flax_vocab_rows for c in PRESETS.values() if isinstance(c, GemmaConfig)}
    fields["flax_vocab_rows"] = rows.get(fields["vocab_size"]) if type(fields["vocab_size"]) is int else None
    if "L" not in fields["layer_pattern"]:
        fields["sliding_window"] = None
    return build(section, GemmaConfig, fields | ({} if own is None else own_fields(own, fields)))


def _numbers(section: Section, key: str, value: Any, layers: Any, kinds: tuple[type, ...]) -> tuple:
    """A list with one number for each layer."""
    if not isinstance(value, (list, tuple)) or any(isinstance(v, bool) or not isinstance(v, kinds) for v in value):
        raise section.error(key, f"expected a list of numbers, got {str(value)[:80]!r}")
    if len(value) != layers:
        raise section.error(key, f"expected {layers} numbers (num_hidden_layers), got {len(value)}")
    return tuple(value)


def _widths(widths: tuple[int, ...]) -> dict[str, Any]:
    """`intermediate_size`, and `mlp_sizes` where the layers differ."""
    alike = len(set(widths)) == 1
    return dict(intermediate_size=widths[0], mlp_sizes=None if alike else widths)


def read_gemma3n(section: Section, upper: Section | None = None) -> GemmaConfig:
    """The text model of Gemma 3n."""
    default, fields = _common(section, "gemma3n_text", upper)
    layers = fields["num_hidden_layers"]
    width = section.take("intermediate_size", default.intermediate_size)
    if isinstance(width, (list, tuple)):
        widths = _numbers(section, "intermediate_size", width, layers, (int,))
        if not widths:
            raise section.error("intermediate_size", "expected at least one number, got an empty list")
        fields |= _widths(widths)
    else:
        fields["intermediate_size"] = width
    fields |= rope(section, "gemma3_text", default)
    fields["layer_pattern"] = pattern(section, "gemma3n_text", layers, default.layer_pattern)
    sparse = section.take("activation_sparsity_pattern")
    if sparse is None:
        count = 10 if isinstance(layers, int) and 10 < layers <= 4096 else 0
        sparse = [0.95] * count + [0.0] * (layers - count) if count else []
    elif isinstance(sparse, float):
        sparse = [sparse] * layers if isinstance(layers, int) and 0 < layers <= 4096 else [sparse]
    sparse = _numbers(section, "activation_sparsity_pattern", sparse, layers, (int, float)) if sparse else ()
    fields["activation_sparsity_pattern"] = sparse if any(sparse) else ()
    fields["laurel_rank"] = section.take("laurel_rank", default.laurel_rank)
    streams = dict(
        num_inputs=section.take("altup_num_inputs", 4),
        active_idx=section.take("altup_active_idx", 0),
        coef_clip=section.nullable("altup_coef_clip", 120.0),
        correct_scale=section.flag("altup_correct_scale", True),
    )
    section.take("altup_lr_multiplier")  # of training
    fields["altup"] = build(section, AltUpConfig, streams)
    return _finish(section, fields)


def read_gemma4(section: Section, upper: Section | None = None) -> GemmaConfig:
    """The text model of Gemma 4."""
    default, fields = _common(section, "gemma4_text", upper)
    fields |= dict(use_layer_scale=True, intermediate_size=section.take("intermediate_size", default.intermediate_size))
    fields |= _rope4(section, default)
    fields["layer_pattern"] = _pattern4(section, fields["num_hidden_layers"])
    fields["attention_k_eq_v"] = same = section.flag("attention_k_eq_v", False)
    fields |= _global_heads(section, fields, same)
    section.only("use_bidirectional_attention", "vision", False, why="'vision' is about images; text is causal")
    doubled, shared = section.flag("use_double_wide_mlp", False), fields["num_kv_shared_layers"]
    width, layers = fields["intermediate_size"], fields["num_hidden_layers"]
    if doubled and shared and all(type(n) is int and 0 < n < _WIDTHS for n in (width, layers, shared)):
        fields["mlp_sizes"] = (width,) * (min(layers, 4096) - shared) + (2 * width,) * shared
    numbers = {name: section.take(name) for name in ("num_experts", "top_k_experts", "moe_intermediate_size")}
    if section.flag("enable_moe_block", False):
        count, top, inner = numbers.values()
        if None in numbers.values():
            missing = ", ".join(name for name, value in numbers.items() if value is None)
            raise section.error("enable_moe_block", f"true, but {missing} is missing")
        fields["experts"] = build(section, ExpertsConfig, dict(num_experts=count, top_k=top, intermediate_size=inner))
    return _finish(section, fields)


def _pattern4(section: Section, layers: Any) -> str:
    """As in other generations, but the last layer is a global one, whatever its type says."""
    letters = pattern(section, "gemma4_text", layers, "LLLLLG")
    if not isinstance(layers, int) or not 0 < layers <= 4096:
        return letters
    whole = (letters * layers)[:layers]
    return letters if whole[-1] == "G" else whole[:-1] + "G"


def _rope4(section: Section, default: GemmaConfig) -> dict[str, Any]:
    found = dict(rope_theta=default.rope_theta, rope_local_base_freq=default.rope_local_base_freq)
    found |= dict(partial_rotary_factor=default.partial_rotary_factor)
    if not section.has("rope_parameters"):
        return found
    both = section.section("rope_parameters")
    for name, key in (("full_attention", "rope_theta"), ("sliding_attention", "rope_local_base_freq")):
        if not both.has(name):
            raise both.error(name, "missing; each kind of layer states its rotation")
        part = both.section(name)
        found[key] = part.take("rope_theta", found[key])
        kind, share = part.take("rope_type", "default"), part.take("partial_rotary_factor", 1.0)
        part.only("factor", 1, 1.0, why="Gemma 4 has no scaled positions")
        part.finish(())
        allowed = ("default", "proportional") if name == "full_attention" else ("default",)
        if kind not in allowed:
            raise part.error("rope_type", f"expected {' or '.join(map(repr, allowed))}, got {kind!r}")
        if kind == "default" and share not in (1, 1.0):
            raise part.error("partial_rotary_factor", f"expected 1 with rope_type 'default', got {share!r}")
        if name == "full_attention":
            found["partial_rotary_factor"] = share
    both.finish(())
    return found


def _global_heads(section: Section, fields: Mapping[str, Any], same: bool) -> dict[str, Any]:
    """Heads of global layers: two fields, or, as transformers writes them, a table of layers that differ."""
    dim, heads = section.take("global_head_dim"), section.take("num_global_key_value_heads")
    if section.present("per_layer_config") and section.has("per_layer_config"):
        table = section.section("per_layer_config")
        entries, layers = [], fields["num_hidden_layers"]
        letters = (fields["layer_pattern"] * layers)[:layers] if isinstance(layers, int) and 0 < layers <= 4096 else ""
        for index in (i for i, letter in enumerate(letters) if letter == "G"):
            padded = f"{index:0{len(str(layers - 1))}d}"  # transformers lets the keys sort by their number
            part = table.section(padded if table.has(padded) else str(index))
            entries.append((part.take("head_dim"), part.take("num_key_value_heads")))
            part.finish(())
        table.finish(())
        if len(set(entries)) > 1:
            raise table.error("", f"expected one size for all global layers, got {str(sorted(set(entries)))[:80]}")
        for its_dim, its_heads in entries[:1]:
            dim, heads = agree(section, "global_head_dim", dim, its_dim), agree(section, "heads", heads, its_heads)
    elif dim is None:
        dim = 512
    dim = None if dim == fields["head_dim"] else dim
    heads = None if heads == fields["num_key_value_heads"] or not same else heads
    return dict(global_head_dim=dim, num_global_key_value_heads=heads)


def _multimodal(read: Any, text: str) -> Any:
    def reader(top: Section, kind: str) -> GemmaConfig:
        for name in _TOWERS:
            top.nullable(name, None)
        section = top.section("text_config")
        section.only("model_type", text, why=f"it is the decoder of {kind}")
        config = read(section, top)
        section.finish(IGNORED)
        return config

    return reader


READERS = {
    "gemma3n_text": lambda top, kind: read_gemma3n(top),
    "gemma3n": _multimodal(read_gemma3n, "gemma3n_text"),
    "gemma4_text": lambda top, kind: read_gemma4(top),
    "gemma4": _multimodal(read_gemma4, "gemma4_text"),
}


# ---- writing


def write_newer(config: GemmaConfig) -> dict[str, Any]:
    """The text-only `config.json` of a Gemma 3n or 4."""
    if config.vision is not None or config.query_pre_attn_scalar != 1.0 or config.attn_logit_softcapping is not None:
        raise ConfigError(
            "no class of transformers has the layers of Gemma 3n or 4 with scaled queries, caps or images"
        )
    kind = "gemma4_text" if config.altup is None else "gemma3n_text"
    names = [name for name in COPIED if name != "intermediate_size"]
    values: dict[str, Any] = dict(model_type=kind) | {name: getattr(config, name) for name in names}
    values["architectures"] = ["Gemma4ForCausalLM" if config.altup is None else "Gemma3nForCausalLM"]
    values["rms_norm_eps"], values["attention_dropout"] = float(config.rms_norm_eps), float(config.attention_dropout)
    many = isinstance(config.eos_token_id, tuple)
    values["eos_token_id"] = list(config.eos_token_id) if many else config.eos_token_id
    values |= dict(hidden_activation="gelu_pytorch_tanh", layer_types=layer_types(config))
    cap = config.final_logit_softcapping
    values["final_logit_softcapping"] = None if cap is None else float(cap)
    window = config.sliding_window
    values["sliding_window"] = config.max_position_embeddings if window is None else window
    values["num_kv_shared_layers"] = config.num_kv_shared_layers
    values["hidden_size_per_layer_input"] = config.hidden_size_per_layer_input or 0
    values["vocab_size_per_layer_input"] = config.vocab_size_per_layer_input or config.vocab_size
    local = config.rope_theta if config.rope_local_base_freq is None else config.rope_local_base_freq
    entry: dict[str, Any] = dict(rope_type="default", rope_theta=float(config.rope_theta))
    both = dict(full_attention=entry, sliding_attention=dict(rope_type="default", rope_theta=float(local)))
    values["rope_parameters"] = both
    return values | (_gemma4_values(config, entry) if config.altup is None else _gemma3n_values(config, entry))


def _gemma3n_values(config: GemmaConfig, entry: dict[str, Any]) -> dict[str, Any]:
    if config.rope_scaling_factor != 1.0:
        entry |= dict(rope_type="linear", factor=float(config.rope_scaling_factor))
    altup, layers = config.altup, config.num_hidden_layers
    widths = config.mlp_sizes or (config.intermediate_size,) * layers
    return dict(
        intermediate_size=list(widths),
        activation_sparsity_pattern=list(map(float, config.activation_sparsity_pattern or (0.0,) * layers)),
        laurel_rank=config.laurel_rank,
        altup_num_inputs=altup.num_inputs,
        altup_active_idx=altup.active_idx,
        altup_coef_clip=None if altup.coef_clip is None else float(altup.coef_clip),
        altup_correct_scale=altup.correct_scale,
    )


def _gemma4_values(config: GemmaConfig, entry: dict[str, Any]) -> dict[str, Any]:
    entry |= dict(rope_type="proportional", partial_rotary_factor=float(config.partial_rotary_factor))
    experts = config.experts
    return dict(
        intermediate_size=config.intermediate_size,
        use_double_wide_mlp=config.mlp_sizes is not None,
        global_head_dim=config.global_head_dim or config.head_dim,
        num_global_key_value_heads=config.num_global_key_value_heads,
        attention_k_eq_v=config.attention_k_eq_v,
        enable_moe_block=experts is not None,
        num_experts=None if experts is None else experts.num_experts,
        top_k_experts=None if experts is None else experts.top_k,
        moe_intermediate_size=None if experts is None else experts.intermediate_size,
    )
