# SPDX-License-Identifier: Apache-2.0
"""Which adapter `gemma chat` uses: the one that was asked for, or the assistant that comes with gemmakit for `demo`.

`demo` is a pretrained model that continues text; the assistant is a small LoRA adapter that makes it answer. It lies in
`gemma/_assets/assistant/`, in PEFT's format; where that folder is not there, chat goes on without. Opening models is
`_backend.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemma import hub
from gemma.cli import _backend
from gemma.cli._common import note, one_line
from gemma.errors import CheckpointError, ConfigError

FOLDER = Path(hub.__file__).parent / "_assets/assistant"


def open_for_chat(model: str, options: dict[str, Any], *, plain: bool) -> tuple[_backend.Opened, bool]:
    """A model with the adapter that a conversation wants.

    The assistant is for the model named `demo`. One that cannot be used, because the base has other weights than it was
    trained on or a file is damaged, is left out, and a remark says why.

    Args:
      model: as it was given.
      options: of `_backend.open_model`.
      plain: leave the assistant out.

    Returns:
      The opened model, and whether its adapter was trained on turns in the chat template.

    Raises:
      ConfigError: an adapter was asked for, and none as well. Otherwise as `_backend.open_model`.
    """
    asked = options.get("adapter")
    if asked is not None and plain:
        raise ConfigError("--adapter and --no-adapter: expected one of the two, got both")
    if asked is not None:
        opened = _backend.open_model(model, **options)
        return opened, _speaks_turns(Path(asked).expanduser())
    if plain or model.strip() != hub.DEMO or not FOLDER.is_dir():
        return _backend.open_model(model, **options), False
    try:
        opened = _backend.open_model(model, **{**options, "adapter": str(FOLDER)})
    except CheckpointError as error:
        opened = _backend.open_model(model, **options)  # what is wrong with the model itself is said here
        note(f"the assistant of {model} is left out: {one_line(error)}")
        return opened, False
    note(f"{model} answers through the assistant adapter that comes with gemmakit (--no-adapter: the model as it is)")
    return opened, True


def _speaks_turns(adapter: Path) -> bool:
    """Whether an adapter was trained on conversations: it says so, or a chat template lies beside it."""
    from gemma.adapters import is_chat

    return is_chat(adapter) or _backend.has_template(adapter if adapter.is_dir() else adapter.parent)
