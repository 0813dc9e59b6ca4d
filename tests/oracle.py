"""The oracle: TaylorSeer replayed in eager float64 over an unmodified diffusers transformer.

It shares no code with the package. Each tapped module output has its own derivatives,

    full step s:      D'_0 = F,   D'_{i+1} = (D'_i - D_i) / gap   for i < order with an old D_i
    forecast step s:  F ~ sum_i D_i x^i / i!,   x = steps since the last full step

and forward hooks put the forecast in the place of the output. Blocks still run on forecast steps
and all that is not tapped (embedders, gates, residual adds, final layer) is live. History starts
at step max(W - 2, 0), W being the leading run of `F`. Not a sampler: every step's latent is given.

Float64 where diffusers allows it; what diffusers casts stays cast. The sinusoids of timestep and
guidance are float32 (an `exp` that differs by one ulp moves them by |timestep| 2^-24), FLUX's RoPE
tables are float64 rounded to float32, and FLUX rotates queries and keys in float32; DiT has only
the first. So all-`F` equals the plain float64 model bit for bit, but in FLUX that model is itself
good to about 2^-24. Families with FP32LayerNorm or `.float()` around gates (Wan) round there too.

Source: Liu et al. 2025, arXiv:2503.06923, and a description of the algorithm; no one's code.
"""

# Shapes: S steps, B batch; latents, noise_pred [S, B, ...]; timestep [S]; features as in the model

import copy
import re
from collections.abc import Callable
from fractions import Fraction
from math import factorial, sqrt
from typing import NamedTuple

import torch

ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def plain(model, timestep, **inputs):
    """noise_pred of a model that takes the bundle's inputs as they are."""
    return model(timestep=timestep, return_dict=False, **inputs)[0]


def flux(model, timestep, hidden_states, img_ids, image_latents=None, image_ids=None, **inputs):
    """As FluxKontextPipeline: the rows of the conditioning image follow the latent's, and their result is dropped."""
    if image_latents is None:
        return plain(model, timestep, hidden_states=hidden_states, img_ids=img_ids, **inputs)
    if keeps_pictures(model):
        # As Flux2KleinKVPipeline at its first step, here at every step: rows of pictures are ahead, and dropped.
        rows, ids = torch.cat([image_latents, hidden_states], 1), torch.cat([image_ids, img_ids], -2)
        inputs |= {"kv_cache_mode": "extract", "num_ref_tokens": image_latents.shape[1]}
        return plain(model, timestep, hidden_states=rows, img_ids=ids, **inputs)
    rows, ids = torch.cat([hidden_states, image_latents], 1), torch.cat([img_ids, image_ids], -2)
    return plain(model, timestep, hidden_states=rows, img_ids=ids, **inputs)[:, : hidden_states.shape[1]]


def flux3(model, timestep, target_timestep=None, **inputs):
    """As Flux3DistilledLoopDenoiser where it is distilled."""
    told = {} if target_timestep is None else {"target_timestep": target_timestep.expand(len(timestep))}
    return plain(model, timestep, **told, **inputs)


def next_timesteps(model, timestep):
    """What a model that is told the next timestep too is told at each step, behind the last 0; else nothing."""
    if not getattr(getattr(model, "config", None), "flow_map", False):
        return [{} for _ in timestep]
    return [{"target_timestep": t} for t in [*timestep[1:], torch.zeros(())]]


def keeps_pictures(model):
    """Whether it is a FLUX.2 klein KV, by the attention that its pipeline gives it."""
    return any(type(getattr(m, "processor", None)).__name__ == "Flux2KVAttnProcessor" for m in model.modules())


def qwen_image(model, timestep, hidden_states, img_shapes, image_latents=None, **inputs):
    """As QwenImagePipeline: the sizes of pictures are nested lists of numbers. As QwenImageEditPipeline: the rows of
    pictures to be edited follow the latent's, and their result is dropped."""
    rows = hidden_states if image_latents is None else torch.cat([hidden_states, image_latents], 1)
    made = plain(model, timestep, hidden_states=rows, img_shapes=img_shapes.tolist(), **inputs)
    return made[:, : hidden_states.shape[1]]


def qwen_image_21(model, timestep, hidden_states, encoder_hidden_states, img_shapes, **inputs):
    """As QwenImage21Pipeline without its cache: a mask of the words, then a slot for each 4 tokens of the picture."""
    (batch, words, _), count = encoder_hidden_states.shape, hidden_states.shape[1]
    inputs["img_mask"] = torch.tensor([[False] * words + [True] * (count // 4)]).repeat(batch, 1)
    inputs |= {"hidden_states": hidden_states, "encoder_hidden_states": encoder_hidden_states}
    return plain(model, timestep, img_shapes=img_shapes.tolist(), **inputs)[:, -count:]


def hunyuan_video_15(model, timestep, hidden_states, image_embeds=None, **inputs):
    """As HunyuanVideo15Pipeline: the timestep in the latent's dtype, and from text zeros for a picture."""
    if image_embeds is None:
        batch, channels, *sides = hidden_states.shape
        image_embeds = hidden_states.new_zeros(batch, 729, model.config.image_embed_dim)
        empty = hidden_states.new_zeros(batch, model.config.in_channels - channels, *sides)
        hidden_states = torch.cat([hidden_states, empty], 1)
    inputs |= {"hidden_states": hidden_states, "image_embeds": image_embeds}
    return plain(model, timestep.to(hidden_states.dtype), **inputs)


def chroma(model, timestep, hidden_states, encoder_hidden_states, attention_mask, **inputs):
    """As ChromaPipeline: the mask of the text has a one behind it for each token of the picture."""
    if attention_mask.shape[1] == encoder_hidden_states.shape[1]:
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(hidden_states.shape[:2])], 1)
    inputs |= {"hidden_states": hidden_states, "encoder_hidden_states": encoder_hidden_states}
    return plain(model, timestep, attention_mask=attention_mask, **inputs)


def krea_2(model, timestep, hidden_states, encoder_hidden_states, position_ids, encoder_attention_mask):
    """As Krea2Pipeline: the places of the text, all zero, come before those of the picture."""
    if len(position_ids) == hidden_states.shape[1]:
        position_ids = torch.cat([position_ids.new_zeros(encoder_hidden_states.shape[1], 3), position_ids])
    inputs = {"hidden_states": hidden_states, "encoder_hidden_states": encoder_hidden_states}
    mask = encoder_attention_mask.bool()
    return plain(model, timestep, position_ids=position_ids, encoder_attention_mask=mask, **inputs)


def z_image(model, timestep, hidden_states, cap_feats, cap_mask):
    """As ZImagePipeline: lists with a picture of one frame and the words of each sample."""
    words = [text[mask.bool()] for text, mask in zip(cap_feats, cap_mask, strict=True)]
    return torch.stack(model(list(hidden_states.unsqueeze(2)), timestep, words, return_dict=False)[0]).squeeze(2)


def ltx_2(model, timestep, **inputs):
    """As LTX2Pipeline: the timestep once more as sigma, and places in float32, from which come angles of up to 15708.

    Where it is the model of 8 channels, as LTX2ImageToVideoPipeline: each token of the video has a timestep, none in
    the first frame, which begins at 0 seconds. The predictions of video and sound are one, both flat.
    """
    inputs |= {name: inputs[name].float() for name in ("video_coords", "audio_coords")}
    of_video = timestep
    if model.config.in_channels == 8:
        of_video = timestep[:, None] * (inputs["video_coords"][:, 0, :, 0] != 0)
    told = {"timestep": of_video, "audio_timestep": timestep, "sigma": timestep, "use_cross_timestep": True}
    made = model(**told, return_dict=False, **inputs)
    return torch.cat([one.flatten(1) for one in made], 1)


def wan(model, timestep, hidden_states, **inputs):
    """Where it is the model of 48 channels, as WanImageToVideoPipeline: a timestep for each token, none in the first
    frame."""
    if model.config.in_channels == 48:
        frames, height, width = hidden_states.shape[2:]
        mark = torch.ones(frames, height // 2, width // 2)
        mark[0] = 0
        timestep = timestep[:, None] * mark.flatten()
    return plain(model, timestep, hidden_states=hidden_states, **inputs)


def kandinsky_5(model, timestep, hidden_states, scale_factor, encoder_hidden_states, **inputs):
    """As Kandinsky5T2VPipeline: places from the sizes. What its code has in float32 meets the weights in theirs."""
    meeting = [m for m in model.modules() if isinstance(m, torch.nn.RMSNorm)] + [model.time_embeddings.in_layer]
    for module in meeting:
        if not module._forward_pre_hooks:
            module.register_forward_pre_hook(lambda m, given: tuple(x.to(m.weight.dtype) for x in given))
    frames, height, width = hidden_states.shape[1:4]
    inputs |= {"hidden_states": hidden_states, "encoder_hidden_states": encoder_hidden_states}
    inputs["visual_rope_pos"] = [torch.arange(side) for side in (frames, height // 2, width // 2)]
    inputs["text_rope_pos"] = torch.arange(encoder_hidden_states.shape[1])
    return model(timestep=timestep, scale_factor=scale_factor.tolist(), return_dict=False, **inputs)


def cogvideox(model, timestep, image_rotary_emb=None, **inputs):
    """As its pipelines: cosines and sines of each token's place in two tables."""
    if image_rotary_emb is not None:
        image_rotary_emb = tuple(image_rotary_emb.reshape(2, -1, image_rotary_emb.shape[-1]))
    return plain(model, timestep, image_rotary_emb=image_rotary_emb, **inputs)


def hidream(model, timestep, **inputs):
    """HiDream calls its timestep otherwise."""
    return model(timesteps=timestep, return_dict=False, **inputs)[0]


class Family(NamedTuple):
    """What is tapped: (regex of module names, output elements or None for one tensor)."""

    sites: tuple[tuple[str, tuple[int, ...] | None], ...]
    first: str = "transformer_blocks.0"  # its hidden_states are the image embedding
    last: str = "norm_out"  # its first argument leaves the block stack, image rows only
    call: Callable[..., torch.Tensor] = plain  # (model, timestep, **the bundle's inputs) -> noise_pred
    attention: str = ""  # the first one, where it is no site itself
    others: tuple[tuple[str, str], ...] = ()  # (name, last) of further latents, which have steps in the conditioning


FAMILIES = {
    "FluxTransformer2DModel": Family(
        (
            (r"transformer_blocks\.\d+\.attn", (0, 1)),  # image, text
            (r"transformer_blocks\.\d+\.(ff|ff_context)", None),
            (r"single_transformer_blocks\.\d+\.proj_out", None),  # text then image rows
        ),
        call=flux,
    ),
    "Flux2Transformer2DModel": Family(
        (
            (r"transformer_blocks\.\d+\.attn", (0, 1)),  # image, text
            (r"transformer_blocks\.\d+\.(ff|ff_context)", None),
            (r"single_transformer_blocks\.\d+\.attn", None),  # text then image rows; the MLP is in it
        ),
        call=flux,
    ),
    "Flux3Transformer2DModel": Family(
        (
            (r"mode_blocks\.image\.\d+\.(attn|ff)", None),
            (r"single_transformer_blocks\.\d+\.(attn|ff)", None),  # text then image rows
        ),
        first="mode_blocks.image.0",
        call=flux3,
    ),
    "ChromaTransformer2DModel": Family(
        (
            (r"transformer_blocks\.\d+\.attn", (0, 1)),  # image, text
            (r"transformer_blocks\.\d+\.(ff|ff_context)", None),
            (r"single_transformer_blocks\.\d+\.proj_out", None),  # text then image rows
        ),
        call=chroma,
    ),
    **dict.fromkeys(
        ("LongCatImageTransformer2DModel", "OvisImageTransformer2DModel"),
        Family(
            (
                (r"transformer_blocks\.\d+\.attn", (0, 1)),  # image, text
                (r"transformer_blocks\.\d+\.(ff|ff_context)", None),
                (r"single_transformer_blocks\.\d+\.proj_out", None),  # text then image rows
            ),
        ),
    ),
    "LTX2VideoTransformer3DModel": Family(
        (
            (r"transformer_blocks\.\d+\.(attn1|attn2|audio_to_video_attn|ff)", None),  # video
            (r"transformer_blocks\.\d+\.(audio_attn1|audio_attn2|video_to_audio_attn|audio_ff)", None),  # sound
        ),
        call=ltx_2,
        others=(("audio_hidden_states", "audio_norm_out"),),
    ),
    "Krea2Transformer2DModel": Family(
        ((r"transformer_blocks\.\d+\.(attn|ff)", None),),  # text then image rows
        last="final_layer",
        call=krea_2,
    ),
    "ZImageTransformer2DModel": Family(
        ((r"(noise_refiner|layers)\.\d+\.(attention|ffn)_norm2", None),),  # image, its padding, text, its padding
        first="noise_refiner.0",
        last="all_final_layer.2-1",
        call=z_image,
        attention="noise_refiner.0.attention",
    ),
    "QwenImageTransformer2DModel": Family(
        (
            (r"transformer_blocks\.\d+\.attn", (0, 1)),  # image, text
            (r"transformer_blocks\.\d+\.(img|txt)_mlp", None),
        ),
        call=qwen_image,
    ),
    "QwenImage21Transformer2DModel": Family(
        ((r"transformer_blocks\.\d+\.(attn|img_mlp)", None),),  # text then image rows
        call=qwen_image_21,
    ),
    **dict.fromkeys(
        ("PixArtTransformer2DModel", "SanaTransformer2DModel"),
        Family(((r"transformer_blocks\.\d+\.(attn1|attn2|ff)", None),)),
    ),
    "SD3Transformer2DModel": Family(
        (
            (r"transformer_blocks\.\d+\.attn", (0, 1)),  # image, text
            (r"transformer_blocks\.\d+\.(attn2|ff|ff_context)", None),
        )
    ),
    "HiDreamImageTransformer2DModel": Family(
        (
            (r"double_stream_blocks\.\d+\.block\.attn1", (0, 1)),  # image, text
            (r"double_stream_blocks\.\d+\.block\.ff_[it]", None),
            (r"single_stream_blocks\.\d+\.block\.(attn1|ff_i)", None),  # image then text rows
        ),
        first="double_stream_blocks.0",
        last="final_layer",
        call=hidream,
    ),
    "DiTTransformer2DModel": Family(((r"transformer_blocks\.\d+\.(attn1|ff)", None),)),
    "HunyuanVideoTransformer3DModel": Family(
        (
            (r"transformer_blocks\.\d+\.attn", (0, 1)),  # video, text
            (r"transformer_blocks\.\d+\.(ff|ff_context)", None),
            (r"single_transformer_blocks\.\d+\.proj_out", None),  # video then text rows
        )
    ),
    "HunyuanVideo15Transformer3DModel": Family(
        (
            (r"transformer_blocks\.\d+\.attn", (0, 1)),  # video, text
            (r"transformer_blocks\.\d+\.(ff|ff_context)", None),
        ),
        call=hunyuan_video_15,
    ),
    "HunyuanVideoFramepackTransformer3DModel": Family(
        (
            (r"transformer_blocks\.\d+\.attn", (0, 1)),
            (r"transformer_blocks\.\d+\.(ff|ff_context)", None),
            (r"single_transformer_blocks\.\d+\.proj_out", None),
        ),
    ),
    "Kandinsky5Transformer3DModel": Family(
        ((r"visual_transformer_blocks\.\d+\.(self_attention|cross_attention|feed_forward)", None),),
        first="visual_transformer_blocks.0",
        last="out_layer.norm",
        call=kandinsky_5,
    ),
    "CogVideoXTransformer3DModel": Family(
        (
            (r"transformer_blocks\.\d+\.attn1", (0, 1)),  # video, text
            (r"transformer_blocks\.\d+\.ff", None),  # text then video rows
        ),
        last="norm_final",
        call=cogvideox,
    ),
    "WanTransformer3DModel": Family(((r"blocks\.\d+\.(attn1|attn2|ffn)", None),), first="blocks.0", call=wan),
    "WanAnimateTransformer3DModel": Family(
        ((r"blocks\.\d+\.(attn1|attn2|ffn)|face_adapter\.\d+", None),), first="blocks.0"
    ),
    "WanVACETransformer3DModel": Family(
        ((r"blocks\.\d+\.(attn1|attn2|ffn)|vace_blocks\.\d+\.proj_out", None),), first="blocks.0"
    ),
}


class Series:
    """The derivatives of one feature, by the recursion above; tensors, floats or fractions."""

    def __init__(self, order):
        self.order, self.derivatives, self.latest = order, {}, None

    def update(self, step, feature):
        old, new = self.derivatives, {0: feature}
        for i in range(self.order):
            if i in old:
                new[i + 1] = (new[i] - old[i]) / (step - self.latest)
        self.derivatives, self.latest = new, step

    def forecast(self, step):
        x = step - self.latest
        return sum(d * x**i / factorial(i) for i, d in self.derivatives.items())


class Oracle:
    """One request: call `step` once for every letter of `plan`. The model is copied, never touched.

    Args:
        granularity: "module" taps every site of FAMILIES; "residual" forecasts what the block
            stack adds to the fresh embedding; "last" what enters the final norm.
        dtype: float64 for the oracle; a smaller one gives the eager run that bounds are tried on.
    """

    def __init__(self, model, plan, order, granularity="module", dtype=torch.float64):
        if not re.fullmatch(r"F[F.]*", plan) or granularity not in ("module", "residual", "last"):
            raise ValueError(f"plan is {plan!r}, granularity is {granularity!r}")
        self.model = torch.nn.Module.to(copy.deepcopy(model), dtype).eval()  # diffusers' own warns
        self.plan, self.dtype = plan, dtype
        self.order, self.residual, self.now = order, granularity == "residual", -1
        self.start = max(len(plan) - len(plan.lstrip("F")) - 2, 0)
        self.series, self.embedding = {}, {}
        family = FAMILIES[type(model).__name__]
        self.call, self.others = family.call, [name for name, _ in family.others]
        if granularity == "module":
            for name, module, elements in tapped(self.model):
                module.register_forward_hook(self._site(name, elements))
        else:
            first = self.model.get_submodule(family.first)
            for name, last in (("hidden_states", family.last), *family.others):
                first.register_forward_pre_hook(self._entry(name), with_kwargs=True)
                self.model.get_submodule(last).register_forward_pre_hook(self._exit(name))

    def _feature(self, key, value):
        """Record `value` on a full step; what the rest of the model must see instead of it."""
        series = self.series.setdefault(key, Series(self.order))
        if self.plan[self.now] == ".":
            return series.forecast(self.now)
        if self.now >= self.start:
            series.update(self.now, value.clone())
        return value

    def _site(self, name, elements):
        def hook(module, args, output):
            if elements is None:
                return self._feature(name, output)
            pairs = enumerate(output)
            return tuple(self._feature((name, i), x) if i in elements else x for i, x in pairs)

        return hook

    def _entry(self, name):
        def hook(module, args, kwargs):
            self.embedding[name] = kwargs[name] if name in kwargs else args[0]

        return hook

    def _exit(self, name):
        def hook(module, args):
            # FramePack puts tokens of the past first and drops them before the final norm.
            # Z-Image has text behind the picture there, which it drops later.
            # Kandinsky 5 has tokens as a video there.
            tokens = args[0].flatten(1, -2)
            rows = tokens.shape[1]
            base = self.embedding[name][:, -rows:] if self.residual else torch.zeros_like(tokens)
            base = torch.nn.functional.pad(base, (0, 0, 0, rows - base.shape[1]))
            made = base + self._feature(name, tokens - base)
            return (made.view_as(args[0]), *args[1:]) if self.plan[self.now] == "." else None

        return hook

    @torch.no_grad()
    def step(self, latent, timestep, conditioning):
        """The next step's noise_pred [B, ...] from latent [B, ...] and a scalar timestep."""
        self.now += 1
        rest = {"hidden_states": latent, **at(conditioning, self.now, self.others)}
        rest = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in rest.items()}
        timestep = timestep.expand(latent.shape[0])  # the models cast it themselves
        return self.call(self.model, timestep, **rest)


def at(conditioning, step, others):
    """The conditioning with the further latents of one step."""
    return {name: value[step] if name in others else value for name, value in conditioning.items()}


def replay(model, latents, timestep, conditioning, plan, order, granularity="module", dtype=torch.float64):
    """noise_pred [S, ...] of the whole plan; conditioning under diffusers' names, no step axis."""
    oracle = Oracle(model, plan, order, granularity, dtype)
    steps = zip(latents, timestep, next_timesteps(model, timestep), plan, strict=True)
    return torch.stack([oracle.step(x, t, conditioning | told) for x, t, told, _ in steps])


@torch.no_grad()
def quantities(model, latents, timestep, conditioning, rule, dtype=torch.float64):
    """What a guard's rule compares, exactly, at every step: a list of S tensors [B, rows, C].

    cg: output of the first block. fbcache: that less the block's input. teacache: input of its attention.
    Only rows of the latent, but for teacache: Kontext, FLUX.2 and Qwen-Image-Edit have those of conditioning images
    behind them, FramePack those of its past before them; Qwen-Image 2.1 and Krea 2 have words there,
    and klein KV its pictures.
    """
    model = torch.nn.Module.to(copy.deepcopy(model), dtype).eval()
    kind = type(model).__name__
    family, now, found = FAMILIES[kind], {}, []

    def entry(module, args, kwargs):
        now["in"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def block(module, args, output):
        values = output if isinstance(output, tuple) else (output,)
        (now["out"],) = (v for v in values if v.shape[1] == now["in"].shape[1])

    def leave(module, args):
        now["rows"] = args[0].flatten(1, -2).shape[1]

    first = model.get_submodule(family.first)
    attention = model.get_submodule(family.attention) if family.attention else tapped(model)[0][1]
    (attention if rule == "teacache" else first).register_forward_pre_hook(entry, with_kwargs=True)
    if rule != "teacache":
        first.register_forward_hook(block)
        model.get_submodule(family.last).register_forward_pre_hook(leave)
    steps = zip(latents, timestep, next_timesteps(model, timestep), strict=True)
    for step, (latent, t, told) in enumerate(steps):
        rest = {"hidden_states": latent, **told, **at(conditioning, step, [name for name, _ in family.others])}
        rest = {k: v.to(dtype) if v.is_floating_point() else v for k, v in rest.items()}
        family.call(model, t.expand(latent.shape[0]), **rest)
        count = latent[0, 0].numel() // 4 if kind.startswith("ZImage") else None  # 2 x 2 pixels make a token
        if rule == "teacache" and count is not None:  # with all 31 tokens of padding that some picture may need
            padding = now["in"][:, count : count + 1].expand(-1, 31, -1)
            now["in"] = torch.cat([now["in"][:, :count], padding], 1)
        if rule == "teacache":
            apart = "QwenImage21" in kind or keeps_pictures(model)  # what is ahead is traced by itself
            found.append(now["in"][:, -latent.shape[1] :] if apart else now["in"])
            continue
        value = now["out"] - now["in"] if rule == "fbcache" else now["out"]
        rows = latent.shape[1] if latent.ndim == 3 else count or now["rows"]
        behind = re.search("Framepack|QwenImage21|Krea2", kind) or keeps_pictures(model)
        found.append(value[:, -rows:] if behind else value[:, :rows])
    return found


def guarded(values, plan, rule, threshold, order=2, cap=None, accumulate=False):
    """(executed plan, [S] errors, [S] what was compared with the threshold) of a guard; None where nothing was.

    forecast iff the plan has a forecast there, the error is under the threshold and fewer than `cap` came in a row.
    """
    executed, errors, compared, since = "", [], [], []
    for step, kind in enumerate(plan):
        errors.append(None)
        compared.append(None)
        if kind == ".":
            full = [s for s, k in enumerate(executed) if k == "F"]
            start = max(len(executed) - len(executed.lstrip("F")) - 2, 0)
            if rule == "cg":
                series = Series(order)
                for s in full:
                    if s >= start:
                        series.update(s, values[s])
                expected = series.forecast(step)
            else:
                expected = values[step - 1 if rule == "teacache" else full[-1]]
            against = values[step] if rule == "cg" else expected
            errors[-1] = ((expected - values[step]).abs().mean() / against.abs().mean()).item()
            since.append(errors[-1])
            compared[-1] = sum(since) if accumulate or rule == "teacache" else since[-1]
            kind = "." if compared[-1] < threshold and (cap is None or len(since) <= cap) else "F"
        executed += kind
        since = [] if kind == "F" else since
    return executed, errors, compared


def tapped(model):
    """(name, module, output elements) of every site, in the order of the model's modules."""
    sites = FAMILIES[type(model).__name__].sites
    modules = model.named_modules()
    return [(n, m, e) for n, m in modules for r, e in sites if re.fullmatch(r, n)]


def weights(plan, step, order):
    """{full step: exact weight} of the forecast at `step`: the recursion fed with unit features."""
    start = max(len(plan) - len(plan.lstrip("F")) - 2, 0)
    full = [s for s in range(start, step) if plan[s] == "F"]
    found = {}
    for source in full:
        series = Series(order)
        for s in full:
            series.update(s, Fraction(s == source))
        found[source] = series.forecast(step)
    return {s: w for s, w in found.items() if w}


def gains(plan, order):
    """Noise amplification of every step, [S] floats: sum |w| on forecast steps, 1 on full ones."""
    return [1.0 if c == "F" else float(sum(map(abs, weights(plan, s, order).values()))) for s, c in enumerate(plan)]


def seen_by(value, dtype):
    """Timestep or guidance as FLUX in `dtype` sees it (cast, times 1000, rounded), for `replay`."""
    return (value.to(dtype) * 1000).double() / 1000


def extent(model):
    """(depth, length, rounded) for `bound`: number of sites, longest contraction of a linear layer, and how many
    tensors its code rounds to bfloat16 in any precision: the turned queries and keys of Kandinsky 5."""
    linears = (m for m in model.modules() if isinstance(m, torch.nn.Linear))
    turning = [name for name, _ in model.named_modules() if name.endswith(".self_attention")]
    return len(tapped(model)), max(m.in_features for m in linears), 2 * len(turning)


def bound(reference, gain, dtype, depth, length, rounded=0):
    """Largest error expected of arithmetic in `dtype`, a float; [S] of them for a list of gains.

        bound = c * gain * u * max|reference|
        c = sqrt(depth) * (sqrt(32) + sqrt(length) * 2^-24 / u) + sqrt(rounded) * 2^-8 / u,
                                                                   u the unit roundoff of `dtype`

    Errors add as random signs do, hence square roots: over `depth` sites; over the roundings
    stored per site (about 16 from norm to residual add, doubled because the modulation has its
    own); over a contraction of `length`, accumulated in float32 whatever the dtype. The maximum
    of the reference (3 to 4 rms) stands for the tail of the error. With a list of gains it is
    taken per step. Eager diffusers on the tiny models (4 seeds) reaches 0.1 to 0.4 of the bound in
    float32 and 0.15 to 0.5 in float16 and bfloat16; on `mid_flux` 0.05 and 0.13.
    """
    u = ROUNDOFF[dtype]
    c = sqrt(depth) * (sqrt(32) + sqrt(length) * 2.0**-24 / u) + sqrt(rounded) * 2.0**-8 / u
    if isinstance(gain, list):
        return c * u * torch.tensor(gain).double() * reference.double().abs().flatten(1).amax(1)
    return c * u * gain * reference.double().abs().max().item()


def assert_close(name, seen, expected, bound):
    """Fail unless |seen - expected| <= bound, a float or [S]; print and return seen/bound."""
    assert seen.shape == expected.shape, f"{name} is {[*seen.shape]}, expected {[*expected.shape]}"
    difference = (seen.double() - expected.double()).abs()
    limit = torch.as_tensor(bound).double()
    limit = limit.reshape(-1, *[1] * (difference.ndim - 1)).expand_as(difference)
    ratio = difference / limit  # NaN counts as the largest
    index = tuple(i.item() for i in torch.unravel_index(ratio.argmax(), ratio.shape))
    print(f"{name}: seen/bound = {ratio[index]:.3g}")
    assert ratio[index] <= 1, (
        f"{name} differs by {difference[index]:.3g} at {index}, expected at most {limit[index]:.3g}"
    )
    return ratio[index].item()
