"""What LoRA formats cannot hold, and what stands in their way, is said before anything is written."""

import copy
import json
import re
from dataclasses import replace

import peft
import pytest
import torch
from lora_files import SD15, WRITTEN, assert_equal_products, mixed, path_of, random_factors
from safetensors.torch import load_file, save_file
from sd_files import sd_config
from torch import nn

from xdiffusion.build import build_model
from xdiffusion.checkpoints.component_names import exchange_name
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.checkpoints.lora_formats import LayerTable, read_lora, write_lora
from xdiffusion.checkpoints.reading import load_safetensors
from xdiffusion.commands import lora_add
from xdiffusion.commands.base_weights import fold, open_base
from xdiffusion.lora import (
    LoRAError,
    apply_lora_to_model,
    load_lora_weights,
    save_lora_weights,
    set_lora_enabled,
)
from xdiffusion.lora.merge import merge_loras


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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alora_invocation_tokens", [5, 6]),
        ("use_bdlora", {"nblocks": 2, "target_modules_bd_a": ["to_q"]}),
        ("kasa_config", {"beta": 1e-4}),
        ("use_qalora", True),
        ("arrow_config", {"top_k": 3}),
        ("layer_replication", [[0, 1], [0, 1]]),
    ],
)
def test_options_of_peft_that_make_another_update_are_refused(field, value, tmp_path):
    """In a folder's config and in diffusers' header; what stands there for "not used" is none."""
    folder, path = tmp_path / "peft", tmp_path / "a.safetensors"
    write_lora(replace(mixed(), tokens={}), folder, "peft")
    write_lora(replace(mixed(), tokens={}), path, "diffusers")
    config, (tensors, header) = folder / "unet/adapter_config.json", load_safetensors(path)
    plain, fields = json.loads(config.read_text()), json.loads(header["lora_adapter_metadata"])
    for off in (None, False):
        config.write_text(json.dumps(plain | {field: off}))
        assert_equal_products(read_lora(folder), mixed())
    config.write_text(json.dumps(plain | {field: value}))
    said = json.dumps(fields | {f"unet.{field}": value})
    save_file(dict(tensors), tmp_path / "b.safetensors", header | {"lora_adapter_metadata": said})
    for name in ("peft", "b.safetensors"):
        with pytest.raises(
            CheckpointError, match=rf"{name}.* has {field}={re.escape(repr(value))}: .*, which is not read here"
        ):
            read_lora(tmp_path / name)


def test_peft_s_convolutions_with_groups_are_called_so(tmp_path):
    """Its A reaches over all inputs and its B is in groups; ours are the other way round."""
    model = nn.ModuleDict({"conv": nn.Conv2d(8, 16, 3, groups=2)})
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["conv"])).save_pretrained(tmp_path / "peft")
    with pytest.raises(CheckpointError, match=r"no common rank: .*, as peft's of a convolution with 2 groups"):
        read_lora(tmp_path / "peft")


@pytest.mark.parametrize("others", [{}, {"mid_block.resnets.0.conv1": (4, 4, 3, 3)}], ids=["alone", "beside a UNet's"])
def test_layers_that_cloneofsimo_does_not_count(others, tmp_path):
    """Layers of the table that belong to neither component: a DiT's, or those of an XL beside the UNet's blocks."""
    shapes = {"add_embedding.linear_1": (4, 4), **others}
    table = LayerTable((exchange_name(name), shape) for name, shape in shapes.items())
    lora = LoRAFile({name: random_factors(exchange_name(name), 2, 1.0, table) for name in shapes})
    with pytest.raises(CheckpointError, match=r"no place for add_embedding\.linear_1"):
        write_lora(lora, path_of("cloneofsimo", tmp_path), "cloneofsimo", table)
    assert list(tmp_path.iterdir()) == []
    write_lora(lora, path_of("positional", tmp_path), "positional", table)  # has a place for every layer
    assert len(read_lora(path_of("positional", tmp_path), table).modules) == len(shapes)


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


@pytest.mark.parametrize(
    ("format", "name"),
    [
        *[("kohya", "a.pt"), ("native", "a.ckpt"), ("diffusers", "a.bin"), ("cloneofsimo-pt", "a.safetensors")],
        ("peft", "a.safetensors"),
    ],
)
def test_an_ending_that_is_another_kind_of_file_s_is_refused(format, name, tmp_path):
    with pytest.raises(CheckpointError, match=rf"{name}: the format {format} is (written as \.|a folder)"):
        write_lora(replace(mixed(), tokens={}), tmp_path / name, format, SD15)
    assert list(tmp_path.iterdir()) == []


ALIKE = ("encoder.layers.0.mlp.fc1", "layers.0.mlp.fc1")  # of which transformers knows one


def add_layer(model, name):
    *places, last = name.split(".")
    for place in places:
        if not hasattr(model, place):
            model.add_module(place, nn.Module())
        model = getattr(model, place)
    model.add_module(last, nn.Linear(4, 4))


def test_two_names_that_other_formats_have_once_stay_two_in_ours_and_peft_s(tmp_path):
    lora = LoRAFile({name: LoRAFactors(torch.randn(1, 4), torch.randn(4, 1), 1.0) for name in ALIKE})
    assert len({exchange_name(name) for name in ALIKE}) == 1
    write_lora(lora, tmp_path / "ours.safetensors", "native")
    model = nn.Module()
    for name in ALIKE:
        add_layer(model, name)
    report = load_lora_weights(model, tmp_path / "ours.safetensors")
    assert sorted(report.matched) == sorted(ALIKE)
    for name in ALIKE:
        torch.testing.assert_close(model.get_submodule(name).delta("default"), lora.modules[name].delta())
    with pytest.raises(CheckpointError, match="has one name for two of the 2 modules"):
        write_lora(lora, tmp_path / "theirs.safetensors", "kohya")
    write_lora(lora, tmp_path / "theirs", "peft")  # in which a model of its own has its own names
    assert_equal_products(read_lora(tmp_path / "theirs"), lora)


@pytest.mark.parametrize("alpha", ["nan", "inf"])
def test_a_weight_that_is_no_number_is_refused(alpha, capsys):
    with pytest.raises(SystemExit):
        lora_add.parse(["a.safetensors", "b.safetensors", "out.safetensors", alpha])
    assert f"ALPHA must be a finite number, not {alpha}" in capsys.readouterr().err
    with pytest.raises(LoRAError, match=f"weights of a merge must be finite numbers, not {alpha}, 1.0"):
        merge_loras([(mixed(), float(alpha)), (mixed(), 1.0)], "concat")


def base_file_of_a_layer(folder):
    save_file({"network.conv.weight": torch.randn(4, 4)}, folder / "base.safetensors", {"format": "xdiffusion-model"})
    return open_base(folder / "base.safetensors")


def dora(**changes):
    factors = LoRAFactors(torch.randn(1, 4), torch.zeros(4, 1), 1.0, magnitude=torch.full((4,), 2.0))
    return LoRAFile({"network.conv": replace(factors, **changes)})


def test_a_second_file_of_other_layers_does_not_join_the_first_under_one_name(tmp_path):
    """Its report would be of half of what the adapter changes, and its scale of half of it too."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    for name in model:
        lora = LoRAFile({name: LoRAFactors(torch.ones(1, 3), torch.ones(3, 1), 1.0)})
        write_lora(lora, tmp_path / f"{name}.safetensors", "native")
    load_lora_weights(model, tmp_path / "a.safetensors", scale=0.5)
    with pytest.raises(LoRAError, match="a has an adapter named 'default' already: take it away with remove_lora"):
        load_lora_weights(model, tmp_path / "b.safetensors", scale=2.0)
    assert type(model["b"]) is nn.Linear
    load_lora_weights(model, tmp_path / "b.safetensors", scale=2.0, adapter_name="second")


def test_a_load_into_a_fresh_adapter_that_is_off_turns_it_on(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(3, 3)})
    x = torch.ones(1, 3)
    before = model["a"](x)
    lora = LoRAFile({"a": LoRAFactors(torch.ones(1, 3), torch.ones(3, 1), 1.0)})
    write_lora(lora, tmp_path / "a.safetensors", "native")
    apply_lora_to_model(model, target_modules=["a"], rank=1, alpha=1.0)
    set_lora_enabled(model, False)
    load_lora_weights(model, tmp_path / "a.safetensors")
    torch.testing.assert_close(model["a"](x), before + 3)


def test_a_magnitude_is_folded_in_and_seen_to_be_finite(tmp_path):
    base, output = base_file_of_a_layer(tmp_path), tmp_path / "out.safetensors"
    with pytest.raises(LoRAError, match=r"the factors of unet\.conv are not finite"):
        fold(base, dora(magnitude=torch.full((4,), float("nan"))), 1.0, output, {})
    with pytest.raises(CheckpointError, match=r"out.ckpt: the result is a .safetensors file"):
        fold(base, dora(), 1.0, tmp_path / "out.ckpt", {})
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]
    assert fold(base, dora(), 1.0, output, {}) == 1
    norms = load_file(output)["network.conv.weight"].norm(dim=1)
    torch.testing.assert_close(norms, torch.full((4,), 2.0))


@pytest.mark.parametrize("init", ["pissa", "orthogonal"])
def test_a_fresh_adapter_of_another_init_takes_a_file_in(init, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    saved = apply_lora_to_model(copy.deepcopy(model), 2, 2.0, target_modules="all")
    with torch.no_grad():
        saved[0].lora_B["default"].normal_()
    save_lora_weights(saved, tmp_path / "lora.safetensors")
    target = apply_lora_to_model(model, 2, 2.0, target_modules="all", init=init)
    load_lora_weights(target, tmp_path / "lora.safetensors")
    torch.testing.assert_close(target(torch.ones(8)), saved(torch.ones(8)))
