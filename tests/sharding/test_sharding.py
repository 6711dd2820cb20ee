"""Strategies decide by the table's axes; on eight virtual devices the answer is that of one."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from jax.sharding import PartitionSpec as P

from gemma import gm
from gemma.config import preset
from gemma.errors import ConfigError
from gemma.gm.sharding._strategies import TensorSharding, param_axes


def test_eight_devices_answer_as_one(tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sharded_run.py")), str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ok") == 3


@pytest.mark.parametrize("name", ["gemma_7b", "gemma2_27b", "gemma3_1b", "gemma3_12b"])
def test_every_leaf_has_axes(name):
    model = gm.nn.Transformer.from_config(preset(name))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), "int32"))["params"]
    axes = param_axes(preset(name))
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        key = "/".join(part.key for part in path)
        assert len(axes[key]) == leaf.ndim, key


def test_widths_and_heads_are_cut_where_they_divide():
    mesh = SimpleNamespace(shape={"data": 1, "fsdp": 2, "tensor": 4})  # of more devices than a test has
    spec = TensorSharding._spec
    assert spec(mesh, ("heads", "embed", None), (8, 2560, 256)) == P("tensor", "fsdp", None)
    assert spec(mesh, (None, "kv_heads", "embed", None), (2, 1, 1152, 256)) == P(None, None, "fsdp", None)
    assert spec(mesh, ("vocab", "embed"), (262_145, 1152)) == P(None, "fsdp")
    assert spec(mesh, ("embed",), (7,)) == P(None)
    assert spec(mesh, (), (4, 4)) == P()


@pytest.mark.parametrize("sizes", [dict(data=3), dict(data=0), dict(data=-1, tensor=-1), dict(tensor=-2)])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(ConfigError, match="product is the 1 devices"):
        gm.sharding.make_mesh(**sizes, devices=jax.devices()[:1])


def test_heads_that_cannot_be_divided_are_refused():
    mesh = SimpleNamespace(shape={"data": 1, "fsdp": 1, "tensor": 3})
    with pytest.raises(ConfigError, match="4 attention heads"):
        TensorSharding(preset("gemma3_1b"), mesh)({})
