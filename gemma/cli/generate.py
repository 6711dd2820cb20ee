# SPDX-License-Identifier: Apache-2.0
"""`gemma generate`: continues a text. The words are streamed as they come.

Decoding is `_generation.py`, the model `_backend.py`; conversations are `chat.py`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from gemma.cli import _backend, _common
from gemma.cli._generation import Generation, beginning, context_limit
from gemma.cli._progress import waiting
from gemma.errors import ContextFull, PromptError

if TYPE_CHECKING:
    from gemma.sampling import SamplingParams

HELP = """\
Continue a text and print it: the prompt, then the continuation.

Decoding is greedy unless --temperature is given, so the same command prints the same text. It ends at the model's
end token, at a --stop text or after --max-new-tokens. Special tokens spelled out in the prompt, such as
<start_of_turn>, are read as those tokens; one <bos> is put in front. One line break at the end of a file or pipe is
dropped. In a pipe nothing but the text and one line break is written.

\b
Examples:
  gemma generate "The history of computing began" --max-new-tokens 14
  gemma generate "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 7
  gemma generate --prompt-file story.txt --no-echo > continuation.txt
  echo "2 + 2 =" | gemma generate --max-new-tokens 4
  gemma generate "Roses are red" --json --model path/to/gemma-3-1b-pt
  gemma generate --prompt-file code.txt --speculate 8 --threads 2 --stats
"""


Prompt = Annotated[
    str | None,
    typer.Argument(metavar="PROMPT", help="The text to continue. - or a pipe: standard input.", show_default=False),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        "-n",
        metavar="N",
        help="Most tokens to generate; too many for the context is an error.  [default: 128, or fewer if full]",
        show_default=False,
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help=r"End before this text; may be repeated. \n is a line break."),
]
Echo = Annotated[bool, typer.Option("--echo/--no-echo", help="Whether to print the prompt before it.")]
Stream = Annotated[bool, typer.Option("--stream/--no-stream", help="Print words as they come, or at the end.")]


def command(
    prompt: Prompt = None,
    model: _common.Model = "demo",
    prompt_file: _common.PromptFile = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: _common.Temperature = 0.0,
    top_k: _common.TopK = None,
    top_p: _common.TopP = None,
    min_p: _common.MinP = None,
    repetition_penalty: _common.Penalty = 1.0,
    stop: Stop = None,
    seed: _common.Seed = None,
    echo: Echo = True,
    stream: Stream = True,
    as_json: _common.Json = False,
    dtype: _common.Dtype = "float32",
    context: _common.Context = None,
    backend: _common.BackendName = "auto",
    adapter: _common.Adapter = None,
    threads: _common.Threads = None,
    cache_type: _common.CacheType = None,
    speculate: _common.Speculate = 0,
    stats: _common.Stats = False,
) -> None:
    """Runs the verb; `HELP` is what --help says."""
    from gemma import chat

    flags = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    count = {} if max_new_tokens is None else dict(max_new_tokens=max_new_tokens)
    params = _common.seeded(_common.sampling(stop or (), repetition_penalty=repetition_penalty, **flags, **count))
    text = _common.read_text(prompt, prompt_file, "prompt")
    if not text:
        raise PromptError(
            'the prompt is empty: give the beginning of a text, for example "The history of computing began"'
        )
    asked = _common.context_flag(context)
    options = _common.backend_options(backend, dtype, threads, cache_type, speculate, adapter)
    begin = time.perf_counter()
    opened = _backend.open_model(model, **options)
    ids = opened.tokenizer.encode(text, add_bos=True)
    if (pad := opened.tokenizer.special.pad) in ids:
        raise PromptError(
            f"the prompt spells {opened.tokenizer.piece(pad)}, the padding, which no model reads: take it out"
        )
    params = _fitted(params, len(ids), context_limit(opened, asked), exact=max_new_tokens is not None)
    opened.model.begin(asked or len(ids) + params.max_new_tokens)
    load_seconds = time.perf_counter() - begin
    generation = Generation(opened, ids, params, chat.end_token_ids(opened.tokenizer, opened.config))
    pieces = iter(generation)
    with waiting("reading the prompt"):
        first = beginning(pieces)
    if as_json:
        result = _result(opened, text, ids, first + "".join(pieces), generation, params, load_seconds)
        _common.write(json.dumps(result, ensure_ascii=False) + "\n")
    else:
        # The prompt is printed only now: nothing that waits may write into its line.
        between = getattr(opened.model, "separator", "")  # what an encoder-decoder writes does not continue the prompt
        _print(text + between if echo else "", first if stream else first + "".join(pieces), pieces)
    if stats:
        _common.note(f"loaded in {load_seconds:.2f} s; {generation.stats()}")


def _print(prompt: str, first: str, pieces: Iterator[str]) -> None:
    _common.write(prompt + first)
    try:
        for piece in pieces:
            _common.write(piece)
    finally:
        _common.write("\n")  # also after Ctrl-C: the shell's prompt belongs on a line of its own


def _fitted(params: SamplingParams, used: int, limit: int, *, exact: bool) -> SamplingParams:
    """The parameters with a number of new tokens that fits; a number that was asked for is not cut."""
    wanted = params.max_new_tokens if exact else 1
    if used + wanted > limit:
        raise ContextFull(used + wanted, limit)
    return dataclasses.replace(params, max_new_tokens=min(params.max_new_tokens, limit - used))


def _result(opened, prompt, ids, text, generation, params, load_seconds) -> dict:
    """What --json prints; times in seconds."""
    guesses = generation.guesses
    return {
        "model": opened.name,
        "prompt": prompt,
        "text": text,
        "prompt_ids": ids,
        "ids": generation.ids,
        "finish_reason": generation.finish_reason,
        "stopped_by": generation.stopped_by,
        "seed": None if params.greedy else params.seed,
        "counts": {"prompt": len(ids), "generated": len(generation.ids)},
        "timings": {
            "load": round(load_seconds, 4),
            "prompt": round(generation.prompt_seconds, 4),
            "decode": round(generation.decode_seconds, 4),
            "tokens_per_second": generation.tokens_per_second and round(generation.tokens_per_second, 2),
        },
        **({} if guesses is None else {"speculation": {"drafted": guesses[0], "accepted": guesses[1]}}),
    }
