"""A learned word in diffusers: the file that a run writes gives a prompt the same context there."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_sd import tiny_sd_config, tiny_sd_model

from xdiffusion.checkpoints.learned_tokens import save_learned_tokens
from xdiffusion.checkpoints.native import save_model
from xdiffusion.commands import sd
from xdiffusion.loading import load_model
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


@pytest.fixture
def saved(base, tmp_path):
    """A pipeline of diffusers that was saved with words of its own, one of three vectors, and the folder."""
    _, folder = base
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    added = ["<cat>", "<cat>_1", "<cat>_2", "dog_toy"]
    assert pipeline.tokenizer.add_tokens(added) == 4
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    with torch.no_grad():
        rows = pipeline.text_encoder.get_input_embeddings().weight[-64:]
        rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)))
    pipeline.save_pretrained(tmp_path / "saved")
    return pipeline, tmp_path / "saved"


def names_in_the_tokenizer(pipeline, folder, form):
    """Leave the added words to one of the files by which versions of transformers name them."""
    named, tokenizer = pipeline.tokenizer.get_added_vocab(), folder / "tokenizer"
    if form == "tokenizer.json" and not (tokenizer / form).is_file():
        pytest.skip("this transformers saves no tokenizer.json")
    for other in {"tokenizer.json", "added_tokens.json"} - {form}:
        (tokenizer / other).unlink(missing_ok=True)
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    if form == "added_tokens.json":
        (tokenizer / form).write_text(json.dumps(named))
    if form == "tokenizer_config.json":
        config["added_tokens_decoder"] = {str(i): {"content": name} for name, i in named.items()}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("form", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_words_that_a_pipeline_was_saved_with_are_read(saved, form, capsys):
    pipeline, folder = saved
    names_in_the_tokenizer(pipeline, folder, form)
    model, _ = load_model(folder)
    assert f"{folder} has words of its own: <cat>, dog_toy" in capsys.readouterr().err
    assert {name: len(rows) for name, rows in model.text_encoder.learned_tokens().items()} == {"<cat>": 3, "dog_toy": 1}
    for prompt in ("a photo of <cat>, large", "dog_toy and <cat>", "a red cat"):
        with torch.no_grad():
            theirs, _ = pipeline.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
            torch.testing.assert_close(model.text_encoder.encode([prompt]), theirs, rtol=1e-4, atol=1e-5)
    plain = model.text_encoder.encode(["a photo of cat, large"])
    assert (model.text_encoder.encode(["a photo of <cat>, large"]) - plain).abs().max() > 0.01
