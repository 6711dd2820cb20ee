# SPDX-License-Identifier: Apache-2.0
"""The mask codec against torch's own convolutions, and masks in their boxes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file

from gemma.errors import CheckpointError, CheckpointNotFound, FormatError, PromptError, ShapeError, WeightsMismatch
from paligemma.detection import Detection, parse_detections
from paligemma.segmentation import MaskCodec, crop_mask, expected_shapes, paste_mask


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    found = {}
    for name, shape in expected_shapes(24).items():
        fan = np.prod(shape[1:]) if len(shape) > 2 else 4.0
        found[name] = (rng.standard_normal(shape) * 1.4 / np.sqrt(fan)).astype(np.float32)
    return found


@pytest.fixture(scope="module")
def codec(weights):
    return MaskCodec(weights)


def tensors(weights):
    return {name: torch.from_numpy(value).double() for name, value in weights.items()}


def residual(x, w, name):
    y = F.relu(F.conv2d(x, w[f"{name}.net.0.weight"], w[f"{name}.net.0.bias"], padding=1))
    y = F.relu(F.conv2d(y, w[f"{name}.net.2.weight"], w[f"{name}.net.2.bias"], padding=1))
    return x + F.conv2d(y, w[f"{name}.net.4.weight"], w[f"{name}.net.4.bias"])


def reference_decode(codes, weights):
    """The published network, layer by layer, with torch's operators in float64."""
    w = tensors(weights)
    x = w["_vq_vae._embedding"][torch.as_tensor(codes)].reshape(len(codes), 4, 4, -1).permute(0, 3, 1, 2)
    x = F.relu(F.conv2d(x, w["decoder.0.weight"], w["decoder.0.bias"]))
    x = residual(residual(x, w, "decoder.2"), w, "decoder.3")
    for at in (4, 6, 8, 10):
        x = F.relu(F.conv_transpose2d(x, w[f"decoder.{at}.weight"], w[f"decoder.{at}.bias"], stride=2, padding=1))
    return F.conv2d(x, w["decoder.12.weight"], w["decoder.12.bias"])[:, 0].numpy()


def reference_encode(masks, weights):
    w = tensors(weights)
    x = torch.as_tensor(masks).double()[:, None] * 2 - 1
    for at in (0, 2, 4, 6):
        x = F.relu(F.conv2d(x, w[f"encoder.{at}.weight"], w[f"encoder.{at}.bias"], stride=2, padding=1))
    x = residual(residual(x, w, "encoder.8"), w, "encoder.9")
    x = F.conv2d(x, w["encoder.10.weight"], w["encoder.10.bias"]).permute(0, 2, 3, 1).reshape(len(masks), 16, -1)
    return torch.cdist(x, w["_vq_vae._embedding"][None]).argmin(-1).numpy()


def test_decoding_equals_the_published_network(codec, weights):
    codes = np.random.default_rng(1).integers(0, 128, (3, 16))
    ours, theirs = codec.decode(codes), reference_decode(codes, weights)
    assert ours.shape == (3, 64, 64) and ours.dtype == np.float32 and theirs.std() > 0.05
    assert np.abs(ours - theirs).max() < 2e-5 * max(1.0, np.abs(theirs).max())


def test_encoding_equals_the_published_network(codec, weights):
    masks = np.random.default_rng(2).random((3, 64, 64)).astype(np.float32)
    ours, theirs = codec.encode(masks), reference_encode(masks, weights)
    assert (ours == theirs).all() and len(np.unique(ours)) > 3


def test_a_wrong_grid_order_shows(codec):
    codes = np.random.default_rng(1).integers(0, 128, (1, 16))
    turned = codes.reshape(1, 4, 4).transpose(0, 2, 1).reshape(1, 16)
    assert np.abs(codec.decode(codes) - codec.decode(turned)).max() > 1e-2


def test_no_masks_at_all(codec):
    assert codec.decode(np.zeros((0, 16), int)).shape == (0, 64, 64)


def test_pasting_fills_the_box_and_nothing_else():
    outline = np.full((64, 64), -1, np.float32)
    outline[:, :32] = 1  # the left half
    mask = paste_mask(outline, (10, 20, 50, 40), width=100, height=60)
    expected = np.zeros((60, 100), bool)
    expected[20:40, 10:30] = True
    assert mask.shape == (60, 100) and (mask != expected).sum() == 0
    assert paste_mask(outline, (-20, -20, 200, 200), 30, 30).any()
    assert not paste_mask(outline, (5.2, 5.2, 5.8, 5.8), 30, 30).any()  # less than a pixel


def test_crop_is_the_inverse_of_paste():
    mask = np.zeros((60, 100), bool)
    mask[20:40, 10:30] = True
    part = crop_mask(mask, (10, 20, 50, 40))
    assert part.shape == (64, 64) and part[:, :28].min() == 1 and part[:, 36:].max() == 0
    assert (paste_mask(part - 0.5, (10, 20, 50, 40), 100, 60) != mask).sum() == 0
    with pytest.raises(PromptError, match="no pixel"):
        crop_mask(mask, (99, 59, 99, 59))


def test_masks_of_a_parsed_text(codec):
    text = "<loc0000><loc0000><loc1023><loc0512>" + "<seg005>" * 16 + " cat ; <loc0000><loc0000><loc1023><loc0512> dog"
    cat, dog = codec.add_masks(parse_detections(text, 80, 40), 80, 40)
    assert cat.mask.shape == (40, 80) and cat.mask.dtype == bool and dog.mask is None
    assert not cat.mask[:, 41:].any()
    assert codec.add_masks([Detection("x", (0, 0, 1, 1))], 10, 10)[0].mask is None


def test_files(tmp_path, weights):
    path = tmp_path / "vae.npz"
    np.savez(path, **weights, **{"_vq_vae._ema_w": np.zeros(3, np.float32)})
    codes = np.arange(16)[None]
    assert np.array_equal(MaskCodec.from_file(path).decode(codes), MaskCodec(weights).decode(codes))
    decoder = {name: value for name, value in weights.items() if not name.startswith("encoder.")}
    only = MaskCodec(decoder)
    assert not only.can_encode
    with pytest.raises(WeightsMismatch, match="decoder only"):
        only.encode(np.zeros((1, 64, 64)))


def test_bad_files(tmp_path):
    with pytest.raises(CheckpointNotFound, match=r"none\.npz"):
        MaskCodec.from_file(tmp_path / "none.npz")
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK\x03\x04 and nothing else")
    with pytest.raises(CheckpointError, match=r"broken\.npz"):
        MaskCodec.from_file(broken)
    objects = tmp_path / "objects.npz"
    np.savez(objects, x=np.array([{}, 1], object))
    with pytest.raises(CheckpointError, match="holds object"):
        MaskCodec.from_file(objects)
    huge = tmp_path / "huge.npz"
    np.savez(huge, x=np.zeros(2**24 + 2**20, np.float32))
    with pytest.raises(FormatError, match="at most"):
        MaskCodec.from_file(huge)
    other = tmp_path / "other.safetensors"
    save_file({"x": np.zeros(1, np.float32)}, other)
    with pytest.raises(FormatError, match="not hf"):
        MaskCodec.from_file(other)


def test_mismatches_are_all_listed(weights):
    wrong = {name: value for name, value in weights.items() if name != "decoder.0.bias"}
    wrong["decoder.12.weight"], wrong["extra"] = np.zeros((2, 16, 1, 1), np.float32), np.zeros(1, np.float32)
    with pytest.raises(WeightsMismatch) as caught:
        MaskCodec(wrong)
    assert caught.value.missing == ("decoder.0.bias",) and caught.value.unexpected == ("extra",)
    assert caught.value.misshaped == ("decoder.12.weight: expected (1, 16, 1, 1), got (2, 16, 1, 1)",)


@pytest.mark.parametrize("codes", [np.zeros((2, 15), int), np.zeros(16, int), np.zeros((1, 16))])
def test_bad_shapes(codec, codes):
    with pytest.raises(ShapeError, match="codes"):
        codec.decode(codes)


def test_bad_codes(codec):
    with pytest.raises(PromptError, match=r"0\.\.127"):
        codec.decode(np.full((1, 16), 128))
    with pytest.raises(ShapeError, match="masks"):
        codec.encode(np.zeros((1, 32, 32)))
