# SPDX-License-Identifier: Apache-2.0
"""PEFT on a tiny Hugging Face model gives our logits with our adapters, and we give its logits with its adapters."""

from __future__ import annotations

import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft as hf_peft
import pytest
import torch
from hf_tiny_oracles import make
from lora_models import program

from gemma import gm, peft, weights
from gemma.config import GemmaConfig
from gemma.gm.ckpts._load import insert
from gemma.gm.ckpts._orbax import flatten

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = np.random.default_rng(1).integers(3, 290, (1, 12), dtype=np.int32)
# Both sides are float32; logits are up to 2, and the two frameworks alone differ by 2e-6 on them.
CLOSE = dict(rtol=0, atol=2e-5)
_TINY = dict(vocab_size=320, hidden_size=72, intermediate_size=100, num_hidden_layers=2, head_dim=24)
_TINY |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, eos_token_id=1)
_G3 = _TINY | dict(model_type="gemma3_text", layer_pattern="L", sliding_window=5, use_post_norms=True)
_G3 |= dict(use_qk_norm=True, query_pre_attn_scalar=18.0, transpose_gating_einsum=True, rope_theta=1e6)
_MODELS = {
    "gemma3_text": (GemmaConfig(**_G3, rope_local_base_freq=1e4, rope_scaling_factor=8.0), {}),
    # as many key heads as heads: q, k and v are one array in JAX; gate and up lie the other way round
    "gemma1": (
        GemmaConfig(**_TINY | dict(model_type="gemma", layer_pattern="G", num_key_value_heads=4)),
        dict(num_key_value_heads=4),
    ),
}


@functools.cache
def oracle(name: str):
    """(configuration, state dict of the Hugging Face model, our model, our parameters)."""
    config, changes = _MODELS[name]
    hf, _ = make(name, num_hidden_layers=2, **changes)
    state = {key: value.numpy().copy() for key, value in hf.state_dict().items() if key != "lm_head.weight"}
    params: dict = {}
    for key, array in weights.pack(weights.unpack(state, config, format="hf"), config, format="flax").items():
        insert(params, key, jnp.asarray(array))
    return config, gm.nn.Transformer.from_config(config, dtype=jnp.float32), params


def fresh(name: str):
    """A new Hugging Face model: PEFT changes the one that it is given."""
    return make(name, num_hidden_layers=2, **_MODELS[name][1])[0]


def theirs(model) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def ours(model, params) -> np.ndarray:
    return np.asarray(program(model)(params, jnp.asarray(TOKENS)))


def random_peft(name: str, seed: int = 0, **settings):
    """A model with a PEFT adapter whose every number is random, and its logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = hf_peft.get_peft_model(fresh(name), hf_peft.LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "magnitude" in key:
                value.mul_(1 + 0.2 * torch.rand(value.shape, generator=generator))
            elif "lora_" in key:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.15)
    return model, theirs(model)


# (patterns that overlap are no test: PEFT sorts them when it saves, and the first that fits counts)
PATTERNS = dict(
    rank_pattern={"k_proj": 2, r"layers.1.mlp.up_proj": 6}, alpha_pattern={"v_proj": 3, "layers.0.mlp.*": 12}
)
CASES = {
    "all": ("gemma3_text", dict(r=4, lora_alpha=6, target_modules=LINEAR)),
    "fused": ("gemma1", dict(r=3, lora_alpha=8, target_modules=LINEAR, use_rslora=True, rank_pattern={"v_proj": 5})),
    "dora": ("gemma3_text", dict(r=4, lora_alpha=8, target_modules=LINEAR, use_dora=True, use_rslora=True)),
    "patterns": ("gemma3_text", dict(r=4, lora_alpha=8, target_modules=LINEAR) | PATTERNS),
    "values": ("gemma3_text", dict(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[1])),
    "tied": (
        "gemma3_text",
        dict(r=4, lora_alpha=8, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    ),
    "input": ("gemma3_text", dict(r=4, lora_alpha=8, target_modules=["embed_tokens", "up_proj"])),
}


@pytest.mark.parametrize("case", CASES)
def test_their_adapter_gives_their_logits_and_goes_back(case, tmp_path):
    name, settings = CASES[case]
    model, expected = random_peft(name, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    config, base, params = oracle(name)
    adapter = peft.load_adapter(tmp_path / "theirs", base, params)
    merged = peft.merge_params(params, adapter.lora)
    np.testing.assert_allclose(ours(adapter.model, merged), expected, **CLOSE)
    assert np.abs(expected - ours(base, params)).max() > 0.05  # the adapter matters

    peft.save_adapter(tmp_path / "ours", merged, adapter.model, base_model="tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = hf_peft.PeftModel.from_pretrained(fresh(name), tmp_path / "ours").eval()
    np.testing.assert_allclose(theirs(again), expected, **CLOSE)
    # Independent pairs were joined on the way in and are apart again: the ranks are those that came.
    ranks = [{k: v.shape for k, v in m.state_dict().items() if ".lora_" in k} for m in (model, again)]
    assert ranks[0] == ranks[1]
    if case in ("all", "fused", "dora"):
        fused = peft.fuse_params(merged, adapter.model)
        np.testing.assert_allclose(ours(base, fused), expected, **CLOSE)


def test_a_trained_pair_is_saved_with_twice_the_rank(tmp_path):
    """Once both blocks of a fused layer are full, two adapters of rank r cannot hold it."""
    model, _ = random_peft("gemma3_text", r=4, lora_alpha=4, target_modules=["k_proj", "v_proj", "q_proj"])
    model.save_pretrained(tmp_path / "theirs")
    _, base, params = oracle("gemma3_text")
    adapter = peft.load_adapter(tmp_path / "theirs", base, params)
    flat = flatten(adapter.lora)
    place = "layer_0/attn/kv_einsum/_LoRAEinsum_0/lora/b"
    assert flat[place].shape == (8, 2, 2, 24)
    assert not np.any(flat[place][:4, 1]) and not np.any(flat[place][4:, 0])
    flat[place] = flat[place] + 0.05  # what a step of training does
    lora: dict = {}
    for key, leaf in flat.items():
        insert(lora, key, leaf)
    merged = peft.merge_params(params, lora)
    peft.save_adapter(tmp_path / "ours", merged, adapter.model)
    settings = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert settings["r"] == 4 and set(settings["rank_pattern"].values()) == {8}
    assert len(settings["rank_pattern"]) == 2 and settings["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    again = hf_peft.PeftModel.from_pretrained(fresh("gemma3_text"), tmp_path / "ours").eval()
    np.testing.assert_allclose(theirs(again), ours(adapter.model, merged), **CLOSE)


def test_our_own_adapter_in_bfloat16_loads_without_a_warning(tmp_path, recwarn):
    _, base, params = oracle("gemma3_text")
    model = gm.nn.LoRA(rank=2, model=base, alpha=5.0, targets=("attention", "mlp"))
    init = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(TOKENS))["params"]
    rng = np.random.default_rng(0)
    lora = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0.05, 0.1, leaf.shape), leaf.dtype), peft.split_params(init).lora
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(lora)} == {jnp.dtype("bfloat16")}
    merged = peft.merge_params(params, lora)
    peft.save_adapter(tmp_path / "adapter", merged, model)
    recwarn.clear()
    again = hf_peft.PeftModel.from_pretrained(fresh("gemma3_text"), tmp_path / "adapter").eval()
    assert [str(w.message) for w in recwarn if "adapter" in str(w.message).lower()] == []
    # bfloat16 factors: their product with float32 activations is float32 here, PEFT casts the factors to float32
    np.testing.assert_allclose(theirs(again), ours(model, merged), **CLOSE)
