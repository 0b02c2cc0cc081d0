"""Score a checkpoint, or a LoRA on it: does it draw what it is asked for, and does it draw it like the data?

    python sampling/image/evaluate.py --checkpoint P --dataset_name image/digits --json
    python sampling/image/evaluate.py --checkpoint P --lora_path L --dataset_name image/digits_inverted --json

prompt_accuracy: share of samples in which the judge, a classifier of the real images, sees the prompted class.
frechet_distance: between the judge's features of the samples and of the held-out images; frechet_floor: the same for as
many real training images. background: mean brightness in [0, 1] over the pixels that are background in 99% of the images.
gap_closed (a LoRA on an inverted set): share of the way from the base's loss there to its loss on its own images. For an
inverted set the judge sees the samples un-inverted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from xdiffusion.cli import SAMPLING_FLAGS, add_model_flags, positive_int, run, sampling_overrides

OUTPUT_ROOT = Path("output")
FLAG_KEYS = SAMPLING_FLAGS | {"dataset_name": "data.kind", "data_dir": "data.data_dir"}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    add = parser.add_argument
    add("--lora_path", metavar="FILE[:SCALE]", help="a LoRA of this model and its strength (1)")
    add(
        "--dataset_name",
        metavar="NAME",
        help="the images to compare with, such as image/digits_inverted for a LoRA (default: the checkpoint's)",
    )
    add("--data_dir", metavar="DIR", help="an existing copy of the data set; without it, it is downloaded")
    add(
        "--num_samples",
        type=positive_int,
        default=1000,
        metavar="N",
        help="samples, spread evenly over the classes (1000)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the noise, the prompts' wording and the real samples of the floor (0)",
    )
    add("--json", action="store_true", help="print one line of JSON and nothing else")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from xdiffusion.build import build_data, build_sampling, load_model, override
    from xdiffusion.checkpoints.files import content_hash, weights_file
    from xdiffusion.lora import load_lora_weights
    from xdiffusion.lora.weights import parse_lora_spec
    from xdiffusion.model import best_device
    from xdiffusion.scoring import score

    model, config = load_model(weights_file(args.checkpoint), args.config_path)
    config = override(config, sampling_overrides(args, FLAG_KEYS), "command line")
    data = build_data(config)
    if args.lora_path:
        path, scale = parse_lora_spec(args.lora_path)
        load_lora_weights(model, weights_file(path), scale=scale, base_hash=content_hash(model.base_weights()))
    model.to(best_device(args.force_cpu))

    scores = score(
        model,
        data,
        build_sampling(config, model.schedule),
        num_samples=args.num_samples,
        seed=args.seed,
        has_lora=bool(args.lora_path),
        judge_folder=OUTPUT_ROOT / "judge",
    )
    scores |= {"sampler": config.sampling.sampler.kind, **{k: config.sampling[k] for k in ("steps", "cfg_scale")}}
    if args.json:
        print(json.dumps(scores))
    else:
        width = max(map(len, scores))
        print("\n".join(f"{key:<{width}}  {value}" for key, value in scores.items()))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
