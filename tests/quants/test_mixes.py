# SPDX-License-Identifier: Apache-2.0
"""Which tensor of a quantized file gets which type: the real file of the 270M, and the rules written out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from gemma import hub, weights
from gemma._quants_mixes import MIXES, fitting, mix, plan
from gemma.checkpoint import open_checkpoint
from gemma.config import PRESETS
from gemma.errors import ConfigError
from gemma.quants import QuantType


def test_the_plan_is_that_of_the_real_file():
    with open_checkpoint(hub.demo_path()) as checkpoint:
        table = weights.tensors(checkpoint.config())
        types = plan(table, "Q4_K_M")
        assert {t.slots["gguf"].name: types[t.name].name for t in table} == {
            name: info.dtype for name, info in checkpoint.tensors.items()
        }
        assert mix("Q4_K_M").file_type == checkpoint.metadata["general.file_type"]


def of(preset: str, name: str, **options) -> dict[str, str]:
    return {n: t.name for n, t in plan(weights.tensors(PRESETS[preset]), name, **options).items()}


def layers(types: dict[str, str], role: str, type: str) -> list[int]:
    return [i for i in range(200) if types.get(f"layers.{i}.{role}") == type]


# Gemma 2 2B has 26 layers and rows of 2304, 2048 and 9216: whole super-blocks everywhere. 26 // 8 = 3.
MORE = [0, 1, 2, 5, 8, 11, 14, 17, 20, 22, 23, 24, 25]


@pytest.mark.parametrize(("name", "base"), [("q4_k_m", "Q4_K"), ("q5_k_m", "Q5_K")])
def test_medium_mixes_give_half_of_the_layers_more_bits(name, base):
    types = of("gemma2_2b", name)
    assert types["embed"] == "Q6_K" and types["final_norm"] == "F32"
    for role in ("attn.v", "mlp.down"):
        assert layers(types, role, "Q6_K") == MORE
        assert layers(types, role, base) == [i for i in range(26) if i not in MORE]
    for role in ("attn.q", "attn.k", "attn.o", "mlp.gate", "mlp.up"):
        assert layers(types, role, base) == list(range(26))
    assert layers(types, "norm.pre_attn", "F32") == list(range(26))


def test_small_mixes():
    types = of("gemma2_2b", "q4_k_s")
    assert layers(types, "attn.v", "Q5_K") == [0, 1, 2, 3] and layers(types, "mlp.down", "Q5_K") == [0, 1, 2]
    assert layers(of("gemma2_2b", "q5_k_s"), "mlp.down", "Q5_K") == list(range(26))
    for name in ("q6_k", "q3_k_s"):
        assert set(of("gemma2_2b", name).values()) == {"F32", "Q6_K", MIXES[name].base.name}


def test_mixes_of_three_and_two_bits():
    types = of("gemma2_2b", "q3_k_m")
    assert layers(types, "attn.v", "Q5_K") == [0, 1] and layers(types, "attn.v", "Q4_K") == list(range(2, 26))
    assert layers(types, "mlp.down", "Q5_K") == [0] and layers(types, "attn.o", "Q4_K") == list(range(26))
    types = of("gemma2_2b", "q3_k_l")
    assert {types[f"layers.9.{role}"] for role in ("attn.v", "mlp.down", "attn.o")} == {"Q5_K"}
    types = of("gemma2_2b", "q2_k")  # two queries for each key
    assert {types[f"layers.9.{role}"] for role in ("attn.v", "mlp.down", "attn.o")} == {"Q3_K"}
    assert types["layers.9.attn.q"] == "Q2_K"
    assert of("gemma_2b", "q2_k")["layers.9.attn.v"] == "Q4_K"  # eight queries for each key


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q5_0", "q4_1", "q5_1"])
def test_mixes_of_one_type(name):
    types = of("gemma2_2b", name)
    assert types["embed"] == ("Q8_0" if name == "q8_0" else "Q6_K")
    assert set(types.values()) == {"F32", types["embed"], name.upper()}


def test_an_importance_matrix_changes_the_old_types():
    types = of("gemma2_2b", "q4_0", importance=True)
    assert layers(types, "mlp.down", "Q4_1") == [0, 1, 2] and layers(types, "mlp.down", "Q4_0") == list(range(3, 26))
    assert layers(of("gemma2_2b", "q5_0", importance=True), "mlp.down", "Q5_1") == [0, 1, 2]
    assert of("gemma2_2b", "q4_k_m", importance=True) == of("gemma2_2b", "q4_k_m")


def test_rows_that_are_not_whole_super_blocks_fall_back():
    types = of("gemma3_1b", "q4_k_m")  # width 1152 = 4.5 x 256
    assert types["embed"] == "Q8_0" and types["layers.3.attn.q"] == "Q5_0" and types["layers.0.attn.v"] == "Q8_0"
    assert types["layers.3.attn.o"] == "Q4_K" and types["layers.0.mlp.down"] == "Q6_K"
    assert of("gemma3_1b", "q4_0")["embed"] == "Q8_0" and of("gemma3_1b", "q5_k_m")["layers.3.attn.q"] == "Q5_1"
    wanted = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
    assert {name: fitting(QuantType[name], 96).name for name in wanted} == wanted
    assert {fitting(QuantType[name], 72).name for name in (*wanted, "Q8_0", "Q4_0")} == {"F16"}


def test_a_head_of_its_own_takes_the_bits_of_the_embedding():
    config = dataclasses.replace(PRESETS["gemma2_2b"], tie_word_embeddings=False)
    types = plan(weights.tensors(config), "q4_k_m")
    assert types["head"] is QuantType.Q6_K and types["embed"] is QuantType.Q4_K


@pytest.mark.parametrize(("name", "type"), [("f32", "F32"), ("F16", "F16"), ("bfloat16", "BF16")])
def test_plain_floats_are_mixes_too(name, type):
    assert set(of("gemma2_2b", name).values()) == {"F32", type}


def test_names():
    assert mix("Q4_K") is mix("q4-k-m") is MIXES["q4_k_m"] and mix("q3_k").name == "q3_k_m"
    with pytest.raises(ConfigError, match=r"quantize: expected one of f32, .*got 'q4_km'; did you mean q4_k_m\?"):
        mix("q4_km")
    with pytest.raises(ConfigError, match="got 'iq2_xxs'"):
        mix("iq2_xxs")
