# SPDX-License-Identifier: Apache-2.0
"""`gm.nn.LoRA` and the modules under it: places, numbers, isolation, training, and use by the samplers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from lora_models import ALL, QUICK, TOKENS, adapted, logits, tiny

from gemma import config as configs
from gemma import gm, peft, weights
from gemma.errors import ConfigError, ShapeError
from gemma.gm.ckpts._orbax import flatten

ONE = dict(num_hidden_layers=1, layer_pattern="G")  # where one layer shows it
TOKENS1 = jnp.asarray(TOKENS[:1, :6])


def shapes(model):
    """Slash name to shape of every parameter that `init` would make."""
    tree = jax.eval_shape(model.init, jax.random.key(0), TOKENS1)["params"]
    return {name: leaf.shape for name, leaf in flatten(tree).items()}


# ---- the tree -----------------------------------------------------------------------------------------------------


def test_the_tree_is_that_of_the_official_package():
    found = jax.eval_shape(gm.nn.LoRA(rank=4, model=gm.nn.Gemma3_270M()).init, jax.random.key(0), TOKENS1)["params"]
    lora = flatten(peft.split_params(found).lora)
    assert len(lora) == 180 and {leaf.dtype for leaf in lora.values()} == {jnp.dtype("bfloat16")}
    # what the count over all presets, below, goes by
    assert sum(leaf.size for leaf in lora.values()) == in_adapters(configs.preset("gemma3_270m"), 4)
    expected = {
        "attn/q_einsum/_LoRAEinsum_0/lora": ((640, 4), (4, 4, 256)),
        "attn/kv_einsum/_LoRAEinsum_0/lora": ((640, 4), (4, 2, 1, 256)),
        "attn/attn_vec_einsum/_LoRAEinsum_0/lora": ((4, 256, 4), (4, 640)),
        "mlp/_LoRAEinsum_gating_einsum/lora": ((640, 4), (4, 2, 2048)),
        "mlp/_LoRAEinsum_linear/lora": ((2048, 4), (4, 640)),
    }
    for place, (a, b) in expected.items():
        assert lora[f"layer_17/{place}/a"].shape == a and lora[f"layer_17/{place}/b"].shape == b
    base = jax.eval_shape(gm.nn.Gemma3_270M().init, jax.random.key(0), TOKENS1)["params"]
    assert jax.tree.structure(peft.split_params(found).original) == jax.tree.structure(base)


def test_images_get_adapters_too():
    loaded = tiny(images=True)
    names = shapes(gm.nn.LoRA(rank=2, model=loaded.model))
    tower = "vision_encoder/siglip_encoder/Transformer/encoderblock_0"
    assert names["embedder/mm_input_projection/_LoRAEinsum_0/lora/a"] == (16, 2)
    assert names[f"{tower}/MlpBlock_0/Dense_0/lora/b"] == (2, 24)
    assert names[f"{tower}/MultiHeadDotProductAttention_0/out/lora/a"] == (2, 8, 2)
    only = shapes(gm.nn.LoRA(rank=2, model=loaded.model, targets=("vision", "projector")))
    assert {name.split("/")[0] for name in only if "/lora/" in name} == {"vision_encoder", "embedder"}


def in_adapters(config, rank: int) -> int:
    """Numbers in the adapters of attention and MLP, by the weight table: rank x (in + out) of every array."""
    total = 0
    for members in weights.groups(weights.tensors(config), "flax").values():
        if members[0].part == "text" and len(members[0].shape) == 2:
            total += rank * (members[0].shape[1] + sum(tensor.shape[0] for tensor in members))
    return total


@pytest.mark.parametrize(
    "name", [name for name in configs.PRESETS if name.startswith(("gemma_", "gemma2_", "gemma3_"))]
)
def test_a_rank_of_16_trains_under_a_tenth_of_every_preset(name):
    config = configs.preset(name)
    assert 0 < in_adapters(config, 16) < 0.1 * config.num_parameters


def test_nor_does_a_member_that_the_table_does_not_describe():
    model = gm.nn.LoRA(rank=16, model=gm.nn.Gemma3n_E2B(), targets=("attention", "mlp"))
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS1)["params"]
    mask = peft.mask_tree(params, "lora")
    trained = sum(jax.tree.leaves(jax.tree.map(lambda leaf, on: leaf.size * on, params, mask)))
    whole = sum(leaf.size for leaf in jax.tree.leaves(params)) - trained
    assert 0 < trained < 0.1 * whole


# ---- numbers ------------------------------------------------------------------------------------------------------

WAYS = {
    "plain": dict(targets=ALL, alpha=7.0),
    "default": dict(),
    "rslora": dict(use_rslora=True, alpha=2.0, targets=("mlp",), rank_pattern={r"layer_0/mlp/linear": 5}),
    "dora": dict(use_dora=True, alpha=6.0),
}


@pytest.mark.parametrize(
    "family, way",
    [
        ("gemma", "plain"),
        ("gemma2", "default"),
        ("gemma3", "plain"),
        ("gemma3", "rslora"),
        ("gemma3", "dora"),
    ],
)
def test_fusing_gives_the_same_model_and_comes_apart_again(family, way):
    loaded = tiny(family, **ONE)
    model, params = adapted(base=loaded, **WAYS[way])
    got, plain = logits(model, params), logits(loaded.model, loaded.params)
    fused = peft.fuse_params(params, model)
    assert jax.tree.structure(fused) == jax.tree.structure(loaded.params)
    size = np.abs(got).max()
    np.testing.assert_allclose(logits(loaded.model, fused), got, rtol=0, atol=1e-5 * size)
    assert np.abs(got - plain).max() > 0.05 * size  # the adapter matters
    apart = peft.unfuse_params(fused, params, model)
    assert jax.tree.structure(apart) == jax.tree.structure(dict(params))
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=0, atol=2e-6), apart, dict(params))


def test_adapters_of_the_tower_fuse_too():
    loaded = tiny(images=True)
    model, params = adapted(base=loaded, targets=("vision", "projector"), rank=2)
    pictures = jnp.asarray(np.random.default_rng(0).integers(0, 255, (1, 1, 16, 16, 3), dtype=np.uint8))

    def encode(model, params):
        run = jax.jit(lambda p: model.apply({"params": p}, pictures, method="encode_images"), compiler_options=QUICK)
        return np.asarray(run(params))

    got, plain = encode(model, params), encode(loaded.model, loaded.params)
    np.testing.assert_allclose(
        encode(loaded.model, peft.fuse_params(params, model)), got, atol=1e-5 * np.abs(got).max()
    )
    assert np.abs(got - plain).max() > 0.01


def test_fusing_in_bfloat16_rounds_once():
    model, params = adapted()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    fused = flatten(peft.fuse_params(half))  # alpha is the rank: no model is needed
    wide = flatten(peft.fuse_params(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)))
    for name, leaf in fused.items():
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, wide[name].astype(jnp.bfloat16), err_msg=name)


def test_a_fresh_adapter_changes_nothing_and_b_learns_first():
    loaded = tiny(**ONE)
    model = gm.nn.LoRA(rank=2, model=loaded.model, dtype=jnp.float32, targets=ALL, dropout=0.5)
    fresh = jax.jit(model.init, compiler_options=QUICK)(jax.random.key(1), TOKENS1)["params"]
    params = peft.merge_params(loaded.params, peft.split_params(fresh).lora)
    same = peft.fuse_params(params, model)
    jax.tree.map(np.testing.assert_array_equal, same, dict(loaded.params))  # not a bit of any weight
    got, want = logits(model, params), logits(loaded.model, loaded.params)
    np.testing.assert_allclose(got, want, atol=3e-6)  # another program adds in another order

    @jax.jit
    def both(lora, key):
        def loss(lora, **how):
            merged = peft.merge_params(loaded.params, lora)
            out = jax.checkpoint(lambda p: model.apply({"params": p}, TOKENS1, **how).logits)(merged)
            return jnp.mean(out**2)

        value, grads = jax.value_and_grad(loss)(lora)
        dropped = [loss(lora, rngs={"dropout": key}), loss(lora, rngs={"dropout": key}, deterministic=True)]
        return grads, jnp.stack([value, *dropped])

    lora = peft.split_params(params).lora
    grads, _ = both(lora, jax.random.key(0))
    for name, leaf in flatten(grads).items():
        table = name.startswith("embedder/")  # there `a` starts at zero and `b` is random, as in PEFT
        learns = name.endswith("/a") if table else name.endswith("/b")
        assert bool(jnp.any(leaf != 0)) == learns, name
    moved = jax.tree.map(lambda leaf: leaf + 0.1, lora)
    losses = [both(moved, jax.random.key(seed))[1] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(losses[0], losses[1])
    assert losses[0][1] != losses[0][0] and losses[0][1] != losses[2][1]  # dropout, by key
    np.testing.assert_allclose(losses[0][2], losses[0][0], rtol=1e-6)  # switched off
    with pytest.raises(ConfigError, match="dropout"):
        jax.eval_shape(lambda: model.apply({"params": params}, TOKENS1, deterministic=False))


def test_wrappers_of_one_model_do_not_see_each_other():
    loaded = tiny(**ONE)
    first, second = (gm.nn.LoRA(rank=rank, model=loaded.model) for rank in (2, 5))
    for _ in range(2):
        assert shapes(first)["layer_0/mlp/_LoRAEinsum_linear/lora/a"][-1] == 2
        assert shapes(second)["layer_0/mlp/_LoRAEinsum_linear/lora/a"][-1] == 5
        assert not any("lora" in name for name in shapes(loaded.model))
    one, two = adapted(seed=1, base=loaded), adapted(seed=2, rank=5, base=loaded)
    want = [logits(*one), logits(*two), logits(loaded.model, loaded.params)]
    for index, (model, params) in enumerate([one, two, (loaded.model, loaded.params)] * 2):
        np.testing.assert_array_equal(logits(model, params), want[index % 3])
    with pytest.raises(ShapeError, match=r"lora/a: expected \(.*5\) for rank 5, got"):
        jax.eval_shape(lambda: two[0].apply({"params": one[1]}, TOKENS1))
    with pytest.raises(ShapeError, match="no adapter here"):
        jax.eval_shape(lambda: two[0].apply({"params": loaded.params}, TOKENS1))


# ---- use ----------------------------------------------------------------------------------------------------------


def test_samplers_take_it():
    loaded = tiny(**ONE)
    model, params = adapted(base=loaded, size=0.3)
    fused = peft.fuse_params(params, model)
    texts = []
    for net, tree in ((model, params), (loaded.model, fused)):
        sampler = gm.text.ChatSampler(model=net, params=tree, tokenizer=loaded.tokenizer, cache_length=64)
        texts.append(sampler.chat("hello", max_new_tokens=8))
    assert texts[0] == texts[1]
    assert model.config == loaded.model.config and model.INFO == loaded.model.INFO
    assert model.clone(return_last_only=True).model.return_last_only and "rank" in repr(model)


# ---- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(rank=0), "rank: expected a whole number of at least 1, got 0"),
        (dict(rank=2.5), "rank: expected a whole number"),
        (dict(rank=True), "rank: expected a whole number"),
        (dict(rank=73, targets="attention"), r"layer_0/attn/.*rank 73 is above that of the layer, 72"),
        (dict(rank=73, targets="embedder"), "rank 73 is above"),
        (dict(rank=2, targets=("attention", "q_proj")), "'q_proj' names no layer of this model; roles are attention"),
        (dict(rank=2, targets="vision"), "'vision' names no layer"),
        (dict(rank=2, targets=()), "targets: expected roles"),
        (dict(rank=2, targets="("), "not a regular expression"),
        (dict(rank=2, rank_pattern={"x": 0}), "rank: expected"),
        (dict(rank=2, alpha=float("nan")), "alpha: expected a finite number"),
        (dict(rank=2, dropout=1.0), "dropout: expected"),
        (dict(rank=2, targets="embedder", use_dora=True), "DoRA is defined for layers"),
    ],
)
def test_bad_input(fields, message):
    with pytest.raises(ConfigError, match=message):
        shapes(gm.nn.LoRA(model=tiny().model, **fields))


def test_a_model_without_layers():
    class Empty(nn.Module):
        def __call__(self, x):
            return x

    with pytest.raises(ConfigError, match="no layer that an adapter could sit on"):
        shapes(gm.nn.LoRA(rank=1, model=Empty()))


def test_verbose_names_the_layers(capsys):
    shapes(gm.nn.LoRA(rank=1, model=tiny().model, verbose=True, targets="mlp"))
    lines = capsys.readouterr().out.splitlines()
    assert "LoRA layer_0/mlp/linear" in lines and "     layer_0/attn/q_einsum" in lines


# ---- the modules alone --------------------------------------------------------------------------------------------


def layers():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 5)), jnp.float32)
    yield peft.LoRADense(rank=2, wrapped=nn.Dense(6)), x
    yield peft.LoRADenseGeneral(rank=2, wrapped=nn.DenseGeneral((6, 7), axis=(-2, -1))), x
    yield peft.LoRADenseGeneral(rank=2, wrapped=nn.DenseGeneral(6, axis=1)), x
    yield peft.LoRAEinsum(rank=2, wrapped=nn.Einsum((4, 5, 6), "...ab,abc->...c", use_bias=False)), x


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("dora", [False, True])
def test_a_layer_alone(case, dora):
    """Its result is that of a layer whose kernel has the two factors in it."""
    module, x = list(layers())[case]
    module = module.clone(scale=0.5, use_dora=dora)
    params = module.init(jax.random.key(0), x)["params"]
    assert set(params) - {"bias"} == {"kernel", "lora"}
    np.testing.assert_allclose(module.apply({"params": params}, x), module.wrapped.apply(_alone(params), x), atol=1e-6)
    rng = np.random.default_rng(1)
    params["lora"] = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params["lora"])
    a, b = params["lora"]["a"], params["lora"]["b"]
    kernel = np.asarray(params["kernel"], np.float64)
    moved = kernel + 0.5 * np.tensordot(a, b, 1)
    if dora:
        axes = tuple(range(a.ndim - 1))
        moved *= params["lora"]["magnitude"] * np.sqrt((kernel**2).sum(axes) / (moved**2).sum(axes))
    want = module.wrapped.apply(_alone({**params, "kernel": jnp.asarray(moved, jnp.float32)}), x)
    np.testing.assert_allclose(module.apply({"params": params}, x), want, atol=2e-5)


def _alone(params):
    return {"params": {name: leaf for name, leaf in params.items() if name != "lora"}}


def test_an_interceptor_offers_each_module_once_and_not_inside_a_replacement():
    class Twice(nn.Module):
        wrapped: nn.Module

        def __call__(self, x):
            return 2 * self.wrapped(x)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(3)
            return nn.Dense(2)(layer(layer(x)))

    offered = []

    def replace(module):
        offered.append(type(module).__name__)
        return Twice(module) if isinstance(module, nn.Dense) and module.features == 3 else None

    x = jnp.ones((1, 3))
    variables = Net().init(jax.random.key(0), x)
    plain = Net().apply(variables, x)
    with peft.ModuleInterceptor(replace) as interceptor, interceptor:  # a second time changes nothing
        got = Net().apply(variables, x)
    assert offered == ["Net", "Dense", "Dense"]
    bias = variables["params"]["Dense_1"]["bias"]
    np.testing.assert_allclose(got - bias, 4 * (plain - bias), rtol=1e-6)  # two calls, each doubled (zero biases)
    np.testing.assert_array_equal(Net().apply(variables, x), plain)


def test_every_public_name_is_there():
    for name in peft.__all__:
        assert getattr(peft, name) is not None
    assert gm.peft is peft
