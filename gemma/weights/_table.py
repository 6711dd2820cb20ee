# SPDX-License-Identifier: Apache-2.0
"""From rows to the tensors of one configuration: names, axes and shapes of each, and where each lives in every format.

The rows themselves are in `_rows.py` and `_rows_vision.py`; comparing a file with the result is `_bind.py`; moving
values with it is `_pack.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping

from gemma.config import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig, T5Gemma2Config, T5GemmaConfig
from gemma.errors import ConfigError
from gemma.weights import _rows as rows
from gemma.weights import _rows_newer as newer_rows
from gemma.weights import _rows_vision as vision_rows
from gemma.weights._axes import shape_of, sharding_of

AnyConfig = GemmaConfig | PaliGemmaConfig | T5GemmaConfig | SiglipVisionConfig


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a tensor lives in one format.

    Attributes:
      name: the name on disk.
      axes: the axes of the part that is the tensor, that is after `index` and `rows` were applied.
      index: position in leading stacked axes, for example (3, 0) for the keys of layer 3 in a stacked "kv_einsum".
      rows: (start, stop, step) along the first axis that is left, where several tensors are fused; None: all of it.
      shape: of the whole array on disk.
      offset: the file stores the tensor plus this number (1.0 for the norms of a GGUF): subtract it when reading.
      copy: a second place that holds the same values (the head of a tied model); the reader verifies that.
    """

    name: str
    axes: str
    index: tuple[int, ...] = ()
    rows: tuple[int, int, int] | None = None
    shape: tuple[int, ...] = ()
    offset: float = 0.0
    copy: bool = False


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a model.

    Attributes:
      name: canonical, for example "layers.3.attn.q".
      axes: canonical axes, Hugging Face's orientation, for example "(N H) D".
      dims: the length of each letter.
      shape: of the canonical array.
      part: "embed", "text" (the layers), "head", "vision" or "mm" (what joins tower and decoder).
      slots: format to place; a format that has no place for this tensor is absent.
    """

    name: str
    axes: str
    dims: Mapping[str, int]
    shape: tuple[int, ...]
    part: str
    slots: Mapping[str, Slot]

    @property
    def sharding(self) -> tuple[str | None, ...]:
        """A name per canonical axis for spreading it over devices: ("heads", "embed"); None: do not split."""
        return sharding_of(self.axes)

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class _Side:
    """What rows are expanded with: one decoder, encoder or tower of a model."""

    family: str  # of `rows.ROOTS`
    formats: frozenset[str]
    flags: frozenset[str]
    dims: Mapping[str, int]
    prefix: str = ""  # of canonical names
    table_rows: int = 0  # of the embedding in the JAX package's checkpoints


_COLUMN = re.compile(
    r"(?:(?P<flag>!?\w+)\? )?(?P<name>[^ ]+)(?: \[(?P<index>[i0-9,]+)\])?(?: <(?P<rows>[^>]+)>)?"
    r"(?: (?P<axes>[A-Za-z1(][^+]*?))?(?P<one> \+1)?"
)


def roots(family: str, format: str, part: str) -> tuple[str, ...]:
    """The possible beginnings of a part's names; the first one is written."""
    table = rows.ROOTS[family]
    return table.get((format, part)) or table.get((format, "text" if part == "embed" else part)) or ("",)


def _length(term: str, dims: Mapping[str, int]) -> int:
    """The value of "NH+2KH": products of letters, each with an optional factor."""
    total = 0
    for product in term.split("+"):
        factor, letters = re.fullmatch(r"(\d*)([A-Z]*)", product).groups()
        total += int(factor or 1) * math.prod(dims[letter] for letter in letters)
    return total


@dataclasses.dataclass(frozen=True)
class _Place:
    """What a column says for one side, before the layer is known; the shape is still that of the tensor alone."""

    name: str
    axes: str
    index: tuple[str, ...]
    rows: tuple[int, int, int] | None
    shape: tuple[int, ...]
    offset: float

    def at(self, layer: int) -> Slot:
        index = tuple(layer if i == "i" else int(i) for i in self.index)
        name = self.name.replace("{i}", str(layer)).replace("{i+2}", str(layer + 2))
        return Slot(name, self.axes, index, self.rows, self.shape, self.offset)


def _place(column: str, row: rows.Row, side: _Side, format: str) -> _Place | None:
    for choice in column.split(" ; "):
        parts = _COLUMN.fullmatch(choice)
        assert parts is not None, f"row {row.name}, column {format}: cannot read {choice!r}"
        flag = parts["flag"] or ""
        if flag and (flag.lstrip("!") in side.flags) == flag.startswith("!"):
            continue
        index = tuple(parts["index"].split(",")) if parts["index"] else ()
        span = None
        if parts["rows"]:
            start, stop, *step = parts["rows"].split(":")
            span = (_length(start, side.dims), _length(stop, side.dims), int(step[0]) if step else 1)
        name = roots(side.family, format, row.part)[0] + parts["name"]
        axes, offset = parts["axes"] or row.axes, 1.0 if parts["one"] else 0.0
        shape = shape_of(axes, {**side.dims, "V": _rows_written(side, format)} if row.axes[0] == "V" else side.dims)
        return _Place(name, axes, index, span, shape, offset)
    return None


def _rows_written(side: _Side, format: str) -> int:
    """Rows of the vocabulary in one format: Hugging Face and GGUF pad some tables, the JAX packages others."""
    rows_hf, rows_jax = side.dims["V"], side.table_rows
    return {"flax": rows_jax, "npz": rows_jax, "ckpt": min(rows_hf, rows_jax), "sbs": min(rows_hf, rows_jax)}.get(
        format, rows_hf
    )


def _expand(side: _Side, table: tuple[rows.Row, ...]) -> Iterator[Tensor]:
    """The tensors of rows that stand once."""
    yield from _at(_ready(side, table), 0)


def _expand_layers(side: _Side, table: tuple[rows.Row, ...], layers: int) -> Iterator[Tensor]:
    ready = _ready(side, table)
    for layer in range(layers):
        yield from _at(ready, layer)


def _ready(side: _Side, table: tuple[rows.Row, ...]) -> list[tuple]:
    """What of the rows does not depend on the number of the layer."""
    ready = []
    for row in table:
        if not row.when or row.when in side.flags:
            places = {f: _place(c, row, side, f) for f, c in row.columns.items() if f in side.formats}
            dims = {letter: size for letter, size in side.dims.items() if letter in row.axes}
            known = {format: place for format, place in places.items() if place is not None}
            ready.append((side.prefix + row.name, row, dims, shape_of(row.axes, dims), known))
    return ready


def _at(ready: list[tuple], layer: int) -> Iterator[Tensor]:
    for name, row, dims, shape, places in ready:
        slots = {format: place.at(layer) for format, place in places.items()}
        yield Tensor(name.replace("{i}", str(layer)), row.axes, dims, shape, row.part, slots)


def _text_side(config: GemmaConfig, family: str, formats: str, prefix: str = "", *flags: str, **dims: int) -> _Side:
    """One decoder or encoder; its flags and sizes are those of the first layer, see `_layer_side` for the others."""
    on = set(flags)
    on |= {"post_norms"} if config.use_post_norms else set()
    on |= set() if config.tie_word_embeddings else {"untied"}
    on |= {"transposed"} if config.transpose_gating_einsum else set()
    on |= set() if config.norm_plus_one else {"plain_norms"}
    sizes = dict(V=config.vocab_size, D=config.hidden_size, L=config.num_hidden_layers, d=config.hidden_size)
    sizes |= dims
    side = _Side(family, frozenset(formats.split()), frozenset(on), sizes, prefix, config.table_rows)
    return _layer_side(side, config.layers[0])


def _layer_side(side: _Side, spec: LayerSpec) -> _Side:
    """The same side with the flags and sizes of one layer."""
    said = dict(own_k=not spec.shares_kv, own_v=not (spec.shares_kv or spec.keys_as_values), qk_norm=spec.qk_norm)
    said |= dict(own_k_norm=spec.qk_norm and not spec.shares_kv, mha=spec.fused_qkv, k_is_v=spec.keys_as_values)
    said |= dict(laurel=spec.laurel_rank is not None, layer_scale=spec.layer_scale, experts=spec.experts is not None)
    said |= dict(altup=spec.altup is not None, per_layer=spec.per_layer_input is not None)
    said |= dict(altup_scale=spec.altup is not None and spec.altup.correct_scale)
    sizes = dict(N=spec.num_heads, K=spec.num_kv_heads, H=spec.head_dim, F=spec.mlp_size)
    if spec.altup is not None:
        sizes |= dict.fromkeys("abc", spec.altup.num_inputs)
    if spec.experts is not None:
        sizes |= dict(e=spec.experts.num_experts, f=spec.experts.intermediate_size, g=2)
    sizes |= {
        letter: size for letter, size in (("p", spec.per_layer_input), ("r", spec.laurel_rank)) if size is not None
    }
    flags = (side.flags - set(said)) | {name for name, on in said.items() if on}
    return dataclasses.replace(side, flags=flags, dims={**side.dims, **sizes})


def _vision_side(config: SiglipVisionConfig, family: str, formats: str, width: int, *flags: str) -> _Side:
    on = set(flags) | ({"head"} if config.vision_use_head else set())
    e, heads, patch = config.hidden_size, config.num_attention_heads, config.patch_size
    dims = dict(E=e, A=heads, U=e // heads, M=config.intermediate_size, P=config.num_patches, D=width)
    return _Side(
        family, frozenset(formats.split()), frozenset(on), dims | dict(C=config.num_channels, Y=patch, X=patch)
    )


def _decoder(side: _Side, config: GemmaConfig, cross: bool = False) -> Iterator[Tensor]:
    block = rows.TEXT_LAYER + (rows.CROSS_LAYER if cross else ()) + rows.MLP_LAYER + newer_rows.LAYER
    yield from _expand(side, rows.TEXT_TOP + newer_rows.TOP)
    kinds: dict[tuple, list[tuple]] = {}
    for spec in config.layers:
        its = _layer_side(side, spec)
        kind = (its.flags, tuple(its.dims.items()))
        if kind not in kinds:
            kinds[kind] = _ready(its, block)
        yield from _at(kinds[kind], spec.index)
    for stream in range(config.altup.num_inputs - 1 if config.altup is not None else 0):
        yield from _at(_ready(side, newer_rows.STREAMS), stream)
    yield from _expand(side, rows.TEXT_END)
    widths = (config.hidden_size, *config.embedding_dense)
    for number, (before, after) in enumerate(itertools.pairwise(widths)):
        dense = dataclasses.replace(side, dims={**side.dims, "j": before, "o": after})
        yield from _at(_ready(dense, newer_rows.DENSE), number)


def _tower(side: _Side, layers: int) -> Iterator[Tensor]:
    yield from _expand(side, vision_rows.VISION_TOP)
    yield from _expand_layers(side, vision_rows.VISION_LAYER, layers)
    yield from _expand(side, vision_rows.VISION_END + vision_rows.VISION_HEAD)


def _gemma(config: GemmaConfig) -> Iterator[Tensor]:
    if config.vision is None:
        formats = "hf flax gguf ckpt sbs" if config.is_classic and not config.embedding_dense else "hf flax"
        vocabulary = dict(v=config.vocab_size_per_layer_input or config.vocab_size)
        yield from _decoder(_text_side(config, family(config, ""), formats, **vocabulary), config)
        return
    side = _text_side(config, "multimodal", "hf flax gguf ckpt sbs")
    tower = _vision_side(config.vision, "multimodal", "hf flax ckpt", config.hidden_size)
    yield from _decoder(side, config)
    yield from _tower(tower, config.vision.num_hidden_layers)
    yield from _expand(tower, rows.GEMMA3_MM)


def _paligemma(config: PaliGemmaConfig) -> Iterator[Tensor]:
    text, vision = config.text_config, config.vision_config
    if config.projection_dim != text.hidden_size:
        raise ConfigError(
            f"projection_dim: the projector writes into the text model: expected {text.hidden_size} "
            f"(text_config.hidden_size), got {config.projection_dim}"
        )
    tower = _vision_side(vision, "multimodal", "hf npz", text.hidden_size, "stacked")
    yield from _decoder(_text_side(text, "multimodal", "hf npz"), text)
    yield from _tower(tower, vision.num_hidden_layers)
    yield from _expand(tower, rows.PALIGEMMA_MM)


def _t5gemma(config: T5GemmaConfig) -> Iterator[Tensor]:
    encoder, decoder = config.encoder, config.decoder
    headless = dataclasses.replace(encoder, tie_word_embeddings=True)  # the only head is the decoder's
    yield from _decoder(_text_side(headless, "encoder", "hf flax", "encoder.", "t5"), encoder)
    side = _text_side(decoder, "decoder", "hf flax", "decoder.", "t5", Z=encoder.hidden_size)
    yield from _decoder(side, decoder, cross=True)


def _t5gemma2(config: T5Gemma2Config) -> Iterator[Tensor]:
    encoder, decoder = config.encoder, config.decoder
    side = _text_side(encoder, "encoder2", "hf flax", "encoder.", "t5", "eoi")
    yield from _decoder(side, encoder)
    side = _text_side(decoder, "decoder2", "hf flax", "decoder.", "t5")
    yield from (tensor for tensor in _decoder(side, decoder) if tensor.part != "embed")  # the table is the encoder's
    if encoder.vision is not None:
        tower = _vision_side(encoder.vision, "encoder2", "hf flax", encoder.hidden_size)
        yield from _tower(tower, encoder.vision.num_hidden_layers)
        yield from _expand(tower, rows.GEMMA3_MM)


def family(config: AnyConfig, name: str) -> str:
    """The key of `ROOTS` that says where the names of a canonical tensor may start."""
    if isinstance(config, T5Gemma2Config):
        return "decoder2" if name.startswith("decoder.") else "encoder2"
    if isinstance(config, T5GemmaConfig):
        return name.split(".", 1)[0]
    if isinstance(config, GemmaConfig) and config.vision is None:
        newer = "newer" if not config.is_classic else "text"
        return "base" if config.use_bidirectional_attention else newer
    return "siglip" if isinstance(config, SiglipVisionConfig) else "multimodal"


@functools.lru_cache(maxsize=64)
def tensors(config: AnyConfig) -> tuple[Tensor, ...]:
    """Every tensor of a model, in reading order: embedding, layers, final norm, vision tower, projector.

    Args:
      config: of a text model, Gemma 3 with images, PaliGemma, T5Gemma, or a stand-alone SigLIP tower.

    Raises:
      ConfigError: the configuration has no rows in the table.
    """
    if isinstance(config, SiglipVisionConfig):
        side = _vision_side(config, "siglip", "hf flax npz", config.hidden_size)
        found = _tower(side, config.num_hidden_layers)
    elif isinstance(config, PaliGemmaConfig):
        found = _paligemma(config)
    elif isinstance(config, T5Gemma2Config):
        found = _t5gemma2(config)
    elif isinstance(config, T5GemmaConfig):
        found = _t5gemma(config)
    elif isinstance(config, GemmaConfig):
        found = _gemma(config)
    else:
        raise ConfigError(
            f"expected a GemmaConfig, PaliGemmaConfig, T5GemmaConfig or SiglipVisionConfig, got {config!r}"
        )
    return _with_shapes(tuple(found))


def _with_shapes(table: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Fills in the shape of the whole array on disk: stacked axes and fused rows need all tensors of that name."""
    users: dict[tuple[str, str], list[Slot]] = {}
    for tensor in table:
        for format, slot in tensor.slots.items():
            users.setdefault((format, slot.name), []).append(slot)
    shapes = {}
    for key, slots in users.items():
        own = slots[0].shape
        stack = tuple(max(slot.index[axis] for slot in slots) + 1 for axis in range(len(slots[0].index)))
        if slots[0].rows is not None:
            own = (max(slot.rows[1] for slot in slots), *own[1:])
        shapes[key] = stack + own

    def whole(tensor: Tensor) -> Tensor:
        found = {f: slot for f, slot in tensor.slots.items() if slot.shape != shapes[f, slot.name]}
        if not found:
            return tensor
        found = {f: dataclasses.replace(slot, shape=shapes[f, slot.name]) for f, slot in found.items()}
        return dataclasses.replace(tensor, slots={**tensor.slots, **found})

    return tuple(map(whole, table))


def expected(config: AnyConfig, format: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the arrays on disk, fused and stacked ones included, as they are written.

    The embedding has `config.vocab_size` rows, except in "flax", whose table may be padded (`config.table_rows`).

    Args:
      config: of any member in the table.
      format: "hf", "flax", "gguf", "ckpt", "npz" or "sbs".

    Raises:
      ConfigError: the model has no place in that format at all.
    """
    check_format(format)
    found = {t.slots[format].name: t.slots[format].shape for t in tensors(config) if format in t.slots}
    if not found:
        raise ConfigError(f"{type(config).__name__} has no names in the format {format!r}")
    return found


def check_format(format: str) -> None:
    if format not in rows.FORMATS:
        raise ConfigError(f"format: expected one of {', '.join(rows.FORMATS)}, got {format!r}")
