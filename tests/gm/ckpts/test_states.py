# SPDX-License-Identifier: Apache-2.0
"""Transforms of trainers' states, and partial restoring with its printed mapping."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax_trees import BF16, LITERAL_CONFIG, flat, literal, nested, same

from gemma.errors import CheckpointError, WeightsMismatch
from gemma.gm import ckpts
from gemma.gm.ckpts import _checkpoint, _quantization


@dataclasses.dataclass(frozen=True)
class State:
    """As a trainer's: other fields must survive."""

    params: Any
    step: int = 3


@dataclasses.dataclass(frozen=True)
class ReplacingState(State):
    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("states") / "x"
    ckpts.save_params(nested(literal()), path, layout="flat", config=LITERAL_CONFIG)
    return path


def fresh(dtype=None):
    return jax.tree.map(lambda a: jnp.zeros(a.shape, dtype or a.dtype), nested(literal()))


def lora(name, r=2):
    return {
        f"{name}/lora/a": jnp.full((8, r), 0.5, jnp.bfloat16),
        f"{name}/lora/b": jnp.full((r, 4, 6), 0.25, jnp.bfloat16),
    }


@pytest.mark.parametrize(
    "make",
    [State, ReplacingState, lambda p: {"params": p, "step": 3}, lambda p: p],
    ids=["dataclass", "replace", "dict", "tree"],
)
def test_loading_into_a_state(saved, make):
    state = make(fresh())
    loader = ckpts.LoadCheckpoint(path=saved)
    done = loader.transform(state)
    got = done.params if isinstance(done, State) else done.get("params", done)
    same(got, literal())
    assert type(done) is type(state) and (not isinstance(done, State) or done.step == 3)
    assert loader.transform_after_optimizer(done) is done
    assert ckpts.LoadCheckpoint(str(saved), True) == ckpts.LoadCheckpoint(path=str(saved), quantize=True)


def test_dtypes_of_the_state_are_followed(saved):
    done = ckpts.LoadCheckpoint(path=saved).transform(State(fresh(jnp.float32)))
    same(done.params, {n: a.astype(np.float32) for n, a in literal().items()})


def test_a_state_without_parameters(saved):
    for wrong in (3, State(None), {"params": 3}):
        with pytest.raises(CheckpointError, match="expected a tree of parameters"):
            ckpts.LoadCheckpoint(path=saved).transform(wrong)

    class Odd:
        params = fresh()

    with pytest.raises(CheckpointError, match="cannot be given new parameters"):
        ckpts.LoadCheckpoint(path=saved).transform(Odd())


def test_quantization_aware_states(saved):
    renamed = _quantization.convert_to_qat_checkpoint(fresh())
    done = ckpts.LoadCheckpoint(path=saved, quantize=True).transform(State(renamed))
    assert "_SimulateQuantizedEinsum_0" in done.params["layer_0"]["attn"]["q_einsum"]
    plain = ckpts.LoadCheckpoint(path=saved, quantize=True).transform(
        State(fresh())
    )  # the wrapper's tree is the plain one
    same(plain.params, literal())


def test_adapters_stay(saved):
    params = nested(
        flat(fresh()) | lora("layer_0/attn/q_einsum/_LoRAEinsum_0") | lora("layer_1/mlp/_LoRAEinsum_linear")
    )
    with pytest.raises(WeightsMismatch):
        ckpts.LoadCheckpoint(path=saved).transform(State(params))
    done = ckpts.SkipLoRA(ckpts.LoadCheckpoint(path=saved)).transform(State(params))
    adapters = {n: a for n, a in flat(done.params).items() if "/lora/" in n}
    assert len(adapters) == 4 and float(adapters["layer_0/attn/q_einsum/_LoRAEinsum_0/lora/a"][0, 0]) == 0.5
    same({n: a for n, a in flat(done.params).items() if "/lora/" not in n}, literal())
    assert done.step == 3 and ckpts.SkipLoRA(wrapped=ckpts.LoadCheckpoint(saved)).transform_after_optimizer(1) == 1


def test_policy_and_anchor(saved, tmp_path):
    state = State({"policy": fresh(), "anchor": fresh()})
    done = ckpts.AnchoredPolicyLoader(policy=ckpts.LoadCheckpoint(path=saved)).transform(state)
    same(done.params["policy"], literal())
    same(done.params["anchor"], literal())
    ckpts.release(done.params["policy"])  # as the first training step does, which donates it
    same(done.params["anchor"], literal())
    other = {n: np.ones_like(a) for n, a in literal().items()}
    ckpts.save_params(nested(other), tmp_path / "y", config=LITERAL_CONFIG)
    both = ckpts.AnchoredPolicyLoader(
        policy=ckpts.LoadCheckpoint(path=saved), anchor=ckpts.LoadCheckpoint(path=tmp_path / "y")
    )
    done = both.transform(State({"policy": fresh(), "anchor": fresh()}))
    same(done.params["policy"], literal())
    same(done.params["anchor"], other)
    for wrong in ({"policy": {}}, {"policy": {}, "anchor": {}, "other": {}}, {}):
        with pytest.raises(ValueError, match="keys 'policy' and 'anchor'"):
            both.transform(State(wrong))
    small = {k: v for k, v in fresh().items() if k != "layer_1"}
    with pytest.raises(CheckpointError, match="different models.*layer_1/attn"):
        ckpts.AnchoredPolicyLoader(policy=ckpts.LoadCheckpoint(path=saved)).transform(
            State({"policy": fresh(), "anchor": small})
        )


def test_official_module_paths():
    for name in ("load_params", "save_params", "LoadCheckpoint", "SkipLoRA", "AnchoredPolicyLoader"):
        assert getattr(_checkpoint, name) is getattr(ckpts, name)


# ---- partial ----------------------------------------------------------------------------------------------------------


def test_partial_restoring(saved):
    params = nested({n: a for n, a in flat(fresh(jnp.float32)).items() if not n.startswith("vision_")})
    params["head"] = {"w": jnp.ones((8, 3), jnp.float32)}
    lines: list[str] = []
    done = ckpts.restore_partial(saved, params, report=lines.append)
    assert float(done.params["head"]["w"][0, 0]) == 1 and done.kept == {"head/w": "no head/w in the checkpoint"}
    got = flat(done.params)
    for name, array in literal().items():
        if name in got:
            assert np.array_equal(np.asarray(got[name]), array.astype(np.float32)), name
    assert all(name.startswith("vision_") for name in done.unused) and len(done.unused) == 21
    assert "final_norm/scale" in lines[0] and "<- final_norm/scale" in lines[0]
    assert "head/w" in lines[0] and lines[0].endswith("26 restored, 1 kept, 21 not used")
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_selecting_and_renaming(saved, capsys):
    params = {
        "body": {"embedder": {"input_embedding": jnp.zeros((24, 8), jnp.bfloat16)}},
        "layer_0": fresh()["layer_1"],
    }
    done = ckpts.restore_partial(
        saved,
        params,
        select="body|layer_0/attn",
        rename=lambda n: n.removeprefix("body/").replace("layer_0", "layer_1"),
    )
    assert np.array_equal(
        np.asarray(done.params["body"]["embedder"]["input_embedding"]), literal()["embedder/input_embedding"]
    )
    assert done.taken["layer_0/attn/q_einsum/w"] == "layer_1/attn/q_einsum/w"
    assert done.kept["layer_0/mlp/linear"] == "not selected"
    printed = " ".join(capsys.readouterr().out.split())
    assert "body/embedder/input_embedding <- embedder/input_embedding" in printed
    assert "layer_0/mlp/linear kept: not selected" in printed and printed.endswith("6 restored, 6 kept, 41 not used")
    some = ckpts.restore_partial(
        saved, params, rename={"body/embedder/input_embedding": "embedder/input_embedding"}, report=None
    )
    assert "body/embedder/input_embedding" in some.taken
    none = ckpts.restore_partial(saved, params, rename=lambda n: None if n.startswith("body") else n, report=None)
    assert none.kept["body/embedder/input_embedding"] == "not asked for"


def test_shapes_that_differ(saved):
    params = {"final_norm": {"scale": jnp.zeros(5)}, "embedder": {"input_embedding": jnp.zeros((24, 8))}}
    with pytest.raises(WeightsMismatch, match=r"final_norm/scale: expected \(5,\), got \(8,\)"):
        ckpts.restore_partial(saved, params)
    done = ckpts.restore_partial(saved, params, allow_misshaped=True, report=None)
    assert "another shape" in done.kept["final_norm/scale"] and list(done.taken) == ["embedder/input_embedding"]
    with pytest.raises(CheckpointError, match="none of the 1 leaves would be restored"):
        ckpts.restore_partial(saved, {"nothing": jnp.zeros(1)})
    for wrong in ({}, {"a": 1.5}, [jnp.zeros(1)]):
        with pytest.raises(CheckpointError, match="expected a nested tree of arrays"):
            ckpts.restore_partial(saved, wrong)


def test_partial_restoring_of_a_checkpoint_with_holes(tmp_path):
    ckpts.save_params({"embedder": {"input_embedding": np.ones((24, 8), BF16)}}, tmp_path / "x")
    done = ckpts.restore_partial(tmp_path / "x", fresh(), report=None)
    assert list(done.taken) == ["embedder/input_embedding"] and len(done.kept) == len(literal()) - 1
