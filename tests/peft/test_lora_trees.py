# SPDX-License-Identifier: Apache-2.0
"""Einsum strings of adapters, splitting and merging of trees, and masks for optimizers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lora_models import adapted, tiny

from gemma import peft
from gemma.errors import CheckpointError, ConfigError
from gemma.gm.ckpts._orbax import flatten
from gemma.peft import _einsum_utils, _tree


@pytest.mark.parametrize(
    "einsum, shape, expected, a, b",
    [
        ("BTD,NDH->BTNH", (4, 8, 6), "BTD,Dr,rNH->BTNH", (8, 3), (3, 4, 6)),
        ("BSD,CKDH->CBSKH", (2, 1, 8, 6), "BSD,Dr,rCKH->CBSKH", (8, 3), (3, 2, 1, 6)),
        ("BTNH,NHD->BTD", (4, 6, 8), "BTNH,NHr,rD->BTD", (4, 6, 3), (3, 8)),
        ("...D,CFD->...CF", (2, 9, 8), "...D,Dr,rCF->...CF", (8, 3), (3, 2, 9)),
        ("...r,rH->...H", (8, 6), "...r,rA,AH->...H", (8, 3), (3, 6)),
        ("BND,NDH->BNH", (4, 8, 6), "BND,NDr,rH->BNH", (4, 8, 3), (3, 6)),
    ],
)
def test_einsum_strings(einsum, shape, expected, a, b):
    got = _einsum_utils.get_lora_einsum_str_and_shapes(einsum_str=einsum, weights_shape=shape, rank=3)
    assert got == (expected, a, b)
    sizes = dict(zip(_einsum_utils.parse(einsum).w, shape))
    rng = np.random.default_rng(0)
    x = rng.normal(size=[sizes.get(axis, 2) for axis in einsum.split(",")[0].replace("...", "Z")])
    one, two = rng.normal(size=a), rng.normal(size=b)
    eqn = _einsum_utils.parse(einsum)
    in_two_steps = np.einsum(eqn.up, np.einsum(eqn.down, x, one), two)
    np.testing.assert_allclose(in_two_steps, np.einsum(einsum, x, np.einsum(eqn.delta, one, two)), atol=1e-12)


@pytest.mark.parametrize(
    "einsum, message",
    [
        ("BTD->BT", "`einsum_str` should be"),
        ("BTD,DH,HK->BTK", "`einsum_str` should be"),
        ("BTD,DH", "`einsum_str` should be"),
        ("BTD,...DH->BTH", "should not contain ellipsis"),
        ("BTD,KH->BTDKH", "expected an axis of the weight"),
        ("BTD,NDH->BTNH", "has 3 axes there, but shape"),
    ],
)
def test_bad_einsum_strings(einsum, message):
    with pytest.raises(ValueError, match=message):
        _einsum_utils.get_lora_einsum_str_and_shapes(einsum_str=einsum, weights_shape=(2, 3), rank=1)


def test_split_and_merge_are_inverse():
    _, params = adapted()
    parts = peft.split_params(params)
    assert parts.original == split_names(parts.original) and not any("lora" in name for name in flatten(parts.original))
    assert all("/lora/" in name for name in flatten(parts.lora))
    assert jax.tree.structure(parts.original) == jax.tree.structure(tiny().params)  # no empty branches
    again = peft.merge_params(*parts)
    assert flatten(again).keys() == flatten(params).keys()
    assert all(leaf is flatten(params)[name] for name, leaf in flatten(again).items())
    with pytest.raises(CheckpointError, match="both trees hold layer_0"):
        peft.merge_params(params, parts.lora)
    with pytest.raises(CheckpointError, match="both trees hold mlp/x/lora/a"):
        peft.merge_params({"mlp": {"x": jnp.ones(1)}}, {"mlp": {"x": {"lora": {"a": jnp.ones(1)}}}})


def split_names(tree):
    return peft.split_params(tree).original


def test_what_does_not_fit_is_not_fused():
    model, params = adapted()
    with pytest.raises(CheckpointError, match="no adapter"):
        peft.fuse_params(tiny().params)
    flat = dict(flatten(params))
    place = "layer_0/mlp/_LoRAEinsum_linear/lora/b"
    for change, message in (
        ({place: jnp.ones((3, 5))}, "do not fit layer_0/mlp/linear"),
        ({place: jnp.ones((4, 72))}, "do not fit layer_0/mlp/linear"),
        ({"layer_0/mlp/linear": None}, "expected layer_0/mlp/linear in the tree; it has layer_0/mlp/gating_einsum"),
        ({"layer_0/mlp/linear": jnp.ones((100, 72), jnp.int8)}, "is packed"),
    ):
        tree: dict = {}
        for name, leaf in (flat | change).items():
            if leaf is not None:
                _tree.insert(tree, name, leaf)
        with pytest.raises(CheckpointError, match=message):
            peft.fuse_params(tree, model)
    only, untied = adapted(targets="embedder", tie_embedder=False)
    with pytest.raises(ConfigError, match="input alone"):
        peft.fuse_params(untied, only)


def test_a_square_weight_needs_the_model():
    """An MLP as wide as the model: its shapes do not say which axis is summed over."""
    loaded = tiny(intermediate_size=72)
    model, params = adapted(base=loaded, targets="mlp")
    with pytest.raises(CheckpointError, match="several axes; pass `model`"):
        peft.fuse_params(params)
    fused = flatten(peft.fuse_params(params, model))
    flat = flatten(params)
    a, b = (flat[f"layer_0/mlp/_LoRAEinsum_linear/lora/{part}"] for part in "ab")
    np.testing.assert_allclose(fused["layer_0/mlp/linear"], flat["layer_0/mlp/linear"] + a @ b, atol=1e-6)
    up = jnp.stack([flat["layer_0/mlp/_LoRAEinsum_gating_einsum/lora/a"] @ b for b in _blocks(flat)])
    np.testing.assert_allclose(
        fused["layer_0/mlp/gating_einsum"], flat["layer_0/mlp/gating_einsum"] + _laid(up), atol=1e-6
    )


def _blocks(flat):
    return jnp.moveaxis(flat["layer_0/mlp/_LoRAEinsum_gating_einsum/lora/b"], 1, 0)


def _laid(up):
    transposed = tiny(intermediate_size=72).config.transpose_gating_einsum
    return jnp.swapaxes(up, 1, 2) if transposed else up


def test_an_adapter_larger_than_its_weight_is_not_taken_out():
    model, params = adapted(use_dora=True, targets="mlp", size=20.0)
    with pytest.raises(CheckpointError, match="cannot be taken out"):
        peft.unfuse_params(peft.fuse_params(params, model), params, model)


# ---- masks --------------------------------------------------------------------------------------------------------


def test_any_subset_can_be_trained():
    _, params = adapted(targets=("attention", "embedder"))

    def chosen(**how):
        return {name for name, on in flatten(peft.mask_tree(params, **how)).items() if on}

    names = set(flatten(params))
    assert chosen(select="all") == names
    assert chosen(select="lora") == {name for name in names if "/lora/" in name}
    assert chosen(select="attention", freeze="lora") == {n for n in names if "/attn/" in n and "/lora/" not in n}
    assert chosen(select=("mlp", r"^layer_1/.*norm/scale$")) == {
        name
        for name in names
        if "/mlp/" in name or (name.startswith("layer_1/") and name.endswith("_norm/scale") and "attn/" not in name)
    } | {name for name in names if name.startswith("layer_1/attn/_")}
    assert "final_norm/scale" in chosen(select="norm") and chosen(select="embedder") == {"embedder/input_embedding"}
    for select in ("vision", "q_proj"):
        with pytest.raises(ConfigError, match=f"'{select}' means no leaf"):
            peft.mask_tree(params, select)
    with pytest.raises(ConfigError, match="packed weights cannot be trained"):
        peft.mask_tree({"mlp": {"w": jnp.ones(3, jnp.uint8)}}, "all")


def test_labels_drive_an_optimizer():
    params = {
        "layer_0": {"mlp": {"linear": jnp.ones(2), "lora": {"a": jnp.ones(2)}}},
        "final_norm": {"scale": jnp.ones(2)},
    }
    labels = peft.label_tree(params, {"fast": "lora", "slow": "norm"})
    assert labels == {"layer_0": {"mlp": {"linear": "freeze", "lora": {"a": "fast"}}}, "final_norm": {"scale": "slow"}}
    sgd = {"fast": optax.sgd(1.0), "slow": optax.sgd(0.5), "freeze": optax.set_to_zero()}
    optimizer = optax.multi_transform(sgd, labels)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    moved = flatten(optax.apply_updates(params, updates))
    found = {name: float(leaf[0]) for name, leaf in moved.items()}
    assert found == {"layer_0/mlp/linear": 1.0, "layer_0/mlp/lora/a": 0.0, "final_norm/scale": 0.5}
