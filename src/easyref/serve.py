"""`easyref serve` and `easyref ui`: one model behind HTTP, one drawing at a time; `ui` adds the page in easyref/ui/.

| | |
|---|---|
| `POST /generate` | a `Drawing` → images; while it draws, as lines of JSON, if asked with `Accept: application/x-ndjson` |
| `POST /references` | bytes of an image file → its sha256, which `/generate` takes for a while, and its settings if easyref drew it |
| `GET /references/{sha256}` | the same of one that is still here |
| `GET /model` | what draws, and its limits |
| `GET /health` | for whoever watches; needs no token |

A client that goes away ends its drawing at the next step. Where too many wait: 503 and when to come again.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import secrets
import socket
import threading
import time
import traceback
import webbrowser
from base64 import b64decode
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import uvicorn
from cachetools import LRUCache
from fastapi import FastAPI, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from easyref.drawing import MAX_BATCH, MAX_SEED, Artist, GenerateRequest, GenerateResponse, Reference, Settings, Wish, within
from easyref.images import Limits, open_image
from easyref.page import data_uri
from easyref.records import sha256_bytes

PAGE = Path(__file__).parent / "ui"
LINES = "application/x-ndjson"
MAX_BYTES = Limits().max_bytes  # of a request
KEPT_BYTES = 512 * 2**20  # of uploaded references
RANDOM_SEEDS = 10**6  # short enough to be told to someone
THUMBNAIL = 320  # pixels
HEARTBEAT = 1.0  # seconds between words to one who waits


class Drawing(GenerateRequest):
    """One prompt. Images have the seeds `seed`, `seed` + 1 …; without `seed`, a random one."""

    references: list[str] = Field(
        default=[], description="sha256 of an uploaded file, base64 of an image file, or a path below EASYREF_REFERENCES"
    )
    prompt: str = ""
    num: int = 1


class Event(BaseModel):
    """A line of the stream: how many are before this one; then the steps done; then the images, or what went wrong."""

    ahead: int | None = None
    step: int | None = None
    steps: int | None = None
    images: list[GenerateResponse] | None = None
    error: str | None = None


class Images(BaseModel):
    images: list[GenerateResponse]


class Kept(BaseModel):
    """An uploaded file. `settings`: how easyref drew it, if it did."""

    name: str
    sha256: str
    width: int
    height: int
    thumbnail: str
    settings: Settings | None


class ModelInfo(BaseModel):
    name: str
    sha256: str
    max_references: int
    max_images: int
    max_bytes: int
    side: int
    blocks: list[str]
    defaults: Wish


class Health(BaseModel):
    status: str
    drawing: int
    waiting: int


class Stopped(Exception):
    """Whoever asked went away."""


class Busy(Exception):
    def __init__(self, seconds: int) -> None:
        super().__init__(f"too many wait; come again in {seconds} s")
        self.seconds = seconds


def first_line(error: Exception | str) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class Queue:
    """Drawings one at a time, in the order they came."""

    def __init__(self, artist: Artist, max_waiting: int) -> None:
        self.artist, self.max_waiting = artist, max_waiting
        self.pool = ThreadPoolExecutor(1, "drawing")
        self.jobs: list[Future[None]] = []  # that is drawn, then those that wait
        self.seconds = 5.0  # what the last one took

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def check_room(self) -> None:
        if len(self.jobs) > self.max_waiting:
            raise Busy(max(1, math.ceil(self.seconds * len(self.jobs))))

    def draw(self, wish: Wish, read: Callable[[], list[Reference]], seeds: list[int]) -> AsyncGenerator[Event]:
        """What happens to a drawing, to its end. Closing this stops it. Busy where too many wait. `read`: the references, when it is
        their turn: decoded, those of all who wait could fill the memory."""
        self.check_room()
        loop, events, stop = asyncio.get_running_loop(), asyncio.Queue[Event](), threading.Event()

        def tell(**what: Any) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, Event(**what))

        def step(number: int) -> None:
            if stop.is_set():
                raise Stopped
            tell(step=number, steps=wish.steps)

        def work() -> None:
            try:
                begin = time.monotonic()
                step(0)
                drawn = self.artist.draw(wish, read(), seeds, step)
                self.seconds = time.monotonic() - begin
                tell(images=[GenerateResponse.of(png, seed) for png, seed in zip(drawn, seeds, strict=True)])
            except Stopped:
                pass
            except ValueError as error:
                tell(error=first_line(error))
            except Exception as error:
                traceback.print_exc()
                tell(error=f"{type(error).__name__}: {first_line(error)}; more in the server's log")

        events.put_nowait(Event(ahead=len(self.jobs)))
        job = self.pool.submit(work)
        self.jobs.append(job)
        job.add_done_callback(self.jobs.remove)
        return self._follow(job, events, stop)

    async def _follow(self, job: Future[None], events: asyncio.Queue[Event], stop: threading.Event) -> AsyncGenerator[Event]:
        try:
            while True:
                try:
                    event = await asyncio.wait_for(events.get(), HEARTBEAT)
                except TimeoutError:
                    event = Event(ahead=self.jobs.index(job) if job in self.jobs else 0)
                yield event
                if event.images is not None or event.error is not None:
                    return
        finally:
            stop.set()
            job.cancel()


class Guard:
    """Before any handler: whose request it is, and how large it may be.

    Without a token only this machine's own pages and programs are served: a page of another site can neither send here (Origin) nor
    take a name of its own for this machine (Host).
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None
        if refused := self._refuse(scope["path"], Headers(scope=scope)):
            while (await receive()).get("more_body"):  # who is still sending would not read the answer
                pass
            return await refused(scope, receive, send)
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > MAX_BYTES:
                raise too_large()
            return message

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *POLICY]
            await send(message)

        return await self.app(scope, counted, with_policy)

    def _refuse(self, path: str, headers: Headers) -> Response | None:
        host = headers.get("host", "")
        if self.token is None and not is_loopback(hostname(host)):
            return fault(403, f"host {host!r}: served to this machine only, as http://127.0.0.1")
        if (origin := headers.get("origin")) and origin.partition("://")[2] != host:
            return fault(403, f"origin {origin!r}: pages of other sites are not served")
        if self.token is not None and path != "/health" and not hmac.compare_digest(given_token(headers), self.token.encode()):
            return fault(401, "a token is needed: Authorization: Bearer TOKEN", {"WWW-Authenticate": 'Basic realm="easyref"'})
        if int(headers.get("content-length", "0")) > MAX_BYTES:
            error = too_large()
            return fault(error.status_code, error.detail)
        return None


POLICY = [
    (b"content-security-policy", b"default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; form-action 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


def given_token(headers: Headers) -> bytes:
    """Of `Bearer TOKEN`, or the password of `Basic`, which a browser asks its user for."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "basic":
        try:
            return b64decode(value).partition(b":")[2]
        except ValueError:
            return b""
    return value.encode("latin-1") if kind.lower() == "bearer" else b""  # as headers are decoded


def hostname(host: str) -> str:
    """Of HOST:PORT; nothing where that is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def too_large() -> HTTPException:
    return HTTPException(413, f"over {MAX_BYTES // 2**20} MiB; send smaller images, or upload each on its own")


def fault(status: int, error: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": first_line(error)}, status, headers)


def create_app(artist: Artist, max_waiting: int, token: str | None = None, page: bool = False) -> FastAPI:
    """The server's application."""
    queue = Queue(artist, max_waiting)
    kept: LRUCache[str, tuple[str, bytes]] = LRUCache(KEPT_BYTES, getsizeof=lambda file: len(file[1]))

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        queue.close()

    app = FastAPI(title="easyref", docs_url=None, redoc_url=None, lifespan=life)  # the pages of FastAPI's docs load from elsewhere
    app.add_middleware(Guard, token=token)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return fault(422, f"{'.'.join(map(str, first['loc'][1:])) or 'body'}: {first['msg']}")

    @app.exception_handler(ValueError)
    async def _wrong(_: Request, error: ValueError) -> Response:
        return fault(400, str(error))

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> Response:
        return fault(error.status_code, error.detail)

    @app.exception_handler(Busy)
    async def _busy(_: Request, error: Busy) -> Response:
        return fault(503, str(error), {"Retry-After": str(error.seconds)})

    @app.get("/health")
    async def health() -> Health:
        return Health(status="ok", drawing=min(1, len(queue.jobs)), waiting=max(0, len(queue.jobs) - 1))

    @app.get("/model")
    async def model() -> ModelInfo:
        return ModelInfo(
            name=artist.name,
            sha256=artist.sha256,
            max_references=artist.max_references,
            max_images=MAX_BATCH,
            max_bytes=MAX_BYTES,
            side=artist.side,
            blocks=artist.blocks,
            defaults=Wish(),
        )

    @app.post("/references")
    async def upload(request: Request, name: Annotated[str, Query(max_length=255)] = "image") -> Kept:
        data = await request.body()
        found = await run_in_threadpool(look, Path(name).name, data)
        kept[found.sha256] = (found.name, data)
        return found

    @app.get("/references/{sha256}")
    async def uploaded(sha256: str) -> Kept:
        if sha256 not in kept:
            raise HTTPException(404, "not here, or not any more; upload it again")
        return await run_in_threadpool(look, *kept[sha256])

    @app.post("/generate", response_model=Images)
    async def generate(asked: Drawing, request: Request) -> Any:
        queue.check_room()
        wish = asked.wish()
        within("num", asked.num, 1, MAX_BATCH)
        first = secrets.randbelow(RANDOM_SEEDS) if asked.seed is None else asked.seed
        within("seed", first + asked.num - 1, 0, MAX_SEED)
        here = {digest: kept[digest] for digest in [*asked.references, *(asked.negative_references or [])] if digest in kept}
        read = partial(asked.read, here.get)
        artist.check(wish, await run_in_threadpool(read))
        events = queue.draw(wish, read, list(range(first, first + asked.num)))
        if LINES in request.headers.get("accept", ""):
            return StreamingResponse((event.model_dump_json(exclude_none=True) + "\n" async for event in events), media_type=LINES)
        try:
            async for event in events:
                if event.error is not None:
                    raise HTTPException(500, event.error)
                if event.images is not None:
                    return Images(images=event.images)
                if await request.is_disconnected():
                    break
        finally:
            await events.aclose()
        raise HTTPException(499, "the client went away")

    if page:
        app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app


def look(name: str, data: bytes) -> Kept:
    """What is seen of an image file. ImageError if it is none."""
    image = open_image(data, name)
    try:
        settings = Settings.read(data, name)
    except ValueError:  # of another version: an image like any other
        settings = None
    size = image.size
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return Kept(
        name=name, sha256=sha256_bytes(data), width=size[0], height=size[1], thumbnail=data_uri(image), settings=settings
    )  # fmt: skip


def check_host(host: str, token: str | None) -> None:
    """ValueError where other machines could ask without a token."""
    if not is_loopback(host) and not token:
        raise ValueError(f"--host {host}: other machines could draw here; set EASYREF_TOKEN to a secret that they must know")


def serve(artist: Artist, host: str, port: int, max_waiting: int, token: str | None, page: bool, browser: bool) -> None:
    """Until Ctrl-C. Prints its address once it listens."""
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(f"{host}:{port}: {error.strerror}; give another with --port or --host") from error
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listening.getsockname()[1]}"
    print(address, flush=True)
    if browser:
        webbrowser.open(address)
    config = uvicorn.Config(create_app(artist, max_waiting, token, page), log_level="warning", timeout_graceful_shutdown=2)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])
