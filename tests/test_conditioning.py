"""What prompts become is kept: made once, never changed, bounded in bytes, and no other answer than without."""

import threading

import numpy as np
import pytest

from taylorseer_export.commands.options import Parser, service_options
from taylorseer_export.embedded.conditioning import ConditioningCache, Key
from taylorseer_export.embedded.requests import prompt_request
from taylorseer_export.errors import ConfigError
from taylorseer_export.runtime.denoiser import load
from taylorseer_export.runtime.parts import Encoder
from taylorseer_export.serve import contract
from taylorseer_export.serve.service import Limits, Service

SECONDS = 60  # until a test gives up waiting; nothing is measured with it
CAPTION = "a red circle left of a blue square"
MODEL, OTHER = object(), object()  # stand for loaded bundles


class Maker:
    """Makes rows of a number of elements and counts how often it is asked."""

    def __init__(self, elements=4):
        self.made, self.elements = 0, elements

    def __call__(self):
        self.made += 1
        return {"states": np.full((1, self.elements), float(self.made), np.float32)}


def key(prompt, model=MODEL, length=None):
    return Key(model, prompt, length)


def size_of(prompt, elements):
    """Bytes that a cache counts for it."""
    cache = ConditioningCache()
    cache.of(key(prompt), Maker(elements))
    return cache.counts.bytes


def test_what_is_asked_for_again_is_not_made_again():
    cache, make = ConditioningCache(), Maker()
    first, second = cache.of(key("a"), make), cache.of(key("a"), make)
    assert make.made == 1 and first is second and cache.counts[:2] == (1, 1)
    assert cache.counts.bytes >= first["states"].nbytes


@pytest.mark.parametrize("other", [key("b"), key("a", OTHER), key("a", length=16)], ids=["prompt", "model", "length"])
def test_prompts_models_and_lengths_share_nothing(other):
    cache, make = ConditioningCache(), Maker()
    assert cache.of(key("a"), make)["states"][0, 0] != cache.of(other, make)["states"][0, 0]
    assert make.made == 2 and cache.counts[:2] == (0, 2)


def test_the_longest_unused_is_forgotten_first():
    one = size_of("a", 100)
    cache, make = ConditioningCache(2 * one + one // 2), Maker(100)
    for prompt in ("a", "b", "a", "c", "a", "b"):  # b makes way for c, and c for b
        cache.of(key(prompt), make)
        assert cache.counts.bytes <= 2 * one
    assert make.made == 4 and cache.counts == (2, 4, 2 * one)


def test_what_is_larger_than_all_the_room_is_not_kept():
    cache, small, large = ConditioningCache(size_of("a", 10)), Maker(10), Maker(1000)
    for prompt, make in (("a", small), ("b", large), ("b", large), ("a", small)):
        cache.of(key(prompt), make)
    assert (small.made, large.made) == (1, 2)


def test_without_room_nothing_is_kept_or_counted():
    cache, make = ConditioningCache(0), Maker()
    assert [cache.of(key("a"), make)["states"][0, 0] for _ in range(2)] == [1.0, 2.0]
    assert cache.counts == (0, 0, 0)


def test_what_is_kept_cannot_be_changed():
    cache, written = ConditioningCache(), np.zeros((1, 4), np.float32)
    kept = cache.of(key("a"), lambda: {"states": written[:]})
    written[:] = 1  # what the encoder writes again
    assert not kept["states"].any()
    with pytest.raises(ValueError, match="read-only"):
        kept["states"][0] = 1
    with pytest.raises(TypeError):
        kept["states"] = written


def test_what_cannot_be_made_is_said_each_time_and_not_kept():
    cache = ConditioningCache()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            cache.of(key("a"), lambda: 1 / 0)
    make = Maker()
    assert cache.of(key("a"), make)["states"][0, 0] == 1 and cache.counts[:2] == (0, 3)


def test_threads_that_ask_for_one_prompt_make_it_once_and_others_do_not_wait():
    cache, make, other = ConditioningCache(), Maker(), Maker()
    begun, held, found = threading.Event(), threading.Event(), []

    def slow():
        begun.set()
        assert held.wait(SECONDS)
        return make()

    threads = [threading.Thread(target=lambda: found.append(cache.of(key("a"), slow))) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert begun.wait(SECONDS)
    cache.of(key("b"), other)  # while the first is being made
    assert other.made == 1 and not found
    held.set()
    for thread in threads:
        thread.join(SECONDS)
    assert make.made == 1 and len(found) == 8 and all(one is found[0] for one in found)
    assert cache.counts[:2] == (7, 2)


@pytest.mark.parametrize(("given", "room"), [([], 256 << 20), (["0"], 0), (["1.5MiB"], 3 << 19)])
def test_the_option_is_a_size_or_0(given, room):
    parser = Parser("serve", "")
    service_options(parser, "bundle")
    assert parser.parse_args(["--conditioning-cache", *given] if given else []).conditioning_cache == room
    with pytest.raises(ConfigError, match=r"--conditioning-cache is -1, expected a size"):
        parser.parse_args(["--conditioning-cache=-1"])


# The embedded FLUX; other whole bundles are in test_whole.py, the images API in test_api.py


@pytest.fixture(scope="module")
def denoiser(embedded):
    with load(embedded("shapes"), threads=1) as loaded:
        yield loaded


@pytest.fixture
def encoded(monkeypatch):
    """The prompts that were encoded since."""
    seen, encode = [], Encoder.encode

    def watched(encoder, prompt, length=None):
        seen.append(prompt)
        return encode(encoder, prompt, length)

    monkeypatch.setattr(Encoder, "encode", watched)
    return seen


def check_same(one, other):
    assert one.latents.tobytes() == other.latents.tobytes() and one.conditioning.keys() == other.conditioning.keys()
    for name, value in one.conditioning.items():
        assert value.tobytes() == other.conditioning[name].tobytes() and value.dtype == other.conditioning[name].dtype


def test_a_request_is_the_same_bits_with_and_without(denoiser, encoded):
    cache = ConditioningCache()
    for captions, seeds in (([CAPTION], [1]), ([CAPTION], [2]), ([CAPTION, "a white cross"], [1, 2])):
        with_it = prompt_request(denoiser, captions, seeds, cache=cache)
        check_same(with_it, prompt_request(denoiser, captions, seeds))
    assert cache.counts[:2] == (2, 2)
    encoded.clear()
    with_it.conditioning["encoder_hidden_states"][:] = 0  # what a request does to its own is nobody else's
    again = prompt_request(denoiser, [CAPTION], [1], cache=cache)
    check_same(again, prompt_request(denoiser, [CAPTION], [1]))
    assert encoded == [CAPTION]  # that of the request without


def test_a_prompt_that_is_refused_is_refused_again(denoiser):
    cache = ConditioningCache()
    for _ in range(2):
        with pytest.raises(ConfigError, match="length of the prompt is 513, expected 1 to 512"):
            prompt_request(denoiser, ["an elephant"], length=513, cache=cache)
    assert cache.counts.bytes == 0


@pytest.mark.parametrize(("room", "times", "counted"), [(1 << 20, 1, (2, 1)), (0, 3, (0, 0))])
def test_pictures_of_one_prompt_through_triton_s_model_encode_once(denoiser, encoded, room, times, counted):
    service = Service(denoiser, Limits(slots=1, workers=1, conditioning_cache=room))
    try:
        for seed in range(3):
            values = {"prompt": np.array([CAPTION.encode()], object), "seed": np.array([seed])}
            asked = contract.ask(denoiser, "picture", values, cache=service.conditioning)
            before = len(encoded)
            check_same(asked.request, prompt_request(denoiser, [CAPTION], [seed]))
            del encoded[before:]
        counts = service.snapshot()
    finally:
        service.close()
    assert encoded == [CAPTION] * times
    assert (counts["conditioning.hit"], counts["conditioning.miss"]) == counted
