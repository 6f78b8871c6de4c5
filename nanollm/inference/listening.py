"""Where the server listens, and how it stops.

    bind        before the model is loaded: an address that is not to be had is said at once
    listen      once there is somebody to answer; until then a client is refused, and not kept waiting
    Ctrl-C      or SIGTERM: the engine ends all answers after the step that runs, and whoever waits for one is told so.
                Whoever takes longer than PARTING to send or to read is hung up on
    again       the process is gone
"""

import asyncio
import errno
import os
import socket
from types import FrameType
from typing import Any

import uvicorn

from nanollm.errors import InputError, counted
from nanollm.inference.engine import Engine, Stopped
from nanollm.inference.terminal import note

CONNECTIONS = 1024
PARTING = 0.5           # seconds after the last step


def bind(host: str, port: int) -> socket.socket:
    """Take an address. Port 0: any that is free. Raises InputError where it is not to be had."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if os.name == "posix":                              # elsewhere it would share the port with another server
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise not_to_be_had(host, port, error) from None
    return bound


def listen(bound: socket.socket) -> tuple[str, int]:
    """Begin to listen; the host and the port. Raises InputError where another program was quicker."""
    host, port = bound.getsockname()[:2]
    try:
        bound.listen()
    except OSError as error:
        raise not_to_be_had(host, port, error) from None
    return host, port


def not_to_be_had(host: str, port: int, error: OSError) -> InputError:
    """What to say of an address: whether it is the port's fault or the host's."""
    if error.errno == errno.EADDRINUSE:
        return InputError(f"--port {port}: another program listens there, at {host}; give another port")
    if error.errno in (errno.EACCES, errno.EPERM):
        return InputError(f"--port {port}: this user may not listen there; expected a port from 1024")
    return InputError(f"--host {host}: {error.strerror or error}; expected an address of this machine, or 0.0.0.0 for "
                      "all that it has")


class Uvicorn(uvicorn.Server):
    """uvicorn, but for how it stops."""

    def __init__(self, app: Any, engine: Engine) -> None:
        super().__init__(uvicorn.Config(app, log_level="warning", limit_concurrency=CONNECTIONS, access_log=False,
                                        lifespan="off"))
        self.engine, self.stopping = engine, False

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End all answers, then all connections."""
        self.stopping = True
        cut = len(self.engine.seated) + len(self.engine.waiting)
        note(f"[the server stops; {counted(cut, 'answer')} cut short]")
        parting = asyncio.create_task(self.part())
        await super().shutdown(sockets)
        parting.cancel()

    async def part(self) -> None:
        """Close the engine, and after a while whatever connection is still open."""
        await asyncio.to_thread(self.engine.close, Stopped("the server was stopped before the answer was whole"))
        await asyncio.sleep(PARTING)
        for connection in list(self.server_state.connections):
            connection.transport.abort()                    # who reads or writes there hears that the client has left

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of the signals. There are wrappers that hand one Ctrl-C on twice, so a second one counts from `shutdown` on,
        a tenth of a second later."""
        if self.stopping:
            os._exit(128 + sig)
        super().handle_exit(sig, frame)
