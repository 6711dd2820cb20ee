# SPDX-License-Identifier: Apache-2.0
"""`gemma.image`: every way a picture may come, every way it may be broken, and Hugging Face's processors as oracles."""

import contextlib
import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from gemma.errors import PromptError
from gemma.image import MAX_PIXELS, insert_crops, jpeg_roundtrip, normalize, pan_and_scan, read_image, resize

PIXELS = np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8)
SMOOTH = np.stack(np.broadcast_arrays(np.arange(0, 240, 10)[:, None], np.arange(0, 160, 4)[None], 99), -1).astype(
    np.uint8
)


def encoded(image, format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format, **options)
    return buffer.getvalue()


# --- where a picture comes from


def sources(tmp_path):
    data = encoded(PIXELS)
    (tmp_path / "a.png").write_bytes(data)
    return {
        "path": tmp_path / "a.png",
        "str path": str(tmp_path / "a.png"),
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "file": io.BytesIO(data),
        "PIL": Image.fromarray(PIXELS),
        "lazy PIL": Image.open(tmp_path / "a.png"),
        "array": PIXELS,
        "float array": PIXELS.astype(np.float32) / 255,
        "int array": PIXELS.astype(np.int64),
        "uint16 array": PIXELS.astype(np.uint16) * 257,
        "Fortran order": np.asfortranarray(PIXELS),
    }


def test_every_source_gives_the_same_pixels(tmp_path):
    for name, source in sources(tmp_path).items():
        found = read_image(source)
        assert found.dtype == np.uint8 and found.flags.c_contiguous, name
        np.testing.assert_array_equal(found, PIXELS, err_msg=name)


def test_the_result_shares_no_memory_and_the_source_stays():
    array = PIXELS.copy()
    picture = Image.fromarray(array)
    for source in (array, picture):
        read_image(source)[:] = 0
        np.testing.assert_array_equal(np.asarray(source), PIXELS)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "JPEG"])
def test_formats(format):
    options = {"WEBP": dict(lossless=True), "JPEG": dict(quality=100, subsampling=0)}.get(format, {})
    found = read_image(encoded(SMOOTH, format, **options))
    # JPEG rounds twice (to YCbCr and to coefficients), the palette of a GIF holds 256 of these 960 colours.
    assert np.abs(found.astype(int) - SMOOTH).max() <= {"JPEG": 3, "GIF": 40}.get(format, 0)


# --- colour modes


def test_grey_palette_and_one_bit():
    grey = PIXELS[..., 0]
    as_rgb = np.repeat(grey[..., None], 3, -1)
    np.testing.assert_array_equal(read_image(encoded(grey)), as_rgb)
    np.testing.assert_array_equal(read_image(grey), as_rgb)
    np.testing.assert_array_equal(read_image(grey[..., None]), as_rgb)
    bits = grey > 127
    black_white = np.repeat(bits[..., None], 3, -1) * np.uint8(255)
    np.testing.assert_array_equal(read_image(encoded(Image.fromarray(bits))), black_white)
    np.testing.assert_array_equal(read_image(bits), black_white)
    palette = Image.fromarray(SMOOTH).quantize(16)
    np.testing.assert_array_equal(read_image(encoded(palette)), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_sixteen_bit_grey_is_scaled_not_clipped(dtype):
    deep = np.random.default_rng(1).integers(0, 65536, (8, 9)).astype(dtype)
    wanted = np.repeat(np.rint(deep / 257).astype(np.uint8)[..., None], 3, -1)
    np.testing.assert_array_equal(read_image(Image.fromarray(deep)), wanted)
    if dtype == np.uint16:
        np.testing.assert_array_equal(read_image(encoded(deep)), wanted)
        np.testing.assert_array_equal(read_image(deep), wanted)


def test_transparency_is_laid_over_white():
    alpha = np.random.default_rng(2).integers(0, 256, (21, 34, 1), dtype=np.uint8)
    over = np.rint((PIXELS * alpha.astype(float) + 255.0 * (255 - alpha)) / 255)
    rgba = np.concatenate([PIXELS, alpha], -1)
    for source in (rgba, encoded(rgba), Image.fromarray(rgba), encoded(rgba, "WEBP", lossless=True, exact=True)):
        assert np.abs(read_image(source).astype(float) - over).max() <= 1  # two orders of rounding
    grey = np.concatenate([PIXELS[..., :1], alpha], -1)
    assert np.abs(read_image(grey).astype(float) - over[..., :1]).max() <= 1
    assert np.abs(read_image(encoded(Image.fromarray(grey, "LA"))).astype(float) - over[..., :1]).max() <= 1


def test_one_transparent_colour_and_transparent_palette_entries():
    picture = Image.fromarray(np.array([[10, 200]], np.uint8))
    assert read_image(encoded(picture, transparency=10))[0, :, 0].tolist() == [255, 200]
    deep = Image.fromarray(np.array([[0, 25700]], np.uint16))
    assert read_image(encoded(deep, transparency=0))[0, :, 0].tolist()[1] == 100
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([1, 2, 3, 4, 5, 6])
    assert read_image(encoded(palette, transparency=0)).tolist() == [[[255, 255, 255], [4, 5, 6]]]
    assert read_image(encoded(palette, "GIF", transparency=0)).tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_cmyk_jpeg():
    picture = Image.fromarray(SMOOTH).convert("CMYK")
    found = read_image(encoded(picture, "JPEG", quality=100, subsampling=0))
    assert np.abs(found.astype(int) - SMOOTH).max() <= 4  # four channels of JPEG rounding; inverted it would be ~255


# --- the file's own instructions


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(orientation, format):
    # What a camera stores and how EXIF wants it shown, written out once by hand.
    shown = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": dict(quality=100, subsampling=0), "WEBP": dict(lossless=True)}.get(format, {})
    found = read_image(encoded(SMOOTH, format, exif=exif, **options))
    assert found.shape == shown(SMOOTH).shape
    assert np.abs(found.astype(int) - shown(SMOOTH)).max() <= (3 if format == "JPEG" else 0)


@pytest.mark.parametrize("value", [0, 9, 77])
def test_nonsense_orientation_is_ignored(value):
    exif = Image.Exif()
    exif[0x0112] = value
    np.testing.assert_array_equal(read_image(encoded(PIXELS, exif=exif)), PIXELS)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0garbage of some length", b"Exif\0\0II*\0\xff\xff\xff\xff", b"MM"]
)
def test_broken_exif_does_not_lose_the_picture(exif):
    np.testing.assert_array_equal(read_image(encoded(PIXELS, exif=exif)), PIXELS)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "lime", "blue")]
    options = dict(lossless=True) if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=10, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert read_image(data).tolist() == [[[255, 0, 0]] * 6] * 5


@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (4000, 1)])
def test_thin_pictures(shape):
    thin = np.full((*shape, 3), 7, np.uint8)
    np.testing.assert_array_equal(read_image(encoded(thin)), thin)
    assert (resize(thin, 12, 10) == 7).all()


# --- what is no picture


def broken() -> dict[str, bytes]:
    png, jpeg = encoded(PIXELS), encoded(PIXELS, "JPEG")
    return {
        "empty": b"",
        "text": b"hello",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "pdf": b"%PDF-1.7\n",
        "tiff": encoded(PIXELS, "TIFF"),
        "bmp": encoded(PIXELS, "BMP"),
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "png header only": png[:8],
        "png without pixels": png[:33],
        "png cut": png[: len(png) // 2],
        "png bad crc": png[:20] + b"\xff" + png[21:],
        "png garbage inside": png[:60] + bytes(50) + png[110:],
        "jpeg cut in the header": jpeg[:100],
        "jpeg cut in the pixels": jpeg[: len(jpeg) - 200],
        "gif cut": encoded(PIXELS, "GIF")[:40],
        "webp cut": encoded(PIXELS, "WEBP")[:60],
        "polyglot: zip before png": b"PK\x03\x04" + png,
    }


@pytest.mark.parametrize("kind", broken())
def test_broken_bytes_are_one_clear_error(kind):
    with pytest.raises(PromptError, match=r"^images\[3\]: ") as error:
        read_image(broken()[kind], name="images[3]")
    assert "0x" not in str(error.value) and "BytesIO" not in str(error.value)  # no memory addresses


def test_every_cut_of_a_file_is_an_error_or_the_picture():
    for format in ("PNG", "JPEG", "GIF", "WEBP"):
        data = encoded(PIXELS[:5, :6], format)
        for end in range(0, len(data), 7):
            with contextlib.suppress(PromptError):
                assert read_image(data[:end]).shape == (5, 6, 3)  # only the trailer is missing


def test_flipped_bytes_never_end_otherwise():
    rng = np.random.default_rng(3)
    for format in ("PNG", "JPEG", "GIF", "WEBP"):
        data = np.frombuffer(encoded(PIXELS[:5, :6], format), np.uint8)
        for _ in range(60):
            hurt = data.copy()
            hurt[rng.integers(0, len(hurt), 3)] = rng.integers(0, 256, 3)
            with contextlib.suppress(PromptError):
                assert read_image(hurt.tobytes(), max_pixels=10_000).shape[2] == 3


def png_of(width: int, height: int) -> bytes:
    """A valid header of any size, and next to no pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(50_000, 50_000), (2**31 - 1, 1), (10_000, 10_000), (65_536, 1_025)])
def test_bombs_are_refused_by_their_header(size, monkeypatch):
    from PIL import PngImagePlugin

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(PromptError, match=rf"pixels are more than the limit of {MAX_PIXELS}"):
        read_image(png_of(*size))


def test_compressed_text_bombs_are_refused():
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    bomb = zlib.compress(bytes(64 * 1024 * 1024))
    data = encoded(PIXELS)
    for kind, body in ((b"zTXt", b"a\0\0" + bomb), (b"iCCP", b"a\0\0" + bomb)):
        with pytest.raises(PromptError):
            read_image(data[:33] + chunk(kind, body) + data[33:])


def test_the_pixel_cap_is_exact_and_holds_for_arrays_and_pil():
    height, width = PIXELS.shape[:2]
    for source in (PIXELS, Image.fromarray(PIXELS), encoded(PIXELS)):
        assert read_image(source, max_pixels=height * width).shape == PIXELS.shape
        with pytest.raises(PromptError, match=f"34 x 21 pixels are more than the limit of {height * width - 1}"):
            read_image(source, max_pixels=height * width - 1)
    with pytest.raises(PromptError, match="max_pixels"):
        read_image(PIXELS, max_pixels=0)


def test_the_byte_cap(monkeypatch, tmp_path):
    data = encoded(PIXELS)
    (tmp_path / "a.png").write_bytes(data)
    monkeypatch.setattr("gemma.image.MAX_BYTES", len(data) - 1)
    for source in (data, io.BytesIO(data), tmp_path / "a.png"):
        with pytest.raises(PromptError, match=f"more than {len(data) - 1} bytes"):
            read_image(source)


def test_an_endless_file_object_is_left_in_time(monkeypatch):
    class Endless:
        def read(self, size):
            return bytes(size)

    monkeypatch.setattr("gemma.image.MAX_BYTES", 1 << 22)
    with pytest.raises(PromptError, match="more than 4194304 bytes"):
        read_image(Endless())


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("nowhere.png", r"'nowhere.png': cannot be opened: No such file"),
        ("a\0b", "cannot be opened"),
        ("https://example.org/a.png", "web and data addresses are not opened"),
        ("file:///etc/hostname", "web and data addresses are not opened"),
        ("data:image/png;base64,AAAA", "web and data addresses are not opened"),
        (None, "expected a path, bytes"),
        (7, "expected a path, bytes"),
        (io.StringIO("text"), 'open the file in binary mode, "rb"'),
        (np.zeros((3, 20, 30), np.uint8), "channels come first"),
        (np.zeros((1, 20, 30, 3), np.uint8), "one by one"),
        (np.zeros((20,), np.uint8), r"expected \[H, W\]"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (np.zeros((4, 5, 7), np.uint8), "1 to 4 channels"),
        (np.full((4, 5, 3), 255.0), r"float64 values must be in 0..1, got 255.0..255.0; .* astype"),
        (np.full((4, 5, 3), np.nan), r"values must be in 0..1, got nan"),
        (np.full((4, 5, 3), -1), r"values must be in 0..255, got -1"),
        (np.full((4, 5, 3), 256), r"values must be in 0..255, got 256"),
        (np.zeros((4, 5, 3), complex), "expected uint8"),
        (np.array([["a", "b"]]), "expected uint8"),
        (Image.new("RGB", (0, 3)), "no pixels"),
        (Image.fromarray(np.full((2, 2), 70_000, np.int32)), "expected 0..65535"),
    ],
)
def test_what_is_no_picture(source, match):
    with pytest.raises(PromptError, match=match) as error:
        read_image(source, name="images[0]")
    assert str(error.value).startswith("images[0]")


def test_folders_pipes_and_devices_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(PromptError, match="a folder, a pipe or a device"):
            read_image(path)


# --- resize, normalize, JPEG


@pytest.mark.parametrize("size", [(13, 50), (64, 8), (21, 34)])
@pytest.mark.parametrize("method", ["bilinear", "bicubic", "lanczos"])
def test_resize_is_pils(size, method):
    wanted = Image.fromarray(PIXELS).resize(size[::-1], getattr(Image.Resampling, method.upper()))
    found = resize(PIXELS, *size, method=method)
    np.testing.assert_array_equal(found, np.asarray(wanted))
    assert found.flags.writeable and not np.shares_memory(found, PIXELS)


def test_resize_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(resize(stripes, 16, 16)[:, 2:-2].astype(int) - 127).max() <= 1  # sampling alone gives 0 or 255


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((PIXELS, 0, 5), "height"),
        ((PIXELS, 5, -1), "width"),
        ((PIXELS, 5.0, 5), "height"),
        ((PIXELS, 10**5, 10**5), "more than"),
        ((PIXELS / 255, 5, 5), r"expected uint8 \[H, W, 3\], got float64"),
        ((PIXELS[..., 0], 5, 5), "expected uint8"),
    ],
)
def test_resize_refuses(arguments, match):
    with pytest.raises(PromptError, match=match):
        resize(*arguments)
    with pytest.raises(PromptError, match="bilinear, bicubic, lanczos"):
        resize(PIXELS, 5, 5, method="nearest")


def test_normalize():
    found = normalize(np.array([0, 127, 128, 255], np.uint8))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.float32([-1, -0.5 / 127.5, 0.5 / 127.5, 1]))
    np.testing.assert_array_equal(normalize(np.float32([-3.0, 300.0])), [-1, 1])
    with pytest.raises(PromptError, match="int64"):
        normalize(np.zeros((2, 2, 3), np.int64))


def test_jpeg_roundtrip_loses_more_at_lower_quality():
    errors = [np.abs(jpeg_roundtrip(PIXELS, q).astype(int) - PIXELS).mean() for q in (10, 60, 100)]
    assert errors[0] > errors[1] > errors[2] > 0
    np.testing.assert_array_equal(jpeg_roundtrip(SMOOTH, 80), read_image(encoded(SMOOTH, "JPEG", quality=80)))
    for quality in (0, 101, 50.0, True):
        with pytest.raises(PromptError, match="quality"):
            jpeg_roundtrip(PIXELS, quality)
    with pytest.raises(PromptError, match="65500"):
        jpeg_roundtrip(np.zeros((1, 65_501, 3), np.uint8), 90)


# --- pan and scan


@pytest.mark.parametrize(
    ("shape", "crops"),
    [
        ((400, 479), []),  # ratio 1.1975
        ((400, 480), []),  # two crops of 240 would be below 256
        ((600, 720), [(600, 360), (600, 360)]),
        ((720, 600), [(360, 600), (360, 600)]),
        ((400, 1300), [(400, 434), (400, 434), (400, 432)]),
        ((300, 5000), [(300, 1250)] * 4),  # no more than four
        ((255, 2000), []),  # too flat
        ((500, 500), []),
    ],
)
def test_pan_and_scan(shape, crops):
    image = np.random.default_rng(4).integers(0, 256, (*shape, 3), dtype=np.uint8)
    found = pan_and_scan(image)
    assert [crop.shape[:2] for crop in found] == crops
    if found:
        np.testing.assert_array_equal(np.concatenate(found, axis=int(shape[1] >= shape[0])), image)


def test_pan_and_scan_refuses():
    for arguments in (dict(min_crop_size=0), dict(max_num_crops=0), dict(min_crop_size=2.5)):
        with pytest.raises(PromptError, match=next(iter(arguments))):
            pan_and_scan(PIXELS, **arguments)
    with pytest.raises(PromptError, match=r"\[H, W, C\]"):
        pan_and_scan(PIXELS[..., 0])
    assert all(crop.size for crop in pan_and_scan(np.zeros((1, 5, 3), np.uint8), min_crop_size=1))


def test_crops_are_named_in_the_prompt():
    long, square = np.zeros((300, 600, 3), np.uint8), np.ones((300, 300, 3), np.uint8)
    text, images = insert_crops("A <start_of_image> B <start_of_image> C", [square, long])
    crops = "<start_of_image> <start_of_image>"
    assert text == (
        "A <start_of_image> B Here is the original image <start_of_image> and here are some crops to help you see "
        f"better {crops} C"
    )
    assert [image.shape[1] for image in images] == [300, 600, 300, 300]
    with pytest.raises(PromptError, match="2 images came, but the prompt holds 1 markers"):
        insert_crops("A <start_of_image>", [square, long])


# --- Hugging Face's processors


@pytest.fixture(scope="module")
def gemma3_processor():
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    return Gemma3ImageProcessorPil(size={"height": 56, "width": 56})


@pytest.mark.parametrize("shape", [(100, 130), (56, 56), (20, 31), (300, 900)])
@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_equals_the_processor_of_siglip_and_gemma(shape, method):
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    image = np.random.default_rng(5).integers(0, 256, (*shape, 3), dtype=np.uint8)
    resample = getattr(Image.Resampling, method.upper())
    processor = SiglipImageProcessorPil(size={"height": 56, "width": 56}, resample=resample)
    wanted = np.asarray(processor(Image.fromarray(image))["pixel_values"][0])
    found = normalize(resize(read_image(image), 56, 56, method=method)).transpose(2, 0, 1)
    # The same uint8 pixels; x/127.5 - 1 and (x/255 - 0.5)/0.5 differ by two float32 roundings.
    np.testing.assert_allclose(found, wanted, atol=3e-7, rtol=0)


@pytest.mark.parametrize("shape", [(300, 900), (900, 300), (300, 400), (520, 520), (256, 2100), (333, 1000)])
def test_equals_pan_and_scan_of_the_processor(shape, gemma3_processor):
    image = np.random.default_rng(6).integers(0, 256, (*shape, 3), dtype=np.uint8)
    settings = dict(
        pan_and_scan_min_crop_size=128, pan_and_scan_max_num_crops=5, pan_and_scan_min_ratio_to_activate=1.3
    )
    out = gemma3_processor(Image.fromarray(image), do_pan_and_scan=True, **settings)
    ours = [image, *pan_and_scan(image, min_crop_size=128, max_num_crops=5, min_ratio_to_activate=1.3)]
    assert int(np.asarray(out["num_crops"]).ravel()[0]) == len(ours) - 1
    for wanted, crop in zip(out["pixel_values"], ours, strict=True):
        found = normalize(resize(crop, 56, 56)).transpose(2, 0, 1)
        np.testing.assert_allclose(found, np.asarray(wanted), atol=3e-7, rtol=0)


def test_the_words_around_crops_are_those_of_the_processor():
    import inspect

    from transformers.models.gemma3 import processing_gemma3

    source = inspect.getsource(processing_gemma3)
    text, _ = insert_crops("M", [np.zeros((300, 600, 3), np.uint8)], marker="M")
    for words in text.split("M")[:2]:
        assert words in source
