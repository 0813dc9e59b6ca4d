"""Videos of whole bundles: what a bundle decodes is what the untouched VAE makes, in memory that knows no length."""

# Shapes: C channels, F latent frames, H and W latent pixels

import json
import math
from contextlib import nullcontext

import av
import numpy as np
import oracle
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from pipelines_with_parts import OTHER, PROMPT, bound_of_picture, depth_and_length, drawn

from taylorseer_export import cli
from taylorseer_export.bundle.manifest import Manifest, PipelinePart
from taylorseer_export.bundle.memory import video_bytes
from taylorseer_export.commands import run
from taylorseer_export.commands.terminal import require_extra
from taylorseer_export.embedded.requests import frame_rate, pictures_of, prompt_request, usual_size
from taylorseer_export.embedded.video import write_video
from taylorseer_export.errors import ConfigError, StepError
from taylorseer_export.families import FAMILIES
from taylorseer_export.families.whole import normed, unit
from taylorseer_export.report.card import card
from taylorseer_export.report.evaluate import draws
from taylorseer_export.runtime.sampling import sample
from taylorseer_export.serve import contract

STEPS, SEED, SIZE, SCALE = 2, 3, (9, 32, 48), 4.0
PLAIN = {"base_dim": 4, "z_dim": 4, "num_res_blocks": 1, "dim_mult": [1, 2, 4, 4]}
STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 1.5]}
# Of Wan 2.2 5B: blocks with a shortcut over time, and a square of pixels in the channels.
RESIDUAL = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected_of(vae, latents):
    """What the VAE itself makes of latents as the scheduler leaves them, `[1, 3, frames, height, width]`."""
    with torch.no_grad():
        return unit(vae.decode(normed(vae, latents), return_dict=False)[0])


def decoded(decoder, latents):
    made = []
    decoder(latents.numpy(), lambda pictures: made.append(torch.from_numpy(pictures)))
    return torch.cat(made, 2)


@pytest.mark.parametrize("kind", [{}, RESIDUAL], ids=["2.1", "2.2 5B"])
def test_frame_by_frame_is_what_diffusers_makes(kind):
    """The mark of the first latent frame is a cache of zeros, and one frame of features is that behind zeros."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**PLAIN, **STATISTICS, **kind).eval()
    latents, caches, made = noise(1, 4, 4, 3, 2), None, []
    with torch.no_grad():
        for k in range(4):
            pictures, caches = FAMILIES["wan"].whole.frames(vae, latents[:, :, k : k + 1], caches)
            made.append(pictures)
    expected = expected_of(vae, latents)
    limit = oracle.bound(expected, 1.0, torch.float32, *depth_and_length(vae))
    oracle.assert_close("frames", torch.cat(made, 2), expected, limit)
    assert {cache.shape[2] for cache in caches} == {2}


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("sides", [(4, 6), (6, 2)])
def test_a_video_is_what_the_vae_makes(whole, frames, sides):
    pipe, denoiser = whole("wan")
    latents = noise(1, pipe.vae.config.z_dim, frames, *sides)
    expected = expected_of(pipe.vae, latents)
    seen = decoded(denoiser.decoder, latents)
    limit = oracle.bound(expected, 1.0, torch.float32, *depth_and_length(pipe.vae))
    oracle.assert_close(f"{frames} of {sides}", seen, expected, limit)
    if frames > 1:  # without what went before, a latent frame is another
        alone = decoded(denoiser.decoder, latents[:, :, -1:])
        assert (alone - expected[:, :, -1:]).abs().max() > limit
    decoded(denoiser.decoder, noise(1, pipe.vae.config.z_dim, 3, *sides, seed=1))
    assert torch.equal(decoded(denoiser.decoder, latents), seen)  # nothing of another video is left


@pytest.mark.parametrize("extents", [(1, 4, 6), (2, 4, 6), (5, 6, 2), (7, 3, 5), (8, 3, 5), (2, 3, 34), (1, 33, 34)])
def test_a_video_in_tiles_is_what_the_vae_makes_in_tiles(whole, extents):
    """Of one tile, of several in time, of several along a side, and along both."""
    pipe, denoiser = whole("hunyuan")
    pipe.vae.enable_tiling()
    latents = noise(1, pipe.vae.config.latent_channels, *extents)
    expected = tiled(pipe.vae, latents)
    seen = decoded(denoiser.decoder, latents)
    limit = oracle.bound(expected, 1.0, torch.float32, *depth_and_length(pipe.vae))
    oracle.assert_close(f"{extents}", seen, expected, limit)
    other = decoded(denoiser.decoder, latents.flip(2, 4))
    assert (other - expected).abs().max() > limit
    if max(extents) == 34:  # without blending it is not within the bound
        pipe.vae.disable_tiling()
        assert (tiled(pipe.vae, latents) - seen).abs().max() > limit


def test_a_video_of_one_tile_is_the_untiled_one(whole):
    pipe, denoiser = whole("hunyuan")
    pipe.vae.disable_tiling()
    latents = noise(1, pipe.vae.config.latent_channels, 4, 5, 3)
    expected = tiled(pipe.vae, latents)
    limit = oracle.bound(expected, 1.0, torch.float32, *depth_and_length(pipe.vae))
    oracle.assert_close("one tile", decoded(denoiser.decoder, latents), expected, limit)


def tiled(vae, latents):
    """What the VAE of HunyuanVideo makes of latents as the scheduler leaves them."""
    with torch.no_grad():
        return unit(vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0])


def test_memory_does_not_grow_with_the_number_of_frames(whole, monkeypatch):
    pipe, denoiser = whole("wan")
    decoder, sizes = denoiser.decoder, []
    runner = decoder._frames._runner
    made, bound = runner.buffer, runner.bind
    monkeypatch.setattr(runner, "buffer", lambda shape, dtype: sizes.append(4 * math.prod(shape)) or made(shape, dtype))
    monkeypatch.setattr(runner, "bind", lambda *given: sizes.append(0) or bound(*given))
    channels = pipe.vae.config.z_dim
    decoded(decoder, noise(1, channels, 1, 3, 3))  # another size than any other test's
    first = list(sizes)
    decoded(decoder, noise(1, channels, 12, 3, 3))
    assert sizes == first and sum(first) == video_bytes(decoder.described, {"height": 3, "width": 3}) > 0
    assert sizes.count(0) == 3  # one call of the first latent frame, two that read what the other wrote


def test_a_size_out_of_range_is_refused(whole):
    pipe, denoiser = whole("wan")
    with pytest.raises(StepError, match="size `height` of part `decode` is 1, expected 2 to 256"):
        decoded(denoiser.decoder, noise(1, pipe.vae.config.z_dim, 2, 1, 4))


def request_of(denoiser, seeds=(SEED,)):
    return prompt_request(denoiser, [PROMPT] * len(seeds), seeds, SIZE, SCALE, OTHER, 32)


def test_the_video_is_the_pipelines(whole):
    """From prompt to video, all steps full, noise of the same seed."""
    pipe, denoiser = whole("wan")
    frames, height, width = SIZE
    with torch.no_grad():
        expected = pipe(
            PROMPT,
            OTHER,
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            generator=torch.Generator().manual_seed(SEED),
            output_type="pt",
            max_sequence_length=32,
        ).frames[0]
    request = request_of(denoiser)
    made = pictures_of(denoiser, request, sample(denoiser, request, denoiser.forecasts(plan="F" * STEPS)).latents)
    assert made.shape == (1, *SIZE, 3) and made.dtype == np.uint8
    seen = drawn(denoiser, request, "F" * STEPS)
    limit = bound_of_picture(expected, pipe, 2 * STEPS, SCALE)
    oracle.assert_close("video", seen, expected, limit)
    assert (seen.flip(0) - expected).abs().max() > limit


@pytest.fixture
def command(whole, monkeypatch, tmp_path):
    """Options, name of the file -> (exit code, the file): `run` with the tiny whole Wan, which stays open."""
    denoiser = whole("wan")[1]
    monkeypatch.setattr(run, "open_denoiser", lambda *_, **how: nullcontext(denoiser))

    def called(name, *more, size="9x32x48"):
        asked = ["--prompt", PROMPT, "--prompt-tokens", "32", "--size", size, "--plan", "FF", "--seed", "3", *more]
        return cli.main(["run", "bundle", *asked, "--out", str(tmp_path / name)]), tmp_path / name

    return called


@pytest.mark.parametrize(("name", "more", "spent"), [("a.gif", [], 560), ("a.webp", ["--fps", "24"], 375)])
def test_run_writes_a_video(command, capsys, name, more, spent):
    code, path = command(name, *more)
    said = capsys.readouterr()
    assert code == 0, said.err
    assert str(path) in said.out and "decode" in said.out
    with Image.open(path) as made:
        assert (made.n_frames, made.size) == (SIZE[0], (SIZE[2], SIZE[1]))
        total = 0
        for k in range(made.n_frames):
            made.seek(k)
            made.load()
            total += made.info["duration"]
    assert total == spent  # 9 frames, 16 a second unless asked, by the clock of the format


def test_run_writes_a_video_for_each_seed_and_a_picture_of_one_frame(command, tmp_path):
    assert command("b.webp", "--n", "2")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b-1.webp", "b-2.webp"]
    code, path = command("c.png", size="1x32x48")
    assert code == 0 and Image.open(path).size == (48, 32)


def test_a_video_has_no_previews(command, capsys):
    code, path = command("a.webp", "--previews", "1")
    assert code == 2 and not path.exists()
    assert "--previews is 1 for a video of wan-whole, expected a picture" in capsys.readouterr().err


def test_a_picture_holds_no_video(command, capsys):
    code, path = command("a.png")
    assert code == 2 and not path.exists()
    assert "for a video of 9 frames, expected .gif, .webp or .mp4" in capsys.readouterr().err


def test_mp4_names_the_extra_that_it_needs(command, capsys, monkeypatch):
    from importlib import util

    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "av" else found(name))
    assert command("a.mp4")[0] == 2
    assert "av is not installed" in (said := capsys.readouterr().err) and "taylorseer-export[video]" in said


def test_mp4_has_the_frames(tmp_path):
    frames = np.zeros((5, 32, 48, 3), np.uint8)
    frames[2:] = 200
    write_video(tmp_path / "a.mp4", frames, 16)
    with av.open(str(tmp_path / "a.mp4")) as container:
        seen = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 16
    assert np.abs(np.stack(seen).astype(int) - frames).max() < 8  # what the codec loses of plain colours
    with pytest.raises(ConfigError, match=r"expected even sides for MP4; write \.webp"):
        write_video(tmp_path / "b.mp4", frames[:, :31], 16)


def test_what_is_no_video_takes_no_frame_rate(embedded, capsys, monkeypatch):
    for more, problem in ((["--fps", "8"], "expected a bundle that makes videos"), (["--out", "a.mp4"], "no videos")):
        monkeypatch.setattr("taylorseer_export.commands.run.require_extra", lambda *_: None)
        assert cli.main(["run", str(embedded("shapes")), *more]) == 2
        assert problem in capsys.readouterr().err
    assert require_extra("sample", "PIL") is None


def test_what_makes_videos_is_served_and_not_judged_as_pictures(whole):
    _, denoiser = whole("wan")
    manifest = denoiser.manifest
    assert frame_rate(manifest) == 16 and len(usual_size(manifest)) == 3
    assert contract.roles(manifest) == ("picture", "denoiser") and not draws(denoiser)
    made, rate, *_ = contract.outputs(manifest, "picture")
    assert (made.name, made.dims) == ("video", (-1, -1, -1, 3)) and (rate.name, rate.datatype) == (
        "frame_rate",
        "INT32",
    )
    assert "frames" in [port.name for port in contract.inputs(manifest, "picture")]


def test_the_card_states_the_memory(whole):
    text = card(whole("wan")[1].manifest)
    assert "of buffers for a video of any length" in text and "16 frames per second" in text
    assert "tiles of 5 latent frames, 32 latent pixels a side; 24 frames" in card(whole("hunyuan")[1].manifest)


def _caches(part, side, **change):
    graph = part["later"]
    graph[side] = [{**t, **change} if t["name"].startswith("cache") else t for t in graph[side]]


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda part: part["later"]["inputs"].pop(), "graph later has .* of role cache_in"),
        (lambda part: part["later"]["outputs"].pop(), "graph later has .* of role cache_out"),
        (lambda part: part["graph"]["outputs"].pop(), "graph later has .* of role cache_in"),
        (lambda part: _caches(part, "inputs", dtype="float16"), "cache_in_0` is float16 .* the first latent frame"),
        (lambda part: _caches(part, "outputs", role="picture"), "makes a `picture` of `latents` and nothing else"),
        (lambda part: part.update(later=None), "frame_rate of part decode is 16"),
        (lambda part: part.update(frame_rate=None), "frame_rate of part decode is None, which goes with"),
        (lambda part: part["later"].update(file="later.onnx"), "is not listed in files, in the folder decode"),
    ],
)
def test_a_part_that_contradicts_itself_is_refused(whole, spoil, problem):
    told = json.loads(whole("wan")[1].manifest.model_dump_json())
    spoil(told["parts"]["decode"])
    with pytest.raises(ValueError, match=problem):
        Manifest.model_validate(told, strict=False)
    PipelinePart.model_validate(told["parts"]["decode"], strict=False)  # it is the parts that disagree, not their form


def test_the_video_of_hunyuan_is_the_pipelines(whole):
    """From prompt to video: Llama behind its template and CLIP, guidance as an input, a video of one tile."""
    pipe, denoiser = whole("hunyuan")
    frames, height, width = size = (5, 32, 48)
    with torch.no_grad():
        expected = pipe(
            PROMPT,
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            generator=torch.Generator().manual_seed(SEED),
            output_type="pt",
            max_sequence_length=200,
        ).frames[0]
    request = prompt_request(denoiser, [PROMPT], [SEED], size, SCALE, None, 200)
    seen, limit = drawn(denoiser, request, "F" * STEPS), bound_of_picture(expected, pipe, STEPS)
    oracle.assert_close("video", seen, expected, limit)
    assert (seen.flip(0) - expected).abs().max() > limit
