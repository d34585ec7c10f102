"""The server of an export answers as `predict`, refuses what it cannot take in one line, and loses no request."""

import asyncio
import contextlib
import http.client
import io
import json
import os
import pathlib
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import uvicorn
from PIL import Image
from starlette.responses import Response
from test_face import IMAGES, LABELS, QUICK

import tl_jax
from tl_jax import __main__ as command
from tl_jax.serving import artefact, connections
from tl_jax.serving import server as app
from tl_jax.serving.batches import Batcher, Busy

ROOT = pathlib.Path(__file__).resolve().parents[1]
BODY, PIXELS = 100_000, 250_000


class Running:
    """A server in a process of its own."""

    def __init__(self, folder, cwd, *options):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(cwd), "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tl_jax", "serve", str(folder), "--port", "0", *map(str, options)],
            cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        lines = []
        while not (found := re.match(r"ready: http://127.0.0.1:(\d+)", line := self.process.stdout.readline())):
            lines.append(line)
            assert line, "".join(lines)
        self.port = int(found[1])

    def ask(self, method, path, body=None, kind="", timeout=60, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        try:
            connection.request(method, path, body, {**named, **({"Content-Type": kind} if kind else {})})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def predict(self, body, kind="image/png"):
        status, data = self.ask("POST", "/predict", body, kind)
        return status, json.loads(data)

    def counts(self):
        lines = self.ask("GET", "/metrics")[1].decode().splitlines()
        return {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}

    def forbid_files(self):
        """From now on it can write to none."""
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (0, 0))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.stop()

    def stop(self):
        """SIGTERM: the server has nothing to complain of, and ends."""
        self.process.terminate()
        output = self.process.communicate(timeout=60)[0]
        assert self.process.returncode == -signal.SIGTERM and "Traceback" not in output, output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = tl_jax.load("resnet8_cifar", "builtin:glyphs", image_size=16)
    return tl_jax.export(model, tmp_path_factory.mktemp("export") / "out")


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    limits = ("--body", BODY, "--pixels", PIXELS, "--examples", 4)
    with Running(folder, tmp_path_factory.mktemp("cwd"), *limits) as running:
        yield running


@pytest.fixture
def start():
    """Starts servers that end with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(Running(*arguments))


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def multipart(*parts):
    """(body, content type) of parts (field, file name or None, bytes)."""
    lines = []
    for field, name, data in parts:
        file = f'; filename="{name}"' if name is not None else ""
        head = f'--xyz\r\nContent-Disposition: form-data; name="{field}"{file}\r\n\r\n'.encode(
            "utf-8", "surrogateescape"
        )
        lines += [head, data, b"\r\n"]
    return b"".join([*lines, b"--xyz--\r\n"]), "multipart/form-data; boundary=xyz"


@pytest.mark.slow
def test_every_form_of_a_request_is_answered_as_predict_answers(server, folder):
    network, pictures = tl_jax.load_export(folder), IMAGES[:3]
    expected = [row["top5"] for row in tl_jax.predict(network, pictures)]

    def same(answer, rows):
        status, found = answer
        assert status == 200 and found["model"] == network.card.model
        for row, top5 in zip(found["answers"], rows, strict=True):
            assert [name for name, _ in row["top5"]] == [name for name, _ in top5]
            assert [p for _, p in row["top5"]] == pytest.approx([p for _, p in top5], rel=1e-4)

    same(server.predict(png(pictures[0])), expected[:1])
    form = multipart(*((f"f{i}", f"{i}.png", png(x)) for i, x in enumerate(pictures)))
    same(server.predict(*form), expected)
    same(server.predict(json.dumps({"inputs": pictures.tolist()}), "application/json; charset=utf-8"), expected)
    status, found = server.predict(*multipart(("a", "a\udcff.png", png(pictures[0])), ("b", "b.png", b"no image")))
    assert status == 200 and found["answers"][0]["class"] == expected[0][0][0]
    assert "not a readable image" in found["answers"][1]["error"] and found["answers"][1]["file"] == "b.png"


REFUSED = [
    (b"x" * (BODY + 1), "image/png", 413, "more than 100,000 bytes"),
    (multipart(*[("a", "a.png", b"x")] * 5)[0], "multipart/form-data; boundary=xyz", 413, "Too many files"),
    (json.dumps({"inputs": [[[0]]] * 5}), "application/json", 413, "5 inputs, expected 1 to 4"),
    (json.dumps({"inputs": []}), "application/json", 400, "0 inputs"),
    (png(np.zeros((501, 500), np.uint8)), "image/png", 400, "500 x 501 pixels"),
    (b"GIF89a", "image/gif", 400, "not a readable image"),
    (b"", "image/png", 400, "it is empty"),
    (b"a=b", "application/x-www-form-urlencoded", 415, "expected an image"),
    (b"a", "", 415, "expected an image"),
    (
        multipart(("url", None, b"http://127.0.0.1/x"))[0],
        "multipart/form-data; boundary=xyz",
        400,
        "URLs are not fetched",
    ),
    (json.dumps({"inputs": ["http://127.0.0.1/x"]}), "application/json", 400, "URLs are not fetched"),
    (json.dumps([1]), "application/json", 400, "expected a table"),
    ("[" * 100_000, "application/json", 400, "no sound JSON"),
    ('{"inputs": [[[NaN]]]}', "application/json", 400, "no number of JSON"),
    ('{"inputs": [[[256]]]}', "application/json", 400, "whole numbers from 0 to 255"),
    ('{"inputs": [[[0.5]]]}', "application/json", 400, "whole numbers from 0 to 255"),
    ('{"inputs": [[[1], [1, 2]]]}', "application/json", 400, "no sound JSON"),
    ('{"inputs": [[[1' + "0" * 400 + "]]]}", "application/json", 400, "no sound JSON"),
    (b"\xff\xfe{", "application/json", 400, "no sound JSON"),
    (b"--xyz\r\n\r\n", "multipart/form-data", 400, "no sound multipart"),
]


@pytest.mark.parametrize(("body", "kind", "status", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_cannot_be_answered_is_refused_in_one_line(server, body, kind, status, message):
    found, answer = server.predict(body, kind)
    assert found == status and message in answer["error"] and len(answer["error"]) < 600, answer
    assert server.predict(png(IMAGES[0]))[0] == 200


def test_the_other_routes_tell_about_the_network_and_its_work(server, folder):
    assert json.loads(server.ask("GET", "/health")[1]) == {"status": "ready", "drift": None}
    about = json.loads(server.ask("GET", "/metadata")[1])
    assert about["sha256"] == artefact.files.sha256(folder / "weights.safetensors")
    assert about["input"] == {"shape": ["batch", 16, 16, 3], "type": "uint8"} and about["limits"]["body"] == BODY
    before = server.counts()
    assert server.predict(png(IMAGES[0]))[0] == 200 and server.predict(b"x")[0] == 400
    after = server.counts()
    for status in ("200", "400"):
        name = f'tl_jax_requests_total{{status="{status}"}}'
        assert after[name] == before.get(name, 0) + 1
    assert after["tl_jax_batch_size_count"] == before["tl_jax_batch_size_count"] + 1 and after["tl_jax_pending"] == 0
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/") as page:
        assert "default-src 'none'" in page.headers["Content-Security-Policy"] and b"Drop a picture" in page.read()
    assert server.ask("GET", "/predict")[0] == 405 and server.ask("GET", "/etc/passwd")[0] == 404


def test_other_sites_neither_read_nor_ask(server):
    for host in ("evil.example", f"evil.example:{server.port}"):
        assert server.ask("GET", "/health", Host=host)[0] == 400
    assert server.ask("GET", "/health", Host="localhost")[0] == 200
    body, kind = multipart(("a", "a.png", png(IMAGES[0])))
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
        assert server.ask("POST", "/predict", body, kind, Sec_Fetch_Site=site)[0] == status


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_request_larger_than_a_megabyte_is_kept_off_the_disk(start, folder, tmp_path):
    large = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), np.uint8)
    with start(folder, tmp_path) as server:
        server.forbid_files()
        body, kind = multipart(("a", "a.png", png(large)))
        assert len(body) > 4_000_000 and server.predict(body, kind)[0] == 200


@contextlib.contextmanager
def here(served):
    """An ASGI application in a thread of this process; gives its port, and the connections that it has."""
    bound = connections.bind("127.0.0.1", 0)
    running = uvicorn.Server(uvicorn.Config(served, log_config=None, http=connections.Connection, ws="none"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        while not running.started:
            time.sleep(0.01)
        yield bound.getsockname()[1], running.server_state.connections
    finally:
        running.should_exit = True
        thread.join(20)


def wait_for(reached, seconds=20):
    until = time.monotonic() + seconds
    while not reached() and time.monotonic() < until:
        time.sleep(0.02)
    return reached()


def test_connections_that_never_ask_or_never_read_are_ended(monkeypatch):
    monkeypatch.setattr(connections, "HEAD", 0.3)
    monkeypatch.setattr(connections, "UNREAD", 0.3)
    answer = Response(b"x" * 50_000_000)
    with here(answer) as (port, open_ones):
        for first in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(first)
                assert wait_for(lambda: len(open_ones) == 1) and wait_for(lambda: not open_ones)
        monkeypatch.setattr(connections, "UNREAD", 30.0)  # of a busy machine
        with urllib.request.urlopen(f"http://127.0.0.1:{port}") as found:  # and who reads gets all of it
            assert len(found.read()) == 50_000_000


def test_a_failing_program_is_a_status_500_in_json_and_outputs_that_are_not_finite_are_refused(
    folder, tmp_path, monkeypatch, capsys
):
    network, log = tl_jax.load_export(folder), tmp_path / "log.jsonl"
    served = app.Server(network, app.Limits(), str(log))
    body = png(IMAGES[0])

    def ask(port):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
            connection.request("POST", "/predict", body, {"Content-Type": "image/png"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    run = artefact.run
    with here(served.app) as (port, _):
        monkeypatch.setattr(artefact, "run", lambda network, x: 1 / 0)
        status, found = ask(port)
        assert status == 500 and "ZeroDivisionError" in found["error"] and "Traceback" in capsys.readouterr().err
        monkeypatch.setattr(artefact, "run", lambda network, x: {k: y + np.inf for k, y in run(network, x).items()})
        status, found = ask(port)
        assert status == 400 and "not finite" in found["error"]
        monkeypatch.setattr(artefact, "run", run)
        tried = []
        monkeypatch.setattr(served.log, "append", lambda *row: tried.append(row) or 1 / 0)
        assert [ask(port)[0] for _ in range(3)] == [200] * 3  # whatever happens to the log
        assert wait_for(lambda: len(tried) == 3)
        monkeypatch.undo()
        assert ask(port)[0] == 200
    assert len(log.read_text().splitlines()) == 2  # the task, and the one row; its end waited for it


def test_what_can_never_be_answered_is_refused_at_the_start(folder, capsys):
    assert command.main(["serve", str(folder), "--port", "0", "--queue", "8"]) == 2
    assert "--examples 32 would never find room in --queue 8" in capsys.readouterr().err


@pytest.mark.slow
def test_sigterm_answers_and_logs_every_request_that_was_begun(start, folder, tmp_path):
    server, log, body = start(folder, tmp_path, "--log", tmp_path / "log.jsonl"), tmp_path / "log.jsonl", png(IMAGES[0])
    head = (
        f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    begun = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(8)]
    for each in begun:
        each.sendall(head.encode() + body[:10])
    assert wait_for(lambda: server.counts()["tl_jax_pending"] == 8)
    server.process.terminate()
    time.sleep(0.5)
    for each in begun:
        each.sendall(body[10:])
    for each in begun:
        assert each.recv(100).startswith(b"HTTP/1.1 200 OK")
        each.close()
    server.stop()
    assert len(log.read_text().splitlines()) == 9


def test_an_address_that_is_taken_is_one_line_before_the_network_is_loaded(server, capsys):
    assert command.main(["serve", "nowhere", "--port", str(server.port)]) == 2
    assert f"cannot listen on 127.0.0.1:{server.port}" in capsys.readouterr().err


class Slow:
    """A model that takes 20 ms, and notes its batches."""

    def __init__(self):
        self.sizes, self.fails = [], False

    def __call__(self, x):
        self.sizes.append(len(x))
        time.sleep(0.02)
        if self.fails:
            raise RuntimeError("out of memory")
        return {"logits": x * 2}


def batched(count, model, space=64, delay=0.0):
    async def example(batcher, i):
        async def read():
            await asyncio.sleep(delay)
            return np.float32(i).reshape(1)

        with batcher.admitted(1):
            return float((await batcher(read()))["logits"][0])

    async def main():
        batcher = Batcher(model, (1, 2, 4, 8), space)
        worker = asyncio.create_task(batcher.run())
        found = await asyncio.gather(*(example(batcher, i) for i in range(count)), return_exceptions=True)
        assert batcher.pending == batcher.coming == 0
        worker.cancel()
        return found

    return asyncio.run(main())


def test_what_comes_together_is_answered_together_in_padded_batches():
    model = Slow()
    assert batched(13, model, delay=0.001) == [2.0 * i for i in range(13)]
    assert sum(model.sizes) >= 13 and len(model.sizes) <= 3 and set(model.sizes) <= {1, 2, 4, 8}
    alone = Slow()
    assert batched(1, alone) == [0.0] and alone.sizes == [1]


def test_a_full_queue_refuses_and_a_failing_model_tells_everybody():
    found = batched(10, Slow(), space=6)
    assert sum(isinstance(x, Busy) for x in found) == 4 and sum(isinstance(x, float) for x in found) == 6
    model = Slow()
    model.fails = True
    assert all(isinstance(x, RuntimeError) for x in batched(5, model))


def load(server, clients, until, statuses, lost):
    """Clients that ask without a pause until the time, or until nobody listens."""
    body = png(IMAGES[0])

    def client():
        while time.monotonic() < until:
            try:
                status, data = server.ask("POST", "/predict", body, "image/png")
                assert status != 200 or json.loads(data)["answers"]
                statuses.append(status)
            except ConnectionRefusedError:
                return
            except (OSError, http.client.HTTPException) as error:
                lost.append(repr(error))
                return

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.exhaustive)])
def test_fifty_clients_meet_no_error_but_429_and_memory_stays_flat(seconds, start, folder, tmp_path):
    server = start(folder, tmp_path, "--queue", 32)
    statuses, lost = [], []
    for thread in load(server, 50, time.monotonic() + 2, [], lost):
        thread.join()
    before = server.counts()["process_resident_memory_bytes"]
    for thread in load(server, 50, time.monotonic() + seconds, statuses, lost):
        thread.join()
    after = server.counts()["process_resident_memory_bytes"]
    assert not lost and set(statuses) == {200, 429} and statuses.count(200) > 20 * seconds
    assert after <= before + 30 * 2**20
    server.stop()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_sigterm_under_load_answers_every_request_that_was_taken(start, folder, tmp_path):
    server, statuses, lost = start(folder, tmp_path), [], []
    threads = load(server, 20, time.monotonic() + 30, statuses, lost)
    time.sleep(2)
    server.stop()
    for thread in threads:
        thread.join()
    # A connection that the kernel had taken and the server had not was reset before a byte of its request was read.
    assert set(statuses) <= {200, 429} and len(statuses) > 20
    assert all(
        "reset" in error.lower() or "refused" in error.lower() or "RemoteDisconnected" in error for error in lost
    )


@pytest.mark.slow
@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.exhaustive)])
def test_malformed_requests_crash_nothing_and_write_nothing(count, start, folder, tmp_path):
    server = start(folder, tmp_path, "--body", BODY, "--seconds", 2)
    server.forbid_files()
    sound = [(png(IMAGES[0]), "image/png"), multipart(("a", "a.png", png(IMAGES[1])))]
    sound += [(json.dumps({"inputs": IMAGES[:1].tolist()}).encode(), "application/json")]
    kinds = [kind for _, kind in sound] + [
        "",
        "image/x",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "x" * 500,
    ]

    def malformed(i):
        draw = random.Random(i)
        body, kind = draw.choice(sound)
        body = bytearray(body)
        for _ in range(draw.choice([1, 3, 30])):
            at = draw.randrange(len(body) or 1)
            change = draw.choice(["flip", "cut", "grow"])
            if change == "flip" and body:
                body[at] = draw.randrange(256)
            elif change == "cut" and len(body) > 2:
                del body[at:]
            else:
                body[at:at] = draw.randbytes(draw.choice([1, 50]))
        kind = draw.choice(kinds) if draw.random() < 0.3 else kind
        size = f"Content-Length: {len(body)}"
        head = (
            f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nConnection: close\r\n{size}\r\n\r\n"
        )
        raw = bytearray(head.encode() + bytes(body))
        if draw.random() < 0.2:  # the head too
            raw[draw.randrange(len(head))] = draw.randrange(256)
        return bytes(raw)

    def send(i):
        answer = b""
        with (
            socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection,
            contextlib.suppress(ConnectionError),  # it closes on who goes on sending after an answer
        ):
            connection.sendall(malformed(i))
            while part := connection.recv(2**16):
                answer += part
        return int(answer.split()[1]) if answer else 0

    with ThreadPoolExecutor(32) as pool:
        statuses = list(pool.map(send, range(count)))
    assert not [status for status in statuses if status >= 500]
    assert {200, 400, 415} <= set(statuses)
    assert server.predict(png(IMAGES[0]))[0] == 200
    server.stop()


@pytest.mark.slow
def test_a_served_run_says_how_far_to_trust_it_shows_the_nearest_and_raises_an_alarm(start, tmp_path, capsys):
    splits = {"train": (IMAGES[:600], LABELS[:600]), "val": (IMAGES[600:900], LABELS[600:900])}
    splits["test"] = (IMAGES[900:1300], LABELS[900:1300])
    model = tl_jax.load("resnet8_cifar", "builtin:glyphs", image_size=16)
    run = tl_jax.fit(model, splits, epochs=1, workdir=tmp_path / "w", changes=QUICK, verbose=False)
    run.calibrate()
    folder = tl_jax.export(run, tmp_path / "out", examples=50)
    log = tmp_path / "log.jsonl"
    server = start(folder, tmp_path, "--log", log)
    expected = run.predict(IMAGES[1300:1302])
    _, found = server.predict(json.dumps({"inputs": IMAGES[1300:1302].tolist()}), "application/json")
    for row, its in zip(found["answers"], expected, strict=True):
        assert {key: row[key] for key in ("class", "set", "ood", "abstain")} == {
            key: its[key] for key in ("class", "set", "ood", "abstain")
        }
        assert row["calibrated"] == pytest.approx(its["calibrated"], rel=1e-4) and "nearest" not in row
    near = json.loads(server.ask("POST", "/predict?nearest=3", png(IMAGES[0]), "image/png")[1])["answers"][0]["nearest"]
    assert len(near) == 3 and near[0]["similarity"] >= near[1]["similarity"]
    assert near[0]["image"].startswith("data:image/jpeg;base64,")
    for many in ("21", "-1", "x", "9" * 5000):
        assert server.ask("POST", f"/predict?nearest={many}", png(IMAGES[0]), "image/png")[0] == 400

    def feed(pictures):
        for i in range(0, len(pictures), 25):
            assert server.predict(json.dumps({"inputs": pictures[i : i + 25].tolist()}), "application/json")[0] == 200

    feed(IMAGES[1300:1550])
    assert server.counts()["tl_jax_drift_alarm"] == 0
    feed(255 - IMAGES[1300:1550])
    until = time.monotonic() + 20
    while server.counts()["tl_jax_drift_alarm"] == 0 and time.monotonic() < until:
        time.sleep(0.2)  # the monitor works behind the answers
    drift = json.loads(server.ask("GET", "/health")[1])["drift"]
    assert drift["alarm"] and "alarm at request" in drift["text"] and server.counts()["tl_jax_drift_alarm"] == 1
    assert command.main(["drift", str(folder), str(log)]) == 0
    assert "DRIFT" in capsys.readouterr().out


@pytest.mark.slow
def test_the_page_shows_answers_and_errors_in_a_browser(server, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    browser = next(filter(os.path.exists, ("/usr/bin/chromium-headless-shell", "/usr/bin/chromium")), None)
    if not browser:
        pytest.skip("there is no Chromium on this machine")
    (tmp_path / "digit.png").write_bytes(png(IMAGES[0]))
    (tmp_path / "notes.txt").write_text("no image")
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 320, "height": 600})
        trouble = []
        page.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.wait_for_selector("text=resnet8_cifar")
        page.set_input_files("#file", str(tmp_path / "digit.png"))
        page.wait_for_selector(".answer .row")
        expected = server.predict(png(IMAGES[0]))[1]["answers"][0]["top5"]
        assert page.locator(".answer .row span:first-child").all_inner_texts() == [name for name, _ in expected]
        assert f"{100 * expected[0][1]:.1f} %" in page.locator(".answer").first.inner_text()
        assert not trouble
        page.set_input_files("#file", str(tmp_path / "notes.txt"))
        page.wait_for_selector("[role=alert]")
        assert "not a readable image" in page.locator("[role=alert]").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # on a narrow screen
        page.screenshot(path=str(tmp_path / "page.png"))
        chromium.close()
