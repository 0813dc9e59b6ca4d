"""Unmodified diffusers pipelines around tiny transformers, and a recorder of what passes through these.

Text encoders and VAE are random, the tokenizer knows letters.

Nothing is downloaded and nothing is trained: what matters is that a pipeline runs whole, from prompt to picture.
"""

# Shapes: S steps

import string
from contextlib import contextmanager

import oracle
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    HiDreamImagePipeline,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
)
from harness import allowed
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = {word: k for k, word in enumerate(["<pad>", "</s>", "<unk>", *string.ascii_lowercase])}


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


def wan_image_pipeline(transformer):
    """The same from a picture."""
    config = transformer.config
    return _quiet(
        WanImageToVideoPipeline(
            tokenizer=letters(512),
            text_encoder=tiny_umt5(config.text_dim),
            vae=tiny_wan_vae(config.out_channels),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
            image_encoder=tiny_vision(config.image_dim),
            transformer=transformer,
        )
    )


def hunyuan_pipeline(transformer):
    """Videos of 4 n + 1 frames and a multiple of 16 pixels."""
    config = transformer.config
    return _quiet(
        HunyuanVideoPipeline(
            text_encoder=tiny_llama(config.text_embed_dim),
            tokenizer=letters(77),
            transformer=transformer,
            vae=tiny_hunyuan_vae(config.in_channels),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=tiny_clip(config.pooled_projection_dim),
            tokenizer_2=letters(77),
        )
    )


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


def qwen_image_pipeline(transformer):
    """Pictures of a multiple of 16 pixels; the prompt is given as embeddings."""
    return _quiet(
        QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=tiny_qwen_image_vae(transformer.config.in_channels // 4),
            text_encoder=None,
            tokenizer=None,
            transformer=transformer,
        )
    )


def sd3_pipeline(transformer):
    """Pictures of a multiple of 4 pixels; the prompt is given as embeddings."""
    encoders = dict.fromkeys(f"{part}{k}" for part in ("text_encoder", "tokenizer") for k in ("", "_2", "_3"))
    vae = tiny_vae(transformer.config.in_channels)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return _quiet(StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, vae=vae, **encoders))


def hidream_pipeline(transformer):
    """Pictures of 16 pixels a side; the prompt is given as embeddings."""
    encoders = dict.fromkeys(f"{part}{k}" for part in ("text_encoder", "tokenizer") for k in ("", "_2", "_3", "_4"))
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    vae = tiny_vae(transformer.config.in_channels)
    pipe = HiDreamImagePipeline(transformer=transformer, scheduler=scheduler, vae=vae, **encoders)
    pipe.default_sample_size = 8  # it scales every picture to this many latent pixels a side
    return _quiet(pipe)


def tiny_vae(channels):
    return _seeded(
        lambda: AutoencoderKL(
            block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=channels,
            norm_num_groups=2,
            shift_factor=0.0,
        )
    )


def tiny_wan_vae(channels):
    return _seeded(
        lambda: AutoencoderKLWan(
            base_dim=3,
            z_dim=channels,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
        )
    )


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


def tiny_t5(width):
    config = T5Config(vocab_size=len(WORDS), d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return _seeded(lambda: T5EncoderModel(config))


def tiny_umt5(width):
    config = UMT5Config(vocab_size=len(WORDS), d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return _seeded(lambda: UMT5EncoderModel(config))


def tiny_llama(width):
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=width, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2
    )
    return _seeded(lambda: LlamaModel(config))


def letters(longest):
    """A tokenizer with one token per letter and one for the end."""
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
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


class Recorder:
    """What passes through a transformer: per branch the latents [S, ...], timesteps [S], predictions [S, ...]."""

    def __init__(self, transformer):
        self.calls = {}
        self.told = []  # (latents, prediction) of every call, in turn
        self.transformer = transformer
        transformer.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, module, args, inputs, output):
        latents = args[0] if args else inputs["hidden_states"]
        conditioning = {
            n: v if isinstance(v, torch.Tensor) else torch.tensor(v)
            for n, v in inputs.items()
            if n in module.denoiser.constants and v is not None
        }
        sample = output[0] if isinstance(output, tuple) else output.sample
        timestep = inputs[module.denoiser.timestep.name]
        # Two nameless calls on the same latents are two branches.
        nameless = str(int(any(latents is c[0] for c in self.calls.get("0", []))))
        context = module._callers.here.context
        self.calls.setdefault(context.name if context else nameless, []).append(
            (latents, timestep, conditioning, sample)
        )
        self.told.append((latents, sample))

    @contextmanager
    def retold_by(self, model):
        """The untouched model answers every call with the prediction noted for it, which is refused for other latents.

        A pipeline around it is then told what one around the transformer was, to the bit: bits of a product of two
        matrices are the processor's choice, and everything else that a pipeline does must be the same.
        """
        told = iter(self.told)

        def answer(module, args, inputs, output):
            latents, sample = next(told)
            given = args[0] if args else inputs["hidden_states"]
            assert torch.equal(given, latents), "the untouched pipeline asks about other latents"
            return (sample,) if isinstance(output, tuple) else type(output)(sample=sample)

        handle = model.register_forward_hook(answer, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        assert next(told, None) is None, "the untouched pipeline makes fewer calls"

    def assert_plan(self, model, plan, order):
        """Every branch ran `plan` and agrees with the oracle on the latents that it was given."""
        assert set(self.transformer.executed.values()) == {plan}
        for name, calls in self.calls.items():
            latents, timestep, conditioning, seen = zip(*calls, strict=True)
            timestep = torch.stack([t[0] for t in timestep])
            seen = torch.stack(seen)
            expected = oracle.replay(model, torch.stack(latents), timestep, conditioning[0], plan, order)
            expected = expected[:, :, : seen.shape[2]]  # of rows that only condition, a model predicts nothing of use
            limit = allowed(model, expected, plan, order)
            oracle.assert_close(f"branch {name}", seen, expected, limit)
