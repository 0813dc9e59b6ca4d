"""Pictures of coloured shapes: drawn with their captions, and read again without."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (225, 45, 45),
    "green": (40, 175, 75),
    "blue": (50, 95, 235),
    "yellow": (250, 215, 45),
    "purple": (150, 60, 190),
    "orange": (250, 135, 25),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUND = (26, 28, 38)


@dataclass(frozen=True)
class Thing:
    """One coloured shape of a picture; position and radius in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float

    def __str__(self) -> str:
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.shape}"


def distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels from a shape's edge, negative inside; (0, 0) is its centre."""
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    if shape == "square":
        return np.maximum(abs(dx), abs(dy)) - 0.88 * radius
    if shape == "triangle":
        side = 0.894 * abs(dx) - 0.447 * (dy + 1.1 * radius)
        return np.maximum(side, dy - 0.9 * radius)
    arm, reach = 0.34 * radius, 1.02 * radius
    upright = np.maximum(abs(dx) - arm, abs(dy) - reach)
    return np.minimum(upright, np.maximum(abs(dx) - reach, abs(dy) - arm))


def coverage(thing: Thing, height: int, width: int) -> np.ndarray:
    """Share of every pixel that a shape covers, [height, width] in [0, 1]: the antialiasing."""
    y, x = np.mgrid[0:height, 0:width] + 0.5
    return np.clip(0.5 - distance(thing.shape, x - thing.x, y - thing.y, thing.radius), 0, 1)


def render(things: list[Thing], height: int, width: int) -> np.ndarray:
    """Draw shapes on the background: [height, width, 3] float in [0, 255]."""
    picture = np.empty((height, width, 3))
    picture[:] = BACKGROUND
    for thing in things:
        share = coverage(thing, height, width)[..., None]
        picture += share * (np.array(COLOURS[thing.colour]) - picture)
    return picture


def random_scene(rng: np.random.Generator, height: int, width: int) -> tuple[str, list[Thing]]:
    """A caption and a picture's shapes: one shape in three pictures of ten, else a related pair.

    The two colours of a pair differ, so that a drawn pair can be told apart by colour.
    """
    colours = rng.choice(list(COLOURS), size=2, replace=False)
    shapes = rng.choice(SHAPES, size=2)
    short = min(height, width)
    if rng.random() < 0.3:
        x, y = width / 2 + short * rng.uniform(-0.08, 0.08), height / 2 + short * rng.uniform(-0.08, 0.08)
        thing = Thing(colours[0], shapes[0], x, y, short * rng.uniform(0.25, 0.36))
        return str(thing), [thing]
    relation = RELATIONS[rng.integers(len(RELATIONS))]
    sideways = relation in ("left of", "right of")
    things = []
    for place, colour, shape in zip((-1, 1), colours, shapes, strict=True):
        if relation in ("right of", "below"):
            place = -place
        along, across = place * 0.25 + rng.uniform(-0.03, 0.03), rng.uniform(-0.09, 0.09)
        dx, dy = (along, across) if sideways else (across, along)
        radius = short * rng.uniform(0.165, 0.215)
        things.append(Thing(colour, shape, width * (0.5 + dx), height * (0.5 + dy), radius))
    return f"{things[0]} {relation} {things[1]}", things


def found_in(picture: np.ndarray) -> dict[str, Thing]:
    """The shapes a picture shows, by colour: read from the pixels, without the caption.

    Pixels go to the nearest colour or background; a colour with at least one pixel in 85 is a shape, and
    the kind is the one whose rendering at the same place overlaps most (at least 0.6).
    """
    names = list(COLOURS)
    palette = np.array([BACKGROUND, *COLOURS.values()], dtype=np.float64)
    away = ((picture[:, :, None].astype(np.float64) - palette) ** 2).sum(axis=3)
    nearest = away.argmin(axis=2)
    # Edge pixels of white and yellow pass through other colours; only clear pixels count.
    nearest[away.min(axis=2) > 45**2] = 0
    found = {}
    height, width = nearest.shape
    for row, colour in enumerate(names, start=1):
        mask = nearest == row
        if mask.sum() < mask.size / 85:
            continue
        ys, xs = np.nonzero(mask)
        middle_x, middle_y = (xs.min() + xs.max() + 1) / 2, (ys.min() + ys.max() + 1) / 2
        spread = max(np.ptp(xs), np.ptp(ys)) / 2 + 0.5
        best = (0.6, "")
        for shape in SHAPES:
            for radius in spread * np.linspace(0.85, 1.3, 7):
                # The triangle's centre is lower than the middle of its box.
                lower = 0.1 * radius if shape == "triangle" else 0.0
                thing = Thing(colour, shape, middle_x, middle_y + lower, radius)
                drawn = coverage(thing, height, width) > 0.7
                overlap = (drawn & mask).sum() / (drawn | mask).sum()
                best = max(best, (overlap, shape))
        found[colour] = Thing(colour, best[1], middle_x, middle_y, spread)
    return found


def agrees(picture: np.ndarray, things: list[Thing], caption: str) -> dict[str, bool]:
    """Whether a picture shows the right colours, those in the right shapes, rightly arranged."""
    found = found_in(picture)
    colours = set(found) == {thing.colour for thing in things}
    shapes = colours and all(found[thing.colour].shape == thing.shape for thing in things)
    relation = colours
    if colours and len(things) == 2:
        first, second = (found[thing.colour] for thing in things)
        gap_x, gap_y = second.x - first.x, second.y - first.y
        gap = {"left": gap_x, "right": -gap_x, "above": gap_y, "below": -gap_y}
        relation = next(value for word, value in gap.items() if word in caption.split()) > 0.19 * min(picture.shape[:2])
    return {"colours": colours, "shapes": shapes, "relation": relation, "all": shapes and relation}
