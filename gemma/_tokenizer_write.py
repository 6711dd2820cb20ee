# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tokenizer in the form another checkpoint wants: arrays of a GGUF, or the files of a Hugging Face folder.

All kinds meet in one `Vocabulary` (pieces, scores, types). A `tokenizer.json` has merges instead of scores, and the
other way round: a piece's score is the rank of the merges that make it, its merges are all its splits into two pieces.
Reading is `_tokenizer_sources.py` and `_tokenizer_json.py`; chat templates are copied as text, never run.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma._sentencepiece_proto import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    check_vocabulary,
    read_model,
    write_model,
)
from gemma._special_tokens import SpecialTokens, find_special, hide_special, special_ids
from gemma._tokenizer_json import read_parts
from gemma._tokenizer_sources import MAX_MODEL, gguf_vocabulary
from gemma.errors import CheckpointError, TokenizerError
from gemma.formats._source import Source

if TYPE_CHECKING:
    from gemma.checkpoint import TokenizerSource

MAX_TEMPLATE = 1 << 18  # bytes of a chat template; Gemma's have 2 to 20 thousand
_NO_SCORE = -1000.0  # of special and user-defined pieces, as published GGUF files have it
# Files of a Hugging Face folder that describe its tokenizer, beside the vocabulary itself.
_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_FILES += ("chat_template.jinja", "chat_template.json")


def read_vocabulary(source: TokenizerSource) -> Vocabulary:
    """Pieces as SentencePiece spells them, scores, and types: special pieces are control, one is unknown."""
    if source.model is not None:
        vocabulary = read_model(source.model, source.path or "the vocabulary")
        check_vocabulary(vocabulary, source.path or "the vocabulary")
    elif source.kind == "gguf":
        vocabulary = gguf_vocabulary(source)
    elif source.path is None:
        raise TokenizerError(f"a TokenizerSource of kind {source.kind!r} needs a path, got None")
    else:
        with contextlib.closing(Source(source.path, mmap=False)) as file:
            if source.kind == "tokenizer.json":
                vocabulary, ids, merges, _ = read_parts(file)
                _add_scores(vocabulary, ids, merges, source.path)
            else:
                if file.size > MAX_MODEL:
                    raise TokenizerError(
                        f"{source.path}: a SentencePiece model has at most {MAX_MODEL} bytes, got {file.size}"
                    )
                vocabulary = read_model(file.read(0, file.size).tobytes(), source.path)
        check_vocabulary(vocabulary, source.path)
    hide_special(vocabulary)
    return vocabulary


def _add_scores(vocabulary: Vocabulary, ids: dict[str, int], merges: list[tuple[str, str]], path) -> None:
    """Gives a vocabulary the scores under which SentencePiece merges in the order of the merges, in place.

    Scores of single characters do not matter. Runs of spaces that are merged before everything else become what they
    are in SentencePiece: user-defined pieces, found before any merge.
    """
    types = vocabulary.types.copy()
    made = [ids[left + right] for left, right in merges]
    first = next((n for n, i in enumerate(made) if types[i] == NORMAL and not _is_run(vocabulary.pieces[i])), len(made))
    runs = {i for i in made if _is_run(vocabulary.pieces[i])} - set(made[first:])
    types[sorted(runs)] = USER_DEFINED
    order: dict[int, int] = {}
    last = None
    for piece in made:
        if piece == last or types[piece] != NORMAL:
            continue
        if piece in order:
            raise TokenizerError(
                f"{path}: the merges that make {vocabulary.pieces[piece].decode()!r:.80} do not stand together; no "
                f"SentencePiece vocabulary merges in that order"
            )
        order[piece], last = len(order), piece
    ranked = list(order)
    if ranked == sorted(ranked):  # by id, as trained: then the scores are those of the original
        ranked = np.flatnonzero(types == NORMAL).tolist()
    else:
        ranked += [i for i in np.flatnonzero(types == NORMAL).tolist() if i not in order]
    scores = np.full(len(types), _NO_SCORE, np.float32)
    scores[ranked] = -np.arange(len(ranked), dtype=np.float32)
    scores[types == BYTE] = 0
    vocabulary.scores, vocabulary.types = scores, types


def _is_run(piece: bytes) -> bool:
    """True for two or more spaces, as SentencePiece spells them."""
    return piece != SPACE.encode() and not piece.replace(SPACE.encode(), b"")


def gguf_fields(source: TokenizerSource, rows: int) -> dict[str, Any]:
    """The `tokenizer.*` keys of a GGUF.

    Args:
      source: what the checkpoint says about its tokenizer. A GGUF's own arrays go over as they are.
      rows: of the embedding table; a vocabulary with more pieces is refused.
    """
    vocabulary = _fitting(source, rows)
    tokens = find_special(special_ids(vocabulary), source.path)
    if source.kind == "gguf" and source.model is None:
        pieces, scores, types = source.pieces, source.scores, source.types
    else:
        pieces, scores, types = _gguf_pieces(vocabulary), vocabulary.scores, vocabulary.types
    unknown = source.special.get("unk", tokens.unk)
    ids = dict(bos=tokens.bos, eos=tokens.eos, unknown=unknown, padding=tokens.pad)
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": list(pieces),
        "tokenizer.ggml.scores": np.asarray(scores, np.float32),
        "tokenizer.ggml.token_type": np.asarray(types, np.int32),
    }
    fields |= {f"tokenizer.ggml.{name}_token_id": int(i) for name, i in ids.items() if i is not None}
    if "eot" in source.special:
        fields["tokenizer.ggml.eot_token_id"] = int(source.special["eot"])
    elif tokens.end_of_turn is not None and source.kind != "gguf":
        fields["tokenizer.ggml.eot_token_id"] = tokens.end_of_turn
    fields["tokenizer.ggml.add_bos_token"] = source.flags.get("add_bos_token", True)
    fields["tokenizer.ggml.add_eos_token"] = source.flags.get("add_eos_token", False)
    fields["tokenizer.ggml.add_space_prefix"] = False
    template = chat_template(source)
    return fields if template is None else fields | {"tokenizer.chat_template": template}


def _fitting(source: TokenizerSource, rows: int) -> Vocabulary:
    vocabulary = read_vocabulary(source)
    if len(vocabulary.pieces) > rows:
        raise TokenizerError(
            f"{source.path or 'the vocabulary'}: expected at most {rows} pieces, the rows of the embedding table, got "
            f"{len(vocabulary.pieces)}: it is the tokenizer of another model"
        )
    return vocabulary


def _gguf_pieces(vocabulary: Vocabulary) -> list[str]:
    """Pieces as a GGUF has them: user-defined ones with real spaces."""
    pieces = [piece.decode() for piece in vocabulary.pieces]
    for i in np.flatnonzero(vocabulary.types == USER_DEFINED).tolist():
        pieces[i] = pieces[i].replace(SPACE, " ")
    return pieces


# --- chat templates


def chat_template(source: TokenizerSource) -> str | None:
    """The Jinja text that comes with a tokenizer, or None. It is only carried on; gemmakit's chats are `gemma.chat`."""
    if source.template is not None:
        return source.template
    if source.path is None or source.model is not None:
        return None
    if source.kind == "gguf":
        from gemma.checkpoint import open_checkpoint

        if not Path(source.path).is_file():
            return None
        with open_checkpoint(source.path) as checkpoint:
            template = checkpoint.metadata.get("tokenizer.chat_template")
    else:
        template = _folder_template(Path(source.path).parent)
    return template if isinstance(template, str) and template and len(template) <= MAX_TEMPLATE else None


def _folder_template(folder: Path) -> Any:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return _text(file)
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                values = json.loads(_text(folder / name))
            except (ValueError, RecursionError) as error:
                raise TokenizerError(f"{folder / name}: expected JSON: {error}") from None
            if isinstance(values, dict) and "chat_template" in values:
                return values["chat_template"]
    return None


def _text(path: Path) -> str:
    with contextlib.closing(Source(path, mmap=False)) as file:
        if file.size > 16 * MAX_TEMPLATE:
            raise TokenizerError(f"{path}: expected at most {16 * MAX_TEMPLATE} bytes, got {file.size}")
        try:
            return file.read(0, file.size).tobytes().decode()
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path}: expected UTF-8: {error}") from None


# --- the files of a Hugging Face folder


def write_hf_files(source: TokenizerSource, folder: str | os.PathLike[str], rows: int) -> list[Path]:
    """Writes `tokenizer.model`, `tokenizer.json`, `tokenizer_config.json`, ... into a folder; returns their paths.

    A Hugging Face folder's own files are copied byte for byte; the vocabulary of a GGUF is written in both forms.

    Args:
      source: what the checkpoint says about its tokenizer.
      folder: where the weights are written.
      rows: of the embedding table; a vocabulary with more pieces is refused.
    """
    folder = Path(folder)
    vocabulary = _fitting(source, rows)
    files: dict[str, bytes] = {}
    if source.model is not None:
        files["tokenizer.model"] = source.model
    elif source.kind != "gguf":
        beside = Path(source.path).parent
        for name in {*_FILES, Path(source.path).name}:
            if (beside / name).is_file():
                files[name] = _bytes(beside / name)
    tokens = find_special(special_ids(vocabulary), source.path)
    unknown = int(np.flatnonzero(vocabulary.types == UNKNOWN)[0])
    if source.kind == "gguf" and source.model is None:
        ids = {"bos": tokens.bos, "eos": tokens.eos, "pad": -1 if tokens.pad is None else tokens.pad, "unk": unknown}
        files["tokenizer.model"] = write_model(vocabulary, ids)
    if "tokenizer.json" not in files:
        files["tokenizer.json"] = _dump(tokenizer_json(vocabulary))
    files.setdefault("tokenizer_config.json", _dump(_tokenizer_config(vocabulary, tokens, unknown, source)))
    template = chat_template(source) if source.kind == "gguf" else source.template
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    written = []
    for name, data in sorted(files.items()):
        (folder / name).write_bytes(data)
        written.append(folder / name)
    return written


def _bytes(path: Path) -> bytes:
    with contextlib.closing(Source(path, mmap=False)) as file:
        if file.size > 1 << 27:
            raise CheckpointError(f"{path}: expected a tokenizer file of at most {1 << 27} bytes, got {file.size}")
        return file.read(0, file.size).tobytes()


def _dump(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()


def _tokenizer_config(vocabulary: Vocabulary, tokens: SpecialTokens, unknown: int, source) -> dict[str, Any]:
    values: dict[str, Any] = dict(tokenizer_class="GemmaTokenizer", add_bos_token=True, add_eos_token=False)
    values |= {name: source.flags[name] for name in ("add_bos_token", "add_eos_token") if name in source.flags}
    values |= dict(clean_up_tokenization_spaces=False, spaces_between_special_tokens=False)
    for name in ("bos", "eos", "pad"):
        token = getattr(tokens, name)
        if token is not None:
            values[f"{name}_token"] = vocabulary.pieces[token].decode()
    return values | dict(unk_token=vocabulary.pieces[unknown].decode())


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """A vocabulary as the `tokenizer.json` that the `tokenizers` library reads: the pipeline that every Gemma has."""
    pieces, types = [piece.decode() for piece in vocabulary.pieces], vocabulary.types
    ids = {piece: i for i, piece in enumerate(pieces)}
    added = []
    for i in np.flatnonzero((types == CONTROL) | (types == UNKNOWN) | (types == USER_DEFINED)).tolist():
        content = bool(types[i] == USER_DEFINED)  # found in the text after its spaces became U+2581
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=content, special=not content)
        added.append(dict(id=i, content=pieces[i], **flags))
    space = dict(type="Replace", pattern=dict(String=" "), content=SPACE)
    back = dict(type="Replace", pattern=dict(String=SPACE), content=" ")
    unknown = pieces[int(np.flatnonzero(types == UNKNOWN)[0])]
    model = dict(type="BPE", dropout=None, unk_token=unknown, continuing_subword_prefix=None, end_of_word_suffix=None)
    model |= dict(fuse_unk=True, byte_fallback=True, ignore_merges=False, vocab=ids)
    model["merges"] = _merges(pieces, vocabulary)
    return dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=added,
        normalizer=space,
        pre_tokenizer=None,
        post_processor=_bos_first(vocabulary),
        decoder=dict(type="Sequence", decoders=[back, dict(type="ByteFallback"), dict(type="Fuse")]),
        model=model,
    )


def _bos_first(vocabulary: Vocabulary) -> dict[str, Any]:
    """The step that puts one bos before each text where special tokens are asked for."""
    bos = find_special(special_ids(vocabulary), "the vocabulary").bos
    piece = vocabulary.pieces[bos].decode()

    def text(name: str, kind: int) -> dict[str, Any]:
        return dict(Sequence=dict(id=name, type_id=kind))

    def start(kind: int) -> dict[str, Any]:
        return dict(SpecialToken=dict(id=piece, type_id=kind))

    return dict(
        type="TemplateProcessing",
        single=[start(0), text("A", 0)],
        pair=[start(0), text("A", 0), start(1), text("B", 1)],
        special_tokens={piece: dict(id=piece, ids=[bos], tokens=[piece])},
    )


def _merges(pieces: list[str], vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every split of an ordinary piece into two pieces, those of the best score first."""
    normal = np.flatnonzero(vocabulary.types == NORMAL)
    order = normal[np.argsort(-vocabulary.scores[normal], kind="stable")].tolist()
    parts = {pieces[i]: i for i in normal.tolist()}
    merges = []
    for token in order:
        piece = pieces[token]
        known = []
        for at in range(1, len(piece)):
            left = piece[:at]
            if left in parts:
                right = piece[at:]
                if right in parts:
                    known.append((parts[left], parts[right], left, right))
        merges += [(left, right) for _, _, left, right in sorted(known)]
    return merges
