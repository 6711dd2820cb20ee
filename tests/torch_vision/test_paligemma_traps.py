# SPDX-License-Identifier: Apache-2.0
"""What a user of PaliGemma trips over: literal configurations, temperature 0, labels, state dicts, failed loading."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import vision_helpers as helpers
from hf_tiny_oracles import make
from torch_vision_oracles import our_config

from gemma._torch.load import load_weights, without_values
from gemma.checkpoint import open_checkpoint
from gemma.errors import CheckpointError, PromptError, ShapeError, WeightsMismatch
from gemma.modeling_gemma3 import Gemma3ForConditionalGeneration
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
from siglip.config import PaliGemmaConfig
from siglip.modeling_siglip import SiglipVisionTransformer

TEXT = dict(
    vocab_size=320,
    hidden_size=72,
    intermediate_size=100,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=24,
    max_position_embeddings=128,
)
S, IMAGE = 16, 310


def tiny(**text) -> PaliGemmaForConditionalGeneration:
    torch.manual_seed(0)
    config = PaliGemmaConfig(
        vision_config=helpers.VISION,
        text_config=TEXT | text,
        image_token_index=IMAGE,
        vocab_size=320,
        projection_dim=72,
        tokenizer_vocab_size=320,
    )
    return PaliGemmaForConditionalGeneration(config).eval()


def prompt(batch: int = 1) -> dict:
    ids = torch.tensor([[IMAGE] * S + [2, 11, 12, 108]] * batch)
    return dict(input_ids=ids, pixel_values=torch.linspace(-1, 1, batch * 3 * 56 * 56).view(batch, 3, 56, 56))


def test_the_documents_literal_configuration():
    """The decoder document's decoder under the model document's numbers: 2.9 billion parameters, none of them made."""
    text = dict(
        vocab_size=257152,
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        rms_norm_eps=1e-6,
    )
    config = PaliGemmaConfig(
        vision_config={}, text_config=text, image_token_index=256000, vocab_size=257152, projection_dim=2048
    )
    with without_values():
        model = PaliGemmaForConditionalGeneration(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters
    assert config.image_token_index == 256000 and model.tokens_per_image == 256


def test_a_pad_token_in_the_text_configuration():
    model = tiny(pad_token_id=3)
    assert model.text_config.pad_token_id == 3
    ids = model.generate(**prompt(2), max_new_tokens=3, end_ids=[])
    assert ids.shape == (2, S + 4 + 3) and not (ids[:, -3:] == 3).any()


def test_temperature_zero_is_the_arg_max():
    model = tiny()
    ids = model.generate(**prompt(), max_new_tokens=3, temperature=0, end_ids=[])
    with torch.no_grad():
        logits = model(ids[:, :-1], prompt()["pixel_values"], token_type_ids=torch.tensor([[0] * 20 + [1] * 2]))[
            "logits"
        ]
    logits[..., [0, IMAGE]] = -torch.inf  # padding and placeholder are never written
    assert torch.equal(ids[:, -3:], logits[:, -3:].argmax(-1))


def test_image_tokens_are_no_labels():
    """`labels=input_ids`, the habit from text models."""
    inputs = prompt()
    with pytest.raises(PromptError, match="image tokens.*cannot be learnt"):
        tiny()(**inputs, labels=inputs["input_ids"])


def test_what_a_processor_returns_must_become_tensors():
    inputs = prompt()
    for name in inputs:
        with pytest.raises(ShapeError, match=f"{name}: expected a torch.Tensor, got ndarray"):
            tiny()(**inputs | {name: inputs[name].numpy()})
        with pytest.raises(ShapeError, match=f"{name}: expected a torch.Tensor, got ndarray"):
            tiny().generate(**inputs | {name: inputs[name].numpy()}, max_new_tokens=2)


@pytest.mark.parametrize("name", ["paligemma2", "gemma3"])
def test_a_state_dict_whose_head_is_another_matrix(name):
    oracle, config = make(name)
    cls = Gemma3ForConditionalGeneration if name == "gemma3" else PaliGemmaForConditionalGeneration
    model, state = cls(our_config(config)), oracle.state_dict()
    model.load_state_dict(state)  # with the head's copy of the embedding
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        model.load_state_dict(state)


def test_another_architecture_leaves_nothing_half_loaded(tmp_path):
    """Weights of a PaliGemma 2 into a living PaliGemma 1, which answers as before."""
    oracle, config = make("paligemma2")
    oracle.save_pretrained(tmp_path)
    model = tiny()
    with torch.no_grad():
        before = model(**prompt())["logits"]
        with open_checkpoint(tmp_path) as checkpoint, pytest.raises(WeightsMismatch):
            load_weights(model, checkpoint, our_config(config))
        assert torch.equal(model(**prompt())["logits"], before)
    state = oracle.state_dict()
    with pytest.raises(RuntimeError, match="feedforward_layernorm"):
        model.load_state_dict(state)


def test_a_tower_takes_the_state_dict_of_other_libraries():
    tower = SiglipVisionTransformer(tiny().config.vision_config)
    state = {f"vision_model.{name}": torch.full_like(value, 0.5) for name, value in tower.state_dict().items()}
    tower.load_state_dict(state)
    assert all(np.all(value.numpy() == 0.5) for value in tower.state_dict().values())
