"""Sample images from a checkpoint, with and without LoRA files.

    python sampling/image/sample.py --checkpoint output/image/digits/ddpm_24x24_v_continuous_clip/diffusion-1400.safetensors
    python sampling/image/sample.py --checkpoint ... --lora_path ...-lora.safetensors --prompt "a handwritten {class}"

With --lora_path it writes the base's grid, the LoRA's grid, and one picture that pairs the base with several strengths of
the LoRA on the same prompts and the same noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from xdiffusion.cli import SAMPLING_FLAGS, add_model_flags, positive_int, run, sampling_overrides

PAIRED_SCALES = (0.5, 1.0)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    add = parser.add_argument
    add(
        "--lora_path",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="a LoRA of this model and its strength (1); repeatable, strengths add up",
    )
    add("--lora_merge", action="store_true", help="fold the LoRAs into the weights to sample: as fast as the base")
    add(
        "--num_samples",
        type=positive_int,
        metavar="N",
        help="images; prompts take turns (default: one per prompt, or 8)",
    )
    add(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="what to draw; {class} stands for every class in turn; repeatable (default: the classes)",
    )
    add("--seed", type=int, default=0, metavar="N", help="image i is drawn from the noise of seed + i")
    add("--output_path", metavar="DIR", help="default: output/<dataset>/sample/<config name>")
    add("--save_trajectory", action="store_true", help="also write a film of the denoising (GIF)")
    add(
        "--allow_other_base",
        action="store_true",
        help="apply a LoRA although it was trained on another base of this shape",
    )
    args = parser.parse_args(argv)
    if args.lora_merge and not args.lora_path:
        parser.error("--lora_merge folds what --lora_path names, and there is none")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from omegaconf import OmegaConf

    from xdiffusion.build import build_sampling, load_model, override
    from xdiffusion.checkpoints.files import content_hash, ensure_writable, weights_file
    from xdiffusion.data.captions import PROMPT_TABLES
    from xdiffusion.lora import load_lora_weights, merge_lora_weights, set_lora_scale, unmerge_lora_weights
    from xdiffusion.lora.weights import parse_lora_spec
    from xdiffusion.model import best_device, generate, generators_for
    from xdiffusion.pictures import grid, labelled_rows, save_gif, save_png
    from xdiffusion.prompts import expand_prompts

    checkpoint = weights_file(args.checkpoint)
    model, config = load_model(checkpoint, args.config_path)
    config = override(config, sampling_overrides(args, SAMPLING_FLAGS), "command line")
    sampling = build_sampling(config, model.schedule)
    table = PROMPT_TABLES[config.data.kind.removesuffix("_inverted")]
    prompts = expand_prompts(args.prompt, table, args.num_samples)
    name = Path(args.config_path).stem if args.config_path else checkpoint.parent.name
    folder = Path(args.output_path) if args.output_path else Path("output") / config.data.kind / "sample" / name

    base_hash = content_hash(model.base_weights()) if args.lora_path and not args.allow_other_base else None
    strengths = {}
    for i, (given, scale) in enumerate(parse_lora_spec(text) for text in args.lora_path):
        path = weights_file(given)
        report = load_lora_weights(model, path, scale=scale, adapter_name=f"lora_{i}", base_hash=base_hash)
        strengths[f"lora_{i}"] = scale
        print(f"{path}: {report}")
    model.to(best_device(args.force_cpu))
    ensure_writable(folder)

    def draw(share: float, on_step=None):
        """Images with every LoRA at `share` of its strength; 0 is the base."""
        for adapter, scale in strengths.items():
            set_lora_scale(model, share * scale, adapter)
        if strengths and args.lora_merge:
            merge_lora_weights(model)
        images = generate(model, prompts, generators_for(args.seed, len(prompts)), on_step=on_step, **sampling)
        if strengths and args.lora_merge:
            unmerge_lora_weights(model)  # the next picture is of another strength
        return images

    recipe = {
        "checkpoint": str(checkpoint),
        "loras": json.dumps(args.lora_path),
        "prompts": json.dumps(prompts),
        "seed": str(args.seed),
        "sampling": json.dumps(OmegaConf.to_container(config.sampling)),
    }
    columns = min(len(prompts), 10)
    frames: list = []
    keep_frame = (lambda i, xt, x0: frames.append(xt.cpu())) if args.save_trajectory else None
    if not strengths:
        pictures = {"samples.png": grid(draw(1.0, keep_frame), prompts, columns=columns)}
    else:
        by_share = {share: draw(share) for share in (0.0, *PAIRED_SCALES[:-1])} | {1.0: draw(1.0, keep_frame)}
        labels = ["base" if share == 0 else f"LoRA x {share:g}" for share in by_share]
        pictures = {
            "base.png": grid(by_share[0.0], prompts, columns=columns, title=labels[0]),
            "lora.png": grid(by_share[1.0], prompts, columns=columns, title=labels[-1]),
            "paired.png": labelled_rows([images[:columns] for images in by_share.values()], labels, prompts[:columns]),
        }
    for file_name, picture in pictures.items():
        save_png(picture, folder / file_name, recipe)
        print(folder / file_name)
    if args.save_trajectory:
        save_gif([grid(frame.clamp(-1, 1), prompts, columns=columns) for frame in frames], folder / "trajectory.gif")
        print(folder / "trajectory.gif")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
