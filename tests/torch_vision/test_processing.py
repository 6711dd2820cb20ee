# SPDX-License-Identifier: Apache-2.0
"""PaliGemma's inputs: layout, padding, labels, shots, pictures of any mode; compared with Hugging Face's processor."""

import io
import math
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import vision_helpers as helpers
from PIL import Image

from gemma.errors import ConfigError, ContextFull, PromptError, TokenizerError
from gemma.image import resize
from paligemma.processing_paligemma import PaliGemmaProcessor, Shot, task_prompt

N = 16  # image tokens of the small tower


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vocabularies")


@pytest.fixture(scope="module")
def processor(folder):
    return PaliGemmaProcessor(helpers.tokenizer(folder), helpers.config())


def ids_of(processor, text):
    return processor.tokenizer.encode(text, parse_special=False)


def test_layout(processor):
    out = processor("caption en", helpers.picture())
    newline = ids_of(processor, "\n")
    assert out["input_ids"].tolist() == [[helpers.IMAGE_ID] * N + [2, *ids_of(processor, "caption en"), *newline]]
    assert out["input_ids"].dtype == out["attention_mask"].dtype == out["token_type_ids"].dtype == np.int64
    assert out["attention_mask"].all() and not out["token_type_ids"].any() and "labels" not in out
    assert out["pixel_values"].shape == (1, 3, 56, 56) and out["pixel_values"].dtype == np.float32


def test_the_newline_is_tokenized_on_its_own(processor):
    """Two newlines are one piece of the vocabulary; the one that ends the prompt must not merge into it."""
    newline, both = ids_of(processor, "\n"), ids_of(processor, "\n\n")
    assert len(newline) == len(both) == 1 and newline != both
    assert processor("ocr\n", helpers.picture())["input_ids"][0, -2:].tolist() == newline * 2


def test_suffix_labels_and_types(processor):
    out = processor(["ocr", "caption en"], [helpers.picture()] * 2, suffix=["abc", "a cat"], padding_side="right")
    for row, suffix in enumerate(("abc", "a cat")):
        tail = [*ids_of(processor, suffix), 1]
        where = out["token_type_ids"][row] == 1
        assert out["input_ids"][row][where].tolist() == out["labels"][row][where].tolist() == tail
        assert (out["labels"][row][~where] == -100).all()
        assert (out["attention_mask"][row] == (out["input_ids"][row] != 0)).all()
    assert out["attention_mask"][0, -1] == 0 and out["token_type_ids"][0, -1] == 0  # padding is no suffix


def test_padding_sides_hold_the_same_tokens(processor):
    left, right = (
        processor(["ocr", "answer en what"], [helpers.picture()] * 2, suffix=["a", "bc"], padding_side=side)
        for side in ("left", "right")
    )
    assert left["attention_mask"][0, 0] == 0 and right["attention_mask"][0, -1] == 0
    for name in ("input_ids", "token_type_ids", "labels"):
        for row in range(2):
            a, b = (out[name][row][out["attention_mask"][row] == 1] for out in (left, right))
            assert a.tolist() == b.tolist()


def test_several_images_stand_first(processor):
    out = processor("<image><image>caption en", [helpers.picture(), helpers.picture(seed=1)])
    assert out["input_ids"][0, : 2 * N + 1].tolist() == [helpers.IMAGE_ID] * 2 * N + [2]
    assert out["pixel_values"].shape[0] == 2
    assert (out["input_ids"] == processor("caption en", [helpers.picture(), helpers.picture()])["input_ids"]).all()
    batch = processor(["ocr", "ocr"], [[helpers.picture()], [helpers.picture(), helpers.picture(seed=2)]])
    assert (batch["input_ids"] == helpers.IMAGE_ID).sum(1).tolist() == [N, 2 * N]
    assert batch["pixel_values"].shape[0] == 3
    assert np.array_equal(batch["pixel_values"][2], processor.pixels(helpers.picture(seed=2)))


def test_shots(processor):
    shots = [Shot(helpers.picture(seed=1), "caption en", "a cat"), Shot(helpers.picture(seed=2), "ocr", "abc")]
    out = processor("caption en", helpers.picture(seed=3), shots=shots)
    text = []
    for part in ("caption en", "a cat", "ocr", "abc", "caption en"):
        text += ids_of(processor, part) + ids_of(processor, "\n")
    assert out["input_ids"].tolist() == [[helpers.IMAGE_ID] * 3 * N + [2, *text]]
    order = [processor.pixels(helpers.picture(seed=seed)) for seed in (1, 2, 3)]
    assert np.array_equal(out["pixel_values"], np.stack(order))


def test_locations_and_segments_are_tokens_and_nothing_else_is(processor):
    out = processor("<loc0007> <seg003><bos><eos><pad>", helpers.picture(), suffix="<loc1023> cat ; <loc0000>")
    ids = out["input_ids"][0, N:].tolist()
    assert ids[:2] == [2, helpers.FIRST_LOC + 7] and helpers.FIRST_LOC + 1024 + 3 in ids
    assert ids.count(2) == 1 and ids.count(1) == 1 and 0 not in ids  # bos once, eos at the end, no padding
    suffix = out["input_ids"][out["token_type_ids"] == 1].tolist()
    assert suffix[0] == helpers.FIRST_LOC + 1023 and suffix[-2:] == [helpers.FIRST_LOC, 1]


@pytest.mark.parametrize("text", ["caption <image> en", "caption en<image>", "<image> caption <image>"])
def test_image_tokens_inside_a_prompt_are_refused(processor, text):
    with pytest.raises(PromptError, match="only stand at the very beginning"):
        processor(text, helpers.picture())
    with pytest.raises(PromptError, match="only stand at the very beginning"):
        processor("ocr", helpers.picture(), suffix=text)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_images_are_counted(processor, count):
    with pytest.raises(PromptError, match=f"says <image> 2 times, but {count} images"):
        processor("<image><image>ocr", [helpers.picture()] * count)


def test_batches_are_counted(processor):
    with pytest.raises(PromptError, match="for each of 2 prompts"):
        processor(["a", "b"], [helpers.picture()])
    with pytest.raises(PromptError, match="for each of 2 prompts"):
        processor(["a", "b"], helpers.picture())
    with pytest.raises(PromptError, match="one str for each of 2"):
        processor(["a", "b"], [helpers.picture()] * 2, suffix=["x"])
    with pytest.raises(PromptError, match="at least one prompt"):
        processor([], [])
    with pytest.raises(PromptError, match="as str"):
        processor([b"a"], [helpers.picture()])
    with pytest.raises(PromptError, match="padding_side"):
        processor("a", helpers.picture(), padding_side="middle")


def test_text_without_an_image(processor):
    out = processor("hello", None)
    assert out["pixel_values"].shape == (0, 3, 56, 56) and out["input_ids"][0, 0] == 2


def test_max_length(processor):
    length = processor("caption en", helpers.picture(), suffix="abc")["input_ids"].shape[1]
    processor("caption en", helpers.picture(), suffix="abc", max_length=length)
    with pytest.raises(ContextFull, match=str(length)):
        processor("caption en", helpers.picture(), suffix="abc", max_length=length - 1)


def modes():
    rgb = helpers.picture()
    image = Image.fromarray(rgb)
    sixteen = Image.fromarray(rgb[..., 0].astype(np.uint16) * 257)
    frames = [image, Image.fromarray(255 - rgb)]
    gif = io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    return {
        "L": image.convert("L"),
        "1": image.convert("1"),
        "P": image.convert("P"),
        "RGBA": image.convert("RGBA"),
        "LA": image.convert("LA"),
        "CMYK": image.convert("CMYK"),
        "I;16": sixteen,
        "gif": gif.getvalue(),
        "1x1": Image.fromarray(rgb[:1, :1]),
        "grey array": rgb[..., 0],
        "long": Image.fromarray(np.repeat(rgb, 40, axis=1)),
    }


@pytest.mark.parametrize("mode", list(modes()))
def test_pictures_of_any_mode(processor, mode):
    pixels = processor.pixels(modes()[mode])
    assert pixels.shape == (3, 56, 56) and -1 <= pixels.min() <= pixels.max() <= 1
    rgb = helpers.picture()
    grey = Image.fromarray(rgb).convert("L")
    same = {"RGBA": rgb, "CMYK": rgb, "L": grey, "LA": grey, "I;16": rgb[..., 0], "grey array": rgb[..., 0]}
    if mode in same:  # to what a mode rounds away: two of 255 levels
        assert np.abs(pixels - processor.pixels(same[mode])).max() <= 2 / 127.5
    if mode in ("gif", "P"):  # few colors, but those of the first frame
        assert np.abs(pixels - processor.pixels(rgb)).mean() < 0.3
    if mode == "1x1":
        assert np.abs(pixels - (rgb[0, 0] / 127.5 - 1)[:, None, None]).max() < 1e-6


@pytest.mark.parametrize("broken", [b"", b"no picture", "truncated", "/no/such/file.png"])
def test_unreadable_pictures_are_named(processor, broken):
    if broken == "truncated":
        out = io.BytesIO()
        Image.fromarray(helpers.picture(400, 400)).save(out, "JPEG")
        broken = out.getvalue()[: len(out.getvalue()) // 3]
    with pytest.raises(PromptError, match=r"images of text\[1\], number 1"):
        processor(["a", "b"], [helpers.picture(), [helpers.picture(), broken]])


def test_a_huge_picture_is_refused_before_it_is_unpacked(processor):
    """Forty kilobytes of PNG that say 30,000 x 30,000 pixels."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1 << 20))), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    tracemalloc.start()
    with pytest.raises(PromptError, match="images of text, number 0.*pixels"):
        processor("caption en", png)
    assert tracemalloc.get_traced_memory()[1] < 1e7
    tracemalloc.stop()


def test_resampling(folder, processor):
    picture = helpers.picture(90, 120)
    bilinear = PaliGemmaProcessor(helpers.tokenizer(folder), helpers.config(), resample="bilinear")
    expected = resize(picture, 56, 56, method="bicubic").transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(processor.pixels(picture) - expected).max() < 1e-6
    assert np.abs(processor.pixels(picture) - bilinear.pixels(picture)).max() > 0.01
    with pytest.raises(ConfigError, match="resample"):
        PaliGemmaProcessor(helpers.tokenizer(folder), helpers.config(), resample="nearest")


# --- vocabularies


@pytest.mark.parametrize(
    ("order", "changes", "match"),
    [
        # What adding the tokens to a plain Gemma vocabulary gives, with the configuration of the published model ...
        ((["<image>"], helpers.LOCS, helpers.SEGS), {}, "<image> is id"),
        # ... and with the default that belongs to it in other software.
        ((["<image>"], helpers.LOCS, helpers.SEGS), dict(image_token_index=helpers.FIRST_LOC), "<loc0000> is id"),
        ((helpers.SEGS, helpers.LOCS, ["<image>"]), {}, "<loc0000> is id"),
        ((helpers.LOCS, helpers.SEGS), {}, "no piece <image>"),
        ((helpers.LOCS[:-1], helpers.SEGS, ["<x>", "<image>"]), {}, "no <loc1023>"),
        ((helpers.LOCS[::-1], helpers.SEGS, ["<image>"]), {}, "pieces in a row"),
    ],
)
def test_a_vocabulary_that_is_off_is_refused(folder, order, changes, match):
    tokenizer = helpers.tokenizer(folder, helpers.pieces(order))
    with pytest.raises(TokenizerError, match=match):
        PaliGemmaProcessor(tokenizer, helpers.config(**changes))


def test_a_small_vocabulary_without_masks_is_fine(folder):
    vocabulary = helpers.pieces((["<image>"], helpers.LOCS))
    config = helpers.config(image_token_index=helpers.FIRST_LOC, tokenizer_vocab_size=len(vocabulary))
    processor = PaliGemmaProcessor(helpers.tokenizer(folder, vocabulary), config)
    assert processor("a<seg001>", helpers.picture())["input_ids"][0, 0] == helpers.FIRST_LOC


# --- answers


def test_decoding_and_detections(processor):
    text = "<loc0100><loc0200><loc0300><loc0400> cat"
    ids = processor._encode(text, "test")
    assert processor.decode([*ids, 1, 7, 7]) == text and processor.decode([0, *ids]) == text
    logprobs = [math.log(0.5)] * len(ids) + [0.0, 0.0]
    [found] = processor.detections([*ids, 1, 0], 640, 480, logprobs=logprobs)
    assert found.label == "cat" and found.score == pytest.approx(0.5)
    [plain] = processor.detections(np.array([*ids, 1]), 640, 480)
    assert plain.box == found.box and plain.score is None
    with pytest.raises(PromptError, match="one for each"):
        processor.detections(ids, 640, 480, logprobs=[0.0])


def test_byte_pieces_of_one_letter_are_scored(processor):
    text = "<loc0100><loc0200><loc0300><loc0400> größer"
    ids = processor._encode(text, "test")
    [found] = processor.detections(ids, 100, 100, logprobs=[math.log(0.25)] * len(ids))
    assert found.label == "größer" and found.score == pytest.approx(0.25)


def test_task_prompts():
    assert task_prompt("caption") == "caption en" and task_prompt("caption", language="de") == "caption de"
    assert task_prompt("answer", " what is it? ") == "answer en what is it?"
    assert task_prompt("detect", "cat", "dog") == "detect cat ; dog" and task_prompt("segment", "cat") == "segment cat"
    assert task_prompt("ocr") == "ocr"
    bad = [("dance",), ("caption", "x"), ("detect",), ("answer", "a", "b"), ("detect", "")]
    for arguments in bad:
        with pytest.raises(PromptError, match="task"):
            task_prompt(*arguments)
    with pytest.raises(PromptError, match="language"):
        task_prompt("caption", language="english please")


# --- Hugging Face


@pytest.fixture(scope="module")
def hugging_face():
    import transformers

    vocabulary = {piece: i for i, piece in enumerate(helpers.pieces())}
    tokenizer = transformers.GemmaTokenizer(vocab=vocabulary, merges=helpers.MERGES)
    tokenizer.add_tokens([transformers.AddedToken(p, normalized=False) for p in (*helpers.LOCS, *helpers.SEGS)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    pictures = SiglipImageProcessorPil(size=dict(height=56, width=56))
    pictures.image_seq_length = N
    return transformers.PaliGemmaProcessor(image_processor=pictures, tokenizer=tokenizer)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("images", [1, 2])
def test_equals_hugging_faces_processor(processor, hugging_face, images, side):
    texts = ["<image>" * images + "detect cat", "<image>" * images + "answer en what is 3 <loc0012>"]
    groups = [[helpers.picture(seed=10 * row + n) for n in range(images)] for row in range(2)]
    suffixes = ["<loc0100><loc0200><loc0300><loc0400> cat", "a"]
    hugging_face.tokenizer.padding_side = side
    theirs = hugging_face(
        text=texts,
        images=[[Image.fromarray(picture) for picture in group] for group in groups],
        suffix=suffixes,
        padding="longest",
        return_tensors="np",
    )
    ours = processor(texts, groups, suffix=suffixes, padding_side=side)
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    assert ours["attention_mask"].tolist() == theirs["attention_mask"].tolist()
    real = ours["attention_mask"] == 1
    assert (ours["token_type_ids"] == theirs["token_type_ids"])[real].all()
    assert (ours["labels"] == theirs["labels"])[real].all()
    pixels = np.asarray(theirs["pixel_values"]).reshape(ours["pixel_values"].shape)
    assert np.abs(ours["pixel_values"] - pixels).max() < 1e-6
