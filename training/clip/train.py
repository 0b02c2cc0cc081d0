"""Train our own tiny CLIP on the (image, caption) pairs of a data set; its text tower conditions the diffusion models.

    python training/clip/train.py --config_path configs/image/digits/ddpm_24x24_v_continuous_clip.yaml

A run like those of training/image/train.py, with its settings in the section clip: of the config. It can be stopped and
resumed; its checkpoints, run.json and curves lie in the folder of the text tower's name, and the text tower is written at the
end. training/image/train.py does the same by itself where a config says `pretrained: tiny` and there is no such file yet.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from xdiffusion.cli import Parser, add_run_flags, naming_flags, overrides_from_flags, positive_int, run

SCRIPT = "training/clip/train.py"
FLAG_KEYS = {
    "dataset_name": "data.kind",
    "data_dir": "data.data_dir",
    "num_training_steps": "clip.training.num_training_steps",
    "batch_size": "clip.training.batch_size",
    "save_and_sample_every_n": "clip.training.save_and_sample_every_n",
    "mixed_precision": "clip.training.mixed_precision",
    "seed": "training.seed",
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_run_flags(parser)
    add = parser.add_argument
    add("--dataset_name", metavar="NAME", help="image/digits, image/mnist, image/fashion_mnist or image/cifar10")
    add("--data_dir", metavar="DIR", help="an existing copy of the data set; without it, it is downloaded")
    add("--output_path", metavar="FILE", help="a .safetensors file; default: where training/image/train.py looks for it")
    add("--batch_size", type=positive_int, metavar="N", help="pairs per step, a multiple of the number of classes")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from xdiffusion.build import build_data, build_fresh_text_encoder, clip_config, load_config

    with naming_flags(args, FLAG_KEYS):
        config = clip_config(load_config(args.config_path, overrides_from_flags(args, FLAG_KEYS)))
    if config.model.text_encoder.kind != "clip":
        raise ValueError(
            f"model.text_encoder.kind={config.model.text_encoder.kind}: only a text encoder of kind clip is trained here"
        )
    path = Path(args.output_path) if args.output_path else None
    if path is not None and (path.suffix != ".safetensors" or path.is_dir()):
        raise ValueError(f"--output_path {path} must name a .safetensors file")

    from xdiffusion.places import OUTPUT_ROOT
    from xdiffusion.training.folder_lock import in_turn
    from xdiffusion.training.processes import begin_process, check_same_everywhere, first_ones_first, leaving_together
    from xdiffusion.training.run_record import data_fingerprint, settings_hash
    from xdiffusion.training.settings import check_settings
    from xdiffusion.training.text_encoder import tiny_clip_path, train_tiny_clip

    check_settings(config)
    words = sys.argv[1:] if argv is None else argv
    command = {"script": SCRIPT, "words": words, "resume_from": args.resume_from, "force_cpu": args.force_cpu}

    def set_up_and_train() -> int:
        process = begin_process(args.force_cpu)
        with first_ones_first(process):  # the others find what the first has downloaded
            data = build_data(config)
        if process.num_processes > 1:
            check_same_everywhere(process, {"data": data_fingerprint(data), "settings": settings_hash(config)})
        file = path or tiny_clip_path(config, data, OUTPUT_ROOT)
        with in_turn(file) if process.is_main_process else nullcontext():  # a run of training/image/train.py may make it too
            return train_tiny_clip(build_fresh_text_encoder(config), config, data, file, **command)

    return leaving_together(set_up_and_train)


if __name__ == "__main__":
    sys.exit(run(main, lasting=True))
