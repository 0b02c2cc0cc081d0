"""What LoRA formats cannot hold, and what stands in their way, is said before anything is written."""

import json

import pytest
import torch
from lora_files import SD15, WRITTEN, assert_equal_products, mixed, path_of
from safetensors.torch import save_file
from sd_files import sd_config

from xdiffusion.build import build_model
from xdiffusion.checkpoints.files import CheckpointError
from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.checkpoints.lora_formats import read_lora, write_lora
from xdiffusion.lora import LoRAError, load_lora_weights


def test_formats_that_are_not_written(tmp_path):
    for format in ("diffusers-processors", "lycoris"):
        with pytest.raises(CheckpointError, match=f"'{format}' is none that is written here"):
            write_lora(mixed(), tmp_path / "a", format)
    with pytest.raises(CheckpointError, match="the LoRA holds no factors"):
        write_lora(LoRAFile({}), tmp_path / "a", "native")


@pytest.mark.parametrize("format", [name for name in WRITTEN if name not in ("native", "peft")])
def test_layers_that_a_format_has_no_name_for(format, tmp_path):
    lora = LoRAFile({"head.0": LoRAFactors(torch.ones(1, 2), torch.ones(2, 1), 1.0)})
    with pytest.raises(CheckpointError, match=r"head\.0"):
        write_lora(lora, path_of(format, tmp_path), format, SD15)
    assert list(tmp_path.iterdir()) == []


def test_peft_folders_say_what_is_wrong(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is a folder, not a checkpoint; it holds none"):
        read_lora(tmp_path / "empty")
    path = tmp_path / "peft"
    for change, message in (
        ({"peft_type": "IA3"}, "is of the method 'IA3'"),
        ({"alpha_pattern": {"(": 1}}, "its header is damaged"),
        ({"lora_alpha": "much"}, "its header is damaged"),
    ):
        write_lora(mixed(), path, "peft")
        config = path / "unet/adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
        with pytest.raises(CheckpointError, match=message):
            read_lora(path)


@pytest.mark.parametrize("format", ["cloneofsimo-pt", "positional", "kohya", "peft"])
def test_leftovers_of_another_lora_are_not_mixed_in(format, tmp_path):
    """What stands beside a file is read with it: a LoRA without it does not take the place of one that has it."""
    path = path_of(format, tmp_path)
    write_lora(mixed(), path, format)
    write_lora(mixed(), path, format)
    unet_only = LoRAFile({n: f for n, f in mixed().modules.items() if n.startswith("unet")})
    with pytest.raises(CheckpointError, match="of another LoRA would be read with what is to be written"):
        write_lora(unet_only, path, format)
    assert_equal_products(read_lora(path), mixed())
    if format == "peft":
        path.with_suffix(".ti.pt").unlink()
        with pytest.raises(CheckpointError, match=r"text_encoder/adapter_config\.json of another LoRA"):
            write_lora(unet_only, path, format)


@pytest.mark.parametrize(
    ("module", "context"),
    [
        ("lora_te2_text_model_encoder_layers_31_self_attn_q_proj", 1280),
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn2_to_k", 2048),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 2048),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", 2048),
        ("text_encoder_2.text_model.encoder.layers.31.self_attn.q_proj", 1280),
    ],
)
def test_a_lora_of_stable_diffusion_xl_is_called_so(module, context, tmp_path):
    names = ("lora_A", "lora_B") if "." in module else ("lora_down", "lora_up")
    factors = zip(names, (torch.ones(2, context), torch.ones(640, 2)))
    save_file({f"{module}.{name}.weight": tensor for name, tensor in factors}, tmp_path / "xl.safetensors")
    model = build_model(sd_config("sd15"), without_weights=True)
    with pytest.raises((CheckpointError, LoRAError), match=r"xl.safetensors.*: it is a LoRA for Stable Diffusion XL"):
        load_lora_weights(model, tmp_path / "xl.safetensors")
