"""Unmodified diffusers pipelines around tiny transformers.

Text encoders and VAE are random, the tokenizer knows letters.

Nothing is downloaded and nothing is trained: what matters is that a pipeline runs whole, from prompt to picture.
"""

import string
from types import MappingProxyType, SimpleNamespace

import diffusers  # what is newer than the oldest versions asked for is looked up when it is built
import torch
import transformers
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxKontextPipeline,
    FluxPipeline,
    HiDreamImagePipeline,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    Kandinsky5T2IPipeline,
    Kandinsky5T2VPipeline,
    LongCatImagePipeline,
    LTX2Pipeline,
    OvisImagePipeline,
    PixArtSigmaPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanAnimatePipeline,
    WanImageToVideoPipeline,
    WanPipeline,
    WanVACEPipeline,
    ZImagePipeline,
)
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = {word: k for k, word in enumerate(["<pad>", "</s>", "<unk>", *string.ascii_lowercase])}
# What the template of a conversation about a picture has besides.
MARKS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>"]
PICTURE = "<|image_pad|>"  # what stands for a token of a picture in prompts of Qwen2.5-VL
TALK = WORDS | {mark: len(WORDS) + k for k, mark in enumerate(MARKS)}
# What that of Mistral has.
ORDERS = ["<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "[IMG]"]
TOLD = WORDS | {mark: len(WORDS) + k for k, mark in enumerate(ORDERS)}
# What those of Qwen have.
TURNS = ["<|im_start|>", "<|im_end|>", PICTURE]
CHATS = WORDS | {mark: len(WORDS) + k for k, mark in enumerate([*TURNS, "\n", "'", '"'])}
# Of the encoders of FLUX.2 that are looked at; those of the published ones lie so deep that their graphs take a minute.
LAYERS = (1, 2, 3)


def flux_pipeline(transformer, pipeline=FluxPipeline):
    """Prompts of letters; pictures of a multiple of 4 pixels."""
    config = transformer.config
    return _quiet(
        pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=tiny_vae(config.in_channels // 4),
            text_encoder=tiny_clip(config.pooled_projection_dim),
            tokenizer=letters(77),
            text_encoder_2=tiny_t5(config.joint_attention_dim),
            tokenizer_2=letters(512),
            transformer=transformer,
        )
    )


def dit_pipeline(transformer):
    """Labels 0 to 999, 1000 being none, as the pipeline has it."""
    return _quiet(DiTPipeline(transformer, tiny_vae(transformer.config.in_channels), DDIMScheduler()))


def kontext_pipeline(transformer):
    return flux_pipeline(transformer, FluxKontextPipeline)


def flux2_pipeline(transformer, pipeline=Flux2Pipeline, text_encoder=None, tokenizer=None):
    """Pictures of a multiple of 4 pixels; the prompt is given as embeddings where it has no encoder."""
    return _quiet(
        pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=tiny_flux2_vae(transformer.config.in_channels // 4),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
        )
    )


def flux2_base_pipeline(transformer, text_encoder=None, tokenizer=None):
    return flux2_pipeline(transformer, Flux2KleinPipeline, text_encoder, tokenizer)


def whole_flux2(transformer):
    """The same from a prompt, before which Mistral is told something."""
    width = transformer.config.joint_attention_dim // 3
    return _with_statistics(flux2_pipeline(transformer, text_encoder=tiny_mistral(width), tokenizer=orders(512)))


def whole_flux2_base(transformer, pipeline=Flux2KleinPipeline):
    """The same with Qwen3, which is asked without a thought."""
    width, tokenizer = transformer.config.joint_attention_dim // 3, words(512)
    thought = "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    tokenizer.chat_template = _chat() + thought
    return _with_statistics(
        flux2_pipeline(transformer, pipeline, tiny_qwen3(width, max(LAYERS) + 1, Qwen3ForCausalLM), tokenizer)
    )


def whole_flux2_kv(transformer):
    """klein KV, which keeps keys and values of pictures."""
    return whole_flux2_base(transformer, Flux2KleinKVPipeline)


def _with_statistics(pipe):
    """Every channel of a token with a mean and a deviation of its own."""
    norm, count = pipe.vae.bn, pipe.vae.bn.num_features
    norm.running_mean.copy_(torch.linspace(-0.5, 0.5, count))
    norm.running_var.copy_(torch.linspace(0.5, 2.0, count))
    return pipe


def chroma_pipeline(transformer, text_encoder=None, tokenizer=None):
    """Pictures of a multiple of 4 pixels; the prompt is given as embeddings where it has no encoder."""
    return _quiet(
        ChromaPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=tiny_vae(transformer.config.in_channels // 4),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
        )
    )


def longcat_image_pipeline(transformer):
    """Pictures of a multiple of 4 pixels; a prompt becomes 6 random tokens, since the pipeline takes no embeddings."""
    pipe = LongCatImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_vae(16),
        text_encoder=None,
        tokenizer=None,
        text_processor=None,
        transformer=transformer,
    )
    shape = (1, 6, transformer.config.joint_attention_dim)

    def encode(prompt):
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(len(prompt[0])))
        return drawn.to(pipe.transformer.dtype)

    pipe._encode_prompt = encode
    return _quiet(pipe)


def krea_2_pipeline(transformer, is_distilled=False):
    """Pictures of a multiple of 16 pixels; the prompt is given as embeddings."""
    return _quiet(
        diffusers.Krea2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=tiny_qwen_image_vae(transformer.config.in_channels // 4),
            text_encoder=None,
            tokenizer=None,
            transformer=transformer,
            text_encoder_select_layers=LAYERS,
            is_distilled=is_distilled,
        )
    )


def ovis_image_pipeline(transformer):
    """Pictures of a multiple of 4 pixels; the prompt is given as embeddings."""
    return _quiet(
        OvisImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=tiny_vae(transformer.config.in_channels // 4),
            text_encoder=None,
            tokenizer=None,
            transformer=transformer,
        )
    )


def z_image_pipeline(transformer, text_encoder=None, tokenizer=None):
    """Pictures of a multiple of 4 pixels; the prompt is given as embeddings where it has no encoder."""
    return _quiet(
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=tiny_vae(transformer.config.in_channels),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
        )
    )


def wan_pipeline(transformer, second=None, boundary=None):
    """Videos of 4 n + 1 frames and a multiple of 16 pixels; `second` takes over below `boundary`, as in Wan 2.2."""
    config = transformer.config
    return _quiet(
        WanPipeline(
            tokenizer=letters(512),
            text_encoder=tiny_umt5(config.text_dim),
            transformer=transformer,
            vae=tiny_wan_vae(config.in_channels),
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
            transformer_2=second,
            boundary_ratio=boundary,
        )
    )


def ltx_2_pipeline(transformer, pipeline=LTX2Pipeline):
    """Videos of 8 n + 1 frames and a multiple of 32 pixels, with sound; the prompt is given as embeddings."""
    config = transformer.config
    return _quiet(
        pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
            vae=tiny_ltx_2_vae(config.in_channels),
            audio_vae=tiny_ltx_2_audio_vae(config.audio_in_channels),
            text_encoder=None,
            tokenizer=None,
            connectors=tiny_ltx_2_connectors(config.caption_channels),
            transformer=transformer,
            vocoder=None,
        )
    )


def kandinsky_5_pipeline(transformer, pipeline=Kandinsky5T2VPipeline):
    """Videos of 4 n + 1 frames and a multiple of 16 pixels; the prompt is given as embeddings."""
    vae, scheduler = tiny_hunyuan_vae(transformer.config.in_visual_dim), FlowMatchEulerDiscreteScheduler(shift=5.0)
    return _quiet(pipeline(transformer, vae, None, None, None, None, scheduler))


def whole_kandinsky_5(transformer, pipeline=kandinsky_5_pipeline):
    """The same from a prompt."""
    pipe, config = pipeline(transformer), transformer.config
    pipe.register_modules(
        text_encoder=tiny_qwen(config.in_text_dim, known=CHATS),
        tokenizer=tiny_processor(chats()),
        text_encoder_2=tiny_clip(config.in_text_dim2),
        tokenizer_2=letters(77),
    )
    return pipe


def whole_kandinsky_5_picture(transformer):
    """A picture, from a prompt; of 32 x 48 pixels, since the sizes of its pipeline are of a megapixel."""
    vae, scheduler = tiny_vae(transformer.config.in_visual_dim, 4, 0.1), FlowMatchEulerDiscreteScheduler(shift=3.0)

    def build(transformer):
        return _quiet(Kandinsky5T2IPipeline(transformer, vae, None, None, None, None, scheduler))

    pipe = whole_kandinsky_5(transformer, build)
    pipe.resolutions = [(48, 32)]
    return pipe


def cogvideox_pipeline(transformer):
    """Videos of 4 n + 1 frames; the prompt is given as embeddings, and latents are not decoded."""
    return _quiet(CogVideoXPipeline(None, None, None, transformer, _cogvideox_scheduler()))


def whole_cogvideox(transformer):
    """The same from a prompt; it draws an odd number of latent frames, three or more."""
    config = transformer.config
    parts = letters(226), tiny_t5(config.text_embed_dim), tiny_cogvideox_vae(config.out_channels)
    return _quiet(CogVideoXPipeline(*parts, transformer, _cogvideox_scheduler()))


def whole_cogvideox_image(transformer):
    """The same from a picture."""
    parts = [*whole_cogvideox(transformer).components.values()]
    return _quiet(CogVideoXImageToVideoPipeline(*parts))


def cogvideox_image_pipeline(transformer):
    """The same; the prompt is given as embeddings."""
    vae = tiny_cogvideox_vae(transformer.config.out_channels)
    return _quiet(CogVideoXImageToVideoPipeline(None, None, vae, transformer, _cogvideox_scheduler()))


def _cogvideox_scheduler():
    return CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
    )


def wan_5b_image_pipeline(transformer):
    """From a picture that is the first frame, with a timestep for each token, as Wan 2.2 5B."""
    pipe = wan_image_pipeline(transformer)
    pipe.register_to_config(expand_timesteps=True)
    return pipe


def whole_wan_5b_image(transformer):
    """The same with a VAE of its kind: with shortcuts, and a square of pixels in the channels."""
    square = {"patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    vae = tiny_wan_vae(transformer.config.out_channels, is_residual=True, **square)
    parts = {name: part for name, part in wan_image_pipeline(transformer).components.items() if part is not None}
    return _quiet(WanImageToVideoPipeline(**{**parts, "vae": vae}, expand_timesteps=True))


def wan_vace_pipeline(transformer):
    """From a video, a mask and pictures."""
    return _quiet(
        WanVACEPipeline(
            tokenizer=letters(512),
            text_encoder=tiny_umt5(transformer.config.text_dim),
            vae=tiny_wan_vae(transformer.config.out_channels),
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
            transformer=transformer,
        )
    )


def wan_image_pipeline(transformer):
    """The same from a picture; without an image encoder where the transformer takes nothing of one, as in Wan 2.2."""
    config = transformer.config
    seen = config.image_dim is not None
    return _quiet(
        WanImageToVideoPipeline(
            tokenizer=letters(512),
            text_encoder=tiny_umt5(config.text_dim),
            vae=tiny_wan_vae(config.out_channels),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32) if seen else None,
            image_encoder=tiny_vision(config.image_dim) if seen else None,
            transformer=transformer,
        )
    )


def wan_animate_pipeline(transformer):
    """From a character and the videos of a pose and a face, segment by segment."""
    pipe = wan_image_pipeline(transformer)
    return _quiet(WanAnimatePipeline(**{name: part for name, part in pipe.components.items() if part is not None}))


def hunyuan_pipeline(transformer, tokenizer=None):
    """Videos of 4 n + 1 frames and a multiple of 16 pixels."""
    config = transformer.config
    return _quiet(
        HunyuanVideoPipeline(
            text_encoder=tiny_llama(config.text_embed_dim),
            tokenizer=tokenizer or letters(77),
            transformer=transformer,
            vae=tiny_hunyuan_vae(config.in_channels),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=tiny_clip(config.pooled_projection_dim),
            tokenizer_2=letters(77),
        )
    )


def whole_hunyuan(transformer):
    """The same with a tokenizer that leaves room for the prompt behind the pipeline's template."""
    return hunyuan_pipeline(transformer, words(77))


def hunyuan_image_pipeline(transformer):
    """The same from a picture; the prompt is given as embeddings, since its encoder also sees the picture."""
    return _quiet(
        HunyuanVideoImageToVideoPipeline(
            text_encoder=None,
            tokenizer=None,
            transformer=transformer,
            vae=tiny_hunyuan_vae(transformer.config.out_channels),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=None,
            tokenizer_2=None,
            image_processor=None,
        )
    )


def whole_hunyuan_image(transformer):
    """The same from a prompt, which its encoder reads together with the picture."""
    config = transformer.config
    return _quiet(
        HunyuanVideoImageToVideoPipeline(
            text_encoder=tiny_llava(config.text_embed_dim),
            tokenizer=talk(512),
            transformer=transformer,
            vae=tiny_hunyuan_vae(config.out_channels),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=tiny_clip(config.pooled_projection_dim),
            tokenizer_2=letters(77),
            image_processor=CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=48),
        )
    )


def hunyuan_15_pipeline(transformer, pipeline=HunyuanVideo15Pipeline, **parts):
    """Videos of 4 n + 1 frames and a multiple of 16 pixels; the prompt is given as embeddings."""
    return _quiet(
        pipeline(
            text_encoder=None,
            tokenizer=None,
            transformer=transformer,
            vae=tiny_hunyuan_15_vae(transformer.config.out_channels),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            text_encoder_2=None,
            tokenizer_2=None,
            guider=ClassifierFreeGuidance(guidance_scale=6.0),
            **parts,
        )
    )


def hunyuan_15_image_pipeline(transformer):
    """The same from a picture, at about 64 x 64 pixels."""
    parts = {
        "image_encoder": tiny_siglip(transformer.config.image_embed_dim),
        "feature_extractor": SiglipImageProcessor(size={"height": 54, "width": 54}),
    }
    pipe = hunyuan_15_pipeline(transformer, HunyuanVideo15ImageToVideoPipeline, **parts)
    pipe.target_size = 64
    return pipe


def whole_hunyuan_15(transformer, build=hunyuan_15_pipeline):
    """The same from a prompt."""
    pipe, config = build(transformer), transformer.config
    tokenizer = letters(None)
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.role }} {{ turn.content }}\n{% endfor %}assistant "
    pipe.register_modules(
        text_encoder=tiny_qwen(config.text_embed_dim, layers=3).model.language_model,
        tokenizer=tokenizer,
        text_encoder_2=tiny_t5(config.text_embed_2_dim, 384),
        tokenizer_2=ByT5Tokenizer(),
    )
    return pipe


def whole_hunyuan_15_image(transformer):
    return whole_hunyuan_15(transformer, hunyuan_15_image_pipeline)


def framepack_pipeline(transformer):
    """Videos of sides that are multiples of 64 pixels; the prompt is given as embeddings."""
    return _quiet(
        HunyuanVideoFramepackPipeline(
            text_encoder=None,
            tokenizer=None,
            transformer=transformer,
            vae=tiny_hunyuan_vae(transformer.config.in_channels),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=None,
            tokenizer_2=None,
            image_encoder=tiny_siglip(transformer.config.image_proj_dim),
            feature_extractor=SiglipImageProcessor(size={"height": 54, "width": 54}),
        )
    )


def whole_framepack(transformer):
    """The same from a prompt."""
    pipe, config = framepack_pipeline(transformer), transformer.config
    pipe.register_modules(
        text_encoder=tiny_llama(config.text_embed_dim),
        tokenizer=words(77),
        text_encoder_2=tiny_clip(config.pooled_projection_dim),
        tokenizer_2=letters(77),
    )
    return pipe


def qwen_image_pipeline(transformer, text_encoder=None, tokenizer=None):
    """Pictures of a multiple of 16 pixels; the prompt is given as embeddings where it has no encoder."""
    return _quiet(
        QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=tiny_qwen_image_vae(transformer.config.in_channels // 4),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
        )
    )


def qwen_image_edit_pipeline(transformer, pipeline=QwenImageEditPipeline):
    """The same from pictures; the prompt is given as embeddings."""
    return _quiet(
        pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=tiny_qwen_image_vae(transformer.config.in_channels // 4),
            text_encoder=None,
            tokenizer=None,
            processor=None,
            transformer=transformer,
        )
    )


def pixart_pipeline(transformer):
    """Pictures of twice the model's latent size; the prompt is given as embeddings."""
    vae, scheduler = tiny_vae(transformer.config.in_channels), DPMSolverMultistepScheduler()
    return _quiet(PixArtSigmaPipeline(None, None, vae, transformer, scheduler))


def sana_pipeline(transformer):
    """Pictures of a multiple of 32 pixels; the prompt is given as embeddings, and latents are not decoded."""
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return _quiet(SanaPipeline(None, None, None, transformer, DPMSolverMultistepScheduler(**flow)))


def qwen_image_21_pipeline(transformer):
    """Pictures of a multiple of 32 pixels; the prompt is given as embeddings, and latents are not decoded."""
    return _quiet(
        diffusers.QwenImage21Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=None,
            text_encoder=None,
            processor=_NoProcessor(),
            transformer=transformer,
        )
    )


class _NoProcessor:
    """What the pipeline asks of its processor before it is given a prompt."""

    def __init__(self):
        self.tokenizer = self

    def apply_chat_template(self, *given, **options):
        return [[]]

    def encode(self, text):
        return [0]


def whole_qwen_image(transformer):
    """The same from a prompt."""
    return qwen_image_pipeline(transformer, tiny_qwen(transformer.config.joint_attention_dim), letters(2048))


def whole_qwen_image_edit(transformer, pipeline=QwenImageEditPipeline):
    """From a prompt and pictures, which the text encoder sees too."""
    pipe = qwen_image_edit_pipeline(transformer, pipeline)
    tokenizer = letters(None, marks=[PICTURE])
    pipe.register_modules(
        text_encoder=tiny_qwen(transformer.config.joint_attention_dim, {PICTURE: len(WORDS)}),
        tokenizer=tokenizer,
        processor=tiny_processor(tokenizer),
    )
    return pipe


def whole_qwen_image_edit_plus(transformer):
    return whole_qwen_image_edit(transformer, QwenImageEditPlusPipeline)


def sd3_pipeline(transformer, encoders=None):
    """Pictures of a multiple of 4 pixels; the prompt is given as embeddings where it has no encoders."""
    names = [f"{part}{k}" for part in ("text_encoder", "tokenizer") for k in ("", "_2", "_3")]
    encoders = encoders or dict.fromkeys(names)
    vae = tiny_vae(transformer.config.in_channels)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return _quiet(StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, vae=vae, **encoders))


def whole_sd3(transformer):
    """The same from a prompt."""
    pooled, width = transformer.config.pooled_projection_dim, transformer.config.joint_attention_dim
    encoders = {
        "text_encoder": tiny_projected_clip(8, pooled // 2, 77),
        "text_encoder_2": tiny_projected_clip(12, pooled - pooled // 2, 77),
        "text_encoder_3": tiny_t5(width),
    }
    return sd3_pipeline(transformer, encoders | {f"tokenizer{k}": letters(77) for k in ("", "_2", "_3")})


def hidream_pipeline(transformer, encoders=None):
    """Pictures of 16 pixels a side; the prompt is given as embeddings where it has no encoders."""
    names = [f"{part}{k}" for part in ("text_encoder", "tokenizer") for k in ("", "_2", "_3", "_4")]
    encoders = encoders or dict.fromkeys(names)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    vae = tiny_vae(transformer.config.in_channels)
    pipe = HiDreamImagePipeline(transformer=transformer, scheduler=scheduler, vae=vae, **encoders)
    pipe.default_sample_size = 8  # it scales every picture to this many latent pixels a side
    return _quiet(pipe)


def whole_hidream(transformer):
    """The same from a prompt."""
    config = transformer.config
    t5, llama = config.caption_channels
    encoders = {
        "text_encoder": tiny_projected_clip(8, config.text_emb_dim // 2, 128),
        "text_encoder_2": tiny_projected_clip(12, config.text_emb_dim // 2, 128),
        "text_encoder_3": tiny_t5(t5),
        "text_encoder_4": tiny_llama(llama, LlamaForCausalLM),
    }
    return hidream_pipeline(transformer, encoders | {f"tokenizer{k}": letters(128) for k in ("", "_2", "_3", "_4")})


def whole_chroma(transformer):
    """The same from a prompt."""
    return chroma_pipeline(transformer, tiny_t5(transformer.config.joint_attention_dim), letters(512))


def whole_z_image(transformer):
    """The same from a prompt, which its tokenizer puts into a chat."""
    tokenizer = letters(512)
    tokenizer.chat_template = _chat()
    return z_image_pipeline(transformer, tiny_qwen3(transformer.config.cap_feat_dim), tokenizer)


def whole_ovis_image(transformer):
    """The same from a prompt, which its tokenizer puts into a chat; Qwen3 is asked without a thought."""
    pipe, tokenizer = ovis_image_pipeline(transformer), words(512)
    tokenizer.chat_template = _chat() + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    pipe.register_modules(text_encoder=tiny_qwen3(transformer.config.joint_attention_dim), tokenizer=tokenizer)
    return pipe


def whole_pixart(transformer):
    """The same from a prompt."""
    pipe = pixart_pipeline(transformer)
    pipe.register_modules(text_encoder=tiny_t5(transformer.config.caption_channels), tokenizer=letters(300))
    return pipe


def whole_sana(transformer):
    """The same from a prompt to a picture."""
    pipe, config = sana_pipeline(transformer), transformer.config
    pipe.register_modules(
        vae=tiny_dc(config.in_channels), text_encoder=tiny_gemma(config.caption_channels), tokenizer=words(1000)
    )
    return pipe


def whole_longcat_image(transformer):
    """From a prompt."""
    pipe = LongCatImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_vae(16),
        text_encoder=tiny_qwen(transformer.config.joint_attention_dim, known=CHATS),
        tokenizer=chats(),
        text_processor=None,
        transformer=transformer,
    )
    return _quiet(pipe)


def whole_flux3(transformer):
    """FLUX.3 from a prompt, as it is given, guided where the model was not distilled."""
    from diffusers.modular_pipelines.flux3 import modular_blocks_flux3, modular_blocks_flux3_distilled

    distilled = transformer.config.flow_map
    blocks = (
        modular_blocks_flux3_distilled.Flux3DistilledAutoBlocks()
        if distilled
        else modular_blocks_flux3.Flux3AutoBlocks()
    )
    blocks.sub_blocks.pop("prompt_upsampler")
    tokenizer = chats(_Tokenizer)
    tokenizer.chat_template = _chat()
    pipe = blocks.init_pipeline()
    pipe.update_components(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.93),
        vae=tiny_flux2_vae(transformer.config.in_channels // 4),
        text_encoder=tiny_qwen3_vl(transformer.config.joint_attention_dim // 3, "Qwen3VLForConditionalGeneration"),
        tokenizer=tokenizer,
        **({} if distilled else {"guider": ClassifierFreeGuidance(guidance_scale=3.0)}),
    )
    return Modular(_with_statistics(_quiet(pipe)))


class Modular:
    """A modular pipeline, called and saved as the others are."""

    def __init__(self, pipe):
        self._pipe = pipe

    def __getattr__(self, name):
        return getattr(self._pipe, name)

    def __call__(self, **asked):
        return SimpleNamespace(images=self._pipe(**asked, output="images"))

    def save_pretrained(self, folder):
        self._pipe.save_pretrained(str(folder), overwrite_modular_index=True)


def whole_krea_2(transformer):
    """The same from a prompt."""
    pipe = krea_2_pipeline(transformer)
    pipe.register_modules(text_encoder=tiny_qwen3_vl(transformer.config.text_hidden_dim), tokenizer=chats())
    return pipe


def whole_qwen_image_21(transformer):
    """The same from a prompt."""
    return _quiet(
        diffusers.QwenImage21Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=tiny_qwen_image_21_vae(transformer.config.in_channels),
            text_encoder=tiny_qwen3_vl(transformer.config.context_in_dim, "Qwen3VLForConditionalGeneration"),
            processor=chats(_Processor),
            transformer=transformer,
        )
    )


class _Tokenizer(PreTrainedTokenizerFast):
    """A tokenizer as the processor that the pipeline has, of which it asks nothing but tokens."""

    __module__ = "transformers"

    @property
    def tokenizer(self):
        return self


class _Processor(_Tokenizer):
    """That of Qwen-Image 2.1, which has parts in a message."""

    __module__ = "transformers"

    def apply_chat_template(self, messages, **options):
        (message,) = messages
        return [self.encode(f"<|im_start|>system\n{message['content'][0]['text']}<|im_end|>\n")]


for _kind in (_Tokenizer, _Processor):
    _kind.__name__ = "PreTrainedTokenizerFast"  # as an index of the pipeline is to say


def _chat():
    """A chat template as Qwen's."""
    turn = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    answer = "{{ '<|im_start|>assistant\n' }}"  # a template's own last line ends without one
    return f"{{% for m in messages %}}{turn}{{% endfor %}}{answer}"


def tiny_vae(channels, levels=2, shift=0.0):
    return _seeded(
        lambda: AutoencoderKL(
            block_out_channels=(4,) * levels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=channels,
            norm_num_groups=2,
            shift_factor=shift,
        )
    )


def tiny_dc(channels):
    """Latent pixels of 32 pixels a side."""
    levels, attention = 6, 2
    kinds = ("ResBlock",) * (levels - attention) + ("EfficientViTBlock",) * attention
    scales = ((),) * (levels - attention) + ((5,),) * attention
    return _seeded(
        lambda: AutoencoderDC(
            latent_channels=channels,
            attention_head_dim=4,
            encoder_block_types=kinds,
            decoder_block_types=kinds,
            encoder_block_out_channels=(8,) * levels,
            decoder_block_out_channels=(8,) * levels,
            encoder_layers_per_block=(1,) * levels,
            decoder_layers_per_block=(1,) * levels,
            encoder_qkv_multiscales=scales,
            decoder_qkv_multiscales=scales,
            scaling_factor=0.4,
        )
    )


def tiny_flux2_vae(channels):
    """Its latents are normed by statistics that are 0 and 1."""
    return _seeded(
        lambda: AutoencoderKLFlux2(
            block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=channels,
            norm_num_groups=2,
            batch_norm_eps=0.0,
        )
    )


def tiny_qwen_image_21_vae(channels):
    """Latent pixels of 16 pixels a side, pictures with transparency."""
    return _seeded(
        lambda: diffusers.AutoencoderKLQwenImage21(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=channels,
            dim_mult=[1, 1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1 * k - 0.1 for k in range(channels)],
            latents_std=[1.0 + 0.1 * k for k in range(channels)],
        )
    )


def tiny_cogvideox_vae(channels):
    return _seeded(
        lambda: AutoencoderKLCogVideoX(
            block_out_channels=(2, 2, 2, 2), latent_channels=channels, layers_per_block=1, norm_num_groups=2
        )
    )


def tiny_wan_vae(channels, **kind):
    return _seeded(
        lambda: AutoencoderKLWan(
            **kind,
            base_dim=3,
            z_dim=channels,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1 * k - 0.1 for k in range(channels)],
            latents_std=[1.0 + 0.1 * k for k in range(channels)],
        )
    )


def tiny_ltx_2_vae(channels):
    return _seeded(
        lambda: AutoencoderKLLTX2Video(
            latent_channels=channels,
            block_out_channels=(8,),
            decoder_block_out_channels=(8,),
            down_block_types=("LTX2VideoDownBlock3D",),
            layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            spatio_temporal_scaling=(True,),
            decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False),
            downsample_type=("spatial",),
            upsample_type=("spatial",),
            upsample_residual=(False,),
            upsample_factor=(1,),
            patch_size=16,
            spatial_compression_ratio=32,
            temporal_compression_ratio=8,
        )
    )


def tiny_ltx_2_audio_vae(channels):
    """A token of sound is two channels at each of `channels` / 2 pitches, of which four make one."""
    return _seeded(
        lambda: AutoencoderKLLTX2Audio(
            base_channels=channels, ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=2 * channels
        )
    )


def tiny_ltx_2_connectors(width):
    """Of an encoder with two layers, for prompts of a multiple of 4 tokens."""
    of_each = {
        "num_attention_heads": 2,
        "attention_head_dim": width // 2,
        "num_layers": 1,
        "num_learnable_registers": 4,
    }
    streams = {f"{stream}_connector_{name}": n for stream in ("video", "audio") for name, n in of_each.items()}
    return _seeded(lambda: LTX2TextConnectors(caption_channels=width, text_proj_in_factor=2, **streams))


def tiny_qwen_image_vae(channels):
    return _seeded(
        lambda: AutoencoderKLQwenImage(
            base_dim=3,
            z_dim=channels,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
        )
    )


def tiny_hunyuan_vae(channels):
    return _seeded(
        lambda: AutoencoderKLHunyuanVideo(
            latent_channels=channels,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
        )
    )


def tiny_hunyuan_15_vae(channels):
    return _seeded(
        lambda: AutoencoderKLHunyuanVideo15(
            latent_channels=channels, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
        )
    )


def tiny_clip(width):
    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=WORDS["<pad>"],
        bos_token_id=WORDS["</s>"],
        eos_token_id=WORDS["</s>"],
    )
    return _seeded(lambda: CLIPTextModel(config))


def tiny_projected_clip(width, projected, longest):
    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projected,
        max_position_embeddings=longest,
        pad_token_id=WORDS["<pad>"],
        bos_token_id=WORDS["</s>"],
        eos_token_id=WORDS["</s>"],
    )
    return _seeded(lambda: CLIPTextModelWithProjection(config))


def tiny_processor(tokenizer):
    """Qwen2.5-VL's processor without that of videos, which needs torchvision."""

    def made(self, tokenizer):
        self.tokenizer, self.image_processor, self.chat_template = tokenizer, Qwen2VLImageProcessor(), None
        self.image_token, self.image_token_id = PICTURE, tokenizer.convert_tokens_to_ids(PICTURE)
        self.video_token = self.video_token_id = None

    def attributes(cls):
        return ["image_processor", "tokenizer"]

    # Named so that an index of a pipeline says what published ones say.
    own = {"__init__": made, "get_attributes": classmethod(attributes), "__module__": "transformers"}
    own |= {"attributes": attributes(None), "audio_tokenizer": None}  # of transformers 4
    return type("Qwen2VLProcessor", (Qwen2VLProcessor,), own)(tokenizer)


ROPE = "rope_parameters" if int(transformers.__version__.split(".")[0]) >= 5 else "rope_scaling"


def tiny_qwen(width, marks=MappingProxyType({}), layers=2, known=WORDS):
    """Qwen2.5-VL. Its eyes see nothing where no mark stands for a picture; in the second of their layers patches see
    those of other windows."""
    third = width // 12  # of the pairs that turn, in each of both heads
    text = {
        "vocab_size": len(known) + len(marks),
        "hidden_size": width,
        "intermediate_size": 8,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        ROPE: {"rope_type": "default", "mrope_section": [width // 4 - 2 * third, third, third]},
        "bos_token_id": WORDS["</s>"],
        "eos_token_id": WORDS["</s>"],
    }
    eyes = {"depth": 2 if marks else 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2}
    eyes |= {"out_hidden_size": width, "fullatt_block_indexes": [1]}
    more = {"image_token_id": marks[PICTURE]} if marks else {}
    more["vision_start_token_id"] = 151652  # said by published models; transformers 4 has no default
    config = Qwen2_5_VLConfig(text_config=text, vision_config=eyes, **more)
    return _seeded(lambda: Qwen2_5_VLForConditionalGeneration(config))


def tiny_qwen3(width, layers=3, kind=Qwen3Model):
    config = Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return _seeded(lambda: kind(config))


def tiny_qwen3_vl(width, kind="Qwen3VLModel"):
    """One layer more than are looked at; its eyes are there and see nothing."""
    text = {
        "vocab_size": len(CHATS),
        "hidden_size": width,
        "intermediate_size": 8,
        "num_hidden_layers": max(LAYERS) + 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
    }
    eyes = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": width}
    eyes |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=eyes)
    return _seeded(lambda: getattr(transformers, kind)(config))


def tiny_gemma(width):
    config = Gemma2Config(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=WORDS["<pad>"],
        bos_token_id=WORDS["</s>"],
        eos_token_id=WORDS["</s>"],
    )
    return _seeded(lambda: Gemma2Model(config))


def tiny_mistral(width):
    """One layer more than are looked at; its eyes are there and see nothing."""
    text = {
        "model_type": "mistral",
        "vocab_size": len(TOLD),
        "hidden_size": width,
        "intermediate_size": 8,
        "num_hidden_layers": max(LAYERS) + 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "sliding_window": None,
    }
    eyes = {"model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    eyes |= {"num_attention_heads": 2, "head_dim": 4, "image_size": 28, "patch_size": 14}
    config = Mistral3Config(text_config=text, vision_config=eyes, image_token_index=TOLD["[IMG]"])
    return _seeded(lambda: Mistral3ForConditionalGeneration(config))


def tiny_vision(width):
    """257 tokens of a picture of 32 pixels a side."""
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=2
    )
    return _seeded(lambda: CLIPVisionModel(config))


def tiny_siglip(width):
    """729 tokens of a picture of 54 pixels a side."""
    config = SiglipVisionConfig(
        hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=54, patch_size=2
    )
    return _seeded(lambda: SiglipVisionModel(config))


def tiny_t5(width, words=None):
    config = T5Config(vocab_size=words or len(WORDS), d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return _seeded(lambda: T5EncoderModel(config))


def tiny_umt5(width):
    config = UMT5Config(vocab_size=len(WORDS), d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return _seeded(lambda: UMT5EncoderModel(config))


def tiny_llama(width, kind=LlamaModel):
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=width, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2
    )
    return _seeded(lambda: kind(config))


def tiny_llava(width):
    """576 tokens of a picture of 48 pixels a side, as many as the pipeline of HunyuanVideo reckons with."""
    eyes = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=2
    )
    text = LlamaConfig(
        vocab_size=len(TALK), hidden_size=width, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2
    )
    config = LlavaConfig(
        vision_config=eyes, text_config=text, image_token_index=TALK["<image>"], pad_token_id=TALK["<pad>"]
    )
    return _seeded(lambda: LlavaForConditionalGeneration(config))


def talk(longest):
    """One token per mark, per line break or several, and per word of 12 letters: so the picture is where HunyuanVideo's
    pipeline reckons with it, and its template a token longer than that."""
    tokenizer = Tokenizer(models.WordLevel(TALK, unk_token="<unk>"))
    tokenizer.add_special_tokens(MARKS)
    parts = [("removed", " +"), ("isolated", r"\n+|\w{1,12}|[^\w\n]+")]
    splits = [pre_tokenizers.Split(Regex(pattern), how) for how, pattern in parts]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    begin = MARKS[0]
    tokenizer.post_processor = processors.TemplateProcessing(f"{begin} $A", special_tokens=[(begin, TALK[begin])])
    names = {"bos_token": begin, "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=longest, **names)


def orders(longest):
    """One token per mark and per word, with the marks where Mistral's chat template has them; padding comes first."""
    tokenizer = Tokenizer(models.WordLevel(TOLD, unk_token="<unk>"))
    tokenizer.add_special_tokens(ORDERS)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    begin = ORDERS[0]
    tokenizer.post_processor = processors.TemplateProcessing(f"{begin} $A", special_tokens=[(begin, TOLD[begin])])
    names = {"bos_token": begin, "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=longest, padding_side="left", **names)
    mark = "{% set mark = 'SYSTEM_PROMPT' if m.role == 'system' else 'INST' %}"
    turn = mark + "{{ '[' + mark + ']' + m.content[0].text + '[/' + mark + ']' }}"
    made.chat_template = "{{ bos_token }}{% for m in messages %}" + turn + "{% endfor %}"
    return made


def chats(kind=PreTrainedTokenizerFast):
    """One token per mark of Qwen's chats, per line break or several, per word and per sign, and none around them."""
    tokenizer = Tokenizer(models.WordLevel(CHATS, unk_token="<unk>"))
    tokenizer.add_special_tokens(TURNS)
    splits = [
        pre_tokenizers.Split(Regex(pattern), how) for pattern, how in ((" +", "removed"), (r"\n+|\w+", "isolated"))
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return kind(tokenizer_object=tokenizer, model_max_length=2048, **names)


def words(longest):
    """One token per word, all the same but for words of one letter; the long templates of some pipelines fit."""
    return letters(longest, pre_tokenizers.Whitespace())


def letters(longest, parts=None, marks=()):
    """A tokenizer with one token per letter, one for the end, and one for each mark."""
    known = WORDS | {mark: len(WORDS) + k for k, mark in enumerate(marks)}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.add_special_tokens([*marks])
    tokenizer.pre_tokenizer = parts or pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", WORDS["</s>"])])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=longest, **names)


def _seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def _quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
