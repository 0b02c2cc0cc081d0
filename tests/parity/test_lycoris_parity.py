"""LyCORIS' own modules of random weights, written as it writes them, have the same update when they are read here."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from xdiffusion.checkpoints.lora_formats import read_lora, sd_layer_table

loha = pytest.importorskip("lycoris.modules.loha").LohaModule
lokr = pytest.importorskip("lycoris.modules.lokr").LokrModule
locon = pytest.importorskip("lycoris.modules.locon").LoConModule

SD15 = sd_layer_table("sd15")
LAYERS = {
    "linear": "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "wide": "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "1x1": "unet.down_blocks.0.attentions.0.proj_in",
    "3x3": "unet.down_blocks.1.resnets.0.conv1",
    "text": "text_encoder.text_model.encoder.layers.3.mlp.fc2",
}
MODULES = {
    "loha": (loha, {"lora_dim": 4}),
    "loha of full rank": (loha, {"lora_dim": 24}),
    "loha, tucker": (loha, {"lora_dim": 3, "use_tucker": True}),
    "loha, dora": (loha, {"lora_dim": 3, "weight_decompose": True, "wd_on_out": True}),
    "loha, rslora": (loha, {"lora_dim": 9, "rs_lora": True}),
    "lokr": (lokr, {"lora_dim": 4, "factor": 8}),
    "lokr, both decomposed": (lokr, {"lora_dim": 2, "factor": 8, "decompose_both": True}),
    "lokr, tucker": (lokr, {"lora_dim": 4, "factor": 8, "use_tucker": True}),
    "lokr, whole": (lokr, {"lora_dim": 100000, "factor": -1}),
    "lokr of full rank": (lokr, {"lora_dim": 100, "factor": 2}),
    "locon with a middle": (locon, {"lora_dim": 4, "use_tucker": True}),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_a_layer_with_it_computes_the_same(name, layer, tmp_path):
    torch.manual_seed(0)
    out_size, in_size, *kernel = shape = SD15[LAYERS[layer]]
    theirs = nn.Conv2d(in_size, out_size, tuple(kernel), bias=False) if kernel else nn.Linear(in_size, out_size, bias=False)
    weight, x = theirs.weight.clone(), torch.randn(2, in_size, *kernel)
    kind, settings = MODULES[name]
    module = kind("layer", theirs, multiplier=1.0, alpha=1.5, **settings).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    stem = LAYERS[layer].replace("text_encoder.", "lora_te_").replace("unet.", "lora_unet_").replace(".", "_")
    tensors = {f"{stem}.{part}": tensor.detach().contiguous() for part, tensor in module.custom_state_dict().items()}
    save_file(tensors, tmp_path / "theirs.safetensors")
    factors = read_lora(tmp_path / "theirs.safetensors").modules[LAYERS[layer]]
    assert factors.lora_A.shape[1:] == shape[1:]
    assert factors.rank <= max(min(shape[0], weight[0].numel()), 4)
    ours = weight + factors.delta()
    if "dora" in name:
        ours *= (factors.magnitude / ours.flatten(1).norm(dim=1)).view(-1, *[1] * (ours.dim() - 1))
    module.apply_to()
    expected, actual = theirs(x), x.flatten(1) @ ours.flatten(1).T
    error = (actual - expected.flatten(1)).norm() / (expected.flatten(1) - x.flatten(1) @ weight.flatten(1).T).norm()
    assert error < 1e-5
