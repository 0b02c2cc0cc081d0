"""LoRA files as A1111, ComfyUI and LyCORIS write them: read to the same updates, or refused by the name of what they are."""

import copy
import json
import re
from dataclasses import replace

import peft
import pytest
import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from lora_files import SD15, TEXT, assert_equal_products, converted, mixed, path_of, random_factors
from safetensors.torch import load_file, save_file
from torch import nn

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.checkpoints.lora_formats import read_lora, write_lora
from xdiffusion.checkpoints.reading import load_safetensors
from xdiffusion.lora import load_lora_weights, merge_lora_weights

LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
IN_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def original_name(name):
    """The rule by which A1111 finds a layer of diffusers in an original file: three slots a level, attention at the second."""
    ends = {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}
    ends |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    if name in ends:
        return ends[name]
    if sampler := re.fullmatch(r"(down|up)_blocks\.(\d)\.(?:down|up)samplers\.0\.conv", name):
        level = int(sampler[2])
        slots = {
            "down": f"input_blocks.{3 + 3 * level}.0.op",
            "up": f"output_blocks.{2 + 3 * level}.{1 + (level > 0)}.conv",
        }
        return slots[sampler[1]]
    way, kind, rest = re.fullmatch(r"(mid_block|(?:down|up)_blocks\.\d)\.(attentions|resnets)\.(\d\..+)", name).groups()
    place, rest = int(rest[0]), rest[2:]
    rest, slot = (rest, 1) if kind == "attentions" else (IN_RESNET[rest], 0)
    if way == "mid_block":
        return f"middle_block.{1 if slot else 2 * place}.{rest}"
    level = int(way[-1])
    block = f"input_blocks.{1 + 3 * level + place}" if way.startswith("down") else f"output_blocks.{3 * level + place}"
    return f"{block}.{slot}.{rest}"


def kohya_tensors(lora, folder):
    converted(lora, "kohya", folder)
    return load_file(path_of("kohya", folder))


def respelled(tensors, spelling):
    """The keys of a file of kohya's with the UNet's layers in another spelling."""
    flat = {f"lora_{name.replace('.', '_')}": spelling(name.removeprefix("unet.")) for name in SD15.part("unet")}
    parts = {key: key.partition(".") for key in tensors}
    return {f"{flat.get(parts[key][0], parts[key][0])}.{parts[key][2]}": tensor for key, tensor in tensors.items()}


SPELLINGS = {
    "original names": lambda name: f"lora_unet_{original_name(name).replace('.', '_')}",
    "ComfyUI": lambda name: f"diffusion_model.{original_name(name)}",
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_original_names_are_read(spelling, tmp_path):
    """Every layer of the UNet by its own, and text encoder layers beside them."""
    names = [*SD15.part("unet"), f"{TEXT}.self_attn.q_proj"]
    lora = LoRAFile({name: random_factors(name, 1, 0.5) for name in names})
    tensors = kohya_tensors(lora, tmp_path)
    theirs = respelled(tensors, spelling)
    assert len(theirs.keys() - tensors.keys()) == 3 * len(SD15.part("unet"))
    save_file(theirs, tmp_path / "theirs.safetensors")
    for table in (None, SD15):
        assert_equal_products(read_lora(tmp_path / "theirs.safetensors", table), lora)


@pytest.mark.parametrize("with_alpha", [True, False])
def test_a_scale_of_its_own_is_the_scaling_whatever_alpha_says(with_alpha, tmp_path):
    tensors = {k: t for k, t in kohya_tensors(mixed(), tmp_path).items() if with_alpha or not k.endswith(".alpha")}
    down, up = tensors[f"{STEM}.lora_down.weight"], tensors[f"{STEM}.lora_up.weight"]
    save_file(tensors | {f"{STEM}.scale": torch.tensor(0.75)}, tmp_path / "scaled.safetensors")
    factors = read_lora(tmp_path / "scaled.safetensors").modules[LAYER]
    torch.testing.assert_close(factors.delta(), 0.75 * up @ down)
    save_file(tensors | {f"{STEM}.scale": torch.ones(2)}, tmp_path / "scaled.safetensors")
    with pytest.raises(CheckpointError, match=r"scale of .*to_q is \(2,\), not one number"):
        read_lora(tmp_path / "scaled.safetensors")


def test_a_scale_of_nothing_stays_nothing(tmp_path):
    """kohya's readers take alpha 0 for alpha = rank."""
    tensors = kohya_tensors(mixed(), tmp_path) | {f"{STEM}.scale": torch.tensor(0.0)}
    save_file(tensors, tmp_path / "scaled.safetensors")
    again = converted(read_lora(tmp_path / "scaled.safetensors"), "kohya", tmp_path / "again")
    assert not again.modules[LAYER].delta().any()
    assert again.modules.keys() == mixed().modules.keys()


@pytest.mark.parametrize("suffix", [".ckpt", ".pt"])
def test_a_pickle_with_its_tensors_under_state_dict_is_read(suffix, tmp_path):
    path = tmp_path / f"lora{suffix}"
    torch.save({"state_dict": kohya_tensors(mixed(), tmp_path), "step": 3}, path)
    lora = read_lora(path)
    assert lora.format == "kohya"
    assert_equal_products(lora, mixed())


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("oft_blocks", "an OFT"),
        ("a1.weight", "a GLoRA"),
        ("on_input", "an IA3"),
        ("diff", "a difference of whole weights"),
        ("w_norm", "a difference of whole weights"),
    ],
)
def test_other_methods_are_named(key, kind, tmp_path):
    save_file({f"{STEM}.alpha": torch.tensor(1.0), f"{STEM}.{key}": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=rf"a.safetensors is {kind}.*, which is not read here: .*{key}"):
        read_lora(tmp_path / "a.safetensors")


def loha(rank=2, **others):
    """The parts of a LoHa of a layer of 320 x 320."""
    up, down = torch.randn(320, rank), torch.randn(rank, 320)
    parts = {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": up.flip(0), "hada_w2_b": down + 1, **others}
    return {part: tensor for part, tensor in parts.items() if tensor is not None}


def written(parts, folder):
    save_file({f"{STEM}.{part}": tensor.contiguous() for part, tensor in parts.items()}, folder / "a.safetensors")
    return folder / "a.safetensors"


@pytest.mark.parametrize(
    ("beside", "scaling"),
    [({}, 1.0), ({"alpha": 3.0}, 1.5), ({"alpha": 0.0}, 1.0), ({"alpha": 3.0, "scale": 0.25}, 0.25)],
)
def test_the_scaling_of_a_loha_is_by_its_own_rank(beside, scaling, tmp_path):
    parts = loha()
    factors = read_lora(written(parts | {k: torch.tensor(v) for k, v in beside.items()}, tmp_path)).modules[LAYER]
    product = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    assert (factors.rank, factors.scaling) == (4, scaling)
    torch.testing.assert_close(factors.delta(), scaling * product)


def test_a_lokr_of_whole_matrices_has_no_alpha(tmp_path):
    """LyCORIS writes its rank there, which is none."""
    parts = {"lokr_w1": torch.randn(8, 4), "lokr_w2": torch.randn(40, 80)}
    factors = read_lora(written(parts | {"alpha": torch.tensor(1e9)}, tmp_path)).modules[LAYER]
    torch.testing.assert_close(factors.delta(), torch.kron(parts["lokr_w1"], parts["lokr_w2"]))
    assert factors.rank == 4 * 40


def test_a_rank_above_the_weight_s_own_is_not_kept(tmp_path):
    """Nor formed on the way: a few numbers of a huge rank would claim a huge factor."""
    up, mid, down = torch.randn(4, 9, 1, 1), torch.randn(9, 9, 3, 3), torch.randn(9, 320, 1, 1)
    parts = {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down}
    save_file({f"lora_unet_conv_out.{part}": tensor for part, tensor in parts.items()}, tmp_path / "a.safetensors")
    factors = read_lora(tmp_path / "a.safetensors").modules["unet.conv_out"]
    assert factors.rank == 4
    expected = torch.einsum("omyx,mnhw,niyx->oihw", up, mid, down)
    torch.testing.assert_close(factors.delta(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (loha(hada_w2_b=None), "is no whole LoHa, it has hada_w1_a, hada_w1_b, hada_w2_a$"),
        (loha(**{"lora_down.weight": torch.ones(1, 320)}), "is no whole LoHa, it has hada_w1_a.*lora_A"),
        (loha(hada_t1=torch.ones(2, 2, 3, 3)), "is no whole LoHa"),
        ({"lokr_w1": torch.ones(2, 2), "lokr_t2": torch.ones(2, 2, 3, 3)}, "is no whole LoKr, it has lokr_t2, lokr_w1"),
        (loha(hada_w1_b=torch.ones(3, 320)), r"\(320, 320\), which the LoHa .* not fit: .*hada_w1_b \(3, 320\)"),
        (loha(hada_w1_b=torch.ones(0, 320), hada_w1_a=torch.ones(320, 0)), "which the LoHa of the file does not fit"),
        (loha(hada_w1_b=torch.ones(2)), r"not fit: .*hada_w1_b \(2,\)"),
        (loha(hada_w1_a=torch.ones(319, 2)), "which the LoHa of the file does not fit"),
        ({"lokr_w1": torch.ones(900, 900), "lokr_w2": torch.ones(900, 900)}, "which the LoKr of the file does not fit"),
        ({"lokr_w1": torch.ones(8), "lokr_w2": torch.ones(40, 320)}, "which the LoKr of the file does not fit"),
        (loha(alpha=torch.ones(2)), "alpha of .* is .2,., not one number"),
        (loha(hada_w1_a=torch.ones(320, 2, dtype=torch.int32)), "int32"),
    ],
)
def test_products_that_are_damaged_are_refused(parts, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        read_lora(written(parts, tmp_path))


def test_products_are_loaded_into_any_model_of_named_layers(tmp_path):
    """With the layers of the model in the place of Stable Diffusion's; what it cannot be told by is named."""
    model = nn.ModuleDict({"unet": nn.ModuleDict({"to_q": nn.Linear(6, 8)})})
    before = model["unet"]["to_q"].weight.detach().clone()
    parts = {"lokr_w1": torch.randn(2, 3), "lokr_w2": torch.randn(4, 2), "alpha": torch.tensor(1.0)}
    save_file({f"lora_unet_to_q.{part}": tensor for part, tensor in parts.items()}, tmp_path / "lokr.safetensors")
    report = load_lora_weights(model, tmp_path / "lokr.safetensors", scale=0.5)
    assert "1 modules of LoKr read as LoRAs of higher rank, with the same updates" in str(report)
    merge_lora_weights(model)
    after = dict(model.named_modules())["unet.to_q"].weight
    torch.testing.assert_close(after, before + 0.5 * torch.kron(parts["lokr_w1"], parts["lokr_w2"]))
    with pytest.raises(CheckpointError, match="1 of its 1 modules are no layers of Stable Diffusion"):
        read_lora(tmp_path / "lokr.safetensors")


def test_whole_numbers_are_alphas(tmp_path):
    """diffusers' own export to kohya writes them so."""
    factors = random_factors(LAYER, 4, 4.0)
    theirs = {"unet." + LAYER.removeprefix("unet.") + ".lora_A.weight": factors.lora_A}
    theirs["unet." + LAYER.removeprefix("unet.") + ".lora_B.weight"] = factors.lora_B
    kohyas = convert_state_dict_to_kohya(theirs)
    assert kohyas[f"{STEM}.alpha"].dtype == torch.int64
    save_file(kohyas, tmp_path / "theirs.safetensors")
    assert_equal_products(read_lora(tmp_path / "theirs.safetensors"), LoRAFile({LAYER: factors}))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("lora_te_text_model_encoder", "text_encoders.clip_l.transformer.text_model.encoder"),
        ("lora_te_text_model_encoder", "lora_te_encoder"),
        ("lora_unet_down", "lycoris_down"),
    ],
)
def test_other_spellings_of_a_component(ours, theirs, tmp_path):
    tensors = kohya_tensors(mixed(), tmp_path)
    respelt = {key.replace(ours, theirs): tensor for key, tensor in tensors.items()}
    assert respelt.keys() != tensors.keys()
    save_file(respelt, tmp_path / "theirs.safetensors")
    assert_equal_products(read_lora(tmp_path / "theirs.safetensors"), mixed())


@pytest.mark.parametrize(
    "key",
    ["<s1>", *(f"bundle_emb.<s1>.{kind}" for kind in ("string_to_param.*", "emb_params", "clip_l", "clip_h"))],
)
def test_learned_words_in_a_file_of_kohya_s_are_kept(key, tmp_path):
    words = torch.randn(2, 768)
    save_file(kohya_tensors(mixed(), tmp_path) | {key: words}, tmp_path / "words.safetensors")
    tokens = read_lora(tmp_path / "words.safetensors").tokens
    assert tokens.keys() == {"<s1>"} and torch.equal(tokens["<s1>"], words)


def test_what_onetrainer_puts_behind_a_text_encoder_is_left_out_with_a_line(tmp_path):
    bundled = {"bundle_emb.cat.clip_l": torch.randn(2, 768), "bundle_emb.cat.clip_l_out": torch.randn(2, 768)}
    save_file(kohya_tensors(mixed(), tmp_path) | bundled, tmp_path / "words.safetensors")
    lora = read_lora(tmp_path / "words.safetensors")
    assert "cat" in lora.tokens and len(lora.modules) == len(mixed().modules)
    assert lora.repairs == ("'bundle_emb.cat.clip_l_out' left out: it is no embedding of a prompt's word",)


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_biases_beside_the_factors_are_called_so(prefix, tmp_path):
    layer = f"{prefix}unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{layer}.lora_A.weight": torch.ones(1, 1280), f"{layer}.lora_B.weight": torch.ones(1280, 1)}
    save_file(tensors | {f"{layer}.lora_B.bias": torch.ones(1280)}, tmp_path / "biased.safetensors")
    with pytest.raises(CheckpointError, match=r"biases beside its factors \(peft's lora_bias=True\)"):
        read_lora(tmp_path / "biased.safetensors")


def test_a_loha_written_as_a_lora_is_called_one(tmp_path):
    """A1111 and ComfyUI go by the keys; kohya's trainer and LyCORIS' own loader by the header."""
    said = {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "loha"}', "ss_tag": "kept"}
    write_lora(replace(mixed(), metadata=said), tmp_path / "a.safetensors", "kohya")
    header = read_lora(tmp_path / "a.safetensors").metadata
    assert (header["ss_network_module"], header["ss_network_args"]) == ("networks.lora", "{}")
    assert header["ss_tag"] == "kept"


def test_cloneofsimos_safetensors_of_a_later_diffusers_are_found_by_their_shapes(tmp_path):
    """The feed-forward behind both attentions, where it stood between them."""
    old = LoRAFile({name: random_factors(name, 1, 1.0) for name in SD15 if re.search(r"\.attn[12]\.|ff\.net\.0", name)})
    old = LoRAFile({name: factors for name, factors in old.modules.items() if name.startswith("unet.")})
    tensors = {}
    for i, factors in enumerate(old.modules.values()):
        tensors |= {f"unet:{i}:up": factors.lora_B, f"unet:{i}:down": factors.lora_A}
    save_file(tensors, tmp_path / "later.safetensors")
    found = read_lora(tmp_path / "later.safetensors")
    assert found.format == "cloneofsimo"
    assert_equal_products(found, old)


def test_magnitudes_of_inputs_are_refused_for_square_convolutions_too(tmp_path):
    tensors = kohya_tensors(mixed(), tmp_path)
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    save_file(tensors | {f"{stem}.dora_scale": torch.ones(1, 320, 1, 1)}, tmp_path / "inputs.safetensors")
    with pytest.raises(CheckpointError, match=r"DoRA magnitude of .*conv1 is .*LyCORIS' magnitudes of inputs"):
        read_lora(tmp_path / "inputs.safetensors")


class Nested(nn.Module):
    """Layers of which one's name ends another's."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.a, self.b = (nn.ModuleDict({"fc": nn.Linear(8, 8)}) for _ in "ab")

    def forward(self, x):
        return self.b["fc"](self.a["fc"](self.fc(x)))


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_factors_that_belong_to_a_changed_base_are_refused(init, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["fc"], init_lora_weights=init)
    peft.get_peft_model(Nested(), config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"init_lora_weights='{init}': peft takes the first factors out"):
        read_lora(tmp_path)


def test_and_so_are_those_whose_diffusers_header_says_so(tmp_path):
    write_lora(LoRAFile({LAYER: random_factors(LAYER, 2, 1.0)}), tmp_path / "a.safetensors", "diffusers")
    tensors, header = load_safetensors(tmp_path / "a.safetensors")
    fields = json.loads(header["lora_adapter_metadata"]) | {"unet.init_lora_weights": "pissa"}
    save_file(dict(tensors), tmp_path / "b.safetensors", header | {"lora_adapter_metadata": json.dumps(fields)})
    with pytest.raises(CheckpointError, match=r"b.safetensors has init_lora_weights='pissa'"):
        read_lora(tmp_path / "b.safetensors")


def test_names_that_end_others_keep_their_own_rank_and_alpha_in_peft_s_form(tmp_path):
    torch.manual_seed(0)
    modules = {
        name: LoRAFactors(torch.randn(rank, 8), torch.randn(8, rank), alpha)
        for name, rank, alpha in (("fc", 4, 4.0), ("a.fc", 2, 8.0), ("b.fc", 2, 8.0))
    }
    write_lora(LoRAFile(modules), tmp_path / "peft", "peft")
    assert_equal_products(read_lora(tmp_path / "peft"), LoRAFile(modules))
    model, x = Nested(), torch.randn(3, 8)
    ours = copy.deepcopy(model)
    write_lora(LoRAFile(modules), tmp_path / "ours.safetensors", "native")
    load_lora_weights(ours, tmp_path / "ours.safetensors")
    torch.testing.assert_close(peft.PeftModel.from_pretrained(model, tmp_path / "peft")(x), ours(x), rtol=1e-4, atol=1e-3)
