"""One order over streams, memory that goes back while it is used, and what the double of `torch.cuda` refuses."""

import gc
import threading
from functools import partial

import numpy as np
import pytest
import torch
from cuda_double import CONTRACT, FakeCuda

from taylorseer_export.bundle.device import Device
from taylorseer_export.runtime.order import Order, empty_after
from taylorseer_export.runtime.torch_runner import TorchRunner

GPU = Device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


def double(x, y):
    y.copy_(2 * x)


def bound_on(runner):
    """(call, its input, its output)."""
    buffers = [runner.buffer((4,), "float32") for _ in range(2)]
    return runner.bind("full", {"x": buffers[0]}, {"y": buffers[1]}), *buffers


def runner_on(cuda, cuda_graphs):
    made = TorchRunner({"full": double}, {"full": CONTRACT}, GPU, cuda_graphs)
    made.alignment = 1  # memory of the host
    return made


def a_loop_over_streams(cuda, cuda_graphs):
    """Bound on one stream, filled, run and read on others, and dropped on yet another that waits for none."""
    runner, one, other = runner_on(cuda, cuda_graphs), cuda.Stream(), cuda.Stream()
    with cuda.watched():
        call, x, y = bound_on(runner)
        for cuda.here in (one, other, one):
            x.write(np.ones(4, np.float32))
            call()
            y.entry(slice(0, 2)).clear()
        cuda.here = None
        del call, x, y
        gc.collect()
        runner.buffer((4,), "float32")  # the allocator may give the same memory out


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_loop_may_change_its_stream_and_go(cuda, cuda_graphs):
    a_loop_over_streams(cuda, cuda_graphs)
    assert not cuda.torn and cuda.allocated == ["cuda:0"] * 3


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_memory_that_goes_back_too_early_is_seen(cuda, cuda_graphs, monkeypatch):
    monkeypatch.setattr(Order, "outlast", lambda *arguments: None)
    with pytest.raises(AssertionError, match=r"memory is given out again that stream .* may still use"):
        a_loop_over_streams(cuda, cuda_graphs)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_streams_that_do_not_wait_are_seen(cuda, cuda_graphs, monkeypatch):
    real = Order.__enter__

    def forgetful(order):
        order.last = None
        real(order)

    monkeypatch.setattr(Order, "__enter__", forgetful)
    with pytest.raises(AssertionError, match="memory is used while another stream may still use it"):
        a_loop_over_streams(cuda, cuda_graphs)


def test_an_entry_outlives_the_name_of_its_buffer(cuda):
    """What a call holds of a ring is its entries; their memory is told of the stream that came last."""
    runner = runner_on(cuda, False)
    with cuda.watched():
        entry = runner.buffer((2, 4), "float32").entry(1)
        gc.collect()
        (block,) = cuda.blocks.values()
        cuda.here = cuda.Stream()
        entry.clear()
        assert block.recorded == []
        del entry
        gc.collect()
    assert block.recorded == [cuda.here] and not cuda.blocks
    cuda.check()


def test_a_read_lets_others_queue_while_it_waits(cuda, monkeypatch):
    runner = runner_on(cuda, False)
    call, _, y = bound_on(runner)
    others, copy = [], torch.Tensor.copy_

    def copying(target, source, **options):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: others.append(call()))
            thread.start()
            thread.join(60)
        return copy(target, source, **options)

    monkeypatch.setattr(torch.Tensor, "copy_", copying)
    assert y.read().tolist() == [0] * 4 and others == [None]


def test_tensors_that_others_hold_on_to_are_emptied(cuda):
    class Owner:
        pass

    order, owner, kept = Order(GPU), Owner(), torch.ones(5)
    kept.record_stream = [].append
    empty_after(owner, [kept], order)
    gc.collect()
    assert kept.numel() == 5
    del owner
    gc.collect()
    assert kept.numel() == kept.untyped_storage().nbytes() == 0


def test_closing_waits_for_the_last_stream(cuda):
    runner = runner_on(cuda, False)
    call, *_ = bound_on(runner)
    call()
    runner.close()
    assert cuda.events == ["synchronize"]


# What the double refuses


def capture(cuda, stream, pool=(0, 1), graph=None):
    return cuda.graph(graph or cuda.CUDAGraph(), pool, stream, "thread_local")


@pytest.mark.parametrize(
    ("enter", "problem"),
    [
        (lambda cuda: capture(cuda, cuda.default_stream()), "a capture on a default stream"),
        (lambda cuda: capture(cuda, FakeCuda.Stream(cuda, "cuda:1")), "a stream of another GPU than the current one"),
        (lambda cuda: cuda.stream(cuda.Stream("cuda:1")), "a stream of another GPU than the current one"),
        (
            lambda cuda: cuda.graph(cuda.CUDAGraph(), (0, 1), cuda.Stream(), "global"),
            "a capture that other threads may end",
        ),
    ],
)
def test_the_double_refuses_a_wrong_stream(cuda, enter, problem):
    with pytest.raises(AssertionError, match=problem), enter(cuda):
        pass


def test_the_double_refuses_a_pool_of_two_streams(cuda):
    pool, stream = cuda.graph_pool_handle(), cuda.Stream()
    for _ in range(2):
        with capture(cuda, stream, pool):
            pass
    with (
        pytest.raises(AssertionError, match="a pool is captured into on two streams"),
        capture(cuda, cuda.Stream(), pool),
    ):
        pass


def test_the_double_refuses_a_replay_that_cannot_be(cuda):
    graph, stream = cuda.CUDAGraph(), cuda.Stream()
    with pytest.raises(AssertionError, match="a graph is replayed that was not captured"):
        graph.replay()
    with capture(cuda, stream, graph=graph):
        pass
    graph.replay()
    with capture(cuda, stream), pytest.raises(AssertionError, match="a graph is replayed within a capture"):
        graph.replay()


def test_the_double_refuses_graphs_of_one_pool_at_one_time(cuda):
    """What they compute in between lies in the same memory."""
    graphs, stream, pool = [cuda.CUDAGraph() for _ in range(2)], cuda.Stream(), cuda.graph_pool_handle()
    for graph in graphs:
        with capture(cuda, stream, pool, graph):
            pass
    graphs[0].replay()
    cuda.here = cuda.Stream()
    with pytest.raises(AssertionError, match="memory is used while another stream may still use it"):
        graphs[1].replay()


def test_the_double_refuses_work_beside_the_stream_of_a_capture(cuda):
    stream, other = cuda.Stream(), cuda.Stream()
    with capture(cuda, stream), pytest.raises(AssertionError, match="work on another stream than that of the capture"):
        cuda.use("memory", other)


def test_the_double_refuses_memory_that_came_back_too_early(cuda):
    tensor = torch.zeros(4, device="cuda")
    (block,) = cuda.blocks.values()
    other = cuda.Stream()
    other.wait_stream(cuda.current_stream())
    cuda.use(block, other)
    assert not cuda.torn
    del tensor
    gc.collect()
    with pytest.raises(AssertionError, match=r"memory is given out again that stream .* may still use"):
        torch.zeros(4, device="cuda")


@pytest.mark.parametrize("told", ["waited", "recorded", "its own"])
def test_memory_may_come_back_where_the_allocator_knows(cuda, told):
    tensor = torch.zeros(4, device="cuda")
    (block,) = cuda.blocks.values()
    other = cuda.current_stream() if told == "its own" else cuda.Stream()
    other.wait_stream(cuda.current_stream())
    cuda.use(block, other)
    after = {
        "waited": partial(cuda.current_stream().wait_stream, other),
        "recorded": partial(tensor.record_stream, other),
    }
    after.get(told, lambda: None)()
    del tensor, after
    gc.collect()
    assert torch.zeros(4, device="cuda").tolist() == [0] * 4


def sent(runner, values, watched, shape=(4,), dtype="float32"):
    buffer = runner.buffer(shape, dtype)
    with watched:
        buffer.write(values)
    return buffer


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.arange(4, dtype=np.float32), "bfloat16"),  # another type
        (np.float32(3), "float32"),  # for all rows
        (np.arange(8, dtype=np.float32)[::2], "float32"),  # not in order
        (torch.arange(4, dtype=torch.float64), "float32"),  # of a pipeline on the CPU
    ],
)
def test_values_from_the_host_go_by_pinned_memory(cuda, values, dtype):
    buffer = sent(runner_on(cuda, False), values, cuda.watched(), dtype=dtype)
    assert list(cuda.copied) == [buffer.nbytes]
    assert np.array_equal(buffer.read(), np.broadcast_to(np.asarray(values, np.float32), (4,)))


def test_values_that_are_not_pinned_are_waited_for(cuda, monkeypatch):
    """The double refuses a copy that nobody waits for from such memory."""
    monkeypatch.setattr("taylorseer_export.runtime.torch_runner._MOST_PINNED", 15)
    buffer = sent(runner_on(cuda, False), np.arange(4, dtype=np.float32), cuda.watched())
    assert not cuda.pinned and not cuda.copied and buffer.read().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (lambda: torch.ones(4), "from memory that is not pinned"),
        (lambda: torch.ones(4, dtype=torch.float64, pin_memory=True), "goes by way of memory that is not"),
        (lambda: torch.empty(1, pin_memory=True), "goes by way of memory that is not"),
    ],
)
def test_the_double_refuses_a_copy_that_is_not_what_it_says(cuda, source, problem, monkeypatch):
    monkeypatch.setattr(torch, "ones", lambda *shape, **how: torch.empty(*shape, **how))
    target = torch.zeros(4, device="cuda")
    with cuda.watched(), pytest.raises(AssertionError, match=problem):
        target.copy_(source(), non_blocking=True)


def test_the_double_refuses_to_tear_a_copy(cuda):
    """Until the host has waited for the stream, or the memory has gone back to the allocator."""
    target, source = torch.zeros(4, device="cuda"), torch.empty(4, pin_memory=True)
    with cuda.watched():
        source.copy_(torch.ones(4))
        target.copy_(source, non_blocking=True)
        with pytest.raises(AssertionError, match="pinned memory is written to while it is copied to the GPU"):
            source.fill_(2)
        cuda.current_stream().synchronize()
        source.fill_(2)
    assert source.tolist() == [2] * 4
    del source
    gc.collect()
    assert not cuda.pinned
