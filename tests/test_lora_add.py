"""`lora_add` as a user of cloneofsimo's repository types it."""

import re
import shutil

import pytest
import torch
from commands import files_in
from lora_cases import command, deltas, factors, relative, write_files
from lora_files import applied
from safetensors.torch import save_file

from xdiffusion.checkpoints.component_names import exchange_name
from xdiffusion.checkpoints.lora_file import LoRAFile
from xdiffusion.checkpoints.lora_formats import read_lora, sd_layer_table, write_lora
from xdiffusion.checkpoints.native import load_model_file
from xdiffusion.checkpoints.reading import load_safetensors


@pytest.fixture
def files(tiny_run, work_folder):
    """The current folder, with the files of `write_files` in it."""
    write_files(tiny_run, work_folder)
    return work_folder


def test_lora_add_lpl_is_the_weighted_average_of_the_updates(files, capsys):
    first, second = deltas("sd_style.safetensors"), deltas("sd_ink.safetensors")
    paths = "--path_1 sd_style.safetensors --path_2 sd_ink.safetensors"
    for line in (
        "lora_add sd_style.safetensors sd_ink.safetensors a.safetensors 0.3",
        "lora_add sd_style.safetensors sd_ink.safetensors b.safetensors 0.3 lpl",
        f"lora_add {paths} --mode lpl --alpha 0.3 --output_path c.safetensors",
        f"lora_add {paths} --alpha 0.3 --rank 2 --output_path d.safetensors",
    ):
        assert command(line) == 0
    for file in "abcd":
        for name, delta in deltas(f"{file}.safetensors").items():
            assert relative(delta, 0.3 * first[name] + 0.7 * second[name]) < 1e-6
    assert command(f"lora_add {paths} --mode ljl --alpha 0.3 --output_path j.safetensors") == 0
    assert all(relative(d, first[n] + second[n]) < 1e-6 for n, d in deltas("j.safetensors").items())
    capsys.readouterr()
    assert command(f"lora_add {paths} --alpha 0.3 --legacy --output_path l.safetensors") == 0
    assert float(re.search(r"largest relative error (\S+)", capsys.readouterr().out)[1]) > 0.3
    loras = [read_lora(files / f"{name}.safetensors").modules for name in ("sd_style", "sd_ink")]
    for name, delta in deltas("l.safetensors").items():
        (A1, B1), (A2, B2) = ((m[name].lora_A, m[name].lora_B) for m in loras)
        assert relative(delta, applied(0.3 * A1 + 0.7 * A2, 0.3 * B1 + 0.7 * B2)) < 1e-5


def test_lora_add_takes_two_alphas_as_cloneofsimos_later_commands_do(files, capsys):
    first, second = deltas("sd_style.safetensors"), deltas("sd_ink.safetensors")
    for line in (
        "lora_add sd_style.safetensors sd_ink.safetensors a.safetensors 0.3 0.5",
        "lora_add sd_style.safetensors sd_ink.safetensors b.safetensors 0.3 0.5 lpl",
        "lora_add sd_style.safetensors sd_ink.safetensors c.safetensors --alpha_1 0.3 --alpha_2 0.5",
    ):
        assert command(line) == 0
    for file in "abc":
        for name, delta in deltas(f"{file}.safetensors").items():
            assert relative(delta, 0.3 * first[name] + 0.5 * second[name]) < 1e-6
    assert command("lora_add sd_style.safetensors sd_ink.safetensors d.safetensors 0.3 0.5 ljl") == 2
    assert "ALPHA_2 is for lpl" in capsys.readouterr().err


def test_cloneofsimos_list_has_the_layers_that_its_own_loader_walks(files):
    """It goes by CrossAttention, Attention and GEGLU, whatever a file was made of: zeros stand for what is not adapted."""
    layers = sd_layer_table("sd15")
    one = {name: factors(layers[name]) for name in layers if ".attn1.to_q" in name}
    write_lora(LoRAFile(one), files / "one.pt", "cloneofsimo-pt", layers)
    assert len(torch.load(files / "one.pt")) == 2 * 144
    assert read_lora(files / "one.pt", layers).modules.keys() == one.keys()


def test_lora_add_takes_and_makes_cloneofsimos_pickles(files):
    for name in ("sd_style", "sd_ink"):
        assert command(f"lora convert {name}.safetensors {name}.pt --to cloneofsimo-pt --base sd15") == 0
    assert command("lora_add sd_style.pt sd_ink.pt both.pt 0.5") == 0
    both = read_lora(files / "both.pt", sd_layer_table("sd15"))
    assert both.format == "cloneofsimo-pt"
    first, second = deltas("sd_style.safetensors"), deltas("sd_ink.safetensors")
    unet = [name for name in both.modules if name.startswith("unet.")]
    assert unet
    for name in unet:
        sum_ = both.modules[name]
        assert relative(applied(sum_.lora_A, sum_.lora_B, sum_.scaling), (first[name] + second[name]) / 2) < 2e-3


def test_lora_add_upl_on_our_checkpoint_is_lora_apply(files):
    assert command("lora apply model.safetensors style.safetensors:0.7 applied.safetensors") == 0
    words = "--path_1 model.safetensors --path_2 style.safetensors --mode upl --alpha 0.7 --output_path added.safetensors"
    assert command(f"lora_add {words}") == 0
    added, applied = (load_model_file(files / f"{name}.safetensors").tensors for name in ("added", "applied"))
    assert all(torch.equal(added[name], applied[name]) for name in applied)


@pytest.fixture
def pipeline(work_folder):
    """A tiny UNet and text encoder of diffusers in a folder, and a LoRA in diffusers' format for both."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8, norm_num_groups=4,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    )
    unet.save_pretrained(work_folder / "pipeline/unet")
    text.save_pretrained(work_folder / "pipeline/text_encoder")
    (work_folder / "pipeline/model_index.json").write_text("{}")
    targets = {f"unet.{n}": m for n, m in unet.named_modules() if n.endswith(("to_q", "to_out.0", "conv1"))}
    targets |= {exchange_name(n): m for n, m in text.named_modules() if n.endswith("q_proj")}
    modules = {n: factors(tuple(m.weight.shape), seed=i) for i, (n, m) in enumerate(targets.items())}
    write_lora(LoRAFile(modules), work_folder / "lora.safetensors", "diffusers")
    return {n: (m.weight.detach(), modules[n]) for n, m in targets.items()}


WORDS = "--path_2 lora.safetensors --mode upl --alpha 0.5"
UNET = "unet/diffusion_pytorch_model"


def assert_merged(folder, pipeline):
    """That diffusers and transformers read there the pipeline's weights with half of each update."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    text = CLIPTextModel.from_pretrained(folder / "text_encoder")
    merged = {f"unet.{n}": m for n, m in unet.named_modules()} | {exchange_name(n): m for n, m in text.named_modules()}
    for name, (weight, added) in pipeline.items():
        assert torch.allclose(merged[name].weight, weight + 0.5 * added.delta(), atol=1e-6)


def test_lora_add_upl_on_a_folder_of_diffusers(pipeline, work_folder, capsys):
    assert command(f"lora_add --path_1 pipeline {WORDS} --output_path merged") == 0
    assert "not copied" not in capsys.readouterr().err
    assert files_in(work_folder / "merged") == files_in(work_folder / "pipeline")
    assert_merged(work_folder / "merged", pipeline)
    assert command(f"lora_add --path_1 pipeline {WORDS} --output_path merged") == 2
    assert "is there already" in capsys.readouterr().err


def test_weights_that_are_not_written_anew_are_not_copied(pipeline, work_folder, capsys):
    """Another tool would load them, without the LoRA; of several, those are folded into that sample.py reads."""
    folder, before = work_folder / "pipeline", files_in(work_folder / "pipeline")
    others = [f"{UNET}.fp16.safetensors", f"{UNET}.non_ema.safetensors", f"{UNET}.bin", f"{UNET}.bin.index.json"]
    others += ["text_encoder/pytorch_model.bin", "text_encoder/flax_model.msgpack", "v1-5.ckpt"]
    for name in others:
        (folder / name).write_bytes(b"not even read")
    kept = ["vae/diffusion_pytorch_model.bin", "unet/README.md", "safety_checker/pytorch_model.bin"]
    for name in kept:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    assert command(f"lora_add --path_1 pipeline {WORDS} --output_path merged") == 0
    assert files_in(work_folder / "merged") == before | set(kept)
    err = capsys.readouterr().err
    assert "not copied to merged, since the LoRA is not in them: " in err and all(name in err for name in others)
    assert_merged(work_folder / "merged", pipeline)


def test_a_unet_in_several_files_is_folded_into(pipeline, work_folder, capsys):
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel.from_pretrained("pipeline/unet").save_pretrained("several/unet", max_shard_size="10KB")
    shutil.copytree("pipeline/text_encoder", "several/text_encoder")
    assert len(list((work_folder / "several/unet").glob("*-of-*.safetensors"))) > 1
    assert command(f"lora_add --path_1 several {WORDS} --output_path merged") == 0
    assert files_in(work_folder / "merged") == files_in(work_folder / "several")
    assert_merged(work_folder / "merged", pipeline)
    assert command("lora extract merged pipeline found.safetensors --energy 0.9999 --to kohya") == 0
    assert read_lora(work_folder / "found.safetensors").modules.keys() == pipeline.keys()
    next((work_folder / "several/unet").glob("*-of-*.safetensors")).unlink()
    assert command(f"lora_add --path_1 several {WORDS} --output_path again") == 2
    assert "is not there, which diffusion_pytorch_model.safetensors.index.json names" in capsys.readouterr().err


def test_extract_compares_weights_whatever_version_of_transformers_named_them(pipeline, work_folder):
    assert command(f"lora_add --path_1 pipeline {WORDS} --output_path merged") == 0
    weights = work_folder / "merged/text_encoder/model.safetensors"
    tensors = dict(load_safetensors(weights)[0])
    prefix = "" if any(name.startswith("text_model.") for name in tensors) else "text_model."
    renamed = {prefix + name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    save_file(renamed | {f"{prefix}embeddings.position_ids": torch.arange(77)[None]}, weights)
    assert command("lora extract merged pipeline found.safetensors --energy 0.9999 --to kohya") == 0
    assert read_lora(work_folder / "found.safetensors").modules.keys() == pipeline.keys()


def test_a_pickled_part_is_refused_where_the_lora_changes_it(pipeline, work_folder, capsys):
    text = work_folder / "pipeline/text_encoder"
    torch.save(load_safetensors(text / "model.safetensors")[0], text / "pytorch_model.bin")
    shutil.copytree("pipeline", "whole")
    (text / "model.safetensors").unlink()
    before = files_in(work_folder)
    for line in (
        f"lora_add --path_1 pipeline {WORDS} --output_path merged",
        "lora extract pipeline whole found.safetensors --rank 1",
    ):
        assert command(line) == 2
        err = capsys.readouterr().err
        assert "pipeline/text_encoder/pytorch_model.bin is pickled, and only safetensors files" in err
        assert err.count("\n") == 1 and files_in(work_folder) == before
    modules = {name: added for name, (_, added) in pipeline.items() if name.startswith("unet.")}
    write_lora(LoRAFile(modules), work_folder / "unet.safetensors", "diffusers")
    assert command("lora_add pipeline unet.safetensors merged 0.5 upl") == 0
    assert "left out" not in capsys.readouterr().err
    assert files_in(work_folder / "merged") == files_in(work_folder / "pipeline")
    (work_folder / f"pipeline/{UNET}.safetensors").rename(work_folder / f"pipeline/{UNET}.bin")
    assert command("lora_add pipeline unet.safetensors other 0.5 upl") == 2
    assert f"{UNET}.bin is pickled" in capsys.readouterr().err


def test_lora_add_upl_on_a_unet_alone_tells_what_it_leaves_out(pipeline, work_folder, capsys):
    unet = "pipeline/unet/diffusion_pytorch_model.safetensors"
    assert command(f"lora_add {unet} lora.safetensors unet.safetensors 1.0 upl") == 0
    assert "2 modules of the text_encoder left out" in capsys.readouterr().err
    tensors, _ = load_safetensors(work_folder / "unet.safetensors")
    for name, (weight, added) in pipeline.items():
        if name.startswith("unet."):
            assert torch.allclose(tensors[f"{name.removeprefix('unet.')}.weight"], weight + added.delta(), atol=1e-6)
    assert command("lora extract unet.safetensors pipeline/unet found.safetensors --energy 0.9999 --to kohya") == 0
    assert read_lora(work_folder / "found.safetensors").format == "kohya"
