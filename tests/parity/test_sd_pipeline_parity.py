"""Whole pictures beside diffusers' Stable Diffusion pipelines: the same weights, noise and schedulers, tiny random models.

Ours is the shipped tiny config; the schedulers are as `from_config` makes them of Stable Diffusion 1.5's own file. Noise is
matched by the generators alone: both sides draw, from one generator per image, what the encoder needs, the starting noise,
and the noise of each step, in this order.
"""

from __future__ import annotations

from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from sd_files import names_of_transformers
from transformers import CLIPTextConfig, CLIPTextModel

from xdiffusion.build import build_model, build_sampling, load_config, override
from xdiffusion.checkpoints.diffusers import (
    autoencoder_to_diffusers,
    text_encoder_to_transformers,
    unet_to_diffusers,
)
from xdiffusion.model import generate, generators_for
from xdiffusion.samplers.image_to_image import StartImage

ROOT = Path(__file__).resolve().parents[2]
STEPS, CFG_SCALE, SIZE = 20, 7.5, 64
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
         "steps_offset": 1}  # fmt: skip
SCHEDULERS = run_path(str(ROOT / "bench/schedulers.py"))["SCHEDULERS"]
PROMPTS, NEGATIVE = ["a fox in the snow", "seven blue houses"], "blurry, low quality"


def model_pair(name: str) -> SimpleNamespace:
    """Ours and diffusers' parts with the same weights, none of them the zeros that a fresh network starts from."""
    config = load_config(ROOT / f"configs/image/sd/{name}.yaml")
    torch.manual_seed(0)
    ours = build_model(config).eval().requires_grad_(False)
    for parameter in ours.network.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    network, words = config.model.network, config.model.text_encoder
    unet = UNet2DConditionModel(
        block_out_channels=tuple(network.channels),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=words.width,
        attention_head_dim=network.num_heads or [width // network.head_dim for width in network.channels],
        use_linear_projection=network.projection == "linear",
        norm_num_groups=network.norm_groups,
        sample_size=SIZE // 8,
    )
    unet.load_state_dict(unet_to_diffusers(ours.network.state_dict()))
    vae = AutoencoderKL(
        block_out_channels=tuple(config.model.autoencoder.widths),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=config.model.autoencoder.norm_groups,
        sample_size=SIZE,
    )
    vae.load_state_dict(autoencoder_to_diffusers(ours.autoencoder.state_dict()))
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=words.width, intermediate_size=4 * words.width, num_hidden_layers=words.layers,
            num_attention_heads=words.heads, hidden_act=words.activation, eos_token_id=49407,
        )
    )  # fmt: skip
    names = text_encoder_to_transformers(ours.text_encoder.state_dict())
    text.load_state_dict(names_of_transformers(names))
    return SimpleNamespace(ours=ours, config=config, unet=unet.eval(), vae=vae.eval(), text=text.eval())


@pytest.fixture(scope="module")
def models() -> SimpleNamespace:
    return model_pair("sd15_tiny")


def scheduler(name: str, **settings):
    """Diffusers' scheduler of one of our samplers, with Stable Diffusion's settings."""
    class_name, of_this, _ = SCHEDULERS[name]
    return getattr(diffusers, class_name)(**TABLE, **of_this, **settings)


def our_images(models, sampler: str, start_image: StartImage | None = None):
    assignments = [f"sampling.{word}" for word in SCHEDULERS[sampler][2].split()]
    config = override(
        models.config,
        [*assignments, f"sampling.steps={STEPS}", f"sampling.cfg_scale={CFG_SCALE}",
         f"sampling.negative_prompt={NEGATIVE!r}"],
        "test",
    )  # fmt: skip
    sampling = build_sampling(config, models.ours.schedule)
    return generate(models.ours, PROMPTS, generators_for(3, 2), start_image=start_image, **sampling)


@torch.no_grad()
def their_images(models, pipeline_class, scheduler, **inputs):
    pipeline = pipeline_class(
        vae=models.vae, text_encoder=models.text, tokenizer=None, unet=models.unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    embedded, negative = (
        models.text(models.ours.text_encoder.tokenize(prompts)).last_hidden_state for prompts in (PROMPTS, [NEGATIVE] * 2)
    )
    return pipeline(
        prompt_embeds=embedded, negative_prompt_embeds=negative, num_inference_steps=STEPS, guidance_scale=CFG_SCALE,
        generator=generators_for(3, 2), output_type="pt", **inputs,
    ).images * 2 - 1  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
def test_text_to_image(models, name):
    theirs = their_images(models, StableDiffusionPipeline, scheduler(name), height=SIZE, width=SIZE)
    ours = our_images(models, name)
    assert theirs.std() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def picture():
    return torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1


@pytest.fixture(scope="module", params=["sd21_base_tiny", "sd21_v_tiny"])
def models_of_2(request):
    return model_pair(request.param)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_stable_diffusion_2(models_of_2, name):
    """With linear projections, the other activation, and prompts padded with zeros; one predicts v."""
    prediction = {"eps": "epsilon", "v": "v_prediction"}[models_of_2.ours.prediction]
    of_theirs = scheduler(name, prediction_type=prediction)
    theirs = their_images(models_of_2, StableDiffusionPipeline, of_theirs, height=SIZE, width=SIZE)
    torch.testing.assert_close(our_images(models_of_2, name), theirs, rtol=0, atol=1e-4)
    given, of_theirs = picture().expand(2, -1, -1, -1), scheduler(name, prediction_type=prediction)
    theirs = their_images(models_of_2, StableDiffusionImg2ImgPipeline, of_theirs, image=given, strength=0.6)
    torch.testing.assert_close(our_images(models_of_2, name, StartImage(picture(), 0.6)), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_image_to_image(models, name):
    given = picture().expand(2, -1, -1, -1)
    theirs = their_images(models, StableDiffusionImg2ImgPipeline, scheduler(name), image=given, strength=0.6)
    ours = our_images(models, name, StartImage(picture(), 0.6))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("strength", "atol"), [(0.8, 1e-4), (1.0, 0.015)])
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "euler_ancestral"])
def test_inpainting(models, name, strength, atol):
    """Of deterministic samplers: theirs lays the first noise over what the mask keeps, an ancestral sampler's is new. At
    strength 1 theirs also begins what the mask keeps as noise alone; a trace of the
    picture where it is drawn anew would be 0.05 away.
    """
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., 16:48, 8:40] = 1
    theirs = their_images(
        models, StableDiffusionInpaintPipeline, scheduler(name), image=picture().expand(2, -1, -1, -1),
        mask_image=mask.expand(2, -1, -1, -1), strength=strength, height=SIZE, width=SIZE,
    )  # fmt: skip
    ours = our_images(models, name, StartImage(picture(), strength, mask, keep_pixels=False))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
