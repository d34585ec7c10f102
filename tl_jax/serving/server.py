"""An exported network behind HTTP: /predict, /health, /metadata, /metrics, and a page to drop a picture on."""

import asyncio
import base64
import collections
import contextlib
import hashlib
import ipaddress
import itertools
import json
import logging
import pathlib
import re
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import prometheus_client
import threadpoolctl
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from tl_jax.api.inputs import as_texts
from tl_jax.api.model import read_input
from tl_jax.core.messages import brief
from tl_jax.data.image import decode
from tl_jax.data.image.augment import make_preprocess
from tl_jax.runtime.log import tolerate
from tl_jax.serving import artefact, neighbours, program
from tl_jax.serving.batches import Batcher, Busy, padded
from tl_jax.serving.connections import Announced, Connection, bind
from tl_jax.serving.drift import LEAST
from tl_jax.serving.drift_monitor import Log, Monitor
from tl_jax.serving.texts import Texts
from tl_jax.tasks import answers, trust
from tl_jax.training.steps import FEATURES

SIZES = (1, 2, 4, 8)  # of batches, all compiled before the first request
COLUMNS = 20  # of the monitor that /health shows
NEAREST = 20  # training examples that are shown at most
BEHIND = 32  # batches that are answered and not yet in the log
READERS = 2  # threads that decode images
PAGE = pathlib.Path(__file__).parents[1] / "assets/serve.html"
TAKEN = 'an image (image/*), images (multipart/form-data) or JSON {"inputs": [...]} (application/json)'


class Limits(NamedTuple):
    """What one server takes."""

    body: int = 20 * 2**20  # bytes of a request
    pixels: int = 40_000_000  # of an image
    examples: int = 32  # of a request
    queue: int = 64  # examples on their way at a time
    seconds: float = 30.0  # until a request is answered


class Refused(Exception):
    """A request that cannot be answered: the HTTP status, and why."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Counts:
    """What /metrics tells, in a registry of its own."""

    def __init__(self, pending: Callable[[], int], monitor: Monitor | None):
        self.registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self.registry)
        made = {"registry": self.registry}
        self.requests = prometheus_client.Counter("tl_jax_requests", "answered, by HTTP status", ["status"], **made)
        self.seconds = prometheus_client.Histogram(
            "tl_jax_request_seconds", "from the first byte to the answer", **made
        )
        self.batches = prometheus_client.Histogram("tl_jax_batch_size", "examples of a batch", buckets=SIZES, **made)
        waiting = prometheus_client.Gauge("tl_jax_pending", "examples on their way", **made)
        waiting.set_function(pending)
        for name, text in (("alarm", "1 where an alarm was raised"), ("p", "the smallest p of the last look")):
            if monitor:
                drift = prometheus_client.Gauge(f"tl_jax_drift_{name}", text, **made)
                drift.set_function(lambda name=name: float(monitor.state()[name]))


class Server:
    """The routes around one exported network; `app` is the ASGI application."""

    def __init__(self, network: artefact.Exported, limits: Limits, log: str = "", host: str = "127.0.0.1"):
        self.network, self.limits, self.ready = network, limits, False
        self.preprocess = make_preprocess(network.card) if network.card.input == "image" else None
        examples = network.folder / artefact.EXAMPLES
        self.examples = neighbours.load(examples) if examples.exists() else None
        self.texts = Texts(network.card) if network.card.input == "text" else None
        stack = self.texts.stack if self.texts else padded
        self.batcher = Batcher(lambda x: artefact.run(network, x), SIZES, limits.queue, stack)
        reference, self.log = network.reference, Log(log, network.spec) if log else None
        enough = reference is not None and len(reference.values) >= 2 * LEAST
        self.monitor = Monitor(reference) if enough else None
        self.counts = Counts(lambda: self.batcher.pending, self.monitor)
        self.readers, self.watcher = ThreadPoolExecutor(READERS), ThreadPoolExecutor(1)
        self.batcher.seen, self.unseen = self.seen, collections.deque[asyncio.Future]()
        routes = {"/": self.page, "/health": self.health, "/metadata": self.metadata, "/metrics": self.metrics}
        found = [Route(path, its, methods=["GET"]) for path, its in routes.items()]
        found.append(Route("/predict", self.answered(self.predict), methods=["POST"]))
        self.app = Starlette(routes=found, lifespan=self.lifespan, middleware=_guards(host))
        self.text = PAGE.read_text()
        parts = {kind: re.findall(rf"<{kind}>(.*?)</{kind}>", self.text, re.DOTALL) for kind in ("script", "style")}
        allowed = {kind: " ".join(map(_source, texts)) for kind, texts in parts.items()}
        self.policy = (
            f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; "
            "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    async def seen(self, outputs: dict[str, np.ndarray]) -> None:
        """Counts a batch; what else is done with it takes a thread of its own, which is BEHIND batches late at most."""
        self.counts.batches.observe(len(outputs[FEATURES]))
        self.unseen.append(asyncio.get_running_loop().run_in_executor(self.watcher, self.observe, outputs))
        if len(self.unseen) > BEHIND:
            await self.unseen.popleft()

    def observe(self, outputs: dict[str, np.ndarray]) -> None:
        """Writes a batch to the log and shows it to the monitor, whose first alarm is printed."""
        features = outputs[FEATURES]
        (values,) = (x for name, x in outputs.items() if name != FEATURES)
        for each in zip(values, features, strict=True):
            if not all(np.isfinite(x).all() for x in each):
                continue  # it was refused
            with tolerate("log of the server"):
                if self.log:
                    self.log.append(*each)
            with tolerate("monitor of the server"):
                before = self.monitor and self.monitor.state()["alarm"]
                if self.monitor and self.monitor.add(*each) and not before:
                    print(f"drift: {_drift(self.monitor.state())}", flush=True)

    def warm(self) -> None:
        """Compiles and runs the program for every size of a batch."""
        card, kind = self.network.card, program.input_type(self.network.card)
        shapes = [(card.texts * length, 2) for length in self.texts.lengths] if self.texts else [card.shape]
        for size, shape in itertools.product(SIZES, shapes):
            artefact.run(self.network, np.zeros((size, *shape), kind))

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        await asyncio.get_running_loop().run_in_executor(None, self.warm)
        self.worker = asyncio.create_task(self.batcher.run())
        self.ready = True
        yield
        self.ready = False
        self.worker.cancel()
        await asyncio.get_running_loop().run_in_executor(None, self.watcher.shutdown)  # the log has every answer

    def answered(self, route: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Awaitable[Response]]:
        """The route with a JSON answer within the time, whatever it meets; counted."""

        async def handle(request: Request) -> Response:
            began, headers = time.perf_counter(), {}
            try:
                async with asyncio.timeout(self.limits.seconds):
                    status, found = 200, await route(request)
            except Refused as refused:
                status, found = refused.status, {"error": str(refused)}
            except Busy:
                status, headers = 429, {"Retry-After": "1"}
                found = {"error": f"{self.limits.queue} examples are on their way, the most that are taken: try again"}
            except TimeoutError:
                status, found = 408, {"error": f"not read and answered within {self.limits.seconds:g} seconds"}
            except ClientDisconnect:
                status, found = 400, {"error": "the connection was closed before the request was complete"}
            except Exception as error:  # ours: counted as such, and told in the log
                traceback.print_exc()
                status, found = 500, {"error": f"the server failed ({type(error).__name__}); its log says more"}
            self.counts.requests.labels(status).inc()
            self.counts.seconds.observe(time.perf_counter() - began)
            return _json(found, status, headers)

        return handle

    async def predict(self, request: Request) -> dict[str, Any]:
        if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            raise Refused(403, "a page of another site asks, which may not speak for whoever looks at it")
        count = _count(request.query_params.get("nearest", "0"))
        with self.batcher.admitted(1):  # before the body, whose bytes take memory
            items = await self._items(request, await self._body(request))
            if not 1 <= len(items) <= self.limits.examples:
                raise Refused(413 if items else 400, f"{len(items)} inputs, expected 1 to {self.limits.examples}")
            with self.batcher.admitted(len(items) - 1):
                rows = await asyncio.gather(*(self._answer(*item, count) for item in items))
        if all("error" in row for row in rows):
            raise Refused(400, "; ".join(f"{row['file']}: {row['error']}" for row in rows))
        return {"model": self.network.card.model, "answers": rows}

    async def _body(self, request: Request) -> bytes:
        length = request.headers.get("content-length", "0")
        body, most = bytearray(), self.limits.body
        if not length.isdecimal() or int(length) <= most:
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    break
            else:
                return bytes(body)
        raise Refused(413, f"a request of more than {most:,} bytes")

    async def _items(self, request: Request, body: bytes) -> list[tuple[str, Any]]:
        """(name, what `read_input` takes) of every input of a request."""
        kind, card = request.headers.get("content-type", "").partition(";")[0].strip().lower(), self.network.card
        if kind == "application/json":  # 20 MB of it take seconds
            return await asyncio.get_running_loop().run_in_executor(self.readers, _json_items, body, card)
        if card.input == "text" and kind == "text/plain":
            try:
                return [("text", (body.decode(),))]
            except UnicodeDecodeError:
                raise Refused(400, "the text is not UTF-8") from None
        if card.input != "image":
            what = {"table": "a table, send JSON", "text": "texts, send JSON or text/plain"}[card.input]
            raise Refused(415, f"content type {brief(kind)}: this network reads {what}, see /metadata")
        if kind.startswith("image/") or kind == "application/octet-stream":
            return [("image", body)]
        if kind != "multipart/form-data":
            raise Refused(415, f"content type {brief(kind)}, expected {TAKEN}")
        return await self._parts(request, body)

    async def _parts(self, request: Request, body: bytes) -> list[tuple[str, Any]]:
        async def once() -> AsyncIterator[bytes]:
            yield body

        most = self.limits.examples
        parser = MultiPartParser(request.headers, once(), max_files=most, max_fields=most, max_part_size=2**16)
        parser.spool_max_size = self.limits.body + 1  # nothing is written to disk
        try:
            form = await parser.parse()
        except (MultiPartException, KeyError, ValueError, UnicodeError, AssertionError) as error:
            many = str(error).startswith("Too many")
            raise Refused(
                413 if many else 400, f"no sound multipart/form-data ({error or type(error).__name__})"
            ) from None
        items = []
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                raise Refused(400, f"the field {brief(name)} is text; URLs are not fetched: upload the image itself")
            items.append((value.filename or name, await value.read()))
        return items

    async def _answer(self, name: str, item: Any, count: int) -> answers.Row:
        reading = asyncio.get_running_loop().run_in_executor(self.readers, self._read, item)
        try:
            outputs = {key: value[None] for key, value in (await self.batcher(reading)).items()}
        except ValueError as error:
            return {"file": name, "error": str(error)}
        if not all(np.isfinite(x).all() for x in outputs.values()):
            return {"file": name, "error": "the outputs are not finite: the input has values out of all proportion"}
        features = outputs.pop(FEATURES)
        row = {"file": name, **answers.answers(self.network.spec, outputs)[0]}
        if self.network.trust:
            row |= trust.judge(self.network.trust, outputs, features, self.network.spec)[0]
        if self.examples and count:
            row["nearest"] = neighbours.nearest(self.examples, features[0], count)
        return row

    def _read(self, item: Any) -> np.ndarray:
        card = self.network.card
        if card.input == "image":
            header = decode.header_of(item, card.form)
            if header.height * header.width > self.limits.pixels:
                size = f"{header.width} x {header.height}"
                raise ValueError(f"an image of {size} pixels; at most {self.limits.pixels:,} are taken")
        return self.texts.read(item) if self.texts else read_input(item, card, self.preprocess)

    async def page(self, request: Request) -> Response:
        headers = {"Content-Security-Policy": self.policy, "X-Content-Type-Options": "nosniff"}
        return Response(self.text, media_type="text/html", headers=headers)

    async def health(self, request: Request) -> Response:
        drift = self.monitor and self.monitor.state()
        if drift:  # of many classes the first
            drift["columns"] = sorted(drift["columns"], key=lambda row: row["p"])[:COLUMNS]
        working = self.ready and not self.worker.done()
        table = {"status": "ready" if working else "stopping", "drift": drift and {**drift, "text": _drift(drift)}}
        return _json(table, 200 if working else 503)

    async def metadata(self, request: Request) -> Response:
        table = self.network.table
        about = {key: table[key] for key in ("card", "input", "precision", "run", "jax")}
        if self.network.trust:
            kept = ("temperature", "coverage", "sets", "count")
            about["trust"] = {name: getattr(self.network.trust, name) for name in kept}
        return _json({**about, "sha256": table["sha256"][artefact.WEIGHTS], "limits": self.limits._asdict()})

    async def metrics(self, request: Request) -> Response:
        text = prometheus_client.generate_latest(self.counts.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)


def _guards(host: str) -> list[Middleware]:
    """On a loopback address: answers to its own names alone, so that no other site reads through the browser."""
    try:
        own = ipaddress.ip_address(host).is_loopback
    except ValueError:
        own = host == "localhost"
    names = ["127.0.0.1", "localhost", "["]  # the last is what starlette takes [::1]:8000 for: an address, no name
    return [Middleware(TrustedHostMiddleware, allowed_hosts=names)] if own else []


def _drift(state: dict[str, Any]) -> str:
    """What the monitor knows, in words."""
    if state["alarm"]:
        names = [row["name"] for row in state["columns"] if row["p"] <= state["level"]] or ["several"]
        now = f"the last {state['window']} differ in {', '.join(names[:5])}" if state["drifting"] else "not in the last"
        return f"alarm at request {state['alarm_at']}: inputs differ from those the network was tested on ({now})"
    if not state["looks"]:
        return f"not judged before {state['window']} requests"
    return f"no alarm in {state['requests']:,} requests"


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    text = json.dumps(value)  # in ASCII: names of files need not be UTF-8
    return Response(text, status, headers, "application/json")


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json_items(body: bytes, card: Any) -> list[tuple[str, Any]]:
    """The inputs of JSON: pixels [H][W][C] or [H][W], or the rows of a table, lists or {column: value}."""
    try:
        found = json.loads(body, parse_constant=_no_number)
        inputs = found["inputs"] if isinstance(found, dict) else None
        if not isinstance(inputs, list):
            raise ValueError('expected a table {"inputs": [...]}')
        return [(str(i), _array(x, card)) for i, x in enumerate(inputs)]
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise Refused(400, f"no sound JSON ({type(error).__name__}: {str(error)[:300]})") from None


def _count(text: str) -> int:
    if not (len(text) <= 4 and text.isascii() and text.isdecimal() and int(text) <= NEAREST):
        raise Refused(400, f"nearest={brief(text)}: expected 0 to {NEAREST}")
    return int(text)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _array(given: Any, card: Any) -> Any:
    if card.input == "text":
        if not (found := as_texts(given)):
            raise ValueError("an input is a text, or a list of two texts")
        return found
    if isinstance(given, str):
        raise ValueError(f"{brief(given)} is text; URLs are not fetched: send pixels, or upload the image itself")
    if card.input == "table":
        values = _row(given, card.columns)
        array = np.asarray(values, np.float64)
        if array.shape != (len(card.columns),) or not np.isfinite(array.astype(np.float32)).all():
            raise ValueError(f"a row is {len(card.columns)} finite numbers: {', '.join(card.columns)}")
        return array.astype(np.float32)
    array = np.asarray(given)
    if array.ndim not in (2, 3) or array.dtype.kind not in "iuf" or 0 in array.shape:
        raise ValueError(f"an image is numbers [H][W] or [H][W][C], found {array.dtype} of shape {list(array.shape)}")
    if card.pixels == "uint8" and (array.dtype.kind == "f" or array.min() < 0 or array.max() > 255):
        raise ValueError(f"pixels are whole numbers from 0 to 255, found {array.min()} to {array.max()}")
    return array.astype(card.pixels)


def _row(given: Any, columns: Sequence[str]) -> Any:
    if not isinstance(given, dict):
        return given
    if wrong := sorted(set(columns).symmetric_difference(given)):
        raise ValueError(f"missing or unknown columns {brief(wrong)}; the network reads {', '.join(columns)}")
    return [given[name] for name in columns]


def serve(folder: str, host: str, port: int, limits: Limits, log: str = "") -> None:
    """Serves an exported network until SIGTERM or Ctrl-C, which answer first what was taken; port 0: any free one."""
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a line for each malformed request
    if limits.examples > limits.queue:
        raise ValueError(f"--examples {limits.examples} would never find room in --queue {limits.queue}")
    threadpoolctl.threadpool_limits(1, "blas")  # for the small products of an answer; XLA has threads of its own
    with contextlib.closing(bind(host, port)) as bound:
        server = Server(artefact.load(folder), limits, log, host)
        print(f"{folder}: compiling for batches of {', '.join(map(str, SIZES))}", flush=True)
        config = uvicorn.Config(
            server.app, log_level="error", access_log=False, lifespan="on", http=Connection, ws="none",
            server_header=False, timeout_keep_alive=5, timeout_graceful_shutdown=int(limits.seconds) + 5,
        )  # fmt: skip
        Announced(config).run(sockets=[bound])
