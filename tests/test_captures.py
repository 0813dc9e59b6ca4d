"""Streams and captures as callers meet them: on a double of CUDA, and the same tests on a GPU where there is one."""

import contextlib
import threading

import pytest
import torch
from cuda_double import FakeCuda
from harness import NEEDS_GPU, open_slot, run

from taylorseer_export.bundle.device import Device
from taylorseer_export.bundle.manifest import Graph, Tensor
from taylorseer_export.compile.eager import pointwise_sums, weighted, writing
from taylorseer_export.compile.export import describe
from taylorseer_export.errors import StepError
from taylorseer_export.runtime import torch_runner
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.torch_runner import TorchRunner

COUNT = 1 << 18  # elements: kernels that are still running when the host goes on
ROUNDS = 10
THREADS = 4
CONTRACT = Graph(
    file="x",
    inputs=(Tensor(name="x", dtype="float32", shape=(COUNT,), role="latent"),),
    outputs=(Tensor(name="y", dtype="float32", shape=(COUNT,), role="noise_pred"),),
    weights_bytes=0,
)


def chain(x, y):
    """y = 2 x + 8, by way of scratch memory, which in a capture is the pool that all of a runner's calls share."""
    scratch = 2 * x
    for _ in range(8):
        scratch = scratch + 1
    y.copy_(scratch)


def looks(x, y):
    """As `chain`, and the host looks at a number on the way: no capture allows that."""
    chain(x, y)
    assert float(y.sum()) == float(y.sum())


class Threads(FakeCuda):
    """The double, with a current stream and a capture for each thread, as CUDA has them, and calls that compute."""

    def __init__(self):
        self._of_thread, self._capture = threading.local(), threading.Lock()
        super().__init__()

    here = property(
        lambda self: getattr(self._of_thread, "here", None), lambda self, it: setattr(self._of_thread, "here", it)
    )
    capturing = property(
        lambda self: getattr(self._of_thread, "graph", None), lambda self, it: setattr(self._of_thread, "graph", it)
    )

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert self._capture.acquire(blocking=False), "a second capture in this process"
        try:
            with super().graph(graph, pool, stream, capture_error_mode):
                yield
        finally:
            self._capture.release()


class Gpu:
    """A GPU or its double."""

    def __init__(self, double=None):
        self.double = double

    def runner(self, function=chain):
        return TorchRunner({"full": function}, {"full": CONTRACT}, Device("cuda"))

    def busy(self):
        """Keep the current stream working for some milliseconds."""
        if self.double is None:
            torch.cuda._sleep(20_000_000)

    @contextlib.contextmanager
    def refusing(self):
        """Captures fail in here. The double has to be told; a GPU sees that the host looks at a number."""
        if self.double is not None:
            self.double.fails = True
        yield
        if self.double is not None:
            self.double.fails = False


@pytest.fixture(params=["double", pytest.param("real", marks=NEEDS_GPU)])
def gpu(request, monkeypatch):
    if request.param == "real":
        return Gpu()
    double = Threads()
    double.install(monkeypatch)

    def replay(graph, call):  # what a replay of the double does not do
        graph.replay()
        call()

    monkeypatch.setattr(torch_runner, "_replay", replay)
    return Gpu(double)


def bound(runner):
    """(call, x, y)"""
    x, y = (runner.buffer((COUNT,), "float32") for _ in range(2))
    return runner.bind("full", {"x": x}, {"y": y}), x, y


def numbers(y):
    return torch.from_numpy(y.read()).unique().tolist()


def together(work):
    """Run `work(k)` on so many threads that begin as one; what the first of them raised is raised here."""
    barrier, errors = threading.Barrier(THREADS), []

    def begin(k):
        try:
            barrier.wait(60)
            work(k)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=begin, args=[k]) for k in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def test_a_call_bound_while_another_stream_works_leaves_its_scratch_alone(gpu):
    runner = gpu.runner()
    first, x, y = bound(runner)
    side = torch.cuda.Stream()
    for k in range(ROUNDS):
        with torch.cuda.stream(side):
            x.write(torch.full((COUNT,), float(k)))
            gpu.busy()
            first()
        second, other_x, other_y = bound(runner)  # warm runs and a capture, in the pool that `first` is about to use
        other_x.write(torch.full((COUNT,), -1.0))
        second()
        assert numbers(y) == [2.0 * k + 8] and numbers(other_y) == [6.0]
    runner.close()


def test_after_a_capture_that_failed_everything_goes_on(gpu):
    """The caller's stream is the one of before, and calls bound before and after compute what they should."""
    runner = gpu.runner()
    before, x, y = bound(runner)
    side = torch.cuda.Stream()
    for stream in (torch.cuda.current_stream(), side):
        with torch.cuda.stream(stream):
            with gpu.refusing(), pytest.raises(StepError, match="graph `full` cannot be captured"):
                bound(gpu.runner(looks))
            assert torch.cuda.current_stream() == stream
            x.write(torch.full((COUNT,), 3.0))
            before()
            assert numbers(y) == [14.0]
            after, other_x, other_y = bound(runner)
            other_x.write(torch.full((COUNT,), 4.0))
            after()
            assert numbers(other_y) == [16.0]
    runner.close()


def test_threads_capture_at_once(gpu):
    """Each over a runner of its own: torch takes one capture at a time, so one waits for the other."""
    runners, seen = [gpu.runner() for _ in range(THREADS)], {}

    def work(k):
        made = [bound(runners[k]) for _ in range(3)]
        for j, (call, x, y) in enumerate(made):
            x.write(torch.full((COUNT,), float(10 * k + j)))
            call()
            seen[k, j] = numbers(y)

    together(work)
    assert seen == {(k, j): [2.0 * (10 * k + j) + 8] for k in range(THREADS) for j in range(3)}
    for runner in runners:
        runner.close()


def test_threads_with_streams_of_their_own_share_a_runner(gpu):
    """Some call, some bind: scratch is one, so they take turns, on the device as well."""
    runner, seen = gpu.runner(), {}
    streams = [torch.cuda.Stream() for _ in range(THREADS)]

    def work(k):
        with torch.cuda.stream(streams[k]):
            call, x, y = bound(runner)
            for j in range(ROUNDS):
                x.write(torch.full((COUNT,), float(10 * k + j)))
                call()
                seen[k, j] = numbers(y)

    together(work)
    assert seen == {(k, j): [2.0 * (10 * k + j) + 8] for k in range(THREADS) for j in range(ROUNDS)}
    runner.close()


def test_requests_of_threads_and_streams_equal_those_alone(gpu, drafts, tiny):
    draft, model = drafts("plain"), tiny("plain").model
    place = "cuda" if gpu.double is None else "cpu"
    state = model.state_dict()
    weights = {
        name: (draft.buffers[name] if name in draft.buffers else state[name]).to(place, dtype)
        for name, (dtype, _) in draft.stored.items()
    }
    functions = {c.name: writing(pointwise_sums(weighted(c, weights, place)), c) for c in draft.split.graphs}
    manifest = describe(draft, "streams")
    denoiser = Denoiser(manifest, TorchRunner(functions, manifest.graphs, Device("cuda")))
    asked = [tiny("plain").inputs(8, batch=1, seed=k) for k in range(THREADS)]
    alone = [run(denoiser, inputs, "FFF..F..") for inputs in asked]
    streams, seen = [torch.cuda.Stream() for _ in asked], {}

    def work(k):
        with torch.cuda.stream(streams[k]):
            slot = open_slot(denoiser, asked[k])  # captures, while other threads are in the midst of their loops
            seen[k] = run(denoiser, asked[k], "FFF..F..", slot=slot)

    together(work)
    assert all(torch.equal(seen[k], alone[k]) for k in range(THREADS))
    assert denoiser.runner.fallbacks == 0
    denoiser.close()
