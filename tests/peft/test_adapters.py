# SPDX-License-Identifier: Apache-2.0
"""Adapters as files of their own making: what is kept, what is refused, and several of them on one model."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lora_models import QUICK, TOKENS, adapted, logits, tiny

from gemma import adapters, gm, peft
from gemma.errors import (
    CheckpointError,
    CheckpointNotFound,
    ConfigError,
    FormatError,
    SaveError,
    UnsupportedError,
    WeightsMismatch,
)
from gemma.formats.safetensors import write_safetensors
from gemma.gm.ckpts._orbax import flatten

CONFIG = tiny().model.config.gemma


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, model, parameters) of an adapter on every layer."""
    path = tmp_path_factory.mktemp("adapters") / "adapter"
    model, params = adapted(alpha=5.0, dropout=0.25, targets=("attention", "mlp"))
    peft.save_adapter(path, params, model, base_model="someone/tiny")
    return path, model, params


def edited(saved, tmp_path, settings=None, tensors=None, drop=()):
    """A copy of the adapter's folder with other settings or tensors."""
    from gemma.checkpoint import open_checkpoint

    folder = tmp_path / "edited"
    folder.mkdir()
    values = json.loads((saved[0] / "adapter_config.json").read_text()) | (settings or {})
    (folder / "adapter_config.json").write_text(json.dumps(values))
    with open_checkpoint(saved[0] / "adapter_model.safetensors") as opened:
        arrays = {name: np.array(opened.read(name)) for name in opened.tensors if name not in drop}
        write_safetensors(folder / "adapter_model.safetensors", arrays | (tensors or {}), dict(opened.metadata))
    return folder


def test_what_is_kept(saved):
    path, model, params = saved
    loaded = tiny()
    assert sorted(file.name for file in path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    settings = json.loads((path / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (3, 5, 0.25)
    assert settings["base_model_name_or_path"] == "someone/tiny" and settings["rank_pattern"] == {}
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert settings["target_modules"] == names
    adapter = peft.load_adapter(path, loaded.model, loaded.params)
    assert adapter.model.spec.dropout == 0.25 and adapter.model.spec.of("layer_0/mlp/linear").scale == 5 / 3
    want = flatten(peft.split_params(params).lora)
    got = flatten(adapter.lora)
    assert got.keys() == want.keys()
    for name, leaf in got.items():
        np.testing.assert_array_equal(leaf, want[name], err_msg=name)
    # the model that comes with it asks for exactly these parameters
    shapes = jax.eval_shape(adapter.model.init, jax.random.key(0), jnp.asarray(TOKENS))["params"]
    assert flatten(peft.split_params(shapes).lora).keys() == want.keys()


def test_the_program_and_load_model_fold_it_in(tmp_path):
    from typer.testing import CliRunner

    from gemma.cli.__main__ import app
    from gemma.testing import tiny_config, write_tiny_gguf

    config = tiny_config("gemma3", query_pre_attn_scalar=None, num_hidden_layers=1, layer_pattern="G")
    path = str(write_tiny_gguf(tmp_path / "base.gguf", config))
    loaded = gm.text.load_model(path)
    model, params = adapted(base=loaded, targets=("attention", "mlp"), size=0.4)
    for name in ("folder", "file.gguf"):
        peft.save_adapter(tmp_path / name, params, model)
        got = gm.text.load_model(path, adapter=tmp_path / name)
        want = peft.fuse_params(params, model)
        jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, atol=1e-6), got.params, want)
    flags = ["generate", "hello", "--model", path, "--json", "-n", "6", "--temperature", "3", "--seed", "1"]
    said = CliRunner().invoke(app, [*flags, "--adapter", str(tmp_path / "folder"), "--backend", "jax"])
    assert said.exit_code == 0, said.output
    session = gm.text._generate.Session(got)
    session.begin(64)
    from gemma.sampling import SamplingParams

    ids = json.loads(said.stdout)["prompt_ids"]
    params = SamplingParams(max_new_tokens=6, temperature=3.0, seed=1)
    assert json.loads(said.stdout)["ids"] == list(session.tokens(ids, params, ()))


def test_a_base_of_other_weights_is_refused_unless_any_will_do(saved):
    path, model, params = saved
    want = flatten(peft.fuse_params(params, model))
    file = adapters.open_adapter(path, CONFIG)
    fused = flatten(peft.fuse_adapter(tiny().params, file, CONFIG))
    for name, leaf in fused.items():
        np.testing.assert_allclose(leaf, want[name], atol=1e-6, err_msg=name)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny().params)
    peft.fuse_adapter(half, file, CONFIG)  # the same weights, rounded, are the same base
    other = tiny(seed=1).params
    for refused in (
        lambda: peft.fuse_adapter(other, file, CONFIG),
        lambda: peft.load_adapter(path, tiny().model, other),
    ):
        with pytest.raises(CheckpointError, match=r"was trained on a base \(someone/tiny\) with other weights"):
            refused()
    peft.fuse_adapter(other, file, CONFIG, check_base=False)
    assert peft.load_adapter(path, tiny().model, other, check_base=False).lora
    assert peft.load_adapter(path, tiny().model).lora  # nothing to compare with


def test_some_layers_only(tmp_path):
    """Targets that are single layers come back as those layers."""
    model, params = adapted(targets=(r"layer_1/attn/q", r"layer_0/mlp/linear"), rank_pattern={"layer_1/.*": 2})
    peft.save_adapter(tmp_path / "x", params, model)
    settings = json.loads((tmp_path / "x/adapter_config.json").read_text())
    assert settings["target_modules"] == ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    adapter = peft.load_adapter(tmp_path / "x", tiny().model, tiny().params)
    shapes = jax.eval_shape(adapter.model.init, jax.random.key(0), jnp.asarray(TOKENS))["params"]
    assert flatten(peft.split_params(shapes).lora).keys() == flatten(adapter.lora).keys()
    merged = peft.merge_params(tiny().params, adapter.lora)
    for one, two in zip(
        *(flatten(peft.fuse_params(p, m)).values() for p, m in ((params, model), (merged, adapter.model)))
    ):
        np.testing.assert_array_equal(one, two)


# ---- refused ------------------------------------------------------------------------------------------------------

_Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(settings={"peft_type": "IA3"}), UnsupportedError, "peft_type: expected LORA, got 'IA3'"),
        (dict(settings={"bias": "all"}), UnsupportedError, "bias: expected 'none'"),
        (dict(settings={"modules_to_save": ["lm_head"]}), UnsupportedError, "modules_to_save is"),
        (dict(settings={"r": 7}), CheckpointError, "expected factors of rank 7"),
        (dict(settings={"lora_alpha": "8"}), FormatError, "lora_alpha: expected a number"),
        (dict(settings={"lora_alpha": None}), FormatError, "lora_alpha: expected a number"),
        (dict(settings={"rank_pattern": {"(": 2}}), FormatError, "not a regular expression"),
        (dict(settings={"use_dora": True}), CheckpointError, "one is missing"),
        (dict(drop=[_Q]), WeightsMismatch, r"missing \(1\):\n  .*q_proj.lora_A"),
        (
            dict(tensors={_Q: np.zeros((3, 71), np.float32)}),
            WeightsMismatch,
            r"attn.q: expected \(96, 72\), got \(96, 71\)",
        ),
        (
            dict(tensors={_Q: np.full((3, 72), np.nan, np.float32)}),
            CheckpointError,
            "layers.0.attn.q: the adapter holds NaN",
        ),
        (
            dict(tensors={_Q.replace("q_proj", "x_proj"): np.zeros((3, 72), "f4")}),
            WeightsMismatch,
            "unexpected .*\n.*x_proj",
        ),
        (dict(tensors={_Q.replace("s.0.", "s.9."): np.zeros((3, 72), "f4")}), WeightsMismatch, "another model"),
    ],
)
def test_broken_adapters(saved, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        adapters.open_adapter(edited(saved, tmp_path, **change), CONFIG)


def test_no_adapter(saved, tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointNotFound, match="expected an adapter"):
            adapters.open_adapter(path, CONFIG)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointNotFound, match="save it again with safetensors"):
        adapters.open_adapter(tmp_path, CONFIG)
    model, params = saved[1:]
    with pytest.raises(SaveError):
        peft.save_adapter(saved[0], params, model)  # there is one already
    with pytest.raises(CheckpointError, match="no adapter"):
        peft.save_adapter(tmp_path / "x", tiny().params, model)
    with pytest.raises(ConfigError, match="expected the gm.nn.LoRA"):
        peft.save_adapter(tmp_path / "x", params, tiny().model)
    with pytest.raises(ConfigError, match="expected peft or gguf"):
        peft.save_adapter(tmp_path / "x", params, model, format="onnx")
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    with pytest.raises(CheckpointError, match="NaN"):
        peft.save_adapter(tmp_path / "x", bad, model)
    dora, tree = adapted(use_dora=True)
    with pytest.raises(CheckpointError, match="pass the whole tree"):
        peft.save_adapter(tmp_path / "x", peft.split_params(tree).lora, dora)
    peft.save_adapter(tmp_path / "dora", tree, dora)
    with pytest.raises(CheckpointError, match="pass `params`"):
        peft.load_adapter(tmp_path / "dora", tiny().model)
    with pytest.raises(WeightsMismatch, match="another model"):
        peft.load_adapter(saved[0], tiny(intermediate_size=96).model)


# ---- several ------------------------------------------------------------------------------------------------------


def test_several_adapters_switch_without_compiling_again(saved):
    loaded = tiny()
    first = peft.load_adapter(saved[0], loaded.model, loaded.params)
    second = adapted(seed=9, rank=2, alpha=1.0, targets=("attention", "embedder"))
    both = peft.AdapterSet({"one": first, "two": (second[0], peft.split_params(second[1]).lora)})
    traces = []

    def run(params):
        traces.append(1)
        return both.model.apply({"params": params}, jnp.asarray(TOKENS)).logits

    run = jax.jit(run, compiler_options=QUICK)

    def got(weights=None):
        return np.asarray(run(peft.merge_params(loaded.params, both.lora(weights))))

    near = dict(rtol=0, atol=1e-5)
    for name, (model, params) in (("one", saved[1:]), ("two", second)):  # folded in: one program for all of them
        np.testing.assert_allclose(got({name: 1.0}), logits(loaded.model, peft.fuse_params(params, model)), **near)
    np.testing.assert_allclose(got({}), logits(loaded.model, loaded.params), **near)
    mixed, apart = got({"one": 0.5, "two": -2.0}), dict(flatten(loaded.params))
    for weight, (model, params) in ((0.5, saved[1:]), (-2.0, second)):
        fused = flatten(peft.fuse_params(params, model))
        apart = {name: leaf + weight * (fused[name] - loaded_leaf(name)) for name, leaf in apart.items()}
    tree: dict = {}
    for name, leaf in apart.items():
        gm.ckpts._load.insert(tree, name, leaf)
    np.testing.assert_allclose(mixed, logits(loaded.model, tree), rtol=0, atol=3e-5)
    assert len(traces) == 1 and np.abs(got() - mixed).max() > 0.1
    for weights, message in (
        ({"three": 1.0}, "'three': no such adapter; there are one, two"),
        ({"one": float("inf")}, "finite"),
    ):
        with pytest.raises(ConfigError, match=message):
            both.lora(weights)


def loaded_leaf(name):
    return flatten(tiny().params)[name]


def test_sets_that_cannot_be():
    one, dora = adapted(), adapted(use_dora=True)
    other = adapted(base=tiny("gemma2"))
    with pytest.raises(ConfigError, match="at least one"):
        peft.AdapterSet({})
    with pytest.raises(ConfigError, match="'b' is an adapter of another model than 'a'"):
        peft.AdapterSet({"a": one, "b": other})
    with pytest.raises(ConfigError, match="'b' is a DoRA adapter"):
        peft.AdapterSet({"a": one, "b": dora})
