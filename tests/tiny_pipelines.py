"""Unmodified diffusers pipelines around tiny transformers: random text encoders and VAE, a tokenizer of letters.

Nothing is downloaded and nothing is trained: what matters is that a pipeline runs whole, from prompt to picture.
"""

import string

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

WORDS = {word: k for k, word in enumerate(["<pad>", "</s>", "<unk>", *string.ascii_lowercase])}


def flux_pipeline(transformer):
    """Prompts of letters; pictures of a multiple of 4 pixels."""
    config = transformer.config
    return _quiet(
        FluxPipeline(
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


def tiny_t5(width):
    config = T5Config(vocab_size=len(WORDS), d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return _seeded(lambda: T5EncoderModel(config))


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
