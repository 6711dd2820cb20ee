# SPDX-License-Identifier: Apache-2.0
"""Conversations: turns as data, formats of Gemma 1 to 4, ids with loss masks, end tokens, a wrapper for base models.

Templates are code, not Jinja. Contents never become control tokens: markers are put in as ids, and everything between
two markers is encoded as plain text, in one run, so that the ids equal those of the official template's text. How
text becomes ids is `tokenizer.py`; images themselves are `image.py`.

    <bos> <start_of_turn> user\\n{text} <end_of_turn> \\n <start_of_turn> model\\n{text} <end_of_turn> \\n
                                                                             ======================  loss
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from gemma.config import GemmaConfig, PaliGemmaConfig, T5GemmaConfig
from gemma.errors import ConfigError, PromptError, TokenizerError
from gemma.tokenizer import Tokenizer

__all__ = [
    "ChatFormat",
    "EncodedChat",
    "FEW_SHOT_STOP",
    "FORMATS",
    "GEMMA1",
    "GEMMA2",
    "GEMMA3",
    "GEMMA4",
    "Turn",
    "encode_chat",
    "end_token_ids",
    "few_shot",
    "format_for",
    "render",
]

_ROLES = ("system", "user", "model")


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message. `role` is "system", "user" or "model"; "assistant" is taken for "model"."""

    role: Literal["system", "user", "model"]
    content: str

    def __post_init__(self):
        if self.role == "assistant":
            object.__setattr__(self, "role", "model")
        if self.role not in _ROLES:
            raise PromptError(f"a turn's role is one of {', '.join(_ROLES)}, got {self.role!r:.80}")
        if not isinstance(self.content, str):
            raise PromptError(f"a turn's content is a str, got {type(self.content).__name__} for the {self.role}")


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """How one generation writes a conversation down.

    Attributes:
      name: of the generation.
      start_of_turn, end_of_turn: markers around a turn, as spelled in the vocabulary.
      roles: our role to the word after `start_of_turn`.
      system: "fold" puts the system text and a blank line before the first user's text; "turn" gives it one of its own.
      image: the marker in a user's text where an image goes, or None for text-only generations.
      end_tokens: pieces that end an answer.
    """

    name: str
    start_of_turn: str
    end_of_turn: str
    roles: Mapping[str, str]
    system: Literal["fold", "turn"]
    image: str | None
    end_tokens: tuple[str, ...]
    bos: str = "<bos>"


_CLASSIC = dict(
    start_of_turn="<start_of_turn>",
    end_of_turn="<end_of_turn>",
    roles={"user": "user", "model": "model"},
    system="fold",
    end_tokens=("<eos>", "<end_of_turn>"),
)
# The official templates of Gemma 1 and 2 refuse a system text; it is folded as Gemma 3's template does, never dropped.
GEMMA1 = ChatFormat(name="gemma1", image=None, **_CLASSIC)
GEMMA2 = ChatFormat(name="gemma2", image=None, **_CLASSIC)
GEMMA3 = ChatFormat(name="gemma3", image="<start_of_image>", **_CLASSIC)
GEMMA4 = ChatFormat(
    name="gemma4",
    start_of_turn="<|turn>",
    end_of_turn="<turn|>",
    roles={"system": "system", "user": "user", "model": "model"},
    system="turn",
    image="<|image|>",
    end_tokens=("<eos>", "<turn|>"),
)
FORMATS: Mapping[str, ChatFormat] = {f.name: f for f in (GEMMA1, GEMMA2, GEMMA3, GEMMA4)}
_BY_VERSION = {2: GEMMA2, 3: GEMMA3, 4: GEMMA4}


def format_for(source: Tokenizer | GemmaConfig | PaliGemmaConfig | T5GemmaConfig) -> ChatFormat:
    """The chat format of a model, from its tokenizer or its configuration.

    Raises:
      TokenizerError, ConfigError: the model has no chat format.
    """
    if isinstance(source, T5GemmaConfig):
        return GEMMA3 if source.decoder.use_qk_norm else GEMMA2
    if isinstance(source, PaliGemmaConfig):
        raise ConfigError("PaliGemma has no chat format: it takes a task prefix such as 'caption en'")
    if isinstance(source, GemmaConfig):
        kind = source.model_type
        for prefix, found in (("gemma4", GEMMA4), ("gemma3", GEMMA3), ("gemma2", GEMMA2), ("gemma", GEMMA1)):
            if kind == prefix or (prefix != "gemma" and kind.startswith(prefix)):
                return found
        raise ConfigError(f"model_type: expected gemma, gemma2, gemma3 or gemma4 for a chat, got {kind!r}")
    if source.version not in _BY_VERSION:
        raise TokenizerError(f"{source!r} has no turn markers: pass format=, or use the model for completion only")
    return _BY_VERSION[source.version]


# --- checking and rendering


def _spoken(turns: Sequence[Turn], format: ChatFormat) -> list[tuple[str, str, str]]:
    """(role, folded prefix, trimmed content) of every turn that is written down, after checking their order."""
    turns = list(turns)
    if not turns:
        raise PromptError("a conversation needs at least one turn; begin with Turn('user', ...)")
    for n, turn in enumerate(turns):
        if not isinstance(turn, Turn):
            raise PromptError(f"turn {n}: expected gemma.chat.Turn(role, content), got {type(turn).__name__}")
    system = turns.pop(0) if turns[0].role == "system" else None
    if not turns:
        raise PromptError("a conversation needs a user turn after the system text; add Turn('user', ...)")
    for n, turn in enumerate(turns):
        wanted = ("user", "model")[n % 2]
        if turn.role != wanted:
            raise PromptError(
                f"turn {n + (system is not None)}: expected role {wanted!r}, got {turn.role!r}; turns alternate "
                f"between user and model, the user first, after any system text: join neighbours of one role"
            )
    out = [(turn.role, "", turn.content.strip()) for turn in turns]
    if system is not None and format.system == "turn":
        return [("system", "", system.content.strip()), *out]
    if system is not None:
        out[0] = ("user", system.content + "\n\n", out[0][2])  # the official template does not trim it
    return out


def render(turns: Sequence[Turn], *, format: ChatFormat = GEMMA3, add_generation_prompt: bool = True) -> str:
    """The conversation as text, for eyes only: its contents may spell markers, so use `encode_chat` for ids."""
    out = [format.bos]
    for role, prefix, content in _spoken(turns, format):
        out.append(f"{format.start_of_turn}{format.roles[role]}\n{prefix}{content}{format.end_of_turn}\n")
    if add_generation_prompt:
        out.append(f"{format.start_of_turn}{format.roles['model']}\n")
    return "".join(out)


# --- ids


@dataclasses.dataclass(frozen=True)
class EncodedChat:
    """A conversation as ids.

    Attributes:
      ids: [T] token ids, beginning with the one bos.
      loss_mask: [T] True for the tokens of model turns, their end-of-turn included; the role line before and the
        newline after are not.
    """

    ids: list[int]
    loss_mask: list[bool]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """[start, end) of each run of loss tokens."""
        edges = [i for i in range(len(self.ids) + 1) if self._at(i) != self._at(i - 1)]
        return list(zip(edges[::2], edges[1::2]))

    def _at(self, i: int) -> bool:
        return 0 <= i < len(self.ids) and self.loss_mask[i]

    def __len__(self) -> int:
        return len(self.ids)


def encode_chat(
    tokenizer: Tokenizer,
    turns: Sequence[Turn],
    *,
    format: ChatFormat | None = None,
    add_generation_prompt: bool = True,
    images: int = 0,
) -> EncodedChat:
    """The ids of a conversation, equal to those of the official template's text for contents without special spellings.

    Args:
      tokenizer: of the model.
      turns: an optional system turn, then user and model turns in alternation. Contents are trimmed.
      format: None: the tokenizer's own.
      add_generation_prompt: end with the header of a model turn, so that the model answers.
      images: number of images that come with the conversation. The users' contents must then hold as many image
        markers, which become ids. With 0 a marker is plain text.

    Raises:
      PromptError: roles out of order, or markers and images do not match in number.
      TokenizerError: the vocabulary lacks a marker of the format.
    """
    format = format_for(tokenizer) if format is None else format
    spoken = _spoken(turns, format)
    _check_images(spoken, format, images)
    start, end = tokenizer.id_of(format.start_of_turn), tokenizer.id_of(format.end_of_turn)
    newline = _plain(tokenizer, "\n")
    ids, mask = [tokenizer.id_of(format.bos)], [False]
    for role, prefix, content in spoken:
        head, body = _encode_turn(
            tokenizer, f"{format.roles[role]}\n", prefix, content, format if images else None, role
        )
        said = role == "model"
        ids += [start, *head, *body, end, *newline]
        mask += [False] * (1 + len(head)) + [said] * (len(body) + 1) + [False] * len(newline)
    if add_generation_prompt:
        header = _plain(tokenizer, f"{format.roles['model']}\n")
        ids += [start, *header]
        mask += [False] * (1 + len(header))
    return EncodedChat(ids, mask)


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, parse_special=False)


def _encode_turn(tokenizer, line: str, prefix: str, content: str, images: ChatFormat | None, role: str):
    """(ids of the role line, ids of the rest). Line and text are encoded in one run, as the template's text would be.

    A prefix may begin with newlines, which then join the role line's; the split between the two parts is only needed
    for model turns, whose trimmed content never joins a newline that is a piece of its own.
    """
    marker = images.image if images is not None and role == "user" else None
    first, *others = content.split(marker) if marker else [content]
    whole, head = _plain(tokenizer, line + prefix + first), _plain(tokenizer, line)
    if role == "model" and whole[: len(head)] != head:
        # A vocabulary without a piece for the newline may merge across it: the loss must still begin with the text.
        whole = head + _plain(tokenizer, first)
    for part in others:
        whole += [tokenizer.id_of(marker), *_plain(tokenizer, part)]
    cut = min(len(head), len(whole))
    return whole[:cut], whole[cut:]


def _check_images(spoken: Sequence[tuple[str, str, str]], format: ChatFormat, images: int) -> None:
    if isinstance(images, bool) or not isinstance(images, int) or images < 0:
        raise PromptError(f"images: expected their number, 0 or more, got {images!r:.80}")
    if not images:
        return
    if format.image is None:
        raise PromptError(f"{images} images came, but {format.name} takes text only: leave the images out")
    marked = sum(content.count(format.image) for role, _, content in spoken if role == "user")
    if marked != images:
        raise PromptError(
            f"{images} images came, but the user turns hold {marked} image markers: write {format.image} once where "
            f"each image belongs"
        )


def end_token_ids(
    tokenizer: Tokenizer,
    config: GemmaConfig | PaliGemmaConfig | T5GemmaConfig | None = None,
    format: ChatFormat | None = None,
) -> frozenset[int]:
    """The ids that end an answer: eos, end of turn, and what the configuration adds. Always the union.

    Args:
      config: its `eos_token_id` may name more than one.
      format: None: the tokenizer's own markers, if it has any.
    """
    found = {tokenizer.special.eos, tokenizer.special.end_of_turn}
    if format is not None:
        found |= {tokenizer.id_of(piece) for piece in format.end_tokens}
    if isinstance(config, PaliGemmaConfig):
        config = config.text_config
    elif isinstance(config, T5GemmaConfig):
        config = config.decoder
    if config is not None:
        found |= set(config.end_token_ids)
    return frozenset(i for i in found if i is not None)


# --- base models

_FEW_SHOT_OPENING = "A person asks, and a well-informed assistant gives short, correct answers."
_FEW_SHOT_EXAMPLES = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many legs does a spider have?", "A spider has eight legs."),
)
_FEW_SHOT_ROLES = {"user": "Person", "model": "Assistant"}
FEW_SHOT_STOP = ("\nPerson:",)


def few_shot(turns: Sequence[Turn]) -> str:
    """A text that lets a pretrained model, which never saw a chat, answer the last user turn.

    Encode it with `add_bos=True, parse_special=False`, and stop at `FEW_SHOT_STOP`. A system text replaces the opening
    line. The conversation must end with a user turn.
    """
    spoken = _spoken(turns, GEMMA3)
    if spoken[-1][0] != "user":
        raise PromptError("the conversation ends with the model's turn: add the user turn to be answered")
    opening = spoken[0][1].strip() or _FEW_SHOT_OPENING
    lines = [("user", q, "model", a) for q, a in _FEW_SHOT_EXAMPLES]
    said = [(role, text) for user, q, model, a in lines for role, text in ((user, q), (model, a))]
    said += [(role, content) for role, _, content in spoken]
    return opening + "\n\n" + "".join(f"{_FEW_SHOT_ROLES[r]}: {t}\n" for r, t in said) + f"{_FEW_SHOT_ROLES['model']}:"
