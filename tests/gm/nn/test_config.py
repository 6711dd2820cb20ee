# SPDX-License-Identifier: Apache-2.0
"""TransformerConfig is a view: it says what GemmaConfig says, in other names."""

from __future__ import annotations

import dataclasses

import pytest
from nn_helpers import CONFIGS

from gemma.config import PRESETS, GemmaConfig
from gemma.gm.nn import config as names
from gemma.gm.nn.config import AttentionType, QueryPreAttentionNormalisation, TransformerConfig

TEXT = {name: config for name, config in PRESETS.items() if isinstance(config, GemmaConfig)} | CONFIGS


@pytest.mark.parametrize("name", TEXT)
def test_there_and_back(name):
    view = TransformerConfig.of(TEXT[name])
    assert view.gemma == TEXT[name]
    assert view.layers == TEXT[name].layers
    assert hash(view) == hash(TransformerConfig.of(TEXT[name]))
    assert view.query_pre_attn_scalar() == TEXT[name].layers[0].query_scale


def test_official_names_of_gemma2_27b():
    view = TransformerConfig.of(PRESETS["gemma2_27b"])
    assert (view.num_embed, view.embed_dim, view.hidden_dim) == (256_128, 4608, 36_864)
    assert (view.num_heads, view.num_kv_heads, view.head_dim, view.num_layers) == (32, 16, 128, 46)
    assert view.attention_types[:3] == (AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL, AttentionType.LOCAL_SLIDING)
    assert view.query_pre_attn_norm is QueryPreAttentionNormalisation.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS
    assert view.query_pre_attn_scalar() == 144**-0.5
    assert (view.final_logit_softcap, view.attn_logits_soft_cap) == (30.0, 50.0)


def official(**fields) -> TransformerConfig:
    """A configuration as users of the JAX API write one."""
    return TransformerConfig(
        **dict(
            num_embed=13,
            embed_dim=32,
            hidden_dim=128,
            num_heads=2,
            num_kv_heads=2,
            head_dim=128,
            final_logit_softcap=None,
            attention_types=[AttentionType.GLOBAL] * 2,
            use_post_attn_norm=False,
            attn_logits_soft_cap=None,
            use_post_ffw_norm=False,
        )
        | fields
    )


def test_official_constructor():
    view = official()
    gemma = view.gemma
    assert (gemma.vocab_size, gemma.table_rows, gemma.hidden_size, gemma.intermediate_size) == (13, 13, 32, 128)
    assert (gemma.num_hidden_layers, gemma.num_attention_heads, gemma.head_dim) == (2, 2, 128)
    assert TransformerConfig.of(gemma).layers == view.layers
    assert isinstance(hash(view), int)


def test_rope_fields():
    local, glob = official(
        attention_types=names.make_attention_layers_types(
            (AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL), num_layers=2
        ),
        sliding_window_size=4,
        local_base_frequency=10_000,
        global_base_frequency=1_000_000,
        local_scale_factor=2.0,
        global_scale_factor=8.0,
    ).layers
    assert (local.rope_base, local.rope_scale, local.window) == (10_000, 2.0, 4)
    assert (glob.rope_base, glob.rope_scale, glob.window) == (1_000_000, 8.0, None)


@pytest.mark.parametrize(
    ("norm", "scale"),
    [
        (QueryPreAttentionNormalisation.BY_ONE_OVER_SQRT_HEAD_DIM, 128**-0.5),
        (QueryPreAttentionNormalisation.BY_EMBED_DIM_DIV_NUM_HEADS, 16),
        (QueryPreAttentionNormalisation.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS, 16**-0.5),
    ],
)
def test_query_scales(norm, scale):
    assert official(query_pre_attn_norm=norm).query_pre_attn_scalar() == pytest.approx(scale, rel=1e-12)


def test_a_changed_field_reaches_the_source():
    view = dataclasses.replace(TransformerConfig.of(PRESETS["gemma3_270m"]), sliding_window_size=8, num_embed=99)
    assert view.gemma == dataclasses.replace(PRESETS["gemma3_270m"], sliding_window=8, vocab_size=99)
    head = dataclasses.replace(TransformerConfig.of(PRESETS["gemma2_2b"]), head_dim=64)
    assert head.query_pre_attn_scalar() == 64**-0.5


def test_what_a_gemma_config_cannot_say():
    with pytest.raises(ValueError, match="use_post_attn_norm and use_post_ffw_norm differ"):
        _ = official(use_post_ffw_norm=True).gemma
    with pytest.raises(ValueError, match=r"local_scale_factor 2\.0"):
        _ = official(local_scale_factor=2.0).gemma


def test_patterns():
    six = names.GEMMA3_ATTENTION_PATTERN
    assert [kind.name for kind in six] == ["LOCAL_SLIDING"] * 5 + ["GLOBAL"]
    kinds = names.make_attention_layers_types(six, num_layers=26)
    assert [i for i, kind in enumerate(kinds) if kind is AttentionType.GLOBAL] == [5, 11, 17, 23]
    assert (AttentionType.GLOBAL.value, AttentionType.LOCAL_SLIDING.value) == (1, 2)
