"""families/README.md, followed to the letter: its listing is a family, and its bundle equals the float64 replay."""

import re
from pathlib import Path

import oracle
import pytest
import tiny_models
import torch
from diffusers import PixArtTransformer2DModel
from harness import allowed, eager_denoiser, run
from oracle import assert_close

import taylorseer_export.families
from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile import export
from taylorseer_export.families import FAMILIES
from taylorseer_export.families.family import Family, Pipeline

pytestmark = pytest.mark.slow

PAGE = Path(taylorseer_export.families.__file__).with_name("README.md").read_text(encoding="utf-8")
PLAN, ORDER = "FFF..F...F..", 2


@pytest.fixture(scope="module")
def listed() -> Family:
    """The family that the page's listing declares."""
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    space: dict = {}
    exec(source, space)
    (family,) = (value for value in space.values() if isinstance(value, Family))
    return family


@pytest.fixture(scope="module")
def model():
    return tiny_models.randomised(
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
        seed=5,
    )


def inputs(batch, text_tokens):
    rng = torch.Generator().manual_seed(7)
    timestep = torch.linspace(999.0, 100.0, len(PLAN))
    shape = (batch, 4, 16, 16)
    mask = torch.ones(batch, text_tokens)
    mask[0, -1] = 0
    text = torch.randn(batch, text_tokens, 24, generator=rng)
    latents = tiny_models._trajectory(timestep / 1000, shape, rng)
    return latents, timestep, {"encoder_hidden_states": text, "encoder_attention_mask": mask}


@pytest.mark.parametrize("sizes", [(2, 6), (1, 20)], ids=str)
def test_the_listing_works(listed, model, sizes, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path), listed)
    made = export.draft(checkpoint, export.Options(order=ORDER, interval=4, warmup=3, steps=len(PLAN)))
    assert list(made.split.sites) == ["transformer_blocks.attn1", "transformer_blocks.ff", "ungated"]
    row = oracle.Family(((r"transformer_blocks\.\d+\.(attn1|attn2|ff)", None),))
    monkeypatch.setitem(oracle.FAMILIES, "PixArtTransformer2DModel", row)
    given = inputs(*sizes)
    seen = run(eager_denoiser(made), given, PLAN, ORDER)
    reference = oracle.replay(model, *given, PLAN, ORDER)
    assert_close(str(sizes), seen, reference, allowed(model, reference, PLAN, ORDER))


def _is_entry(name: str) -> bool:
    return any(
        name in fields for fields in (Family.__dataclass_fields__, Pipeline.__dataclass_fields__, Manifest.model_fields)
    )


def test_the_page_names_what_there_is(listed):
    """Entries, hooks and files that the page speaks of exist."""
    entries = set(re.findall(r"^\| `(\w+)`(?:, `\w+`)? \|", PAGE, re.MULTILINE))
    assert entries
    assert {name for name in entries if not _is_entry(name)} == set()
    assert Pipeline.__dataclass_fields__.keys() <= entries
    (table,) = re.findall(r"^\| in the manifest .*?\n\n", PAGE, re.MULTILINE | re.DOTALL)
    travelling = {name for row in table.splitlines()[2:-1] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert (
        travelling == {"dimensions", "sites", "graphs", "plan", "sampling", "pipeline"} <= Manifest.model_fields.keys()
    )
    root = Path(__file__).resolve().parents[1]
    assert all((root / path).is_file() for path in re.findall(r"`(tests/\w+\.py)`", PAGE))
    assert listed.name not in FAMILIES  # it stays a stranger
    assert len(re.findall(r"^PIXART = Family\(.*?^\)", PAGE, re.MULTILINE | re.DOTALL)[0].splitlines()) <= 40
