# SPDX-License-Identifier: Apache-2.0
"""The small PaliGemma that ships: its files, its numbers on held-out digits, its prompts, and another implementation."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from _digits_eval import Seer, ceiling, classifier, evaluate, held_out  # noqa: E402
from _digits_scenes import load_split  # noqa: E402
from _digits_tasks import CAPTION, answer, caption, model_config, vocabulary  # noqa: E402
from train_digits import SEE, STAGES, TELL, Student, encode_rows, initialize, make_batch, rate_at, stage_loss  # noqa: E402

from gemma import hub  # noqa: E402
from gemma.checkpoint import open_checkpoint  # noqa: E402
from gemma.tokenizer import Tokenizer  # noqa: E402
from paligemma.processing_paligemma import Shot  # noqa: E402

FOLDER = hub.resolve("digits")


@pytest.fixture(scope="module")
def seer():
    return Seer(FOLDER)


@pytest.fixture(scope="module")
def scenes():
    return held_out(30)


def tensors(seer, *arguments, **options):
    return {name: torch.from_numpy(a) for name, a in seer.processor(*arguments, **options).items()}


def written(seer, inputs):
    """What the model writes behind these inputs, one text for each row."""
    with torch.inference_mode():
        rows = seer.model.generate(**inputs, max_new_tokens=32)
    return [seer.processor.decode(row) for row in rows[:, inputs["input_ids"].shape[1] :].tolist()]


# --- files


def test_files_are_those_that_the_script_writes():
    tokenizer = Tokenizer.from_file(FOLDER)
    assert (FOLDER / "tokenizer.model").read_bytes() == vocabulary()
    with open_checkpoint(FOLDER) as checkpoint:
        assert checkpoint.config() == model_config(tokenizer.vocab_size)
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 16e6


def test_the_card_names_its_source_and_its_numbers():
    card = (FOLDER / "README.md").read_text()
    for words in ("load_digits", "CC BY 4.0", "Apache-2.0", "held-out", "IoU", "p^n"):
        assert words in card, words


# --- numbers


def test_held_out_captions_and_boxes(seer, scenes):
    """120 scenes of digits that were never trained on; the model card has the numbers of 1,000.

    Captions: 0.97 x the classifier's ceiling, less what 120 scenes may differ by chance (two standard errors, 0.035).
    """
    result = evaluate(seer, scenes)
    p, _, right = classifier()
    assert result["caption"] >= 0.97 * ceiling(scenes, p, right)["p_to_the_n"] - 0.035, result
    assert result["detect digit"]["iou"] >= 0.8, result
    assert result["detect <one>"]["recall_50"] >= 0.9 and result["detect <one>"]["precision_50"] >= 0.9, result
    assert min(result[name] for name in ("count", "count <one>", "answer: is there")) >= 0.9, result
    assert result["ocr"] >= 0.75, result  # the card has 0.855; its weakest task


def test_it_looks_at_the_picture(seer, scenes):
    """The same prompts about blank pictures are answered with nothing, and about another scene with that scene."""
    blank = np.full_like(scenes.images[0], 20)
    assert seer.answers([blank] * 3, [CAPTION, "count", "detect digit"]) == ["nothing", "zero", ""]
    shifted = list(np.roll(scenes.images, 1, 0))
    texts = seer.answers(shifted, [CAPTION] * len(shifted))
    truth = [caption([digit for digit, _ in scenes.digits(b)]) for b in range(len(shifted))]
    assert np.mean([a == b for a, b in zip(texts, truth)]) < 0.2


# --- prompts


def test_batched_and_padded_answers_are_those_of_one_alone(seer, scenes):
    prompts = [CAPTION, "count", "answer en how many digits are there?", "detect digit"]
    images = list(scenes.images[-4:])
    alone = [seer.answers([image], [prompt])[0] for image, prompt in zip(images, prompts)]
    for side in ("left", "right"):
        assert written(seer, tensors(seer, prompts, images, padding_side=side)) == alone, side


def test_few_shot_prompts_are_answered_about_their_own_picture(seer, scenes):
    """One example before the prompt, as in training: the answer is that of the second picture, not of the example."""
    right = 0
    for b in range(40, 60):
        example = scenes.digits(b - 1)
        shot = Shot(scenes.images[b - 1], CAPTION, answer(CAPTION, example))
        [text] = written(seer, tensors(seer, CAPTION, scenes.images[b], shots=[shot]))
        right += text == answer(CAPTION, scenes.digits(b))
    assert right >= 17


def test_training_rows_are_laid_out_as_the_processor_does(seer, scenes):
    prompt, text = "detect digit", answer("detect digit", scenes.digits(100))
    _, ids, labels, groups = encode_rows([((0,), prompt, text)], seer.processor.tokenizer)
    given = seer.processor(prompt, scenes.images[100], suffix=text)
    image = seer.processor.image_tokens
    assert given["input_ids"][0, image:].tolist() == ids[0].tolist()
    assert given["labels"][0, image:].tolist() == labels[0].tolist()
    assert (1 - given["token_type_ids"][0, image:]).tolist() == groups[0].tolist()
    example = f"{CAPTION}\na seven\n{CAPTION}"
    _, ids, _, _ = encode_rows([((0, 1), example, "a two")], seer.processor.tokenizer)
    shot = Shot(scenes.images[0], CAPTION, "a seven")
    given = seer.processor(CAPTION, scenes.images[1], suffix="a two", shots=[shot])
    assert given["input_ids"][0, 2 * image :].tolist() == ids[0].tolist()


def test_another_implementation_reads_the_same_files(seer, scenes):
    """Hugging Face's PaliGemma, on these weights, gives the same logits (2e-5 of float32, as for the tiny oracles)."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        FOLDER, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    inputs = tensors(seer, "detect digit", scenes.images[-1], suffix=answer("detect digit", scenes.digits(119)))
    del inputs["labels"]
    with torch.inference_mode():
        ours = seer.model(**inputs)["logits"]
        other = theirs(**inputs).logits
    torch.testing.assert_close(ours, other, atol=2e-5 * float(other.abs().max()), rtol=0)


# --- training


def test_only_training_digits_are_trained_on(monkeypatch):
    asked = []
    monkeypatch.setattr("_digits_scenes.load_split", lambda name: asked.append(name) or load_split(name))
    for stage in STAGES:
        make_batch(stage, 0, Tokenizer.from_file(FOLDER))
    assert set(asked) == {"train"}


def test_batches_follow_from_their_step():
    tokenizer = Tokenizer.from_file(FOLDER)
    one, two = make_batch(TELL, 9, tokenizer), make_batch(TELL, 9, tokenizer)
    assert one.images.shape[1] == 2 and torch.equal(one.ids, two.ids) and torch.equal(one.scenes, two.scenes)
    assert not torch.equal(one.scenes[0], make_batch(TELL, 10, tokenizer).scenes[0])


def test_rates_rise_and_fall():
    last = STAGES[-1]
    rates = [rate_at(last, step) for step in range(last.steps)]
    assert rates[0] < 0.02 and max(rates) == 1.0 and rates[-1] < 1e-5
    assert rate_at(SEE, SEE.steps - 1) == 1.0


def test_a_step_of_training_reaches_every_parameter():
    tokenizer = Tokenizer.from_file(FOLDER)
    student = Student(model_config(tokenizer.vocab_size))
    initialize(student, tokenizer)
    loss = stage_loss(STAGES[-1], student, make_batch(STAGES[-1], 0, tokenizer), tokenizer.id_of("<loc0000>"))
    loss.backward()
    without = [name for name, p in student.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert torch.isfinite(loss) and not without


def test_the_curve_goes_to_the_end_of_every_stage():
    rows = [json.loads(line) for line in (FOLDER / "curve.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == sorted((row["stage"] for row in rows), key=[s.name for s in STAGES].index)
    assert (rows[-1]["stage"], rows[-1]["step"]) == (
        STAGES[-1].name,
        STAGES[-1].end // 200 * 200,
    )  # a row each 200 steps
    assert rows[-1]["caption"] > 0.9
