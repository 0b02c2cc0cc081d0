"""Adapters in float32 on a base in half precision: what is held how, that small updates count, and what a run writes."""

from copy import deepcopy

import pytest
import torch
from commands import TRAIN, run_script, set_words
from omegaconf import OmegaConf
from picture_folders import write_discs
from tiny import copies, equal_bits, tiny_config, tiny_trainer
from tiny_sd import CONFIGS, SMALLER, tiny_sd_config, tiny_sd_model, tiny_sd_trainer
from torch import nn

from xdiffusion.build import load_config
from xdiffusion.checkpoints.hashes import content_hash
from xdiffusion.checkpoints.lora_formats import read_lora
from xdiffusion.checkpoints.native import save_model
from xdiffusion.diffusion.objective import squared_error
from xdiffusion.layers.computed_once import computed_once
from xdiffusion.layers.convolution import Conv3x3
from xdiffusion.lora import apply_lora_to_model, load_lora_weights, set_lora_enabled, set_lora_scale
from xdiffusion.lora.functional import merged_weight
from xdiffusion.training.latent_cache import LatentCache

HALF = ["training.mixed_precision=bf16", "training.half_frozen_weights=true"]
WIDE = "training.half_frozen_weights=false"
LEARNS = [
    "training.num_training_steps=30", "training.caption_dropout=0", "optimizer.learning_rate=1e-2",
    "lora.optimizer.learning_rate=1e-2", "lora.target_modules=all", "training.ema_decay=0",
]  # fmt: skip
KINDS = {"lora": {}, "dora": {"use_dora": True}, "pissa": {"init": "pissa"}}


@pytest.fixture
def folder(tmp_path):
    write_discs(tmp_path / "set", 8, 16, {"red": (230, 20, 20), "blue": (20, 20, 230)})
    return tmp_path


def trained(folder, *overrides, name="sd15_lora_textencoder_tiny", steps=30):
    """A trainer after its steps."""
    trainer = tiny_sd_trainer(tiny_sd_config(folder, *LEARNS, *overrides, name=name))
    for step in range(1, steps + 1):
        trainer.step(step)
    return trainer


def dtypes(tensors):
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


@torch.no_grad()
def fixed_loss(trainer):
    """On the pictures, at equally spaced times and noise that is the same for every model."""
    model, batch = trainer.model, trainer.task.batches.part(1, 0, 1)
    x0 = batch.x0.repeat(16, 1, 1, 1)
    context = trainer.task.embed(batch.captions).repeat(16, 1, 1)
    eps, t = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)), (torch.arange(len(x0)) + 0.5) / len(x0)
    with trainer.accelerator.autocast():
        return float(squared_error(model.network, model.schedule, model.prediction, x0, eps, t, context).mean())


def test_the_base_is_in_half_precision_and_what_is_trained_in_float32(folder):
    trainer = trained(folder, *HALF, steps=2)
    model = trainer.model
    frozen = [p for part in (model.network, model.text_encoder) for p in part.parameters() if not p.requires_grad]
    assert dtypes(frozen) == {torch.bfloat16}
    assert dtypes(model.autoencoder.parameters()) == {torch.float32}
    state = [value for moments in trainer.optimizer.state_dict()["state"].values() for value in moments.values()]
    assert dtypes([*trainer.trainable.values(), *trainer.ema.average, *state]) == {torch.float32}
    assert {name.split(".")[0] for name in trainer.trainable} == {"network", "text_encoder"}


def test_without_autocast_and_by_default_all_is_float32(folder):
    for overrides in (["training.half_frozen_weights=true"], ["training.mixed_precision=bf16", WIDE]):
        assert dtypes(trained(folder, *overrides, steps=0).model.parameters()) == {torch.float32}
    assert not tiny_config().training.half_frozen_weights


@pytest.mark.parametrize("name", ["lora", "lora_textencoder", "dreambooth_lora", "textual_inversion"])
def test_the_shipped_configs_ask_for_it(name):
    assert load_config(CONFIGS / f"sd15_{name}.yaml", [], name != "textual_inversion").training.half_frozen_weights


def test_it_learns_as_a_float32_base_does(folder):
    """Beside the same run whose base is rounded by autocast alone, and one in float32 throughout."""
    start = fixed_loss(trained(folder, *HALF, steps=0))
    half, autocast, whole = (trained(folder, *o) for o in (HALF, [HALF[0], WIDE], []))
    ends = [fixed_loss(trainer) for trainer in (half, autocast, whole)]
    assert max(ends) < 0.9 * start
    assert ends == pytest.approx([ends[2]] * 3, rel=0.02)
    ours, theirs = (torch.cat([p.detach().flatten() for p in t.trainable.values()]) for t in (half, whole))
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.95


def test_the_base_keeps_its_bits_and_scale_0_is_the_base(folder):
    trainer = trained(folder, *HALF, steps=0)
    model, before = trainer.model.eval(), copies(trainer.model.base_weights())
    inputs = torch.randn(2, *model.latent_shape), torch.tensor([3.0, 700.0])
    inputs += (torch.randn(2, 8, model.text_encoder.width).bfloat16(),)
    with torch.no_grad():
        base = model.network(*inputs)  # B = 0
    trainer.step(1)
    assert equal_bits(model.base_weights(), before)
    model.eval()
    with torch.no_grad():
        assert not torch.equal(model.network(*inputs), base)
        set_lora_scale(model.network, 0.0)
        assert torch.equal(model.network(*inputs), base)
        set_lora_scale(model.network, 1.0)
        set_lora_enabled(model.network, False)
        assert torch.equal(model.network(*inputs), base)


@pytest.mark.parametrize("autocast", [False, True], ids=["as sampled", "as trained"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [nn.Linear(64, 48), nn.Linear(320, 320), Conv3x3(64, 48)], ids=str)
def test_an_update_of_a_thousandth_of_the_weight_counts(layer, kind, autocast):
    """It is below half a last place of most entries: W + update, rounded, is W there."""
    torch.manual_seed(0)
    model = nn.Sequential(deepcopy(layer)).bfloat16()
    x = torch.randn(2, 64, 20, 20) if isinstance(layer, nn.Conv2d) else torch.randn(2, 400, layer.in_features)
    x = x.bfloat16()
    base = model(x).detach()
    apply_lora_to_model(model, rank=4, alpha=4, target_modules="all", **KINDS[kind])
    lora, weight = model[0], layer.weight.detach().bfloat16().float()
    assert torch.equal(lora(x), base) or kind == "pissa"
    with torch.no_grad():
        direction = torch.randn_like(lora.lora_B["default"])
        product = merged_weight(torch.zeros_like(weight), lora.lora_A["default"], direction, 1.0)
        lora.lora_B["default"] += 1e-3 * weight.norm() / product.norm() * direction
        change = lora._unrounded_weight(["default"]) - weight
        with computed_once(model), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = model(x) - base
        merged = lora._base_forward(x, (weight + change).bfloat16(), lora.bias) - base
        expected = lora._base_forward(x.float(), change, None)
    of_this, of_merged = (torch.cosine_similarity(y.float().flatten(), expected.flatten(), 0) for y in (found, merged))
    assert of_this > 0.6
    assert of_merged < 0.5
    model(x).float().square().mean().backward()
    gradients = [p.grad for p in lora.trained_parameters("default")]
    assert dtypes(gradients) == {torch.float32}
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


def test_runs_that_train_the_network_are_refused():
    with pytest.raises(ValueError, match=r"training.half_frozen_weights=true is for runs that train a LoRA"):
        tiny_trainer(tiny_config(*HALF))


def test_a_learned_word_is_trained_in_float32(folder):
    write_discs(folder / "set", 8, 16, {"<cat>": (230, 20, 20)})
    config = tiny_sd_config(folder, *HALF, name="sd15_textual_inversion_tiny", lora=False)
    trainer = tiny_sd_trainer(config, lora=False)
    word, before = trainer.trainable["text_encoder.learned_embedding"], copies(trainer.trainable)
    assert (word.dtype, trainer.model.text_encoder.token_embedding.weight.dtype) == (torch.float32, torch.bfloat16)
    trainer.step(1)
    assert not equal_bits(trainer.trainable, before)


@pytest.mark.parametrize("name", ["sd15_lora_tiny", "sd15_lora_textencoder_tiny", "sd15_dreambooth_lora_tiny"])
def test_the_command_writes_what_fits_the_float32_base(name, folder, monkeypatch):
    """Grids, class images, caches and exports too; the LoRA file names the base as it was loaded."""
    monkeypatch.chdir(folder)
    few = [*SMALLER, "training.num_training_steps=2", "training.save_and_sample_every_n=1", *HALF]
    config = load_config(CONFIGS / f"{name}.yaml", few, True)
    model = tiny_sd_model(config)
    settings = OmegaConf.to_container(config)
    save_model(folder / "base.safetensors", model.state_dict(), config=settings, image_shape=model.image_shape, step=0)
    words = ["--config_path", CONFIGS / f"{name}.yaml", "--use_lora_training", "--data_dir", folder / "set"]
    words += ["--load_model_weights_from_checkpoint", "base.safetensors", "--force_cpu", "--output_path", "out"]
    assert run_script(TRAIN, *words, *set_words(few)) == 0
    assert (folder / "out/samples/sample-2.png").is_file()
    lora = folder / "out/diffusion-2-lora.safetensors"
    factors = read_lora(lora).modules.values()
    assert dtypes(tensor for f in factors for tensor in (f.lora_A, f.lora_B)) == {torch.float32}
    base_hash = content_hash(model.base_weights())
    matched = sorted(load_lora_weights(model, lora, base_hash=base_hash).matched)
    for kind in ("diffusers", "kohya"):
        again = tiny_sd_model(config)
        export = lora.with_name(f"{lora.stem}-{kind}.safetensors")
        assert sorted(load_lora_weights(again, export).matched) == matched
        for name_of_layer in matched:
            ours, theirs = (m.get_submodule(name_of_layer).delta("default") for m in (model, again))
            torch.testing.assert_close(ours, theirs)


def test_latents_are_those_of_every_run(folder, monkeypatch):
    """The autoencoder is not rounded, so that its cache serves runs of any precision."""
    computed = []
    compute = LatentCache._compute
    monkeypatch.setattr(LatentCache, "_compute", lambda self, *a: (computed.append(a), compute(self, *a))[1])
    trained(folder, steps=0)
    assert len(computed) == 8
    computed.clear()
    trained(folder, *HALF, steps=0)
    assert not computed
