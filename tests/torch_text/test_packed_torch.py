# SPDX-License-Identifier: Apache-2.0
"""Models with packed weights in PyTorch: parity with the same weights dequantized, saving, loading, and what is refused."""

from __future__ import annotations

import copy
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma import testing
from gemma._torch.load import without_values
from gemma._torch.packed import PackedEmbedding, PackedLinear, load_packed_state_dict
from gemma.checkpoint import load_tensors, open_checkpoint
from gemma.errors import CheckpointError, ConfigError, UnsupportedError
from gemma.kernels import _native, _torch
from gemma.modeling_gemma import GemmaForCausalLM
from gemma.sampling import SamplingParams
from gemma.saving import save
from gemma.serving._runner_torch import TorchRunner
from gemma.serving.runner import StepIn

# Rows are whole blocks of 32, and no two widths are equal.
SIZES = dict(hidden_size=64, intermediate_size=96, head_dim=32, num_attention_heads=4, query_pre_attn_scalar=None)
FAMILIES = ("gemma", "gemma2", "gemma3")
IDS = torch.tensor([[2, 40, 41, 42, 43, 44, 45, 46], [0, 0, 0, 2, 50, 51, 52, 53]])
MASK = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])


def write(folder: Path, family: str, mix: str | None, **changes) -> Path:
    """A tiny GGUF, quantized by a mix."""
    config = testing.tiny_config(family, **SIZES | changes)
    folder.mkdir(exist_ok=True)
    plain, path = folder / f"{family}-f32.gguf", folder / f"{family}-{mix}.gguf"
    testing.write_tiny_gguf(plain, config)
    if mix is None:
        return plain
    with open_checkpoint(plain) as source:
        config = source.config()
        tokenizer = source.tokenizer_source()
        save(path, load_tensors(source, config), config, format="gguf", quantize=mix, tokenizer=tokenizer)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packed")


@pytest.fixture(scope="module")
def gemma3(folder):
    return write(folder, "gemma3", "q8_0")


@pytest.fixture(params=["native", "blocks"])
def way(request, monkeypatch):
    if request.param == "native" and _native.library() is None:
        pytest.skip(f"native library: {_native.why_missing()}")
    if request.param == "blocks":
        monkeypatch.setattr(_torch, "available", lambda: False)
    return request.param


def logits(model, ids=IDS, mask=MASK, **call):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **call)["logits"].float()


def room(expected: torch.Tensor, layers: int) -> float:
    """Activations are rounded to 15 bits and a sign for each of seven products of a layer and the head's: each adds at
    most 2**-15 of the norm of what it rounds, and norms and residuals hand that on without amplifying it."""
    return (7 * layers + 1) * 2**-15 * expected.abs().max().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_keeps_the_bytes_and_the_numbers(folder, family, way):
    path = write(folder / way, family, "q8_0")
    packed = GemmaForCausalLM.from_pretrained(path, quantize="keep")
    plain = GemmaForCausalLM.from_pretrained(path)
    layer = packed.model.layers[0]
    assert isinstance(layer.mlp.down_proj, PackedLinear) and isinstance(packed.model.embed_tokens, PackedEmbedding)
    with open_checkpoint(path) as checkpoint:
        for name, module in (("blk.0.ffn_down", layer.mlp.down_proj), ("token_embd", packed.model.embed_tokens)):
            stored = checkpoint.packed(f"{name}.weight")
            np.testing.assert_array_equal(module.data.numpy(), stored.data)
    matrices = [name for name, _ in plain.named_parameters() if not name.endswith("norm.weight")]
    held = sum(buffer.nbytes for name, buffer in packed.named_buffers() if name.endswith(".data"))
    assert held == sum(plain.get_parameter(name).numel() for name in matrices) * 34 // 32
    expected = logits(plain)[MASK.bool()]
    got = logits(packed)[MASK.bool()]
    assert (got - expected).abs().max() <= room(expected, len(packed.model.layers))
    assert not torch.equal(got, expected) or way == "blocks"
    options = dict(attention_mask=MASK, max_new_tokens=8, temperature=0)
    tokens = packed.generate(IDS, **options)
    assert torch.equal(tokens[1:, 3:], packed.generate(IDS[1:, 3:], max_new_tokens=8, temperature=0))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_file_is_used_in_place(gemma3):
    model = GemmaForCausalLM.from_pretrained(gemma3, quantize="keep")
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(gemma3) in line]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    packed = [module for module in model.modules() if isinstance(module, (PackedLinear, PackedEmbedding))]
    assert len(packed) == 1 + 7 * len(model.model.layers)
    for module in packed:
        assert any(start <= module.data.data_ptr() < stop for start, stop in spans)


@pytest.mark.parametrize("name", ["Q4_0", "q5_1", "INT8", "sfp8", "INT4", "bf16"])
def test_quantizes_while_loading(folder, name, way):
    """From floats; a GGUF of that mix holds the same bytes."""
    plain = write(folder / f"{way}-{name}", "gemma3", None)
    model = GemmaForCausalLM.from_pretrained(plain, quantize=name)
    types = {_torch.TYPES[m.type_id].name for m in model.modules() if isinstance(m, PackedLinear)}
    assert name.upper() in types and len(types) <= 2
    dense = GemmaForCausalLM.from_pretrained(plain)
    for module_name, module in model.named_modules():
        if isinstance(module, (PackedLinear, PackedEmbedding)):
            path = f"{module_name}.weight"
            dense.get_parameter(path).data = module.weight.dequantize()
    expected = logits(dense)
    assert (logits(model) - expected)[MASK.bool()].abs().max() <= room(expected, len(model.model.layers))
    if name == "q5_1":
        stored = GemmaForCausalLM.from_pretrained(
            write(folder / f"{way}-mix", "gemma3", name), quantize="keep"
        ).state_dict()
        state = model.state_dict()
        assert set(state) == set(stored)
        assert all(torch.equal(value, stored[key]) for key, value in state.items())


@pytest.mark.parametrize("name", ["keep", "INT8"])
def test_state_dict_round_trip(gemma3, name):
    model = GemmaForCausalLM.from_pretrained(gemma3, quantize=name)
    state = model.state_dict()
    layer = "model.layers.0.mlp.up_proj"
    assert {key for key in state if key.startswith(layer)} == {f"{layer}.data", f"{layer}.type"} | (
        {f"{layer}.scale"} if name == "INT8" else set()
    )
    assert int(state[f"{layer}.type"]) == (1001 if name == "INT8" else 8) and "lm_head.weight" not in state
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=True)
    with without_values():
        empty = GemmaForCausalLM(model.config)
    expected = logits(model)
    assert torch.equal(logits(load_packed_state_dict(empty, read).eval()), expected)
    other = GemmaForCausalLM.from_pretrained(gemma3, quantize="Q4_0")  # another type: that of the state is taken
    other.load_state_dict(read)
    assert torch.equal(logits(other), expected)
    assert torch.equal(logits(copy.deepcopy(model)), expected)


def test_other_dtypes(gemma3):
    """Scales stay float32 whatever the activations become."""
    model = GemmaForCausalLM.from_pretrained(gemma3, quantize="INT8", dtype=torch.bfloat16)
    twin = GemmaForCausalLM.from_pretrained(gemma3, quantize="INT8").to(torch.bfloat16)
    for each in (model, twin):
        assert each.model.layers[0].mlp.up_proj.scale.dtype == torch.float32
        assert each.model.embed_tokens(IDS).dtype == torch.bfloat16 == each.get_input_embeddings().weight.dtype
    assert torch.equal(logits(model), logits(twin))
    wide = logits(GemmaForCausalLM.from_pretrained(gemma3, quantize="INT8"))
    # bfloat16 rounds activations to 8 bits some ten times in each of seven layers.
    assert (logits(model) - wide)[MASK.bool()].abs().max() <= 70 * 2**-9 * wide.abs().max()


def test_loss_and_gradients(gemma3, way):
    """The loss, and what flows back through packed weights to norms and embeddings."""
    packed, plain = (GemmaForCausalLM.from_pretrained(gemma3, quantize=q) for q in ("keep", None))
    labels = IDS[:1].clone()
    losses, gradients = [], []
    for model in (packed, plain):
        embeds = model.model.embed_tokens(IDS[:1]).detach().requires_grad_()
        loss = model(inputs_embeds=embeds, labels=labels)["loss"]
        loss.backward()
        losses.append(loss.detach())
        gradients.append((embeds.grad, model.model.layers[2].input_layernorm.weight.grad))
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()


def test_head_of_its_own(folder):
    path = write(folder / "untied", "gemma", "q8_0", tie_word_embeddings=False)
    model = GemmaForCausalLM.from_pretrained(path, quantize="keep")
    assert isinstance(model.lm_head, PackedLinear) and "lm_head.data" in model.state_dict()
    expected = logits(GemmaForCausalLM.from_pretrained(path))
    assert (logits(model) - expected)[MASK.bool()].abs().max() <= room(expected, len(model.model.layers))


def test_runner(gemma3):
    """The engine's runner takes such a model as it is, whatever chunks a prompt comes in."""
    model = GemmaForCausalLM.from_pretrained(gemma3, quantize="keep")
    runner = TorchRunner(model, slots=2, max_len=32)
    runner.prefill(0, IDS[0].tolist(), 0)
    runner.prefill(1, IDS[0, :5].tolist(), 0)
    runner.prefill(1, IDS[0, 5:].tolist(), 5)
    first, second = (torch.from_numpy(runner.logits(slot)) for slot in (0, 1))
    # The last bits of attention depend on the chunk; where they carry a value over half a step of the rounding of
    # activations, it moves by a step.
    assert (first - second).abs().max() <= room(first, len(model.model.layers))
    greedy = SamplingParams(temperature=0)
    out = runner.step([StepIn(slot=slot, token=60, params=greedy) for slot in (0, 1)])
    assert out[0].token == out[1].token


def test_compiled_forward_traces(gemma3):
    model = GemmaForCausalLM.from_pretrained(gemma3, quantize="keep")
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    mlp = model.model.layers[0].mlp
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        compiled = torch.compile(mlp, backend=backend, fullgraph=True)
        assert torch.equal(compiled(x), mlp(x))
    assert sum("packed_matmul" in name for name in seen) == 3


def test_refused(gemma3, folder):
    load = GemmaForCausalLM.from_pretrained
    with pytest.raises(ConfigError, match=r"quantize: expected one of .* got 'q9_0'"):
        load(gemma3, quantize="q9_0")
    with pytest.raises(UnsupportedError, match="packed weights run on the CPU, not on cuda"):
        load(gemma3, quantize="keep", device="cuda")
    model = load(gemma3, quantize="keep")
    state = model.state_dict()
    plain = load(gemma3)
    with pytest.raises(RuntimeError, match=re.escape("model.layers.0.mlp.up_proj.data")):
        model.load_state_dict(plain.state_dict() | {"lm_head.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="no packed matrix"):
        load_packed_state_dict(plain, plain.state_dict())
    with pytest.raises(CheckpointError, match=r"up_proj: .* expected \(96, 64\), got 4 rows"):
        load_packed_state_dict(plain, state | {"model.layers.0.mlp.up_proj.data": torch.zeros(4, 68).byte()})
    for key, value, words in (
        ("data", torch.zeros(96, 67).byte(), r"expected uint8 \[rows, 68\]"),
        ("data", torch.zeros(4, 68).byte(), "expected 96 rows"),
        ("type", torch.tensor(99), "type: expected one of"),
    ):
        with pytest.raises(RuntimeError, match=words):
            model.load_state_dict(state | {f"model.layers.0.mlp.up_proj.{key}": value})
    with pytest.raises(RuntimeError, match="extra"):
        model.load_state_dict(state | {"model.layers.0.mlp.up_proj.extra": torch.zeros(1)})
    with pytest.raises(UnsupportedError, match="run on the CPU"):
        model.to("meta")(input_ids=IDS.to("meta"))
