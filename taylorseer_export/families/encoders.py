"""What the text encoders of several families have in common, in a form that exports.

Shapes: T tokens, P patches, D width.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any

from taylorseer_export.families.family import replaced
from taylorseer_export.families.whole import Chat

ANSWER = "<|im_end|>\n<|im_start|>assistant\n"  # in ChatML what stands behind the prompt
DESCRIBE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)


def asked(system: str = "") -> str:
    """In ChatML what stands before the prompt: what the model is told, if anything, and the head of the question."""
    told = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return told + "<|im_start|>user\n"


def told(system: str = "", before: str = "", in_parts: bool = False, **options: Any) -> Chat:
    """`chat` of `Tokens`: what the model is told, if anything, and the prompt behind `before`.

    Args:
        system: What it is told.
        before: What stands before the prompt.
        in_parts: Whether a message is a list of parts, as of models that see pictures too.
        options: Of the tokenizer's chat template.
    """

    def chat(prompt: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        said = [("system", system), ("user", before + prompt)]
        return [
            {"role": role, "content": [{"type": "text", "text": text}] if in_parts else text}
            for role, text in said[0 if system else 1 :]
        ], options

    return chat


def layers(encoder: Any, tokens: Any, **given: Any) -> Any:
    """The states `[1, T, D]` of a language model before its first layer and behind each."""
    return encoder(input_ids=tokens, output_hidden_states=True, use_cache=False, **given).hidden_states


def one_place(model: Any) -> AbstractContextManager[None]:
    """Time, row and column of a word are one place: Qwen3-VL need not choose among their turns, as it does in place."""
    import torch

    return replaced(model.rotary_emb, recomposition_frequencies=lambda turns: torch.cat([turns[0], turns[0]], -1))


def seen_by_qwen(eyes: Any, patches: Any, places: Any) -> Any:
    """What the eyes of Qwen2.5-VL make of patches `[P, ...]` of several pictures: `[tokens, D]`.

    The original sorts patches by windows and splits them by numbers that are known when it runs. Here each stays in its
    place and attends to those of its window, or of its picture.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    rotate = sys.modules[type(eyes).__module__].apply_rotary_pos_emb_vision
    states = eyes.patch_embed(patches)
    # By row and by column; transformers 4 asks for all that there may be, 5 for those that there are.
    angles = (places[:, 2:, None].float() * eyes.rotary_pos_emb.inv_freq.float()).flatten(1)
    angles = torch.cat([angles, angles], -1)
    turns = angles.cos(), angles.sin()
    picture, window = (places[:, k : k + 1] == places[:, k] for k in range(2))
    for number, block in enumerate(eyes.blocks):
        own = block.attn
        parts = own.qkv(block.norm1(states)).unflatten(1, (3, own.num_heads, -1)).unbind(1)
        turned = (*rotate(*parts[:2], *turns), parts[2])
        query, key, value = (part.transpose(0, 1)[None] for part in turned)
        mask = picture if number in eyes.fullatt_block_indexes else window
        made = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=own.scaling)
        states = states + own.proj(made[0].transpose(0, 1).flatten(1))
        states = states + block.mlp(block.norm2(states))
    return eyes.merger(states)
