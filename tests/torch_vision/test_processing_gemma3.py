# SPDX-License-Identifier: Apache-2.0
"""Gemma 3's inputs: image markers become runs of soft tokens, counted; chats; padding; with the model behind it."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import vision_helpers as helpers
from PIL import Image
from safetensors.torch import save_file

from gemma.chat import Turn
from gemma.config import SiglipVisionConfig
from gemma.errors import CheckpointError, ConfigError, ContextFull, PromptError, TokenizerError
from gemma.hf_config import write_config
from gemma.modeling_gemma3 import Gemma3ForConditionalGeneration
from gemma.processing_gemma3 import Gemma3Processor
from gemma.testing import ByteTokenizer, tiny_config

BOI, EOI, SOFT, S = 7, 8, 300, 4
BLANK = [20, 20]  # two newline bytes: this tokenizer has no piece for them


def config(**changes):
    fields = dict(
        model_type="gemma3",
        vision=SiglipVisionConfig(**helpers.VISION),
        mm_tokens_per_image=S,
        image_token_index=SOFT,
        boi_token_index=BOI,
        eoi_token_index=EOI,
        max_position_embeddings=512,
    )
    return tiny_config("gemma3", **fields | changes)


@pytest.fixture(scope="module")
def processor():
    return Gemma3Processor(ByteTokenizer(), config())


RUN = [*BLANK, BOI, *[SOFT] * S, EOI, *BLANK]


def text_ids(text):
    return ByteTokenizer().encode(text, parse_special=False)


def test_a_marker_becomes_a_run(processor):
    out = processor("see <start_of_image> here", helpers.picture())
    assert out["input_ids"].tolist() == [[2, *text_ids("see "), *RUN, *text_ids(" here")]]
    assert out["pixel_values"].shape == (1, 3, 56, 56) and out["attention_mask"].all()
    assert "pixel_values" not in processor("no image")
    two = processor("<start_of_image><start_of_image>", [helpers.picture(), helpers.picture(seed=1)])
    assert two["input_ids"].tolist() == [[2, *RUN, *RUN]]


def test_pictures_are_resized_as_in_training(processor):
    picture = helpers.picture(90, 120)
    expected = np.asarray(Image.fromarray(picture).resize((56, 56), Image.Resampling.BILINEAR))
    assert np.abs(processor.pixels(picture) - (expected.transpose(2, 0, 1) / 127.5 - 1)).max() < 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches(processor, side):
    out = processor(["a", "<start_of_image>b"], [None, helpers.picture()], padding_side=side)
    rows = [row[mask == 1].tolist() for row, mask in zip(out["input_ids"], out["attention_mask"])]
    assert rows == [[2, *text_ids("a")], [2, *RUN, *text_ids("b")]]
    assert (out["attention_mask"][0, -1] == 1) == (side == "left")


def test_chats(processor):
    turns = [Turn("user", "what? <start_of_image>"), Turn("model", "a <start_of_image>"), Turn("user", "sure?")]
    out = processor.chat(turns, [helpers.picture()])
    ids = out["input_ids"][0].tolist()
    assert ids.count(BOI) == 1 and ids.count(SOFT) == S and ids[0] == 2 and ids.count(5) == 4
    assert processor.chat([Turn("user", "<start_of_image>")])["input_ids"].tolist()[0].count(BOI) == 0  # plain text
    with pytest.raises(PromptError, match="1 image markers|hold 1 image"):
        processor.chat(turns, [helpers.picture()] * 2)


def test_images_are_counted(processor):
    for text, images in (("a", 1), ("<start_of_image>", 0), ("<start_of_image>", 2)):
        with pytest.raises(PromptError, match=f"{images} images came with"):
            processor(text, [helpers.picture()] * images)
    with pytest.raises(PromptError, match="soft tokens of its own"):
        processor.expand([2, SOFT], 0)
    with pytest.raises(PromptError, match="for each of 2 prompts"):
        processor(["a", "b"], [None])
    with pytest.raises(PromptError, match="padding_side"):
        processor("a", padding_side="up")
    with pytest.raises(PromptError, match="as str"):
        processor([b"a"])
    with pytest.raises(ContextFull):
        processor("<start_of_image>", helpers.picture(), max_length=8)
    with pytest.raises(PromptError, match="images of text, number 0"):
        processor("<start_of_image>", b"junk")


def test_a_vocabulary_that_is_off_is_refused():
    with pytest.raises(TokenizerError, match="<start_of_image> is id 7 in the tokenizer, but 9"):
        Gemma3Processor(ByteTokenizer(), config(boi_token_index=9))
    with pytest.raises(ConfigError, match="vision"):
        Gemma3Processor(ByteTokenizer(), dataclasses.replace(config(), vision=None))


@torch.no_grad()
def test_with_the_model(processor, tmp_path):
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config()).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.1)
    batch = processor(["a <start_of_image> b", "long enough"], [helpers.picture(), None])
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    together = model.generate(**tensors, max_new_tokens=4, end_ids=())[:, -4:]
    for at, (text, image) in enumerate((("a <start_of_image> b", helpers.picture()), ("long enough", None))):
        alone = {name: torch.from_numpy(array) for name, array in processor(text, image).items()}
        assert model.generate(**alone, max_new_tokens=4, end_ids=())[0, -4:].tolist() == together[at].tolist()
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(write_config(config())))
    loaded = Gemma3ForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded(**tensors)["logits"], model(**tensors)["logits"])
    with pytest.raises(TokenizerError, match=r"no tokenizer\.model"):
        Gemma3Processor.from_pretrained(tmp_path)
    text_only = tmp_path / "text"
    text_only.mkdir()
    (text_only / "config.json").write_text(json.dumps(write_config(tiny_config("gemma3"))))
    save_file({"x": torch.zeros(1)}, text_only / "model.safetensors")
    with pytest.raises(CheckpointError, match="image tower"):
        Gemma3Processor.from_pretrained(text_only)
