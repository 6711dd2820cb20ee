# SPDX-License-Identifier: Apache-2.0
"""A tiny EmbeddingGemma in a folder of sentence-transformers, with the weights of the Hugging Face oracle."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hf_tiny_oracles import make

from gemma import saving, weights
from gemma.checkpoint import TokenizerSource
from gemma.hf_config import read_config
from gemma.testing import tiny_pieces

WIDTHS = (100, 48)  # of the dense layers: none equals another size


@pytest.fixture(autouse=True, scope="package")
def quick_compiles():
    """Tiny programs, each run a few times: compiling them is the cost, so XLA optimizes little."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@dataclasses.dataclass(frozen=True)
class Oracle:
    """The encoder of transformers, two dense matrices [out, in], our configuration, and the folder of them all."""

    hf: object
    dense: list[np.ndarray]
    config: object
    folder: object


@pytest.fixture(scope="package")
def oracle(tmp_path_factory) -> Oracle:
    hf, theirs = make("embeddinggemma", num_hidden_layers=3, layer_types=["sliding_attention"] * 2 + ["full_attention"])
    config = dataclasses.replace(read_config(theirs.to_dict()), embedding_dense=WIDTHS)
    rng = np.random.default_rng(4)
    sizes = (config.hidden_size, *WIDTHS)
    dense = [rng.normal(0, 0.1, (o, i)).astype(np.float32) for i, o in itertools.pairwise(sizes)]
    state = {key: tensor.numpy() for key, tensor in hf.state_dict().items()}
    state |= {f"{n}_Dense/linear.weight": w for n, w in enumerate(dense, 2)}
    values = weights.unpack(state, config, format="hf")
    pieces, scores, types = zip(*tiny_pieces(320), strict=True)
    special, flags = (
        dict(pad=0, eos=1, bos=2, unk=3),
        dict(add_bos_token=True, add_eos_token=True, add_space_prefix=False),
    )
    tokenizer = TokenizerSource(
        "gguf", None, list(pieces), np.array(scores, np.float32), np.array(types, np.int32), special, flags
    )
    folder = tmp_path_factory.mktemp("embeddinggemma") / "model"
    saving.save(folder, saving.from_arrays(values, config), config, format="safetensors", tokenizer=tokenizer)
    return Oracle(hf, dense, config, folder)
