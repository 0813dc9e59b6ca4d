"""Saved checkpoints for the tests: opened, compared with the model they are of, and edited."""

import json

import torch
from safetensors.torch import load_file, save_file

from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.families import FAMILIES

DIT = FAMILIES["dit"]
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


def opened(folder, family=DIT):
    return open_checkpoint(str(folder), family)


def assert_holds(checkpoint, model):
    """The checkpoint has exactly the tensors of `model`, bit for bit."""
    state = model.state_dict()
    assert checkpoint.files.keys() == state.keys(), checkpoint.files.keys() ^ state.keys()
    different = [name for name, value in state.items() if not torch.equal(checkpoint.tensor(name), value)]
    assert different == [], different


def rewrite(folder, change):
    """Change the tensors of a single-file checkpoint."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
