# SPDX-License-Identifier: Apache-2.0
"""A pickle as data: an interpreter that knows the few operations of a PyTorch state dict and can call nothing.

Unpickling is running a program. This one builds dicts, lists, tuples, strings, numbers and `TensorRecord`s; every name
that a pickle imports is looked up in a short table of records, and any other is refused by name. So no code of a file
ever runs, and torch is not needed. `dumps` writes the same subset. What the records point to is `ckpt.py`'s business.
"""

from __future__ import annotations

import dataclasses
import pickletools
import struct
from collections.abc import Mapping
from typing import Any

from gemma.errors import FormatError

MAX_OPERATIONS = 500_000  # a state dict of a thousand tensors takes some 40,000; each may cost 100 bytes
_MARK = object()


@dataclasses.dataclass(frozen=True)
class TensorRecord:
    """A tensor as a pickle describes it; `storage` names the member of the archive that holds its values."""

    dtype: str  # of the storage class, "FloatStorage", "BFloat16Storage", ...
    storage: str
    storage_size: int  # elements
    offset: int  # elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Name:
    """An allowed import; it is data, not the thing of that name."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """What a persistent id names. A class of its own, since a pickle can build any tuple but not this."""

    kind: str
    key: str
    size: int


_KINDS = "Float BFloat16 Half Double Char Byte Short Int Long Bool ComplexFloat"
STORAGES = tuple(f"{kind}Storage" for kind in _KINDS.split(" "))
_ALLOWED = {_Name("torch", name) for name in STORAGES} | {
    _Name("torch._utils", "_rebuild_tensor_v2"),
    _Name("torch._utils", "_rebuild_parameter"),
    _Name("collections", "OrderedDict"),
}


class _Machine:
    """The stack, the memo and what each operation does to them."""

    def __init__(self, path: Any):
        self.path, self.at, self.stack, self.memo = path, 0, [], {}

    def fail(self, rule: str) -> FormatError:
        return FormatError(self.path, None, f"pickle, byte {self.at}: {rule}")

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise self.fail("the stack is empty")
        return self.stack.pop()

    def to_mark(self) -> list[Any]:
        for depth in range(len(self.stack) - 1, -1, -1):
            if self.stack[depth] is _MARK:
                items = self.stack[depth + 1 :]
                del self.stack[depth:]
                return items
        raise self.fail("no mark on the stack")

    def top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise self.fail(f"expected a {kind.__name__} on the stack")
        return self.stack[-1]

    def set_items(self, flat: list[Any]) -> None:
        target = self.top(dict)
        if len(flat) % 2:
            raise self.fail("a key without a value")
        for key, value in zip(flat[::2], flat[1::2]):
            if type(key) not in (str, int):  # hashing nested tuples could take for ever
                raise self.fail(f"expected a string or a number as key, got {type(key).__name__}")
            if key in target:
                raise self.fail(f"key {key!r:.200} is there twice")
            target[key] = value

    def get(self, index: int) -> Any:
        if index not in self.memo:
            raise self.fail(f"memo {index} was never set")
        return self.memo[index]

    def import_name(self, module: Any, name: Any) -> _Name:
        if type(module) is not str or type(name) is not str:
            raise self.fail("the name of an import is no string")
        found = _Name(module, name)
        if found not in _ALLOWED:
            raise self.fail(
                f"it imports {found.module}.{found.name}"[:200] + ", which a state dict does not need; refused, "
                "since running it could do anything"
            )
        return found

    def persistent(self, pid: Any) -> _Storage:
        fields = pid if type(pid) is tuple and len(pid) == 5 else ()
        if not fields or fields[0] != "storage" or not isinstance(fields[1], _Name) or fields[1].name not in STORAGES:
            raise self.fail("expected a storage of a known type as persistent id")
        _, kind, key, _location, size = fields
        if type(key) is not str or type(size) is not int or not 0 <= size < 2**48:
            raise self.fail(f"a storage with key {_shown(key)} and size {_shown(size)}")
        return _Storage(kind.name, key, size)

    def reduce(self) -> Any:
        arguments, function = self.pop(), self.pop()
        if type(arguments) is not tuple or not isinstance(function, _Name):
            raise self.fail("a call of something that is no allowed name")
        if function.name == "OrderedDict" and not arguments:
            return {}
        if function.name == "_rebuild_parameter" and arguments and isinstance(arguments[0], TensorRecord):
            return arguments[0]
        if function.name == "_rebuild_tensor_v2" and len(arguments) in (6, 7):
            return self.tensor(*arguments[:4])
        raise self.fail(f"{function.name}: unexpected arguments")

    def tensor(self, storage: Any, offset: Any, shape: Any, stride: Any) -> TensorRecord:
        numbers = all(
            type(part) is tuple and len(part) <= 8 and all(type(n) is int and 0 <= n < 2**48 for n in part)
            for part in (shape, stride)
        )
        if (
            type(storage) is not _Storage
            or not numbers
            or len(shape) != len(stride)
            or type(offset) is not int
            or not 0 <= offset < 2**48
        ):
            raise self.fail(f"a tensor of shape {_shown(shape)}, stride {_shown(stride)}, offset {_shown(offset)}")
        return TensorRecord(storage.kind, storage.key, storage.size, offset, shape, stride)

    def step(self, name: str, argument: Any) -> None:
        """Executes one operation."""
        stack = self.stack
        if name in ("PROTO", "FRAME"):
            return
        if name in _PUSHED:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1] if stack else self.pop()
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.get(argument))
        elif name == "GLOBAL":
            stack.append(self.import_name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = self.pop(), self.pop()
            stack.append(self.import_name(module, attribute))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple([self.pop() for _ in range(int(name[-1]))][::-1]))
        elif name == "TUPLE":
            stack.append(tuple(self.to_mark()))
        elif name in ("SETITEM", "SETITEMS"):
            self.set_items(self.to_mark() if name == "SETITEMS" else [self.pop(), self.pop()][::-1])
        elif name in ("APPEND", "APPENDS"):
            items = self.to_mark() if name == "APPENDS" else [self.pop()]
            self.top(list).extend(items)
        elif name == "BINPERSID":
            stack.append(self.persistent(self.pop()))
        elif name == "REDUCE":
            stack.append(self.reduce())
        elif name == "BUILD":  # attributes of an OrderedDict, such as torch's version numbers
            self.pop()
            self.top(dict)
        else:
            raise self.fail(f"operation {name} has no place in a state dict")


def _shown(value: Any) -> str:
    """A value for an error message: a hostile nest of tuples would take for ever to print."""
    if type(value) is tuple and len(value) <= 8:
        return f"({', '.join(repr(n) if type(n) is int else type(n).__name__ for n in value)})"
    return repr(value)[:80] if type(value) in (str, int, float, bool) else type(value).__name__


_PUSHED = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_CONSTANTS = {
    "MARK": lambda: _MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}


def loads(data: bytes, path: Any) -> Any:
    """What a pickle of a state dict holds: dicts, lists, tuples, strings, numbers, None and TensorRecords.

    Raises:
      FormatError: (with the byte inside of the pickle) anything else, a foreign import above all.
    """
    machine, count = _Machine(path), 0
    try:
        for operation, argument, machine.at in pickletools.genops(data):
            count += 1
            if count > MAX_OPERATIONS:
                raise machine.fail(f"more than {MAX_OPERATIONS} operations")
            if operation.name == "STOP":
                result = machine.pop()
                if machine.stack:
                    raise machine.fail("something is left on the stack")
                return result
            machine.step(operation.name, argument)
    except FormatError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, struct.error, MemoryError, OverflowError) as error:
        raise machine.fail(f"not a pickle ({type(error).__name__}: {error})"[:300]) from None
    raise machine.fail("the pickle has no end")


# ---- writing --------------------------------------------------------------------------------------------------------


def dumps(value: Any) -> bytes:
    """The pickle (protocol 2) of nested dicts with string keys whose leaves are strings, numbers and TensorRecords."""
    return b"\x80\x02" + _pickled(value) + b"."


def _pickled(value: Any) -> bytes:
    if isinstance(value, TensorRecord):
        storage = (b"(" + _text("storage") + f"ctorch\n{value.dtype}\n".encode() + _text(value.storage)) + (
            _text("cpu") + _number(value.storage_size) + b"tQ"
        )
        sizes = _tuple(value.shape) + _tuple(value.stride)
        hooks = b"ccollections\nOrderedDict\n)R"
        return (
            b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + _number(value.offset) + sizes + b"\x89" + hooks + b"tR"
        )
    if isinstance(value, Mapping):
        return b"}(" + b"".join(_text(key) + _pickled(item) for key, item in value.items()) + b"u"
    if isinstance(value, str):
        return _text(value)
    if type(value) is int:
        return _number(value)
    raise TypeError(f"a state dict holds dicts, strings, whole numbers and tensors, not {type(value).__name__}")


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _number(value: int) -> bytes:
    if 0 <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(8, "little", signed=True)
    return b"\x8a\x08" + data


def _tuple(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"
