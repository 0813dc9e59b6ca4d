"""Stable Diffusion 3 and 3.5: joint blocks over image and text, guidance by a batch of two halves."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from taylorseer_export.errors import CheckpointError
from taylorseer_export.families.family import Comfy, Defaults, Derived, Family, Input, Pipeline, patches, replaced
from taylorseer_export.families.whole import Modules, Tensors, Tokens, Whole, picture, spread


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    height, width = (f"{config['patch_size']}*{side}" for side in ("rows", "columns"))
    return (
        Input("hidden_states", ("batch", config["in_channels"], height, width), "latent"),
        Input("timestep", ("batch",), "step", "float32"),
        Input("encoder_hidden_states", ("batch", "text_tokens", config["joint_attention_dim"]), "constant"),
        Input("pooled_projections", ("batch", config["pooled_projection_dim"]), "constant"),
    )


def _dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    side = (2, config["pos_embed_max_size"])
    return {"batch": (1, 16), "rows": side, "columns": side, "text_tokens": (1, 1024)}


def _tables(config: Mapping[str, Any]) -> dict[str, Derived]:
    """The position table `[1, side * side, width]` as two `[side, width]`, whose sum it is.

    Half of the width says the column and half the row, so one line and one column of it hold all that it knows: 5 MB
    in the place of 906 MB for SD3.5-medium, of which every forecast step would read a part.
    """
    side, width = config["pos_embed_max_size"], config["num_attention_heads"] * config["attention_head_dim"]

    def line(table: Any, of_rows: bool) -> Any:
        square = table.reshape(side, side, width)
        columns, rows = square[0].clone(), square[:, 0].clone()
        columns[:, width // 2 :] = 0
        rows[:, : width // 2] = 0
        if any(not (square[row] == columns + rows[row]).all() for row in range(side)):
            raise CheckpointError(
                "`pos_embed.pos_embed` is not the sum of a table of rows and one of columns, expected SD3's sines and "
                "cosines; check --model"
            )
        return rows if of_rows else columns

    made = {}
    for name, of_rows in (("rows", True), ("columns", False)):
        make = partial(line, of_rows=of_rows)
        made[f"pos_embed.{name}"] = Derived("pos_embed.pos_embed", (side, width), make)
    return made


@contextmanager
def _without_table(model_class: Any) -> Iterator[None]:
    """A skeleton's position table has its shape and no numbers."""
    import torch

    embeddings = sys.modules[sys.modules[model_class.__module__].PatchEmbed.__module__]

    def table(embed_dim: int, grid_size: int, **_: Any) -> Any:
        return torch.zeros(1).expand(grid_size * grid_size, embed_dim)

    with replaced(embeddings, get_2d_sincos_pos_embed=table):
        yield


@contextmanager
def _from_lines(model: Any) -> Iterator[None]:
    """Positions of a picture from `_tables`, cut from their middle as the model cuts its own."""
    embedder = model.pos_embed

    def cropped(height: Any, width: Any) -> Any:
        high, wide = height // embedder.patch_size, width // embedder.patch_size
        top, left = (embedder.pos_embed_max_size - high) // 2, (embedder.pos_embed_max_size - wide) // 2
        rows, columns = embedder.rows[top : top + high], embedder.columns[left : left + wide]
        return (rows[:, None] + columns).flatten(0, 1)[None]

    with replaced(embedder, cropped_pos_embed=cropped):
        yield


def _encode(encoders: Modules, given: Tensors) -> dict[str, Any]:
    """CLIP's two encodings side by side, filled up to the width of T5's, and T5's behind them."""
    import torch

    clip = [encoders[name](given[name], output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
    t5 = encoders["text_encoder_3"](given["text_encoder_3"])[0]
    both = torch.cat([one.hidden_states[-2] for one in clip], -1)
    wide = torch.nn.functional.pad(both, (0, t5.shape[-1] - both.shape[-1]))
    return {
        "encoder_hidden_states": torch.cat([wide, t5], 1),
        "pooled_projections": torch.cat([one[0] for one in clip], -1),
    }


SD3 = Family(
    name="sd3",
    title="Stable Diffusion 3 and 3.5",
    model_class="SD3Transformer2DModel",
    reference="stabilityai/stable-diffusion-3.5-large",
    sites=(r"transformer_blocks\.\d+\.(attn2?|ff)",),
    stack_input=("transformer_blocks.0", "hidden_states"),
    stack_output=("norm_out", "x"),
    inputs=_inputs,
    dimensions=_dimensions,
    latent_sizes=patches,
    defaults=Defaults(steps=28, interval=4, warmup=3, order=1),
    scheduler_config={"shift": 3.0},
    guidance="batched",
    guidance_scale=7.0,
    pipeline=Pipeline(flow_steps="count"),
    comfy=lambda config: Comfy("SD3", {"encoder_hidden_states": "context", "pooled_projections": "y"}),
    whole=Whole(
        decode=picture,
        begin=spread,
        encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
        tokens=(
            Tokens("text_encoder", "tokenizer", 77),
            Tokens("text_encoder_2", "tokenizer_2", 77),
            Tokens("text_encoder_3", "tokenizer_3", 256, size="t5_tokens"),
        ),
        encode=_encode,
        negative="",
    ),
    lora_loader="SD3LoraLoaderMixin",
    typical={"text_tokens": 333},
    derived=_tables,
    built=_without_table,
    patched=_from_lines,
)
