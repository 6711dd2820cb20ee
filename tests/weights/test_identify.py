# SPDX-License-Identifier: Apache-2.0
"""Every published model is recognized by its names and shapes in every format, and nothing else is."""

from __future__ import annotations

import pytest

from gemma import weights
from gemma.config import PRESETS, text_only
from gemma.errors import ConfigError


@pytest.mark.parametrize("format", weights.FORMATS)
def test_every_preset(format):
    found = 0
    for name, config in PRESETS.items():
        for member in (config, text_only(config)) if getattr(config, "vision", None) is not None else (config,):
            try:
                shapes = weights.expected(member, format)
            except ConfigError:  # the format has no place for it
                continue
            if len(weights.tensors(member)) > sum(format in t.slots for t in weights.tensors(member)):
                continue  # it holds a part of the model only
            assert weights.identify(shapes, format=format, path=name) == member, name
            found += 1
    assert found > 3


def test_other_rows_another_width_a_missing_tensor():
    config = PRESETS["gemma2_2b"]
    shapes = weights.expected(config, "flax")
    table = next(name for name, shape in shapes.items() if shape[0] == config.table_rows)
    assert (
        weights.identify(shapes | {table: (config.vocab_size, config.hidden_size)}, format="flax", path="x") == config
    )
    last = list(shapes)[-1]
    for wrong in (shapes | {table: (config.table_rows, 8)}, {k: v for k, v in shapes.items() if k != last}):
        with pytest.raises(ConfigError, match="x: no published model has exactly these"):
            weights.identify(wrong, format="flax", path="x")
