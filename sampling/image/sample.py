"""Sample images from a checkpoint, with and without LoRA files.

    python sampling/image/sample.py --checkpoint output/image/digits/ddpm_24x24_v_continuous_clip/diffusion-1700.safetensors
    python sampling/image/sample.py --checkpoint ... --lora_path ...-lora.safetensors --prompt "a handwritten {class}"
    python sampling/image/sample.py --checkpoint v1-5-pruned-emaonly.safetensors --prompt "a (red:1.2) fox" --num_samples 4
    python sampling/image/sample.py --checkpoint ... --prompt "a fox" --init_image dog.png --mask_image head.png

With --lora_path it writes the base's grid, the LoRA's grid, and one picture that pairs the base with several strengths of
the LoRA on the same prompts and the same noise. Models without classes, as Stable Diffusion, write one file per image too, over
none that another command drew, and pairs with --paired. A PNG is drawn again by --from_png FILE; that of one image, it alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from xdiffusion.cli import SAMPLING_FLAGS, Parser, add_model_flags, finite, positive_int, run, sampling_overrides, seed_number

if TYPE_CHECKING:
    import torch

    from xdiffusion.model import DiffusionModel
    from xdiffusion.recipe import Recipe
    from xdiffusion.samplers.image_to_image import StartImage
    from xdiffusion.text_encoders.clip import PromptSyntax

    Film = list[list[torch.Tensor]]  # of each batch what is denoised, from moment to moment
    LoRAs = Sequence[tuple[Path, float]]  # files and scales

GRIDS = ("samples.png", "base.png", "lora.png", "paired.png", "trajectory.gif")
FLAG_KEYS = SAMPLING_FLAGS | {"clip_skip": "model.text_encoder.clip_skip"}
MAX_MEGAPIXELS = 300  # of all images; 1100 of 512x512, which take 3.6 GB


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model_flags(parser)
    add_flags(parser)
    words, output_path, recipe = with_recipe(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    args.words, args.output_path, args.recipe = words, output_path, recipe
    if args.lora_merge and not args.lora_path:
        parser.error("--lora_merge folds what --lora_path names, and there is none")
    if isinstance(args.paired, list) and not args.lora_path:
        parser.error("--paired compares the base with what --lora_path names, and there is none")
    if args.strength is not None and not args.init_image:
        parser.error("--strength is that of --init_image, and there is none")
    if args.mask_image and not args.init_image:
        parser.error("--mask_image says what to draw anew of --init_image, and there is none")
    return args


def add_flags(parser: argparse.ArgumentParser) -> None:
    def add(flag: str, metavar: str | None = None, help: str = "", **more) -> None:
        parser.add_argument(flag, help=help, **({"metavar": metavar} if metavar else {}), **more)

    several = {"action": "append", "default": []}
    switch = {"action": "store_true"}
    half = {"choices": ("no", "fp16", "bf16"), "default": "no"}
    add("--lora_path", "FILE[:SCALE]", "a LoRA and its strength (1); repeatable, strengths add up", **several)
    add("--lora_merge", help="fold the LoRAs into the weights to sample: as fast as the base", **switch)
    add("--paired", "S", "draw the base and S times the LoRAs too (0.5 1; default: with classes)", nargs="*", type=finite)
    add("--no-paired", help="draw the LoRAs alone", dest="paired", action="store_false", default=None)
    add("--learned_tokens", "FILE[=NAME]", "words of textual inversion, for use in prompts; repeatable", **several)
    add("--num_samples", "N", "images; prompts take turns (default: one per prompt)", type=positive_int)
    add("--batch_size", "N", "images drawn at a time (100; 4 for models without classes)", type=positive_int)
    add("--prompt", "TEXT", "what to draw, {class}: every class in turn; repeatable (default: the classes)", **several)
    add("--clip_skip", "N", "text encoder's layer from the end: 1 = last (default: the config's)", type=positive_int)
    add("--height", "N", "of the images, in pixels (default: the config's)", type=positive_int)
    add("--width", "N", "of the images, in pixels (default: the config's)", type=positive_int)
    add("--init_image", "FILE", "a picture to start from instead of noise, scaled and cut to the size")
    add("--strength", "S", "how much of it is drawn anew: 0 = nothing, 1 = all (0.8)", type=float)
    add("--mask_image", "FILE", "of the same size: bright where it is drawn anew, dark or transparent where it stays")
    add("--seed", "N", "image i is drawn from the noise of seed + i", type=seed_number, default=0)
    by_name = "<in the folder of its run that of --config_path, else of this folder; of another file its own>"
    add("--output_path", "DIR", f"default: output/<dataset>/sample/<name>; the name is {by_name}")
    add("--save_trajectory", help="also write a film of the denoising (GIF)", **switch)
    add("--mixed_precision", help="of the network and the text encoder (no); the autoencoder stays in float32", **half)
    add("--offload", help="for small GPUs: only the part that works is there, the others are in main memory", **switch)
    add("--tile_size", "N", "decode large images in tiles of N pixels, blended at their borders", type=positive_int)
    add("--from_png", "FILE", "draw this picture again: repeat its command; flags given here beat those of it")
    add("--allow_other_base", help="apply a LoRA although it was trained on another base of this shape", **switch)


def with_recipe(argv: Sequence[str]) -> tuple[list[str], str | None, Recipe | None]:
    """The words of a command line with those of --from_png's picture below them, its own --output_path, and the recipe.

    Raises:
        ValueError: if the picture is none of ours.
    """
    finder = Parser(add_help=False)
    finder.add_argument("--from_png", type=Path)
    finder.add_argument("--output_path")
    own, words = finder.parse_known_args(list(argv))
    if own.from_png is None:
        return words, own.output_path, None
    from xdiffusion.recipe import read_recipe

    recipe = read_recipe(own.from_png)
    return recipe.with_given(words, SAMPLING_FLAGS), own.output_path, recipe


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    import torch
    from omegaconf import OmegaConf

    from xdiffusion.as_trained import as_trained
    from xdiffusion.build import build_sampling, override, set_process
    from xdiffusion.checkpoints.hashes import content_hash
    from xdiffusion.checkpoints.native import load_model_file, lora_file
    from xdiffusion.checkpoints.paths import weights_file
    from xdiffusion.data.captions import PROMPT_TABLES
    from xdiffusion.learned_words import add_learned_tokens
    from xdiffusion.loading import load_model, tell_remarks
    from xdiffusion.lora.weights import parse_lora_spec
    from xdiffusion.model import HALF, best_device
    from xdiffusion.places import sample_folder
    from xdiffusion.prompts import expand_prompts
    from xdiffusion.recipe import file_hashes, fingerprint, png_texts

    checkpoint = weights_file(args.checkpoint)
    loras = [(lora_file(path), scale) for path, scale in map(parse_lora_spec, args.lora_path)]
    model, base_config = load_model(checkpoint, args.config_path, dtype=HALF.get(args.mixed_precision), ema=args.ema)
    notes: list[str] = []
    config = as_trained(base_config, [path for path, _ in loras], notes.append)
    with sampling_overrides(args, FLAG_KEYS) as overrides:
        base_config, config = (override(one, overrides, "command line") for one in (base_config, config))
    set_up(model, args)
    table = PROMPT_TABLES.get(config.data.kind.removesuffix("_inverted"))
    prompts = expand_prompts(args.prompt, table, args.num_samples)
    texts = [*prompts, config.sampling.negative_prompt]
    add_learned_tokens(model, args.learned_tokens, texts, config.sampling.prompt_syntax)
    tell_remarks(model, config, texts)
    set_process(model, config)
    start = start_image(model, args, len(build_sampling(config, model.schedule)["times"]) - 1)
    blocks = {"start_image": start, "batch_size": args.batch_size or (100 if table else 4)}
    stored = load_model_file(checkpoint, args.ema)  # mapped, and not in --mixed_precision
    usual = sample_folder(config.data.kind, checkpoint, args.config_path, ours=stored.stable_diffusion is None)
    folder = Path(args.output_path) if args.output_path else usual
    base_hash = content_hash(stored.tensors, torch.float32) if loras and not args.allow_other_base else None
    hashes = {"checkpoint": [fingerprint(stored.tensors)]} | file_hashes(args)
    for flag in args.recipe.differing(hashes) if args.recipe else ():
        print(f"warning: --{flag}: other content than what drew the picture, so this is another one", file=sys.stderr)
    place(model, best_device(args.force_cpu), args)  # before the LoRAs, whose factors stay float32
    strengths = load_loras(model, loras, base_hash, notes, texts, config.sampling.prompt_syntax)
    check_outputs(folder, args, len(prompts))
    film, by_share = [] if args.save_trajectory else None, {}
    for share in shares_to_draw(args.paired, with_classes=table is not None) if strengths else (1.0,):
        drawn_by = config if share else base_config
        set_process(model, drawn_by)
        sampling = build_sampling(drawn_by, model.schedule) | blocks
        with loras_at(share, model, strengths, merge=args.lora_merge):
            by_share[share] = draw(model, prompts, args.seed, sampling, film if share == 1 else None)
    recipe = png_texts(args, checkpoint, prompts, OmegaConf.to_container(config.sampling), hashes)
    write_grids(folder, by_share, list(strengths.values()), prompts, recipe)
    if table is None:
        write_images(folder, by_share[1.0], prompts, args, recipe)
    if args.save_trajectory:
        write_film(folder, model, film, prompts)
    return 0


def shares_to_draw(paired: list[float] | bool | None, with_classes: bool) -> list[float]:
    """Of the LoRAs' strengths: 0, the base, first, unless --no-paired (False), or nothing said (None), leaves all but 1 out."""
    alone = paired is False or (paired is None and not with_classes)
    return [1.0] if alone else [0.0, *sorted({1.0, *(paired or [0.5])} - {0.0})]


def check_outputs(folder: Path, args: argparse.Namespace, count: int) -> None:
    """What would be said after the drawing otherwise: pictures that cannot be written, or could not be drawn again."""
    from xdiffusion.checkpoints.paths import refuse_overwriting
    from xdiffusion.checkpoints.writing import ensure_writable

    ensure_writable(folder)
    for name in GRIDS:
        refuse_overwriting([Path(path) for path in (args.init_image, args.mask_image) if path], folder / name)
    if args.seed + count > 2**63:
        raise ValueError(f"--seed {args.seed}: of {count} images the last would have a seed above 2^63 - 1")


def set_up(model: DiffusionModel, args: argparse.Namespace) -> None:
    """The size of the model's images, as the flags say."""
    _, height, width = model.image_shape
    model.resize(args.height or height, args.width or width)
    megapixels = (args.num_samples or 1) * model.image_shape[1] * model.image_shape[2] / 1e6
    if megapixels > MAX_MEGAPIXELS:
        raise ValueError(
            f"--num_samples {args.num_samples} is a grid of {megapixels:,.0f} megapixels, above {MAX_MEGAPIXELS}: draw "
            "fewer at a time, each time with another --seed"
        )
    if args.tile_size and model.autoencoder.pixels_per_latent == 1:
        raise ValueError(f"--tile_size {args.tile_size} is for models with an autoencoder; this one draws pixels")


def start_image(model: DiffusionModel, args: argparse.Namespace, steps: int) -> StartImage | None:
    """The image to start from, as the flags say, where some of the sampler's `steps` are left to take."""
    if not args.init_image:
        return None
    from xdiffusion.data.image_files import read_picture
    from xdiffusion.pictures import image_tensor, mask_tensor
    from xdiffusion.samplers.image_to_image import StartImage, steps_left

    strength = 0.8 if args.strength is None else args.strength
    steps_left(steps, strength)
    picture, mask = read_picture(args.init_image, to_cover=model.image_shape[1:]), None
    if args.mask_image:
        painted = read_picture(args.mask_image, background="black")  # most editors save white paint on nothing
        if painted.size != picture.size:
            sizes = "{}x{}, {}x{}".format(*painted.size, *picture.size)
            raise ValueError(f"the mask {args.mask_image} must be of the size of {args.init_image}, not {sizes}")
        mask = mask_tensor(painted, *model.image_shape[1:])
    start = StartImage(image_tensor(picture, model.image_shape), strength, mask)
    try:
        start.check(model.image_shape, model.latent_shape)
    except ValueError as error:
        raise ValueError(f"{args.mask_image}: {error}") from error
    return start


def place(model: DiffusionModel, device: torch.device, args: argparse.Namespace) -> None:
    """Set the precision of learned words too, and put the model where it works."""
    from xdiffusion.model import HALF

    model.set_precision(HALF.get(args.mixed_precision))
    if args.tile_size:
        model.autoencoder.tile_size = args.tile_size
    if args.offload:
        model.offload_to = device
    else:
        model.to(device)


def load_loras(
    model: DiffusionModel, loras: LoRAs, base_hash: str | None, notes: Sequence[str], texts: Sequence[str], syntax: PromptSyntax
) -> dict[str, float]:
    """Give the model every LoRA, and its words, which `texts` may hold; tell `notes` on them; returns the scales by adapter."""
    from xdiffusion.learned_words import warn_if_unused
    from xdiffusion.lora import load_lora_weights

    strengths = {}
    for i, (path, scale) in enumerate(loras):
        known = {*model.text_encoder.learned_ids}
        identity = {"base_hash": base_hash, "allow_other_base": base_hash is None}
        report = load_lora_weights(model, path, scale=scale, adapter_name=f"lora_{i}", **identity)
        strengths[f"lora_{i}"] = scale
        print(f"{path}: {report}")
        warn_if_unused(model, path, model.text_encoder.learned_ids.keys() - known, texts, syntax)
    for note in notes:  # now that they fit: of a LoRA of another base they would say nothing
        print(note, file=sys.stderr)
    return strengths


@contextmanager
def loras_at(share: float, model: DiffusionModel, strengths: dict[str, float], *, merge: bool) -> Iterator[None]:
    """Within this block every LoRA has `share` of its strength; 0 is the base."""
    from xdiffusion.lora import merge_lora_weights, set_lora_scale, unmerge_lora_weights

    for adapter, scale in strengths.items():
        set_lora_scale(model, share * scale, adapter)
    if merge:
        merge_lora_weights(model)
    yield
    if merge:
        unmerge_lora_weights(model)  # the next picture is of another strength


def draw(model: DiffusionModel, prompts: Sequence[str], seed: int, sampling: dict, film: Film | None = None) -> torch.Tensor:
    """One image per prompt, with a bar of all steps, and a film of them if asked for."""
    from tqdm import tqdm

    from xdiffusion.model import generate, generators_for
    from xdiffusion.samplers.image_to_image import steps_left

    steps, start = len(sampling["times"]) - 1, sampling["start_image"]
    steps = steps_left(steps, start.strength) if start else steps
    blocks = -(-len(prompts) // sampling["batch_size"])
    with tqdm(total=steps * blocks, unit="step", leave=False, disable=None) as bar:

        def at_start(xt):
            if film is not None:
                film.append([xt.cpu()])

        def at_step(i, xt, x0):
            bar.update()
            if film is not None:
                film[-1].append(xt.cpu())

        generators = generators_for(seed, len(prompts))
        return generate(model, prompts, generators, on_start=at_start, on_step=at_step, **sampling)


def write_grids(folder: Path, by_share: dict, scales: list[float], prompts: list[str], recipe: dict[str, str]) -> None:
    """All images in a grid; where there are several shares of the LoRAs' strengths, base and LoRA, and all in pairs."""
    from xdiffusion.pictures import grid, labelled_rows, save_png, strength_label

    columns = min(len(prompts), 10)
    images = by_share[1.0]
    labels = {share: strength_label(share, scales) for share in by_share}
    if len(by_share) == 1:
        pictures = {"samples.png": grid(images, prompts, columns=columns)}
    else:
        pictures = {
            "base.png": grid(by_share[0.0], prompts, columns=columns, title=labels[0.0]),
            "lora.png": grid(images, prompts, columns=columns, title=labels[1.0]),
            "paired.png": labelled_rows([rows[:columns] for rows in by_share.values()], [*labels.values()], prompts[:columns]),
        }
    for file_name, picture in pictures.items():
        save_png(picture, folder / file_name, recipe)
        some = f" (the first {columns})" if file_name == "paired.png" and len(prompts) > columns else ""
        print(f"{folder / file_name}{some}")


def write_images(folder: Path, images: torch.Tensor, prompts: list[str], args: argparse.Namespace, recipe: dict) -> None:
    """Each image in a file of its own, with the words that draw it alone; an earlier one that others drew stays."""
    from xdiffusion.pictures import as_picture, save_png
    from xdiffusion.recipe import path_beside_others, without_flags

    of_all = without_flags(args.words, ("prompt", "num_samples", "seed"))
    for seed, (image, prompt) in enumerate(zip(images, prompts), args.seed):
        words = [*of_all, f"--prompt={prompt}", "--seed", str(seed)]
        own = {"prompts": json.dumps([prompt]), "seed": str(seed), "command": json.dumps(words)}
        path = path_beside_others(folder / f"image-{seed}.png", recipe | own)
        save_png(as_picture(image), path, recipe | own | {"prompt": prompt})
        print(path)


def write_film(folder: Path, model: DiffusionModel, film: Film, prompts: list[str]) -> None:
    """From the noise to the images, decoded at every moment."""
    import torch

    from xdiffusion.pictures import grid, save_gif

    columns, pages = min(len(prompts), 10), []
    with torch.no_grad(), model.at_work(model.autoencoder):
        for moment in zip(*film):
            images = torch.cat([model.autoencoder.decode(xt.to(model.device)).float().cpu() for xt in moment])
            pages.append(grid(images.clamp(-1, 1), prompts, columns=columns))
    save_gif(pages, folder / "trajectory.gif")
    print(folder / "trajectory.gif")


if __name__ == "__main__":
    sys.exit(run(main))
