"""`/v1/videos`: jobs that make videos, asked for now and fetched later, as the OpenAI API defines them.

Jobs and their files live in this process: they are gone when it ends, an hour after they are done, and when more are
done than are kept. Who has another API key does not see them.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from taylorseer_export.embedded.video import MP4, write_video
from taylorseer_export.errors import TaylorSeerError
from taylorseer_export.serve.api.answers import Answer, told
from taylorseer_export.serve.api.bodies import fields_of
from taylorseer_export.serve.api.drawing import Drawing
from taylorseer_export.serve.api.fields import PARAMS, REFERENCE, AskedVideo, video_of
from taylorseer_export.serve.api.formats import decoded
from taylorseer_export.serve.api.models import Done, Model, Models
from taylorseer_export.serve.api.problems import Refusal, problem_of
from taylorseer_export.serve.api.settings import Settings

if TYPE_CHECKING:
    from starlette.requests import Request

_KEPT = 64  # jobs that are done
_KEPT_FOR = 3600  # seconds after they are done
_MOST_LISTED = 100


@dataclass
class Job:
    """One video, from its place in the queue to its file.

    Attributes:
        id: By which it is asked for.
        owner: The `Authorization` header that it came with.
        drawing: What makes its latents.
        size: (frames, height, width) in pixels, of the video.
        rate: Frames per second.
        created: Unix time, seconds.
        status, progress: As the OpenAI API has them; progress in percent.
        done: When it was completed or failed.
        error: Why it failed.
        file: Of a completed one.
        told: What an answer tells of it beyond that API.
        task: That follows it.
    """

    id: str
    owner: str
    drawing: Drawing
    size: tuple[int, int, int]
    rate: int
    created: int
    status: str = "queued"
    progress: int = 0
    done: int | None = None
    error: dict[str, Any] | None = None
    file: Path | None = None
    told: dict[str, Any] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None

    def entry(self) -> dict[str, Any]:
        """As it is told of."""
        frames, height, width = self.size
        return {
            "id": self.id,
            "object": "video",
            "model": self.drawing.model.name,
            "status": self.status,
            "progress": self.progress,
            "created_at": self.created,
            "completed_at": self.done if self.status == "completed" else None,
            "expires_at": None if self.done is None else self.done + _KEPT_FOR,
            "prompt": self.drawing.asked.prompt,
            "size": f"{width}x{height}",
            "seconds": f"{frames / self.rate:g}",
            "error": self.error,
            "taylorseer": {"frames": frames, "seed": self.drawing.asked.seeds[0], **self.told},
        }

    def end(self, status: str) -> None:
        """It is completed or failed from now on."""
        self.status, self.done = status, int(time.time())


class Videos:
    """The jobs of a server; used on its event loop.

    Args:
        models: Who draws; those that make videos.
        settings: What a request may ask for.
        pool: Threads that decode and write videos.
        observe: Told the model and the times of every video, in milliseconds.
    """

    def __init__(
        self,
        models: Models,
        settings: Settings,
        pool: Executor,
        observe: Callable[[str, dict[str, float | None]], object],
    ) -> None:
        self._models, self._settings, self._pool, self._observe = models, settings, pool, observe
        self._jobs: dict[str, Job] = {}
        self._folder = TemporaryDirectory(prefix="taylorseer-videos-")

    async def create(self, request: Request) -> Answer:
        """A new job, once it has a place."""
        began = asyncio.get_running_loop().time()
        async with asyncio.timeout_at(began + self._settings.timeout):
            body, form = await fields_of(request, self._settings.body, self._settings.form, REFERENCE)
        asked = video_of(body.values, self._settings.timeout, form)
        model = self._models.named(asked.model, video=True)
        files = body.images if asked.reference is None else [asked.reference, *body.images]
        pictures = await self._pictures(model, files)
        size = _size_of(model, asked, pictures)
        drawing = Drawing(model, replace(asked, size=size), self._settings.until(began, asked.timeout), pictures)
        request.state.notes = f"{model.name} seed={asked.seeds[0]}"
        await drawing.take_places(request.receive)
        name = f"video_{secrets.token_hex(16)}"
        made = (size[0] - model.description["frames_dropped"], *size[1:])
        job = Job(name, _owner(request), drawing, made, model.description["frame_rate"], int(time.time()))
        self._forget()
        self._jobs[job.id] = job
        job.task = asyncio.create_task(self._follow(job))
        return told(job.entry())

    async def listed(self, request: Request) -> Answer:
        """The jobs of who asks, the newest first or by `order`, at most `limit` of them, those after `after`."""
        self._forget()
        asked = request.query_params
        order, text = asked.get("order", "desc"), asked.get("limit", "20")
        if order not in ("asc", "desc"):
            raise Refusal(f"order is {order[:64]}, expected asc or desc; choose one", 400, "order", "invalid_value")
        if not text.isdecimal() or not 1 <= int(text[:6]) <= _MOST_LISTED:
            message = f"limit is {text[:64]}, expected a whole number from 1 to {_MOST_LISTED}; correct it"
            raise Refusal(message, 400, "limit", "invalid_value")
        jobs = [job for job in self._jobs.values() if job.owner == _owner(request)]
        jobs = jobs if order == "asc" else jobs[::-1]
        if after := asked.get("after"):
            names = [job.id for job in jobs]
            jobs = jobs[names.index(self._of(request, after).id) + 1 :]
        shown = [job.entry() for job in jobs[: int(text)]]
        ends = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
        return told({"object": "list", "data": shown, **ends, "has_more": len(jobs) > len(shown)})

    async def one(self, request: Request) -> Answer:
        """One job."""
        return told(self._of(request, request.path_params["id"]).entry())

    async def content(self, request: Request) -> Answer:
        """The file of a completed job."""
        job = self._of(request, request.path_params["id"])
        variant = request.query_params.get("variant", "video")
        if variant != "video":
            raise Refusal(f"variant is {variant[:64]}, expected video; leave it out", 400, "variant", "invalid_value")
        if job.file is None:
            raise Refusal(f"video {job.id} is {job.status}, expected completed; ask again later", 409, code="not_ready")
        data = await asyncio.get_running_loop().run_in_executor(self._pool, job.file.read_bytes)
        return Answer(data, content_type="video/mp4")

    async def delete(self, request: Request) -> Answer:
        """Forget a job; one under way frees its slot within a step."""
        job = self._of(request, request.path_params["id"])
        await self._drop(job)
        return told({"id": job.id, "object": "video.deleted", "deleted": True})

    async def close(self) -> None:
        """Give up what is under way, and delete all files."""
        for job in list(self._jobs.values()):
            await self._drop(job)
        self._folder.cleanup()

    async def _pictures(self, model: Model, files: Sequence[bytes]) -> list[np.ndarray]:
        """The pictures that a model is given, `[H, W, 4]` uint8."""
        able = [other.name for other in self._models if other.takes.use is not None]
        if files and model.name not in able:
            expected = (
                f"{' or '.join(able)}, which takes it" if able else "text alone, since no model here takes a picture"
            )
            message = f"{REFERENCE} is given to {model.name}, expected {expected}; leave it out"
            raise Refusal(message, 400, REFERENCE)
        run = asyncio.get_running_loop().run_in_executor
        return [await run(self._pool, decoded, data, REFERENCE) for data in files]

    async def _follow(self, job: Job) -> None:
        """From its place in the queue to its file."""
        try:
            async for event in job.drawing.events():
                if isinstance(event, Done):
                    job.file = await self._written(job, event)
                else:
                    job.status, job.progress = "in_progress", 100 * event.step // event.steps
        except (TaylorSeerError, TimeoutError, OSError) as error:
            problem = problem_of(error, PARAMS).body["error"]
            job.error = {"code": problem["code"] or "failed", "message": problem["message"]}
            job.end("failed")
            return
        job.progress = 100
        job.end("completed")

    async def _written(self, job: Job, done: Done) -> Path:
        began = time.perf_counter()
        path = Path(self._folder.name) / f"{job.id}{MP4}"
        work = asyncio.get_running_loop().run_in_executor(self._pool, _write, done, path, job.rate)
        async with asyncio.timeout_at(job.drawing.until):
            await work
        times = done.times_with(time.perf_counter() - began)
        self._observe(job.drawing.model.name, times)
        profile = job.drawing.choice._asdict()
        job.told = {"planned": done.planned, "executed": done.executed, "times_ms": times, "profile": profile}
        return path

    def _of(self, request: Request, name: str) -> Job:
        self._forget()
        job = self._jobs.get(name)
        if job is None or job.owner != _owner(request):
            message = f"video is `{name[:64]}`, expected one that was asked for in the last hour; ask for a new one"
            raise Refusal(message, 404, "video_id", "video_not_found")
        return job

    def _forget(self) -> None:
        """Drop jobs that are done for long, and the oldest of more than are kept."""
        done = [job for job in self._jobs.values() if job.done is not None]
        now = time.time()
        for number, job in enumerate(done):
            if number < len(done) - _KEPT or now - (job.done or 0) > _KEPT_FOR:
                self._remove(job)

    async def _drop(self, job: Job) -> None:
        job.drawing.leave()
        if job.task is not None:
            job.task.cancel()
            with suppress(asyncio.CancelledError):
                await job.task
        self._remove(job)

    def _remove(self, job: Job) -> None:
        self._jobs.pop(job.id, None)
        if job.file is not None:
            job.file.unlink(missing_ok=True)


def _write(done: Done, path: Path, rate: int) -> None:
    write_video(path, done.picture(), rate)


def _owner(request: Request) -> str:
    return str(request.headers.get("authorization", ""))


def _size_of(model: Model, asked: AskedVideo, pictures: Sequence[np.ndarray]) -> tuple[int, int, int]:
    """(frames, height, width): as asked, or as the model's. So many seconds are the nearest number of frames, behind
    those that are no part of the video."""
    step, rate = model.description["time_scale"], model.description["frame_rate"]
    frames: int = model.description["frames"] if asked.frames is None else asked.frames
    if asked.seconds is not None:
        frames = step * max(0, round((asked.seconds * rate - 1) / step)) + 1 + model.description["frames_dropped"]
    if asked.size is not None:
        height, width = asked.size[-2:]
        return frames, height, width
    height, width = model.usual_size(pictures[0] if pictures else None)
    return frames, height, width
