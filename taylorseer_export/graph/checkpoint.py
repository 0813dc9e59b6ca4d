"""The old place of checkpoints, which scripts still name: `open_checkpoint` and `Checkpoint` live in `checkpoint`."""

from taylorseer_export.checkpoint.checkpoint import Checkpoint as Checkpoint
from taylorseer_export.checkpoint.checkpoint import open_checkpoint as open_checkpoint
