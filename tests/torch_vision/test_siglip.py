# SPDX-License-Identifier: Apache-2.0
"""The SigLIP tower in PyTorch against Hugging Face's tiny oracle, with and without its pooling head."""

import dataclasses

import pytest
import torch
from hf_tiny_oracles import make
from torch_vision_oracles import tower_config

from gemma import weights
from gemma._torch.load import without_values
from gemma.config import PRESETS, SiglipVisionConfig
from gemma.errors import ConfigError, ShapeError
from siglip.modeling_siglip import SiglipVisionTransformer

TOLERANCE = 2e-5  # float32, logits and features of order 1; the noise floor of such comparisons is 1e-6 to 4e-6


def pair(**changes):
    oracle, config = make("siglip", **changes)
    ours = SiglipVisionTransformer(tower_config(config)).eval()
    names = {name.removeprefix("vision_model."): value for name, value in oracle.state_dict().items()}
    ours.load_state_dict(names, strict=True)
    return ours, oracle


def pixels(size=56, count=2, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("head", [False, True])
@torch.no_grad()
def test_equals_hugging_face(head):
    ours, oracle = pair(vision_use_head=head)
    expected = oracle(pixel_values=pixels())
    patches = ours(pixels())
    assert patches.shape == (2, 16, 48) and patches.std() > 0.1
    assert (patches - expected.last_hidden_state).abs().max() < TOLERANCE
    if head:
        assert (ours.pool(patches) - expected.pooler_output).abs().max() < TOLERANCE
    else:
        with pytest.raises(ConfigError, match="no pooling head"):
            ours.pool(patches)


def swap_norms(model):
    layer = model.encoder.layers[0]
    layer.layer_norm1, layer.layer_norm2 = layer.layer_norm2, layer.layer_norm1


def transpose_grid(model):
    table = model.embeddings.position_embedding.weight
    table.data = table.data.reshape(4, 4, -1).transpose(0, 1).reshape(16, -1)


def drop_final_norm(model):
    model.post_layernorm = torch.nn.Identity()


def exact_gelu(model):
    for layer in model.encoder.layers:
        layer.mlp.forward = lambda x, mlp=layer.mlp: mlp.fc2(torch.nn.functional.gelu(mlp.fc1(x)))


def fewer_heads(model):
    for layer in model.encoder.layers:
        layer.self_attn.num_heads = 2


def no_value_bias(model):
    model.encoder.layers[1].self_attn.v_proj.bias.data.zero_()


@pytest.mark.parametrize(
    "break_it", [swap_norms, transpose_grid, drop_final_norm, exact_gelu, fewer_heads, no_value_bias]
)
@torch.no_grad()
def test_mutations_are_seen(break_it):
    ours, oracle = pair()
    break_it(ours)
    assert (ours(pixels()) - oracle(pixel_values=pixels()).last_hidden_state).abs().max() > 2 * TOLERANCE


@torch.no_grad()
def test_the_norms_epsilon():
    """Invisible on features of order 1: an input whose variance is near the epsilon shows it."""
    ours, _ = pair()
    x = torch.randn(1, 4, 48, generator=torch.Generator().manual_seed(0)) * 1e-3
    norm = ours.post_layernorm
    variance = x.var(-1, unbiased=False, keepdim=True)
    expected = (x - x.mean(-1, keepdim=True)) / torch.sqrt(variance + 1e-6) * norm.weight + norm.bias
    assert (norm(x) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("size", "patches"), [(224, 256), (448, 1024), (896, 4096)])
def test_published_sizes(size, patches):
    """Parameters of the real towers, on the meta device, and their names against the weight table."""
    config = PRESETS[f"paligemma_3b_{size}"].vision_config
    for head in (False, True):
        config = dataclasses.replace(config, vision_use_head=head)
        with without_values():
            model = SiglipVisionTransformer(config)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert model.embeddings.position_embedding.weight.shape[0] == patches
        assert shapes == weights.expected(config, "hf")
        assert sum(p.numel() for p in model.parameters()) == config.num_parameters
        if not head:
            assert model(torch.empty(1, 3, size, size, device="meta")).shape == (1, patches, 1152)


@pytest.mark.parametrize("shape", [(1, 3, 28, 28), (1, 1, 56, 56), (3, 56, 56), (1, 56, 56, 3)])
def test_other_shapes_are_refused(shape):
    model = SiglipVisionTransformer(tower_config(make("siglip")[1]))
    with pytest.raises(ShapeError, match=r"expected \[B, 3, 56, 56\]"):
        model(torch.zeros(shape))


def test_integers_are_refused():
    model = SiglipVisionTransformer(tower_config(make("siglip")[1]))
    with pytest.raises(ShapeError, match="floating-point values in -1..1"):
        model(torch.zeros(1, 3, 56, 56, dtype=torch.uint8))


@torch.no_grad()
def test_batched_equals_alone_and_bfloat16_is_close():
    ours, _ = pair()
    images = pixels(count=3)
    together = ours(images)
    for at in range(3):
        assert (ours(images[at : at + 1])[0] - together[at]).abs().max() < TOLERANCE
    low = ours.to(torch.bfloat16)(images)
    assert low.dtype == torch.bfloat16 and (low.float() - together).abs().max() < 0.1


def test_gradients_reach_every_parameter():
    ours, _ = pair(vision_use_head=True)
    ours.pool(ours(pixels())).square().sum().backward()
    # A bias of the keys shifts all scores of a query alike: its gradient is zero, but it is there.
    missing = [name for name, p in ours.named_parameters() if p.grad is None]
    assert not missing and isinstance(ours.config, SiglipVisionConfig)
