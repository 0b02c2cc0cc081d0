"""LoRA files of every kind that people have, read to and written from one `LoRAFile`.

    read_lora(path) -> LoRAFile        the format is recognised from the file
    write_lora(lora, path, format)     by name, see `FORMATS`

Every product scaling * B A survives every conversion. A format without a place for alpha gets it folded into lora_B; one
without a place for learned tokens gets them in `<name>.ti.pt` beside it; one that cannot say something else says so.
"""

from xdiffusion.checkpoints.lora_formats.files import read_lora, save_tokens_beside, tokens_path, write_lora
from xdiffusion.checkpoints.lora_formats.formats import FORMATS, unsaid
from xdiffusion.checkpoints.lora_formats.layer_table import SD_BASES, LayerTable, sd_layer_table

__all__ = [
    "FORMATS",
    "SD_BASES",
    "LayerTable",
    "read_lora",
    "save_tokens_beside",
    "sd_layer_table",
    "tokens_path",
    "unsaid",
    "write_lora",
]
