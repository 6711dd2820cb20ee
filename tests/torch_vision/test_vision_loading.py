# SPDX-License-Identifier: Apache-2.0
"""Checkpoints into the models with images: every published layout of names, strictly, and the processor beside them."""

import json
import re

import numpy as np
import pytest
import torch
import vision_helpers as helpers
from hf_tiny_oracles import inputs as oracle_inputs
from hf_tiny_oracles import make
from safetensors.torch import load_file, save_file
from torch_vision_oracles import our_config

from gemma import config as configs
from gemma._torch.load import without_values
from gemma.errors import CheckpointError, TokenizerError, UnsupportedError, WeightsMismatch
from gemma.hf_config import write_config
from gemma.modeling_gemma3 import Gemma3ForConditionalGeneration
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
from paligemma.processing_paligemma import PaliGemmaProcessor
from siglip.modeling_siglip import SiglipVisionTransformer

LAYOUTS = {  # how the roots of names are spelled; what is left of a name is the same everywhere
    "hub": ("language_model.model.", "vision_tower.vision_model.", "multi_modal_projector."),
    "in memory": ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector."),
    "transformers 5": ("language_model.model.", "vision_tower.", "multi_modal_projector."),
}
MODELS = {
    "paligemma1": PaliGemmaForConditionalGeneration,
    "paligemma2": PaliGemmaForConditionalGeneration,
    "gemma3": Gemma3ForConditionalGeneration,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name to (folder as Hugging Face saves it, oracle)."""
    found = {}
    for name in MODELS:
        oracle, _ = make(name)
        folder = tmp_path_factory.mktemp(name)
        oracle.save_pretrained(folder)
        found[name] = folder, oracle
    return found


def relabel(source, target, layout, extra=None):
    """The same checkpoint with other roots."""
    text, tower, projector = LAYOUTS[layout]
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    renamed = {}
    for name, value in load_file(source / "model.safetensors").items():
        if "lm_head" in name:
            continue
        name = re.sub(r"^(model\.)?language_model\.(model\.)?", text, name)
        name = re.sub(r"^(model\.)?vision_tower\.(vision_model\.)?", tower, name)
        renamed[re.sub(r"^(model\.)?multi_modal_projector\.", projector, name)] = value
    save_file(renamed | (extra or {}), target / "model.safetensors")
    return target


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("name", list(MODELS))
@torch.no_grad()
def test_every_layout_of_names_loads(saved, tmp_path, name, layout):
    folder, oracle = saved[name]
    model = MODELS[name].from_pretrained(relabel(folder, tmp_path / "copy", layout))
    call = oracle_inputs(name)
    expected = oracle(**call).logits
    if name == "gemma3":
        call.pop("token_type_ids")
    assert not model.training and (model(**call)["logits"] - expected).abs().max() < 2e-5


@pytest.mark.parametrize("name", list(MODELS))
def test_the_folder_that_hugging_face_saves_loads(saved, name):
    folder, oracle = saved[name]
    model = MODELS[name].from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in oracle.parameters())


def test_float16_is_refused_where_it_would_write_nan(saved):
    with pytest.raises(UnsupportedError, match="float16 cannot run Gemma 3"):
        Gemma3ForConditionalGeneration.from_pretrained(saved["gemma3"][0], dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_is_close(saved, dtype):
    """Rounding of these tiny models: 3e-2 in bfloat16, 4e-3 in float16, on logits of order 1."""
    folder, oracle = saved["paligemma1"]
    model = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    call = oracle_inputs("paligemma1")
    logits = model(**call)["logits"]
    assert logits.dtype == dtype and (logits.float() - oracle(**call).logits).abs().max() < 0.2
    assert model.generate(call["input_ids"], call["pixel_values"], max_new_tokens=3).shape[0] == 2


def test_loading_is_strict(saved, tmp_path):
    folder, _ = saved["paligemma2"]
    extra = {"language_model.model.layers.0.extra.weight": torch.zeros(2), "other": torch.zeros(1)}
    copy = relabel(folder, tmp_path / "more", "hub", extra)
    with pytest.raises(WeightsMismatch) as caught:
        PaliGemmaForConditionalGeneration.from_pretrained(copy)
    assert set(caught.value.unexpected) == set(extra)


def test_gemma_2_weights_in_a_paligemma_1_are_refused(saved, tmp_path):
    """The copied implementation loads this silently and writes garbage: two norms per layer have no place."""
    wrong = tmp_path / "wrong"
    relabel(saved["paligemma2"][0], wrong, "hub")
    (wrong / "config.json").write_text((saved["paligemma1"][0] / "config.json").read_text())
    with pytest.raises(WeightsMismatch, match="look like Gemma 2") as caught:
        PaliGemmaForConditionalGeneration.from_pretrained(wrong)
    assert sum("feedforward_layernorm" in name for name in caught.value.unexpected) == 8


def test_another_architecture_is_refused_by_name(saved, tmp_path):
    with pytest.raises(CheckpointError, match="needs a PaliGemmaConfig, but this checkpoint is of a GemmaConfig"):
        PaliGemmaForConditionalGeneration.from_pretrained(saved["gemma3"][0])
    with pytest.raises(CheckpointError, match="needs a GemmaConfig, but this checkpoint is of a PaliGemmaConfig"):
        Gemma3ForConditionalGeneration.from_pretrained(saved["paligemma1"][0])
    with pytest.raises(CheckpointError, match="SigLIP tower alone"):
        SiglipVisionTransformer.from_pretrained(saved["paligemma1"][0])
    text, _ = make("gemma3_text")
    text.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no image tower"):
        Gemma3ForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("head", [False, True])
@torch.no_grad()
def test_a_tower_alone(tmp_path, head):
    oracle, _ = make("siglip", vision_use_head=head)
    oracle.save_pretrained(tmp_path)
    model = SiglipVisionTransformer.from_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    expected = oracle(pixel_values=pixels)
    assert (model(pixels) - expected.last_hidden_state).abs().max() < 2e-5
    if head:
        assert (model.pool(model(pixels)) - expected.pooler_output).abs().max() < 2e-5
    low = SiglipVisionTransformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}


# --- big_vision


def big_vision(oracle, config):
    """The oracle's weights as the training code stores them: stacked layers, heads apart, kernels [in, out]."""
    state = {k: v.numpy() for k, v in oracle.state_dict().items()}
    text, vision = config.text_config, config.vision_config
    n, k, h, d = text.num_attention_heads, text.num_key_value_heads, text.head_dim, text.hidden_size
    a, e = vision.num_attention_heads, vision.hidden_size
    out = {}

    def layers(root, count, name):
        return np.stack([state[f"{root}.{i}.{name}"] for i in range(count)])

    lm, count = "model.language_model.layers", text.num_hidden_layers
    kv = [layers(lm, count, f"self_attn.{p}_proj.weight").reshape(count, k, h, d) for p in "kv"]
    q = layers(lm, count, "self_attn.q_proj.weight").reshape(count, n, h, d)
    o = layers(lm, count, "self_attn.o_proj.weight").reshape(count, d, n, h)
    gates = [layers(lm, count, f"mlp.{p}_proj.weight").transpose(0, 2, 1) for p in ("gate", "up")]
    out["llm/layers/attn/q_einsum/w"] = q.transpose(0, 1, 3, 2)
    out["llm/layers/attn/kv_einsum/w"] = np.stack(kv, 1).transpose(0, 1, 2, 4, 3)
    out["llm/layers/attn/attn_vec_einsum/w"] = o.transpose(0, 2, 3, 1)
    out["llm/layers/mlp/gating_einsum"] = np.stack(gates, 1)
    out["llm/layers/mlp/linear"] = layers(lm, count, "mlp.down_proj.weight").transpose(0, 2, 1)
    out["llm/layers/pre_attention_norm/scale"] = layers(lm, count, "input_layernorm.weight")
    norms = {"pre_ffw_norm": "post_attention_layernorm"}
    if text.use_post_norms:
        norms = {"post_attention_norm": "post_attention_layernorm", "pre_ffw_norm": "pre_feedforward_layernorm"}
        norms["post_ffw_norm"] = "post_feedforward_layernorm"
    for theirs, ours in norms.items():
        out[f"llm/layers/{theirs}/scale"] = layers(lm, count, f"{ours}.weight")
    out["llm/embedder/input_embedding"] = state["model.language_model.embed_tokens.weight"]
    out["llm/final_norm/scale"] = state["model.language_model.norm.weight"]
    root = "model.vision_tower."
    root += "vision_model." if f"{root}vision_model.post_layernorm.weight" in state else ""
    block, count = f"{root}encoder.layers", vision.num_hidden_layers
    to = "img/Transformer/encoderblock/"
    for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value")):
        place = f"{to}MultiHeadDotProductAttention_0/{theirs}/"
        kernel = layers(block, count, f"self_attn.{ours}_proj.weight").transpose(0, 2, 1)
        out[f"{place}kernel"] = kernel.reshape(count, e, a, e // a)
        out[f"{place}bias"] = layers(block, count, f"self_attn.{ours}_proj.bias").reshape(count, a, e // a)
    place = f"{to}MultiHeadDotProductAttention_0/out/"
    kernel = layers(block, count, "self_attn.out_proj.weight").transpose(0, 2, 1)
    out[f"{place}kernel"] = kernel.reshape(count, a, e // a, e)
    out[f"{place}bias"] = layers(block, count, "self_attn.out_proj.bias")
    for at in (0, 1):
        out[f"{to}LayerNorm_{at}/scale"] = layers(block, count, f"layer_norm{at + 1}.weight")
        out[f"{to}LayerNorm_{at}/bias"] = layers(block, count, f"layer_norm{at + 1}.bias")
        out[f"{to}MlpBlock_0/Dense_{at}/kernel"] = layers(block, count, f"mlp.fc{at + 1}.weight").transpose(0, 2, 1)
        out[f"{to}MlpBlock_0/Dense_{at}/bias"] = layers(block, count, f"mlp.fc{at + 1}.bias")
    out["img/Transformer/encoder_norm/scale"] = state[f"{root}post_layernorm.weight"]
    out["img/Transformer/encoder_norm/bias"] = state[f"{root}post_layernorm.bias"]
    out["img/embedding/kernel"] = state[f"{root}embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0)
    out["img/embedding/bias"] = state[f"{root}embeddings.patch_embedding.bias"]
    out["img/pos_embedding"] = state[f"{root}embeddings.position_embedding.weight"][None]
    out["img/head/kernel"] = state["model.multi_modal_projector.linear.weight"].T
    out["img/head/bias"] = state["model.multi_modal_projector.linear.bias"]
    return {f"params/{name}": np.ascontiguousarray(value) for name, value in out.items()}


@pytest.mark.parametrize("name", ["paligemma1", "paligemma2"])
@torch.no_grad()
def test_the_training_codes_npz(tmp_path, saved, name):
    """The caller says which model it is: head sizes and soft-caps of an odd one do not follow from shapes."""
    oracle = saved[name][1]
    config, path = our_config(oracle.config), tmp_path / "weights.npz"
    arrays = big_vision(oracle, config)
    np.savez(path, **arrays)
    model = PaliGemmaForConditionalGeneration.from_pretrained(path, config=config)
    call = oracle_inputs(name)
    assert (model(**call)["logits"] - oracle(**call).logits).abs().max() < 2e-5
    del arrays["params/img/head/bias"]
    np.savez(path, **arrays, **{"params/opt/step": np.zeros(1)})
    with pytest.raises(WeightsMismatch) as caught:
        PaliGemmaForConditionalGeneration.from_pretrained(path, config=config)
    assert caught.value.missing == ("params/img/head/bias",) and caught.value.unexpected == ("params/opt/step",)


# --- the processor


def test_processor_and_model_of_one_folder(tmp_path):
    config = helpers.config()
    model = PaliGemmaForConditionalGeneration(config)
    save_file({k: v for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(write_config(config)))
    with pytest.raises(TokenizerError, match=r"no tokenizer\.model"):
        PaliGemmaProcessor.from_pretrained(tmp_path)
    helpers.tokenizer_json(tmp_path / "tokenizer.json", helpers.pieces())
    processor = PaliGemmaProcessor.from_pretrained(tmp_path)
    loaded = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)
    inputs = processor(["caption en", "detect cat"], [helpers.picture(), helpers.picture(seed=1)])
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    ids = loaded.generate(**tensors, max_new_tokens=4)
    assert ids.shape[0] == 2 and isinstance(processor.decode(ids[0, tensors["input_ids"].shape[1] :]), str)
    with pytest.raises(CheckpointError, match="expected a PaliGemma checkpoint"):
        text, _ = make("gemma1")
        text.save_pretrained(tmp_path / "text")
        PaliGemmaProcessor.from_pretrained(tmp_path / "text")


def test_published_sizes():
    """Parameters of every PaliGemma on the meta device, and their names, against the weight table."""
    from gemma import weights

    for name, config in configs.PRESETS.items():
        if isinstance(config, configs.PaliGemmaConfig) and name.endswith("224"):
            with without_values():
                model = PaliGemmaForConditionalGeneration(config)
            assert {k: tuple(p.shape) for k, p in model.named_parameters()} == weights.expected(config, "hf")
            assert sum(p.numel() for p in model.parameters()) == config.num_parameters
