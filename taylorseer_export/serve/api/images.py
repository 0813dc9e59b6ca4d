"""`/v1/images/generations` and `/v1/images/edits`: requests read, pictures drawn, answers and streams written."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, TypeVar

from taylorseer_export.errors import ServeError
from taylorseer_export.serve.api.answers import Answer, Receive, Scope, Send, start, told, unless_gone
from taylorseer_export.serve.api.bodies import form_of, json_of
from taylorseer_export.serve.api.drawing import Drawing
from taylorseer_export.serve.api.fields import PARAMS, asked_of
from taylorseer_export.serve.api.formats import Output, decoded, encoded
from taylorseer_export.serve.api.models import Done, Models, Stepped
from taylorseer_export.serve.api.problems import LOG, Refusal, problem_of
from taylorseer_export.serve.api.settings import Settings
from taylorseer_export.serve.refusals import Late

if TYPE_CHECKING:
    from starlette.requests import Request

_KEEP_ALIVE = 15.0  # seconds of silence after which a stream sends a comment, for what stands between
_NO_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}

_T = TypeVar("_T")


class Images:
    """Both doors.

    Args:
        models: Who draws.
        settings: What a request may ask for.
        pool: Threads that decode and write pictures.
        observe: Told the model and the times of every picture that was drawn, in milliseconds.
    """

    def __init__(
        self,
        models: Models,
        settings: Settings,
        pool: Executor,
        observe: Callable[[str, dict[str, float | None]], object],
    ) -> None:
        self._models, self._settings, self._pool, self._observe = models, settings, pool, observe

    async def generations(self, request: Request) -> Answer | Stream:
        """Pictures of a prompt."""
        began = asyncio.get_running_loop().time()
        async with asyncio.timeout_at(began + self._settings.timeout):
            values = await json_of(request, self._settings.body)
        asked = asked_of(values, self._settings.most_pictures, self._settings.timeout)
        model = self._models.named(asked.model, video=False)
        until = self._settings.until(began, asked.timeout)
        drawing = Drawing(model, asked, until, request_id=request.state.request_id)
        return await self._draw(request, "image_generation", drawing)

    async def edits(self, request: Request) -> Answer | Stream:
        """Pictures of a prompt and of pictures."""
        began = asyncio.get_running_loop().time()
        async with asyncio.timeout_at(began + self._settings.timeout):
            form = await form_of(request, self._settings.form)
        asked = asked_of(form.values, self._settings.most_pictures, self._settings.timeout, form=True)
        model = self._models.named(asked.model, video=False)
        able = [other.name for other in self._models if other.takes.use is not None]
        if model.name not in able:
            expected = (
                f"{' or '.join(able)}, which takes them" if able else "text alone, since no model here takes them"
            )
            raise Refusal(f"image is given to {model.name}, expected {expected}; ask for generations", 400, "image")
        images = [await self._threaded(decoded, data, "image") for data in form.images]
        mask = None if form.mask is None else await self._threaded(decoded, form.mask, "mask")
        if mask is not None and mask.shape != images[0].shape:
            height, width = images[0].shape[:2]
            raise Refusal(
                f"mask is {mask.shape[1]}x{mask.shape[0]}, expected {width}x{height} as the first image; scale it",
                400,
                "mask",
            )
        until = self._settings.until(began, asked.timeout)
        drawing = Drawing(model, asked, until, images, mask, request.state.request_id)
        return await self._draw(request, "image_edit", drawing)

    async def _draw(self, request: Request, kind: str, drawing: Drawing) -> Answer | Stream:
        asked = drawing.asked
        places = drawing.model.places
        if asked.n > places:
            raise Refusal(
                f"n is {asked.n}, expected at most {places}, the places of this server; ask for fewer at a time",
                400,
                "n",
            )
        request.state.notes = f"{drawing.model.name} n={asked.n} seed={asked.seeds[0]}"
        if drawing.choice.why:
            request.state.notes += f" profile={drawing.choice.used}"
        await drawing.take_places(request.receive)
        if asked.stream:
            return Stream(drawing, kind, request.state.request_id, self)
        try:
            return told(await unless_gone(request.receive, self._whole(drawing, request.state.request_id)))
        except BaseException:
            drawing.leave()
            raise

    async def _whole(self, drawing: Drawing, request_id: str) -> dict[str, Any]:
        """The answer with all pictures."""
        made: list[Any] = [None] * drawing.asked.n
        async for event in drawing.events():
            if isinstance(event, Done):
                made[event.number] = await self.finished(drawing, event)
        (size, *_), files, told_of = zip(*made, strict=True)
        return {
            "created": int(time.time()),
            "background": "opaque",
            "data": [{"b64_json": file} for file in files],
            "output_format": drawing.asked.output.format,
            "size": size,
            "usage": _NO_USAGE,
            "taylorseer": {**_own(drawing, request_id), "pictures": list(told_of)},
        }

    async def finished(self, drawing: Drawing, done: Done) -> tuple[str, str, dict[str, Any]]:
        """(size, file, what is told of it) of a picture whose loop has ended."""
        began = time.perf_counter()
        size, file = await self.file_of(drawing, done)
        times = done.times_with(time.perf_counter() - began)
        self._observe(drawing.model.name, times)
        told_of = {
            "seed": drawing.asked.seeds[done.number],
            "planned": done.planned,
            "executed": done.executed,
            "times_ms": times,
        }
        return size, file, told_of

    async def file_of(self, drawing: Drawing, event: Stepped | Done) -> tuple[str, str]:
        """(size, base64 of a file) of the picture of an event."""
        try:
            async with asyncio.timeout_at(drawing.until):
                return await self._threaded(_drawn, event, drawing.asked.output)
        except TimeoutError as error:
            raise Late("request is late while its picture is decoded, expected its end in its time") from error

    async def _threaded(self, work: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)


class Stream:
    """An answer of server-sent events: previews, then pictures; with `progress` a word of every step.

    Args:
        drawing: What is drawn; all of it has a place.
        kind: Of the events: `image_generation` or `image_edit`.
        request_id: Of the request.
        images: Who writes the pictures.
    """

    def __init__(self, drawing: Drawing, kind: str, request_id: str, images: Images) -> None:
        self._drawing, self._kind, self._id, self._images = drawing, kind, request_id, images
        self._created, self._partial = int(time.time()), [0] * drawing.asked.n

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}
        try:
            await send(start(200, headers | {"x-accel-buffering": "no"}))
            await unless_gone(receive, self._send_all(send))
        except ServeError as error:  # nobody is left to be told
            LOG.info("%s ended: %s", self._id, error)
        finally:
            self._drawing.leave()

    async def _send_all(self, send: Send) -> None:
        idle = asyncio.ensure_future(_keep_alive(send))
        try:
            async for event in self._drawing.events():
                for message in await self._messages(event):
                    await _send_event(send, message)
        except Exception as error:
            await _send_event(send, {"type": "error", **problem_of(error, PARAMS).body})
        finally:
            idle.cancel()
        await send({"type": "http.response.body", "body": b""})

    async def _messages(self, event: Stepped | Done) -> Sequence[dict[str, Any]]:
        asked, made = self._drawing.asked, []
        if isinstance(event, Done):
            size, file, told_of = await self._images.finished(self._drawing, event)
            own = {**_own(self._drawing, self._id), **told_of}
            last = self._common("completed", event.number, size, file) | {"usage": _NO_USAGE, "taylorseer": own}
            return [last]
        if asked.progress:
            made.append(
                {
                    "type": f"{self._kind}.step",
                    "image_index": event.number,
                    "step": event.step,
                    "steps": event.steps,
                    "planned": event.planned,
                    "milliseconds": round(event.milliseconds, 3),
                }
            )
        if event.picture is not None:
            size, file = await self._images.file_of(self._drawing, event)
            number = {"partial_image_index": self._partial[event.number]}
            self._partial[event.number] += 1
            made.append(self._common("partial_image", event.number, size, file) | number)
        return made

    def _common(self, name: str, index: int, size: str, file: str) -> dict[str, Any]:
        return {
            "type": f"{self._kind}.{name}",
            "b64_json": file,
            "created_at": self._created,
            "size": size,
            "quality": "auto",
            "background": "opaque",
            "output_format": self._drawing.asked.output.format,
            "image_index": index,
        }


def _own(drawing: Drawing, request_id: str) -> dict[str, Any]:
    """What an answer tells beyond the OpenAI API, of the request as a whole."""
    return {"model": drawing.model.name, "request_id": request_id, "profile": drawing.choice._asdict()}


def _drawn(event: Stepped | Done, output: Output) -> tuple[str, str]:
    """(size, base64 of a file); runs on a thread of the pool."""
    assert event.picture is not None, "bug in taylorseer-export: a step without a preview is drawn"
    picture = event.picture()
    height, width = picture.shape[:2]
    return f"{width}x{height}", encoded(picture, output)


async def _send_event(send: Send, message: dict[str, Any]) -> None:
    data = f"event: {message['type']}\ndata: {json.dumps(message)}\n\n".encode()
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def _keep_alive(send: Send) -> None:
    while True:
        await asyncio.sleep(_KEEP_ALIVE)
        await send({"type": "http.response.body", "body": b": still drawing\n\n", "more_body": True})
