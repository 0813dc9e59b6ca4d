"""Pictures: of the embedded DiT's latents, as files, and side by side with labels; computed with numpy alone.

Pillow is imported only by the functions that draw or write.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from taylorseer_export.bundle.atomic import replacing
from taylorseer_export.errors import ConfigError, first_line

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageFont import FreeTypeFont
    from PIL.ImageFont import ImageFont as BitmapFont

GRID_GAP = 4
"""Space between and around the pictures of a grid (output pixels)."""

_FONT_PIXELS = 14
_BACKGROUND = (255, 255, 255)
_INK = (20, 20, 20)


def pictures_from_dit_latents(latents: np.ndarray) -> np.ndarray:
    """Pictures of the embedded DiT's latents: `round(clip((x + 1) / 2, 0, 1) * 255)`, grey as RGB.

    Args:
        latents: [B, 1, height, width] of any float dtype, nominally in [-1, 1].

    Returns:
        [B, height, width, 3] uint8; the three channels are equal.

    Raises:
        ConfigError: The array is not [B, 1, height, width].
    """
    latents = np.asarray(latents)
    if latents.ndim != 4 or latents.shape[1] != 1:
        raise ConfigError(
            f"DiT latents shape is {list(latents.shape)}, expected [B, 1, height, width] (one grey "
            "channel); pass the latents of the embedded DiT"
        )
    return np.repeat(_to_uint8(latents)[:, 0, :, :, None], 3, axis=3)


def write_png(path: str | Path, picture: np.ndarray, scale: int = 1) -> None:
    """Write one picture as PNG, enlarged `scale` times, every pixel becoming a square.

    Args:
        path: File to write; its folder must exist.
        picture: [height, width, 3] uint8, RGB, or [height, width, 4], RGBA.
        scale: Enlargement, at least 1 (times).

    Raises:
        ConfigError: The array is not a uint8 RGB picture, or the scale is below 1.
    """
    Path(path).write_bytes(png(picture, scale))


def png(picture: np.ndarray, scale: int = 1) -> bytes:
    """The content of the file that `write_png` writes; same arguments and errors."""
    stream = io.BytesIO()
    _enlarged(picture, scale).save(stream, format="PNG")
    return stream.getvalue()


def check_format(path: Path, option: str = "--out") -> None:
    """Refuse a file whose extension is of no picture format that can be written here.

    Raises:
        ConfigError: Names the usual ones.
    """
    from PIL import Image

    name = Image.registered_extensions().get(path.suffix.lower())
    try:
        if name is None:
            raise ValueError(path.suffix or "no extension")
        Image.new("RGB", (16, 16)).save(io.BytesIO(), format=name)
    except (OSError, ValueError, KeyError) as error:  # a format that is read alone, or whose library is missing
        raise ConfigError(
            f"{option} is {path}, expected a picture whose format can be written (.png, .jpg, .webp, ...), or "
            "NAME.safetensors for latents; change the extension"
        ) from error


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write whole or not at all, in the format that the extension says; a JPEG of one with transparency is on white."""
    from PIL import Image

    kind = Image.registered_extensions()[path.suffix.lower()]
    if kind.startswith("JPEG") and picture.mode == "RGBA":
        picture = Image.fromarray(opaque(np.asarray(picture)))
    with replacing(path) as partial:
        picture.save(partial, format=kind)


def plain(picture: np.ndarray) -> Image.Image:
    """A picture `[height, width, 3]` or `[height, width, 4]` uint8 as it is."""
    return _enlarged(picture, 1)


def read_picture(path: Path) -> np.ndarray:
    """The picture in a file, `[height, width, 3]` uint8; on white where it is transparent.

    Raises:
        ConfigError: There is no such file, or it holds no picture.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return opaque(np.asarray(image.convert("RGBA")))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(
            f"--image is {path}, expected a picture that Pillow reads ({first_line(error)}); check the file"
        ) from error


def opaque(picture: np.ndarray) -> np.ndarray:
    """`[..., height, width, 4]` uint8 with alpha, on white: `[..., height, width, 3]`."""
    share = picture[..., 3:].astype(np.float32) / 255
    return np.rint(picture[..., :3] * share + 255 * (1 - share)).astype(np.uint8)


def resized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture `[..., ..., 3]` uint8 at another size, by Pillow's Lanczos filter as diffusers resizes."""
    from PIL import Image

    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))


def grey(picture: np.ndarray) -> np.ndarray:
    """How bright a picture `[height, width, 3]` uint8 is, `[height, width]` uint8, as Pillow reckons it."""
    from PIL import Image

    return np.asarray(Image.fromarray(picture).convert("L"))


def covering(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture `[..., ..., 3]` uint8 at another size, in its own shape: what is outside of the middle is cut off.

    As diffusers does it for `resize_mode="crop"`.
    """
    own = picture.shape[:2]
    wide = width if width / height > own[1] / own[0] else own[1] * height // own[0]
    high = height if width / height <= own[1] / own[0] else own[0] * width // own[1]
    top, left = high // 2 - height // 2, wide // 2 - width // 2
    made = np.zeros((height, width, 3), np.uint8)  # where rounding leaves a row or column out, it is black
    seen = resized(picture, high, wide)[top : top + height, left : left + width]
    made[: seen.shape[0], : seen.shape[1]] = seen
    return made


def on_black(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture `[..., ..., 3]` uint8 at another size, in its own shape, on black.

    As diffusers does it for a character with `resize_mode="fill"`, where the Lanczos filter takes the place of the
    bilinear one that is asked for: its class sets all options once more.
    """
    own = picture.shape[:2]
    wide = width if width / height < own[1] / own[0] else max(1, own[1] * height // own[0])
    high = height if width / height >= own[1] / own[0] else max(1, own[0] * width // own[1])
    top, left = height // 2 - high // 2, width // 2 - wide // 2
    made = np.zeros((height, width, 3), np.uint8)
    made[top : top + high, left : left + wide] = resized(picture, high, wide)
    return made


def passed_on(picture: np.ndarray) -> np.ndarray:
    """A picture uint8 after diffusers made floats from -1 to 1 of it, and transformers bytes of these for Pillow.

    These are cut off and not rounded, so where the floats are below the byte that they were made of it is one less.
    """
    values = picture.astype(np.float32) / 255
    back = (2 * values - 1 + 1) / 2
    return (back * 255).astype(np.uint8)


def seen_by_encoder(picture: np.ndarray, size: tuple[int, int], edge: int | None, name: str) -> np.ndarray:
    """A picture `[..., ..., 3]` uint8 as an image encoder sees it, `[height, width, 3]` uint8.

    As transformers does it with Pillow: brought to the size; or until its shorter side is `edge`, and then cut to the
    size about its middle. Both round down.

    Args:
        picture: It.
        size: (height, width) in pixels.
        edge: Pixels; None cuts nothing.
        name: Of Pillow's filter, like `bicubic`.
    """
    from PIL import Image

    sides = picture.shape[:2]
    height, width = size if edge is None else (edge * side // min(sides) for side in sides)
    image = Image.fromarray(picture).resize((width, height), Image.Resampling[name.upper()])
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return np.asarray(image)[top : top + size[0], left : left + size[1]]


def grid(
    rows_of_pictures: Sequence[Sequence[np.ndarray]],
    scale: int = 1,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> Image.Image:
    """Table of pictures with labels, for a report or a preview.

    With R rows and C columns of [h, w] pictures and no labels, the result is
    `C * (w * scale + 4) + 4` wide and `R * (h * scale + 4) + 4` high. Row labels add a column on
    the left as wide as the widest; column labels are wrapped at cell width and add a head.

    Args:
        rows_of_pictures: R rows of C pictures, each [h, w, 3] or [h, w, 4] uint8, all of one size.
        scale: Enlargement of each picture, at least 1 (times).
        row_labels: R texts, or none.
        column_labels: C texts, or none.

    Returns:
        The table as a PIL image, RGB; RGBA where a picture is.

    Raises:
        ConfigError: No pictures, rows of unequal length, pictures of unequal size, a number of
            labels that does not fit, or a scale below 1.
    """
    from PIL import Image, ImageDraw, ImageFont

    rows = [[_enlarged(picture, scale) for picture in row] for row in rows_of_pictures]
    row_lengths = sorted({len(row) for row in rows})
    if len(row_lengths) != 1 or row_lengths == [0]:
        raise ConfigError(
            f"grid row length is {row_lengths}, expected one length of at least 1 (pictures); "
            "pass the same number of pictures in every row"
        )
    sizes = sorted({picture.size for row in rows for picture in row})
    if len(sizes) != 1:
        raise ConfigError(
            f"grid picture size is {sizes}, expected one size (width, height in output pixels); "
            "draw pictures of different sizes as separate grids"
        )
    for what, labels, count in (
        ("row", row_labels, len(rows)),
        ("column", column_labels, row_lengths[0]),
    ):
        if len(labels) not in (0, count):
            raise ConfigError(
                f"number of {what} labels is {len(labels)}, expected 0 or {count} (one each "
                f"{what}); pass one label for each {what}, or none"
            )

    width, height = sizes[0]
    font = ImageFont.load_default(size=_FONT_PIXELS)
    line = _FONT_PIXELS + 4
    heads = [_wrap(text, width, font) for text in column_labels]
    left = max((int(font.getlength(text)) + 2 * GRID_GAP for text in row_labels), default=0)
    top = max((len(head) for head in heads), default=0) * line
    table = Image.new(
        rows[0][0].mode,
        (
            left + GRID_GAP + row_lengths[0] * (width + GRID_GAP),
            top + GRID_GAP + len(rows) * (height + GRID_GAP),
        ),
        _BACKGROUND,
    )
    draw = ImageDraw.Draw(table)
    for column, head in enumerate(heads):
        x = left + GRID_GAP + column * (width + GRID_GAP)
        # The last line rests on the picture, so short labels stay next to what they name.
        for number, text in enumerate(head):
            draw.text((x, top - (len(head) - number) * line + 2), text, fill=_INK, font=font)
    for row, pictures in enumerate(rows):
        y = top + GRID_GAP + row * (height + GRID_GAP)
        if row_labels:
            draw.text((GRID_GAP, y + (height - line) // 2), row_labels[row], fill=_INK, font=font)
        for column, picture in enumerate(pictures):
            table.paste(picture, (left + GRID_GAP + column * (width + GRID_GAP), y))
    return table


def _to_uint8(values: np.ndarray) -> np.ndarray:
    """Map [-1, 1] to [0, 255], clipping what lies outside."""
    unit = np.clip((values.astype(np.float32) + 1.0) / 2.0, 0.0, 1.0)
    return np.rint(unit * 255.0).astype(np.uint8)


def _enlarged(picture: np.ndarray, scale: int) -> Image.Image:
    """PIL image of a picture, each pixel repeated `scale` times in both directions."""
    from PIL import Image

    picture = np.asarray(picture)
    if picture.ndim != 3 or picture.shape[2] not in (3, 4) or picture.dtype != np.uint8:
        raise ConfigError(
            f"picture is {list(picture.shape)} {picture.dtype}, expected [height, width, 3] uint8 "
            "(RGB pixels, or RGBA); convert latents with pictures_from_dit_latents"
        )
    if scale < 1:
        raise ConfigError(f"scale is {scale}, expected a whole number of at least 1 (times); use 1 for no enlargement")
    size = (picture.shape[1] * scale, picture.shape[0] * scale)
    return Image.fromarray(picture).resize(size, Image.Resampling.NEAREST)


def _wrap(text: str, width: int, font: FreeTypeFont | BitmapFont) -> list[str]:
    """Break a text at spaces into lines no wider than `width`, where its words allow it."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
