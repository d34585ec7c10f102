"""The line between the processes of one run: who is there, who fell silent, when all stop, and how all end together.

Every process has a TCP connection to process 0 and sends JSON lines. jax's own heartbeats end a process late, with a
stack trace that names nobody; a closed connection is seen at once. Whoever can reach the port can end the run: it
belongs on a private network, as jax's own ports do.
"""

import contextlib
import json
import os
import queue
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

BEAT = 2.0  # seconds between two signs of life
SILENCE = 20.0  # seconds without a sign after which a process is given up: stopped, swapping, cut off
JOIN = 300.0  # seconds that the processes may take to start
FINALIZE = 300.0  # seconds that the others may need to their end after the first has come to its own
OWN_ID = "every process needs its own --process-id below the same --num-processes"
RESUME = "what was saved stays, and the same command resumes"
Meeting = tuple[dict[int, socket.socket], list[str], Any]  # connections, names of all, what process 0 began with


class RollCall:
    """One process's end of the line, served by a thread.

    names: of all processes. connections: on process 0 `{index: socket}` of the others, elsewhere `{0: socket}`. When a
    process is lost or fails, every process prints one line that names it, and ends with `os._exit`: one that waits for
    a collective cannot be asked.
    """

    def __init__(self, index: int, names: list[str], connections: Mapping[int, socket.socket]):
        self.index, self.names = index, names
        self._connections = dict(connections)
        self._unread = dict.fromkeys(connections, b"")
        self._heard = dict.fromkeys(connections, time.monotonic())
        self._orders: queue.SimpleQueue = queue.SimpleQueue()  # of the main thread, for the thread that serves
        self._woken, self._wake = socket.socketpair()
        self._values: queue.SimpleQueue = queue.SimpleQueue()
        self._gate = threading.Lock()  # closed while the processes agree on the last step
        self._done, self._last, self._asked = 0, None, False
        self._counts: dict[int, int] = {}
        self._finished: set[int] = set()
        self._closed = threading.Event()
        self._failure: str | None = None
        self._gap = 0.0  # seconds between the last two rounds of the thread
        self._stderr = os.dup(2)  # a worker turns the output of a run into its log
        self._thread = threading.Thread(target=self._serve, name="roll call", daemon=True)
        self._thread.start()

    # What the main thread calls.

    def stop_requested(self, asked_here: bool) -> bool:
        """Whether all processes stop now; every process must ask after every step.

        At the first request all wait and send process 0 their counts; the last step is one after the greatest.
        """
        with self._gate:
            self._done += 1
            if asked_here and not self._asked:
                self._asked = True
                self._order("stop", None)
            return self._last is not None and self._done >= self._last

    def from_first(self, value: Any) -> Any:
        """Process 0's value, plain JSON data, on every process; all must call it in the same order."""
        if self.index:
            return self._values.get()
        self._order("value", value)
        return value

    def finalize(self) -> None:
        """Waits until every process has come here, and closes the line."""
        self._order("finalize", None)
        if not self._closed.wait(FINALIZE):
            self.fail(f"it is done, and the others are not, {FINALIZE:.0f} s later", 1)
        self._thread.join()

    def fail(self, text: str, code: int) -> NoReturn:
        """Ends all processes with this exit code because this one failed."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._failure = f"failed: {text}"
        self._order("end", [self.index, self._failure, code])
        while True:  # the other thread ends the process
            time.sleep(BEAT)

    def _order(self, what: str, value: Any) -> None:
        self._orders.put((what, value))
        self._wake.send(b".")

    # What the thread does.

    def _serve(self) -> None:
        selector = selectors.DefaultSelector()
        for index, connection in self._connections.items():
            selector.register(connection, selectors.EVENT_READ, index)
        selector.register(self._woken, selectors.EVENT_READ, self.index)
        last = beaten = time.monotonic()
        while not self._closed.is_set():
            ready = selector.select(BEAT / 2)
            now = time.monotonic()
            self._gap, last = now - last, now
            if self._gap > SILENCE:
                self._end(self.index, f"stood still for {self._gap:.0f} s; {RESUME}", 1)
            for key, _ in ready:
                if key.data != self.index:
                    self._read(key.data, now)
                    continue
                self._woken.recv(4096)
                while not self._orders.empty():
                    self._tell_first(*self._orders.get())
            if now - beaten >= BEAT:
                beaten = now
                self._send("beat", None)
            for index, heard in self._heard.items():
                if now - heard > SILENCE and not self._closed.is_set():
                    self._end(index, f"was not heard of for {SILENCE:.0f} s; {RESUME}", 1)
        self._drain()
        for thing in (selector, self._woken, self._wake, *self._connections.values()):
            thing.close()
        os.close(self._stderr)

    def _tell_first(self, what: str, value: Any) -> None:
        self._send(what, value) if self.index else self._handle(0, what, value)

    def _read(self, index: int, now: float) -> None:
        try:
            data = self._connections[index].recv(65536)
        except OSError:
            data = b""
        if not data and self._gap > SILENCE / 2:  # the others gave this one up
            self._end(self.index, f"stood still for {self._gap:.0f} s; {RESUME}", 1)
        if not data:
            self._end(index, f"was killed or crashed; {RESUME}", 1)
        self._heard[index] = now
        *lines, self._unread[index] = (self._unread[index] + data).split(b"\n")
        for line in lines:
            self._handle(index, *json.loads(line))

    def _handle(self, index: int, what: str, value: Any) -> None:
        """One message from process `index`; the same protocol serves process 0 (which decides) and the others."""
        if what == "stop" and not self._counts:
            self._tell_all("count", None)
        elif what == "count":
            self._gate.acquire()
            self._tell_first("done", self._done)
        elif what == "done":
            self._counts[index] = value
            if len(self._counts) == len(self.names):
                self._tell_all("last", max(self._counts.values()) + 1)
        elif what == "last":
            self._last = value
            self._gate.release()
        elif what == "value":
            self._values.put(value) if self.index else self._send("value", value)
        elif what == "finalize":
            self._finished.add(index)
            if len(self._finished) == len(self.names):
                self._tell_all("closed", None)
        elif what == "closed":
            self._closed.set()
        elif what == "end":
            self._end(*value)

    def _tell_all(self, what: str, value: Any) -> None:
        self._send(what, value)
        self._handle(0, what, value)

    def _send(self, what: str, value: Any) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(OSError):  # closed: reading says so, and says whose it was
                _send_line(connection, [what, value])

    def _end(self, process: int, text: str, code: int) -> NoReturn:
        """Tells whom it can that the run ends, prints why, and ends; process 0 lets the others go first."""
        self._send("end", [process, text, code])
        me, other = self.names[self.index], self.names[process]
        if process == self.index or self._failure not in (None, text):
            line = f"{me} {self._failure or text}"
        else:  # the same failure everywhere, such as an invalid option, is printed by one
            line = "" if self._failure else f"{me} ends because {other} {text}"
        for number in (2, self._stderr) if line else ():
            if number == 2 or not os.path.sameopenfile(2, number):
                os.write(number, f"error: {line}\n".encode())
        self._drain()
        os._exit(code)

    def _drain(self) -> None:
        """On process 0, waits for the others to close: closing with unread data would lose what was sent last."""
        deadline = time.monotonic() + BEAT
        for connection in self._connections.values() if self.index == 0 else ():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
                while (left := deadline - time.monotonic()) > 0:
                    connection.settimeout(left)
                    if not connection.recv(65536):
                        break


def gather(address: str, count: int, start: Callable[[], Any], timeout: float = JOIN) -> Meeting:
    """On process 0: waits for the others, gives each the names of all and what `start()` returns, and returns them."""
    host, port = split(address)
    deadline = time.monotonic() + timeout
    connections: dict[int, socket.socket] = {}
    names = {0: name_of(0, count)}
    with contextlib.ExitStack() as refused, _listen(host, port) as server:
        while len(names) < count:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = ", ".join(str(index) for index in range(count) if index not in names)
                late = f"of {count} processes, these have not come to {address} within {timeout:.0f} s: {missing}"
                hint = "Start them, or correct --num-processes; see that their hosts can reach this one"
                raise ValueError(f"{late}. {hint}") from None
            if hello := _hello(connection):
                refused.callback(connection.close)
                index, of, name = hello
                if of != count or not 0 < index < count or index in names:
                    text = f"process {index} of {of} came to {address}, where process 0 of {count} waits"
                    text += f" and {names[index]} has come" if index in names else ""
                    _send_line(connection, ["refused", text])
                    raise ValueError(f"{text}; {OWN_ID}")
                connections[index], names[index] = connection, name
        refused.pop_all()
    ordered, begin = [names[index] for index in range(count)], start()
    for connection in connections.values():
        _send_line(connection, ["start", [ordered, begin]])
    return connections, ordered, begin


def join(address: str, index: int, count: int, timeout: float = JOIN) -> Meeting:
    """On the other processes: the counterpart of `gather`, with the same result."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            connection = socket.create_connection(split(address), timeout=max(deadline - time.monotonic(), 0.001))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                alone = f"process {index} of {count} reached nobody at {address} for {timeout:.0f} s ({error})"
                raise ValueError(f"{alone}: is process 0 started, and can this host reach it?") from None
            time.sleep(0.2)
    _send_line(connection, [index, count, name_of(index, count)])
    connection.settimeout(timeout)
    try:
        what, value = _read_line(connection) or ("refused", f"process 0 at {address} went away")
    except TimeoutError:
        what, value = "refused", f"process 0 at {address} still waits for others after {timeout:.0f} s"
    if what != "start":
        connection.close()
        raise ValueError(f"{value}; {OWN_ID}")
    connection.settimeout(None)
    return {0: connection}, *value


def name_of(index: int, count: int) -> str:
    """How messages name this process."""
    return f"process {index} of {count} ({socket.gethostname()}, pid {os.getpid()})"


def split(address: str) -> tuple[str, int]:
    """HOST:PORT or [HOST]:PORT in its parts; raises ValueError for anything else."""
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 2**16):
        raise ValueError(f"the coordinator {address!r} is no HOST:PORT; expected such as node1:12345")
    return host.strip("[]"), int(port)


def _listen(host: str, port: int) -> socket.socket:
    """A server at the port: of the loop-back address alone where that is the host, else of all addresses."""
    place = ("127.0.0.1" if host in ("localhost", "127.0.0.1") else "", port)
    both = not place[0] and socket.has_dualstack_ipv6()
    try:
        return socket.create_server(place, family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)
    except OSError as error:
        raise ValueError(f"process 0 cannot listen on port {port} ({error.strerror}); choose another port") from None


def _hello(connection: socket.socket) -> tuple[int, int, str] | None:
    """(index, count, name) of a process that comes; None, and its connection closed, for anything else."""
    connection.settimeout(5)
    try:
        index, count, name = _read_line(connection)
        connection.settimeout(None)
        return int(index), int(count), str(name)
    except (OSError, TypeError, ValueError):
        connection.close()
        return None


def _send_line(connection: socket.socket, value: Any) -> None:
    connection.sendall(json.dumps(value).encode() + b"\n")


def _read_line(connection: socket.socket) -> Any:
    """One line, unbuffered so that nothing behind it is taken; None where the connection is closed."""
    with connection.makefile("rb", buffering=0) as file:
        line = file.readline(2**20)
    return json.loads(line) if line.endswith(b"\n") else None
