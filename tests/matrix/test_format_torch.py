# SPDX-License-Identifier: Apache-2.0
"""Every family from every format into the PyTorch networks: each parameter equal, none left over."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_format_matrix import MODELS, cells, values_of, write

from gemma import weights
from gemma._torch.load import load_weights
from gemma.gm._proof import open_any
from gemma.modeling_gemma import GemmaForCausalLM
from gemma.modeling_gemma3 import Gemma3ForConditionalGeneration
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration

NETWORKS = {
    "Gemma 1": GemmaForCausalLM,
    "Gemma 2": GemmaForCausalLM,
    "Gemma 3 text": GemmaForCausalLM,
    "Gemma 3 vision": Gemma3ForConditionalGeneration,
    "PaliGemma 1": PaliGemmaForConditionalGeneration,
    "PaliGemma 2": PaliGemmaForConditionalGeneration,
}


@pytest.mark.parametrize(("family", "format"), list(cells("PyTorch", NETWORKS)))
def test_into_the_pytorch_networks(family, format, tmp_path):
    config = MODELS[family]
    write(tmp_path / "model", family, format)
    with torch.device("meta"):
        model = NETWORKS[family](config)
    with open_any(tmp_path / "model") as opened:
        load_weights(model, opened, config, dtype=torch.float32)
    expected = weights.pack(values_of(family), config, format="hf")
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, array in expected.items():
        assert parameters[name].device.type == "cpu" and parameters[name].dtype == torch.float32
        assert np.array_equal(parameters[name].detach().numpy(), array), name
