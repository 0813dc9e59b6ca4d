"""Models that Triton serves: this process holds no bundle and no engine, and knows them by asking the servers.

Every picture is a request of its own to one of the servers that are ready for its model, the one that has fewest from
here; where that has no place for it, or does not answer, the next one gets it. All but the watch runs on an event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from logging import INFO, WARNING
from threading import Event as Flag
from threading import Thread
from typing import Any

import numpy as np

from taylorseer_export.embedded.edits import Use
from taylorseer_export.embedded.picture import opaque
from taylorseer_export.embedded.video import check_mp4
from taylorseer_export.errors import ConfigError, TaylorSeerError
from taylorseer_export.method import RequestOptions
from taylorseer_export.serve.api.busy import Choice
from taylorseer_export.serve.api.fields import REFERENCE
from taylorseer_export.serve.api.models import Done, Event, Failed, Models, Order, Queued, Stepped, retry_in
from taylorseer_export.serve.api.problems import LOG, Refusal
from taylorseer_export.serve.api.wishes import Takes
from taylorseer_export.serve.contract import DRAWN, TOLD_TIMES, pictures_named, sides_named
from taylorseer_export.serve.fleet import Outputs, Served, Server
from taylorseer_export.serve.refusals import Late, NoServer, QueueFull, Stopping, Unavailable

EVERY = 5.0  # seconds after which the servers are asked again what they have


class Fleet:
    """The servers, and a thread that asks them again and again which models are ready.

    Args:
        servers: Some have been asked already.
        every: Seconds between two rounds.
    """

    def __init__(self, servers: Sequence[Server], every: float = EVERY) -> None:
        self.servers = list(servers)
        self._every, self._stop = every, Flag()
        self._mixed: set[str] = set()  # bundles of which there is more than one
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Ask from now on."""
        self._thread.start()

    def look(self) -> list[TaylorSeerError]:
        """Ask every server what it has; why some do not say."""
        problems: list[TaylorSeerError] = []
        for server in self.servers:
            before = server.ready
            try:
                server.look()
            except (NoServer, ConfigError) as error:
                problems.append(error)
                if before:
                    LOG.warning("%s", error)
            if before != server.ready:
                level = WARNING if before - server.ready else INFO
                LOG.log(level, "%s is ready for %s", server.url, ", ".join(sorted(server.ready)) or "nothing")
        mixed = {name for name in self.models() if len({one.bundle for _, one in self.ready(name)}) > 1}
        for name in sorted(mixed - self._mixed):  # as while the servers get a new one
            LOG.warning("%s is of several bundles at its servers: a seed does not give one picture", name)
        self._mixed = mixed
        return problems

    def models(self) -> list[str]:
        """Names of the bundles that some server has or had, in the order in which they were found."""
        return list(dict.fromkeys(one.base for server in self.servers for one in server.known.values()))

    def of(self, name: str) -> list[tuple[Server, Served]]:
        """Servers with the models of a bundle that they have or had."""
        return [(server, one) for server in self.servers for one in server.known.values() if one.base == name]

    def ready(self, name: str) -> list[tuple[Server, Served]]:
        """Those that were ready when they were asked last."""
        return [(server, one) for server, one in self.of(name) if one.name in server.ready]

    def able(self, name: str, order: Order) -> list[tuple[Server, Served]]:
        """One model of each server that can draw an order: those that are ready first, then those with fewest requests,
        then those that were asked longest ago.

        A model that does not stream answers who is answered at the end; the one that does answers all.
        """
        shows = order.stream and (order.previews > 0 or order.progress)
        fitting = [(server, one) for server, one in self.of(name) if one.streams or not shows]
        fitting.sort(key=lambda pair: (pair[1].name not in pair[0].ready, pair[1].streams != order.stream))
        chosen: dict[int, tuple[Server, Served]] = {}
        for server, one in fitting:
            chosen.setdefault(id(server), (server, one))
        return sorted(
            chosen.values(), key=lambda pair: (pair[1].name not in pair[0].ready, pair[0].in_flight, pair[0].last)
        )

    def runs_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """Requests are sent on this loop."""
        self._loop = loop

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            self.look()

    def close(self) -> None:
        """Ask no more, and end the connections; called once or more, from another thread than the loop's."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        for server in self.servers:
            if self._loop is not None and self._loop.is_running():
                asyncio.run_coroutine_threadsafe(server.close_requests(), self._loop).result()
            server.close()


class Remote:
    """One model of a fleet; a `Model`.

    Args:
        name: Of its bundle.
        fleet: Some server of it has, or had, the model.
    """

    counted = ("requests", "full")

    def __init__(self, name: str, fleet: Fleet) -> None:
        self.name, self._fleet = name, fleet
        self.created, self.hurried = int(time.time()), 0
        self._tasks: set[asyncio.Task[None]] = set()
        outcomes = [f"requests.{outcome}" for outcome in ("done", "failed", "cancelled", "late", "refused")]
        self._counts = dict.fromkeys([*outcomes, "planned.full", "executed.full"], 0.0)
        self._spent = 0.0  # seconds in loops

    @property
    def _served(self) -> Served:
        """As the first server that is ready has it, or one that was."""
        _, served = [*self._fleet.ready(self.name), *self._fleet.of(self.name)][0]
        return served

    @property
    def video(self) -> bool:
        """Whether it makes videos."""
        return self.description["frame_rate"] is not None

    @property
    def description(self) -> Mapping[str, Any]:
        """As its repository has it."""
        return self._served.description

    @property
    def takes(self) -> Takes:
        """What its inputs say."""
        served = self._served
        use: Use | None = None
        if "image" in served.inputs:
            needs: Use = "animates" if self.video else "edits"
            use = needs if "image" in served.needed else "begins"
        field = REFERENCE if self.video else "image"
        most = max(1, sum(name.startswith("image") for name in served.inputs))
        loras = tuple(served.description.get("loras", ()))  # of a repository of before there were any, none
        negative = "negative_prompt" in served.inputs
        return Takes(self.name, served.description["classes"], negative, use, field, most, loras)

    def usual_size(self, picture: np.ndarray | None) -> tuple[int, int]:
        """As its repository has it; that of a picture its server alone knows."""
        if picture is not None:
            raise Refusal(
                f"size is missing for {self.name}, expected WIDTHxHEIGHT, since its server alone knows the sizes of "
                "what it makes of a picture; send it",
                400,
                "size",
            )
        width, height = map(int, self.description["size"].split("x"))
        return height, width

    @property
    def places(self) -> int:
        """Of all servers; of two models of one bundle a request takes one."""
        most: dict[int, int] = {}
        for server, one in self._fleet.of(self.name):
            most[id(server)] = max(one.places, most.get(id(server), 0))
        return sum(most.values())

    @property
    def retry_after(self) -> int:
        """By the loops that ended so far."""
        return retry_in(self._spent, self._counts["requests.done"])

    def choose(self, options: RequestOptions) -> Choice:
        """As asked: nobody here knows how long a server's queue is."""
        return Choice(options.profile, options.profile, None)

    def draw(self, order: Order, post: Callable[[Event], None]) -> Callable[[], object]:
        """Send it to a server; as of `Model`."""
        loop = asyncio.get_running_loop()
        self._fleet.runs_on(loop)
        task = loop.create_task(self._drawn(order, post))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task.cancel

    async def _drawn(self, order: Order, post: Callable[[Event], None]) -> None:
        try:
            await self._sent(order, post)
        except asyncio.CancelledError:
            self._counts["requests.cancelled"] += 1
            raise
        except Exception as error:
            self._count(error)
            post(Failed(order.number, error))

    async def _sent(self, order: Order, post: Callable[[Event], None]) -> None:
        """Try the servers in turn, until one has taken it."""
        until = asyncio.get_running_loop().time() + order.left
        self.takes.check(order.wish)
        values = await self._values(order)
        able = self._fleet.able(self.name, order)
        if not able:
            raise _without_steps(self.name, self.video, order)
        problem: Unavailable = NoServer("")
        for server, served in able:
            answers = Answers(order, post)
            try:
                fitting = self._fit(served, values, order)
                last = await server.ask(served, fitting, _left(until), answers.take, order.request_id)
            except (QueueFull, Stopping, NoServer) as error:
                LOG.warning("%s does not draw %s: %s", server.url, served.name, error)
                problem = error if not isinstance(problem, QueueFull) else problem
                if answers.queued:
                    break
            else:
                self._end(answers.done(last), answers)
                return
        if isinstance(problem, NoServer):  # whose sentence says where
            raise NoServer(f"no server that is ready draws {self.name}, expected one; try again later")
        raise problem

    def _end(self, done: Done, answers: Answers) -> None:
        self._counts["requests.done"] += 1
        self._counts["planned.full"] += done.planned.count("F")
        self._counts["executed.full"] += done.executed.count("F")
        self._spent += 1e-3 * (done.times["loop"] or 0.0)
        answers.post(done)

    def _count(self, error: Exception) -> None:
        if isinstance(error, Late):
            self._counts["requests.late"] += 1
        elif isinstance(error, Unavailable):
            self._counts["requests.refused"] += 1
        elif not isinstance(error, ConfigError | Refusal):
            self._counts["requests.failed"] += 1

    async def _values(self, order: Order) -> dict[str, Any]:
        """The inputs that an order becomes."""
        wish, takes = order.wish, self.takes
        values: dict[str, Any] = {"seed": wish.seed}
        values |= {"prompt": wish.prompt} if takes.classes is None else {"label": takes.label(wish.prompt)}
        if wish.size is not None:
            values |= sides_named(wish.size)
        if wish.pictures:
            values |= pictures_named([await asyncio.to_thread(opaque, picture) for picture in wish.pictures])
        more = {name: getattr(wish, name) for name in ("negative_prompt", "guidance_scale", "strength", "lora")}
        more |= asdict(order.options)
        return values | {name: value for name, value in more.items() if value is not None and value is not False}

    def _fit(self, served: Served, values: Mapping[str, Any], order: Order) -> dict[str, Any]:
        """Those of one model.

        Raises:
            ConfigError: It does not take one of them.
        """
        for name in values:
            if name not in served.inputs:
                raise ConfigError(f"{name} is given for {self.name}, expected none, since it takes none; leave it out")
        if not served.streams:
            return dict(values)
        shown = {"previews": order.previews if order.stream else 0, "progress": order.stream and order.progress}
        return {**values, **shown}

    def health(self, stall: float) -> dict[str, Any]:
        """`unavailable` while no server is ready for it; whether one stalls its own probe says."""
        ready, known = self._fleet.ready(self.name), self._fleet.of(self.name)
        return {
            "status": "ok" if ready else "unavailable",
            "servers": len({id(server) for server, _ in known}),
            "servers_ready": len({id(server) for server, _ in ready}),
            "slots": sum(one.slots for _, one in ready),
            "in_flight": len(self._tasks),
        }

    def counts(self) -> Mapping[str, float]:
        """Of the requests from here; what servers count is at their own metrics."""
        return self._counts

    def gauges(self) -> Mapping[str, float]:
        """Of the fleet, as it was when it was asked last."""
        seen = self.health(0.0)
        return {name: seen[name] for name in ("slots", "servers_ready", "in_flight")}

    def close(self) -> None:
        """The whole fleet is closed with its first model."""
        self._fleet.close()


class Answers:
    """What one server answers to an order, as events.

    Args:
        order: The picture.
        post: Takes the events.

    Attributes:
        queued: Whether it has a place, as far as it said.
    """

    def __init__(self, order: Order, post: Callable[[Event], None]) -> None:
        self._order, self._post, self.queued = order, post, False

    def post(self, event: Event) -> None:
        """With word of the place before it."""
        if not self.queued:
            self.queued = True
            self._post(Queued(self._order.number))
        if not isinstance(event, Queued):
            self._post(event)

    def take(self, outputs: Outputs) -> None:
        """An answer before the last."""
        step, planned = int(outputs["step"][0]), outputs["planned"][0].decode()
        if step == 0:
            self.post(Queued(self._order.number))
            return
        picture = next((partial(_same, outputs[name]) for name in DRAWN if name in outputs), None)
        took = float(outputs["step_ms"][0])
        self.post(Stepped(self._order.number, step, len(planned), planned, took, picture))

    def done(self, outputs: Outputs) -> Done:
        """The last one."""
        planned, executed = (outputs[name][0].decode() for name in ("planned", "executed"))
        told = {name: round(float(value), 3) for name, value in zip(TOLD_TIMES, outputs["times_ms"], strict=True)}
        absent = {"full_step": "F" not in executed, "forecast_step": "." not in executed}
        times = {name: None if absent.get(name) else value for name, value in told.items()}
        picture = next(outputs[name] for name in DRAWN if name in outputs)
        return Done(self._order.number, planned, executed, times, partial(_same, picture))


def open_models(urls: Sequence[str], names: Sequence[str] = (), secret: str = "", every: float = EVERY) -> Models:
    """The picture models of Triton servers. They are those that are there now; servers may come and go.

    Args:
        urls: `host:port` of gRPC, one for each server.
        names: Of the bundles; all that the servers list if empty. The first is drawn with where a request names none.
        secret: As in `Server`.
        every: As in `Fleet`.

    Raises:
        ConfigError: A URL is none, a server does not list its models, a name is of none of them, or PyAV is missing for
            videos.
        NoServer: No server answers.
    """
    for name in names:
        if list(names).count(name) > 1:
            raise ConfigError(f"--models has {name} twice, expected every name once; leave one out")
    fleet = Fleet([Server(url, names, secret) for url in urls], every)
    problems = fleet.look()
    for problem in problems:
        if isinstance(problem, ConfigError) or len(problems) == len(fleet.servers):
            raise problem
        LOG.warning("%s", problem)
    found = fleet.models()
    wrong = [name for name in names if name not in found]
    if wrong or not found:
        seen = f"--models has {wrong[0]}" if wrong else "fleet has no picture model"
        raise ConfigError(
            f"{seen}, expected models that {' or '.join(urls)} is ready for, written by `taylorseer-export triton` as "
            "picture or picture-stream; correct it"
        )
    models = [Remote(name, fleet) for name in names or found]
    if any(model.video for model in models):
        check_mp4()
    fleet.start()
    return Models(models)


def _without_steps(name: str, video: bool, order: Order) -> Refusal:
    if video:
        return Refusal(
            f"model is {name}, expected one with its model that answers after every step, by which a job is followed; "
            "write that one with `--models picture-stream`",
            400,
            "model",
        )
    param, value = ("partial_images", str(order.previews)) if order.previews else ("progress", "true")
    return Refusal(
        f"{param} is {value}, expected none, since {name} is served without its model that answers after every step; "
        "leave it out, or write that one with `--models picture-stream`",
        400,
        param,
        "unsupported_parameter",
    )


def _left(until: float) -> float:
    return max(0.0, until - asyncio.get_running_loop().time())


def _same(picture: np.ndarray) -> np.ndarray:
    return picture
