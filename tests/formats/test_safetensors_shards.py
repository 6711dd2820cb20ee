# SPDX-License-Identifier: Apache-2.0
"""Streaming and sharding of safetensors files, read back by the `safetensors` package."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from safetensors.numpy import load

from gemma.errors import ShapeError
from gemma.formats import safetensors as st

F32, HALF = np.dtype(np.float32), np.dtype(np.float16)


def test_tensors_are_made_one_at_a_time_in_the_order_of_the_file():
    specs = [st.TensorSpec("a", HALF, (3,)), st.TensorSpec("b", F32, (2, 2)), st.TensorSpec("c", F32, ())]
    asked, file = [], io.BytesIO()

    def read(spec):
        asked.append(spec.name)
        return [np.full(spec.shape, len(asked), spec.dtype)]

    size = st.stream_safetensors(file, specs, read, {"format": "pt"})
    assert asked == ["b", "c", "a"] and size == len(file.getvalue())
    found = load(file.getvalue())
    assert set(found) == {"a", "b", "c"} and found["b"].tolist() == [[1, 1], [1, 1]] and found["c"] == 2
    assert found["a"].astype(np.float32).tolist() == [3, 3, 3]


@pytest.mark.parametrize("wrong", [np.zeros(3, np.float16), np.zeros(4, np.float32), np.zeros((1, 3), np.float32)])
def test_a_tensor_that_is_not_what_its_spec_says_is_refused(wrong):
    with pytest.raises(ShapeError, match="a: expected float32"):
        st.stream_safetensors(io.BytesIO(), [st.TensorSpec("a", F32, (3,))], lambda _: [wrong])


def test_shards_hold_at_most_what_is_asked_in_order():
    specs = [st.TensorSpec(f"t{i}", F32, (n,)) for i, n in enumerate((1, 2, 3, 100, 1, 1))]
    parts = st.shard(specs, 12)
    assert [[s.name for s in part] for part in parts] == [["t0", "t1"], ["t2"], ["t3"], ["t4", "t5"]]
    assert st.shard(specs, 10**9) == [specs] and st.shard([], 5) == []
    index = json.loads(st.index_text(parts, ["a", "b", "c", "d"]))
    assert index["metadata"]["total_size"] == 4 * 108
    assert index["weight_map"] == {"t0": "a", "t1": "a", "t2": "b", "t3": "c", "t4": "d", "t5": "d"}


def test_shards_that_could_not_be_read_again_are_refused():
    specs = [st.TensorSpec(f"t{i}", F32, (1,)) for i in range(st.MAX_SHARDS + 1)]
    with pytest.raises(ShapeError, match=f"makes {st.MAX_SHARDS + 1} files"):
        st.shard(specs, 4)
    with pytest.raises(ShapeError, match="at least 1"):
        st.shard(specs, 0)


def test_repeated_names_are_refused():
    with pytest.raises(ShapeError, match="new name"):
        st.header([st.TensorSpec("a", F32, (1,)), st.TensorSpec("a", F32, (1,))])


def test_a_tensor_may_come_in_runs():
    spec, file = st.TensorSpec("a", F32, (3, 2)), io.BytesIO()
    st.stream_safetensors(file, [spec], lambda _: (np.full((n, 2), n, np.float32) for n in (1, 2)))
    assert load(file.getvalue())["a"].tolist() == [[1, 1], [2, 2], [2, 2]]
    for runs in ((1,), (2, 2), ()):
        with pytest.raises(ShapeError, match=r"a: expected float32 \(3, 2\)"):
            st.stream_safetensors(io.BytesIO(), [spec], lambda _, runs=runs: (np.zeros((n, 2), F32) for n in runs))
