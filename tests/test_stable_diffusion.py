"""The calls for scripts and notebooks, as their documents spell them, on a tiny original file."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lora_cases import factors
from lora_layers import fill_b
from sd_files import random_sd
from torch import nn

from xdiffusion.checkpoints.component_names import exchange_name
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.lora_file import LoRAFile
from xdiffusion.checkpoints.lora_formats import read_lora, write_lora
from xdiffusion.checkpoints.stable_diffusion import to_original
from xdiffusion.checkpoints.writing import save_safetensors
from xdiffusion.commands import sd
from xdiffusion.config_files import ConfigError
from xdiffusion.diffusion.objective import loss
from xdiffusion.lora import (
    LoRAError,
    LoRALinear,
    apply_lora_to_model,
    get_lora_parameters,
    merge_lora_weights,
    set_lora_enabled,
)
from xdiffusion.samplers.image_to_image import StartImage
from xdiffusion.stable_diffusion import generate, load_lora_into_models, preload_models_with_lora, save_models_lora

PROMPT = "a beautiful landscape"
FEW = {"steps": 2, "cfg_scale": 2.0}


@pytest.fixture(scope="module")
def ckpt_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd") / "v1-5-pruned-emaonly.safetensors"
    save_safetensors(path, to_original(random_sd("sd15_tiny").state_dict(), "transformers"), {})
    return path


def train(models, parameters, generator):
    """Two steps of the objective on noise."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-1)
    model = models["model"]
    for _ in range(2):
        x0 = models["autoencoder"].encode(torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1)
        optimizer.zero_grad()
        context = models["clip"].encode([PROMPT])
        loss(models["diffusion"], model.schedule, model.prediction, x0, context, generator=generator).backward()
        optimizer.step()


def test_the_whole_way(ckpt_path, work_folder, generator, capsys):
    models = preload_models_with_lora(
        ckpt_path=str(ckpt_path), device="cpu", lora_rank=4, lora_alpha=1.0, lora_dropout=0.0, apply_to_diffusion=True,
        apply_to_clip=False,
    )  # fmt: skip
    base = generate(prompt=PROMPT, models=models, **FEW)
    assert base.shape == (1, 3, 64, 64) and base.abs().max() <= 1

    for parameter in models["diffusion"].parameters():
        parameter.requires_grad = False
    parameters = get_lora_parameters(models["diffusion"])
    for parameter in parameters:
        parameter.requires_grad = True
    assert not any(p.requires_grad for p in models["clip"].parameters())
    frozen = {name: tensor.clone() for name, tensor in models["model"].base_weights().items()}
    train(models, parameters, generator)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in models["model"].base_weights().items())
    styled = generate(prompt=PROMPT, models=models, **FEW)
    assert not torch.equal(styled, base)
    set_lora_enabled(models["diffusion"], enabled=False)
    assert torch.equal(generate(prompt=PROMPT, models=models, **FEW), base)
    set_lora_enabled(models["diffusion"], enabled=True)

    assert save_models_lora(models, "my_lora_weights.pt").name == "my_lora_weights.safetensors"
    fresh = preload_models_with_lora(ckpt_path, lora_rank=8)
    assert load_lora_into_models(fresh, "my_lora_weights.pt") is fresh
    assert "modules matched, none missing, none unexpected" in capsys.readouterr().out
    assert torch.equal(generate(prompt=PROMPT, models=fresh, **FEW), styled)
    merge_lora_weights(fresh["diffusion"])
    torch.testing.assert_close(generate(prompt=PROMPT, models=fresh, **FEW), styled, rtol=0, atol=1e-4)


def test_a_lora_on_both_parts_is_one_file_and_training_goes_on_after_a_load(ckpt_path, work_folder, generator):
    models = preload_models_with_lora(ckpt_path, lora_rank=2, apply_to_clip=True)
    both = [*get_lora_parameters(models["diffusion"]), *get_lora_parameters(models["clip"])]
    train(models, both, generator)
    path = save_models_lora(models, "both.safetensors")
    assert {exchange_name(name).partition(".")[0] for name in read_lora(path).modules} == {"unet", "text_encoder"}
    after = generate(PROMPT, models=models, **FEW)
    train(models, both, generator)
    load_lora_into_models(models, path)
    assert torch.equal(generate(PROMPT, models=models, **FEW), after)
    same = [*get_lora_parameters(models["diffusion"]), *get_lora_parameters(models["clip"])]
    assert all(a is b for a, b in zip(both, same))  # what an optimizer holds


def test_a_load_switches_on_and_drawing_and_saving_see_the_whole_lora(ckpt_path, work_folder, generator):
    models = preload_models_with_lora(ckpt_path, lora_rank=2, lora_dropout=0.5, apply_to_clip=True)
    fill_b(models["model"])
    save_models_lora(models, "style.safetensors")
    styled = generate(PROMPT, models=models, seed=np.int64(3), steps=np.int64(2))
    models["clip"].train()  # with dropout
    assert torch.equal(generate(PROMPT, models=models, seed=3, steps=2), styled)
    assert models["clip"].training and not models["autoencoder"].training
    models["clip"].eval()
    set_lora_enabled(models["diffusion"], False)
    assert not torch.equal(generate(PROMPT, models=models, seed=3, steps=2), styled)
    load_lora_into_models(models, "style.safetensors")
    assert torch.equal(generate(PROMPT, models=models, seed=3, steps=2), styled)
    merge_lora_weights(models["diffusion"])
    for doing in (save_models_lora, load_lora_into_models):
        with pytest.raises(LoRAError, match="is merged: call unmerge_lora_weights before"):
            doing(models, "style.safetensors")
    for wrong, message in (
        ({"seed": 1.5}, "seed=1.5: the seeds"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(PROMPT, models=models, **FEW, **wrong)


def test_files_of_other_tools_and_strengths(ckpt_path, work_folder):
    models = preload_models_with_lora(ckpt_path)
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    write_lora(LoRAFile({name: factors((32, 32), seed=0)}), work_folder / "style.safetensors", "kohya")
    base = generate(PROMPT, models=models, **FEW)
    load_lora_into_models(models, "style.safetensors", scale=0.8)
    weaker = generate(PROMPT, models=models, **FEW)
    load_lora_into_models(models, "style.safetensors", scale=0.0)
    torch.testing.assert_close(generate(PROMPT, models=models, **FEW), base, rtol=0, atol=1e-5)
    assert not torch.equal(weaker, base)
    assert len(get_lora_parameters(models["model"])) == 2


def test_a_lora_that_says_nothing_is_drawn_by_the_base_s_prediction(ckpt_path, work_folder):
    """After one that was trained to predict v, and that is no longer there."""
    models = preload_models_with_lora(ckpt_path)
    name = "network.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    lora = LoRAFile({name: factors((32, 32), seed=0)})
    write_lora(lora, work_folder / "silent.safetensors", "kohya")
    write_lora(replace(lora, config={"diffusion": {"prediction": "v"}}), work_folder / "v.safetensors", "native")
    for path, prediction in (("v.safetensors", "v"), ("silent.safetensors", "eps")):
        load_lora_into_models(models, path)
        assert (models["model"].prediction, models["config"].diffusion.prediction) == (prediction, prediction)


@pytest.fixture
def words(ckpt_path, work_folder):
    """Writes NAME.safetensors, a LoRA with these learned words, and returns the name."""

    def write(name, tokens):
        lora = LoRAFile({"network.mid_block.attentions.0.transformer_blocks.0.attn2.to_q": factors((32, 32))}, tokens=tokens)
        write_lora(lora, work_folder / f"{name}.safetensors", "native")
        return f"{name}.safetensors"

    return write


def test_learned_words_are_saved_and_loaded_with_the_lora(ckpt_path, words, work_folder):
    models = preload_models_with_lora(ckpt_path)
    models["clip"].add_tokens({"<cat>": torch.ones(16)})
    load_lora_into_models(models, words("style", {"<s1>": torch.eye(16)[:2]}))
    path = save_models_lora(models, "mine.safetensors")
    assert {w: t.tolist() for w, t in read_lora(path).tokens.items()} == {
        "<cat>": [[1.0] * 16],
        "<s1>": torch.eye(16)[:2].tolist(),
    }
    fresh = load_lora_into_models(preload_models_with_lora(ckpt_path), path)
    for prompt in ("a <cat>", "a <s1>"):
        assert torch.equal(*(generate(prompt, models=m, **FEW) for m in (models, fresh)))
    assert not torch.equal(*(generate(prompt, models=fresh, **FEW) for prompt in ("a <cat>", "a <s1>")))


def test_another_lora_takes_the_place_of_the_words_too(ckpt_path, words, work_folder):
    models = preload_models_with_lora(ckpt_path)
    clip = models["clip"]
    clip.add_tokens({"<cat>": torch.ones(16)})
    load_lora_into_models(models, words("step-1", {"<S1>": torch.zeros(16), "<s2>": torch.ones(16)}))
    trained = clip.learned_embedding
    load_lora_into_models(models, words("step-2", {"<S1>": torch.full((16,), 2.0), "<s2>": torch.ones(16)}))
    assert clip.learned_tokens()["<s1>"].unique().tolist() == [2.0]
    assert clip.learned_embedding is trained  # what an optimizer holds
    load_lora_into_models(models, words("ink", {"<s3>": torch.zeros(3, 16)}))
    assert {w: t.tolist() for w, t in clip.learned_tokens().items()} == {
        "<cat>": [[1.0] * 16],
        "<s3>": [[0.0] * 16] * 3,
    }
    load_lora_into_models(models, words("silent", {}))
    assert clip.learned_tokens().keys() == {"<cat>"}  # it was no LoRA's


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"<s2>": torch.ones(16), "<cat>": torch.zeros(16)}, "'<cat>' stands for other embeddings already"),
        ({"<s2>": torch.ones(8)}, "'<s2>' has 8 numbers, this text encoder's width is 16"),
    ],
)
def test_words_that_cannot_be_taken_are_named_with_their_file(tokens, message, ckpt_path, words, work_folder):
    models = preload_models_with_lora(ckpt_path)
    models["clip"].add_tokens({"<cat>": torch.ones(16)})
    load_lora_into_models(models, words("style", {"<s1>": torch.eye(16)[:2]}))
    before = generate("a <s1> and a <cat>", models=models, **FEW)
    with pytest.raises(LoRAError, match=f"ink.safetensors: the learned token {message}"):
        load_lora_into_models(models, words("ink", tokens))
    assert torch.equal(generate("a <s1> and a <cat>", models=models, **FEW), before)


def test_what_of_a_prompt_stays_a_word_is_told(ckpt_path, capsys):
    models = preload_models_with_lora(ckpt_path)
    generate("a fox BREAK a dog", models=models, **FEW)
    assert capsys.readouterr().err.startswith("BREAK in a prompt is taken as a word")
    generate("a fox BREAK a dog", models=models, prompt_syntax="plain", **FEW)
    assert capsys.readouterr().err == ""


def test_several_prompts_and_settings(ckpt_path):
    models = preload_models_with_lora(ckpt_path)
    images = generate(["a fox", "a house"], models=models, seed=3, negative_prompt="grey", batch_size=1, **FEW)
    again = generate("a house", models=models, seed=4, negative_prompt="grey", **FEW)
    torch.testing.assert_close(images[1:], again, rtol=0, atol=1e-5)
    other = generate("a house", models=models, seed=4, sampler={"kind": "euler"}, **FEW)
    assert not torch.equal(other, again)


@pytest.mark.parametrize("words", ["half.safetensors --to original --dtype float16", "folder --to diffusers"])
def test_a_lora_knows_its_base_in_another_form(words, ckpt_path, work_folder, generator, capsys):
    models = preload_models_with_lora(ckpt_path, apply_to_clip=True)
    train(models, get_lora_parameters(models["model"]), generator)
    path = save_models_lora(models, "mine.safetensors")
    sd.main(["convert", str(ckpt_path), *words.split()])
    load_lora_into_models(preload_models_with_lora(words.split()[0]), path)
    assert ("in another precision" in capsys.readouterr().out) == ("half" in words)


def test_the_size_of_one_call(ckpt_path):
    models = preload_models_with_lora(ckpt_path)
    assert generate("a fox", models=models, height=32, width=96, **FEW).shape == (1, 3, 32, 96)
    with pytest.raises(ValueError, match="height=20, width=64: the sides of an image must be multiples of 8"):
        generate("a fox", models=models, height=20, **FEW)
    assert generate("a fox", models=models, **FEW).shape == (1, 3, 64, 64)


def test_no_prompt_and_seeds_that_no_generator_takes(ckpt_path):
    models = preload_models_with_lora(ckpt_path)
    with pytest.raises(ValueError, match="0 prompts, 0 generators: must be as many, at least one"):
        generate([], models=models, **FEW)
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match=f"seed={seed}: the seeds of 1 images must be whole numbers from"):
            generate("a fox", models=models, seed=seed, **FEW)
    with pytest.raises(ValueError, match=r"strength=0.4 of 2 steps is less than one"):
        start = StartImage(torch.zeros(1, 3, 64, 64), 0.4)
        generate("a fox", models=models, start_image=start, **FEW)
    with pytest.raises(ValueError, match=r"start_image=tensor\(.* is no StartImage\(images\) of xdiffusion.samplers"):
        generate("a fox", models=models, start_image=torch.zeros(1), **FEW)


def test_mistakes_leave_the_models_as_they_were(ckpt_path, work_folder, generator):
    with pytest.raises(CheckpointError, match=r"no checkpoint at none.ckpt"):
        preload_models_with_lora("none.ckpt", "cpu")
    with pytest.raises(LoRAError, match="a LoRA on neither part"):
        preload_models_with_lora(ckpt_path, apply_to_diffusion=False)
    with pytest.raises(CheckpointError, match="the file holds the moving average of 0 of"):
        preload_models_with_lora(ckpt_path, ema=True)
    models = preload_models_with_lora(ckpt_path)
    train(models, get_lora_parameters(models["diffusion"]), generator)
    before = generate(PROMPT, models=models, **FEW)
    write_lora(LoRAFile({"unet.other": factors((8, 8), seed=0)}), work_folder / "other.safetensors", "diffusers")
    path = save_models_lora(models, "mine.safetensors")
    with pytest.raises(LoRAError, match=r"other.safetensors does not fit this model"):
        load_lora_into_models(models, "other.safetensors")
    assert torch.equal(generate(PROMPT, models=models, **FEW), before)
    with torch.no_grad():
        for layer in models["diffusion"].modules():
            if isinstance(layer, LoRALinear):
                layer.weight.mul_(1.1)
    with pytest.raises(LoRAError, match="was trained on another base"):
        load_lora_into_models(models, path)
    load_lora_into_models(models, path, allow_other_base=True)
    with pytest.raises(ConfigError, match="stps"):
        generate(PROMPT, models=models, stps=3)


def test_chosen_layers_and_a_layer_of_ones_own():
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj")})
    model = apply_lora_to_model(model, rank=8, alpha=1.0, target_modules=["q_proj", "v_proj"])
    assert [isinstance(layer, LoRALinear) for layer in model.values()] == [True, False, True]
    layer = LoRALinear(in_features=768, out_features=768, bias=True, rank=8, alpha=16.0, dropout=0.1)
    assert layer(torch.zeros(2, 768)).shape == (2, 768)
