"""The model families: one short declaration each."""

from __future__ import annotations

from difflib import get_close_matches

from taylorseer_export.errors import ConfigError
from taylorseer_export.families.chroma import CHROMA
from taylorseer_export.families.cogvideox import COGVIDEOX
from taylorseer_export.families.dit import DIT
from taylorseer_export.families.family import Family
from taylorseer_export.families.flux import FLUX, FLUX_KONTEXT
from taylorseer_export.families.flux2 import FLUX2, FLUX2_EDIT, FLUX2_KV
from taylorseer_export.families.flux3 import FLUX3
from taylorseer_export.families.framepack import FRAMEPACK
from taylorseer_export.families.hidream import HIDREAM
from taylorseer_export.families.hunyuan_video import HUNYUAN_VIDEO
from taylorseer_export.families.hunyuan_video_15 import HUNYUAN_VIDEO_15
from taylorseer_export.families.kandinsky_5 import KANDINSKY_5
from taylorseer_export.families.krea_2 import KREA_2
from taylorseer_export.families.longcat_image import LONGCAT_IMAGE
from taylorseer_export.families.ltx_2 import LTX_2
from taylorseer_export.families.ltx_2_image import LTX_2_IMAGE
from taylorseer_export.families.ovis_image import OVIS_IMAGE
from taylorseer_export.families.pixart import PIXART
from taylorseer_export.families.qwen_image import QWEN_IMAGE
from taylorseer_export.families.qwen_image_21 import QWEN_IMAGE_21
from taylorseer_export.families.qwen_image_edit import QWEN_IMAGE_EDIT
from taylorseer_export.families.sana import SANA
from taylorseer_export.families.sd3 import SD3
from taylorseer_export.families.wan import WAN
from taylorseer_export.families.wan_5b_image import WAN_5B_IMAGE
from taylorseer_export.families.wan_animate import WAN_ANIMATE
from taylorseer_export.families.wan_vace import WAN_VACE
from taylorseer_export.families.z_image import Z_IMAGE

_ALL = (
    CHROMA,
    COGVIDEOX,
    DIT,
    FLUX,
    FLUX_KONTEXT,
    FLUX2,
    FLUX2_EDIT,
    FLUX2_KV,
    FLUX3,
    FRAMEPACK,
    HIDREAM,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_15,
    KANDINSKY_5,
    KREA_2,
    LONGCAT_IMAGE,
    LTX_2,
    LTX_2_IMAGE,
    OVIS_IMAGE,
    PIXART,
    QWEN_IMAGE,
    QWEN_IMAGE_EDIT,
    QWEN_IMAGE_21,
    SANA,
    SD3,
    WAN,
    WAN_5B_IMAGE,
    WAN_ANIMATE,
    WAN_VACE,
    Z_IMAGE,
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}


def family_named(name: str) -> Family:
    """The declaration called `name`.

    Raises:
        ConfigError: No such family.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    close = get_close_matches(name, FAMILIES, n=1)
    hint = f"did you mean `{close[0]}`?" if close else "see `taylorseer-export --help`"
    raise ConfigError(f"family is `{name}`, expected one of {', '.join(FAMILIES)}; {hint}")
