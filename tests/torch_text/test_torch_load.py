# SPDX-License-Identifier: Apache-2.0
"""`load_weights` and `from_pretrained`: values and dtypes from every kind of file, and what is refused."""

from __future__ import annotations

import gc
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from gemma import testing
from gemma._torch.load import load_weights, without_values
from gemma.checkpoint import NonFiniteWarning, open_checkpoint
from gemma.config import SiglipVisionConfig, text_only
from gemma.errors import CheckpointNotFound, UnsupportedError, WeightsMismatch
from gemma.modeling_gemma import GemmaForCausalLM
from gemma.weights import tensors

FAMILIES = ("gemma", "gemma2", "gemma3")


def reference(config) -> dict[str, np.ndarray]:
    values = testing.random_tensors(config)
    return {tensor.slots["hf"].name: values[tensor.name] for tensor in tensors(config)}


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    config = testing.tiny_config(request.param)
    return config, testing.write_tiny_safetensors(tmp_path_factory.mktemp(request.param), config)


def test_values_from_safetensors(saved):
    config, path = saved
    network = GemmaForCausalLM.from_pretrained(path)
    assert not network.training and network.config.layers == config.layers
    state = network.state_dict()
    expected = reference(config)
    assert set(state) == set(expected)
    for name, array in expected.items():
        assert np.array_equal(state[name].numpy(), array), name
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_values_from_gguf(tmp_path):
    config = testing.tiny_config("gemma3", query_pre_attn_scalar=None)
    path = testing.write_tiny_gguf(tmp_path / "tiny.gguf", config)
    state = GemmaForCausalLM.from_pretrained(path).state_dict()
    for name, array in reference(config).items():  # norms stand there as 1 + w
        np.testing.assert_allclose(state[name].numpy(), array, atol=2**-23, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, "bfloat16"])
def test_dtypes(saved, dtype):
    config, path = saved
    state = GemmaForCausalLM.from_pretrained(path, dtype=dtype).state_dict()
    dtype = torch.bfloat16 if dtype == "bfloat16" else dtype
    for name, array in reference(config).items():
        assert torch.equal(state[name], torch.from_numpy(array).to(dtype)), name


def test_a_bfloat16_file_stays_bfloat16(tmp_path):
    import ml_dtypes

    config = testing.tiny_config("gemma2")
    folder = testing.write_tiny_safetensors(tmp_path, config)
    file = folder / "model.safetensors" if folder.is_dir() else folder
    save_file({name: array.astype(ml_dtypes.bfloat16) for name, array in load_file(file).items()}, file)
    network = GemmaForCausalLM.from_pretrained(folder)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}


def test_float16_is_refused_where_it_overflows(saved):
    config, path = saved
    if config.use_qk_norm:
        with pytest.raises(UnsupportedError, match="float16 cannot run Gemma 3"):
            GemmaForCausalLM.from_pretrained(path, dtype=torch.float16)
    else:
        assert GemmaForCausalLM.from_pretrained(path, dtype=torch.float16).head_weight.dtype == torch.float16
    with pytest.raises(UnsupportedError, match="int8"):
        GemmaForCausalLM.from_pretrained(path, dtype=torch.int8)


def altered(path, change):
    file = path / "model.safetensors" if path.is_dir() else path
    arrays = load_file(file)
    change(arrays)
    save_file(arrays, file)


def rename(arrays):
    arrays["model.layers.0.mlp.gate.weight"] = arrays.pop("model.layers.0.mlp.gate_proj.weight")


def test_strict_and_nothing_half_loaded(tmp_path):
    config = testing.tiny_config("gemma3")
    path = testing.write_tiny_safetensors(tmp_path, config)
    altered(path, rename)
    with torch.device("meta"):
        network = GemmaForCausalLM(config)
    with open_checkpoint(path) as checkpoint, pytest.raises(WeightsMismatch) as caught:
        load_weights(network, checkpoint, config)
    assert caught.value.missing == ("model.layers.0.mlp.gate_proj.weight",)
    assert caught.value.unexpected == ("model.layers.0.mlp.gate.weight",)
    assert all(parameter.is_meta for parameter in network.parameters())


def test_an_error_while_reading_leaves_the_module_as_it_was(tmp_path, monkeypatch):
    config = testing.tiny_config("gemma")
    path = testing.write_tiny_safetensors(tmp_path, config)
    network = GemmaForCausalLM(config)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    with open_checkpoint(path) as checkpoint:
        reads, real = [], type(checkpoint).read

        def read(self, name, *args, **kwargs):
            reads.append(name)
            if len(reads) == 9:
                raise OSError("the disk is gone")
            return real(self, name, *args, **kwargs)

        monkeypatch.setattr(type(checkpoint), "read", read)
        with pytest.raises(OSError, match="disk"):
            load_weights(network, checkpoint, config)
    assert all(torch.equal(before[name], parameter) for name, parameter in network.named_parameters())


def test_a_module_of_another_configuration(saved):
    config, path = saved
    network = GemmaForCausalLM(testing.tiny_config("gemma", num_hidden_layers=2, vocab_size=300))
    with open_checkpoint(path) as checkpoint, pytest.raises(WeightsMismatch, match="another configuration") as caught:
        load_weights(network, checkpoint, config)
    assert any("embed_tokens" in line for line in caught.value.misshaped)


def test_nan_warns(tmp_path):
    path = testing.write_tiny_safetensors(tmp_path, testing.tiny_config("gemma"))
    altered(path, lambda arrays: arrays["model.norm.weight"].fill(np.nan))
    with pytest.warns(NonFiniteWarning, match=r"model\.norm\.weight"):
        GemmaForCausalLM.from_pretrained(path)


def test_frozen_parameters_stay_frozen(saved):
    config, path = saved
    network = GemmaForCausalLM(config)
    network.get_input_embeddings().requires_grad_(False)
    with open_checkpoint(path) as checkpoint:
        load_weights(network, checkpoint, config, dtype=torch.bfloat16)
    assert not network.get_input_embeddings().weight.requires_grad
    assert network.model.norm.weight.requires_grad and network.model.norm.weight.dtype == torch.bfloat16


def test_the_text_decoder_of_a_model_with_images(tmp_path):
    vision = SiglipVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                                image_size=28, patch_size=14)  # fmt: skip
    config = testing.tiny_config("gemma3", model_type="gemma3", vision=vision, mm_tokens_per_image=1)
    path = testing.write_tiny_safetensors(tmp_path, config)
    network = GemmaForCausalLM.from_pretrained(path)
    assert network.config.vision is None
    values = testing.random_tensors(config)
    state = network.state_dict()
    for tensor in tensors(text_only(config)):
        assert np.array_equal(state[tensor.slots["hf"].name].numpy(), values[tensor.name])


def test_what_is_no_text_model(tmp_path):
    with pytest.raises((CheckpointNotFound, OSError)):
        GemmaForCausalLM.from_pretrained(tmp_path / "nothing")
    config = testing.tiny_config("gemma3", use_bidirectional_attention=True, sliding_window=8)
    with pytest.raises(UnsupportedError, match="does not continue text"):
        GemmaForCausalLM.from_pretrained(testing.write_tiny_safetensors(tmp_path / "m", config))


def test_loading_and_generating_leave_the_compiler_alone(tmp_path):
    """Importing it is 70 MB and most of the time that a command takes to start; one random value on the meta device does."""
    path = testing.write_tiny_gguf(tmp_path / "m.gguf", testing.tiny_config("gemma3", query_pre_attn_scalar=None))
    script = (
        "import sys, torch; from gemma.modeling_gemma import GemmaForCausalLM as M; m = M.from_pretrained(sys.argv[1]); "
        "m.generate(torch.tensor([[2, 5]]), max_new_tokens=2, seed=1); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)


def test_modules_without_values():
    with without_values():
        network = nn.Sequential(GemmaForCausalLM(testing.tiny_config("gemma3")), nn.Conv2d(3, 4, 2), nn.LayerNorm(3))
    assert all(parameter.is_meta for parameter in network.parameters())
    assert not nn.Linear(3, 3).weight.is_meta and nn.Linear(3, 3).weight.any()  # outside, all is as ever


def test_memory_while_loading(tmp_path):
    """What Python's allocators hand out beside the parameters: a fraction of the largest tensor, not a second model."""
    config = testing.tiny_config("gemma3", vocab_size=20_000)
    path = testing.write_tiny_safetensors(tmp_path, config)
    GemmaForCausalLM.from_pretrained(path)  # imports, tables
    gc.collect()
    tracemalloc.start()
    network = GemmaForCausalLM.from_pretrained(path, dtype=torch.float32)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = sum(parameter.numel() * 4 for parameter in network.parameters())
    assert size > 6e6 and peak < 0.5 * size  # torch's own buffers are not traced: they are the parameters
