"""Small random diffusers transformers and smooth inputs for them.

The weights are random but of a trained model's scale: every linear keeps its input's variance,
gates are of order one (tested), norm weights are not exactly one. The timestep embedding is smooth
over a step, as a trained one is: a random one makes every feature jump from step to step and then
no forecast means anything.
"""

# Shapes: S steps, B batch, T = height * width image tokens, L text tokens, C channels

import math

import diffusers  # what is newer than the oldest asked for is looked up when it is built
import torch
from diffusers import (
    ChromaTransformer2DModel,
    CogVideoXTransformer3DModel,
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HiDreamImageTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    Kandinsky5Transformer3DModel,
    LongCatImageTransformer2DModel,
    LTX2VideoTransformer3DModel,
    OvisImageTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from randomised import randomised


def tiny_flux(
    seed=0,
    guidance=True,
    double=2,
    single=2,
    heads=2,
    head_dim=16,
    in_channels=16,
    joint_attention_dim=24,
    pooled_projection_dim=20,
):
    """FLUX of width heads * head_dim, float32, eval; head_dim is a multiple of 16."""
    axis = head_dim * 3 // 8
    return randomised(
        lambda: FluxTransformer2DModel(
            in_channels=in_channels,
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=head_dim,
            num_attention_heads=heads,
            joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=pooled_projection_dim,
            guidance_embeds=guidance,
            axes_dims_rope=(head_dim - 2 * axis, axis, axis),
        ),
        seed,
    )


def mid_flux(seed=0, guidance=True, double=4, single=8):
    """The bench model: 4 double and 8 single blocks of width 512, for about 64 text tokens."""
    return tiny_flux(seed, guidance, double, single, 8, 64, 64, 256, 768)


def flux_inputs(model, steps, batch=1, height=4, width=4, text_tokens=6, seed=0):
    """Latents [S, B, T, C], timesteps [S] (sigma, from 1 down), conditioning; sizes in tokens."""
    config, rng = model.config, torch.Generator().manual_seed(seed)
    sigma = torch.linspace(1.0, 1.0 / steps, steps)
    shape = (batch, height * width, config.in_channels)
    img_ids = torch.zeros(height, width, 3)
    img_ids[..., 1] = torch.arange(height)[:, None]
    img_ids[..., 2] = torch.arange(width)[None, :]
    conditioning = {
        "encoder_hidden_states": torch.randn(batch, text_tokens, config.joint_attention_dim, generator=rng),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim, generator=rng),
        "img_ids": img_ids.flatten(0, 1),
        "txt_ids": torch.zeros(text_tokens, 3),
    }
    if config.guidance_embeds:
        conditioning["guidance"] = torch.full((batch,), 3.5)
    return _trajectory(sigma, shape, rng), sigma, conditioning


def kontext_inputs(model, steps, batch=1, height=4, width=4, text_tokens=6, seed=0, condition=(3, 5)):
    """As `flux_inputs`, with the latent of a conditioning image of `condition` (height, width) tokens."""
    latents, sigma, conditioning = flux_inputs(model, steps, batch, height, width, text_tokens, seed)
    rng = torch.Generator().manual_seed(seed + 100)
    count = condition[0] * condition[1]
    ids = torch.ones(count, 3)
    ids[:, 1], ids[:, 2] = torch.arange(count) // condition[1], torch.arange(count) % condition[1]
    image_latents = torch.randn(batch, count, model.config.in_channels, generator=rng)
    return latents, sigma, {**conditioning, "image_latents": image_latents, "image_ids": ids}


def tiny_flux2(seed=0, guidance=True, double=2, single=2):
    """FLUX.2 of width 32, float32, eval; without guidance as an input it is klein."""
    return randomised(
        lambda: Flux2Transformer2DModel(
            in_channels=16,
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guidance,
        ),
        seed,
    )


def flux2_inputs(model, steps, batch=1, height=4, width=4, text_tokens=6, seed=0):
    """As `flux_inputs`; places are whole numbers, four for each token, and text has places too."""
    config, rng = model.config, torch.Generator().manual_seed(seed)
    sigma = torch.linspace(1.0, 1.0 / steps, steps)
    txt_ids = torch.zeros(batch, text_tokens, 4, dtype=torch.int64)
    txt_ids[..., 3] = torch.arange(text_tokens)
    conditioning = {
        "encoder_hidden_states": torch.randn(batch, text_tokens, config.joint_attention_dim, generator=rng),
        "img_ids": _places(0, batch, height, width),
        "txt_ids": txt_ids,
    }
    if config.guidance_embeds:
        conditioning["guidance"] = torch.full((batch,), 4.0)
    return _trajectory(sigma, (batch, height * width, config.in_channels), rng), sigma, conditioning


def flux2_edit_inputs(model, steps, batch=1, height=4, width=4, text_tokens=6, seed=0, pictures=((3, 5), (2, 2))):
    """As `flux2_inputs`, with the latents of `pictures` (height, width in tokens) to go by."""
    latents, sigma, conditioning = flux2_inputs(model, steps, batch, height, width, text_tokens, seed)
    rng = torch.Generator().manual_seed(seed + 100)
    ids = torch.cat([_places(10 * (k + 1), batch, *sides) for k, sides in enumerate(pictures)], 1)
    image_latents = torch.randn(batch, ids.shape[1], model.config.in_channels, generator=rng)
    return latents, sigma, {**conditioning, "image_latents": image_latents, "image_ids": ids}


def tiny_flux2_kv(seed=3):
    """klein KV, with the attention that its pipeline gives it: rows of pictures see themselves alone."""
    model = tiny_flux2(seed, guidance=False, double=2)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.attn.set_processor(type(block.attn)._available_processors[-1]())
    return model


def tiny_flux3(seed=0, flow_map=False):
    """FLUX.3 of width 32, or one that was distilled, float32, eval."""
    return randomised(
        lambda: diffusers.Flux3Transformer2DModel(
            in_channels=16,
            cond_in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=(4, 4, 4, 4),
            flow_map=flow_map,
        ),
        seed,
    )


def flux3_inputs(model, steps, batch=1, height=4, width=4, text_tokens=6, seed=0):
    """As `flux_inputs`; rows and columns are half a place apart, and words count along the last axis."""
    config, rng = model.config, torch.Generator().manual_seed(seed)
    sigma = torch.linspace(1.0, 1.0 / steps, steps)
    txt_ids = torch.zeros(text_tokens, 4)
    txt_ids[:, 3] = torch.arange(text_tokens)
    conditioning = {
        "encoder_hidden_states": torch.randn(batch, text_tokens, config.joint_attention_dim, generator=rng),
        "img_ids": _places(0, 1, height, width)[0] / 2,
        "txt_ids": txt_ids,
    }
    return _trajectory(sigma, (batch, height * width, config.in_channels), rng), sigma, conditioning


def tiny_chroma(seed=0):
    """Chroma of width 32, float32, eval."""
    return randomised(
        lambda: ChromaTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=(4, 6, 6),
            approximator_hidden_dim=32,
            approximator_layers=2,
        ),
        seed,
    )


def chroma_inputs(model, steps, batch=1, height=4, width=4, text_tokens=6, seed=0):
    """As `flux_inputs`; the last text token of the first sample is padding."""
    config, rng = model.config, torch.Generator().manual_seed(seed)
    sigma = torch.linspace(1.0, 1.0 / steps, steps)
    mask = torch.ones(batch, text_tokens)
    mask[0, -1] = 0
    conditioning = {
        "encoder_hidden_states": torch.randn(batch, text_tokens, config.joint_attention_dim, generator=rng),
        "attention_mask": mask,
        "img_ids": _places(0, 1, height, width)[0, :, :3].float(),
        "txt_ids": torch.zeros(text_tokens, 3),
    }
    return _trajectory(sigma, (batch, height * width, config.in_channels), rng), sigma, conditioning


def tiny_longcat_image(seed=0):
    """LongCat-Image of width 32, float32, eval; its pipeline makes latents of 64 channels and no others."""
    return randomised(
        lambda: LongCatImageTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=(4, 6, 6),
        ),
        seed,
    )


def tiny_ovis_image(seed=0):
    """Ovis-Image of width 32, float32, eval."""
    return randomised(
        lambda: OvisImageTransformer2DModel(
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=(4, 6, 6),
        ),
        seed,
    )


def diagonal_inputs(model, steps, batch=1, height=4, width=4, text_tokens=6, seed=0, places=(0, 0)):
    """As `flux_inputs`; words run along the diagonal, and the picture's places begin with (picture, corner)."""
    config, rng = model.config, torch.Generator().manual_seed(seed)
    sigma = torch.linspace(1.0, 1.0 / steps, steps)
    txt_ids = torch.arange(text_tokens).float()[:, None] * torch.tensor([0.0, 1.0, 1.0])
    conditioning = {
        "encoder_hidden_states": torch.randn(batch, text_tokens, config.joint_attention_dim, generator=rng),
        "img_ids": _places(places[0], 1, height, width)[0, :, :3].float() + torch.tensor([0.0, places[1], places[1]]),
        "txt_ids": txt_ids,
    }
    return _trajectory(sigma, (batch, height * width, config.in_channels), rng), sigma, conditioning


def longcat_image_inputs(model, steps, **sizes):
    """As `diagonal_inputs`; the picture begins behind 512 words."""
    return diagonal_inputs(model, steps, places=(1, 512), **sizes)


def tiny_krea_2(seed=0):
    """Krea 2 of width 32, two heads of the words' for each of the picture's, float32, eval."""
    return randomised(
        lambda: diffusers.Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=48,
            timestep_embed_dim=64,
            text_hidden_dim=16,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=1,
            text_intermediate_size=24,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 6, 6),
        ),
        seed,
    )


def krea_2_inputs(model, steps, batch=1, height=4, width=4, text_tokens=6, seed=0):
    """As `flux_inputs`, with words of several layers; the last one of the first sample is padding."""
    config, rng = model.config, torch.Generator().manual_seed(seed)
    sigma = torch.linspace(1.0, 1.0 / steps, steps)
    mask = torch.ones(batch, text_tokens, dtype=torch.int64)
    mask[0, -1] = 0
    words = (batch, text_tokens, config.num_text_layers, config.text_hidden_dim)
    conditioning = {
        "encoder_hidden_states": torch.randn(words, generator=rng),
        "position_ids": _places(0, 1, height, width)[0, :, :3].float(),
        "encoder_attention_mask": mask,
    }
    return _trajectory(sigma, (batch, height * width, config.in_channels), rng), sigma, conditioning


def tiny_z_image(seed=0, layers=2):
    """Z-Image of width 32, float32, eval."""
    return randomised(
        lambda: ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=layers,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=24,
            axes_dims=[4, 6, 6],
            axes_lens=[128, 64, 64],
        ),
        seed,
    )


def z_image_inputs(model, steps, batch=1, height=4, width=4, text_tokens=6, seed=0):
    """Latents [S, B, C, 2H, 2W], timesteps [S] from 0 up, conditioning; sizes in tokens.

    The first sample has a word less than the others.
    """
    config, rng = model.config, torch.Generator().manual_seed(seed)
    sigma = torch.linspace(1.0, 1.0 / steps, steps)
    mask = torch.ones(batch, text_tokens, dtype=torch.int64)
    mask[0, -1] = 0
    conditioning = {
        "cap_feats": torch.randn(batch, text_tokens, config.cap_feat_dim, generator=rng),
        "cap_mask": mask,
    }
    return _trajectory(sigma, (batch, config.in_channels, 2 * height, 2 * width), rng), 1 - sigma, conditioning


def tiny_qwen_image(seed=0, layers=2, pictures_at_zero=False, heads=2):
    """Qwen-Image of width 16 * heads, float32, eval; `pictures_at_zero` as Qwen-Image-Edit-2511."""
    return randomised(
        lambda: QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=layers,
            attention_head_dim=16,
            num_attention_heads=heads,
            joint_attention_dim=24,
            axes_dims_rope=(4, 6, 6),
            zero_cond_t=pictures_at_zero,
        ),
        seed,
    )


def qwen_image_inputs(model, steps, batch=1, height=4, width=4, text_tokens=6, seed=0, width_of_text=None):
    """As `flux_inputs`; the last text token of the first sample is padding."""
    rng, width_of_text = torch.Generator().manual_seed(seed), width_of_text or model.config.joint_attention_dim
    sigma = torch.linspace(1.0, 1.0 / steps, steps)
    mask = torch.ones(batch, text_tokens, dtype=torch.int64)
    mask[0, -1] = 0
    conditioning = {
        "encoder_hidden_states": torch.randn(batch, text_tokens, width_of_text, generator=rng),
        "encoder_hidden_states_mask": mask,
        "img_shapes": torch.tensor([[[1, height, width]]]).repeat(batch, 1, 1),
    }
    return _trajectory(sigma, (batch, height * width, model.config.in_channels), rng), sigma, conditioning


def qwen_image_edit_inputs(model, steps, batch=1, height=4, width=4, text_tokens=6, seed=0, pictures=((3, 5), (2, 4))):
    """As `qwen_image_inputs`, with the latents of pictures of so many (height, width) tokens."""
    latents, sigma, conditioning = qwen_image_inputs(model, steps, batch, height, width, text_tokens, seed)
    rng = torch.Generator().manual_seed(seed + 100)
    shapes = torch.tensor([[1, *sides] for sides in ((height, width), *pictures)])
    count = int(shapes[1:].prod(1).sum())
    conditioning["img_shapes"] = shapes.repeat(batch, 1, 1)
    conditioning["image_latents"] = torch.randn(batch, count, model.config.in_channels, generator=rng)
    return latents, sigma, conditioning


def tiny_qwen_image_21(seed=0):
    """Qwen-Image 2.1 of width 32, float32, eval."""
    return randomised(
        lambda: diffusers.QwenImage21Transformer2DModel(
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=24,
            axes_dims_rope=(4, 6, 6),
        ),
        seed,
    )


def qwen_image_21_inputs(model, steps, **sizes):
    """As `qwen_image_inputs`; tokens of the picture are a multiple of 4."""
    return qwen_image_inputs(model, steps, width_of_text=model.config.context_in_dim, **sizes)


def tiny_pixart(seed=0):
    """PixArt-Sigma of width 32 on latents of 16 x 16, float32, eval."""
    return randomised(
        lambda: PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=32,
            sample_size=16,
            caption_channels=24,
            use_additional_conditions=False,
            interpolation_scale=1,
        ),
        seed,
    )


def pixart_inputs(model, steps, batch=1, text_tokens=6, seed=0):
    """As `sana_inputs`, of the one size that it has."""
    side = model.config.sample_size
    return sana_inputs(model, steps, batch, side, side, text_tokens, seed)


def tiny_sana(seed=0):
    """Sana of width 32, float32, eval."""
    return randomised(
        lambda: SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=24,
            sample_size=8,
        ),
        seed,
    )


def sana_inputs(model, steps, batch=1, height=4, width=4, text_tokens=6, seed=0):
    """Latents [S, B, C, H, W], timesteps [S] from 999 down, conditioning; the last token of the first is padding."""
    config, rng = model.config, torch.Generator().manual_seed(seed)
    timestep = torch.linspace(999.0, 999.0 / steps, steps)
    mask = torch.ones(batch, text_tokens)
    mask[0, -1] = 0
    conditioning = {
        "encoder_hidden_states": torch.randn(batch, text_tokens, config.caption_channels, generator=rng),
        "encoder_attention_mask": mask,
    }
    return _trajectory(timestep / 1000, (batch, config.in_channels, height, width), rng), timestep, conditioning


def tiny_sd3(seed=0, layers=2):
    """SD3.5 of width 32, the first block with its second attention, float32, eval."""
    return randomised(
        lambda: SD3Transformer2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=layers,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            caption_projection_dim=32,
            pooled_projection_dim=20,
            pos_embed_max_size=28,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        seed,
    )


def sd3_inputs(model, steps, batch=1, height=4, width=4, text_tokens=6, seed=0):
    """Latents [S, B, C, 2H, 2W], timesteps [S] from 1000 down, conditioning; sizes in tokens."""
    config, rng = model.config, torch.Generator().manual_seed(seed)
    sigma = torch.linspace(1.0, 1.0 / steps, steps)
    conditioning = {
        "encoder_hidden_states": torch.randn(batch, text_tokens, config.joint_attention_dim, generator=rng),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim, generator=rng),
    }
    return _trajectory(sigma, (batch, config.in_channels, 2 * height, 2 * width), rng), 1000 * sigma, conditioning


def tiny_hidream(seed=0, double=1, single=2):
    """HiDream of width 32, two of four experts chosen, float32, eval; its blocks read Llama layers 2, 0 and 1."""
    return randomised(
        lambda: HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=[20, 24],
            text_emb_dim=12,
            axes_dims_rope=(8, 4, 4),
            max_resolution=(64, 64),
            llama_layers=[2, 0, 1][: double + single],
        ),
        seed,
    )


def hidream_inputs(model, steps, batch=1, side=4, text_tokens=3, seed=0):
    """Latents [S, B, C, 2 side, 2 side], timesteps [S] from 1000 down, conditioning; sizes in tokens."""
    config, rng = model.config, torch.Generator().manual_seed(seed)
    sigma = torch.linspace(1.0, 1.0 / steps, steps)
    t5, llama = config.caption_channels
    conditioning = {
        "encoder_hidden_states_t5": torch.randn(batch, text_tokens, t5, generator=rng),
        "encoder_hidden_states_llama3": torch.randn(3, batch, text_tokens, llama, generator=rng),
        "pooled_embeds": torch.randn(batch, config.text_emb_dim, generator=rng),
    }
    return _trajectory(sigma, (batch, config.in_channels, 2 * side, 2 * side), rng), 1000 * sigma, conditioning


def tiny_dit(seed=0, layers=3, heads=2, head_dim=16, in_channels=4, sample_size=8, classes=10, sigma=True):
    """DiT on square latents, patch 2, float32, eval; sigma doubles the output channels."""
    return randomised(
        lambda: DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            in_channels=in_channels,
            out_channels=in_channels * (2 if sigma else 1),
            num_layers=layers,
            sample_size=sample_size,
            num_embeds_ada_norm=classes,
        ),
        seed,
    )


def dit_inputs(model, steps, batch=1, seed=0):
    """Latents [S, B, C, H, W], int64 timesteps [S] (even, down to 0), conditioning."""
    config, rng = model.config, torch.Generator().manual_seed(seed)
    timestep = torch.arange(steps - 1, -1, -1) * (1000 // steps)
    shape = (batch, config.in_channels, config.sample_size, config.sample_size)
    labels = torch.randint(config.num_embeds_ada_norm, (batch,), generator=rng)
    return _trajectory(timestep / 1000, shape, rng), timestep, {"class_labels": labels}


def tiny_framepack(seed=0, double=1, single=1, heads=2, head_dim=12):
    """FramePack's transformer with all three histories, float32, eval."""
    return randomised(
        lambda: HunyuanVideoFramepackTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            num_layers=double,
            num_single_layers=single,
            num_refiner_layers=1,
            text_embed_dim=20,
            pooled_projection_dim=16,
            rope_axes_dim=(4, 4, 4),
            has_image_proj=True,
            image_proj_dim=10,
            has_clean_x_embedder=True,
        ),
        seed,
    )


def framepack_inputs(model, steps, batch=1, frames=2, height=2, width=2, text_tokens=6, seed=0):
    """As `hunyuan_inputs`, with the past; height and width in units of 8 latent pixels."""
    config, rng = model.config, torch.Generator().manual_seed(seed + 1)
    latents, timestep, conditioning = hunyuan_inputs(
        model, steps, batch, frames, 4 * height, 4 * width, text_tokens, seed
    )
    conditioning["image_embeds"] = torch.randn(batch, 729, config.image_proj_dim, generator=rng)
    conditioning["indices_latents"] = torch.arange(20, 20 + frames)
    begin = 0
    for name, count in (("latents_history_4x", 16), ("latents_history_2x", 2), ("latents_clean", 2)):
        shape = (batch, config.in_channels, count, 8 * height, 8 * width)
        conditioning[name] = torch.randn(shape, generator=rng)
        conditioning[f"indices_{name}"] = torch.arange(begin, begin + count)
        begin += count
    return latents, timestep, conditioning


def tiny_wan(seed=0, layers=2, heads=2, head_dim=12, in_channels=4, image_dim=None, text_dim=20, out_channels=4):
    """Wan, patch (1, 2, 2), float32, eval; `image_dim` makes it image-to-video, as in Wan 2.1."""
    return randomised(
        lambda: WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=64,
            ffn_dim=48,
            num_layers=layers,
            image_dim=image_dim,
            added_kv_proj_dim=None if image_dim is None else heads * head_dim,
            rope_max_seq_len=32,
        ),
        seed,
    )


def wan_inputs(model, steps, batch=1, frames=2, height=3, width=2, text_tokens=6, seed=0):
    """Latents [S, B, C, F, H, W], timesteps [S] (from 1000 down), conditioning; height and width in patches."""
    config, rng = model.config, torch.Generator().manual_seed(seed)
    timestep = torch.linspace(1000.0, 1000.0 / steps, steps).round()
    shape = (batch, config.in_channels, frames, 2 * height, 2 * width)
    text_tokens = text_tokens if config.image_dim is None else 512
    conditioning = {"encoder_hidden_states": torch.randn(batch, text_tokens, config.text_dim, generator=rng)}
    if config.image_dim is not None:
        conditioning["encoder_hidden_states_image"] = torch.randn(batch, 257, config.image_dim, generator=rng)
    return _trajectory(timestep / 1000, shape, rng), timestep, conditioning


def tiny_wan_vace(seed=0):
    """Wan VACE of three blocks, hints for the first and the last of them, float32, eval."""
    return randomised(
        lambda: WanVACETransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=20,
            freq_dim=64,
            ffn_dim=48,
            num_layers=3,
            rope_max_seq_len=32,
            vace_layers=[0, 2],
            vace_in_channels=2 * 4 + 64,
        ),
        seed,
    )


def wan_vace_inputs(model, steps, **sizes):
    """As `wan_inputs`, with what the hints are made of, one stronger than the other."""
    latents, timestep, conditioning = wan_inputs(model, steps, **sizes)
    rng = torch.Generator().manual_seed(sizes.get("seed", 0) + 100)
    shape = (latents.shape[1], model.config.vace_in_channels, *latents.shape[3:])
    conditioning["control_hidden_states"] = torch.randn(shape, generator=rng)
    conditioning["control_hidden_states_scale"] = torch.tensor([1.0, 0.5])
    return latents, timestep, conditioning


def tiny_wan_animate(seed=0):
    """Wan Animate of two blocks, the first of which sees faces of 8 x 8 pixels, float32, eval."""
    return randomised(
        lambda: WanAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=12,
            latent_channels=4,
            out_channels=4,
            text_dim=20,
            freq_dim=64,
            ffn_dim=48,
            num_layers=2,
            image_dim=10,
            added_kv_proj_dim=24,
            rope_max_seq_len=32,
            motion_encoder_channel_sizes={"4": 6, "8": 6},
            motion_encoder_size=8,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=8,
            face_encoder_hidden_dim=12,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        ),
        seed,
    )


def wan_animate_inputs(model, steps, frames=3, **sizes):
    """As `wan_inputs`, with a pose and a face for every frame but the first."""
    latents, timestep, conditioning = wan_inputs(model, steps, frames=frames, **sizes)
    rng, config = torch.Generator().manual_seed(sizes.get("seed", 0) + 100), model.config
    batch, (high, wide), side = latents.shape[1], latents.shape[4:], config.motion_encoder_size
    pose = torch.randn(batch, config.latent_channels, frames - 1, high, wide, generator=rng)
    face = torch.randn(batch, 3, 4 * frames - 7, side, side, generator=rng)
    return latents, timestep, {**conditioning, "pose_hidden_states": pose, "face_pixel_values": face}


def tiny_kandinsky_5(seed=0, visual_cond=True):
    """Kandinsky 5 of width 32, patches of 2 x 2, if not said otherwise with channels for a picture, float32, eval."""
    return randomised(
        lambda: Kandinsky5Transformer3DModel(
            in_text_dim=20,
            in_text_dim2=12,
            time_dim=24,
            model_dim=32,
            ff_dim=48,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
            visual_cond=visual_cond,
        ),
        seed,
    )


def kandinsky_5_inputs(model, steps, batch=1, frames=2, height=3, width=2, text_tokens=6, seed=0):
    """Latents [S, B, F, H, W, C], timesteps [S] (from 1000 down), conditioning; height and width in patches."""
    config, rng = model.config, torch.Generator().manual_seed(seed)
    timestep = torch.linspace(1000.0, 1000.0 / steps, steps)
    conditioning = {
        "encoder_hidden_states": torch.randn(batch, text_tokens, config.in_text_dim, generator=rng),
        "pooled_projections": torch.randn(batch, config.in_text_dim2, generator=rng),
        "scale_factor": torch.tensor([1.0, 2.0, 2.0]),
    }
    channels = 2 * config.in_visual_dim + 1 if config.visual_cond else config.in_visual_dim
    shape = (batch, frames, 2 * height, 2 * width, channels)
    return _trajectory(timestep / 1000, shape, rng), timestep, conditioning


def tiny_cogvideox(seed=0, turned=True, layers=2, frames=5, width=6, **more):
    """CogVideoX of width 32, patches of 2 x 2, float32, eval; `turned` has no table of places and any size."""
    config = {"in_channels": 4, "out_channels": 4, **more}
    return randomised(
        lambda: CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            time_embed_dim=24,
            text_embed_dim=20,
            num_layers=layers,
            sample_width=width,
            sample_height=4,
            sample_frames=frames,
            max_text_seq_length=6,
            use_rotary_positional_embeddings=turned,
            **config,
        ),
        seed,
    )


def cogvideox_inputs(model, steps, batch=1, frames=2, height=2, width=None, text_tokens=6, seed=0):
    """Latents [S, B, F, C, H, W], timesteps [S] (from 999 down), conditioning; sizes in patches."""
    config, rng = model.config, torch.Generator().manual_seed(seed)
    width = width or config.sample_width // 2
    timestep = torch.linspace(999.0, 999.0 / steps, steps).round()
    conditioning = {"encoder_hidden_states": torch.randn(batch, text_tokens, config.text_embed_dim, generator=rng)}
    if config.ofs_embed_dim:
        conditioning["ofs"] = torch.tensor([2.0])
    if config.use_rotary_positional_embeddings:
        grid, width_of_head = (height, width), config.attention_head_dim
        tables = get_3d_rotary_pos_embed(width_of_head, None, grid, frames, grid_type="slice", max_size=grid)
        conditioning["image_rotary_emb"] = torch.stack(tables).view(2, frames, *grid, width_of_head)
    shape = (batch, frames * (config.patch_size_t or 1), config.in_channels, 2 * height, 2 * width)
    return _trajectory(timestep / 1000, shape, rng), timestep, conditioning


def tiny_hunyuan(seed=0, condition=None, in_channels=4, guidance=True, double=1, single=2, heads=2, head_dim=12):
    """HunyuanVideo, patch (1, 2, 2), float32, eval; `condition` is its `image_condition_type`."""
    return randomised(
        lambda: HunyuanVideoTransformer3DModel(
            in_channels=in_channels,
            out_channels=4,
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            num_layers=double,
            num_single_layers=single,
            num_refiner_layers=1,
            text_embed_dim=20,
            pooled_projection_dim=16,
            guidance_embeds=guidance,
            rope_axes_dim=(4, 4, 4),
            image_condition_type=condition,
        ),
        seed,
    )


def hunyuan_inputs(model, steps, batch=1, frames=2, height=3, width=2, text_tokens=6, seed=0):
    """Latents [S, B, C, F, H, W], timesteps [S] (from 1000 down), conditioning; height and width in patches.

    The last sample has two text tokens less than the others.
    """
    config, rng = model.config, torch.Generator().manual_seed(seed)
    timestep = torch.linspace(1000.0, 1000.0 / steps, steps)
    shape = (batch, config.in_channels, frames, 2 * height, 2 * width)
    mask = torch.ones(batch, text_tokens)
    mask[-1, text_tokens - 2 :] = 0
    conditioning = {
        "encoder_hidden_states": torch.randn(batch, text_tokens, config.text_embed_dim, generator=rng),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim, generator=rng),
    }
    if config.guidance_embeds:
        conditioning["guidance"] = torch.full((batch,), 6000.0)
    return _trajectory(timestep / 1000, shape, rng), timestep, conditioning


def tiny_hunyuan_15(seed=0, task="t2v", layers=2):
    """HunyuanVideo 1.5 of width 24, float32, eval; `task` is its `task_type`."""
    return randomised(
        lambda: HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=layers,
            num_refiner_layers=1,
            text_embed_dim=20,
            text_embed_2_dim=16,
            image_embed_dim=10,
            rope_axes_dim=(4, 4, 4),
            task_type=task,
        ),
        seed,
    )


def hunyuan_15_inputs(model, steps, batch=1, frames=2, height=3, width=2, text_tokens=6, glyph_tokens=4, seed=0):
    """Latents [S, B, C, F, H, W], timesteps [S] (from 1000 down), conditioning.

    The last sample has two text tokens less than the others, and the first no text that is to be written.
    """
    config, rng = model.config, torch.Generator().manual_seed(seed)
    timestep = torch.linspace(1000.0, 1000.0 / steps, steps)
    from_text = config.task_type == "t2v"
    channels = config.out_channels if from_text else config.in_channels
    mask, glyphs = torch.ones(batch, text_tokens), torch.ones(batch, glyph_tokens)
    mask[-1, text_tokens - 2 :] = 0
    glyphs[0] = 0
    conditioning = {
        "encoder_hidden_states": torch.randn(batch, text_tokens, config.text_embed_dim, generator=rng),
        "encoder_attention_mask": mask,
        "encoder_hidden_states_2": torch.randn(batch, glyph_tokens, config.text_embed_2_dim, generator=rng),
        "encoder_attention_mask_2": glyphs,
    }
    if not from_text:
        conditioning["image_embeds"] = torch.randn(batch, 729, config.image_embed_dim, generator=rng)
    shape = (batch, channels, frames, height, width)
    return _trajectory(timestep / 1000, shape, rng), timestep, conditioning


def tiny_ltx_2(seed=0, layers=2, heads=2, head_dim=24, channels=6):
    """LTX-2 with all that 2.3 has beside it: gates within attention, a modulated text. Float32, eval.

    The video is heads * head_dim wide and its sound 2/3 of that.
    """
    return randomised(
        lambda: LTX2VideoTransformer3DModel(
            in_channels=channels,
            out_channels=channels,
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            cross_attention_dim=heads * head_dim,
            gated_attn=True,
            cross_attn_mod=True,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=heads,
            audio_attention_head_dim=head_dim * 2 // 3,
            audio_cross_attention_dim=heads * head_dim * 2 // 3,
            audio_gated_attn=True,
            audio_cross_attn_mod=True,
            num_layers=layers,
            caption_channels=20,
            rope_type="split",
            perturbed_attn=True,
        ),
        seed,
    )


def ltx_2_inputs(model, steps, batch=1, frames=2, height=3, width=2, audio_tokens=5, text_tokens=7, seed=0):
    """Latents [S, B, T, C], timesteps [S] (from 1000 down), conditioning; in it the sound [S, B, A, C], with steps too.

    The last sample has two text tokens less than the others.
    """
    config, rng = model.config, torch.Generator().manual_seed(seed)
    timestep = torch.linspace(1000.0, 1000.0 / steps, steps)
    latents = _trajectory(timestep / 1000, (batch, frames * height * width, config.in_channels), rng)
    sound = _trajectory(timestep / 1000, (batch, audio_tokens, config.audio_in_channels), rng)
    mask = torch.ones(batch, text_tokens, dtype=torch.int64)
    mask[-1, text_tokens - 2 :] = 0
    text, spoken = (torch.randn(batch, text_tokens, config.caption_channels, generator=rng) for _ in range(2))
    return (
        latents,
        timestep,
        {
            "audio_hidden_states": sound,
            "encoder_hidden_states": text,
            "audio_encoder_hidden_states": spoken,
            "encoder_attention_mask": mask,
            "audio_encoder_attention_mask": mask.clone(),
            "video_coords": model.rope.prepare_video_coords(batch, frames, height, width, "cpu"),
            "audio_coords": model.audio_rope.prepare_audio_coords(batch, audio_tokens, "cpu").contiguous(),
        },
    )


# Name -> (family, how its tiny model is built, inputs for it).
MODELS = {
    "flux": ("flux", tiny_flux, flux_inputs),
    "plain": ("flux", lambda: tiny_flux(seed=1, guidance=False, double=1, single=1), flux_inputs),
    "kontext": ("flux-kontext", lambda: tiny_flux(seed=2, double=1), kontext_inputs),
    "flux2": ("flux2", tiny_flux2, flux2_inputs),
    "flux2-base": ("flux2", lambda: tiny_flux2(seed=1, guidance=False, double=1), flux2_inputs),
    "flux2-edit": ("flux2-edit", lambda: tiny_flux2(seed=2, double=1), flux2_edit_inputs),
    "flux2-kv": ("flux2-kv", tiny_flux2_kv, flux2_edit_inputs),
    "flux3": ("flux3", tiny_flux3, flux3_inputs),
    "flux3-distilled": ("flux3", lambda: tiny_flux3(seed=1, flow_map=True), flux3_inputs),
    "chroma": ("chroma", tiny_chroma, chroma_inputs),
    "z-image": ("z-image", tiny_z_image, z_image_inputs),
    "krea-2": ("krea-2", tiny_krea_2, krea_2_inputs),
    "longcat-image": ("longcat-image", tiny_longcat_image, longcat_image_inputs),
    "ltx-2": ("ltx-2", tiny_ltx_2, ltx_2_inputs),
    "ltx-2-image": ("ltx-2-image", lambda: tiny_ltx_2(seed=1, channels=8), ltx_2_inputs),
    "ovis-image": ("ovis-image", tiny_ovis_image, diagonal_inputs),
    "qwen-image": ("qwen-image", tiny_qwen_image, qwen_image_inputs),
    "qwen-image-edit": ("qwen-image-edit", lambda: tiny_qwen_image(seed=1), qwen_image_edit_inputs),
    "qwen-image-edit-2511": (
        "qwen-image-edit",
        lambda: tiny_qwen_image(seed=2, pictures_at_zero=True),
        qwen_image_edit_inputs,
    ),
    "qwen-image-2.1": ("qwen-image-2.1", tiny_qwen_image_21, qwen_image_21_inputs),
    "pixart": ("pixart", tiny_pixart, pixart_inputs),
    "sana": ("sana", tiny_sana, sana_inputs),
    "sd3": ("sd3", tiny_sd3, sd3_inputs),
    "hidream": ("hidream", tiny_hidream, hidream_inputs),
    "dit": ("dit", tiny_dit, dit_inputs),
    "framepack": ("framepack", tiny_framepack, framepack_inputs),
    "hunyuan": ("hunyuan-video", tiny_hunyuan, hunyuan_inputs),
    "hunyuan-channels": ("hunyuan-video", lambda: tiny_hunyuan(1, "latent_concat", 9, False), hunyuan_inputs),
    "hunyuan-replace": ("hunyuan-video", lambda: tiny_hunyuan(2, "token_replace"), hunyuan_inputs),
    "hunyuan-1.5": ("hunyuan-video-1.5", tiny_hunyuan_15, hunyuan_15_inputs),
    "hunyuan-1.5-i2v": ("hunyuan-video-1.5", lambda: tiny_hunyuan_15(1, "i2v"), hunyuan_15_inputs),
    "kandinsky-5": ("kandinsky-5", tiny_kandinsky_5, kandinsky_5_inputs),
    "kandinsky-5-t2i": ("kandinsky-5", lambda: tiny_kandinsky_5(1, visual_cond=False), kandinsky_5_inputs),
    "cogvideox": ("cogvideox", tiny_cogvideox, cogvideox_inputs),
    "cogvideox-table": ("cogvideox", lambda: tiny_cogvideox(1, turned=False, layers=1, width=8), cogvideox_inputs),
    "cogvideox-image": (
        "cogvideox",
        lambda: tiny_cogvideox(2, layers=1, in_channels=8, patch_size_t=2, ofs_embed_dim=24),
        cogvideox_inputs,
    ),
    "wan": ("wan", tiny_wan, wan_inputs),
    "wan-image": ("wan", lambda: tiny_wan(seed=1, in_channels=12, image_dim=10), wan_inputs),
    "wan-5b-image": ("wan-5b-image", lambda: tiny_wan(2, in_channels=48, out_channels=48), wan_inputs),
    "wan-vace": ("wan-vace", tiny_wan_vace, wan_vace_inputs),
    "wan-animate": ("wan-animate", tiny_wan_animate, wan_animate_inputs),
}


def of_families():
    """Family -> the name of its first model."""
    return {family: name for name, (family, *_) in reversed(MODELS.items())}


def _places(first, batch, height, width):
    """(first, row, column, 0) of each token of a picture, [B, T, 4] int64."""
    ids = torch.zeros(height, width, 4, dtype=torch.int64)
    ids[..., 0], ids[..., 1], ids[..., 2] = first, torch.arange(height)[:, None], torch.arange(width)
    return ids.flatten(0, 1).repeat(batch, 1, 1)


def _trajectory(level, shape, rng):
    """Latents [S, *shape] of unit variance that turn from noise (level 1) to data (level 0)."""
    noise, data = (torch.randn(shape, generator=rng) for _ in range(2))
    angle = level.reshape(-1, *[1] * len(shape)) * math.pi / 2
    return angle.sin() * noise + angle.cos() * data
