"""The tiny Stable Diffusion learns a LoRA on a folder of pictures that the test draws, and diffusers reads the exports."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import TRAIN, run_script, set_words
from omegaconf import OmegaConf
from packaging.version import Version
from picture_folders import truncate, write_discs
from PIL import Image
from sd_files import names_of_transformers
from tiny_sd import CONFIGS, SMALLER, tiny_sd_model

from xdiffusion.build import build_data, build_sampling, load_config
from xdiffusion.checkpoints.lora_formats import read_lora
from xdiffusion.checkpoints.lora_formats.native import trained_config
from xdiffusion.checkpoints.native import save_model
from xdiffusion.diffusion.objective import squared_error
from xdiffusion.lora import load_lora_weights, save_lora_weights, set_lora_scale
from xdiffusion.lora.inject import lora_layers
from xdiffusion.model import generate, generators_for
from xdiffusion.training.exports import export_lora
from xdiffusion.training.trainable import make_trainable

PROMPTS = ["a red disc", "a blue disc"]
OVERRIDES = [
    "data.image_size=32", "model.text_encoder.context_length=16", "lora.target_modules=all", "lora.training.batch_size=5",
    "lora.training.num_training_steps=24", "lora.training.save_and_sample_every_n=24", "sampling.steps=3",
    "lora.optimizer.learning_rate=3e-2", "text_encoder_lora.learning_rate=1e-2", "optimizer.warmup_steps=0",
    "training.caption_dropout=0", "training.gradient_checkpointing=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the training command: its folder, base model, config and data."""
    folder = tmp_path_factory.mktemp("sd")
    write_discs(folder / "set", 10, 40, {"red": (230, 20, 20), "blue": (20, 20, 230)})
    truncate(folder / "set/disc_9.png", 0.9)
    Image.new("RGB", (1, 1)).save(folder / "set/dot.png")
    (folder / "set/dot.txt").write_text("a dot")
    path = CONFIGS / "sd15_lora_textencoder_tiny.yaml"
    overrides = [*OVERRIDES, f"data.data_dir={folder / 'set'}", f"cache.folder={folder / 'cache'}"]
    config = load_config(path, overrides, True)
    model = tiny_sd_model(config, spread=0.03).eval()
    settings = OmegaConf.to_container(config)
    save_model(folder / "base.safetensors", model.state_dict(), config=settings, image_shape=model.image_shape, step=0)
    words = ["--config_path", path, "--use_lora_training", "--output_path", folder / "run", "--force_cpu"]
    words += ["--load_model_weights_from_checkpoint", folder / "base.safetensors", *set_words(overrides)]
    assert run_script(TRAIN, *words) == 0
    lora = folder / "run/diffusion-24-lora.safetensors"
    return SimpleNamespace(folder=folder, model=model, config=config, lora=lora, data=build_data(config))


@pytest.fixture(scope="module")
def adapted(run):
    model = tiny_sd_model(run.config, spread=0.03).eval()
    load_lora_weights(model, run.lora)
    return model


@torch.no_grad()
def fixed_loss(model, data):
    """On the pictures, at equally spaced times and a noise that is the same for every model."""
    count, repeats = 9, 4  # without the truncated one
    index = torch.arange(count)
    batch = data.batch(index, torch.zeros(count), torch.zeros(3, count))
    x0 = model.autoencoder.encode(batch.images).repeat(repeats, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    eps, t = torch.randn(x0.shape, generator=generator), (torch.arange(len(x0)) * 7 % 36 + 0.5) / 36
    context = model.text_encoder.encode(batch.captions).repeat(repeats, 1, 1)
    return float(squared_error(model.network, model.schedule, model.prediction, x0, eps, t, context).mean())


def images(model, config):
    return generate(model, PROMPTS, generators_for(0, 2), **build_sampling(config, model.schedule))


def test_the_loss_falls_below_the_frozen_base_s(run, adapted):
    assert fixed_loss(adapted, run.data) < 0.8 * fixed_loss(run.model, run.data)


def test_the_lora_moves_the_samples_and_at_scale_0_does_not(run, adapted):
    base = images(run.model, run.config)
    assert (images(adapted, run.config) - base).abs().mean() > 0.01
    set_lora_scale(adapted, 0.0)
    without = images(adapted, run.config)
    set_lora_scale(adapted, 1.0)
    torch.testing.assert_close(without, base, rtol=0, atol=1e-5)


def test_the_run_wrote_what_it_says(run):
    names = {p.name for p in (run.folder / "run").iterdir()}
    assert {f"diffusion-24-lora{kind}.safetensors" for kind in ("", "-diffusers", "-kohya")} <= names
    assert (run.folder / "run/samples/sample-24.png").is_file()
    skipped = [f"{name}: {reason}" for name, reason in run.data.skipped.items()]
    assert (run.folder / "run/skipped.txt").read_text().splitlines() == skipped != []


@pytest.mark.parametrize("targets", ["all-linear", "all", ".*"])
def test_no_lora_is_on_the_text_projection_which_no_picture_depends_on(targets, tmp_path):
    """It would never learn, and no other program has a place for it."""
    path = CONFIGS / "sd15_lora_textencoder_tiny.yaml"
    config = load_config(path, [*SMALLER, f"text_encoder_lora.target_modules={targets}"], True)
    model = tiny_sd_model(config)
    make_trainable(model, config, lora=True)
    assert len(lora_layers(model.text_encoder)) == 6  # all of its one layer
    for export in export_lora(save_lora_weights(model, tmp_path / "lora.safetensors")):
        assert len(read_lora(export).modules) == len(lora_layers(model))


def test_a_lora_of_the_text_projection_alone_is_refused():
    path = CONFIGS / "sd15_lora_textencoder_tiny.yaml"
    config = load_config(path, [*SMALLER, "text_encoder_lora.target_modules=[text_projection]"], True)
    said = r"text_encoder_lora.target_modules=\['text_projection'\] names the text projection alone"
    with pytest.raises(ValueError, match=said):
        make_trainable(tiny_sd_model(config), config, lora=True)


@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_diffusers_draws_the_same_pictures_from_the_exports(run, adapted, kind):
    import diffusers
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from parity.test_sd_pipeline_parity import TABLE

    if kind == "kohya" and Version(diffusers.__version__) < Version("0.39"):
        pytest.skip("diffusers before 0.39 does not know kohya's names of conv_in, conv_out and the time embedding")

    pipeline = StableDiffusionPipeline(
        **their_parts(run.model), tokenizer=None, safety_checker=None, feature_extractor=None,
        scheduler=DDIMScheduler(**TABLE, set_alpha_to_one=False, clip_sample=False), requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(run.lora.parent), weight_name=f"{run.lora.stem}-{kind}.safetensors")
    xt, time = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([10.0, 800.0])
    with torch.no_grad():
        context = adapted.text_encoder.encode(PROMPTS)
        theirs, null = (
            pipeline.text_encoder(adapted.text_encoder.tokenize(prompts)).last_hidden_state for prompts in (PROMPTS, ["", ""])
        )
        torch.testing.assert_close(theirs, context, rtol=1e-4, atol=1e-5)
        actual = adapted.network(xt, time, context)
        torch.testing.assert_close(pipeline.unet(xt, time, theirs).sample, actual, rtol=1e-4, atol=1e-4)
        drawn = pipeline(
            prompt_embeds=theirs, negative_prompt_embeds=null, num_inference_steps=3, guidance_scale=3.0, height=32,
            width=32, generator=generators_for(0, 2), output_type="pt",
        ).images * 2 - 1  # fmt: skip
    like_theirs = [
        "sampling.steps=3", "sampling.cfg_scale=3", "sampling.sampler.kind=ddim", "sampling.times.kind=timesteps",
        "sampling.times.spacing=leading", "sampling.times.last=first",
    ]  # fmt: skip
    config = load_config(CONFIGS / "sd15_lora_textencoder_tiny.yaml", [*OVERRIDES, *like_theirs], True)
    torch.testing.assert_close(images(adapted, config), drawn, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "lora", "written"),
    [
        ("sd15_lora_tiny", True, ["-lora", "-lora-diffusers", "-lora-kohya"]),
        ("sd15_dreambooth_lora_tiny", True, ["-lora", "-lora-diffusers", "-lora-kohya"]),
        ("sd15_tiny", False, [""]),
        ("sd21_base_tiny", False, [""]),
        ("sd21_v_lora_tiny", True, ["-lora", "-lora-diffusers", "-lora-kohya"]),
        ("sd15_textual_inversion_tiny", False, ["-tokens"]),
        ("sd15_textual_inversion_tiny", True, ["-lora", "-lora-diffusers", "-lora-kohya", "-lora-tokens"]),
    ],
)
def test_the_shipped_configs_train_and_rotate_what_they_write(name, lora, written, run, work_folder):
    few = [*SMALLER, "training.num_training_steps=2", "training.save_and_sample_every_n=1", "checkpoints.keep_last=1"]
    model = tiny_sd_model(load_config(CONFIGS / f"{name}.yaml", few, lora))
    save_model(work_folder / "base.safetensors", model.state_dict(), config={}, image_shape=model.image_shape, step=0)
    words = ["--config_path", CONFIGS / f"{name}.yaml", "--data_dir", run.folder / "set", "--output_path", "out"]
    words += ["--load_model_weights_from_checkpoint", "base.safetensors", "--force_cpu", *set_words(few)]
    assert run_script(TRAIN, *words, *(["--use_lora_training"] if lora else [])) == 0
    assert {p.name for p in Path("out").glob("*.safetensors")} == {f"diffusion-2{w}.safetensors" for w in written}


def test_a_run_may_predict_otherwise_than_its_base(run, work_folder, capsys):
    """What v-prediction and a zero terminal SNR are trained with: the weights of a model that predicts eps."""
    words = [
        "--config_path",
        CONFIGS / "sd15_lora_textencoder_tiny.yaml",
        "--use_lora_training",
        "--output_path",
        "out",
    ]
    words += ["--load_model_weights_from_checkpoint", run.folder / "base.safetensors", "--force_cpu", "--set"]
    few = ["lora.training.num_training_steps=1", "lora.training.batch_size=2", f"cache.folder={run.folder / 'cache'}"]
    words += set_words([*OVERRIDES, *few, f"data.data_dir={run.folder / 'set'}"])[1:]
    ztsnr = ["--set", "diffusion.schedule.zero_terminal_snr=true"]
    assert run_script(TRAIN, *words, *ztsnr) == 2
    assert "diffusion.prediction=eps with diffusion.schedule.zero_terminal_snr=true" in capsys.readouterr().err
    assert run_script(TRAIN, *words, *ztsnr, "--set", "diffusion.prediction=v") == 0
    assert "base.safetensors: diffusion.prediction=eps there, v in the config, by which" in capsys.readouterr().err
    assert trained_config(work_folder / "out/diffusion-1-lora.safetensors")["diffusion"]["prediction"] == "v"


def test_a_learned_word_needs_a_trained_base(run, capsys):
    words = ["--config_path", CONFIGS / "sd15_textual_inversion_tiny.yaml", "--data_dir", run.folder / "set"]
    assert run_script(TRAIN, *words) == 2
    assert "textual_inversion: adapts a trained model: name it with --load_model_weights" in capsys.readouterr().err


def test_no_tiny_clip_is_trained_on_pictures_without_classes(run, work_folder, capsys):
    words = ["--config_path", CONFIGS / "sd15_tiny.yaml", "--data_dir", run.folder / "set", "--force_cpu"]
    assert run_script(TRAIN, *words, *set_words([*SMALLER, "model.text_encoder.pretrained=tiny"])) == 2
    assert "pretrained=tiny is trained on a set with classes" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lora", "lora_textencoder", "dreambooth_lora", "textual_inversion"])
def test_tiny_twins_differ_from_the_full_size_in_sizes_alone(name):
    full, tiny = (load_config(CONFIGS / f"sd15_{name}{size}.yaml", [], True) for size in ("", "_tiny"))
    for section in ("optimizer", "lora", "diffusion", "textual_inversion", "text_encoder_lora"):
        assert _without_overlays(full.get(section)) == _without_overlays(tiny.get(section)), section
    assert full.cache.latents and tiny.cache.latents
    assert len((CONFIGS / f"sd15_{name}.yaml").read_text().splitlines()) < 45


def _without_overlays(section):
    return section and {key: value for key, value in section.items() if key != "training"}


def their_parts(model):
    """diffusers' and transformers' modules with a model's weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from xdiffusion.checkpoints.diffusers import (
        autoencoder_to_diffusers,
        text_encoder_to_transformers,
        unet_to_diffusers,
    )

    unet = UNet2DConditionModel(
        block_out_channels=(16, 32, 32), cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4, sample_size=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, sample_size=32,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, hidden_act="quick_gelu",
            eos_token_id=49407, vocab_size=49408, max_position_embeddings=16,
        )
    )  # fmt: skip
    unet.load_state_dict(unet_to_diffusers(model.network.state_dict()))
    vae.load_state_dict(autoencoder_to_diffusers(model.autoencoder.state_dict()))
    names = text_encoder_to_transformers(model.text_encoder.state_dict())
    text.load_state_dict(names_of_transformers(names))
    return {"unet": unet.eval(), "vae": vae.eval(), "text_encoder": text.eval()}
