"""LoRA files of rarer tools: OneTrainer's OMI layout, the Dreambooth extension's pairs, ComfyUI's extraction, 8 bits."""

import pytest
import torch
from lora_files import SD15, TEXT, assert_equal_products, converted, mixed, path_of
from safetensors.torch import load_file, save_file
from test_lora_of_other_tools import original_name

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.lora_file import LoRAFile
from xdiffusion.checkpoints.lora_formats import read_lora, write_lora


@pytest.fixture
def kohya(tmp_path):
    """A LoRA, and the tensors of its file in kohya's format."""
    lora = converted(mixed(), "kohya", tmp_path)
    return lora, load_file(path_of("kohya", tmp_path))


def test_onetrainers_omi_layout_is_read(kohya, tmp_path):
    lora, tensors = kohya
    flat = {f"lora_{name.replace('.', '_')}": f"unet.{original_name(name.removeprefix('unet.'))}" for name in SD15.part("unet")}
    flat |= {f"lora_te_{name[13:].replace('.', '_')}": f"clip_l.{name[13:]}" for name in SD15.part("text_encoder")}
    parts = {key: key.partition(".") for key in tensors}
    assert all(module in flat for module, _, _ in parts.values())
    save_file({f"{flat[m]}.{part}": tensors[key] for key, (m, _, part) in parts.items()}, tmp_path / "omi.safetensors")
    assert_equal_products(read_lora(tmp_path / "omi.safetensors"), lora)


def test_the_text_encoder_s_half_of_the_dreambooth_extension_is_read(tmp_path):
    counted = {name: f for name, f in mixed().modules.items() if "attn" in name}
    lora = LoRAFile(counted)
    write_lora(lora, tmp_path / "db.pt", "cloneofsimo-pt")
    (tmp_path / "db.text_encoder.pt").rename(tmp_path / "db_txt.pt")
    assert_equal_products(read_lora(tmp_path / "db.pt"), lora, 1e-5)
    with pytest.raises(CheckpointError, match=r"db_txt\.pt of another LoRA would be read"):
        write_lora(LoRAFile({n: f for n, f in counted.items() if n.startswith("unet.")}), tmp_path / "db.pt", "cloneofsimo-pt")


def extracted(lora, tensors, module, rows, columns, fill):
    """With one module more, as ComfyUI extracts it from a whole text encoder."""
    up, down = torch.full((rows, 2), fill), torch.ones(2, columns)
    return tensors | {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}


def test_comfyui_s_extraction_of_a_text_encoder_is_read_but_for_what_changes_nothing(kohya, tmp_path):
    lora, tensors = kohya
    embeddings = "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding"
    last = "text_encoders.clip_h.transformer.text_model.encoder.layers.23.mlp.fc1"
    more = extracted(lora, extracted(lora, tensors, embeddings, 49408, 768, 0.0), last, 4096, 1024, 1.0)
    save_file(more, tmp_path / "extracted.safetensors")
    read = read_lora(tmp_path / "extracted.safetensors")
    assert_equal_products(read, lora)
    assert any("token_embedding" in repair and "changes nothing" in repair for repair in read.repairs)
    assert any("layers.23" in repair and "no picture depends on" in repair for repair in read.repairs)
    save_file(extracted(lora, tensors, embeddings, 49408, 768, 1.0), tmp_path / "extracted.safetensors")
    with pytest.raises(CheckpointError, match=r"such as .*token_embedding"):
        read_lora(tmp_path / "extracted.safetensors")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_factors_of_8_bits_are_read(kohya, dtype, tmp_path):
    lora, tensors = kohya
    rounded = {key: tensor.to(dtype) if "lora_" in key.partition(".")[2] else tensor for key, tensor in tensors.items()}
    save_file(rounded, tmp_path / "eight.safetensors")
    read = read_lora(tmp_path / "eight.safetensors")
    expected = tensors[f"lora_te_{TEXT[13:].replace('.', '_')}_self_attn_q_proj.lora_up.weight"].to(dtype).float()
    assert torch.equal(read.modules[f"{TEXT}.self_attn.q_proj"].lora_B, expected)
    assert_equal_products(read, lora, 0.3)


def test_lycoris_sparse_rest_is_named(kohya, tmp_path):
    _, tensors = kohya
    module = next(iter(tensors)).partition(".")[0]
    sparse = {"bias_indices": torch.zeros(2, 3, dtype=torch.int16), "bias_values": torch.ones(3), "bias_size": torch.ones(2)}
    save_file(tensors | {f"{module}.{name}": tensor for name, tensor in sparse.items()}, tmp_path / "sparse.safetensors")
    with pytest.raises(CheckpointError, match=r"sparse difference of whole weights.*LyCORIS"):
        read_lora(tmp_path / "sparse.safetensors")
