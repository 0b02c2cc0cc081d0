"""Stable Diffusion's parts and files beside diffusers and transformers: numbers, gradients, names, exported files."""

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from omegaconf import OmegaConf
from sd_files import FULL_SD, TINY_SD, names_of_transformers, random_sd, sd_config, text_names, write_native
from transformers import CLIPTextConfig, CLIPTextModel

from xdiffusion.build import build_model, build_sampling, override
from xdiffusion.checkpoints.diffusers import (
    autoencoder_from_diffusers,
    autoencoder_to_diffusers,
    text_encoder_from_transformers,
    text_encoder_to_transformers,
    unet_to_diffusers,
)
from xdiffusion.checkpoints.diffusers_settings import autoencoder_settings, text_encoder_settings, unet_settings
from xdiffusion.checkpoints.stable_diffusion import to_original
from xdiffusion.commands import sd
from xdiffusion.loading import load_model
from xdiffusion.model import generate, generators_for

PARTS = ("network", "autoencoder", "text_encoder")


def relative_error(actual, expected):
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


def peers(name):
    """diffusers' UNet and autoencoder and transformers' text encoder of a built-in config, as our folders describe them."""
    config = OmegaConf.to_container(sd_config(name))
    model = config["model"]
    unet = UNet2DConditionModel.from_config(unet_settings(model["network"], model["text_encoder"]["width"], 8))
    settings = text_encoder_settings(model["text_encoder"])
    text = CLIPTextModel(CLIPTextConfig(**{k: v for k, v in settings.items() if k not in ("architectures", "model_type")}))
    return dict(
        zip(
            PARTS,
            (
                unet,
                AutoencoderKL.from_config(autoencoder_settings(model["autoencoder"], config["data"]["image_size"])),
                text,
            ),
        )
    )


TO_THEIRS = {
    "network": unet_to_diffusers,
    "autoencoder": autoencoder_to_diffusers,
    "text_encoder": lambda tensors: names_of_transformers(text_encoder_to_transformers(tensors)),
}


def largest_gradient_error(ours, theirs, table):
    """Over all weights, relative to the largest entry of each; without the keys' biases, which softmax does not see."""
    expected = table({name: p.grad for name, p in theirs.named_parameters()})
    errors = {
        n: relative_error(p.grad, expected[n])
        for n, p in ours.named_parameters()
        if n in expected and not n.endswith("to_k.bias")
    }
    return max(errors.values())


def test_autoencoder_and_its_gradients_are_equal(generator):
    ours, theirs = random_sd("sd15_tiny").autoencoder, peers("sd15_tiny")["autoencoder"]
    theirs.load_state_dict(autoencoder_to_diffusers(ours.state_dict()))
    ours.requires_grad_(True)
    images = torch.rand(2, 3, 64, 48, generator=generator) * 2 - 1
    (mean, std), expected = ours.posterior(images), theirs.encode(images).latent_dist
    scale = theirs.config.scaling_factor
    assert relative_error(mean, expected.mean * scale) < 1e-5
    assert relative_error(std, expected.std * scale) < 1e-5
    draws = (torch.Generator().manual_seed(1) for _ in range(2))
    assert relative_error(ours.encode(images, next(draws)), expected.sample(next(draws)) * scale) < 1e-5

    assert relative_error(ours.decode(mean), theirs.decode(expected.mean).sample) < 1e-5

    # biases before a normalisation all but cancel: in float32 both are 5e-5 from the truth
    ours, theirs, images = ours.double(), theirs.double(), images.double()
    (mean, std), expected = ours.posterior(images), theirs.encode(images).latent_dist
    decoded, peer = ours.decode(mean), theirs.decode(expected.mean).sample
    for result, s in ((decoded, std), (peer, expected.std * scale)):
        (result.square().mean() + s.mean()).backward()
    assert largest_gradient_error(ours, theirs, autoencoder_from_diffusers) < 1e-10


@pytest.mark.parametrize("name", TINY_SD[:2])
def test_text_encoder_and_its_gradients_are_equal(name):
    ours, theirs = random_sd(name).text_encoder, peers(name)["text_encoder"]
    theirs.load_state_dict(TO_THEIRS["text_encoder"](ours.state_dict()))
    ours.requires_grad_(True)
    tokens = ours.tokenize(["a fox in the snow", "", "seven blue houses " * 40])
    expected = theirs(tokens).last_hidden_state
    actual = ours(tokens)
    assert relative_error(actual, expected) < 1e-5
    actual.pow(3).sum().backward()
    expected.pow(3).sum().backward()
    assert largest_gradient_error(ours, theirs, text_encoder_from_transformers) < 1e-5


@pytest.mark.parametrize("name", FULL_SD[:2])
def test_names_are_a_bijection_with_the_full_size_module_trees(name):
    with torch.device("meta"):
        ours, theirs = build_model(sd_config(name)), peers(name)
    for part in PARTS:
        own = getattr(ours, part).state_dict()
        named = TO_THEIRS[part](own)
        if part == "text_encoder":
            assert len(own) == len(named) + 1  # text_projection
        else:
            assert len(own) == len(named)
        assert {n: t.shape for n, t in named.items()} == {n: t.shape for n, t in theirs[part].state_dict().items()}


@pytest.mark.parametrize("name", [FULL_SD[0], *TINY_SD[:2]])
def test_original_names_are_those_that_diffusers_converts(name):
    if name in TINY_SD:
        ours, theirs = random_sd(name), peers(name)
    else:
        with torch.device("meta"):
            ours, theirs = build_model(sd_config(name)), peers(name)
    original = to_original(ours.state_dict(), text_names(name))
    for part, convert in (("network", convert_ldm_unet_checkpoint), ("autoencoder", convert_ldm_vae_checkpoint)):
        converted = convert(dict(original), dict(theirs[part].config))
        expected = TO_THEIRS[part](getattr(ours, part).state_dict())
        assert {n: t.shape for n, t in converted.items()} == {n: t.shape for n, t in expected.items()}
        assert all(t.is_meta or torch.equal(t, expected[n]) for n, t in converted.items())


@pytest.mark.parametrize("name", ["sd15_tiny", "sd21_base_tiny", "sd21_v_tiny"])
def test_exported_files_load_in_diffusers_and_give_the_same_image(name, tmp_path):
    native = write_native(name, tmp_path / "native.safetensors")
    folder, original = tmp_path / "folder", tmp_path / "original.safetensors"
    for output, layout in ((folder, "diffusers"), (original, "original")):
        sd.main(["convert", str(native), str(output), "--to", layout])
    pipelines = (
        StableDiffusionPipeline.from_pretrained(folder),
        StableDiffusionPipeline.from_single_file(str(original), config=str(folder), local_files_only=True),
    )
    model, config = load_model(original)
    words = ["sampler.kind=ddim", "times.kind=timesteps", "times.spacing=leading", "times.last=first", "steps=3",
             "prompt_syntax=plain"]  # fmt: skip
    config = override(config, [f"sampling.{word}" for word in words], "test")
    prompt = "a fox's (blue) house, café"
    ours = generate(model, [prompt], generators_for(0, 1), **build_sampling(config, model.schedule))
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
        theirs = pipeline(
            prompt, num_inference_steps=3, guidance_scale=7.5, generator=generators_for(0, 1), output_type="pt"
        )  # fmt: skip
        torch.testing.assert_close(ours, theirs.images * 2 - 1, rtol=0, atol=1e-4)


def test_a_folder_that_diffusers_saves_is_read(tmp_path):
    native = write_native("sd15_tiny", tmp_path / "native.safetensors")
    sd.main(["convert", str(native), str(tmp_path / "folder"), "--to", "diffusers"])
    StableDiffusionPipeline.from_pretrained(tmp_path / "folder").save_pretrained(tmp_path / "saved")
    exact = random_sd("sd15_tiny").state_dict()
    loaded, _ = load_model(tmp_path / "saved")
    assert all(torch.equal(tensor, exact[n]) for n, tensor in loaded.state_dict().items())
