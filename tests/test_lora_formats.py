"""Every LoRA format to every other: products are equal, alphas survive, and what a format cannot hold is said."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lora_files import (
    ATTENTION,
    BLOCK,
    SD15,
    TEXT,
    WRITTEN,
    assert_equal_products,
    converted,
    mixed,
    path_of,
    random_factors,
)
from safetensors.torch import save
from torch import nn

from xdiffusion.checkpoints.component_names import exchange_name
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.checkpoints.lora_formats import FORMATS, LayerTable, read_lora, sd_layer_table, write_lora
from xdiffusion.checkpoints.lora_formats.layer_table import in_old_diffusers_order
from xdiffusion.checkpoints.reading import load_safetensors
from xdiffusion.checkpoints.writing import save_safetensors
from xdiffusion.lora import LoRAError, load_lora_weights
from xdiffusion.lora.inject import lora_layers
from xdiffusion.networks.unet import UNet
from xdiffusion.text_encoders.clip import CLIPTextEncoder

REAL = Path(__file__).resolve().parents[2] / "shared/data/lora"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", WRITTEN)
def test_every_format_to_every_other(first, dtype, tmp_path):
    source = mixed(dtype, flat=dtype == torch.bfloat16)
    once = converted(source, first, tmp_path)
    assert once.format == first
    assert_equal_products(once, source)
    for second in WRITTEN:
        twice = converted(once, second, tmp_path)
        assert twice.format == second
        assert_equal_products(twice, source)
        assert twice.tokens.keys() == source.tokens.keys()
        assert torch.equal(twice.tokens["<s1>"], source.tokens["<s1>"])


@pytest.mark.parametrize("format", ["native", "kohya", "diffusers", "peft"])
def test_alphas_and_types_stay_where_the_format_has_them(format, tmp_path):
    source = mixed(torch.float16)
    back = converted(source, format, tmp_path)
    for name, factors in source.modules.items():
        assert back.modules[name].rank == factors.rank
        assert back.modules[name].scaling == pytest.approx(factors.scaling, rel=1e-7)
        assert torch.equal(back.modules[name].lora_A, factors.lora_A)
        assert torch.equal(back.modules[name].lora_B, factors.lora_B)


@pytest.mark.parametrize("format", ["native", "kohya", "cloneofsimo"])
def test_a_lora_that_is_written_again_is_the_same_file_to_the_byte(format, tmp_path):
    """safetensors writes what a header says in another order each time."""
    title = 'A "猫" \\ \x01\x1f\x7f\b\f\n\r\t\u2028 ü'
    source = replace(mixed(), metadata={"modelspec.title": title, **{f"ss_{i}": str(i) for i in range(8)}})
    path, contents = tmp_path / "a.safetensors", set()
    for _ in range(4):
        write_lora(source, path, format)
        contents.add(path.read_bytes())
    (content,) = contents
    length = int.from_bytes(content[:8], "little")
    said = load_safetensors(path)[1]
    assert length % 8 == 0 and list(json.loads(content[8 : 8 + length])["__metadata__"]) == sorted(said)
    assert format == "cloneofsimo" or said["modelspec.title"] == title
    assert_equal_products(read_lora(path), source)


@pytest.mark.parametrize("format", WRITTEN)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_another_type_gives_what_rounding_gives(format, dtype, tmp_path):
    source = mixed()
    back = converted(source, format, tmp_path, dtype=dtype)
    for name, factors in source.modules.items():
        scale = 1.0 if FORMATS[format].has_alpha else factors.scaling
        expected = (factors.lora_B * scale).to(dtype)
        assert torch.equal(back.modules[name].lora_A.view_as(factors.lora_A), factors.lora_A.to(dtype))
        assert torch.equal(back.modules[name].lora_B.view_as(expected), expected)


def test_a_type_that_is_too_small_is_an_error(tmp_path):
    modules = {"a": LoRAFactors(torch.full((1, 2), 1e6), torch.ones(2, 1), 1.0)}
    with pytest.raises(CheckpointError, match="a factor of a overflows in float16"):
        write_lora(LoRAFile(modules), tmp_path / "a.safetensors", "native", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", WRITTEN)
def test_dora_survives_or_is_refused(format, tmp_path):
    name, conv = f"{ATTENTION}.to_q", "unet.down_blocks.0.resnets.0.conv1"
    source = LoRAFile({n: random_factors(n, 2, 3.0, magnitude=torch.rand(320) + 1) for n in (name, conv)})
    if not FORMATS[format].has_dora:
        with pytest.raises(CheckpointError, match=f"{format} cannot hold DoRA"):
            write_lora(source, path_of(format, tmp_path), format)
        return
    back = converted(source, format, tmp_path)
    for n in (name, conv):
        assert torch.equal(back.modules[n].magnitude, source.modules[n].magnitude)
        assert back.modules[n].scaling == source.modules[n].scaling


def test_peft_has_one_switch_for_dora(tmp_path):
    source = mixed()
    some = source.modules | {f"{ATTENTION}.to_q": random_factors(f"{ATTENTION}.to_q", 2, 1.0, magnitude=torch.ones(320))}
    for format in ("peft", "diffusers"):
        with pytest.raises(CheckpointError, match="1 of 5 have a magnitude"):
            write_lora(replace(source, modules=some), path_of(format, tmp_path), format)


# real files


def real(name):
    if not (REAL / name).is_file():
        pytest.skip(f"needs ../shared/data/lora/{name}, which is not here")
    return read_lora(REAL / name)


@pytest.mark.parametrize("format", WRITTEN)
@pytest.mark.parametrize("name", ["cloneofsimo_disney_rank1.safetensors", "diffusers_attnprocs_rank4.safetensors"])
def test_real_files_there_and_back(name, format, tmp_path):
    source = real(name)
    back = converted(source, format, tmp_path)
    assert_equal_products(back, source)
    assert_equal_products(converted(back, "native", tmp_path), source)
    assert back.tokens.keys() == source.tokens.keys()


def test_real_files_are_whole():
    lora = real("cloneofsimo_disney_rank1.safetensors")
    count = [sum(name.startswith(part) for name in lora.modules) for part in ("unet.", "text_encoder.")]
    assert (lora.format, count, list(lora.tokens), lora.repairs) == ("cloneofsimo", [144, 48], ["<s1>", "<s2>"], ())
    lora = real("diffusers_attnprocs_rank4.safetensors")
    assert (lora.format, len(lora.modules), lora.repairs) == ("diffusers-processors", 128, ())
    assert all(SD15[n] == tuple(f.delta().shape) for n, f in lora.modules.items())


# headers


def test_what_a1111_needs_is_in_kohyas_header(tmp_path):
    source = LoRAFile({n: random_factors(n, 4, 2.0) for n in list(SD15)[3:40]}, metadata={"ss_tag_frequency": "{}"}, step=9)
    path = tmp_path / "style.safetensors"
    write_lora(source, path, "kohya")
    tensors, header = load_safetensors(path)
    assert "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight" in tensors
    hashes = {key: header.pop(key) for key in ("sshs_model_hash", "sshs_legacy_hash")}
    assert header == {
        "ss_base_model_version": "sd_v1", "ss_v2": "False", "ss_network_module": "networks.lora", "ss_network_dim": "4",
        "ss_network_alpha": "2.0", "ss_network_args": "{}", "ss_output_name": "style", "ss_steps": "9",
        "ss_tag_frequency": "{}",
    }  # fmt: skip
    content = save(tensors, header)  # kohya: the file with the ss_ entries alone
    start = 8 + int.from_bytes(content[:8], "little")
    assert hashes["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()
    assert hashes["sshs_legacy_hash"] == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]

    write_lora(mixed(), path, "kohya")
    header = load_safetensors(path)[1]
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("Dynamic", "Dynamic")


def test_diffusers_gets_a_header_only_where_scaling_is_not_1(tmp_path):
    name = f"{ATTENTION}.to_q"
    for alpha, keys in ((2.0, {"format"}), (1.0, {"format", "lora_adapter_metadata"})):
        write_lora(LoRAFile({name: random_factors(name, 2, alpha)}), tmp_path / "a.safetensors", "diffusers")
        assert load_safetensors(tmp_path / "a.safetensors")[1].keys() == keys
    dora = LoRAFile({name: random_factors(name, 2, 2.0, magnitude=torch.ones(320))})  # nor where it is no plain LoRA
    write_lora(dora, tmp_path / "a.safetensors", "diffusers")
    fields = json.loads(load_safetensors(tmp_path / "a.safetensors")[1]["lora_adapter_metadata"])
    assert (fields["unet.use_dora"], fields["unet.lora_alpha"]) == (True, 2.0)


def test_a_component_that_the_header_leaves_out_has_a_scaling_of_1(tmp_path):
    """Its alpha is its rank, as in a file without a header."""
    names = f"{ATTENTION}.to_q", f"{TEXT}.self_attn.q_proj"
    path = tmp_path / "a.safetensors"
    write_lora(LoRAFile({name: random_factors(name, 2, 6.0) for name in names}), path, "diffusers")
    tensors, header = load_safetensors(path)
    of_unet = {key: v for key, v in json.loads(header["lora_adapter_metadata"]).items() if key.startswith("unet.")}
    save_safetensors(path, tensors, {"lora_adapter_metadata": json.dumps(of_unet)})
    assert [read_lora(path).modules[name].scaling for name in names] == [3.0, 1.0]


def test_the_sd15_dialect(tmp_path):
    write_lora(mixed(), tmp_path / "a.safetensors", "diffusers-sd15")
    keys = load_safetensors(tmp_path / "a.safetensors")[0].keys()
    assert f"{ATTENTION}.to_out.0.lora.up.weight" in keys
    assert f"{BLOCK}.proj_in.lora.down.weight" in keys
    assert f"{TEXT}.self_attn.q_proj.lora_linear_layer.down.weight" in keys


def test_the_scripts_own_mixture_is_read(tmp_path):
    """Attention in the SD 1.5 dialect, the rest in PEFT's: that is what the scripts left behind."""
    factors = mixed().modules[f"{BLOCK}.proj_in"], mixed().modules[f"{ATTENTION}.to_q"]
    names = f"unet.{BLOCK[5:]}.proj_in.lora_{{}}.weight", f"unet.{ATTENTION[5:]}.to_q.lora.{{}}.weight"
    tensors = {names[0].format(x): t for x, t in zip("AB", (factors[0].lora_A, factors[0].lora_B))}
    tensors |= {names[1].format(x): t for x, t in zip(("down", "up"), (factors[1].lora_A, factors[1].lora_B))}
    save_safetensors(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    lora = read_lora(tmp_path / "a.safetensors")
    assert (lora.format, len(lora.modules), lora.repairs) == ("diffusers-sd15", 2, ())
    assert torch.equal(lora.modules[f"{BLOCK}.proj_in"].lora_A, factors[0].lora_A)


# tables of layers


@pytest.mark.parametrize(
    ("base", "projection", "context_dim", "heads"),
    [("sd15", "conv", 768, {"num_heads": 8}), ("sd21", "linear", 1024, {"head_dim": 64})],
)
def test_the_tables_hold_our_own_models_layers(base, projection, context_dim, heads):
    with torch.device("meta"):
        unet = UNet(
            in_channels=4, context_dim=context_dim, channels=(320, 640, 1280, 1280), transformer_depth=(1, 1, 1, 0),
            projection=projection, time_conditioning="add", **heads,
        )  # fmt: skip
        text = CLIPTextEncoder(width=context_dim, layers=12 if base == "sd15" else 23, heads=8)
        model = nn.ModuleDict({"network": unet, "text_encoder": text})
    ours = LayerTable.of(model)
    assert ours.pop("text_encoder.text_projection")  # the Stable Diffusions have none
    assert ours == sd_layer_table(base)
    assert in_old_diffusers_order(ours) == in_old_diffusers_order(sd_layer_table(base))


def test_exchange_names():
    for name in SD15:
        assert exchange_name(name) == name
        assert exchange_name(name.partition(".")[2]) == name  # a component alone
    assert exchange_name("network.mid_block.attentions.0.transformer_blocks.0.ff.proj_in") == (
        "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
    )
    assert exchange_name("text_encoder.layers.3.attn.to_v") == "text_encoder.text_model.encoder.layers.3.self_attn.v_proj"
    assert exchange_name("encoder.layers.3.self_attn.v_proj") == exchange_name("text_encoder.layers.3.attn.to_v")
    assert exchange_name("layers.0.linear") == "layers.0.linear"


def test_an_unknown_base():
    with pytest.raises(CheckpointError, match="base 'sdxl' is none of sd15, sd21"):
        sd_layer_table("sdxl")


# lists and folders


def test_the_ancestors_lists_hold_parameters_or_tensors(tmp_path):
    names = LayerTable({"0": (4, 6), "2": (5, 4, 3)})  # a Conv1d is 3-D
    tensors = [torch.randn(4, 2), torch.randn(2, 6), torch.randn(5, 1, 1), torch.randn(1, 4, 3)]
    torch.save([nn.Parameter(tensors[0]), *tensors[1:]], tmp_path / "diffusion-5-lora.pt")
    lora = read_lora(tmp_path / "diffusion-5-lora.pt", names)
    assert (lora.format, list(lora.modules)) == ("positional", ["0", "2"])
    torch.testing.assert_close(lora.modules["0"].delta(), tensors[0] @ tensors[1])
    with pytest.raises(CheckpointError, match="fit no set of layers"):
        read_lora(tmp_path / "diffusion-5-lora.pt")


def test_cloneofsimos_json_is_its_list_in_numbers(tmp_path):
    lora = LoRAFile({name: random_factors(name, 2, 2.0) for name in sd_layer_table("sd15") if ".attn" in name})
    write_lora(lora, tmp_path / "a.pt", "cloneofsimo-pt")
    pairs = torch.load(tmp_path / "a.pt", weights_only=True)
    (tmp_path / "b.json").write_text(json.dumps([factor.tolist() for factor in pairs]))
    read = read_lora(tmp_path / "b.json")
    assert (read.format, len(read.modules)) == ("cloneofsimo-pt", 128)
    assert_equal_products(read, lora)


def test_a_list_that_fits_two_sets_is_not_guessed(tmp_path):
    names = LayerTable({
        **{f"{ATTENTION}.{to}": (8, 8) for to in ("to_q", "to_k", "to_v", "to_out.0")},
        **{f"{TEXT}.self_attn.{to}_proj": (8, 8) for to in ("q", "k", "v", "out")},
    })  # fmt: skip
    torch.save([torch.ones(8, 1), torch.ones(1, 8)] * 4, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="fit several sets"):
        read_lora(tmp_path / "a.pt", names)
    lora = LoRAFile({name: random_factors(name, 1, 1.0, names) for name in list(names)[:4]})
    write_lora(lora, tmp_path / "a.pt", "positional", names)  # more zeros, so that it is read as it was meant
    assert_equal_products(read_lora(tmp_path / "a.pt", names), lora)


def test_a_model_of_ours_through_every_format_but_sds_own(tmp_path):
    """Written with the model's table, loaded into the model: the same weights as before."""
    table = LayerTable.of(tiny_model())
    own = {exchange_name(n): n for n, m in tiny_model().named_modules() if hasattr(m, "weight")}
    wanted = [name for name in table if ".attn" in name or "_attn" in name or name.endswith("conv1")]
    source = LoRAFile({own[name]: random_factors(name, 2, 3.0, table) for name in wanted})
    for format in (name for name in WRITTEN if name != "cloneofsimo-pt"):
        path, target = path_of(format, tmp_path), tiny_model()
        write_lora(source, path, format, table)
        report = load_lora_weights(target, path)
        assert (report.format, len(report.matched), report.left_out) == (format, len(wanted), ())
        for name, layer in lora_layers(target):
            torch.testing.assert_close(layer.delta("default"), source.modules[name].delta())


def tiny_model():
    torch.manual_seed(0)
    unet = UNet(in_channels=1, context_dim=8, channels=(16, 32), transformer_depth=(0, 1), head_dim=16, norm_groups=4)
    return nn.ModuleDict({"network": unet, "text_encoder": CLIPTextEncoder(width=8, layers=1, heads=2)})


def test_a_component_that_the_model_has_not_is_left_out_and_told(tmp_path):
    name, text = "unet.conv_in", f"{TEXT}.self_attn.q_proj"
    source = LoRAFile({n: random_factors(n, 2, 1.0) for n in (name, text)}, tokens={"<s1>": torch.ones(768)})
    write_lora(source, tmp_path / "a.safetensors", "kohya")
    report = load_lora_weights(nn.ModuleDict({"conv_in": nn.Conv2d(4, 320, 3)}), tmp_path / "a.safetensors")
    assert report.matched == ["conv_in"]
    assert report.left_out == ("1 modules of the text_encoder", "1 learned tokens, <s1>")
    assert "left out: 1 modules of the text_encoder" in str(report)
    with pytest.raises(LoRAError, match="2 of its 2 modules are not there"):
        load_lora_weights(nn.Sequential(nn.Linear(2, 2)), tmp_path / "a.safetensors")
    smaller = nn.ModuleDict({"unet": nn.ModuleDict({"conv_out": nn.Conv2d(320, 4, 3)}), "layers": nn.ModuleList()})
    smaller["layers"].append(nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(768, 768)})}))
    with pytest.raises(LoRAError, match=r"1 of its 2 modules are not there, such as unet\.conv_in"):
        load_lora_weights(smaller, tmp_path / "a.safetensors")
