"""LoRA files beside diffusers and peft: what we write they load to our outputs, and what they write we read."""

import copy
import re
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from xdiffusion.checkpoints.diffusers import unet_from_diffusers
from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.checkpoints.lora_formats import LayerTable, read_lora, sd_layer_table, write_lora
from xdiffusion.checkpoints.reading import load_safetensors
from xdiffusion.checkpoints.writing import save_safetensors
from xdiffusion.lora import load_lora_weights
from xdiffusion.networks.unet import UNet

SIZES = {"cross_attention_dim": 32, "attention_head_dim": 2, "norm_num_groups": 8, "layers_per_block": 1}


def tiny_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        sample_size=8,
        **SIZES,
    ).eval()


def tiny_text_encoder():
    torch.manual_seed(1)
    config = CLIPTextConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return CLIPTextModel(config).eval()


def pipeline():
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=8)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=tiny_text_encoder(), tokenizer=None, unet=tiny_unet(), scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def parts(pipe):
    return nn.ModuleDict({"unet": pipe.unet, "text_encoder": pipe.text_encoder})


@torch.no_grad()
def outputs(unet, text_encoder):
    generator = torch.Generator().manual_seed(3)
    xt, time = torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([500.0])
    context = text_encoder(torch.arange(7)[None]).last_hidden_state
    return unet(xt, time, context).sample


MAPPING = {"^encoder": "text_model.encoder"}  # as the writer's docstring says
ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0", ".q_proj", ".k_proj", ".v_proj", ".out_proj")


def random_lora(table, targets, alphas=(1.0, 3.0, 0.5, 7.0), ranks=(2, 3, 4), **fields):
    generator = torch.Generator().manual_seed(4)
    modules = {}
    for i, name in enumerate(n for n in table if n.endswith(targets)):
        rank, (out_size, *inner) = ranks[i % len(ranks)], table[name]
        lora_A = torch.randn(rank, *inner, generator=generator) / 4
        lora_B = torch.randn(out_size, rank, *[1] * (len(inner) - 1), generator=generator) / 4
        modules[name] = LoRAFactors(lora_A, lora_B, alphas[i % len(alphas)], **fields)
    return LoRAFile(modules)


def with_magnitudes(lora):
    """DoRA: a magnitude for each output."""
    torch.manual_seed(6)
    modules = {name: replace(f, magnitude=1 + torch.rand(f.lora_B.shape[0])) for name, f in lora.modules.items()}
    return replace(lora, modules=modules)


def assert_diffusers_gives_our_outputs(lora, format, folder, respelled=str):
    pipe, ours = pipeline(), pipeline()
    base = outputs(pipe.unet, pipe.text_encoder)
    write_lora(lora, folder / "lora.safetensors", format, LayerTable.of(parts(pipe)))
    tensors, header = load_safetensors(folder / "lora.safetensors")
    save_safetensors(folder / "lora.safetensors", {respelled(key): tensor for key, tensor in tensors.items()}, header)
    pipe.load_lora_weights(str(folder), weight_name="lora.safetensors")
    load_lora_weights(parts(ours), folder / "lora.safetensors")
    expected = outputs(ours.unet, ours.text_encoder)
    assert (expected - base).abs().max() > 0.1 * base.abs().max()
    torch.testing.assert_close(outputs(pipe.unet, pipe.text_encoder), expected, rtol=1e-4, atol=1e-5)


TABLE = LayerTable.of(nn.ModuleDict({"unet": tiny_unet(), "text_encoder": tiny_text_encoder()}))
EVERYWHERE = (*ATTENTION, ".conv1", ".proj_in", ".ff.net.0.proj", ".ff.net.2", ".conv_shortcut", ".time_emb_proj")


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("format", ["diffusers", "diffusers-sd15"])
def test_diffusers_loads_our_files(format, rslora, tmp_path):
    # the script style has no alphas, and diffusers before 0.40 took one layer's rank for the alpha of all
    ranks = (3,) if format == "diffusers-sd15" and Version(diffusers.__version__) < Version("0.40") else (2, 3, 4)
    everywhere = random_lora(TABLE.part("unet"), EVERYWHERE, ranks=ranks)
    assert_diffusers_gives_our_outputs(random_lora(TABLE, ATTENTION, ranks=ranks, use_rslora=rslora), format, tmp_path)
    assert_diffusers_gives_our_outputs(everywhere, format, tmp_path)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_diffusers_loads_our_dora(component, tmp_path):
    """A component at a time: transformers, which reads the text encoder's, leaves a magnitude of another key aside."""
    lora = with_magnitudes(random_lora(TABLE.part(component), EVERYWHERE))
    assert_diffusers_gives_our_outputs(lora, "diffusers", tmp_path)


def test_dora_of_before_its_keys_ended_in_weight_is_read(tmp_path):
    lora, path = with_magnitudes(random_lora(TABLE, ATTENTION)), tmp_path / "lora.safetensors"
    write_lora(lora, path, "diffusers", TABLE)
    tensors, header = load_safetensors(path)
    old = {key.replace("_vector.weight", "_vector"): tensor for key, tensor in tensors.items()}
    assert old.keys() != tensors.keys()
    save_safetensors(path, old, header)
    read = read_lora(path, TABLE)
    assert read.modules.keys() == lora.modules.keys()
    assert all(torch.equal(f.magnitude, lora.modules[name].magnitude) for name, f in read.modules.items())


def test_we_load_what_the_scripts_of_diffusers_0_18_to_0_21_wrote(tmp_path):
    """`train_dreambooth_lora.py --train_text_encoder`: processors of the UNet, layers of the text encoder."""

    def respelled(key):
        return re.sub(r"^(unet\..+)\.(to_[qkv]|to_out)(?:\.0)?\.lora\.", r"\1.processor.\2_lora.", key)

    lora = random_lora(TABLE, ATTENTION, ranks=(3,))
    assert_diffusers_gives_our_outputs(lora, "diffusers-sd15", tmp_path, respelled)
    read = read_lora(tmp_path / "lora.safetensors", TABLE)
    assert (read.format, read.modules.keys(), read.repairs) == ("diffusers-processors", lora.modules.keys(), ())


def test_diffusers_loads_our_kohya_files(tmp_path):
    """One alpha and several ranks: diffusers applies several alphas wrongly, whoever wrote them, though it reads them."""
    assert_diffusers_gives_our_outputs(random_lora(TABLE, ATTENTION, alphas=[3.0]), "kohya", tmp_path)
    assert_diffusers_gives_our_outputs(random_lora(TABLE.part("unet"), EVERYWHERE, alphas=[0.5]), "kohya", tmp_path)

    lora = random_lora(TABLE, EVERYWHERE)
    write_lora(lora, tmp_path / "lora.safetensors", "kohya", TABLE)
    weights, alphas = StableDiffusionPipeline.lora_state_dict(str(tmp_path), weight_name="lora.safetensors")
    assert len(weights) == 2 * len(lora.modules)
    assert sorted(alphas.values()) == sorted(f.lora_alpha for f in lora.modules.values())


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_peft_loads_our_folder(fields, tmp_path):
    """Both components, whose layers have several ranks and alphas; transformers 4 has other names in the text encoder."""
    ours, theirs = pipeline(), pipeline()
    base = outputs(ours.unet, ours.text_encoder)
    lora = random_lora(TABLE, (*ATTENTION, ".conv1", ".fc1"), use_rslora="use_rslora" in fields)
    if "use_dora" in fields:
        lora = with_magnitudes(lora)
    write_lora(lora, tmp_path / "lora", "peft", TABLE)
    renamed = {"key_mapping": MAPPING} if hasattr(theirs.text_encoder, "text_model") else {}
    unet = PeftModel.from_pretrained(theirs.unet, tmp_path / "lora/unet").eval()
    text = PeftModel.from_pretrained(theirs.text_encoder, tmp_path / "lora/text_encoder", **renamed).eval()
    load_lora_weights(parts(ours), tmp_path / "lora")
    for pair in ((ours.unet, tiny_text_encoder()), (tiny_unet(), ours.text_encoder)):
        assert (outputs(*pair) - base).abs().max() > 0.01 * base.abs().max()
    torch.testing.assert_close(outputs(unet, text), outputs(ours.unet, ours.text_encoder), rtol=1e-4, atol=1e-5)


class TextEncoderOfTransformers4(nn.Module):
    """Its names, whatever is installed."""

    def __init__(self):
        super().__init__()
        model = tiny_text_encoder()
        self.text_model = getattr(model, "text_model", model)

    def forward(self, tokens):
        return self.text_model(tokens)


def test_pefts_folder_in_transformers_4(tmp_path):
    """By the mapping of keys that the writer's docstring names."""
    lora = random_lora(TABLE.part("text_encoder"), ATTENTION)
    write_lora(lora, tmp_path / "lora", "peft", TABLE)
    ours = nn.ModuleDict({"text_encoder": tiny_text_encoder()})
    load_lora_weights(ours, tmp_path / "lora")
    theirs = PeftModel.from_pretrained(TextEncoderOfTransformers4(), tmp_path / "lora/text_encoder", key_mapping=MAPPING)
    expected = outputs(tiny_unet(), ours["text_encoder"])
    torch.testing.assert_close(outputs(tiny_unet(), theirs.eval()), expected, rtol=1e-4, atol=1e-5)


def test_folders_of_peft_with_either_name_of_the_text_encoder_are_read(tmp_path):
    lora = random_lora(TABLE.part("text_encoder"), ATTENTION)
    write_lora(lora, tmp_path / "lora", "peft", TABLE)
    weights, config = (tmp_path / "lora/text_encoder" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    tensors, header = load_safetensors(weights)
    of_version_4 = {key.replace(".encoder.", ".text_model.encoder."): tensor for key, tensor in tensors.items()}
    assert not of_version_4.keys() & tensors.keys()
    for content, patterns in (
        (tensors, config.read_text()),
        (of_version_4, config.read_text().replace('"encoder.', '"text_model.encoder.')),
    ):
        save_safetensors(weights, content, header)
        config.write_text(patterns)
        read = read_lora(tmp_path / "lora", TABLE)
        assert {n: f.scaling for n, f in read.modules.items()} == {n: f.scaling for n, f in lora.modules.items()}


def peft_on(model, targets, **fields):
    config = LoraConfig(
        r=4, lora_alpha=3, target_modules=targets, rank_pattern={"to_q": 2}, alpha_pattern={"to_k": 5}, **fields
    )
    theirs = get_peft_model(model, config)
    random_b(theirs)
    return theirs.eval()


def random_b(model):
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
        elif "magnitude" in name:
            parameter.data.mul_(1.2)


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_we_load_pefts_folder(fields, tmp_path):
    ours, text = tiny_unet(), tiny_text_encoder()
    theirs = peft_on(tiny_unet(), ["to_q", "to_k", "conv1"], **fields)
    theirs.save_pretrained(tmp_path / "lora")
    report = load_lora_weights(ours, tmp_path / "lora")
    assert (report.format, report.repairs) == ("peft", ())
    torch.testing.assert_close(outputs(ours, text), outputs(theirs, text), rtol=1e-4, atol=1e-5)


def test_we_load_what_diffusers_saves(tmp_path):
    """With the adapter's config in the header, as its training scripts write it."""
    theirs = tiny_unet()
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=3, target_modules=["to_q", "to_out.0"], alpha_pattern={"to_q": 5}))
    random_b(theirs)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(theirs),
        unet_lora_adapter_metadata=theirs.peft_config["default"].to_dict(),
    )
    path, text = tmp_path / "pytorch_lora_weights.safetensors", tiny_text_encoder()
    ours = tiny_unet()
    load_lora_weights(ours, path)
    torch.testing.assert_close(outputs(ours, text), outputs(theirs, text), rtol=1e-4, atol=1e-5)


def test_a_diffusers_unet_and_ours_take_one_file_alike(tmp_path):
    theirs = tiny_unet()
    ours = UNet(
        in_channels=4, context_dim=32, channels=(16, 32), transformer_depth=(1, 0), num_res_blocks=1, num_heads=2,
        projection="conv", time_conditioning="add", norm_groups=8,
    )  # fmt: skip
    ours.load_state_dict(unet_from_diffusers(theirs.state_dict()))
    base = copy.deepcopy(ours)
    table = LayerTable.of(theirs)
    write_lora(random_lora(table, (*ATTENTION, ".conv1", ".ff.net.2")), tmp_path / "lora.safetensors", "kohya", table)
    for model in (theirs, ours):
        load_lora_weights(model, tmp_path / "lora.safetensors")
    xt, time, context = torch.randn(1, 4, 8, 8), torch.tensor([10.0]), torch.randn(1, 5, 32)
    with torch.no_grad():
        expected = theirs(xt, time, context).sample
        torch.testing.assert_close(ours(xt, time, context), expected, rtol=1e-4, atol=1e-5)
        assert (base(xt, time, context) - expected).abs().max() > 0.01


@pytest.mark.parametrize(
    ("base", "unet", "text"),
    [
        ("sd15", {"cross_attention_dim": 768}, {"hidden_size": 768, "num_hidden_layers": 12}),
        (
            "sd21",
            {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
            {"hidden_size": 1024, "num_hidden_layers": 23},
        ),
    ],
)
def test_the_tables_are_diffusers_and_transformers_own(base, unet, text):
    """Names, shapes and order of the published sizes, on the meta device."""
    with torch.device("meta"):
        width = text["hidden_size"]
        encoder = CLIPTextModel(CLIPTextConfig(intermediate_size=4 * width, num_attention_heads=8, **text))
        model = nn.ModuleDict({"unet": UNet2DConditionModel(**unet), "text_encoder": encoder})
    assert list(LayerTable.of(model).items()) == list(sd_layer_table(base).items())


def test_what_peft_and_diffusers_wrote_goes_through_our_formats(tmp_path):
    theirs = peft_on(tiny_unet(), ["to_q", "to_k", "conv1"])
    theirs.save_pretrained(tmp_path / "lora")
    table = LayerTable.of(tiny_unet())
    source = read_lora(tmp_path / "lora", table)
    for format in ("native", "kohya", "diffusers", "diffusers-sd15", "cloneofsimo", "positional"):
        path = tmp_path / (format + (".pt" if format == "positional" else ".safetensors"))
        write_lora(source, path, format, table)
        back = read_lora(path, table)
        for name, factors in source.modules.items():
            torch.testing.assert_close(back.modules[name].delta(), factors.delta())
