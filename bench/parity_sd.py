r"""How far our Stable Diffusion is from diffusers' with the same weights: one JSON line, nothing is downloaded.

    python bench/parity_sd.py --json
    python bench/parity_sd.py --size full --model sd15 --threads 1

Weights are random, and held once: the peers take ours over. Errors are max |ours - theirs| / max |theirs|: of the UNet's
prediction, of the latents' mean (encode), of the image (decode), of the text embedding, of the gradient of a training loss
(the largest over the UNet's weights, each relative to its own largest entry), and of whole images in [-1, 1] (20 steps,
guidance 7.5) for each sampler.

Tolerances: 1e-5 for the parts at tiny size, 1e-4 at full size, 1e-3 for images. Full size needs 10 GB. Images of 64 pixels
are too small for the full size: its deepest level is one pixel then, on which the gradients of attention are rounding alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from measure import device_name, significant
from omegaconf import DictConfig, OmegaConf
from schedulers import SCHEDULERS
from torch import Tensor, nn

from xdiffusion.build import build_model, build_sampling, load_config, override
from xdiffusion.checkpoints.diffusers import (
    autoencoder_to_diffusers,
    text_encoder_to_transformers,
    unet_from_diffusers,
    unet_to_diffusers,
)
from xdiffusion.checkpoints.diffusers_settings import (
    autoencoder_settings,
    scheduler_settings,
    text_encoder_settings,
    unet_settings,
)
from xdiffusion.cli import Parser, positive_int, run
from xdiffusion.loading import STABLE_DIFFUSION
from xdiffusion.model import DiffusionModel, generate, generators_for

CONFIGS = {"sd15": "sd15", "sd21": "sd21_v"}
TOLERANCE = {"tiny": 1e-5, "full": 1e-4}
IMAGE_TOLERANCE = 1e-3
PROMPTS, CFG_SCALE = ["a fox in the snow"], 7.5


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--size", nargs="+", choices=tuple(TOLERANCE), default=["tiny"], help="of the models (tiny)")
    add("--model", nargs="+", choices=tuple(CONFIGS), default=list(CONFIGS), help="which models (all)")
    add("--image_size", type=positive_int, default=128, metavar="N", help="side of the images in pixels (128)")
    add("--steps", type=positive_int, default=20, metavar="N", help="of each sampler (20)")
    add("--threads", type=positive_int, default=2, metavar="N", help="CPU threads (2)")
    add("--json", action="store_true", help="print the JSON line and nothing else")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    errors: dict[str, dict[str, Any]] = {}
    for size in args.size:
        for name in args.model:
            started = time.perf_counter()
            found = {part: significant(error) for part, error in parity(size, name, args.image_size, args.steps).items()}
            errors.setdefault(size, {})[name] = found
            if not args.json:
                print(f"{size} {name} ({time.perf_counter() - started:.0f} s): {found}", file=sys.stderr)
    met = all(
        error <= (IMAGE_TOLERANCE if part.startswith("txt2img") else TOLERANCE[size])
        for size, of_size in errors.items()
        for found in of_size.values()
        for part, error in found.items()
    )
    goal = {"parts": {size: TOLERANCE[size] for size in args.size}, "txt2img": IMAGE_TOLERANCE}
    machine = {"device": device_name("cpu"), "threads": args.threads, "torch": torch.__version__}
    print(json.dumps({"figure": "parity with diffusers", "errors": errors, "goal": goal, "met": met, **machine}))
    return int(not met)


def parity(size: str, name: str, image_size: int, steps: int) -> dict[str, float]:
    """All errors of one model."""
    suffix = "_tiny" if size == "tiny" else ""
    config = load_config(STABLE_DIFFUSION / f"{CONFIGS[name]}{suffix}.yaml", [f"data.image_size={image_size}"])
    model = random_model(config)
    unet, vae, text = peers(model, config)
    errors = part_errors(model, unet, vae, text)
    errors["gradients"] = gradient_error(model, unet, config)
    return errors | {f"txt2img {s}": image_error(model, (unet, vae, text), config, s, steps) for s in SCHEDULERS}


def random_model(config: DictConfig) -> DiffusionModel:
    """Torch's default initialisation everywhere, also where a fresh network starts from zeros."""
    torch.manual_seed(0)
    model = build_model(config).eval().requires_grad_(False)
    for module in model.network.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.any():
            module.reset_parameters()
    return model


def peers(model: DiffusionModel, config: DictConfig) -> tuple[nn.Module, nn.Module, nn.Module]:
    """diffusers' UNet and autoencoder and transformers' text encoder, on the same tensors as ours."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    plain = OmegaConf.to_container(config)
    parts = plain["model"]
    settings = text_encoder_settings(parts["text_encoder"])
    text = CLIPTextModel(CLIPTextConfig(**{k: v for k, v in settings.items() if k not in ("architectures", "model_type")}))
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_settings(parts["network"], parts["text_encoder"]["width"], 8))
        vae = AutoencoderKL.from_config(autoencoder_settings(parts["autoencoder"], config.data.image_size))
    unet.load_state_dict(unet_to_diffusers(model.network.state_dict()), assign=True)
    vae.load_state_dict(autoencoder_to_diffusers(model.autoencoder.state_dict()), assign=True)
    named = text_encoder_to_transformers(model.text_encoder.state_dict())
    if "embeddings.token_embedding.weight" in text.state_dict():  # transformers 5
        named = {key.removeprefix("text_model."): tensor for key, tensor in named.items()}
    text.load_state_dict(named, assign=True)
    return tuple(part.eval().requires_grad_(False) for part in (unet, vae, text))


@torch.no_grad()
def part_errors(model: DiffusionModel, unet: nn.Module, vae: nn.Module, text: nn.Module) -> dict[str, float]:
    """Of one forward pass of each part."""
    generator = torch.Generator().manual_seed(0)
    xt = torch.randn(2, *model.latent_shape, generator=generator)
    times = torch.tensor([3.0, 700.0])
    images = torch.rand(1, *model.image_shape, generator=generator) * 2 - 1
    context = model.text_encoder.encode(["a fox", "seven blue houses"])
    scale, z = model.autoencoder.scale_factor, xt[:1]
    return {
        "unet": relative_error(model.network(xt, times, context), unet(xt, times, context).sample),
        "encode": relative_error(model.autoencoder.encode(images), vae.encode(images).latent_dist.mean * scale),
        "decode": relative_error(model.autoencoder.decode(scale * z), vae.decode(z).sample),
        "text_encoder": relative_error(
            context, text(model.text_encoder.tokenize(["a fox", "seven blue houses"])).last_hidden_state
        ),
    }


def gradient_error(model: DiffusionModel, unet: nn.Module, config: DictConfig) -> float:
    """Of the mean squared error of one batch; theirs are compared and dropped one after another."""
    generator = torch.Generator().manual_seed(1)
    xt, target = (torch.randn(1, *model.latent_shape, generator=generator) for _ in range(2))
    context = torch.randn(1, 77, config.model.text_encoder.width, generator=generator)
    time = torch.tensor([321.0])
    model.network.requires_grad_(True)
    F.mse_loss(model.network(xt, time, context), target).backward()
    ours = {name: p.grad for name, p in model.network.named_parameters()}
    unet.requires_grad_(True)
    errors = []

    def compare(name: str):
        def hook(parameter: Tensor) -> None:
            errors.append(relative_error(ours[name], parameter.grad))
            parameter.grad = None

        return hook

    for name, parameter in unet_from_diffusers(dict(unet.named_parameters())).items():
        parameter.register_post_accumulate_grad_hook(compare(name))
    F.mse_loss(unet(xt, time, context).sample, target).backward()
    assert len(errors) == len(ours)
    for network in (model.network, unet):
        network.requires_grad_(False)
        network.zero_grad()
    return max(errors)


@torch.no_grad()
def image_error(model: DiffusionModel, parts: Sequence[nn.Module], config: DictConfig, sampler: str, steps: int) -> float:
    """Of images in [-1, 1] from the same noise; absolute, which is relative to half their range."""
    import diffusers

    class_name, settings, words = SCHEDULERS[sampler]
    scheduler = getattr(diffusers, class_name).from_config({**scheduler_settings(config.diffusion), **settings})
    unet, vae, text = parts
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=None, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    embedded, negative = (
        text(model.text_encoder.tokenize(prompts)).last_hidden_state for prompts in (PROMPTS, [""] * len(PROMPTS))
    )
    _, height, width = model.image_shape
    theirs = pipeline(
        prompt_embeds=embedded, negative_prompt_embeds=negative, num_inference_steps=steps, guidance_scale=CFG_SCALE,
        generator=generators_for(0, len(PROMPTS)), output_type="pt", height=height, width=width,
    ).images * 2 - 1  # fmt: skip
    assignments = [f"sampling.{word}" for word in (*words.split(), f"steps={steps}", f"cfg_scale={CFG_SCALE}")]
    config = override(config, assignments, "bench/parity_sd.py")
    ours = generate(model, PROMPTS, generators_for(0, len(PROMPTS)), **build_sampling(config, model.schedule))
    return float((ours - theirs).abs().max())


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


if __name__ == "__main__":
    sys.exit(run(main))
