"""The connections of the server: bound before it loads anything, ended where uvicorn would keep them for ever."""

import asyncio
import contextlib
import socket

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD, UNREAD = 5.0, 30.0  # seconds


class Connection(H11Protocol):
    """Ends connections that uvicorn would keep: a head of more than HEAD seconds, and an answer that nobody reads."""

    timer: asyncio.TimerHandle | None = None
    unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        for timer in filter(None, (self.timer, self.unread)):
            timer.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.get_write_buffer_size() and not self.unread:  # a timer keeps the connection in memory
            self.unread = self.loop.call_later(UNREAD, self._end_unread)

    def _end_unread(self) -> None:
        self.unread = None
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self.transport.abort()

    def _watch(self) -> None:
        waiting = self.cycle is None or self.cycle.response_complete
        if waiting and self.timer is None:
            self.timer = self.loop.call_later(HEAD, self.transport.abort)
        elif not waiting and self.timer:
            self.timer.cancel()
            self.timer = None


class Announced(uvicorn.Server):
    """Says where it listens when it does."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            host, port = sockets[0].getsockname()[:2]
            print(f"ready: http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet; OSError names the address, before the network is loaded."""
    with contextlib.ExitStack() as on_error:
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            bound = on_error.enter_context(socket.socket(family, kind))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{port} ({error}); choose another --host or --port") from None
        on_error.pop_all()
    return bound
