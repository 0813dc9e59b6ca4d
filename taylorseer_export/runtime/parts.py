"""The parts of a pipeline besides the transformer, loaded: what makes its inputs of a prompt, and pictures of latents.

Shapes: N samples, C channels, H and W latent pixels.
"""

from __future__ import annotations

import html
import re
from collections import OrderedDict
from collections.abc import Mapping
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from taylorseer_export.bundle.device import Device
from taylorseer_export.bundle.manifest import PartName, Patches, PipelinePart, Tokens
from taylorseer_export.bundle.shapes import match, resolve
from taylorseer_export.bundle.store import Bundle
from taylorseer_export.errors import BundleError, ConfigError, StepError, first_line
from taylorseer_export.runtime.engines import open_runner
from taylorseer_export.runtime.runner import Buffer, Call, Runner

_MOST_BOUND = 4  # sizes that stay bound: prompts of one length, pictures of a few


class Part:
    """The graph of a part, called with arrays of the host; its calls take turns.

    Args:
        name: Of the part, and of its graph.
        described: Its contract.
        runner: Its engine, loaded.
    """

    def __init__(self, name: PartName, described: PipelinePart, runner: Runner) -> None:
        self.name, self.described, self._runner = name, described, runner
        self._turn = Lock()
        self._bound: OrderedDict[tuple[tuple[str, int], ...], tuple[Call, dict[str, Buffer]]] = OrderedDict()

    def __call__(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; raises what `sizes_of` raises."""
        sizes = sizes_of(self.name, self.described, given)
        with self._turn:
            call, buffers = self._of(sizes)
            for tensor in self.described.graph.inputs:
                buffers[tensor.name].write(given[tensor.name])
            call()
            return {tensor.name: buffers[tensor.name].read() for tensor in self.described.graph.outputs}

    def _of(self, sizes: Mapping[str, int]) -> tuple[Call, dict[str, Buffer]]:
        """The bound call of these sizes and its buffers by name."""
        key = tuple(sorted(sizes.items()))
        if key not in self._bound:
            while len(self._bound) >= _MOST_BOUND:
                self._bound.popitem(last=False)
            graph = self.described.graph
            buffers = [
                {t.name: self._runner.buffer(resolve(t.shape, sizes), t.dtype) for t in tensors}
                for tensors in (graph.inputs, graph.outputs)
            ]
            self._bound[key] = self._runner.bind(self.name, *buffers), {**buffers[0], **buffers[1]}
        self._bound.move_to_end(key)
        return self._bound[key]

    def close(self) -> None:
        """Release its engine."""
        self._bound.clear()
        self._runner.close()


def sizes_of(name: str, described: PipelinePart, given: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Sizes by dimension that the inputs of a part's graph show.

    Raises:
        StepError: One is out of range.
    """
    sizes: dict[str, int] = {}
    for tensor in described.graph.inputs:
        sizes = match(tensor.shape, given[tensor.name].shape, sizes, tensor.name)
    for dimension, size in sizes.items():
        allowed = described.dimensions[dimension]
        if not allowed.minimum <= size <= allowed.maximum:
            raise StepError(
                f"size `{dimension}` of part `{name}` is {size}, expected {allowed.minimum} to {allowed.maximum}; use "
                "such a size, or export again without --size"
            )
    return sizes


def open_part(bundle: Bundle, name: PartName, device: Device, threads: int = 0) -> Part:
    """Load a part of a checked bundle, and call it once.

    Raises:
        BundleError: As `open_engines` says, or what it makes is not finite.
    """
    described, runner = open_engines(bundle, name, device, threads)
    part = Part(name, described, runner)
    try:
        for output, values in part(smallest(described)).items():
            refuse_unsound(bundle, name, output, values)
    except BaseException:
        part.close()
        raise
    return part


def smallest(described: PipelinePart) -> dict[str, np.ndarray]:
    """Inputs of a part's graph at its smallest sizes: tokens, or noise."""
    sizes = {name: dimension.minimum for name, dimension in described.dimensions.items()}
    generator = np.random.default_rng(0)
    return {
        tensor.name: np.ones(resolve(tensor.shape, sizes), np.int64)
        if tensor.role == "tokens"
        else generator.standard_normal(resolve(tensor.shape, sizes)).astype(np.float32)
        for tensor in described.graph.inputs
    }


def refuse_unsound(bundle: Bundle, name: PartName, output: str, values: np.ndarray) -> None:
    """Refuse an engine that makes of a token or of noise what is not finite.

    Raises:
        BundleError: It is so.
    """
    bad = ~np.isfinite(values)
    if bad.any():
        raise BundleError(
            f"output `{output}` of part `{name}` has {int(bad.sum())} of {bad.size} values that are NaN or infinite, "
            f"expected finite numbers; export again with `{bundle.manifest.command(precision='bf16')}`, or check the "
            "weights"
        )


def open_engines(bundle: Bundle, name: PartName, device: Device, threads: int = 0) -> tuple[PipelinePart, Runner]:
    """Contract and engines of a part of a checked bundle; its own graph is of the part's name.

    Args:
        bundle: The bundle.
        name: Of the part.
        device: Where it is to run, whatever the transformer's.
        threads: CPU threads; 0 leaves it to the engine.

    Raises:
        BundleError: The bundle has no such part, or its engine is not for this device, machine or version.
    """
    manifest = bundle.manifest
    described = manifest.parts.get(name)
    if described is None:
        raise BundleError(
            f"bundle {bundle.folder} has no part `{name}`, expected one exported with --whole; export again with "
            f"`{manifest.command()} --whole`"
        )
    within = f"{name}/"
    graphs = {
        key: graph.model_copy(update={"file": graph.file.removeprefix(within)})
        for key, graph in ((name, described.graph), ("later", described.later))
        if graph is not None
    }
    files = {key.removeprefix(within): file for key, file in manifest.files.items() if key.startswith(within)}
    alone = {"graphs": graphs, "dimensions": described.dimensions, "files": files}
    view = Bundle(bundle.folder / name, manifest.model_copy(update=alone))
    return described, open_runner(view, device, threads, cuda_graphs=False)


class Cut(NamedTuple):
    """Pictures as text encoders see them beside a prompt.

    Attributes:
        inputs: Of the graph, by name: patches and their places.
        counts: Tokens of each picture.
    """

    inputs: Mapping[str, np.ndarray]
    counts: tuple[int, ...]


class Encoder:
    """Makes the constant inputs of the transformer of a prompt.

    Args:
        bundle: Holds the tokenizers.
        part: The text encoders.

    Raises:
        BundleError: The tokenizers library is not installed, or does not read a file.
    """

    def __init__(self, bundle: Bundle, part: Part) -> None:
        self.part = part
        self._tokenizers = [(tokens, _tokenizer(bundle, tokens)) for tokens in part.described.tokens]
        self._turn = Lock()

    def encode(
        self,
        prompt: str,
        length: int | None = None,
        picture: np.ndarray | Cut | None = None,
        *,
        negative: bool = False,
    ) -> dict[str, np.ndarray]:
        """Inputs of the transformer by name, each of one sample, float32.

        Args:
            prompt: Any text; what is longer than its length is cut off, as diffusers does.
            length: Most tokens, where the bundle leaves that open; its own if left out.
            picture: What encoders that see one are shown beside the prompt, `[1, 3, height, width]` from 0 to 1; black
                if left out, as pipelines have it for a negative prompt. For those that see any pictures in patches,
                these, which cannot be left out.
            negative: Whether guidance leads away from it; see `distinguishes`.

        Raises:
            ConfigError: The length is out of range, or there is but one; or pictures leave no room for the prompt.
        """
        given: dict[str, np.ndarray] = {}
        if self.part.described.patches is not None:
            assert isinstance(picture, Cut), "bug in taylorseer-export: a prompt for encoders that see pictures, alone"
            return self._beside(prompt, length, picture, self.part.described.patches)
        assert not isinstance(picture, Cut), "bug in taylorseer-export: patches for encoders that see none"
        for tensor in self.part.described.graph.inputs:
            if tensor.role == "picture":
                given[tensor.name] = np.zeros(resolve(tensor.shape, {}), np.float32) if picture is None else picture
        if length is not None and all(tokens.size is None for tokens, _ in self._tokenizers):
            most = max(tokens.length for tokens, _ in self._tokenizers)
            raise ConfigError(
                f"length of the prompt is {length}, expected {most} (tokens), the only one of this bundle; leave it out"
            )
        with self._turn:  # a tokenizer is set to a length
            for tokens, tokenizer in self._tokenizers:
                most = tokens.length
                if tokens.multiple is not None:
                    most = most if length is None else length
                elif tokens.size is not None:
                    most = self.part.described.dimensions[tokens.size].typical if length is None else length
                given |= _tokens_of(prompt, tokens, tokenizer, most, negative)
        return self.part(given)

    @property
    def distinguishes(self) -> bool:
        """Whether a negative prompt becomes something else than the same text as a prompt."""
        return any(tokens.kept is not None for tokens, _ in self._tokenizers)

    def _beside(self, prompt: str, length: int | None, cut: Cut, patches: Patches) -> dict[str, np.ndarray]:
        """Of pictures and a prompt, of which the pipeline cuts nothing off."""
        (tokens, tokenizer), *_ = self._tokenizers
        if length is not None:
            raise ConfigError(
                f"length of the prompt is {length}, expected none, since prompts beside pictures are not cut off; "
                "leave it out"
            )
        if patches.token in prompt:
            raise ConfigError(
                f"prompt holds {patches.token}, expected none, since it stands for a token of a picture; leave it out"
            )
        shown = [
            patches.each.replace("{}", str(number)).replace(patches.token, patches.token * count)
            for number, count in enumerate(cut.counts, 1)
        ]
        with self._turn:
            tokenizer.no_truncation()
            tokenizer.no_padding()
            made = tokenizer.encode(tokens.template.replace("{}", "".join(shown) + prompt)).ids
        if len(made) - tokens.dropped > tokens.length:
            raise ConfigError(
                f"prompt and pictures are {len(made) - tokens.dropped} tokens, expected at most {tokens.length}; "
                "shorten the prompt, or give fewer pictures"
            )
        return self.part({**cut.inputs, tokens.input: np.array([made], np.int64)})

    def close(self) -> None:
        """Release the engine."""
        self.part.close()


def _tokenizer(bundle: Bundle, tokens: Tokens) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise BundleError(
            "tokenizers is not installed, expected it for the prompts of a whole bundle; pip install "
            "'taylorseer-export[whole]'"
        ) from error
    path = bundle.path(tokens.file)
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises that class alone
        raise BundleError(
            f"{path} is refused by tokenizers {tokenizers.__version__} ({first_line(error)}), expected a tokenizer; "
            f"{bundle.manifest.REMEDY}"
        ) from error


def _tokens_of(prompt: str, tokens: Tokens, tokenizer: Any, most: int, negative: bool) -> dict[str, np.ndarray]:
    """`[1, T]` int64: the tokens of a prompt, at most as many, their mask and which are kept, where there are such."""
    if not 1 <= most <= tokens.length:
        raise ConfigError(f"length of the prompt is {most}, expected 1 to {tokens.length} (tokens); change it")
    rows, most = np.arange(most), most + tokens.dropped
    plain = negative and tokens.kept is not None
    tokenizer.enable_truncation(len(rows) if plain else most)
    tokenizer.no_padding()
    if tokens.padding is not None:
        to = {"length": most} if tokens.multiple is None else {"pad_to_multiple_of": tokens.multiple}
        tokenizer.enable_padding(direction=tokens.side, pad_id=tokens.padding, **to)
    text = quoted(prompt) if tokens.quoted else cleaned(prompt) if tokens.cleaned else prompt or tokens.blank
    if text is None:
        assert tokens.mask is not None and tokens.padding is not None, "bug in taylorseer-export: quotes without a mask"
        empty = np.zeros((1, most), np.int64)
        return {tokens.input: empty + tokens.padding, tokens.mask: empty}
    for what in tokens.removed:
        text = text.replace(what, "")
    if tokens.lowered:
        text = text.lower().strip()
    if tokens.suffix is None:
        asked = ("{}" if plain else tokens.template).replace("{}", text)
        asked = _shortened(asked, tokens, tokenizer, most) if tokens.shortened else asked
        made = tokenizer.encode(asked, add_special_tokens=tokens.special)
        ids, mask = made.ids[:most], made.attention_mask[:most]  # a multiple may be more
    else:
        ids, mask = _filled_before_its_end(text, tokens, tokenizer, most, tokens.suffix)
    given = {tokens.input: np.array([ids], np.int64)}
    if tokens.mask is not None:
        given[tokens.mask] = np.array([mask], np.int64)
    if tokens.kept is not None:
        rows[1:] += 0 if plain else tokens.dropped
        given[tokens.kept] = rows[None]
    return given


def _shortened(text: str, tokens: Tokens, tokenizer: Any, most: int) -> str:
    """A prompt in its template, without as many characters at its end as what is over has, as diffusers reckons that
    for Kandinsky 5: the template's own end counts among those."""
    tokenizer.no_truncation()
    ids = tokenizer.encode(text, add_special_tokens=tokens.special).ids
    tokenizer.enable_truncation(most)
    over = ids[most - 2 : -2] if len(ids) > most else []
    removed = tokenizer.decode(over, skip_special_tokens=False) if over else ""
    return text[: len(text) - len(removed)]


def _filled_before_its_end(
    text: str, tokens: Tokens, tokenizer: Any, most: int, suffix: str
) -> tuple[list[int], list[int]]:
    """As many tokens, and their mask: a prompt in its template, padding, and what follows it."""
    tokenizer.no_padding()
    tokenizer.no_truncation()

    def numbers(of: str) -> list[int]:
        return list(tokenizer.encode(of, add_special_tokens=tokens.special).ids)

    behind = numbers(suffix)
    room = most - len(behind)
    head: list[int] = []
    if tokens.spelled:
        head = numbers(tokens.template.split("{}")[0])
        words = [number for piece in spelled(text) for number in numbers(piece)][: room - len(head)]
    else:
        tokenizer.enable_truncation(room)
        words = numbers(tokens.template.replace("{}", text))
    assert tokens.padding is not None, "bug in taylorseer-export: what is filled up without a token for it"
    empty = room - len(head) - len(words)
    parts = [(words, 1), ([tokens.padding] * empty, 0)]
    if tokens.side == "left":
        parts.reverse()
    parts = [(head, 1), *parts, (behind, 1)]
    return [number for part, _ in parts for number in part], [seen for part, seen in parts for _ in part]


def cleaned(prompt: str) -> str:
    """Without HTML entities, runs of spaces, and spaces at the ends, as diffusers cleans prompts for Wan."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


def quoted(prompt: str) -> str | None:
    """What a prompt has in quotes, each once, as diffusers puts it for HunyuanVideo 1.5; None if there is nothing."""
    found = [straight or curly for straight, curly in re.findall(r'"(.*?)"|\u201c(.*?)\u201d', prompt)]
    return "".join(f'Text "{text}". ' for text in dict.fromkeys(found)) or None


_QUOTED = re.compile(r"""'[^']*?'|"[^"]*?"|\u2018[^\u2018\u2019]*?\u2019|\u201c[^\u201c\u201d]*?\u201d""")


def spelled(prompt: str) -> list[str]:
    """The pieces of a prompt that become tokens one by one: letters of what it has in quotes, and what is between.

    An apostrophe within a word begins and ends no quote. As diffusers puts it for LongCat-Image, but that it takes
    several different words with an apostrophe for each other, in an order of chance.
    """
    words = re.sub(r"[a-zA-Z]+'[a-zA-Z]+", lambda word: word[0].replace("'", "_"), prompt)
    spans = [found.span() for found in _QUOTED.finditer(words)]
    pieces: list[str] = []
    for begin, end in zip((0, *(end for _, end in spans)), (*(begin for begin, _ in spans), len(prompt)), strict=True):
        between = prompt[begin:end]
        pieces += [*between] if _QUOTED.match(between) else [between]
        pieces += [*prompt[end : dict(spans).get(end, end)]]
    return [piece for piece in pieces if piece]
