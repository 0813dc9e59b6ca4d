"""Proposals of declarations: the known families are found again from their modules alone, and strangers are judged."""

import json
import re

import pytest
from tiny_bundles import MODELS

from taylorseer_export import cli
from taylorseer_export.errors import ExportError
from taylorseer_export.families import FAMILIES
from taylorseer_export.graph import propose

pytestmark = pytest.mark.slow

# Where a declaration says more than conventions do, or says it otherwise.
DIFFERS = {
    "flux": {"timestep"},  # in the precision of the model, as its pipeline passes it
    "plain": {"timestep"},
    "kontext": {"timestep", "image_latents", "image_ids"},  # two inputs of ours for one argument
    "flux2": {"timestep", "img_ids", "txt_ids"},  # places are whole numbers, for every sample
    "flux2-base": {"timestep", "img_ids", "txt_ids"},
    "flux2-edit": {"timestep", "img_ids", "txt_ids", "image_latents", "image_ids"},
    "flux2-kv": {"timestep", "img_ids", "txt_ids", "image_latents", "image_ids"},
    "chroma": {"timestep", "attention_mask"},  # the mask of the text alone
    "krea-2": {"timestep", "position_ids", "encoder_attention_mask"},  # the picture's alone
    "longcat-image": {"timestep", "img_ids", "txt_ids"},  # words along a diagonal
    "ovis-image": {"timestep", "txt_ids"},
    "z-image": {"x", "cap_mask"},  # lists, for which tensors stand while tracing
    "qwen-image": {"hidden_states", "timestep", "img_shapes"},  # numbers, for which a tensor stands while tracing
    "qwen-image-edit": {"hidden_states", "timestep", "img_shapes", "image_latents"},
    "qwen-image-edit-2511": {"hidden_states", "timestep", "img_shapes", "image_latents"},
    # the words' width, and their mask, are called otherwise or of another dtype
    "pixart": {"encoder_attention_mask"},  # of the model's dtype
    "sana": {"hidden_states", "encoder_attention_mask"},  # its latent is cut into 1 x 1
    "qwen-image-2.1": {"img_mask", "timestep", "img_shapes", "encoder_hidden_states", "encoder_hidden_states_mask"},
    "hidream": {"hidden_states", "pooled_embeds", "encoder_hidden_states_t5", "encoder_hidden_states_llama3"},
    "hunyuan": {"encoder_attention_mask"},  # of another dtype
    "hunyuan-channels": {"encoder_attention_mask"},
    "hunyuan-replace": {"encoder_attention_mask"},
    **{  # a second text, a picture of a fixed number of tokens, and of text to video the noise alone
        name: {"timestep", "encoder_attention_mask", "encoder_hidden_states_2", "encoder_attention_mask_2", own}
        for name, own in (("hunyuan-1.5", "hidden_states"), ("hunyuan-1.5-i2v", "image_embeds"))
    },
    "framepack": {  # the past, in three histories of fixed lengths
        "encoder_attention_mask",
        "hidden_states",
        "image_embeds",
        "indices_latents",
        "indices_latents_clean",
        "indices_latents_history_2x",
        "indices_latents_history_4x",
        "latents_clean",
        "latents_history_2x",
        "latents_history_4x",
    },
    # places in two tables; the table of one size; channels of a picture, frames in pairs
    "cogvideox": {"encoder_hidden_states", "image_rotary_emb"},
    "cogvideox-table": {"hidden_states"},
    "cogvideox-image": {"encoder_hidden_states", "image_rotary_emb", "hidden_states", "ofs"},
    "wan-image": {"encoder_hidden_states"},  # of a fixed number of tokens
}
PIXART = {
    "_class_name": "PixArtTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 32,
    "sample_size": 8,
    "caption_channels": 24,
    "use_additional_conditions": False,
    "interpolation_scale": 1,
}


def matched(model, patterns):
    return {name for name, _ in model.named_modules() if any(re.fullmatch(p, name) for p in patterns)}


# Blocks of FLUX.3 stand in a dict of lists, which are not looked through; LTX-2 has two latents, and one is looked for;
# VACE's hints are what follows its blocks; no rule tells of Animate's faces; and of Kandinsky 5 the tokens are a video
# again behind them, which its declaration leaves for later.
APART = (
    "flux3",
    "flux3-distilled",
    "ltx-2",
    "ltx-2-image",
    "wan-vace",
    "wan-animate",
    "kandinsky-5",
    "kandinsky-5-t2i",
)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in APART])
def test_known_families_are_found_again(name):
    family, build, _ = MODELS[name]
    model, declared = build(), FAMILIES[family]
    found = propose.propose(model)
    assert matched(model, found.sites) == matched(model, declared.sites)
    assert (found.stack_input, found.stack_output) == (declared.stack_input, declared.stack_output)
    one, other = ({spec.name: spec for spec in inputs} for inputs in (found.inputs, declared.inputs(model.config)))
    assert {n for n in one.keys() | other.keys() if one.get(n) != other.get(n)} == DIFFERS.get(name, set())


def test_what_is_left_out_is_said():
    found = propose.propose(MODELS["hunyuan"][1]()).skipped
    assert "blocks inside another part" in found["context_embedder.token_refiner.refiner_blocks"]
    assert "no path to the output" in found["transformer_blocks.0.ff_context"]
    assert "joined with the MLP in proj_out" in found["single_transformer_blocks.0.attn"]
    assert "normed behind it by ffn_norm2" in propose.propose(MODELS["z-image"][1]()).skipped["layers.1.feed_forward"]
    assert not any("single" in module for module in propose.propose(MODELS["flux2"][1]()).skipped)
    assert "add it if you pass it" in propose.propose(MODELS["qwen-image"][1]()).skipped["argument additional_t_cond"]


def taps(tmp_path, capsys, config, *options):
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = cli.main(["taps", str(tmp_path), *options])
    return code, capsys.readouterr()


def test_a_stranger_is_proposed_and_traced(tmp_path, capsys):
    code, printed = taps(tmp_path, capsys, PIXART)
    assert code == 0
    assert "traced and split: 3 sites" in printed.out  # sums over two blocks: of attentions, of MLPs, of the ungated
    assert "no attention, no MLP" in printed.out
    assert 'stack_output=("norm_out", "input")' in printed.out


def test_the_declaration_is_python(tmp_path, capsys):
    """Pasted into a module with its imports, it is a family that says what was proposed."""
    _, printed = taps(tmp_path, capsys, PIXART, "--no-trace")
    assert "not checked: --no-trace" in printed.out
    from taylorseer_export.families import family

    space = dict(vars(family))
    exec(printed.out, space)
    made = space["PIXART"]
    assert made.sites == tuple(rf"transformer_blocks\.\d+\.{m}" for m in ("attn1", "attn2", "ff"))
    assert [spec.name for spec in made.inputs({})] == [
        "hidden_states",
        "encoder_hidden_states",
        "timestep",
        "encoder_attention_mask",
    ]


def test_an_incomplete_proposal_is_told(monkeypatch, tmp_path, capsys):
    """A site too few leaves an MLP in the forecast graph: the check refuses it and names the module."""
    model = MODELS["sd3"][1]()
    found = propose.propose(model)
    fewer = propose.replace(found, sites=tuple(s for s in found.sites if not s.endswith("ff")))
    with pytest.raises(
        ExportError, match=r"left with `transformer_blocks\.0\.ff`, `transformer_blocks\.1\.ff`, expected"
    ):
        propose.check(model, fewer)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(propose, "propose", lambda _: fewer)
    assert cli.main(["taps", str(tmp_path)]) == 0
    assert "# does not trace and split as it is: the forecast graph is left with" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"_class_name": "NoSuchModel"}, "is of class NoSuchModel, expected a transformer of diffusers"),
        ({"_class_name": "AutoencoderTiny"}, "has no list of blocks with an attention, expected a diffusion transf"),
    ],
)
def test_no_transformer(tmp_path, capsys, config, sentence):
    code, printed = taps(tmp_path, capsys, config)
    assert code == 2
    assert sentence in printed.err


def test_a_folder_without_a_config(tmp_path, capsys):
    assert cli.main(["taps", str(tmp_path / "nothing")]) == 2
    assert "config.json is not readable JSON" in capsys.readouterr().err
    with pytest.raises(ExportError, match=r"declare it by hand, see families/README\.md"):
        propose.propose(propose.nn.Linear(2, 2))
