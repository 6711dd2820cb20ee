# SPDX-License-Identifier: Apache-2.0
"""`ToolSampler`: a `ChatSampler` whose model may call tools before it answers.

It is the loop of model and tools, with a bound; what a call looks like and what a tool may do is `gm/tools/_manager.py`.
What tools say is a user turn for the model, and like all contents of turns it stays plain text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gemma import chat
from gemma.errors import PromptError, ToolError
from gemma.gm.text import _chat_sampler, _sampling
from gemma.gm.tools._manager import OneShotToolManager, ToolManagerBase, format_tool_instructions
from gemma.gm.tools._tools import Tool, ToolOutput, checked_tools
from gemma.image import read_image
from gemma.sampling import SamplingParams

_MAX_IMAGES = 8  # of one tool call
_RULE = "-" * 66
_ENOUGH = "\n[No more tools can be called for this request. Answer now, in plain words, with what you know.]"


@dataclasses.dataclass(kw_only=True, eq=False)
class ToolSampler(_chat_sampler.ChatSampler):
    """A conversation with tools.

      sampler = gm.text.ToolSampler(model=model, params=params, tools=[gm.tools.Calculator()])
      sampler.chat("What is 25 times 4 plus 10?")

    Attributes:
      tools: what the model may call; a single tool need not be in a list.
      manager_cls: called with `tools=` at the start of every conversation; another one tells models about tools in
        another way. `functools.partial(gm.tools.OneShotToolManager, timeout=5)` changes a limit.
      max_tool_calls: in one call of `chat`, broken ones included. After that the model is asked to answer, and what it
        then says is the answer.
    """

    tools: Sequence[Tool] = dataclasses.field(default_factory=list)
    manager_cls: Callable[..., ToolManagerBase] = OneShotToolManager
    max_tool_calls: int = 16
    _manager: ToolManagerBase | None = dataclasses.field(default=None, init=False, repr=False)
    _announced: str = dataclasses.field(default="", init=False, repr=False)

    def __post_init__(self):
        super().__post_init__()
        self.tools = checked_tools(self.tools)
        if isinstance(self.max_tool_calls, bool) or not isinstance(self.max_tool_calls, int) or self.max_tool_calls < 0:
            raise ToolError(f"max_tool_calls: expected a whole number, 0 or more, got {self.max_tool_calls!r}")

    @property
    def manager(self) -> ToolManagerBase | None:
        """Of the running conversation, with the tools that it has now; None before the first."""
        return self._manager

    def add_tools(self, *tools: Tool) -> None:
        """Registers tools, in the running conversation too; its model is told with the user's next message."""
        known = checked_tools([*self.tools, *tools])
        if self._manager is not None:
            self._manager.update_tools(checked_tools([*self._manager.tools, *tools]))
            told = "\n".join(format_tool_instructions(tool) for tool in tools)
            self._announced += f"These tools can be called from now on:\n\n{told}\n"
        self.tools = known

    def chat(
        self,
        prompt: str,
        *,
        images: Any = None,
        sampling: _sampling.SamplingMethod | SamplingParams | None = None,
        rng: Any = None,
        max_new_tokens: int | None = None,
        multi_turn: bool | None = None,
        print_stream: bool | None = None,
    ) -> str:
        """One request: the model answers, calling tools on the way. The arguments are those of `ChatSampler.chat`.

        Calls and results become turns of the conversation. `max_new_tokens` holds for each message of the model; tool
        results are printed too when streaming.

        Returns:
          The model's last message.

        Raises:
          PromptError, ContextFull, SamplingError: (ValueErrors) the conversation stays as it was before the request.
        """
        if not isinstance(prompt, str):
            raise PromptError(f"prompt: expected what the user says as a str, got {type(prompt).__name__}")
        goes_on = self.multi_turn if multi_turn is None else multi_turn
        shows = self.print_stream if print_stream is None else print_stream
        before = (list(self.turns), self.last_state, self._manager, self._announced)
        tools_before = list(self._manager.tools) if self._manager is not None else None

        def ask(text: str, images: Any, n: int) -> str:
            return super(ToolSampler, self).chat(
                text,
                images=images,
                sampling=sampling,
                rng=_folded(rng, n),
                max_new_tokens=max_new_tokens,
                multi_turn=goes_on or n > 0,
                print_stream=shows,
            )

        try:
            text = self._begun(prompt, goes_on, images is not None)
            return self._answer(ask, text, images, shows)
        except BaseException:  # also Ctrl-C: half a request must not stay in the conversation
            self.turns, self.last_state, self._manager, self._announced = before
            if tools_before is not None:
                self._manager.update_tools(tools_before)
            raise

    def _begun(self, prompt: str, goes_on: bool, with_images: bool) -> str:
        """The user's message with what the model must know about tools."""
        if self._manager is None or not self.turns or not goes_on:
            self._manager = self.manager_cls(tools=list(self.tools))
            told = self._manager.system_prompt
        else:
            told = self._announced
        self._announced = ""
        return (self._without_marker(told) if with_images else told) + prompt

    def _answer(self, ask: Callable[[str, Any, int], str], text: str, images: Any, shows: bool) -> str:
        """Asks the model, carries out its calls, and asks again until it answers."""
        for n in range(self.max_tool_calls):
            said = ask(text, images, n)
            output = self._manager.maybe_execute_tool(said)
            if output is None:
                return said
            text, images = self._shown(output)
            if n == self.max_tool_calls - 1:
                text += _ENOUGH
            if shows:
                print(f"\n{_RULE}\n{text}\n{_RULE}", flush=True)
        return ask(text, images, self.max_tool_calls)

    def _shown(self, output: ToolOutput) -> tuple[str, list[np.ndarray] | None]:
        """What a tool gave back, as the text and the pictures of a user turn; pictures come after the text."""
        if output.images is None or len(given := _several(output.images)) == 0:
            return output.text, None
        marker = self._marker()
        if marker is None or self.model.config.vision_encoder is None:
            return f"{output.text}\n({len(given)} images left out: you cannot see images)", None
        try:
            images = [read_image(image, name=f"images[{i}]") for i, image in enumerate(given[:_MAX_IMAGES])]
        except PromptError as error:
            return f"[Tool error: an image of the result cannot be used: {error}]", None
        text = output.text
        if text.count(marker) != len(images):  # else the tool has put them where they belong
            text = "\n".join([self._without_marker(text), *[marker] * len(images)])
        left = len(given) - len(images)
        return text + (f"\n({left} more images left out)" if left else ""), images

    def _marker(self) -> str | None:
        """Where an image goes, as the model's format spells it."""
        return chat.format_for(getattr(self.tokenizer, "core", self.tokenizer)).image

    def _without_marker(self, text: str) -> str:
        """In a turn with images every spelled marker takes one: what tools say must not."""
        marker = self._marker()
        return text.replace(marker, marker.replace("_", " ")) if marker else text


def _several(images: Any) -> list[Any]:
    """One picture or several, as a list."""
    stacked = getattr(images, "ndim", 0) == 4
    return list(images) if stacked or isinstance(images, (list, tuple)) else [images]


def _folded(rng: Any, n: int) -> Any:
    """The randomness of message n of a request; that of the first is what the caller gave."""
    if rng is None or n == 0:
        return rng
    return rng + n if isinstance(rng, (int, np.integer)) else jax.random.fold_in(rng, n)
