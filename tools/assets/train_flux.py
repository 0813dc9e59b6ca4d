"""Train the FLUX pipeline that ships with this package, from a seed, on a CPU: coloured shapes by caption, 64x64 RGB.

    python tools/make_asset.py train-flux                 autoencoder, text encoders, all but the autoencoder; two hours
    python tools/make_asset.py train-flux --stage vae     one of the three: vae, text, rest
    python tools/make_asset.py train-flux --measure-only --preview FOLDER

A pipeline folder as `diffusers.FluxPipeline.from_pretrained` loads it: an autoencoder of 4x4 pixels to 8 channels, CLIP
and T5 with tokenizers of their own, and the transformer. The text encoders first learn to say what a caption says of
each thing, then go on with the transformer. Needs torch, diffusers, transformers and tqdm; a C++ compiler makes it
faster.

The same seed gives the same bits only on the same CPU type, torch version, thread count and compile setting: sums are
taken in another order otherwise, and training amplifies that. Every such run still gives an equally good model.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from assets.shapes import COLOURS, SHAPES, Thing, agrees, random_scene, render
from assets.training import (
    Recipe,
    autocast,
    complete_card,
    renamed,
    stopped_politely,
    strata,
    train,
    write_component,
    write_json,
)
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from record import ROOT
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from taylorseer_export.embedded.picture import grid

SIDE, CELL, CHANNELS = 64, 4, 8  # pixels of a picture, pixels of a latent pixel, channels of the latent
TEXT_WIDTH = 64
CLIP_TOKENS = 77
SAMPLING_STEPS = 50
SHIFT = 3.0
TOOL = "tools/assets/train_flux.py"
VAE_RECIPE = Recipe(steps=2400, batch=16, peak_rate=2e-3, warmup=100, cosine_steps=2600, ema_half_life=50)
TEXT_RECIPE = Recipe(steps=500, batch=128, peak_rate=2e-3, warmup=100, cosine_steps=1600, ema_half_life=50)
RECIPE = Recipe(steps=7000, batch=64, peak_rate=1.5e-3)
# Every so many steps: (tokens of T5, divisor of the batch). Much padding, at which other limits of tokens are learnt.
LENGTHS = {3: (128, 2), 11: (512, 8)}
SHARED_TOKENIZER = "PreTrainedTokenizerFast"  # the name that all releases of transformers know
SCENES = 16384  # pictures that are encoded once and shown again

# ---------------------------------------------------------------------------------- autoencoder


def new_vae() -> AutoencoderKL:
    """The autoencoder of FLUX.1 made small, with a quarter of its reduction: edges of small pictures stay clean."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=SIDE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


class Autoencoding(nn.Module):
    """A picture through the latent and back; noise on the latent teaches the decoder to forgive a sampler's errors."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pictures: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.vae.encoder(pictures).chunk(2, dim=1)[0]
        return self.vae.decoder(mean + noise), mean


def tensor_of(pictures: np.ndarray) -> torch.Tensor:
    """`[N, H, W, 3]` from 0 to 255 as `[N, 3, H, W]` from -1 to 1."""
    return torch.from_numpy(pictures.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def train_vae(seed: int, folder: Path, recipe: Recipe, _: bool) -> None:
    """Train and save `vae/`: absolute differences of pixels and of their neighbours' differences."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng((seed, 2))
    model = Autoencoding(new_vae()).to(memory_format=torch.channels_last)

    def loss_of_step(call: Callable, step: int) -> torch.Tensor:
        scenes = [random_scene(rng, SIDE, SIDE)[1] for _ in range(recipe.batch)]
        pictures = tensor_of(np.stack([render(things, SIDE, SIDE) for things in scenes]))
        pictures = pictures.to(memory_format=torch.channels_last)
        side = SIDE // CELL
        noise = 0.1 * torch.randn((recipe.batch, CHANNELS, side, side), generator=generator)
        made, mean = call(pictures, noise)
        edges = sum(functional.l1_loss(made.diff(dim=axis), pictures.diff(dim=axis)) for axis in (2, 3))
        # The latent stays near unit size, as what keeps the noise of fixed size from being outgrown.
        size = (mean.square().mean((0, 2, 3)) - 1).square().mean()
        return functional.l1_loss(made, pictures) + edges + 0.01 * size

    def save(average: nn.Module, training: dict) -> None:
        vae = average.vae
        scenes = [random_scene(np.random.default_rng((seed, 3)), SIDE, SIDE)[1] for _ in range(256)]
        shown = tensor_of(np.stack([render(things, SIDE, SIDE) for things in scenes]))
        with torch.no_grad():
            means = vae.encoder(shown).chunk(2, dim=1)[0]
        vae.register_to_config(shift_factor=float(means.mean()), scaling_factor=float(1 / means.std()))
        write_component(vae, folder / "vae")
        write_json(folder / "vae.json", {**training, "tool": TOOL})

    train(model, loss_of_step, recipe, save, seed, compiled=False)  # compiled, its convolutions are no faster


# ---------------------------------------------------------------------------------- text


def clip_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """CLIP's tokenizer, its merges learnt from captions."""
    begin, end = "<|startoftext|>", "<|endoftext|>"
    learnt = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    learnt.normalizer = normalizers.Lowercase()
    learnt.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learnt.train_from_iterator(captions, trainer)
    model = json.loads(learnt.to_str())["model"]
    words = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    for token in (*(f"{letter}</w>" for letter in sorted(pre_tokenizers.ByteLevel.alphabet())), begin, end):
        words.setdefault(token, len(words))
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(words, merges, pad_token=end, model_max_length=CLIP_TOKENS)


def t5_tokenizer(captions: Sequence[str]) -> PreTrainedTokenizerFast:
    """T5's tokenizer, with the words of captions as pieces, and letters for all others; an end token behind a text."""
    counts = Counter(word for caption in captions for word in caption.split())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"\u2581{word}", math.log(count / counts.total())) for word, count in sorted(counts.items())]
    pieces += [(letter, -20.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"]
    made = Tokenizer(models.Unigram(pieces, unk_id=2))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def new_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CLIP_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_t5(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=TEXT_WIDTH // 2,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )


@dataclass(frozen=True)
class Said:
    """What a caption says, as numbers: of each thing its colour, shape and place, and of the picture of all of them.

    Attributes:
        words: `[W, 3]`, for each word the colour, the shape and the place of the thing that it is of.
        whole: `[5]`: colour, shape and place of the first thing, colour and shape of the second; the last of its kind
            where there is none.
    """

    words: list[tuple[int, int, int]]
    whole: tuple[int, int, int, int, int]


_NAMES = (list(COLOURS), list(SHAPES), ["alone", "left", "right", "above", "below"])
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above", "alone": "alone"}
_OF_WORDS = tuple(map(len, _NAMES))
_OF_PICTURES = (len(COLOURS), len(SHAPES), 5, len(COLOURS) + 1, len(SHAPES) + 1)


def said_by(caption: str, things: list[Thing]) -> Said:
    """The numbers of a caption of one or two things."""
    place = next((word for word in caption.split() if word in _OPPOSITE), "alone")
    places = (place, _OPPOSITE[place])
    each = [
        (_NAMES[0].index(thing.colour), _NAMES[1].index(thing.shape), _NAMES[2].index(where))
        for thing, where in zip(things, places, strict=False)
    ]
    count = len(caption.split())
    words = [each[0] if len(things) == 1 or k < count - 3 else each[1] for k in range(count)]
    second = each[1][:2] if len(things) == 2 else (len(COLOURS), len(SHAPES))
    return Said(words, (*each[0], *second))


class Reader(nn.Module):
    """The text encoders with a linear reader on each: of every word's encoding, and of the pooled one."""

    def __init__(self, clip: CLIPTextModel, t5: T5EncoderModel) -> None:
        super().__init__()
        self.clip, self.t5 = clip, t5
        self.words, self.pictures = (nn.Linear(TEXT_WIDTH, sum(sizes)) for sizes in (_OF_WORDS, _OF_PICTURES))

    def forward(self, clip: torch.Tensor, t5: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.words(self.t5(t5)[0]), self.pictures(self.clip(clip).pooler_output)


def train_text(seed: int, folder: Path, recipe: Recipe, _: bool) -> None:
    """Make the tokenizers, train the text encoders to say what captions say, and save both."""
    torch.manual_seed(seed)
    rng = np.random.default_rng((seed, 5))
    words = [random_scene(rng, SIDE, SIDE)[0] for _ in range(4096)]
    first, second = clip_tokenizer(words), t5_tokenizer(words)
    model = Reader(new_clip(first), new_t5(second))
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizers(first, second, folder)

    def loss_of_step(call: Callable, step: int) -> torch.Tensor:
        length, divisor = LENGTHS.get(step % 16, (32, 1))
        scenes = [random_scene(rng, SIDE, SIDE) for _ in range(recipe.batch // divisor)]
        clip, t5 = tokens_of([caption for caption, _ in scenes], first, second, length)
        said = [said_by(*scene) for scene in scenes]
        of_words, of_pictures = call(clip, t5)
        rows = torch.cat([of_words[k, : len(one.words)] for k, one in enumerate(said)])
        loss = entropies(rows, [word for one in said for word in one.words], _OF_WORDS)
        return loss + entropies(of_pictures, [one.whole for one in said], _OF_PICTURES)

    def save(average: nn.Module, training: dict) -> None:
        write_text_encoders(average, folder)
        write_json(folder / "text.json", {**training, "tool": TOOL})

    train(model, loss_of_step, recipe, save, seed, compiled=False)


def entropies(logits: torch.Tensor, numbers: list, sizes: tuple[int, ...]) -> torch.Tensor:
    """The sum of the cross entropies of several choices, whose logits lie side by side."""
    target = torch.tensor(numbers)
    parts = logits.float().split(sizes, dim=1)
    return sum(functional.cross_entropy(part, target[:, k]) for k, part in enumerate(parts))  # type: ignore[return-value]


def tokens_of(captions: list[str], first: Any, second: Any, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens for CLIP `[N, 77]` and T5 `[N, length]`."""
    one = first(captions, padding="max_length", max_length=CLIP_TOKENS, truncation=True, return_tensors="pt")
    two = second(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return one.input_ids, two.input_ids


# ---------------------------------------------------------------------------------- transformer


def new_transformer() -> FluxTransformer2DModel:
    """FLUX.1 made small: 64 tokens of 32 channels are the latent of one 64x64 picture."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Flow matching with Euler steps, shifted to high noise, where a caption decides what is where."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT, use_dynamic_shifting=False)


class Painter(nn.Module):
    """The transformer behind its text encoders, as the pipeline calls them."""

    def __init__(self, clip: CLIPTextModel, t5: T5EncoderModel, transformer: FluxTransformer2DModel) -> None:
        super().__init__()
        self.clip, self.t5, self.transformer = clip, t5, transformer

    def forward(
        self, noisy: torch.Tensor, clip: torch.Tensor, t5: torch.Tensor, timestep: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        return self.transformer(
            noisy,
            encoder_hidden_states=self.t5(t5)[0],
            pooled_projections=self.clip(clip).pooler_output,
            timestep=timestep,
            img_ids=ids,
            txt_ids=ids.new_zeros(t5.shape[1], 3),
            return_dict=False,
        )[0]


@dataclass(frozen=True)
class Size:
    """Pictures of one size, encoded once.

    Attributes:
        latents: `[N, tokens, 4 C]` float32, packed and of unit size.
        clip: Tokens `[N, 77]`.
        t5: Tokens `[N, 512]`; the first ones alone are what a shorter limit gives, since captions are short.
        ids: Positions `[tokens, 3]`.
    """

    latents: torch.Tensor
    clip: torch.Tensor
    t5: torch.Tensor
    ids: torch.Tensor


@torch.no_grad()
def encoded(
    vae: AutoencoderKL, read: Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]], scenes: Iterator, size: Any
) -> Size:
    """`size` is (count, height, width) in pictures and pixels."""
    count, height, width = size
    rows, columns = height // CELL, width // CELL
    captions, packed = [], []
    encoder = vae.encoder.to(memory_format=torch.channels_last)
    for _ in tqdm(range(0, count, 64), desc=f"encoding {height}x{width}", leave=False, mininterval=5):
        drawn = [next(scenes) for _ in range(64)]
        captions += [caption for caption, _ in drawn]
        pictures = tensor_of(np.stack([render(things, height, width) for _, things in drawn]))
        means = encoder(pictures.to(memory_format=torch.channels_last)).chunk(2, dim=1)[0].contiguous()
        means = (means - vae.config.shift_factor) * vae.config.scaling_factor
        packed.append(FluxPipeline._pack_latents(means, len(drawn), CHANNELS, rows, columns))
    clip, t5 = read(captions)
    ids = FluxPipeline._prepare_latent_image_ids(1, rows // 2, columns // 2, "cpu", torch.float32)
    return Size(torch.cat(packed), clip, t5, ids)


def train_painter(
    seed: int, folder: Path, recipe: Recipe, compiled: bool, count: int = SCENES, resumed: bool = False
) -> None:
    """Train and save the transformer with its text encoders, over the saved `vae/`, tokenizers and text encoders.

    Args:
        seed, folder, recipe, compiled: As of `train`.
        count: Pictures that are encoded once.
        resumed: Whether the saved transformer goes on in the place of a new one.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng((seed, 4))
    vae = AutoencoderKL.from_pretrained(folder / "vae").float().eval()
    first = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    second = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer_2")
    clip = CLIPTextModel.from_pretrained(folder / "text_encoder").float()
    t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2").float()
    transformer = new_transformer()
    earlier = json.loads((folder / "card.json").read_text()) if resumed else {}
    if resumed:
        transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer").float()
    model = Painter(clip, t5, transformer)
    records = {f"{name}_training": json.loads((folder / f"{name}.json").read_text()) for name in ("vae", "text")} | {
        f"earlier_{key}": value for key, value in earlier.items() if key == "training"
    }

    def read(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return tokens_of(captions, first, second, 512)

    def scenes(height: int, width: int) -> Iterator:
        while True:
            yield random_scene(rng, height, width)

    square = encoded(vae, read, scenes(64, 64), (count, 64, 64))
    oblong = [encoded(vae, read, scenes(*size), (count // 8, *size)) for size in ((96, 64), (64, 96))]

    def loss_of_step(call: Callable, step: int) -> torch.Tensor:
        # Some oblong batches keep the model usable at other sizes, some with much padding at other limits of tokens.
        of = oblong[step // 8 % 2] if step % 8 == 7 else square
        length, divisor = LENGTHS.get(step % 16, (32, 1))
        batch = recipe.batch // divisor
        rows = torch.randint(len(of.latents), (batch,), generator=generator)
        clean = of.latents[rows]
        # Logit-normal, as in the training of FLUX, shifted as the sampler's steps are.
        sigma = torch.special.ndtri(strata(batch, generator).clamp(1e-4, 1 - 1e-4)).sigmoid()
        sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
        noise = torch.randn(clean.shape, generator=generator)
        share = sigma.view(-1, 1, 1)
        with autocast():
            velocity = call((1 - share) * clean + share * noise, of.clip[rows], of.t5[rows, :length], sigma, of.ids)
        return functional.mse_loss(velocity.float(), noise - clean)

    def save(average: nn.Module, training: dict) -> None:
        write_pipeline(average, vae, first, second, folder)
        write_json(folder / "card.json", {"training": {**training, "tool": TOOL}, **records})

    train(model, loss_of_step, recipe, save, seed, compiled)


# ---------------------------------------------------------------------------------- files


def vocabulary_files(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """The two files that releases of transformers before 5 read CLIP's tokenizer from."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    write_json(folder / "vocab.json", model["vocab"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def write_text_encoders(model: Any, folder: Path) -> None:
    """Both in float32: transformers loads weights in the dtype that they are stored in, diffusers in float32."""
    write_component(model.clip, folder / "text_encoder", torch.float32)
    write_component(model.t5, folder / "text_encoder_2", torch.float32)


def write_tokenizers(first: Any, second: Any, folder: Path) -> None:
    """Both tokenizers, as all releases of transformers read them."""
    first.save_pretrained(folder / "tokenizer")
    vocabulary_files(first, folder / "tokenizer")
    second.save_pretrained(folder / "tokenizer_2")
    renamed(folder / "tokenizer_2" / "tokenizer_config.json", tokenizer_class=SHARED_TOKENIZER)


def write_pipeline(painter: Any, vae: AutoencoderKL, first: Any, second: Any, folder: Path) -> None:
    """The pipeline folder; its weights in float16."""
    pipe = FluxPipeline(scheduler(), vae, painter.clip, first, painter.t5, second, painter.transformer)
    pipe.save_config(folder)
    renamed(folder / "model_index.json", tokenizer_2=["transformers", SHARED_TOKENIZER])
    scheduler().save_pretrained(folder / "scheduler")
    write_tokenizers(first, second, folder)
    write_text_encoders(painter, folder)
    write_component(painter.transformer, folder / "transformer")


# ---------------------------------------------------------------------------------- measured


@torch.no_grad()
def sampled(pipe: FluxPipeline, captions: list[str], seed: int, height: int, width: int, length: int) -> np.ndarray:
    """`[B, height, width, 3]` uint8, by the untouched pipeline."""
    made = pipe(
        captions,
        height=height,
        width=width,
        num_inference_steps=SAMPLING_STEPS,
        max_sequence_length=length,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    return np.rint(255 * made).astype(np.uint8)


def caption_accuracy(pipe: FluxPipeline | None, seed: int, length: int = 32, count: int = 200) -> dict[str, float]:
    """Share of random captions drawn with the right colours, shapes and arrangement; None: what the renderer draws."""
    rng = np.random.default_rng((seed, 1))
    scenes = [random_scene(rng, SIDE, SIDE) for _ in range(count)]
    if pipe is None:
        pictures = [np.rint(render(things, SIDE, SIDE)) for _, things in scenes]
    else:
        captions = [caption for caption, _ in scenes]
        batches = [captions[k : k + 50] for k in range(0, count, 50)]
        pictures = [p for k, b in enumerate(batches) for p in sampled(pipe, b, seed + k, SIDE, SIDE, length)]
    results = [agrees(picture, things, caption) for picture, (caption, things) in zip(pictures, scenes, strict=True)]
    return {name: float(np.mean([r[name] for r in results])) for name in results[0]}


def reconstruction(vae: AutoencoderKL, seed: int, count: int = 100) -> float:
    """PSNR in dB of pictures through the autoencoder."""
    rng = np.random.default_rng((seed, 1))
    shown = tensor_of(np.stack([render(random_scene(rng, SIDE, SIDE)[1], SIDE, SIDE) for _ in range(count)]))
    with torch.no_grad():
        made = vae.decode(vae.encode(shown).latent_dist.mode()).sample
    return -10 * math.log10(float((made - shown).square().mean()) / 4)


def measure(folder: Path, seed: int, preview: Path | None) -> None:
    """Measure the saved pipeline and complete its card."""
    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    accuracy, ceiling = caption_accuracy(pipe, seed), caption_accuracy(None, seed)
    padded = caption_accuracy(pipe, seed, length=512, count=50)
    psnr = reconstruction(pipe.vae, seed)
    print(f"caption accuracy {accuracy}, with 512 tokens {padded} (the reader on rendered scenes: {ceiling})")
    print(f"autoencoder {psnr:.1f} dB")
    if preview:
        preview_pictures(pipe, preview)
    parts = [pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2]
    complete_card(
        folder,
        {
            "name": "shapes FLUX",
            "model": "FluxPipeline",
            "parameters": sum(p.numel() for part in parts for p in part.parameters()),
            "trained_on": "rendered pictures of one or two coloured shapes with captions, 64x64; one batch in eight "
            "96x64 or 64x96",
            "input": "caption: '<thing>' or '<thing> left of|right of|above|below <thing>', a <thing> being 'a "
            "<colour> circle|square|triangle|cross'; two colours differ",
            "output": "height/8 * width/8 tokens of 32 channels: the autoencoder's 8 channels of 4x4 pixels, packed "
            "2x2",
            "guidance_scale": None,
            "num_inference_steps": SAMPLING_STEPS,
            "latent_size": [SIDE // CELL, SIDE // CELL],
            "text_tokens": 32,
            "caption_accuracy": accuracy,
            "caption_accuracy_samples": 200,
            "caption_accuracy_with_512_tokens": padded,
            "caption_accuracy_of_renderer": ceiling,
            "autoencoder_psnr_db": round(psnr, 2),
        },
    )


def preview_pictures(pipe: FluxPipeline, folder: Path) -> None:
    """Picture tables: chosen captions, some at oblong sizes, some with all tokens; and pictures of the autoencoder."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = [
        "a red circle",
        "a blue square left of a yellow triangle",
        "a green circle above a red square",
        "an orange cross right of a white circle",
        "a purple triangle below a green cross",
        "a white square above a blue circle",
    ]
    seeds = range(5)
    for height, width, length in ((64, 64, 32), (96, 64, 32), (64, 96, 32), (64, 64, 512), (128, 128, 32)):
        rows = [list(sampled(pipe, captions, s, height, width, length)) for s in seeds]
        labels = [f"seed {seed}" for seed in seeds]
        grid(rows, 2, labels, captions).save(folder / f"flux_{height}x{width}_{length}.png")
    rng = np.random.default_rng(0)
    shown = np.stack([render(random_scene(rng, SIDE, SIDE)[1], SIDE, SIDE) for _ in range(8)])
    with torch.no_grad():
        made = pipe.vae.decode(pipe.vae.encode(tensor_of(shown)).latent_dist.mode()).sample
    back = ((made.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    names = [str(k) for k in range(8)]
    grid([list(np.rint(shown).astype(np.uint8)), list(back)], 2, ["drawn", "back"], names).save(folder / "vae.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "taylorseer_export" / "assets" / "flux")
    parser.add_argument("--stage", choices=("vae", "text", "rest"), nargs="+", default=["vae", "text", "rest"])
    parser.add_argument("--steps", type=int, help="training steps of the one stage (default: the shipped recipe)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="where no C++ compiler is")
    parser.add_argument("--measure-only", action="store_true", help="measure the saved pipeline; no training")
    parser.add_argument("--resume", action="store_true", help="go on with the saved transformer (stage rest)")
    parser.add_argument("--preview", type=Path, help="folder for sample pictures (PNG)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    painter = partial(train_painter, resumed=given.resume)
    stages = {"vae": (train_vae, VAE_RECIPE), "text": (train_text, TEXT_RECIPE), "rest": (painter, RECIPE)}
    with stopped_politely():
        for stage in [] if given.measure_only else given.stage:
            run, recipe = stages[stage]
            recipe = recipe if given.steps is None else replace(recipe, steps=given.steps)
            run(given.seed, given.out, recipe, not given.no_compile)
        if given.stage[-1] == "rest":
            measure(given.out, given.seed, given.preview)
            print((given.out / "card.json").read_text(), end="")
