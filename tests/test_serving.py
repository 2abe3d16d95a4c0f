"""The server of examples/: batches are what waits, answers do not depend on them, a mistake is its sender's alone."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fastapi  # whose absence is told before serve.py ends the process for it
import pytest
import small
import torch
import uvicorn
from PIL import Image

import clipfast
from clipfast.data.transform import load_image
from clipfast.ops.dispatch import is_deterministic

EXAMPLES = Path(__file__).parent.parent / "examples"
if not (EXAMPLES / "serve.py").is_file():
    pytest.skip("not a clone", allow_module_level=True)
sys.path.append(str(EXAMPLES))

import serve  # noqa: E402
import serve_load  # noqa: E402
from batching import Batcher, Failed, Refused, percentiles  # noqa: E402

PATIENCE = 30


def until(holds: Callable[[], Any]) -> None:
    """Wait until something holds that another thread brings about."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Gate:
    """A function of batches that waits at its first call until it is opened; ``batches`` are those that came."""

    def __init__(self, compute: Callable[[list], list] = list) -> None:
        self.compute = compute
        self.batches: list[list] = []
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, items: list) -> list:
        self.batches.append(items)
        self.entered.set()
        assert self.opened.wait(PATIENCE)
        return self.compute(items)


def results(*futures: Future) -> list[dict[str, list]]:
    return [future.result(PATIENCE) for future in futures]


# --- the batcher ---


def test_what_waits_is_the_next_batch() -> None:
    gate = Gate(lambda items: [10 * item for item in items])
    with Batcher({"n": gate}) as batcher:
        first = batcher.submit(n=[0])
        assert gate.entered.wait(PATIENCE)
        rest = [batcher.submit(n=[i]) for i in range(1, 6)]
        assert batcher.stats()["waiting"] == 5
        gate.opened.set()
        assert results(first, *rest) == [{"n": [10 * i]} for i in range(6)]
    assert gate.batches == [[0], [1, 2, 3, 4, 5]]
    stats = batcher.stats()
    assert (stats["n"]["items"], stats["n"]["batches"], stats["n"]["mean_batch"]) == (6, 2, 3)
    # five of six waited for the gate
    assert stats["n"]["queue_ms"]["p95"] >= stats["n"]["queue_ms"]["p50"] > 0


def test_batches_have_a_limit_and_an_order() -> None:
    gate, other = Gate(), Gate()
    other.opened.set()
    with Batcher({"n": gate, "text": other}, max_batch=3) as batcher:
        futures = [batcher.submit(n=[0])]
        assert gate.entered.wait(PATIENCE)
        futures += [batcher.submit(text=["a"]), batcher.submit(n=[1, 2], text=["b"]), batcher.submit(n=[3, 4, 5])]
        gate.opened.set()
        answers = results(*futures)
    assert answers == [{"n": [0]}, {"text": ["a"]}, {"n": [1, 2], "text": ["b"]}, {"n": [3, 4, 5]}]
    assert gate.batches == [[0], [1, 2, 3], [4, 5]]
    assert other.batches == [["a", "b"]]


def test_the_kind_that_waits_the_longest_is_next() -> None:
    order: list[list] = []
    gate = Gate()

    def note(items: list) -> list:
        order.append(items)
        return items

    with Batcher({"a": note, "b": note, "gate": gate}) as batcher:
        batcher.submit(gate=[0])
        assert gate.entered.wait(PATIENCE)
        for kind, item in (("b", 1), ("a", 2), ("b", 3)):
            batcher.submit(**{kind: [item]})
        gate.opened.set()
    assert order == [[1, 3], [2]]


@pytest.mark.parametrize("error", [ValueError("odd"), SystemExit("odd"), StopIteration("odd")], ids=repr)
def test_what_fails_does_not_fail_others(error: BaseException) -> None:
    def compute(items: list[int]) -> list[int]:
        if any(item % 2 for item in items):
            raise error
        return items

    gate = Gate(compute)
    with Batcher({"n": gate}) as batcher:
        first = batcher.submit(n=[0])
        assert gate.entered.wait(PATIENCE)
        good, bad, mixed = batcher.submit(n=[2, 4]), batcher.submit(n=[1]), batcher.submit(n=[6, 3, 5, 8])
        gate.opened.set()
        assert results(first, good) == [{"n": [0]}, {"n": [2, 4]}]
        for future in (bad, mixed):
            with pytest.raises(Failed, match=f"{type(error).__name__}: odd"):
                future.result(PATIENCE)
        assert results(batcher.submit(n=[10])) == [{"n": [10]}]
    # the second odd one of a request that has failed is not computed, nor what follows it
    assert gate.batches == [[0], [2, 4, 1, 6, 3, 5, 8], [2], [4], [1], [6], [3], [10]]


def test_too_few_results_are_a_failure() -> None:
    with Batcher({"n": lambda items: items[1:]}) as batcher, pytest.raises(Failed, match="got 0 results, expected 1"):
        batcher.submit(n=[1]).result(PATIENCE)


def test_a_full_queue_takes_nothing() -> None:
    gate = Gate()
    with Batcher({"n": gate, "m": list}, max_waiting=3) as batcher:
        batcher.submit(n=[0])
        assert gate.entered.wait(PATIENCE)
        kept = batcher.submit(n=[1, 2])
        with pytest.raises(Refused, match="2 of 3 wait, and 2 more came"):
            batcher.submit(n=[3], m=[4])
        assert batcher.stats()["waiting"] == 2
        last = batcher.submit(m=[5])
        with pytest.raises(Refused):
            batcher.submit(m=[6])
        # what nobody waits for makes room, and is not computed
        assert kept.cancel()
        after = batcher.submit(n=[7])
        assert batcher.seconds_to_wait() >= 1
        gate.opened.set()
        assert results(last, after) == [{"m": [5]}, {"n": [7]}]
    assert gate.batches == [[0], [7]]


def test_closing_finishes_what_waits() -> None:
    gate = Gate()
    batcher = Batcher({"n": gate}, max_batch=2)
    futures = [batcher.submit(n=[0])]
    assert gate.entered.wait(PATIENCE)
    futures += [batcher.submit(n=[i]) for i in range(1, 6)]
    closing = threading.Thread(target=batcher.close)
    closing.start()

    def is_closed() -> bool:
        try:
            batcher.submit(n=[6]).cancel()
        except Refused as error:
            return "shutting down" in str(error)
        return False

    until(is_closed)
    gate.opened.set()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert [future.result(0) for future in futures] == [{"n": [i]} for i in range(6)]


def test_wrong_work_is_told() -> None:
    with Batcher({"n": list}) as batcher:
        for work in ({}, {"n": []}, {"m": [1]}, {"n": [1], "m": [1]}):
            with pytest.raises(ValueError, match=r"work: got .*, expected items of n"):
                batcher.submit(**work)
        with pytest.raises(ValueError, match="work: got 257 items, expected at most 256"):
            batcher.submit(n=range(257))
    with pytest.raises(ValueError, match="max_batch, max_waiting: got 0 and 1"):
        Batcher({}, max_batch=0, max_waiting=1)


def test_percentiles_are_nearest_ranks() -> None:
    assert percentiles(i / 1e3 for i in range(100, 0, -1)) == {"p50": 50, "p95": 95, "p99": 99}
    assert percentiles([0.5]) == {"p50": 500, "p95": 500, "p99": 500}
    assert percentiles([]) == {"p50": None, "p95": None, "p99": None}


# --- the server ---


def jpeg(seed: int, size: tuple[int, int] = (40, 36)) -> bytes:
    small.picture(seed, size).save(file := io.BytesIO(), "JPEG")
    return file.getvalue()


class Server:
    """A server of the small model on a free port. While ``hold`` is on, its model waits at its next call."""

    def __init__(self, model: clipfast.CLIP | None = None, **limits: int) -> None:
        self.model = small.model() if model is None else model
        self.batches: list[int] = []  # how many pictures came at once
        self.failing = False
        self._gate, self._entered = threading.Event(), threading.Event()
        self._gate.set()
        inner = self.model.encode_image

        def encode_image(images: torch.Tensor | clipfast.NaFlexBatch) -> torch.Tensor:
            self.batches.append(len(images))
            self._entered.set()
            assert self._gate.wait(PATIENCE)
            if self.failing:
                raise RuntimeError("planted")
            return inner(images)

        self.model.encode_image = encode_image
        self.app = serve.make_app(self.model, limits=serve.Limits(**limits))
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        self.uvicorn = uvicorn.Server(uvicorn.Config(self.app, log_config=None, log_level="error"))
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [listening]})
        self.thread.start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self._gate.set()
        self.uvicorn.should_exit = True
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any, Any]:
        """Return status, JSON and headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request("GET" if body is None else "POST", path, body, headers or {})
        answer = connection.getresponse()
        read = answer.status, json.loads(answer.read()), answer.headers
        connection.close()
        return read

    def features(self, path: str, body: bytes) -> list:
        status, answer, _ = self.ask(path, body)
        assert status == 200, answer
        return answer["features"]

    def hold(self, pool: ThreadPoolExecutor) -> Future:
        """Let a picture block the model, until `release`."""
        self.ask("/health")
        self._gate.clear()
        self._entered.clear()
        held = pool.submit(self.ask, "/image", jpeg(99))
        assert self._entered.wait(PATIENCE)
        return held

    def release(self) -> None:
        self._gate.set()

    def waiting(self) -> int:
        return self.ask("/stats")[1]["waiting"]


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(max_bytes=100_000, max_pixels=310_000, max_texts=8) as server:
        yield server


def texts_body(*texts: str) -> bytes:
    return json.dumps({"texts": texts}).encode()


def test_features_are_the_models(server: Server) -> None:
    picture, texts = jpeg(1), ["a red wall", "a green wall, over there", "é 猫"]
    reference = small.model()
    images = reference.transform()(load_image(picture))[None]
    image_features, text_features, logit_scale = reference(images, clipfast.tokenize(texts, context_length=16))
    torch.testing.assert_close(torch.tensor(server.features("/image", picture)), image_features[0])
    torch.testing.assert_close(torch.tensor(server.features("/text", texts_body(*texts))), text_features)
    path = "/score?text=a+red+wall&text=a+green+wall,+over+there&text=%C3%A9%20%E7%8C%AB"
    status, answer, _ = server.ask(path, picture)
    assert status == 200
    cosines = image_features @ text_features.T
    torch.testing.assert_close(torch.tensor(answer["cosines"]), cosines[0])
    torch.testing.assert_close(torch.tensor(answer["probabilities"]), (logit_scale * cosines).softmax(-1)[0])


# oneDNN's sums hang on the batch, where they may
@pytest.mark.filterwarnings("ignore::clipfast.ops.FallbackWarning")
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_answers_do_not_depend_on_their_batch(server: Server, pool: ThreadPoolExecutor, backend: str) -> None:
    pictures = [jpeg(seed) for seed in range(7)]
    texts = [texts_body(f"a {word} thing" + " and more" * i) for i, word in enumerate(small.WORDS[:6])]
    with clipfast.backend(backend), clipfast.deterministic():
        alone = [server.features("/image", picture) for picture in pictures]
        alone += [server.features("/text", text) for text in texts]
        before = server.ask("/stats")[1]
        held = server.hold(pool)
        together = [pool.submit(server.features, "/image", picture) for picture in pictures]
        together += [pool.submit(server.features, "/text", text) for text in texts]
        until(lambda: server.waiting() == 13)
        server.release()
        assert [future.result(PATIENCE) for future in together] == alone
    assert held.result()[0] == 200
    after = server.ask("/stats")[1]
    for kind, batches, items in (("image", 2, 8), ("text", 1, 6)):
        assert after[kind]["batches"] - before[kind]["batches"] == batches
        assert after[kind]["items"] - before[kind]["items"] == items


def test_pictures_of_any_aspect_and_a_sigmoid(pool: ThreadPoolExecutor) -> None:
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "pool_type": "map"}
    vision |= {"naflex": True, "class_token": False, "no_ln_pre": True, "proj_type": "none"}
    siglip = small.model(vision_cfg=vision, embed_dim=32, init_logit_bias=-1.0)
    picture, query = jpeg(1, (90, 30)), "?text=a+red+wall&text=a+dog"
    patches = clipfast.NaFlexBatch.of([siglip.transform()(load_image(picture))])
    tokens = clipfast.tokenize(["a red wall", "a dog"], context_length=16)
    expected = torch.sigmoid(siglip.get_logits(patches, tokens)[0][0])
    with clipfast.deterministic(), Server(siglip) as server:
        _, alone, _ = server.ask("/score" + query, picture)
        torch.testing.assert_close(torch.tensor(alone["probabilities"]), expected)
        server.hold(pool)
        together = [pool.submit(server.ask, "/score" + query, body) for body in (picture, jpeg(2, (30, 70)))]
        until(lambda: server.waiting() == 6)
        server.batches.clear()
        server.release()
        assert together[0].result(PATIENCE)[1] == alone
        assert together[1].result(PATIENCE)[0] == 200
        assert server.batches == [2]


def test_a_broken_picture_is_its_senders_alone(server: Server, pool: ThreadPoolExecutor) -> None:
    pictures = [jpeg(seed) for seed in range(4)]
    alone = [server.features("/image", picture) for picture in pictures]
    held = server.hold(pool)
    server.batches.clear()
    good = [pool.submit(server.features, "/image", picture) for picture in pictures[:2]]
    status, answer, _ = server.ask("/image", pictures[2][:-40])
    assert (status, "truncated or corrupt" in answer["detail"]) == (400, True)
    good += [pool.submit(server.features, "/image", picture) for picture in pictures[2:]]
    until(lambda: server.waiting() == 4)
    server.release()
    assert [future.result(PATIENCE) for future in good] == alone
    assert (server.batches, held.result()[0]) == ([4], 200)


def png(size: tuple[int, int]) -> bytes:
    Image.new("L", size).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n"


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/image", b"", 400, "got 0 bytes that are neither JPEG nor PNG"),
        ("/image", POSTSCRIPT, 400, "neither JPEG nor PNG"),
        ("/image", b"\x89PNG\r\n\x1a\n" + b"junk" * 20, 400, "body: the given data"),
        (
            "/image",
            png((600, 600)),
            400,
            "the given data is too large: 600 × 600 = 360000 pixels, max_pixels=310000 are allowed",
        ),
        ("/image", png((2, 3000)), 400, "the image is too narrow"),
        ("/image", bytes(100_001), 413, "got more than 100000 bytes"),
        ("/image", iter([bytes(60_000), bytes(60_000)]), 413, "got more than 100000 bytes"),
        ("/text", texts_body(*"abcdefghi"), 422, "texts: got 9, expected 1 to 8"),
        ("/text", texts_body(), 422, "texts: got 0, expected 1 to 8"),
        ("/text", b'{"texts": "a cat"}', 422, "texts: Input should be a valid array"),
        ("/text", b'{"texts": ["a", 1]}', 422, "texts.1: Input should be a valid string"),
        ("/text", b'{"texts": ["\\ud800"]}', 422, "body: Invalid JSON"),
        ("/text", b'{"words": ["a"]}', 422, "texts: Field required; words: Extra inputs are not permitted"),
        ("/text", b"\xff", 422, "body: Invalid JSON"),
        ("/text", texts_body("x" * 100_000), 413, "got more than 100000 bytes"),
        ("/text", texts_body("a", "x" * 20_001), 422, "texts: got one of 20001 characters, expected at most 20000"),
        ("/score", jpeg(0), 422, "texts: got 0, expected 1 to 8"),
        ("/score?text=a", b"text", 400, "neither JPEG nor PNG"),
    ],
)
def test_mistakes_are_told(server: Server, path: str, body: Any, status: int, words: str) -> None:
    answer = server.ask(path, body)
    assert (answer[0], words in answer[1]["detail"]) == (status, True), answer[1]
    assert server.ask("/stats")[1]["waiting"] == 0


def test_a_model_that_raises_answers_500(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    alone = server.features("/image", jpeg(5))
    server.failing = True
    status, answer, _ = server.ask("/image", jpeg(5))
    server.failing = False
    assert (status, answer["detail"]) == (500, "the model failed on this request; the server's log says how")
    assert "RuntimeError: planted" in caplog.text
    with torch.no_grad():
        server.model.visual.proj[0, 0], kept = float("nan"), float(server.model.visual.proj[0, 0])
        status, answer, _ = server.ask("/image", jpeg(5))
        server.model.visual.proj[0, 0] = kept
    assert (status, answer["detail"]) == (500, "the model gave NaN or infinity for this request")
    assert server.features("/image", jpeg(5)) == alone


def test_a_full_queue_answers_503(pool: ThreadPoolExecutor) -> None:
    with Server(max_batch=1, max_waiting=2) as server:
        held = [server.hold(pool)]
        held.append(pool.submit(server.ask, "/image", jpeg(0)))
        until(lambda: server.waiting() == 1)
        # the queue holds one more, and not two
        for body, waiting in ((texts_body("a", "b"), 1), (texts_body("a"), 2)):
            answer = pool.submit(server.ask, "/text", body)
            until(lambda answer=answer, waiting=waiting: answer.done() or server.waiting() == waiting == 2)
            held.append(answer)
        status, refusal, headers = held.pop(2).result(PATIENCE)
        assert (status, refusal["detail"]) == (503, "the queue is full: 1 of 2 wait, and 2 more came")
        assert int(headers["Retry-After"]) >= 1
        # at the door, before its body is read
        status, refusal, headers = server.ask("/image", b"never read")
        assert (status, refusal["detail"]) == (503, "3 requests are being served, no more are taken")
        assert int(headers["Retry-After"]) >= 1
        assert server.ask("/health")[0] == 200
        assert server.ask("/stats")[1]["requests"] == {"inside": 3, "gone": 0, "refused": 2}
        server.release()
        assert [future.result(PATIENCE)[0] for future in held] == [200] * 3
        # what would never be taken is not asked to come again
        status, refusal, _ = server.ask("/text", texts_body(*"abc"))
        assert (status, refusal["detail"]) == (422, "work: got 3 items, expected at most 2, which the queue holds")
        assert server.ask("/image", jpeg(0))[0] == 200


def test_a_client_that_goes_away_leaves_nothing(server: Server, pool: ThreadPoolExecutor) -> None:
    held = server.hold(pool)
    server.batches.clear()
    gone = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    gone.request("POST", "/image", jpeg(1))
    until(lambda: server.waiting() == 1)
    before = server.ask("/stats")[1]["requests"]
    assert before["inside"] == 2
    gone.close()
    until(lambda: server.ask("/stats")[1]["requests"] == before | {"gone": before["gone"] + 1, "inside": 1})
    stays = pool.submit(server.ask, "/image", jpeg(2))
    until(lambda: server.waiting() == 2)
    server.release()
    assert (held.result()[0], stays.result(PATIENCE)[0]) == (200, 200)
    # the picture of the one that went away was not computed
    assert server.batches == [1]
    assert server.ask("/stats")[1]["waiting"] == 0


def begin(port: int) -> socket.socket:
    """Send the head of a request and half of its body."""
    connection = socket.create_connection(("127.0.0.1", port), PATIENCE)
    connection.sendall(b"POST /image HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n\r\n" + bytes(50))
    return connection


def test_half_a_body_holds_no_place(caplog: pytest.LogCaptureFixture) -> None:
    with Server(body_seconds=1) as server, begin(server.port) as connection:
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.status == 408
        assert "in 1 s, expected all of it" in json.loads(answer.read())["detail"]
    with Server() as server:
        connection = begin(server.port)
        until(lambda: server.ask("/stats")[1]["requests"]["inside"] == 1)
        connection.close()
        until(lambda: server.ask("/stats")[1]["requests"] == {"inside": 0, "gone": 1, "refused": 0})
    assert caplog.text == ""


def test_shutting_down_finishes_what_came(pool: ThreadPoolExecutor) -> None:
    with Server() as server:
        answers = [server.hold(pool), *(pool.submit(server.ask, "/image", jpeg(seed)) for seed in range(3))]
        until(lambda: server.waiting() == 3)
        server.uvicorn.should_exit = True

        def is_shut() -> bool:
            try:
                socket.create_connection(("127.0.0.1", server.port), PATIENCE).close()
            except ConnectionError:
                return True
            return False

        until(is_shut)
        assert not any(answer.done() for answer in answers)
        server.release()
        assert [answer.result(PATIENCE)[0] for answer in answers] == [200] * 4
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive()
    with pytest.raises(Refused, match="shutting down"):
        server.app.state.batcher.submit(text=[torch.zeros(16)])


# --- the programs ---


def test_the_load_prints_a_table(server: Server, capsys: pytest.CaptureFixture) -> None:
    before = server.ask("/stats")[1]
    url = f"http://127.0.0.1:{server.port}"
    serve_load.main([url, "--clients", "1", "3", "--requests", "6", "--rounds", "1"])
    head, rule, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert (head, len(rule)) == (list(serve_load.COLUMNS), 1)
    assert [row[:3] for row in rows] == [[k, c, "32"] for k in ("image", "text") for c in ("1", "3")]
    assert rows[0][-2] == rows[2][-2] == "1.0"
    assert all(min(float(row[3]), float(row[-1])) > 0 and float(row[6]) >= float(row[4]) for row in rows)
    after = server.ask("/stats")[1]
    assert [after[kind]["items"] - before[kind]["items"] for kind in ("image", "text")] == [12, 12]
    server.failing = True
    with pytest.raises(RuntimeError, match="2 of 2 clients failed, the first with /image: got 500"):
        serve_load.measure(url, "image", 2, serve_load.bodies("image", 2))
    server.failing = False


def test_the_program_serves_a_run_and_ends_well(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "serve.py"), str(small.run(tmp_path / "run")), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
        told = ""
        while not (found := re.search(r"running on http://127\.0\.0\.1:(\d+)", told)):
            line = program.stderr.readline()
            assert line, told
            told += line
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=PATIENCE)
        connection.request("POST", "/image", jpeg(1))
        answer = json.loads(connection.getresponse().read())
        connection.close()
        program.send_signal(signal.SIGINT)
        told += program.communicate(timeout=PATIENCE)[1]
    assert program.returncode == 0, told
    assert "Application shutdown complete" in told
    reference = small.model().transform()(load_image(jpeg(1)))[None]
    expected = small.model().encode_image(reference, normalize=True)[0]
    torch.testing.assert_close(torch.tensor(answer["features"]), expected)


@pytest.mark.parametrize(("options", "expected"), [([], True), (["--no-deterministic"], False)])
def test_options_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], expected: bool) -> None:
    served: list[Any] = []

    def run(app: fastapi.FastAPI, **settings: Any) -> None:
        served.extend([is_deterministic(), settings["host"], settings["port"]])

    monkeypatch.setattr(uvicorn, "run", run)
    serve.main([str(small.run(tmp_path / "run")), "--device", "cpu", "--port", "81", *options])
    assert served == [expected, "127.0.0.1", 81]


def test_what_is_missing_is_told() -> None:
    program = f"import runpy, sys; sys.modules['fastapi'] = None; runpy.run_path({str(EXAMPLES / 'serve.py')!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2
    assert done.stderr == "error: this needs fastapi, which is not installed: pip install 'clipfast[serve]'\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ViT-B-23"], "error: model name: got 'ViT-B-23'"),
        (["ViT-B-32"], "error: weights: got none for ViT-B-32"),
        (["ViT-B-32", "--max-batch", "0"], "error: max_batch: got 0, expected at least 1"),
        (["ViT-B-32", "--precision", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_wrong_arguments_are_told(arguments: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        serve.main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
