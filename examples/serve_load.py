"""Latency under load: clients ask a server of serve.py as fast as it answers, and a table says how long they wait.

    python examples/serve.py MODEL --port 8000 &
    python examples/serve.py MODEL --port 8001 --max-batch 1 &
    python examples/serve_load.py http://127.0.0.1:8000 http://127.0.0.1:8001

Each client is a thread with a connection of its own, which asks again once it has its answer. Servers take turns within
a round, and the medians over rounds are printed.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import statistics
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from batching import percentiles
from PIL import Image

KINDS = ("image", "text")
COLORS, THINGS, PLACES = (
    ("red", "green", "blue", "grey"),
    ("cat", "car", "house"),
    ("in the snow", "at night", "by the sea"),
)
# what is printed of each row's medians, and how
SHOWN = {
    "requests/s": ("rate", ".1f"),
    "p50 ms": ("p50", ".0f"),
    "p95 ms": ("p95", ".0f"),
    "p99 ms": ("p99", ".0f"),
    "mean batch": ("batch", ".1f"),
    "server's CPU ms": ("cpu_ms", ".1f"),
}
COLUMNS = ("kind", "clients", "max_batch", *SHOWN)


def bodies(kind: str, count: int) -> list[bytes]:
    """Return what is asked: photos' size of JPEG, 640 × 480, or one text each."""
    if kind == "text":
        texts = [f"a photo of a {c} {t} {p}" for c in COLORS for t in THINGS for p in PLACES]
        return [json.dumps({"texts": [texts[i % len(texts)]]}).encode() for i in range(count)]
    random, pictures = np.random.default_rng(0), []
    for _ in range(count):
        pixels = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(file := io.BytesIO(), "JPEG")
        pictures.append(file.getvalue())
    return pictures


class Connection:
    """One client's connection, which stays open."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=600)

    def ask(self, path: str, body: bytes | None = None) -> Any:
        """Return the answer's JSON; a request with a body is a POST.

        Raises:
            RuntimeError: The answer is an error.
        """
        self._connection.request("GET" if body is None else "POST", path, body)
        answer = self._connection.getresponse()
        read = json.loads(answer.read())
        if answer.status != 200:
            raise RuntimeError(f"{path}: got {answer.status} {read}")
        return read


def measure(url: str, kind: str, clients: int, requests: list[bytes]) -> dict[str, float]:
    """Ask everything once, by so many clients at a time.

    Raises:
        RuntimeError: A request failed.
    """
    before = Connection(url).ask("/stats")
    waits: list[float] = []
    failed: list[Exception] = []
    pending, start = iter(requests), threading.Barrier(clients + 1)
    lock = threading.Lock()

    def client() -> None:
        connection = Connection(url)
        start.wait()
        try:
            while True:
                with lock:
                    body = next(pending, None)
                if body is None:
                    return
                began = time.perf_counter()
                connection.ask(f"/{kind}", body)
                waits.append(time.perf_counter() - began)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    if failed:
        raise RuntimeError(f"{url}: {len(failed)} of {clients} clients failed, the first with {failed[0]}")
    after = Connection(url).ask("/stats")
    items, batches = (after[kind][what] - before[kind][what] for what in ("items", "batches"))
    # the server's own, which other work on the machine changes less than it changes latency
    cpu_ms = 1e3 * (after["cpu_seconds"] - before["cpu_seconds"]) / len(requests)
    return {"rate": len(waits) / took, **percentiles(waits), "batch": items / batches, "cpu_ms": cpu_ms}


def main(arguments: list[str] | None = None) -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description="Measure latency under load.")
    parser.add_argument("urls", nargs="+", help="servers, such as http://127.0.0.1:8000")
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[1, 4, 16, 32], metavar="N", help="at a time (1 4 16 32)"
    )
    parser.add_argument("--requests", type=int, default=128, metavar="N", help="of a row and round (%(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what is asked (both)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="whose medians are printed (%(default)s)")
    given = parser.parse_args(arguments)
    print("| " + " | ".join(COLUMNS) + " |\n|---|" + "--:|" * (len(COLUMNS) - 1), flush=True)
    for kind in given.kinds:
        requests = bodies(kind, given.requests)
        for clients in given.clients:
            rounds = [[measure(url, kind, clients, requests) for url in given.urls] for _ in range(given.rounds)]
            for url, of_url in zip(given.urls, zip(*rounds, strict=True), strict=True):
                middle = {key: statistics.median(result[key] for result in of_url) for key in of_url[0]}
                limit = Connection(url).ask("/stats")["max_batch"]
                cells = [kind, clients, limit, *(format(middle[key], form) for key, form in SHOWN.values())]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
