# SPDX-License-Identifier: Apache-2.0
"""The cells "proven" of docs/formats.md: other programs load what we write, we load what they write, same logits.

transformers is the reference for the logits of every family; torch.load, numpy, Orbax and llama.cpp are the programs
that own a format. Axes and names between them and transformers are turned by `foreign_layouts`, without our table.
"""

from __future__ import annotations

import json

import foreign_layouts as layouts
import hf_tiny_oracles as oracles
import numpy as np
import pytest
import torch

from gemma import weights
from gemma.checkpoint import load_tensors, open_checkpoint
from gemma.hf_config import read_config
from gemma.saving import from_arrays, save
from gemma.testing import random_tensors

NAMES = {
    "Gemma 1": "gemma1",
    "Gemma 2": "gemma2",
    "Gemma 3 text": "gemma3_text",
    "Gemma 3 vision": "gemma3",
    "PaliGemma 1": "paligemma1",
    "PaliGemma 2": "paligemma2",
    "T5Gemma": "t5gemma",
    "EmbeddingGemma": "embeddinggemma",
}
TEXT = ("Gemma 1", "Gemma 2", "Gemma 3 text")
BUFFERS = ("position_ids", "inv_freq", "embed_scale", "normalizer")


class Original:
    """A random model of transformers, its weights as numpy, and its logits."""

    def __init__(self, family: str):
        self.name = NAMES[family]
        self.model, _ = oracles.make(self.name)
        self.state = {n: v.numpy() for n, v in self.model.state_dict().items() if not n.endswith(BUFFERS)}
        self.config = read_config(self.model.config.to_dict())
        self.logits = self.answers(self.model)

    def answers(self, model) -> np.ndarray:
        with torch.no_grad():
            found = model(**oracles.inputs(self.name))
        return (found.logits if "logits" in found else found.last_hidden_state).numpy()

    def tensors(self):
        return from_arrays(weights.unpack(self.state, self.config, format="hf"), self.config)

    def check_folder(self, folder) -> None:
        """transformers loads the folder strictly and gives the same logits, bit for bit."""
        loaded, info = type(self.model).from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
        )
        assert not any(info.values()), info
        assert np.array_equal(self.answers(loaded.eval()), self.logits)

    def check_state(self, state) -> None:
        """A new model with these decoder weights gives the same logits, bit for bit."""
        model = oracles.make(self.name, seed=99)[0]
        state = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()}
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state, strict=True)
        assert np.array_equal(self.answers(model), self.logits)


def families(format: str, names):
    return [pytest.param(name, marks=pytest.mark.converts(name, format, "proven"), id=name) for name in names]


def converted(path, folder, config) -> None:
    """What another program wrote, as we read it, in the format that transformers reads."""
    with open_checkpoint(path) as opened:
        save(folder, load_tensors(opened, config), config, format="safetensors")


@pytest.mark.parametrize("family", families("safetensors", NAMES))
def test_transformers_and_safetensors(family, tmp_path):
    """Theirs through our reader and writer, and back into theirs."""
    original = Original(family)
    original.model.save_pretrained(tmp_path / "theirs")
    with open_checkpoint(tmp_path / "theirs") as opened:
        assert opened.config() == original.config
        save(tmp_path / "ours", load_tensors(opened), opened.config(), format="safetensors")
    original.check_folder(tmp_path / "ours")


@pytest.mark.parametrize("family", families(".ckpt", TEXT))
def test_torch_loads_our_ckpt(family, tmp_path):
    original = Original(family)
    save(tmp_path / "ours", original.tensors(), original.config, format="ckpt")
    loaded = torch.load(tmp_path / "ours/model.ckpt", weights_only=True, mmap=True)["model_state_dict"]
    heads = (original.config.num_attention_heads, original.config.num_key_value_heads)
    original.check_state(layouts.from_gemma_pytorch({n: t.numpy() for n, t in loaded.items()}, *heads))


@pytest.mark.parametrize("family", families(".ckpt", (*TEXT, "Gemma 3 vision")))
def test_we_load_the_ckpt_of_torch(family, tmp_path):
    original = Original(family)
    theirs = layouts.gemma_pytorch(original.state)
    state = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in theirs.items()}
    torch.save({"model_state_dict": state}, tmp_path / "theirs.ckpt")
    converted(tmp_path / "theirs.ckpt", tmp_path / "ours", original.config)
    original.check_folder(tmp_path / "ours")


@pytest.mark.parametrize("family", families(".npz", ("PaliGemma 1", "PaliGemma 2")))
def test_numpy_and_the_layout_of_big_vision(family, tmp_path):
    """Ours is what numpy writes of the described layout, name by name; theirs gives the same logits."""
    original = Original(family)
    text = original.config.text_config
    heads = (text.num_attention_heads, text.num_key_value_heads, original.config.vision_config.num_attention_heads)
    theirs = layouts.big_vision(original.state, *heads)
    np.savez(tmp_path / "theirs.npz", **theirs)
    converted(tmp_path / "theirs.npz", tmp_path / "back", original.config)
    original.check_folder(tmp_path / "back")
    save(tmp_path / "ours", original.tensors(), original.config, format="npz")
    with np.load(tmp_path / "ours/model.npz", allow_pickle=False) as ours:
        assert set(ours.files) == set(theirs)
        for name, array in theirs.items():
            assert np.array_equal(ours[name], array), name


@pytest.mark.parametrize("family", families("Orbax", TEXT))
def test_orbax_restores_our_tree(family, tmp_path):
    """And its leaves, by the described axes, are the model."""
    import orbax.checkpoint as ocp

    from gemma.gm.ckpts._save import save_tensors

    original = Original(family)
    save_tensors(tmp_path / "ours", original.tensors(), original.config)
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / "ours")
    original.check_state(layouts.from_flax(tree, transposed=original.config.transpose_gating_einsum))


@pytest.mark.parametrize("family", families("Orbax", TEXT))
def test_we_load_the_tree_of_orbax(family, tmp_path):
    import orbax.checkpoint as ocp

    original = Original(family)
    config = original.config
    heads = (config.num_attention_heads, config.num_key_value_heads)
    tree = layouts.flax(original.state, *heads, transposed=config.transpose_gating_einsum)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "theirs", tree)
        checkpointer.wait_until_finished()
    from gemma.gm._proof import open_any

    with open_any(tmp_path / "theirs") as opened:
        save(tmp_path / "ours", load_tensors(opened, config), config, format="safetensors")
    original.check_folder(tmp_path / "ours")


@pytest.mark.parametrize("family", families("GGUF", TEXT))
def test_llamacpp_runs_our_gguf(family, tmp_path, monkeypatch):
    """Logits of every position; llama.cpp keeps keys and values in float16, hence not to the bit."""
    import real_harness

    from gemma.testing import tiny_config, write_tiny_gguf

    kinds = {"Gemma 1": "gemma", "Gemma 2": "gemma2", "Gemma 3 text": "gemma3"}
    scale = {} if family == "Gemma 1" else dict(query_pre_attn_scalar=None)
    sizes = dict(hidden_size=256, intermediate_size=512, head_dim=64, vocab_size=320)
    config = tiny_config(kinds[family], **sizes, **scale)
    values = random_tensors(config, seed=5)
    with open_checkpoint(write_tiny_gguf(tmp_path / "pieces.gguf", config)) as pieces:
        tensors = from_arrays(values, config)
        save(tmp_path / "x.gguf", tensors, config, format="gguf", tokenizer=pieces.tokenizer_source())
        save(tmp_path / "st", tensors, config, format="safetensors")
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "st", attn_implementation="eager", dtype=torch.float32
    )
    monkeypatch.setattr(real_harness, "VOCAB", config.vocab_size)
    model = real_harness.LlamaCpp(tmp_path / "x.gguf", 256)
    try:
        tokens, got = model.greedy([2, 40, 41, 90, 91, 17, 200, 300, 33, 120], 6)
    finally:
        model.close()
    with torch.no_grad():
        want = reference.eval()(torch.tensor([tokens[:-1]])).logits[0, -6:].numpy()
    # A swapped norm, base, cap or window is off by the size of the logits; 11 bits of the cache by a percent of it.
    assert np.abs(got - want).max() < 0.02 * want.std()


def test_the_index_of_a_sharded_pytorch_folder(tmp_path):
    """transformers' older folders: names of Hugging Face in PyTorch archives."""
    original = Original("Gemma 2")
    names = list(original.model.state_dict())
    half = len(names) // 2
    index = {}
    for file, part in (("pytorch_model-1.bin", names[:half]), ("pytorch_model-2.bin", names[half:])):
        torch.save({n: original.model.state_dict()[n].clone() for n in part}, tmp_path / file)
        index |= dict.fromkeys(part, file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (tmp_path / "config.json").write_text(original.model.config.to_json_string())
    with open_checkpoint(tmp_path) as opened:
        assert opened.config() == original.config
        save(tmp_path / "ours", load_tensors(opened), opened.config(), format="safetensors")
    original.check_folder(tmp_path / "ours")
