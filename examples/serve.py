"""A small server of features: FastAPI in front, and behind it one thread that computes what waits (batching.py).

    pip install 'clipfast[serve]'
    python examples/serve.py runs/demo
    curl --data-binary @cat.jpg http://127.0.0.1:8000/image
    curl --json '{"texts": ["a cat", "a dog"]}' http://127.0.0.1:8000/text
    curl --data-binary @cat.jpg 'http://127.0.0.1:8000/score?text=a+cat&text=a+dog'

docs/serving.md says what it answers, and what it does under load.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, get_type_hints

try:
    import anyio
    import uvicorn
    from fastapi import Depends, FastAPI, HTTPException, Query, Request
    from fastapi.responses import JSONResponse
    from pydantic import BaseModel, ConfigDict, ValidationError
    from starlette.requests import ClientDisconnect
except ModuleNotFoundError as error:
    print(f"error: this needs {error.name}, which is not installed: pip install 'clipfast[serve]'", file=sys.stderr)
    raise SystemExit(2) from error

import torch
import torch.nn.functional as F
from batching import Batcher, Failed, Refused
from torch import Tensor

import clipfast
from clipfast.data.model_inputs import model_and_tokenizer, tokenizer_of
from clipfast.data.tokenizer_base import AnyTokenizer
from clipfast.data.transform import ImageError, load_image
from clipfast.evaluate.features import picture_encoder
from clipfast.evaluate.probabilities import sigmoid_of
from clipfast.models.open_model import PRECISIONS

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
LONGEST_TEXT = 20_000  # characters; a context of 77 tokens ends long before


@dataclass(frozen=True)
class Limits:
    """What a server takes on; a ValueError where one is below 1."""

    max_batch: Annotated[int, "pictures or texts computed at once"] = 32
    max_waiting: Annotated[int, "pictures and texts that wait; beyond that, requests are refused with 503"] = 256
    max_bytes: Annotated[int, "of a request's body"] = 10_000_000
    max_pixels: Annotated[int, "of a picture, width times height"] = 25_000_000
    max_texts: Annotated[int, "of a request"] = 128
    body_seconds: Annotated[int, "until a body has to be there"] = 30

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")


class Texts(BaseModel):
    """The body of ``POST /text``."""

    model_config = ConfigDict(extra="forbid")
    texts: list[str]


def make_app(
    model: clipfast.CLIP, tokenizer: AnyTokenizer | str | None = None, limits: Limits | None = None
) -> FastAPI:
    """Return the server's application; its docstrings are the documentation at ``/docs``.

    Args:
        model: In ``eval()``, its parameters frozen, as :func:`clipfast.open_model` gives it.
        tokenizer: As for :func:`clipfast.search`.
        limits: What it takes on.
    """
    limits = limits or Limits()
    read_texts = tokenizer_of(model, tokenizer)
    pictures, sigmoid, scale = picture_encoder(model), sigmoid_of(model), float(model.logit_scale.exp())
    transform = replace(model.transform(), max_pixels=limits.max_pixels)
    requests = {"inside": 0, "gone": 0, "refused": 0}

    # --- in the batcher's thread, which alone calls the model ---

    @torch.inference_mode()
    def encode_images(items: list[Any]) -> list[Tensor]:
        return list(pictures.encode(pictures.collate(items)).float().cpu())

    @torch.inference_mode()
    def encode_texts(rows: list[Tensor]) -> list[Tensor]:
        return list(model.encode_text(torch.stack(rows)).float().cpu())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # once, before anybody waits: weights are packed, kernels are compiled
        encode_images([pictures.filler])
        encode_texts([read_texts("")[0]])
        app.state.decoders = anyio.CapacityLimiter(os.cpu_count() or 1)
        app.state.batcher = Batcher(
            {"image": encode_images, "text": encode_texts}, limits.max_batch, limits.max_waiting
        )
        yield
        await anyio.to_thread.run_sync(app.state.batcher.close)

    app = FastAPI(title="clipfast", version=clipfast.__version__, lifespan=lifespan)

    # --- in the event loop, and in a few threads that decode ---

    def busy(reason: str) -> HTTPException:
        requests["refused"] += 1
        return HTTPException(503, reason, {"Retry-After": str(app.state.batcher.seconds_to_wait())})

    def gone_away() -> HTTPException:
        requests["gone"] += 1
        return HTTPException(499, "the client went away")

    async def admitted() -> AsyncIterator[None]:
        """Bound what bodies and pictures take in memory before they are in the queue."""
        if requests["inside"] >= limits.max_waiting + limits.max_batch:
            raise busy(f"{requests['inside']} requests are being served, no more are taken")
        requests["inside"] += 1
        try:
            yield
        finally:
            requests["inside"] -= 1

    async def body_of(request: Request) -> bytes:
        body = bytearray()
        declared = request.headers.get("content-length", "")
        too_large = HTTPException(413, f"body: got more than {limits.max_bytes} bytes, expected at most that")
        if declared.isdecimal() and int(declared) > limits.max_bytes:
            raise too_large
        try:
            with anyio.fail_after(limits.body_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > limits.max_bytes:
                        raise too_large
        except TimeoutError as error:
            told = f"body: got {len(body)} bytes in {limits.body_seconds} s, expected all of it"
            raise HTTPException(408, told) from error
        except ClientDisconnect as error:
            raise gone_away() from error
        return bytes(body)

    def prepare_picture(data: bytes) -> Any:
        # by their first bytes: Pillow would read dozens of formats
        if not data.startswith((JPEG, PNG)):
            raise HTTPException(400, f"body: got {len(data)} bytes that are neither JPEG nor PNG, expected a picture")
        try:
            return transform(load_image(data, max_pixels=limits.max_pixels))
        except ImageError as error:
            raise HTTPException(400, f"body: {error}") from error

    def prepare_texts(texts: list[str]) -> list[Tensor]:
        if not 1 <= len(texts) <= limits.max_texts:
            raise HTTPException(422, f"texts: got {len(texts)}, expected 1 to {limits.max_texts}")
        if (longest := max(map(len, texts))) > LONGEST_TEXT:
            raise HTTPException(422, f"texts: got one of {longest} characters, expected at most {LONGEST_TEXT}")
        return list(read_texts(texts))

    async def in_thread(prepare: Callable[[Any], Any], given: Any) -> Any:
        return await anyio.to_thread.run_sync(prepare, given, limiter=app.state.decoders)

    async def compute(request: Request, **work: list[Any]) -> dict[str, Tensor]:
        """Return features ``[n, E]`` of unit length for each kind, as the batcher's thread computes them."""
        try:
            computed = asyncio.wrap_future(app.state.batcher.submit(**work))
        except Refused as error:
            raise busy(str(error)) from error
        except ValueError as error:  # more than the queue ever holds
            raise HTTPException(422, str(error)) from error
        gone = asyncio.ensure_future(request.receive())
        try:
            await asyncio.wait((computed, gone), return_when=asyncio.FIRST_COMPLETED)
            if not computed.done():
                raise gone_away()
            results = computed.result()
        except Failed as error:
            raise HTTPException(500, "the model failed on this request; the server's log says how") from error
        finally:
            gone.cancel()
            computed.cancel()  # what waits for a client that is gone is not computed
        # row by row, so that nothing depends on how many there are
        features = {kind: torch.stack([F.normalize(row, dim=-1) for row in rows]) for kind, rows in results.items()}
        if not all(rows.isfinite().all() for rows in features.values()):
            raise HTTPException(500, "the model gave NaN or infinity for this request")
        return features

    takes_picture = {"requestBody": {"content": {"image/jpeg": {}, "image/png": {}}, "required": True}}
    takes_texts = {"requestBody": {"content": {"application/json": {"schema": Texts.model_json_schema()}}}}
    in_line = {"dependencies": [Depends(admitted)], "response_class": JSONResponse}

    @app.post("/image", **in_line, openapi_extra=takes_picture)
    async def image(request: Request) -> Any:
        """Features of a JPEG or PNG, of unit length."""
        pixels = await in_thread(prepare_picture, await body_of(request))
        features = await compute(request, image=[pixels])
        return JSONResponse({"features": features["image"][0].tolist()})

    @app.post("/text", **in_line, openapi_extra=takes_texts)
    async def text(request: Request) -> Any:
        """Features of texts, of unit length, in their order."""
        try:
            texts = Texts.model_validate_json(await body_of(request)).texts
        except ValidationError as error:
            told = [f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors()[:3]]
            raise HTTPException(422, "; ".join(told)) from error
        features = await compute(request, text=await in_thread(prepare_texts, texts))
        return JSONResponse({"features": features["text"].tolist()})

    @app.post("/score", **in_line, openapi_extra=takes_picture)
    async def score(request: Request, text: Annotated[list[str], Query(default_factory=list)]) -> Any:
        """Which of the texts fits a JPEG or PNG, as probabilities, and their cosines."""
        rows = await in_thread(prepare_texts, text)
        pixels = await in_thread(prepare_picture, await body_of(request))
        features = await compute(request, image=[pixels], text=rows)
        cosines = (features["text"] * features["image"]).sum(dim=-1)
        probabilities = (scale * cosines).softmax(dim=-1) if sigmoid is None else sigmoid(cosines)
        return JSONResponse({"probabilities": probabilities.tolist(), "cosines": cosines.tolist()})

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Tell that the server is up."""
        return {"status": "ok"}

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        """What waits, how large batches were, and how long things took."""
        return {"requests": requests, "cpu_seconds": time.process_time(), **app.state.batcher.stats()}

    return app


def main(arguments: list[str] | None = None) -> None:
    """Serve a model until Ctrl-C or SIGTERM, then finish what came before that."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", help="the folder of a run or of another library's model; a name, with --weights")
    parser.add_argument("--weights", metavar="FILE", help="of any layout that is known; or a folder")
    parser.add_argument("--tokenizer", metavar="FILE", help="for another vocabulary than CLIP's; or a folder")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the weights (%(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: CUDA where there is one")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (%(default)s: for this machine alone)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="(%(default)s; 0 takes a free one)")
    parser.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        help="features with the same bits in any batch; by default on a CPU",
    )
    for name, hint in get_type_hints(Limits, include_extras=True).items():
        words = f"{hint.__metadata__[0]} (%(default)s)"
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=getattr(Limits, name), metavar="N", help=words
        )
    given = vars(parser.parse_args(arguments))
    try:
        limits = Limits(**{name: given[name] for name in vars(Limits())})
        model, tokenizer = model_and_tokenizer(
            given["model"], given["tokenizer"], given["weights"], given["device"], PRECISIONS[given["precision"]]
        )
        app = make_app(model, tokenizer, limits)
    except (ImportError, OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    on_cpu = model.logit_scale.device.type == "cpu"
    with clipfast.deterministic(on_cpu if given["deterministic"] is None else given["deterministic"]):
        uvicorn.run(app, host=given["host"], port=given["port"], access_log=False, timeout_graceful_shutdown=30)


if __name__ == "__main__":
    main()
