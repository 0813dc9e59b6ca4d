"""What the parts of a pipeline in a manifest must agree about, among themselves and with the denoiser.

Each check returns the first contradiction as text, or None.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from math import isqrt
from typing import TYPE_CHECKING

from taylorseer_export.bundle.shapes import linear, names, resolve

if TYPE_CHECKING:
    from taylorseer_export.bundle.manifest import Graph, Manifest, PartName, PipelinePart, Tensor
    from taylorseer_export.bundle.part_entries import Controlled, Fitted, Sections
    from taylorseer_export.bundle.shapes import Entry

# Part -> (roles its inputs may have, roles its outputs may have).
_PART_ROLES: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "text": (frozenset({"tokens", "picture"}), frozenset({"constant"})),
    "encode": (frozenset({"picture", "cache_in"}), frozenset({"constant", "latent", "cache_out"})),
    "decode": (frozenset({"latent", "cache_in"}), frozenset({"picture", "cache_out"})),
}

# What part `encode` makes of a picture: of latents that a loop, or a video in sections, may begin with; or what a video
# has beside the noise.
BEGINNING = ("mean", "deviation")
CONDITION = "condition"


def of_parts(manifest: Manifest) -> str | None:
    """Parts of the pipeline: their files lie in folders of their own, and what they make is what the denoiser takes."""
    wanted: tuple[tuple[str, str, PartName], ...] = (("source", "prompts", "text"), ("pictures", "decoder", "decode"))
    for field, value, needed in wanted:
        seen = getattr(manifest.sampling, field)
        if (seen == value) != (needed in manifest.parts):
            return f"{field} is {seen}, which is {value} with a part `{needed}` and only then"
    for name, part in manifest.parts.items():
        graphs = [part.graph] if part.later is None else [part.graph, part.later]
        files = [*(graph.file for graph in graphs), *(tokens.file for tokens in part.tokens)]
        for file in files:
            if file not in manifest.files or not file.startswith(f"{name}/"):
                return f"file {file} of part {name} is not listed in files, in the folder {name}"
        for graph in graphs:
            if twice := repeated(tensor.name for tensor in (*graph.inputs, *graph.outputs)):
                return f"part {name} has `{twice}` twice"
            for allowed, tensors in zip(_PART_ROLES[name], (graph.inputs, graph.outputs), strict=True):
                for tensor in tensors:
                    if tensor.role not in allowed:
                        return f"`{tensor.name}` of part {name} has role {tensor.role}, which it cannot have there"
        every = [tensor for graph in graphs for tensor in (*graph.inputs, *graph.outputs)]
        used = frozenset().union(*(names(entry) for tensor in every for entry in tensor.shape))
        if used != part.dimensions.keys():
            return f"dimensions of part {name} are {listed(part.dimensions)}, its shapes use {listed(used)}"
        for end in ("minimum", "typical", "maximum"):
            sizes = {key: getattr(dimension, end) for key, dimension in part.dimensions.items()}
            for tensor in every:
                resolve(tensor.shape, sizes)
    return _of_constants(manifest) or _of_text(manifest) or _of_encode(manifest) or _of_decode(manifest)


def _of_constants(manifest: Manifest) -> str | None:
    """What parts make of a prompt or a picture is what the denoiser takes, and no two make the same."""
    constants = {t.name: t for graph in manifest.graphs.values() for t in graph.inputs if t.role == "constant"}
    makers: dict[str, str] = {}
    for name, part in manifest.parts.items():
        for made in part.graph.outputs:
            if made.role != "constant":
                continue
            taken = constants.get(made.name)
            if taken is None:
                return f"`{made.name}` is made by part {name}, and no graph takes it"
            if other := makers.get(made.name):
                return f"`{made.name}` is made by part {other} and by part {name}"
            makers[made.name] = name
            pairs = list(zip(made.shape, taken.shape, strict=False))
            same = all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))
            one = [a for a, b in pairs if b == "batch"] in ([], [1])
            if len(made.shape) != len(taken.shape) or not same or not one:
                what = "prompt" if name == "text" else "picture"
                return f"`{made.name}` is {shown(made.shape)} for one {what}, the graphs take {shown(taken.shape)}"
    return None


def _of_encode(manifest: Manifest) -> str | None:
    part = manifest.parts.get("encode")
    if part is None:
        return None
    expected = ["picture"] if part.shown is None else ["picture", part.shown.input]
    expected += [] if part.driven is None else [part.driven.pose, part.driven.scene]
    expected += [] if part.controlled is None else [part.controlled.mask, part.controlled.shown]
    if [t.name for t in part.graph.inputs] != expected:
        return f"part encode takes {listed(t.name for t in part.graph.inputs)}, expected {listed(expected)}"
    if problem := _of_pictures("encode", part):
        return problem
    made = [t for t in part.graph.outputs if t.role == "latent"]
    if part.fitted is not None:
        return _of_fitted(part, part.fitted)
    if part.controlled is not None:
        return _of_controlled(manifest, part, part.controlled)
    if part.sections is not None:
        return _of_sections(manifest, part, part.sections)
    if part.later is not None or [t.name for t in made] == [CONDITION]:
        return _of_condition(manifest, part) or _of_driven(manifest, part)
    if made and (tuple(t.name for t in part.graph.outputs) != BEGINNING or made[0].shape != made[1].shape):
        return f"part encode makes {listed(t.name for t in part.graph.outputs)}, a loop begins with mean and deviation"
    return None


def _of_fitted(part: PipelinePart, fitted: Fitted) -> str | None:
    """Pictures that keep their shapes become constant inputs alone, and the graph takes whatever is left of one."""
    beside = part.sizes or part.area or part.shown or part.sections or part.later
    if beside or any(t.role != "constant" for t in part.graph.outputs):
        return "part encode fits pictures, which goes with constant inputs of the transformer alone"
    longest = isqrt(fitted.area * fitted.ratio)
    for entry in part.graph.inputs[0].shape[2:]:
        name, side, _ = (None, 0, 0) if isinstance(entry, int) else linear(entry)
        allowed = None if name is None else part.dimensions[name]
        if allowed is None or (allowed.minimum, allowed.maximum) != (fitted.shortest // side, longest // side):
            return (
                f"`{entry}` of `picture` of part encode has another range than fitted pictures, whose sides are "
                f"{fitted.shortest} to {longest}"
            )
    return None


def _of_pictures(name: str, part: PipelinePart) -> str | None:
    """Pictures have three colours, and one that an image encoder is shown has one size."""
    for tensor in part.graph.inputs:
        if part.patches is not None and tensor.name == part.patches.input:
            continue
        if part.driven is not None and tensor.name in (part.driven.pose, part.driven.scene):
            continue
        if part.controlled is not None and tensor.name in (part.controlled.mask, part.controlled.shown):
            continue
        if tensor.role == "picture" and (len(tensor.shape) != 4 or tensor.shape[:2] != (1, 3)):
            return f"`{tensor.name}` of part {name} is {shown(tensor.shape)}"
        one = all(isinstance(extent, int) for extent in tensor.shape)
        if part.shown is not None and tensor.name == part.shown.input and not one:
            return f"`{tensor.name}` of part {name} is {shown(tensor.shape)}, expected one size"
    return None


def _of_patches(part: PipelinePart, inputs: Mapping[str, Tensor]) -> str | None:
    """Rows of patches are as long as these are, and each has its place."""
    if (patches := part.patches) is None:
        return None
    rows, places = inputs[patches.input], inputs[patches.places]
    values, tokens = 3 * patches.frames * patches.side**2, patches.merged**2
    count = places.shape[0]
    if rows.shape != (count, values) or places.shape != (count, 4) or places.dtype != "int64":
        return (
            f"`{patches.input}` and `{patches.places}` of part text are {shown(rows.shape)} and {shown(places.shape)}"
        )
    if not isinstance(count, str) or linear(count)[1:] != (tokens, 0):
        return f"`{patches.input}` of part text has {count} rows, expected {tokens} for each token"
    if patches.least > patches.most:
        return f"pictures of part text have {patches.least} to {patches.most} pixels"
    return None


def _of_condition(manifest: Manifest, part: PipelinePart) -> str | None:
    """What a video has beside the noise is made one latent frame at a time, as channels that the denoiser takes, or is
    the first frame itself."""
    latent = manifest.graphs["full"].input_of("latent").shape
    for name, graph in (("encode", part.graph), ("later", part.later)):
        if graph is None and not any(t.role == "cache_out" for t in part.graph.outputs):
            continue
        made = () if graph is None else tuple(t for t in graph.outputs if t.role == "latent")
        if [t.name for t in made] != [CONDITION]:
            return f"part encode makes {listed(t.name for t in made)} in graph {name}, expected `{CONDITION}`"
        shape = made[0].shape
        frames = 1 if part.driven is None or graph is part.later else 1 + part.driven.ahead
        if len(latent) != 5 or len(shape) != 5 or (shape[0], shape[2]) != (1, frames):
            return f"`{CONDITION}` of graph {name} is {shown(shape)}, the graphs take {shown(latent)}"
        if any(isinstance(n, str) for n in (shape[1], latent[1])) or not (
            shape[1] == latent[1] if manifest.replaces_first_frame else int(shape[1]) < int(latent[1])
        ):
            return f"`{CONDITION}` of graph {name} is {shown(shape)}, the graphs take {shown(latent)}"
    if part.later is None:
        return None
    wanted = set() if part.driven is None else {part.driven.pose, part.driven.scene}
    if (given := {t.name for t in part.later.inputs if t.role != "cache_in"}) != wanted:
        beside = f"{listed(wanted)} and caches" if wanted else "caches alone"
        return f"graph later of part encode takes {listed(given)}, expected {beside}"
    return _of_caches("encode", part.graph, part.later)


def _of_driven(manifest: Manifest, part: PipelinePart) -> str | None:
    """Frames of what drives a video have the size of the picture, as many as a latent frame has, and those of the face
    are as many as those of a section. All that later latent frames make belongs to what the first ones make."""
    if (driven := part.driven) is None:
        return None
    if part.later is None or part.cropped is not None:
        return "part encode is driven, which goes with a graph `later` and a picture that is not cut"
    sides = part.graph.inputs[0].shape[2:]
    for graph, frames in ((part.graph, 1), (part.later, manifest.sampling.time_scale)):
        shapes = {t.name: t.shape for t in graph.inputs}
        for name, channels in ((driven.pose, 3), (driven.scene, 4)):
            if shapes[name] != (wanted := (1, channels, frames, *sides)):
                return f"`{name}` of graph {_label(part, graph)} is {shown(shapes[name])}, expected {shown(wanted)}"
    made = {t.name: t.shape for t in part.graph.outputs if t.role != "cache_out"}
    for tensor in part.later.outputs:
        if tensor.role != "cache_out" and len(made.get(tensor.name, ())) != 5:
            return f"`{tensor.name}` of graph later is {shown(tensor.shape)}, which no first latent frame begins"
    shapes = {t.name: t.shape for graph in manifest.graphs.values() for t in graph.inputs if t.role == "constant"}
    face, latent = shapes.get(driven.face, ()), manifest.graphs["full"].input_of("latent").shape
    sizes = {name: dimension.typical for name, dimension in manifest.dimensions.items()}
    frames = manifest.sampling.time_scale * (resolve(latent, sizes)[2] - 1 - driven.ahead) + 1
    one = len(face) == 5 and face[1] == 3 and isinstance(face[3], int) and isinstance(face[4], int)
    if not one or resolve(face, sizes)[2] != frames:
        return f"`{driven.face}` is {shown(face)}, expected {frames} frames of the face, of one size"
    if "decode" in manifest.parts and manifest.parts["decode"].later is None:
        return "part decode has no graph `later`, which sections that are driven are decoded by"
    return None


def _of_controlled(manifest: Manifest, part: PipelinePart, by: Controlled) -> str | None:
    """Frames of what a video goes by have the size of the picture, and what is made of them is one latent frame of what
    the denoiser takes."""
    if part.later is None or part.sections or part.driven or part.shown or part.cropped:
        return "part encode goes by another video, which goes with a graph `later` and with nothing else"
    sides, scale = part.graph.inputs[0].shape[2:], manifest.sampling.time_scale
    for graph, frames in ((part.graph, 1), (part.later, scale)):
        wanted: dict[str, tuple[Entry, ...]] = {by.video: (1, 3, frames, *sides)} if graph is part.later else {}
        wanted |= {by.mask: (1, 1, frames, *sides), by.shown: (1, 1, 1, *sides)}
        seen = {t.name: t.shape for t in graph.inputs if t.role != "cache_in" and t.name != "picture"}
        if seen != wanted:
            return f"graph {_label(part, graph)} takes {listed(seen)} of other sizes than {listed(wanted)} has"
        made = {t.name: t.shape for t in graph.outputs if t.role != "cache_out"}
        if [*made] != [by.control] or len(made[by.control]) != 5 or made[by.control][2] != 1:
            return f"graph {_label(part, graph)} makes {listed(made)}, expected one latent frame of `{by.control}`"
        channels = made[by.control][1]
        if not isinstance(channels, int) or channels < 2 * by.latents:
            return f"`{by.control}` of part encode is {shown(made[by.control])}, with {by.latents} channels of latents"
    return _of_caches("encode", part.graph, part.later)


def _label(part: PipelinePart, graph: Graph) -> str:
    return "later" if graph is part.later else "encode"


def _of_sections(manifest: Manifest, part: PipelinePart, sections: Sections) -> str | None:
    """The picture becomes the first latent frame of a video, and the denoiser takes what sections hand on."""
    latents = [t for t in part.graph.outputs if t.role == "latent"]
    latent = manifest.graphs["full"].input_of("latent").shape
    if part.later is not None or tuple(t.name for t in latents) != BEGINNING:
        return f"part encode makes {listed(t.name for t in latents)}, videos in sections begin with mean and deviation"
    for tensor in latents:
        if len(latent) != 5 or tensor.shape != (1, latent[1], 1, *latents[0].shape[3:]):
            return f"`{tensor.name}` of part encode is {shown(tensor.shape)}, the graphs take {shown(latent)}"
    if twice := repeated((sections.new, *chain.from_iterable(sections.past))):
        return f"sections name `{twice}` twice"
    shapes = {t.name: t.shape for graph in manifest.graphs.values() for t in graph.inputs if t.role == "constant"}
    wanted: dict[str, tuple[int | str, ...]] = {sections.new: latent[2:3]}
    for number, (frames, places) in enumerate(sections.past):
        count = shapes[frames][2] if len(shapes.get(frames, ())) == 5 else 0
        if not isinstance(count, int) or count < (2 if number == 0 else 1):
            return f"`{frames}` of sections holds {count} frames, which are none, or of any number"
        wanted |= {frames: (*latent[:2], count, *latent[3:]), places: (count,)}
    for name, shape in wanted.items():
        if shapes.get(name) != shape:
            return f"`{name}` of sections is {shown(shapes.get(name))}, they hand the denoiser {shown(shape)}"
    if "decode" in manifest.parts and manifest.parts["decode"].tiles is None:
        return "part decode has no tiles, which the sections of a video are decoded in"
    return None


def _of_text(manifest: Manifest) -> str | None:
    part = manifest.parts.get("text")
    if part is None:
        return None
    inputs = {tensor.name: tensor for tensor in part.graph.inputs}
    named = [name for one in part.tokens for name in (one.input, one.mask, one.kept) if name is not None]
    if part.shown is not None:
        named.append(part.shown.input)
        encode = manifest.parts.get("encode")
        if encode is None or CONDITION not in [t.name for t in encode.graph.outputs]:
            return f"part text is shown a picture as `{part.shown.input}`, and no part makes a `{CONDITION}` of it"
    if part.patches is not None:
        named += [part.patches.input, part.patches.places]
        if "encode" not in manifest.parts:
            return f"part text is shown pictures as `{part.patches.input}`, and there is no part encode"
    if sorted(named) != sorted(inputs):
        return f"inputs of part text are {listed(inputs)}, its tokenizers make {listed(named)}"
    if problem := _of_pictures("text", part) or _of_patches(part, inputs):
        return problem
    for tokens in part.tokens:
        if "{}" not in tokens.template:
            return f"template of `{tokens.input}` has no {{}}"
        if tokens.size is not None and part.dimensions.get(tokens.size) is None:
            return f"size of `{tokens.input}` is {tokens.size}, which is no dimension of part text"
        extent = {tokens.size: tokens.length} if tokens.size else {}
        shape = (1, tokens.length + tokens.dropped)
        for name, made in ((tokens.input, shape), (tokens.mask, shape), (tokens.kept, (1, tokens.length))):
            if name is not None and (resolve(inputs[name].shape, extent) != made or inputs[name].dtype != "int64"):
                seen = inputs[name]
                return f"`{name}` is {seen.dtype} {shown(seen.shape)}, its tokenizer makes int64 {shown(made)}"
        if tokens.padding is None and (tokens.suffix is not None or tokens.kept is not None or tokens.spelled):
            return f"`{tokens.input}` has no padding, which a suffix, letters and states that are kept go with"
        if tokens.multiple is not None and (
            tokens.padding is None or tokens.size is None or tokens.side == "left" or tokens.suffix is not None
        ):
            return f"`{tokens.input}` is filled up to a multiple, which goes with padding behind it and a size"
        if tokens.spelled and tokens.suffix is None:
            return f"`{tokens.input}` is spelled in quotes, which goes with a suffix"
    return None


def _of_decode(manifest: Manifest) -> str | None:
    part = manifest.parts.get("decode")
    if part is None:
        return None
    if (part.dropped or part.skipped) and part.frame_rate is None:
        return f"part decode leaves {part.dropped or part.skipped} frames out of a video, and makes pictures"
    if [part.later, part.tiles, part.frame_rate].count(None) != (3 if part.frame_rate is None else 1):
        return f"frame_rate of part decode is {part.frame_rate}, which goes with a graph `later` or with tiles"
    for graph in (part.graph, part.later):
        if graph is None:
            continue
        given = [t for t in graph.inputs if t.role == "latent"]
        made = [t for t in graph.outputs if t.role == "picture"]
        if [t.name for t in given] != ["latents"] or [t.name for t in made] != ["picture"]:
            return "part decode makes a `picture` of `latents` and nothing else"
        latents, picture = given[0].shape, made[0].shape
        extents = 4 if part.frame_rate is None else 5
        colours = ((1, 3), (1, 4)) if part.frame_rate is None else ((1, 3),)  # a picture may have transparency
        if len(latents) != extents or latents[0] != 1 or len(picture) != extents or picture[:2] not in colours:
            return f"`latents` and `picture` of part decode are {shown(latents)} and {shown(picture)}"
    if (problem := _of_tiles(part) or _of_caches("decode", part.graph, part.later)) or part.later is None:
        return problem
    read, first = _one(part.later.inputs, "latent"), _one(part.graph.inputs, "latent")
    frames = [isinstance(one.shape[2], int) and one.shape[2] > 0 for one in (first, read)]
    if not all(frames) or read != first.model_copy(
        update={"shape": (*first.shape[:2], *read.shape[2:3], *first.shape[3:])}
    ):
        return f"`{read.name}` of graph later is {shown(read.shape)}, which it is not for the first latent frame"
    return None


def _of_tiles(part: PipelinePart) -> str | None:
    """The graph takes whatever tile can come: strides leave no gap, and all sizes up to the largest are in range."""
    tiles = part.tiles
    if tiles is None:
        return None
    if tiles.frame_stride > tiles.frames or tiles.side_stride > tiles.side:
        return f"strides of the tiles are {tiles.frame_stride} and {tiles.side_stride}, which leaves gaps between them"
    shape = next(t.shape for t in part.graph.inputs if t.role == "latent")
    for entry, most in zip(shape[2:], (tiles.frames + 1, tiles.side, tiles.side), strict=True):
        allowed = part.dimensions.get(str(entry))
        if allowed is None or (allowed.minimum, allowed.maximum) != (1, most):
            return f"`latents` of part decode is {shown(shape)}, tiles need a dimension of 1 to {most} for `{entry}`"
    return None


def _of_caches(name: str, first: Graph, later: Graph | None) -> str | None:
    """Graph `later` reads what either graph writes, and the first latent frame of a video has none before it."""
    written = {t.name.removeprefix("cache_out"): t for t in first.outputs if t.role == "cache_out"}
    if later is None or any(t.role == "cache_in" for t in first.inputs):
        return f"part {name} has caches that no call before it wrote" if later or written else None
    for side, role in ((later.inputs, "cache_in"), (later.outputs, "cache_out")):
        found = {t.name.removeprefix(role): t for t in side if t.role == role}
        if found.keys() != written.keys():
            return f"graph later has {listed(found)} of role {role}, the first latent frame leaves {listed(written)}"
        for key, tensor in found.items():
            if (tensor.dtype, tensor.shape) != (written[key].dtype, written[key].shape):
                return (
                    f"`{tensor.name}` is {tensor.dtype} {shown(tensor.shape)}, the first latent frame leaves "
                    f"{written[key].dtype} {shown(written[key].shape)}"
                )
    return None


def _one(tensors: Iterable[Tensor], role: str) -> Tensor:
    return next(tensor for tensor in tensors if tensor.role == role)


def repeated(given: Iterable[str]) -> str | None:
    seen: set[str] = set()
    return next((name for name in given if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


def listed(found: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(found)) or "none"


def shown(value: object) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
