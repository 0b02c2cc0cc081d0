"""Sample images from a checkpoint, with and without LoRA files.

    python sampling/image/sample.py --checkpoint output/image/digits/ddpm_24x24_v_continuous_clip/diffusion-1700.safetensors
    python sampling/image/sample.py --checkpoint ... --lora_path ...-lora.safetensors --prompt "a handwritten {class}"
    python sampling/image/sample.py --checkpoint v1-5-pruned-emaonly.safetensors --prompt "a (red:1.2) fox" --num_samples 4
    python sampling/image/sample.py --checkpoint ... --prompt "a fox" --init_image dog.png --mask_image head.png

With --lora_path it writes the base's grid, the LoRA's grid, and one picture that pairs the base with several strengths of
the LoRA on the same prompts and the same noise. Models without classes, as Stable Diffusion, write one file per image too,
and the pairs only with --paired. Every PNG holds the words that draw it again: --from_png FILE.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from xdiffusion.cli import (
    SAMPLING_FLAGS,
    Parser,
    add_model_flags,
    positive_int,
    run,
    sampling_overrides,
)

if TYPE_CHECKING:
    import torch

    from xdiffusion.model import DiffusionModel, StartImage

PAIRED_SCALES = (0.5, 1.0)
FLAG_KEYS = SAMPLING_FLAGS | {"clip_skip": "model.text_encoder.clip_skip"}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, allow_abbrev=False)
    add_model_flags(parser)
    add_flags(parser)
    words, output_path = with_recipe(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    args.words, args.output_path = words, output_path
    if args.lora_merge and not args.lora_path:
        parser.error("--lora_merge folds what --lora_path names, and there is none")
    if args.paired and not args.lora_path:
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
    add(
        "--lora_path",
        "FILE[:SCALE]",
        "a LoRA of this model and its strength (1); repeatable, strengths add up",
        **several,
    )
    add("--lora_merge", help="fold the LoRAs into the weights to sample: as fast as the base", **switch)
    add(
        "--paired",
        help="draw the base and half strengths too (default: for models with classes)",
        action=argparse.BooleanOptionalAction,
    )
    add(
        "--learned_tokens",
        "FILE[=NAME]",
        "words learned by textual inversion, for use in prompts; repeatable",
        **several,
    )
    add("--num_samples", "N", "images; prompts take turns (default: one per prompt, or 8)", type=positive_int)
    add("--batch_size", "N", "images drawn at a time (100; 4 for models without classes)", type=positive_int)
    add(
        "--prompt",
        "TEXT",
        "what to draw; {class} stands for every class in turn; repeatable (default: the classes)",
        **several,
    )
    add(
        "--clip_skip", "N", "the text encoder's layer from the end: 1 = last (default: the config's)", type=positive_int
    )
    add("--height", "N", "of the images, in pixels (default: the config's)", type=positive_int)
    add("--width", "N", "of the images, in pixels (default: the config's)", type=positive_int)
    add("--init_image", "FILE", "a picture to start from instead of noise, scaled and cut to the size")
    add("--strength", "S", "how much of it is drawn anew: 0 = nothing, 1 = all (0.8)", type=float)
    add("--mask_image", "FILE", "of the same size: bright where the picture is drawn anew, dark where it stays")
    add("--seed", "N", "image i is drawn from the noise of seed + i", type=int, default=0)
    add("--output_path", "DIR", "default: output/<dataset>/sample/<config name>")
    add("--save_trajectory", help="also write a film of the denoising (GIF)", **switch)
    add(
        "--mixed_precision",
        help="of the network and the text encoder (no); the autoencoder stays in float32",
        choices=("no", "fp16", "bf16"),
        default="no",
    )
    add("--offload", help="for small GPUs: only the part that works is there, the others are in main memory", **switch)
    add("--tile_size", "N", "decode large images in tiles of N pixels, blended at their borders", type=positive_int)
    add("--from_png", "FILE", "repeat the command that drew this picture; further flags come on top of it")
    add("--allow_other_base", help="apply a LoRA although it was trained on another base of this shape", **switch)


def with_recipe(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """The words of a command line with those of --from_png's picture in front, and its own --output_path.

    Raises:
        ValueError: if the picture is none of ours.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--from_png", type=Path)
    finder.add_argument("--output_path")
    own, words = finder.parse_known_args(list(argv))
    if own.from_png is None:
        return words, own.output_path
    from xdiffusion.pictures import read_metadata

    texts = read_metadata(own.from_png)
    try:
        recipe = json.loads(texts["command"])
        if not isinstance(recipe, list) or not all(isinstance(word, str) for word in recipe):
            raise TypeError
    except (KeyError, ValueError, TypeError, RecursionError):
        raise ValueError(f"{own.from_png} does not say how it was drawn: it is no picture of this command") from None
    _, recipe = finder.parse_known_args(recipe)  # a picture does not choose where files go
    return [*recipe, *words], own.output_path


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    import torch
    from omegaconf import OmegaConf
    from tqdm import tqdm

    from xdiffusion.build import build_sampling, override, set_process
    from xdiffusion.checkpoints.files import content_hash, ensure_writable, weights_file
    from xdiffusion.checkpoints.native import load_model_file
    from xdiffusion.data.captions import PROMPT_TABLES
    from xdiffusion.loading import as_trained, load_model
    from xdiffusion.lora import load_lora_weights, merge_lora_weights, set_lora_scale, unmerge_lora_weights
    from xdiffusion.lora.weights import parse_lora_spec
    from xdiffusion.model import best_device, generate, generators_for
    from xdiffusion.places import OUTPUT_ROOT
    from xdiffusion.prompts import expand_prompts

    checkpoint = weights_file(args.checkpoint)
    loras = [(weights_file(path), scale) for path, scale in map(parse_lora_spec, args.lora_path)]
    model, base_config = load_model(checkpoint, args.config_path, dtype=dtype_of(args), ema=args.ema)
    config = as_trained(base_config, [path for path, _ in loras])
    overrides = sampling_overrides(args, FLAG_KEYS)
    base_config, config = (override(one, overrides, "command line") for one in (base_config, config))
    set_process(model, config)
    table = PROMPT_TABLES.get(config.data.kind.removesuffix("_inverted"))
    prompts = expand_prompts(args.prompt, table, args.num_samples)
    name = Path(args.config_path).stem if args.config_path else checkpoint.absolute().parent.name
    folder = Path(args.output_path) if args.output_path else OUTPUT_ROOT / config.data.kind / "sample" / name
    start_image = set_up(model, args)

    checks_base = bool(loras) and not args.allow_other_base
    base_hash = content_hash(load_model_file(checkpoint, args.ema).tensors, torch.float32) if checks_base else None
    place(model, best_device(args.force_cpu), args)  # before the LoRAs, whose factors stay float32
    strengths = {}
    for i, (path, scale) in enumerate(loras):
        report = load_lora_weights(model, path, scale=scale, adapter_name=f"lora_{i}", base_hash=base_hash)
        strengths[f"lora_{i}"] = scale
        print(f"{path}: {report}")
    ensure_writable(folder)

    batch_size = args.batch_size or (100 if table else 4)
    steps = len(build_sampling(config, model.schedule)["times"]) - 1
    steps = int(steps * start_image.strength) if start_image else steps

    film: list[list[torch.Tensor]] = []  # of each batch, what is denoised from moment to moment

    def draw(share: float, filmed: bool = False) -> torch.Tensor:
        """Images with every LoRA at `share` of its strength; 0 is the base."""
        for adapter, scale in strengths.items():
            set_lora_scale(model, share * scale, adapter)
        if strengths and args.lora_merge:
            merge_lora_weights(model)
        drawn_by = config if share else base_config
        set_process(model, drawn_by)
        with tqdm(total=steps * -(-len(prompts) // batch_size), unit="step", leave=False, disable=None) as bar:

            def each_step(i, xt, x0):
                bar.update()
                if filmed:
                    film[-1].append(xt.cpu())

            images = generate(
                model,
                prompts,
                generators_for(args.seed, len(prompts)),
                start_image=start_image,
                batch_size=batch_size,
                on_start=(lambda x_T: film.append([x_T.cpu()])) if filmed else None,
                on_step=each_step,
                **build_sampling(drawn_by, model.schedule),
            )
        if strengths and args.lora_merge:
            unmerge_lora_weights(model)  # the next picture is of another strength
        return images

    paired = bool(strengths) and (args.paired if args.paired is not None else table is not None)
    by_share = {share: draw(share) for share in ((0.0, *PAIRED_SCALES[:-1]) if paired else ())}
    by_share[1.0] = draw(1.0, args.save_trajectory)
    recipe = {
        "checkpoint": str(checkpoint),
        "loras": json.dumps(args.lora_path),
        "prompts": json.dumps(prompts),
        "seed": str(args.seed),
        "sampling": json.dumps(OmegaConf.to_container(config.sampling)),
        "command": json.dumps(args.words),
    }
    write(folder, by_share, prompts, recipe, one_by_one=table is None, seed=args.seed)
    if args.save_trajectory:
        write_film(folder, model, film, prompts)
    return 0


def set_up(model: DiffusionModel, args: argparse.Namespace) -> StartImage | None:
    """Size and words of the model, and the image to start from, as the flags say."""
    from xdiffusion.checkpoints.learned_tokens import parse_tokens_spec, read_learned_tokens

    _, height, width = model.image_shape
    model.resize(args.height or height, args.width or width)
    if args.tile_size and model.autoencoder.pixels_per_latent == 1:
        raise ValueError(f"--tile_size {args.tile_size} is for models with an autoencoder; this one draws pixels")
    for path, name in map(parse_tokens_spec, args.learned_tokens):
        tokens = read_learned_tokens(path, name)
        model.text_encoder.add_tokens(tokens)
        print(f"{path}: {', '.join(f'{token} ({len(rows)} vectors)' for token, rows in tokens.items())}")
    if not args.init_image:
        return None
    from xdiffusion.data.image_files import DamagedImage, Picture, open_file
    from xdiffusion.model import StartImage
    from xdiffusion.pictures import image_tensor, mask_tensor

    def read(path: str):
        try:
            return Picture(path, None, partial(open_file, Path(path))).pixels()
        except DamagedImage as error:
            raise ValueError(f"{path}: {error}") from error

    picture, mask = read(args.init_image), None
    if args.mask_image:
        painted = read(args.mask_image)
        if painted.size != picture.size:
            sizes = "{}x{}, {}x{}".format(*painted.size, *picture.size)
            raise ValueError(f"the mask {args.mask_image} must be of the size of {args.init_image}, not {sizes}")
        mask = mask_tensor(painted, *model.image_shape[1:])
    strength = 0.8 if args.strength is None else args.strength
    if not 0 <= strength <= 1:
        raise ValueError(f"--strength {strength} must be in [0, 1]: 0 keeps the image, 1 draws it anew")
    return StartImage(image_tensor(picture, model.image_shape), strength, mask)


def place(model: DiffusionModel, device: torch.device, args: argparse.Namespace) -> None:
    """Set the precision of learned words too, and put the model where it works."""
    model.set_precision(dtype_of(args))
    if args.tile_size:
        model.autoencoder.tile_size = args.tile_size
    if args.offload:
        model.offload_to = device
        model.autoencoder.sliced = True
    else:
        model.to(device)


def dtype_of(args: argparse.Namespace) -> torch.dtype | None:
    """Of the network and the text encoder; None is float32."""
    import torch

    return {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[args.mixed_precision]


def write(
    folder: Path, by_share: dict, prompts: list[str], recipe: dict[str, str], one_by_one: bool, seed: int
) -> None:
    """The grids, and where one_by_one each image in a file of its own."""
    from xdiffusion.pictures import as_picture, grid, labelled_rows, save_png

    columns = min(len(prompts), 10)
    images = by_share[1.0]
    labels = ["base" if share == 0 else f"LoRA x {share:g}" for share in by_share]
    if len(by_share) == 1:
        pictures = {"samples.png": grid(images, prompts, columns=columns)}
    else:
        pictures = {
            "base.png": grid(by_share[0.0], prompts, columns=columns, title=labels[0]),
            "lora.png": grid(images, prompts, columns=columns, title=labels[-1]),
            "paired.png": labelled_rows([rows[:columns] for rows in by_share.values()], labels, prompts[:columns]),
        }
    for file_name, picture in pictures.items():
        save_png(picture, folder / file_name, recipe)
        print(folder / file_name)
    for i, image in enumerate(images if one_by_one else []):
        path = folder / f"image-{seed + i}.png"
        save_png(as_picture(image), path, recipe | {"prompt": prompts[i], "image": str(i)})
        print(path)


def write_film(folder: Path, model: DiffusionModel, film: list[list[torch.Tensor]], prompts: list[str]) -> None:
    """From the noise to the images, decoded at every moment."""
    import torch

    from xdiffusion.pictures import grid, save_gif

    columns, pages = min(len(prompts), 10), []
    for moment in zip(*film):
        with torch.no_grad(), model.at_work(model.autoencoder):
            images = torch.cat([model.autoencoder.decode(xt.to(model.device)).float().cpu() for xt in moment])
        pages.append(grid(images.clamp(-1, 1), prompts, columns=columns))
    save_gif(pages, folder / "trajectory.gif")
    print(folder / "trajectory.gif")


if __name__ == "__main__":
    sys.exit(run(main))
