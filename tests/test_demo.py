"""The demo with a small model and few steps: the pictures and every figure that it promises."""

import json
import runpy
from functools import partial

from commands import DEMO, ROOT, files_in
from omegaconf import OmegaConf
from test_resume import CONFIG, TINY

from xdiffusion import scoring
from xdiffusion.evaluation.judge import train_judge


def test_the_demo_writes_its_pictures_and_figures(work_folder, monkeypatch, capfd):
    small = [word for word in TINY if "pretrained" not in word] + ["clip.training.num_training_steps=2"]
    OmegaConf.save(OmegaConf.merge({"base": str(CONFIG)}, OmegaConf.from_dotlist(small)), "small.yaml")
    main = runpy.run_path(str(ROOT / DEMO))["main"]
    monkeypatch.setitem(main.__globals__, "CONFIG", work_folder / "small.yaml")
    monkeypatch.setattr(scoring, "train_judge", partial(train_judge, steps=5))
    assert main(["--num_training_steps", "2", "--num_samples", "20", "--seed", "1"]) == 0

    metrics = json.loads((work_folder / "output/demo/metrics.json").read_text())
    assert metrics["seconds"].keys() >= {"clip", "base", "lora", "sample"}
    assert all(seconds > 0 for seconds in metrics["seconds"].values())
    for part, data in (("base", "image/digits"), ("lora", "image/digits_inverted")):
        assert (metrics[part]["dataset"], metrics[part]["num_samples"]) == (data, 20)
        assert metrics[part].keys() >= {"prompt_accuracy", "frechet_distance", "frechet_floor", "background", "gap_closed"}
    assert metrics["lora_file_bytes"] == (work_folder / "output/demo/lora/diffusion-2-lora.safetensors").stat().st_size
    assert metrics["base_unchanged"] is metrics["scale0_identical"] is True
    assert {"base.png", "lora.png", "paired.png", "trajectory.gif"} <= files_in(work_folder / "output/demo")

    names = main.__globals__
    base = work_folder / "output/demo/base/diffusion-2.safetensors"
    lora = work_folder / "output/demo/lora/diffusion-2-lora.safetensors"
    assert names["base_hash"](base) == names["trained_on"](lora)
    monkeypatch.setattr("xdiffusion.lora.load_lora_weights", lambda model, *_, **__: model.network.conv_out.bias.data.add_(1))
    assert names["scale0_identical"](base, lora) is False
