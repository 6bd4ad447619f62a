"""Whether the processes of a launch are all there. Where one is gone the others end soon, and one of them says why.

Each process holds a connection to rank 0, on which nothing is sent until a process ends. A killed process closes its
connection; a machine that is lost stops to answer the kernel's probes. No process has to find time to prove that it is
alive, so a long computation is never taken for a death. Importing it loads no torch.
"""

import contextlib
import faulthandler
import json
import logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from typing import Any, ClassVar

from tofu.runtime import ranks

log = logging.getLogger(__name__)

PROBES = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # a machine is lost after 25 s of silence
GRACE = 10  # seconds in which a process ends by itself, once another one is gone; then it is ended
SETTLE = 2  # seconds in which the cause of an error may show itself before a rank tells what may be its consequence
CONNECT = 10  # seconds to reach rank 0
GONE = "is gone (killed, or its machine is lost): the run ends; what was saved stands, run the same command again"


class _Link(threading.Thread):
    """What a process knows of the others; rank 0's decides who tells an error."""

    own: ClassVar["_Link | None"] = None  # this process's, between `join` and `leave`

    def __init__(self, server: socket.socket | None, hub: socket.socket | None, token: str) -> None:
        super().__init__(daemon=True, name="peers")
        self.server, self.hub, self.token = server, hub, token
        self.lost: str | None = None  # what ends this process
        self.answer: bool | None = None  # rank 0's: whether this rank may speak
        self.speaker: int | None = None  # rank 0 alone: who speaks
        self.names: dict[socket.socket, tuple[int, str]] = {}  # rank 0 alone
        self.asked: list[tuple[float, socket.socket]] = []  # rank 0 alone: since when somebody waits for the word
        self.over, self.lock, self.buffers = False, threading.RLock(), dict[socket.socket, bytes]()
        self.selector = selectors.DefaultSelector()
        for one in filter(None, (server, hub)):
            self.selector.register(one, selectors.EVENT_READ)

    def run(self) -> None:  # noqa: D102
        while not self.over:
            for key, _ in self.selector.select(0.2):
                with self.lock:
                    self._accept(self.server) if key.fileobj is self.server else self._read(key.fileobj)
            with self.lock:
                while self.asked and time.monotonic() - self.asked[0][0] > SETTLE:
                    self._grant(self.asked.pop(0)[1])

    def _accept(self, server: Any) -> None:
        connection, _ = server.accept()
        _probe(connection)
        self.selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: Any) -> None:
        """Take in what has come on a connection: whole lines, or its end."""
        try:
            came = connection.recv(4096)
        except OSError:
            came = b""
        *lines, rest = (self.buffers.get(connection, b"") + came).split(b"\n")
        self.buffers[connection] = rest
        for line in lines:
            with contextlib.suppress(ValueError):
                self._take(connection, json.loads(line))
        if not came:
            self._drop(connection)

    def _take(self, connection: socket.socket, said: Any) -> None:
        if "hello" in said and secrets.compare_digest(str(said.get("token")), self.token):
            self.names[connection] = int(said["hello"]), str(said["host"])
        elif "bye" in said:
            self.names.pop(connection, None)
            self.hub = None if connection is self.hub else self.hub
        elif "fails" in said and connection in self.names:
            self.asked.append((time.monotonic(), connection))
        elif "speak" in said:
            self.answer = said["speak"]
        elif "over" in said:
            self.end(said["over"])

    def _drop(self, connection: socket.socket) -> None:
        """A connection has ended: without a goodbye before it, its process has too."""
        self.selector.unregister(connection)
        connection.close()
        if connection is self.hub:
            lowest = int(os.environ.get("LOCAL_RANK", 0)) == 0 or ranks.rank() == 1
            self.end(f"rank 0 on {os.environ.get('MASTER_ADDR')} {GONE}", tell=lowest)
        elif connection in self.names:
            number, host = self.names.pop(connection)
            if self.speaker is None:
                self.speaker = 0
                self.tell_all(f"rank {number} on {host} {GONE}")
                self.end(f"rank {number} on {host} {GONE}", tell=True)

    def _grant(self, connection: socket.socket) -> None:
        """Answer a rank that asks for the word: it gets it if nobody has it."""
        free = self.speaker is None
        if free and connection in self.names:
            self.speaker = self.names[connection][0]
            self.tell_all(f"rank {self.speaker} has failed", but=connection)
            self.end(f"rank {self.speaker} has failed")
        _send(connection, speak=free)

    def tell_all(self, why: str, but: socket.socket | None = None) -> None:
        """Rank 0 tells the others that the run is over."""
        for connection in [one for one in self.names if one is not but]:
            _send(connection, over=why)

    def end(self, why: str, tell: bool = False) -> None:
        """This process must end: by itself within GRACE seconds, for a collective may never return."""
        if self.lost is None:
            self.lost = why
            end_soon()
            if tell:
                sys.stderr.write(f"error: {why}\n")
                sys.stderr.flush()

    def may_speak(self) -> bool:
        """Whether this rank tells its error; rank 0 before the others, and the cause before its consequences."""
        if ranks.rank() > 0:
            if self.hub is None:
                return self.lost is None
            _send(self.hub, fails=ranks.rank())
        deadline = time.monotonic() + (GRACE if ranks.rank() > 0 else SETTLE / 2)
        while self.answer is None and self.lost is None and time.monotonic() < deadline:
            time.sleep(0.05)
        with self.lock:
            if self.lost is not None or ranks.rank() > 0:
                return self.lost is None and self.answer is not False
            self.speaker = 0
            self.tell_all("rank 0 has failed")
            return True

    def close(self) -> None:
        """Say goodbye, so that this process's end is no death, and stop to look."""
        self.over = True
        self.join(2)
        for connection in filter(None, (*self.names, self.hub)):
            _send(connection, bye=True)
        for one in [key.fileobj for key in self.selector.get_map().values() if isinstance(key.fileobj, socket.socket)]:
            one.close()
        self.selector.close()


def _send(connection: socket.socket | None, **said: Any) -> None:
    if connection is None:
        return
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(said).encode() + b"\n")


def _probe(connection: socket.socket) -> None:
    """Let the kernel ask now and then whether the other machine is there."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _listen() -> socket.socket | None:
    try:
        both = socket.has_dualstack_ipv6()
        kind = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", 0), family=kind, backlog=ranks.world_size(), dualstack_ipv6=both)
    except OSError:
        return None


def join() -> None:
    """Watch the other processes from now on; all ranks call it together. Nothing happens where there is one alone."""
    if ranks.world_size() == 1 or _Link.own is not None:
        return
    server = _listen() if ranks.rank() == 0 else None
    port, token = ranks.from_rank_0((server.getsockname()[1] if server else None, secrets.token_hex(16)))
    hub = None
    if ranks.rank() > 0 and port:
        with contextlib.suppress(OSError):
            hub = socket.create_connection((os.environ.get("MASTER_ADDR", "localhost"), port), CONNECT)
            hub.settimeout(None)
            _probe(hub)
            _send(hub, hello=ranks.rank(), host=socket.gethostname(), token=token)
    reached = ranks.merge({ranks.rank(): bool(hub or server)})
    if not all(reached.values()):
        log.warning("the processes cannot reach rank 0: where one is lost, the others notice it late")
    if hub or server:
        _Link.own = _Link(server, hub, token)
        _Link.own.start()
        os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    """A child that is forked must not hold its parent's connections open."""
    if _Link.own is not None:
        for one in (*_Link.own.names, _Link.own.hub, _Link.own.server):
            if one is not None:
                one.close()
        _Link.own = None


def leave() -> None:
    """The job is over on this rank: it may end now."""
    if _Link.own is not None:
        _Link.own.close()
        _Link.own = None


def lost() -> str | None:
    """Why this process must end, if another one is gone or has failed."""
    return _Link.own.lost if _Link.own is not None else None


def may_speak() -> bool | None:
    """Whether this rank is to tell the error that it ends with; None where the processes do not watch each other."""
    return _Link.own.may_speak() if _Link.own is not None else None


def end_soon() -> None:
    """End this process in GRACE seconds if it has not ended by then, whatever it waits for."""
    faulthandler.dump_traceback_later(GRACE, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
