# SPDX-License-Identifier: Apache-2.0
"""The processes of a run find each other before JAX is told of them: whoever does not come is named, and nobody dies.

JAX's own start ends the process where a partner is missing. Here process 0 listens on the port that JAX will use, each
other one says who it is, and all are let go when they are complete; only then `_distributed.py` starts JAX.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import time

from gemma.errors import TrainingError

_LINE = 64  # bytes of a message at most
_PAUSE = 0.05  # seconds between two attempts


def meet(host: str, port: int, count: int, index: int, timeout_s: float) -> tuple[str, bool]:
    """Waits until all processes are there.

    Returns:
      The numeric address of process 0, in brackets for IPv6, and whether it is one of that machine's own.

    Raises:
      TrainingError: somebody did not come, came twice, or counts otherwise; or process 0 cannot be reached.
    """
    until = time.monotonic() + timeout_s
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise TrainingError(f"{host}: the address of process 0 is not known here ({error.strerror})") from error
    family, *_, address = min(found, key=lambda item: item[0] != socket.AF_INET)
    own = _gather(family, address, count, until) if index == 0 else _report(family, address, count, index, until)
    numeric = address[0]
    return (f"[{numeric}]" if ipaddress.ip_address(numeric.split("%")[0]).version == 6 else numeric), own


def _gather(family: int, address: tuple, count: int, until: float) -> bool:
    """Process 0: hears of all others, and lets them go."""
    with socket.socket(family, socket.SOCK_STREAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own = _bind(server, address)
        server.listen(count)
        came: dict[int, socket.socket] = {}
        try:
            while len(came) < count - 1:
                server.settimeout(max(0.001, until - time.monotonic()))
                try:
                    caller, _ = server.accept()
                except TimeoutError:
                    absent = ", ".join(str(i) for i in range(1, count) if i not in came)
                    raise TrainingError(
                        f"of {count} processes these did not come to {address[0]}:{address[1]}: {absent}"
                    ) from None
                caller.settimeout(5)
                problem = _welcome(caller, came, count)
                if problem:
                    for other in (caller, *came.values()):
                        _send(other, f"no {problem}")
                    caller.close()
                    raise TrainingError(problem)
            for caller in came.values():
                _send(caller, "go")
            for caller in came.values():  # the callers close first: the port is free at once
                with contextlib.suppress(OSError):
                    caller.recv(1)
        finally:
            for caller in came.values():
                caller.close()
    return own


def _bind(server: socket.socket, address: tuple) -> bool:
    try:
        server.bind(address)
        return True
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise TrainingError(
                f"{address[0]}:{address[1]}: process 0 cannot listen there ({error.strerror}); give a free port"
            ) from error
    server.bind(("", address[1]))  # the address is that of something in front of this machine
    return False


def _welcome(caller: socket.socket, came: dict[int, socket.socket], count: int) -> str:
    """Reads who it is; a problem that ends the run, or "". What speaks otherwise is no process of ours."""
    try:
        words = caller.recv(_LINE).decode("ascii", "replace").split()
    except OSError:
        words = []
    if len(words) != 3 or words[0] != "gemma" or not (words[1].isdigit() and words[2].isdigit()):
        caller.close()
        return ""
    index, theirs = int(words[1]), int(words[2])
    if theirs != count or not 0 < index < count:
        return f"process {index} was started as one of {theirs}, process 0 as one of {count}"
    if index in came:
        return f"two processes were started with the index {index}"
    came[index] = caller
    return ""


def _report(family: int, address: tuple, count: int, index: int, until: float) -> bool:
    """The others: tell process 0, and wait to be let go."""
    where = f"process 0 at {address[0]}:{address[1]}"
    while True:
        left = until - time.monotonic()
        if left <= 0:
            raise TrainingError(f"{where} was not reached by process {index}")
        with socket.socket(family, socket.SOCK_STREAM) as caller:
            caller.settimeout(left)
            try:
                caller.connect(address)
                _send(caller, f"gemma {index} {count}")
                caller.settimeout(max(0.001, until - time.monotonic()))
                answer = caller.recv(4 * _LINE).decode("ascii", "replace")
            except TimeoutError:
                raise TrainingError(f"{where} answered, but not all of the {count} processes came") from None
            except OSError:  # not started yet
                answer = ""
        if answer.startswith("no "):
            raise TrainingError(answer[3:])
        if answer.startswith("go"):
            return True
        time.sleep(_PAUSE)


def _send(target: socket.socket, text: str) -> None:
    with contextlib.suppress(OSError):  # it is gone; the other side's wait ends by itself
        target.sendall(text.encode())
