# SPDX-License-Identifier: Apache-2.0
"""From anything that holds a picture to plain pixels: `read_image`, then `resize`, `normalize`, `pan_and_scan`.

Everything is numpy and PIL, no framework; pictures are uint8 [H, W, 3] (H rows, W columns, RGB), the origin at the top
left. Files are hostile: bytes and pixels are bounded before anything is decoded, only four formats are tried, and what
cannot be read ends in one PromptError that names the image and the cause. Nothing is fetched from the network. Patches,
soft tokens and the encoder are in `gemma/gm/vision` (JAX) and `siglip/` (PyTorch).
"""

from __future__ import annotations

import io
import os
import re
import stat
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image

from gemma._image_crops import insert_crops, pan_and_scan
from gemma.errors import PromptError

__all__ = [
    "FORMATS",
    "MAX_BYTES",
    "MAX_PIXELS",
    "ImageSource",
    "insert_crops",
    "jpeg_roundtrip",
    "normalize",
    "pan_and_scan",
    "read_image",
    "resize",
]

if TYPE_CHECKING:
    ImageSource = str | os.PathLike | bytes | BinaryIO | Image.Image | np.ndarray
else:
    ImageSource = object  # a union of typing and runtime classes is of no use at run time

MAX_PIXELS = 64 * 1024 * 1024  # H * W; 200 MB once decoded, above what phones take
MAX_BYTES = 128 * 1024 * 1024  # of the encoded file
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # everything else would only widen the attack surface

_ORIENTATION = 0x0112  # the EXIF tag; values 2..8 say how to turn the stored picture
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_METHODS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_READ = 1 << 20  # bytes per read of a file object


def read_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS, name: str = "image") -> np.ndarray:
    """Reads a picture into plain pixels.

    Files (and bytes) are PNG, JPEG, WebP or GIF; of an animation the first frame is taken, the EXIF orientation is
    applied, colour profiles are not. Grey, palette and 1-bit pictures become RGB, 16-bit grey is scaled to 8 bits,
    CMYK is converted, and transparency is laid over white. Arrays are [H, W] or [H, W, C] with 1, 2 (grey and alpha),
    3 or 4 channels: bool, uint8, uint16 (scaled by 1/257), other integers in 0..255, or floats in 0..1.

    Args:
      source: a path, encoded bytes, a binary file object (read from where it stands), a PIL image (its current frame)
        or an array. Text that looks like a web address is refused: fetch it yourself.
      max_pixels: the largest H * W, checked against the header before anything is decoded. PIL's own limit
        (`PIL.Image.MAX_IMAGE_PIXELS`) holds too: beyond twice that, raising this one has no effect.
      name: what to call the picture in errors, for example "images[2]".

    Returns:
      uint8 [H, W, 3], a new array that shares memory with nothing.

    Raises:
      PromptError: (a ValueError) it cannot be read, is empty, truncated, of another format or too large.
    """
    if isinstance(max_pixels, bool) or not isinstance(max_pixels, int) or max_pixels < 1:
        raise PromptError(f"max_pixels: expected a whole number of pixels, 1 or more, got {max_pixels!r}")
    if isinstance(source, Image.Image):
        return _decode(source, max_pixels, name)
    if isinstance(source, (str, os.PathLike)):
        data, name = _read_path(source, name)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source) if len(source) <= MAX_BYTES else _too_many_bytes(name)
    elif isinstance(source, np.ndarray) or hasattr(source, "__array__"):
        return _from_array(_as_array(source, name), max_pixels, name)
    elif callable(getattr(source, "read", None)):
        data = _read_file(source, name)
    else:
        raise PromptError(
            f"{name}: expected a path, bytes, a binary file object, a PIL image or an array, "
            f"got {type(source).__name__}"
        )
    if not data:
        raise PromptError(f"{name}: there is nothing in it (0 bytes); expected {_formats()}")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PromptError(f"{name}: {_bomb(error, max_pixels)}") from error
    except Image.UnidentifiedImageError as error:
        raise PromptError(f"{name}: not a readable picture; expected {_formats()}. It begins {data[:12]!r}") from error
    except Exception as error:  # decoders meet broken headers with a dozen builtin classes
        raise PromptError(f"{name}: its header cannot be read: {_cause(error)}") from error
    return _decode(image, max_pixels, name)


def resize(image: np.ndarray, height: int, width: int, *, method: str = "bilinear") -> np.ndarray:
    """Resamples to exactly height x width, antialiased; the aspect ratio is not kept.

    Equal to what PIL does to the same pixels, and so to Hugging Face's image processors: SigLIP and PaliGemma use
    "bicubic", Gemma 3 "bilinear".

    Args:
      image: uint8 [H, W, 3].
      height, width: the new size in pixels.
      method: "bilinear", "bicubic" or "lanczos".

    Returns:
      uint8 [height, width, 3].
    """
    image = _pixels(image, "image")
    if method not in _METHODS:
        raise PromptError(f"method: expected one of {', '.join(_METHODS)}, got {method!r:.80}")
    for label, side in (("height", height), ("width", width)):
        if isinstance(side, bool) or not isinstance(side, (int, np.integer)) or side < 1:
            raise PromptError(f"{label}: expected a whole number of pixels, 1 or more, got {side!r:.80}")
    if height * width > MAX_PIXELS:
        raise PromptError(f"{height} x {width} pixels are more than the {MAX_PIXELS} that a picture may have")
    if image.shape[:2] == (height, width):
        return image.copy()
    return np.array(Image.fromarray(image).resize((int(width), int(height)), _METHODS[method]))


def normalize(image: np.ndarray) -> np.ndarray:
    """Maps 0..255 to -1..1, what every image encoder of the family was trained on: `(x - 127.5) / 127.5`.

    Args:
      image: [..., H, W, C] uint8, or floats in 0..255 (a picture resized without rounding); overshoot is clipped.

    Returns:
      float32 of the same shape.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 and image.dtype.kind != "f":
        raise PromptError(f"image: expected uint8 or floats in 0..255, got {image.dtype}")
    return np.clip((image.astype(np.float32) - np.float32(127.5)) / np.float32(127.5), -1.0, 1.0)


def jpeg_roundtrip(image: np.ndarray, quality: int = 95) -> np.ndarray:
    """Encodes to JPEG and decodes again: the first published pipeline fed its encoder pictures that had been JPEGs.

    Chroma is subsampled 4:2:0. Codecs differ in the last bits; this one is PIL's.

    Args:
      image: uint8 [H, W, 3], no side above 65500.
      quality: 1..100.

    Returns:
      uint8 [H, W, 3].
    """
    image = _pixels(image, "image")
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
        raise PromptError(f"quality: expected a whole number in 1..100, got {quality!r:.80}")
    if max(image.shape[:2]) > 65500:
        raise PromptError(f"image: JPEG holds sides of up to 65500 pixels, this one is {_size(image.shape)}")
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return np.array(Image.open(buffer, formats=("JPEG",)))


# ---- reading bytes, bounded ------------------------------------------------------------------------------------------


def _read_path(source: str | os.PathLike, name: str) -> tuple[bytes, str]:
    path = os.fspath(source)
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if re.match(r"(?i)(https?|ftp|file|data):", path):
        raise PromptError(f"{name}: web and data addresses are not opened ({path[:60]!r}); pass the bytes of the file")
    name = f"{name} {path!r}"
    try:
        # Only a regular file: opening a pipe would wait for ever, a device would never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise PromptError(f"{name}: expected a file, this is a folder, a pipe or a device")
        with open(path, "rb") as file:
            return _read_file(file, name), name
    except (OSError, ValueError) as error:
        if isinstance(error, PromptError):
            raise
        raise PromptError(f"{name}: cannot be opened: {getattr(error, 'strerror', None) or error}") from error


def _read_file(file: BinaryIO, name: str) -> bytes:
    chunks, total = [], 0
    while True:
        try:
            chunk = file.read(_READ)
        except (OSError, ValueError) as error:
            raise PromptError(f"{name}: cannot be read: {_cause(error)}") from error
        if not chunk:
            return b"".join(chunks)
        if not isinstance(chunk, (bytes, bytearray)):
            raise PromptError(f'{name}: its read() gives {type(chunk).__name__}; open the file in binary mode, "rb"')
        chunks.append(bytes(chunk))
        total += len(chunk)
        if total > MAX_BYTES:
            _too_many_bytes(name)


def _too_many_bytes(name: str):
    raise PromptError(f"{name}: more than {MAX_BYTES} bytes; make the file smaller")


# ---- from a PIL image or an array to RGB -----------------------------------------------------------------------------


def _decode(image: Image.Image, max_pixels: int, name: str) -> np.ndarray:
    _check_pixels(image.height, image.width, max_pixels, name)
    try:
        image.load()
        # Decoding may have enlarged it (frames of a GIF may stick out of its screen).
        _check_pixels(image.height, image.width, max_pixels, name)
        turn = _TURNS.get(_orientation(image))
        if image.mode == "F" or image.mode.startswith("I"):
            pixels = _wide_grey(image, max_pixels, name)
            image = Image.fromarray(pixels)
        else:
            image = _rgb(image)
        return np.array(image if turn is None else image.transpose(turn))
    except PromptError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PromptError(f"{name}: {_bomb(error, max_pixels)}") from error
    except Exception as error:  # see read_image: a broken file, whatever the decoder calls it
        raise PromptError(f"{name}: broken or truncated: {_cause(error)}") from error


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # a camera's broken notes about the picture; the picture itself has been read
        return None


def _rgb(image: Image.Image) -> Image.Image:
    """RGB on white of any 8-bit mode."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode in ("RGBa", "La"):
            image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _wide_grey(image: Image.Image, max_pixels: int, name: str) -> np.ndarray:
    """Modes I and I;16 hold 16 bits (PIL's own conversion would clip at 255), F holds 0..1."""
    pixels = np.asarray(image)
    if pixels.dtype.kind == "i":
        if pixels.min() < 0 or pixels.max() > 65535:
            raise PromptError(f"{name}: mode {image.mode} holds {pixels.min()}..{pixels.max()}, expected 0..65535")
        pixels = pixels.astype(np.uint16)
    clear = image.info.get("transparency")
    rgb = _from_array(pixels, max_pixels, name)
    if isinstance(clear, int):
        rgb[pixels == clear] = 255  # one grey stands for "nothing here"
    return rgb


def _as_array(source, name: str) -> np.ndarray:
    try:
        return np.asarray(source)
    except Exception as error:  # a tensor on a device, a lazy frame: their classes are not ours to list
        raise PromptError(f"{name}: cannot be made an array: {_cause(error)}") from error


def _from_array(array: np.ndarray, max_pixels: int, name: str) -> np.ndarray:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4)):
        hint = ""
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            hint = "; the channels come first here: array.transpose(1, 2, 0)"
        elif array.ndim == 4:
            hint = "; pass the pictures of a batch one by one"
        raise PromptError(f"{name}: expected [H, W] or [H, W, C] with 1 to 4 channels, got {array.shape}{hint}")
    _check_pixels(*array.shape[:2], max_pixels, name)
    array = _to_uint8(array if array.ndim == 3 else array[:, :, None], name)
    if array.shape[2] in (2, 4):
        alpha = array[:, :, -1:].astype(np.uint32)
        over = array[:, :, :-1] * alpha + 255 * (255 - alpha)
        array = ((over + 127) // 255).astype(np.uint8)
    return np.array(np.broadcast_to(array, (*array.shape[:2], 3)), order="C")


def _to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    kind = "f" if array.dtype.name in ("bfloat16", "float8_e4m3fn") else array.dtype.kind
    if array.dtype == np.uint8:
        return array
    if kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if kind not in "fiu":
        raise PromptError(f"{name}: expected uint8, or floats in 0..1, got an array of {array.dtype}")
    low, high = array.min(), array.max()
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    limit = 1 if kind == "f" else 255
    if not (low >= 0 and high <= limit):  # also false for NaN
        hint = "; if they are 0..255, use astype('uint8')" if kind == "f" and low >= 0 and high <= 255 else ""
        raise PromptError(f"{name}: {array.dtype} values must be in 0..{limit}, got {low}..{high}{hint}")
    if kind == "f":
        array = np.rint(array.astype(np.float32) * np.float32(255))
    return array.astype(np.uint8)


# ---- checks and words ------------------------------------------------------------------------------------------------


def _check_pixels(height: int, width: int, max_pixels: int, name: str) -> None:
    if height < 1 or width < 1:
        raise PromptError(f"{name}: it has no pixels ({_size((height, width))})")
    if height * width > max_pixels:
        raise PromptError(
            f"{name}: {_size((height, width))} pixels are more than the limit of {max_pixels}; make it smaller first"
        )


def _pixels(image: np.ndarray, name: str) -> np.ndarray:
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise PromptError(
            f"{name}: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}; read_image makes that of anything"
        )
    return image


def _size(shape) -> str:
    return f"{shape[1]} x {shape[0]}"


def _formats() -> str:
    return "a PNG, JPEG, WebP or GIF file"


def _bomb(error: BaseException, max_pixels: int) -> str:
    found = re.search(r"(\d+) pixels", str(error))
    return f"{found.group(1) if found else 'too many'} pixels are more than the limit of {max_pixels}; make it smaller"


def _cause(error: BaseException) -> str:
    """What a decoder says, without the memory addresses that some put into it."""
    return re.sub(r"<[^>]*>|0x[0-9a-fA-F]+", "...", str(error))[:200] or type(error).__name__
