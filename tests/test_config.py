"""Overrides and the checks that turn a config into a resolved, frozen one; how a LoRA run lays its settings over it."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ReadonlyConfigError
from tiny import SMALLEST

from xdiffusion.build import SCHEMA, clip_config, load_config
from xdiffusion.config import resolve, with_overrides
from xdiffusion.config_files import ConfigError, parse_overrides

ROOT = Path(__file__).resolve().parent.parent


# --- overrides ---


def test_a_change_of_kind_keeps_common_keys_and_drops_the_others():
    config = {"sampling": {"steps": 7, "sampler": {"kind": "ddim", "eta": 0.5}}}
    changed = with_overrides(config, parse_overrides(["sampling.sampler.kind=heun"]), SCHEMA)
    assert changed == {"sampling": {"steps": 7, "sampler": {"kind": "heun"}}}
    assert config["sampling"]["sampler"] == {"kind": "ddim", "eta": 0.5}

    config = {"data": {"kind": "image/mnist", "image_size": 32, "data_dir": "here"}}
    for kind, kept in {
        "image/cifar10": {"image_size": 32, "data_dir": "here"},
        "image/mnist_inverted": {"image_size": 32, "data_dir": "here"},
        "image/digits_inverted": {"image_size": 32},
    }.items():
        changed = with_overrides(config, parse_overrides([f"data.kind={kind}"]), SCHEMA)
        assert changed == {"data": {"kind": kind, **kept}}


def test_a_key_given_with_the_new_kind_is_not_dropped():
    config = {"model": {"text_encoder": {"kind": "clip", "width": 32, "pretrained": "tiny"}}}
    overrides = parse_overrides(["model.text_encoder.kind=open_clip", "model.text_encoder.model_name=ViT-B-32"])
    assert with_overrides(config, overrides, SCHEMA) == {
        "model": {"text_encoder": {"kind": "open_clip", "model_name": "ViT-B-32", "pretrained": "tiny"}}
    }


def test_the_same_kind_again_drops_nothing():
    config = {"data": {"kind": "image/digits", "misspelt": 3}}
    assert with_overrides(config, parse_overrides(["data.kind=image/digits"]), SCHEMA) == config


def test_a_kind_that_a_file_changes_takes_the_keys_of_its_base_s_away(write_yaml):
    base = SMALLEST.replace("v}", "v, schedule: {kind: betas, spacing: linear}}") + "sampling: {times: {kind: karras, rho: 5}}"
    changed = "base: below.yaml\nsampling: {times: {kind: uniform}}\ndiffusion: {schedule: {kind: cosine}}"
    config = load_config(write_yaml(below=base, above=changed))
    assert config.sampling.times == {"kind": "uniform", "t_max": 1.0}
    assert config.diffusion.schedule.kind == "cosine" and "spacing" not in config.diffusion.schedule
    with pytest.raises(ConfigError, match=r"above\.yaml: diffusion\.schedule\.spacing is unknown"):
        load_config(write_yaml(below=base, above=changed.replace("cosine", "cosine, spacing: linear")))


def test_the_tiny_clip_is_the_same_whatever_optimizes_the_model(write_yaml):
    path = write_yaml(config=SMALLEST + "clip: {optimizer: {learning_rate: 0.5}, training: {batch_size: 4}}")
    words = ["optimizer.max_grad_norm=0.5", "optimizer.final_factor=0.5", "optimizer.learning_rate=0.1",
             "training.gradient_accumulation_steps=2", "training.batch_size=8"]  # fmt: skip
    plain, changed = (clip_config(load_config(path, given)) for given in ([], words))
    assert plain == changed and plain.optimizer.learning_rate == 0.5
    assert clip_config(load_config(path, ["clip.optimizer.max_grad_norm=0.5"])).optimizer.max_grad_norm == 0.5


def test_an_override_of_one_list_item_is_refused():
    config = {"model": {"network": {"channels": [8, 8]}}}
    with pytest.raises(
        ConfigError, match=r"overrides .*: model\.network\.channels={'0': 5} is a mapping, and would be laid over a list"
    ):
        with_overrides(config, parse_overrides(["model.network.channels[0]=5"]), SCHEMA)


# --- checks ---


def test_defaults_are_written_out(write_yaml):
    config = load_config(write_yaml(config=SMALLEST), ["sampling.steps=7"])
    assert set(config) == set(SCHEMA) - {"text_encoder_lora", "prior", "textual_inversion"}  # which may be left out
    assert OmegaConf.to_container(config.data) == {"kind": "image/digits", "image_size": 16}
    assert OmegaConf.to_container(config.diffusion.schedule) == {
        "kind": "cosine",
        "logsnr_min": -15.0,
        "logsnr_max": 15.0,
    }
    assert config.diffusion.min_snr_gamma is None
    assert OmegaConf.to_container(config.sampling) == {
        "steps": 7,
        "cfg_scale": 2.0,
        "clip_x0": True,
        "negative_prompt": "",
        "prompt_syntax": "plain",
        "whole_steps": False,
        "start_noise": "unit",
        "sampler": {"kind": "ddim", "eta": 0.0},
        "times": {"kind": "uniform", "t_max": 1.0},
    }
    assert config.optimizer.betas == [0.9, 0.99]
    assert config.model.text_encoder.pretrained == "tiny"
    assert config.model.autoencoder == {"kind": "identity"}


def test_a_resolved_config_resolves_to_itself(write_yaml):
    config = load_config(write_yaml(config=SMALLEST))
    assert resolve(OmegaConf.to_container(config), SCHEMA, "again") == config


def test_the_result_is_read_only(write_yaml):
    config = load_config(write_yaml(config=SMALLEST))
    with pytest.raises(ReadonlyConfigError):
        config.training.batch_size = 3


def test_interpolations_are_refused(write_yaml):
    path = write_yaml(config=SMALLEST + "training: {batch_size: '${data.image_size}'}")
    with pytest.raises(ConfigError, match=r"config\.yaml .*line 3: value='\$\{data\.image_size\}': a config holds values"):
        load_config(path)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optimizer.learning_rat=1", "optimizer.learning_rat is unknown, did you mean learning_rate?; allowed: kind"),
        ("modle.network.kind=unet", "modle is unknown, did you mean model?; allowed: data, model"),
        ("model.network.chanels=[8]", "model.network.chanels is unknown, did you mean channels?"),
        ("model.network.in_channels=1", "model.network.in_channels is unknown"),
        ("model.prediction=v", "model.prediction is unknown"),
        ("sampling.sampler.order=2", "sampling.sampler.order is unknown; allowed: kind, eta"),
        (
            "sampling.sampler.kind=ddmi",
            "sampling.sampler.kind='ddmi' is unknown, did you mean ddim?; allowed: ancestral",
        ),
        ("data.kind=image/digit", "data.kind='image/digit' is unknown, did you mean image/digits?"),
        ("data.kind=_inverted", "data.kind='_inverted' is unknown"),
        ("data.kind=image/x", "(image/digits, image/mnist, image/fashion_mnist, image/cifar10 also with _inverted)"),
        ("data.kind=null", "data.kind is missing; allowed: image/digits, image/mnist"),
        ("data.image_size=null", "data.image_size=None must be a whole number"),
        ("lora.training.num_steps=3", "lora.training.num_steps is unknown, did you mean num_training_steps?"),
        ("lora.optimizer.betas=0.9", "lora.optimizer.betas=0.9 must be a list of float, float"),
        ("training.batch_size=many", "training.batch_size='many' must be a whole number"),
        ("training.batch_size=2.0", "training.batch_size=2.0 must be a whole number"),
        ("training.seed=true", "training.seed=True must be a whole number"),
        ("training.ema_decay=true", "training.ema_decay=True must be a number"),
        ("training.compile=1", "training.compile=1 must be true or false"),
        ("training.mixed_precision=fp8", "training.mixed_precision='fp8' must be one of no, fp16, bf16"),
        ("diffusion.prediction=epsilon", "diffusion.prediction='epsilon' must be one of eps, v, x0"),
        ("optimizer.betas=[0.9]", "optimizer.betas=[0.9] must be a list of float, float"),
        ("optimizer.betas=[0.9,a]", "optimizer.betas=[0.9, 'a'] must be a list of float, float"),
        ("model.network.channels=[8,true]", "model.network.channels=[8, True] must be a list of int"),
        ("model.text_encoder.pretrained=5", "model.text_encoder.pretrained=5 must be text or null"),
        ("training=5", "training must be a mapping of keys, not 5"),
        ("model={network: [unet]}", "model.network must be a mapping of keys, not ['unet']"),
        (
            "sampling.sampler=ddim",
            "sampling.sampler must be a mapping of keys, not 'ddim'; meant: sampling.sampler.kind=ddim? allowed: ancestral, ",
        ),
        ("lora.training=5", "lora.training must be a mapping of keys, not 5"),
        ("lora.init=zero", "lora.init='zero' must be one of zero_b, pissa, orthogonal"),
        ("lora.rank_pattern={to_q: 1.5}", "lora.rank_pattern={'to_q': 1.5} must be a mapping of str to int or null"),
        ("text_encoder_lora.learning_rate=high", "text_encoder_lora.learning_rate='high' must be a number or null"),
        ("text_encoder_lora.training={}", "text_encoder_lora.training is unknown"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_is_allowed(write_yaml, assignment, message):
    path = write_yaml(config=SMALLEST)
    with pytest.raises(ConfigError) as error:
        load_config(path, [assignment])
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mistake_in_what_a_lora_run_lays_over_others_is_said_of_its_place(write_yaml):
    with pytest.raises(ConfigError, match=r"lora\.training\.batchsize is unknown"):
        load_config(write_yaml(config=WITH_LORA), ["lora.training.batchsize=5"], use_lora_training=True)


def test_missing_keys_are_named(write_yaml):
    with pytest.raises(ConfigError, match=r"data\.image_size is missing \(a whole number\)"):
        load_config(write_yaml(config="data: {kind: image/digits}\ndiffusion: {prediction: v}"))
    with pytest.raises(ConfigError, match=r"diffusion\.prediction is missing \(one of eps, v, x0\)"):
        load_config(write_yaml(config="data: {kind: image/digits, image_size: 16}"))
    with pytest.raises(ConfigError, match=r"data\.kind is missing; allowed: image/digits"):
        load_config(write_yaml(config=""))


@pytest.mark.parametrize(
    "assignment",
    [
        "optimizer.learning_rate=1",  # an int where a float is asked for
        "optimizer.betas=[0, 1]",
        "diffusion.min_snr_gamma=5",
        "lora.target_modules=attention",
        "lora.target_modules=[to_q, to_v]",
        "lora.alpha_pattern={to_q: 2, '.*ff.*': 0.5}",
        "text_encoder_lora.rank=2",
        "model.network.num_heads=null",
        "data.kind=image/digits_inverted",
    ],
)
def test_every_allowed_form_is_taken(write_yaml, assignment):
    key, value = assignment.split("=")
    config = load_config(write_yaml(config=SMALLEST), [assignment])
    assert OmegaConf.select(config, key) == OmegaConf.create(f"value: {value}").value


# --- LoRA runs ---

WITH_LORA = SMALLEST + (
    "training: {batch_size: 4, num_training_steps: 10}\noptimizer: {learning_rate: 1.0e-3}\n"
    "lora: {rank: 2, training: {num_training_steps: 20}, optimizer: {learning_rate: 2.0e-3}}\n"
)


def test_a_lora_run_lays_its_settings_over_the_base_run(write_yaml):
    path = write_yaml(config=WITH_LORA)
    base, lora = load_config(path), load_config(path, use_lora_training=True)
    assert (base.training.num_training_steps, base.optimizer.learning_rate) == (10, 1e-3)
    assert (lora.training.num_training_steps, lora.optimizer.learning_rate) == (20, 2e-3)
    assert lora.training.batch_size == 4


def test_the_command_line_beats_the_settings_of_a_lora_run(write_yaml):
    path = write_yaml(config=WITH_LORA)
    assert load_config(path, ["training.num_training_steps=3"], True).training.num_training_steps == 3
    assert load_config(path, ["lora.training.num_training_steps=4"], True).training.num_training_steps == 4
    assert load_config(path, ["lora.training.num_training_steps=4"]).training.num_training_steps == 10


def test_the_config_of_a_lora_run_is_read_again_as_it_was(write_yaml):
    """Else it would not repeat the run: what the command line beat would be laid over the sections once more."""
    words = ["training.num_training_steps=3", "optimizer.learning_rate=0.00123", "lora.cache.latents=true"]
    config = load_config(write_yaml(config=WITH_LORA), [*words, "cache.latents=false"], use_lora_training=True)
    assert (config.lora.training.num_training_steps, config.lora.cache.latents) == (3, False)
    assert load_config(write_yaml(written=OmegaConf.to_yaml(config)), use_lora_training=True) == config
    clip = clip_config(config)
    assert clip_config(load_config(write_yaml(written=OmegaConf.to_yaml(clip)))) == clip


@pytest.mark.parametrize("section", ["", "lora: null", "lora: 5"])
def test_a_lora_run_needs_the_section(write_yaml, section):
    with pytest.raises(ConfigError, match="has no section lora:"):
        load_config(write_yaml(config=SMALLEST + section), use_lora_training=True)


def test_checking_a_config_loads_no_torch(write_yaml):
    code = (
        "import sys; from xdiffusion.build import load_config; "
        f"load_config({str(write_yaml(config=WITH_LORA))!r}, ['optimizer.learning_rate=3e-3'], True); "
        "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_config_that_is_refused_has_loaded_no_torch(write_yaml):
    words = ["--config_path", str(write_yaml(config=WITH_LORA)), "--set", "optimizer.learning_rat=1"]
    code = (
        f"import sys, runpy; main = runpy.run_path('training/image/train.py')['main']\n"
        f"try: main({words!r})\n"
        "except ValueError as error: assert 'learning_rat is unknown' in str(error), error\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("section", ["data", "model", "diffusion", "training", "sampling", "lora"])
def test_a_section_that_is_a_list_is_named(write_yaml, section):
    others = [line for line in SMALLEST.splitlines(keepends=True) if not line.startswith(section)]
    path = write_yaml(config="".join(others) + f"{section}: [kind]\n")
    with pytest.raises(ConfigError, match=rf"{section} must be a mapping of keys, not \['kind'\]"):
        load_config(path)
