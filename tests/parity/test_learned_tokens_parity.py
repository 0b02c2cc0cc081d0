"""A learned word in diffusers: the file that a run writes gives a prompt the same context there."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_sd import tiny_sd_config, tiny_sd_model

from xdiffusion.checkpoints.learned_tokens import save_learned_tokens
from xdiffusion.checkpoints.native import save_model
from xdiffusion.commands import sd
from xdiffusion.training.settings import TextualInversionSettings
from xdiffusion.training.textual_inversion import learn_token


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Our model, and the folder that diffusers opens."""
    from omegaconf import OmegaConf

    folder = tmp_path_factory.mktemp("sd")
    config = tiny_sd_config(folder, "model.text_encoder.context_length=16")
    model = tiny_sd_model(config).eval()
    path = folder / "native.safetensors"
    settings = OmegaConf.to_container(config)
    save_model(path, model.state_dict(), config=settings, image_shape=model.image_shape, step=0)
    sd.main(["convert", str(path), str(folder / "pipeline"), "--to", "diffusers"])
    return model, folder / "pipeline"


@pytest.mark.parametrize("vectors", [1, 3])
def test_diffusers_reads_a_learned_word(base, vectors, tmp_path):
    model, folder = base
    word = f"<toy{vectors}>"
    learn_token(model.text_encoder, TextualInversionSettings(word, "red cat", vectors))
    with torch.no_grad():
        model.text_encoder.learned_embedding.add_(1.0)
    save_learned_tokens(tmp_path / "learned_embeds.safetensors", {word: model.text_encoder.learned_tokens()[word]})
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.load_textual_inversion(str(tmp_path), weight_name="learned_embeds.safetensors")
    prompt = f"a photo of {word}, large"
    with torch.no_grad():
        theirs, _ = pipeline.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
        ours, other = model.text_encoder.encode([prompt]), model.text_encoder.encode(["a photo of red cat, large"])
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert (ours - other).abs().max() > 0.01
