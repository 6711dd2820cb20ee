# SPDX-License-Identifier: Apache-2.0
"""Replaces modules while a Flax model runs: the replacement is called where the module would have been.

Nothing is patched: an interceptor is active inside its `with` block, in its thread, and in no other call of the model.
What the replacements compute is `_lora.py` and the quantized layers; `gm.nn.LoRA` opens an interceptor for each call.
"""

from __future__ import annotations

import abc
import contextlib
import threading
from collections.abc import Callable
from typing import Any

from flax import linen as nn


class Interceptor(abc.ABC):
    """A context manager inside which every method call of every Flax module goes through `interceptor`."""

    def __init__(self):
        self._open = threading.local()

    def __enter__(self):
        context = nn.intercept_methods(self.interceptor)
        context.__enter__()
        if not hasattr(self._open, "contexts"):
            self._open.contexts = []
        self._open.contexts.append(context)
        return self

    def __exit__(self, *exc_info):
        return self._open.contexts.pop().__exit__(*exc_info)

    @abc.abstractmethod
    def interceptor(self, next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        """Called in place of a method; `next_fun(*args, **kwargs)` is what would have been called."""


class ModuleInterceptor(Interceptor):
    """Calls replacements of modules.

    Every module instance is offered to `replace_module_fn` once, at its first call. The replacement may call the module
    that it replaces: nothing is replaced inside of a replacement.

    Args:
      replace_module_fn: module to what is called instead, or None (or the module itself) to leave it alone. It runs
        inside the module's method, so a replacement that is a Flax module becomes its child.
      methods: of the replaced modules; the replacement has a method of each name that it takes over.
    """

    def __init__(self, replace_module_fn: Callable[[nn.Module], Any], *, methods: tuple[str, ...] = ("__call__",)):
        super().__init__()
        self._replace, self._methods = replace_module_fn, methods
        self._state = threading.local()

    def __enter__(self):
        if not getattr(self._state, "depth", 0):
            # By id: modules compare by value. The module is kept beside its replacement, so that no id is used twice.
            self._state.seen, self._state.inside = {}, False
        self._state.depth = getattr(self._state, "depth", 0) + 1
        return super().__enter__()

    def __exit__(self, *exc_info):
        self._state.depth -= 1
        if not self._state.depth:
            self._state.seen = {}
        return super().__exit__(*exc_info)

    def interceptor(self, next_fun, args, kwargs, context):
        """See `Interceptor`."""
        if self._state.inside or context.method_name not in self._methods:
            return next_fun(*args, **kwargs)
        module = context.module
        with self._quiet():
            if id(module) not in self._state.seen:
                self._state.seen[id(module)] = (module, self._replace(module))
            replacement = self._state.seen[id(module)][1]
            taken = None if replacement is None else getattr(replacement, context.method_name, None)
            if taken is not None and replacement is not module:
                return taken(*args, **kwargs)
        return next_fun(*args, **kwargs)

    @contextlib.contextmanager
    def _quiet(self):
        self._state.inside = True
        try:
            yield
        finally:
            self._state.inside = False
