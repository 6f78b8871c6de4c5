"""The engine over HTTP, as OpenAI's API; and a page to chat with, at /.

    browser, curl, openai ──HTTP──▶ asyncio (this file) ──submit──▶ engine, one thread
                          ◀─ JSON, or a line a token ──  ◀─listen──

    POST /v1/chat/completions, /v1/completions    api.py; "stream": true sends lines `data: {…}` (server-sent events)
    GET  /v1/models, /v1/models/NAME              the one model
    GET  /health, /metrics                        for whoever watches it; the second in Prometheus' text format
    GET  /                                        page.html

What a stranger may do to it. The server listens on the machine itself unless told otherwise, and then answers to no
other name, so no web page can reach it under a name of its own (DNS rebinding); a body must say that it is JSON, which
a browser sends for a foreign page only after it has asked, and is refused. Bodies, the time that one takes, waiting
requests and answers to one body are bounded. A client that leaves ends its answers at the next step.

Ctrl-C and SIGTERM end all answers after the step that runs. Whoever waits for one is told so, by a 503 or by the last
event of a stream (listening.py).
"""

import asyncio
import contextlib
import hmac
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from nanollm.errors import NanollmError
from nanollm.inference import api, request
from nanollm.inference.api import Asked, BadRequest
from nanollm.inference.context import past_context
from nanollm.inference.engine import Busy, Engine, Ticket
from nanollm.inference.listening import Uvicorn, bind, listen
from nanollm.inference.reply import Reply, Told, usage
from nanollm.inference.terminal import note

BODY = 8 << 20          # bytes
PATIENCE = 30.0         # seconds for a body to come
LOOPBACK = ("127.0.0.1", "::1", "localhost")
PAGE = Path(__file__).with_name("page.html")
# no outside asset, and nothing that a model writes is run
POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
log = logging.getLogger("nanollm.server")


@dataclass
class Server:
    """What the handlers share."""
    engine: Engine
    base: request.Request          # what holds where a body says nothing
    name: str                      # of the model
    key: str | None = None         # what a client must show
    local: bool = True             # answers to the names of the machine itself alone

    def __post_init__(self) -> None:
        self.started = int(time.time())

    def app(self) -> Starlette:
        """All routes, behind `guarded`."""
        def route(path: str, handler: Callable[[Request], Awaitable[Response]], method: str = "GET") -> Route:
            return Route(path, self.guarded(handler, open_to_all=path in ("/", "/health")), methods=[method])

        return Starlette(routes=[
            route("/", self.page), route("/health", self.health), route("/metrics", self.metrics),
            route("/v1/models", self.models), route("/v1/models/{name:path}", self.models),
            route("/v1/chat/completions", self.chat, "POST"), route("/v1/completions", self.completion, "POST"),
        ], exception_handlers={404: no_such_page, 405: other_method})

    def guarded(self, handler: Callable[[Request], Awaitable[Response]],
                open_to_all: bool) -> Callable[[Request], Awaitable[Response]]:
        """The handler, for those who may; what it raises becomes an answer."""
        async def answer(http: Request) -> Response:
            try:
                host = str(http.url.hostname)
                if self.local and host not in LOOPBACK:
                    raise BadRequest(f"host {host[:60]}: this server answers to localhost alone", status=403)
                shown = http.headers.get("authorization", "").removeprefix("Bearer ").encode()
                if self.key and not open_to_all and not hmac.compare_digest(shown, self.key.encode()):
                    raise BadRequest("expected Authorization: Bearer, and the key that the server was started with",
                                     status=401, code="invalid_api_key")
                return await handler(http)
            except ClientDisconnect:
                return Response(status_code=499)            # to nobody
            except Exception as error:
                return failed(error)

        return answer

    # ---- about the server

    async def page(self, http: Request) -> Response:
        """The chat in a browser."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": POLICY})

    async def health(self, http: Request) -> Response:
        """Whether the engine's thread runs."""
        thread = self.engine.thread
        well = thread is not None and thread.is_alive()
        return as_json({"status": "ok" if well else "the engine has stopped"}, 200 if well else 503)

    async def metrics(self, http: Request) -> Response:
        """Prometheus' text format, version 0.0.4."""
        engine, lines = self.engine, []
        for name, value in engine.counts.items():
            lines += [f"# TYPE nanollm_{name}_total counter", f"nanollm_{name}_total {value}"]
        now = {"running": len(engine.seated), "waiting": len(engine.waiting),
               "slots": engine.slots, "context_tokens": engine.length}
        for name, value in now.items():
            lines += [f"# TYPE nanollm_{name} gauge", f"nanollm_{name} {value}"]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def models(self, http: Request) -> Response:
        """The list of one, or that one by name."""
        asked, told = http.path_params.get("name"), {"id": self.name, "object": "model", "created": self.started,
                                                     "owned_by": "nanollm", "context_length": self.engine.length}
        if asked is None:
            return as_json({"object": "list", "data": [told]})
        self.check_model(asked)
        return as_json(told)

    def check_model(self, name: Any) -> None:
        """Raise BadRequest for a model that is not this one. A body may leave it out."""
        if name is not None and name != self.name:
            raise BadRequest(f"model {str(name)[:100]}: there is only {self.name}", "model", 404, "model_not_found")

    # ---- answers

    async def chat(self, http: Request) -> Response:
        """/v1/chat/completions."""
        return await self.answer(http, api.read_chat)

    async def completion(self, http: Request) -> Response:
        """/v1/completions."""
        return await self.answer(http, api.read_completion)

    async def answer(self, http: Request, read: Callable[[dict[str, Any], request.Request], Asked]) -> Response:
        """What either is asked for."""
        body = api.read_json(await read_body(http))
        self.check_model(body.get("model"))
        asked = await asyncio.to_thread(read, body, self.base)         # templates and grammars take their time
        changed, loop = asyncio.Event(), asyncio.get_running_loop()

        def listen(_: Ticket) -> None:                                  # in the engine's thread
            with contextlib.suppress(RuntimeError):                     # the loop is closed: nobody waits
                loop.call_soon_threadsafe(changed.set)

        replies = self.submit(asked, listen)
        told = Told(asked, self.name)
        if asked.stream:
            return StreamingResponse(self.stream(replies, told, changed), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        leaving = asyncio.ensure_future(left(http))
        try:
            while not all(reply.finished for reply in replies):
                await first_of(changed.wait(), leaving)
                if leaving.done():
                    raise ClientDisconnect
                changed.clear()
                for reply in replies:
                    reply.read()
                    if reply.finished and reply.ticket.error is not None:
                        raise reply.ticket.error
        finally:
            leaving.cancel()
            cancel(replies)
        return as_json(told.whole(replies))

    def submit(self, asked: Asked, listen: Callable[[Ticket], None]) -> list[Reply]:
        """All answers of a body into the queue, or none."""
        replies: list[Reply] = []
        try:
            for ids in asked.prompts:
                for sample in range(asked.request.n):
                    how = asked.request.next_seed(sample).how(continues=not asked.chat)
                    ticket = self.engine.submit(ids, asked.request.max_new_tokens, listen=listen, **how)
                    replies.append(Reply(asked, ticket, len(replies)))
        except NanollmError:
            cancel(replies)
            raise
        return replies

    async def stream(self, replies: list[Reply], told: Told, changed: asyncio.Event) -> AsyncIterator[str]:
        """The events of a streamed answer. Where the client leaves, it is closed, and the answers end."""
        try:
            for chunk in told.begin(replies):
                yield event(chunk)
            while not all(reply.finished for reply in replies):
                await changed.wait()
                changed.clear()
                for reply in replies:
                    new = None if reply.finished else reply.read()
                    if reply.finished and reply.ticket.error is not None:
                        yield event(failure(reply.ticket.error)[1])
                        return
                    if new is not None and (new["text"] or new["logprobs"] or reply.finished):
                        yield event(told.chunk([reply.delta(new)]))
            if told.asked.usage:
                yield event(told.chunk([], usage=usage(replies, len(told.asked.prompts))))
            yield "data: [DONE]\n\n"
        finally:
            cancel(replies)


def cancel(replies: list[Reply]) -> None:
    """End what has not ended."""
    for reply in replies:
        reply.ticket.cancel()


def as_json(value: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """In ASCII, which can spell half a surrogate pair, too."""
    return Response(json.dumps(value), status, headers, "application/json")


def event(value: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value)}\n\n"


def failure(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status and the body of an error; one that is none of our own is logged."""
    if not isinstance(error, NanollmError):
        log.error("a request failed", exc_info=error)
    return api.error_body(error)


def failed(error: Exception) -> Response:
    """The same as a response."""
    status, body = failure(error)
    return as_json(body, status, {"Retry-After": "1"} if isinstance(error, Busy) else None)


async def no_such_page(http: Request, error: Exception) -> Response:
    """404, which Starlette finds."""
    return failed(BadRequest(f"{http.method} {http.url.path[:100]}: there is no such page", status=404))


async def other_method(http: Request, error: Exception) -> Response:
    """405, which Starlette finds, with the methods that there are."""
    headers = getattr(error, "headers", None) or {}
    methods = " or ".join(name for name in headers.get("Allow", "").split(", ") if name != "HEAD")
    answer = failed(BadRequest(f"{http.method[:20]} {http.url.path[:100]}: expected {methods}", status=405))
    answer.headers.update(headers)
    return answer


async def read_body(http: Request) -> bytes:
    """The body. Raises BadRequest where it is no JSON, too long, or too slow."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise BadRequest(f"content-type {kind[:60] or 'none'}: expected application/json", status=415)
    declared = http.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > BODY:
        raise BadRequest(f"the body is {int(declared):,} bytes, expected at most {BODY:,}", status=413)
    try:
        return await asyncio.wait_for(whole_body(http), PATIENCE)
    except asyncio.TimeoutError:                            # noqa: UP041  # another error before Python 3.11
        raise BadRequest(f"the body did not come within {PATIENCE:.0f} s", status=408) from None


async def whole_body(http: Request) -> bytes:
    """All parts of a body. Raises BadRequest where they are too many."""
    data = bytearray()
    async for part in http.stream():
        data += part
        if len(data) > BODY:
            raise BadRequest(f"the body is longer than {BODY:,} bytes", status=413)
    return bytes(data)


async def left(http: Request) -> None:
    """Returns when the client has left."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def first_of(one: Any, other: "asyncio.Future[None]") -> None:
    """Wait for either; the first is given up where the second comes."""
    waiting = asyncio.ensure_future(one)
    try:
        await asyncio.wait({waiting, other}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()


class Running:
    """A server in a thread of its own: `with Running(server) as address:`; and what `serve` does in the foreground."""

    def __init__(self, server: Server, bound: socket.socket | None = None) -> None:
        """bound: where to listen (`bind`); None: at any port of this machine that is free."""
        self.socket = bound or bind("127.0.0.1", 0)
        host, port = listen(self.socket)
        self.server, self.address = server, f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self.uvicorn = Uvicorn(server.app(), server.engine)

    def run(self) -> None:
        """Until Ctrl-C, or until `uvicorn.should_exit`."""
        self.server.engine.start()
        try:
            self.uvicorn.run(sockets=[self.socket])
        finally:
            self.server.engine.close()

    def __enter__(self) -> str:
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        return self.address

    def __exit__(self, *_: Any) -> None:
        self.uvicorn.should_exit = True
        self.thread.join()


def serve(server: Server, host: str, bound: socket.socket) -> None:
    """In the foreground, until Ctrl-C. bound: `bind` of the host."""
    server.local = host in LOOPBACK
    running, engine = Running(server, bound), server.engine
    if told := past_context(engine.model.config, engine.length):
        note(f"warning: --context: {told}")
    if not server.local and server.key is None:
        note(f"warning: --host {host} without --api-key: whoever reaches this machine can use the model")
    note(f"[{server.name} at {running.address}, {engine.slots} answers at once of up to {engine.length:,} tokens; "
         "Ctrl-C ends it]")
    running.run()
