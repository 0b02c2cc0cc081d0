"""LoRAs of models whose layers have some of the names of Stable Diffusion's: to peft and back, and onto the wrong model."""

import copy

import peft
import pytest
import torch
import transformers
from lora_cases import command
from safetensors.torch import load_file, save_file
from torch import nn

from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.checkpoints.lora_formats import read_lora, write_lora
from xdiffusion.lora import LoRAError, apply_lora_to_model, load_lora_weights, save_lora_weights

TEXT = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
IDS = torch.arange(5)[None]
PIXELS = torch.linspace(-1, 1, 3 * 64).view(1, 3, 8, 8)
SEEN = {k: v for k, v in TEXT.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 4}


def llama():
    return transformers.LlamaModel(transformers.LlamaConfig(**TEXT, **TOKENS))


def phi():
    return transformers.Phi3Model(transformers.Phi3Config(**TEXT, **TOKENS))


def bart():
    sizes = {f"{part}_{size}": n for part in ("encoder", "decoder") for size, n in (("layers", 1), ("ffn_dim", 24))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return transformers.BartModel(transformers.BartConfig(vocab_size=20, d_model=16, **sizes, **heads, **TOKENS))


def vit():
    return transformers.ViTModel(transformers.ViTConfig(**SEEN))


def clip():
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT | TOKENS, vision_config=SEEN, projection_dim=8))


def clip_text():
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, **TOKENS))


class Net(nn.Module):
    """Parts of a pipeline in the names of another model's."""

    def __init__(self):
        super().__init__()
        self.text_encoder = nn.ModuleDict({"to_q": nn.Linear(6, 6)})
        self.head = nn.Linear(6, 6)

    def forward(self, x):
        return (self.head(self.text_encoder["to_q"](x)),)


MODELS = {
    "Llama": (llama, ["q_proj", "v_proj", "down_proj"], {"input_ids": IDS}),
    "Llama's attention": (llama, ["q_proj", "v_proj"], {"input_ids": IDS}),
    "Bart": (bart, ["q_proj", "fc1"], {"input_ids": IDS}),
    "ViT": (vit, ["fc1", "fc2"], {"pixel_values": PIXELS}),
    "CLIP": (clip, ["q_proj", "fc1"], {"input_ids": IDS, "pixel_values": PIXELS}),
    "CLIP's text encoder alone": (clip_text, ["q_proj", "fc1"], {"input_ids": IDS}),
    "parts of other models": (Net, "all", {"x": torch.ones(1, 6)}),
}
every_model = pytest.mark.parametrize(("make", "targets", "inputs"), MODELS.values(), ids=MODELS)


@torch.no_grad()
def output(model, inputs):
    return model.eval()(**inputs)[0]


def adapted(base, targets):
    model = apply_lora_to_model(copy.deepcopy(base), target_modules=targets)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@every_model
def test_peft_loads_the_folder_of_an_ordinary_model_onto_it(make, targets, inputs, tmp_path):
    """The folder itself, with the model's own names, as peft would have written it; once more through a second folder."""
    torch.manual_seed(0)
    base = make()
    with torch.no_grad():
        for module in base.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(10)  # so that attention looks somewhere
    ours = adapted(base, targets)
    expected = output(ours, inputs)
    assert (expected - output(base, inputs)).abs().max() > 1e-3
    save_lora_weights(ours, tmp_path / "a.safetensors")
    assert command(f"lora convert {tmp_path}/a.safetensors {tmp_path}/first --to peft") == 0
    assert command(f"lora convert {tmp_path}/first {tmp_path}/second --to peft") == 0
    for name in ("first", "second"):
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name)
        torch.testing.assert_close(output(theirs, inputs), expected, rtol=1e-4, atol=1e-5)
        back = copy.deepcopy(base)
        assert load_lora_weights(back, tmp_path / name).left_out == ()
        torch.testing.assert_close(output(back, inputs), expected, rtol=1e-4, atol=1e-5)


def test_the_parts_of_stable_diffusion_xl_stay_folders_of_their_own(tmp_path):
    text = "text_model.encoder.layers.0.self_attn.q_proj"
    names = ("unet.mid_block.resnets.0.time_emb_proj", f"text_encoder.{text}", f"text_encoder_2.{text}")
    lora = LoRAFile({name: LoRAFactors(torch.ones(1, 4), torch.ones(4, 1), 1.0) for name in names})
    write_lora(lora, tmp_path / "xl", "peft")
    assert sorted(str(path.parent.relative_to(tmp_path / "xl")) for path in tmp_path.rglob("adapter_config.json")) == [
        ".",
        "text_encoder",
        "unet",
    ]
    assert sorted(read_lora(tmp_path / "xl").modules) == sorted(names)


def test_a_file_of_another_model_is_not_loaded_in_part(tmp_path):
    """Phi's attention is one layer: Llama's projections, which are named as a text encoder's, have no place."""
    save_lora_weights(adapted(llama(), MODELS["Llama"][1]), tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    respelled = {f"{name}.weight": tensor for name, tensor in tensors.items()}
    save_file(respelled, tmp_path / "state.safetensors")  # as peft's get_peft_model_state_dict names an injected adapter's
    for name in ("a", "state"):
        model = phi()
        before = set(model.state_dict())
        with pytest.raises(LoRAError, match=r"4 of its 6 modules are not there, such as layers\.0\.self"):
            load_lora_weights(model, tmp_path / f"{name}.safetensors")
        assert set(model.state_dict()) == before
        assert len(load_lora_weights(llama(), tmp_path / f"{name}.safetensors").matched) == 6


def test_a_component_that_a_file_of_another_model_names_is_left_out(tmp_path):
    names = ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "head")
    lora = LoRAFile({name: LoRAFactors(torch.ones(1, 4), torch.ones(4, 1), 1.0) for name in names})
    write_lora(lora, tmp_path / "a.safetensors", "native")
    report = load_lora_weights(nn.ModuleDict({"head": nn.Linear(4, 4)}), tmp_path / "a.safetensors")
    assert (report.matched, report.left_out) == (["head"], ("1 modules of the text_encoder",))
