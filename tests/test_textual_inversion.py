"""Textual inversion and pivotal tuning: what is trained, what the files hold, and that a resumed run is the whole one."""

import pytest
import torch
from commands import ROOT, TRAIN, run_script, set_words
from picture_folders import write_pictures
from sd_files import write_native
from tiny import copies, equal_bits
from tiny_sd import tiny_sd_config, tiny_sd_model, tiny_sd_trainer

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.hashes import content_hash
from xdiffusion.checkpoints.learned_tokens import read_learned_tokens
from xdiffusion.checkpoints.lora_formats import LayerTable, read_lora, write_lora
from xdiffusion.lora import load_lora_weights
from xdiffusion.text_encoders.clip import CLIPTextEncoder
from xdiffusion.text_encoders.tokenizer import token_ids
from xdiffusion.training.loop import fit
from xdiffusion.training.settings import TextualInversionSettings
from xdiffusion.training.state import RunCheckpoints
from xdiffusion.training.task import parameters_by_rate
from xdiffusion.training.textual_inversion import learn_token
from xdiffusion.training.trainable import describe_model
from xdiffusion.training.weights_files import AdapterWeights, TokenWeights

NAME = "sd15_textual_inversion_tiny"


@pytest.fixture
def folder(tmp_path):
    write_pictures(tmp_path / "set", [(16, 16)] * 4, ["unused"])
    return tmp_path


def trainer_of(folder, lora, *overrides):
    config = tiny_sd_config(folder, *overrides, name=NAME, lora=lora)
    return tiny_sd_trainer(config, lora=lora), config


def checkpoints_of(folder, trainer, config, lora):
    base_hash = content_hash(trainer.model.base_weights())
    return RunCheckpoints(folder, (AdapterWeights if lora else TokenWeights)(config, base_hash))


@pytest.mark.parametrize("lora", [False, True], ids=["textual inversion", "pivotal tuning"])
def test_only_the_word_changes_and_in_pivotal_tuning_the_lora(folder, lora):
    trainer, _ = trainer_of(folder, lora, "textual_inversion.vectors=2")
    assert ("text_encoder.learned_embedding" in trainer.trainable) and (len(trainer.trainable) > 1) == lora
    base, before = copies(trainer.model.base_weights()), copies(trainer.trainable)
    for step in (1, 2):
        trainer.step(step)
    assert equal_bits(base, trainer.model.base_weights())
    assert all(not torch.equal(before[name], p) for name, p in trainer.trainable.items() if ".lora_A." not in name)


def test_a_word_alone_is_not_trained_by_what_its_base_does_not_predict(folder, capsys):
    """The network would stay one of eps; with a LoRA it can learn v."""
    base = write_native("sd15_tiny", folder / "base.safetensors")
    words = ["--config_path", ROOT / f"configs/image/sd/{NAME}.yaml", "--load_model_weights_from_checkpoint", base]
    words += ["--data_dir", folder / "set", "--dry_run", *set_words(["diffusion.prediction=v", "data.captions=[a <cat>]"])]
    assert run_script(TRAIN, *words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {base}: diffusion.prediction=eps there, v in the config; a word alone leaves the network")
    assert run_script(TRAIN, *words, "--use_lora_training") == 0


def test_the_word_starts_from_its_initialiser():
    encoder = CLIPTextEncoder(width=8, layers=1, heads=2).requires_grad_(False)
    learn_token(encoder, TextualInversionSettings("<toy>", "red cat", vectors=3))
    red, cat = token_ids("red cat")
    assert torch.equal(encoder.learned_embedding, encoder.token_embedding.weight[[red, cat, red]])
    assert [n for n, p in encoder.named_parameters() if p.requires_grad] == ["learned_embedding"]
    with torch.no_grad():
        assert torch.equal(encoder.encode(["a <toy> here"]), encoder.encode(["a red cat red here"]))


def test_the_description_of_a_run_names_the_word(folder):
    trainer, _ = trainer_of(folder, False, "textual_inversion.vectors=2")
    assert describe_model(trainer.model).endswith("learned word <cat>: 2 trainable embeddings of 8 numbers")


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"vectors": 0}, r"vectors=0 must be in 1\.\.75"),
        ({"initialiser": " "}, "holds no word"),
        ({"token": "cat"}, r"token='cat' is a word already: put it in <>"),
    ],
)
def test_settings_that_cannot_be(given, complaint):
    settings = TextualInversionSettings(**{"token": "<toy>", "initialiser": "cat"} | given)
    with pytest.raises(ValueError, match=complaint):
        learn_token(CLIPTextEncoder(width=8, layers=1, heads=2), settings)


def test_the_word_has_a_learning_rate_of_its_own(folder):
    trainer, _ = trainer_of(folder, True, "textual_inversion.learning_rate=1e-2", "optimizer.learning_rate=1e-4")
    groups = parameters_by_rate(trainer.task, trainer.trainable)
    assert sorted(groups) == pytest.approx([1, 100])
    assert [p is trainer.trainable["text_encoder.learned_embedding"] for p in groups[max(groups)]] == [True]


@pytest.mark.parametrize("lora", [False, True], ids=["textual inversion", "pivotal tuning"])
def test_a_resumed_run_is_the_whole_one(folder, lora):
    whole, config = trainer_of(folder, lora)
    files = checkpoints_of(folder / "run", whole, config, lora)
    losses = []
    fit(whole, first_step=1, on_step=lambda m: losses.append(m.loss), on_checkpoint=lambda n: files.save(whole, n))
    files.finish()
    resumed, _ = trainer_of(folder, lora)
    assert files.resume(resumed, str(files.path(2))) == 2
    assert [resumed.step(step).loss for step in (3, 4)] == losses[2:]
    assert equal_bits(copies(resumed.trainable), copies(whole.trainable))


@pytest.mark.parametrize("lora", [False, True], ids=["textual inversion", "pivotal tuning"])
def test_a_run_does_not_go_on_with_another_base(folder, lora):
    trainer, config = trainer_of(folder, lora)
    files = checkpoints_of(folder / "run", trainer, config, lora)
    files.save(trainer, 1)
    files.finish()
    other, _ = trainer_of(folder, lora)
    with torch.no_grad():
        other.model.network.conv_in.weight[0, 0] += 1
    files = checkpoints_of(folder / "run", other, config, lora)
    with pytest.raises(CheckpointError, match=rf"is of another base: \w+, this run's is {files.files.base_hash}"):
        files.resume(other, "auto")


def test_what_is_saved_is_read_by_sampling(folder):
    trainer, config = trainer_of(folder, False)
    trainer.step(1)
    files = checkpoints_of(folder / "run", trainer, config, False)
    files.save(trainer, 1)
    files.finish()
    assert files.path(1).name == "diffusion-1-tokens.safetensors"
    model = tiny_sd_model(config)
    model.text_encoder.add_tokens(read_learned_tokens(files.path(1)))
    with torch.no_grad():
        expected = trainer.model.text_encoder.encode(["a <cat>"])
        assert torch.equal(model.text_encoder.encode(["a <cat>"]), expected)


def test_lora_and_word_are_in_one_file_in_our_form_and_in_cloneofsimo_s(folder):
    trainer, config = trainer_of(folder, True)
    for step in (1, 2):
        trainer.step(step)
    files = checkpoints_of(folder / "run", trainer, config, True)
    files.save(trainer, 2)
    files.finish()
    ours = read_lora(files.path(2))
    word = trainer.model.text_encoder.learned_embedding.detach()
    assert torch.equal(ours.tokens["<cat>"], word)
    table = LayerTable.of(tiny_sd_model(config))
    write_lora(ours, folder / "simo.safetensors", "cloneofsimo", table)
    theirs = read_lora(folder / "simo.safetensors", table)
    assert torch.equal(theirs.tokens["<cat>"].view_as(word), word) and len(theirs.modules) == len(ours.modules)
    exported = folder / "run/diffusion-2-lora-tokens.safetensors"
    assert torch.equal(read_learned_tokens(exported)["<cat>"], word)
    model = tiny_sd_model(config)
    load_lora_weights(model, files.path(2))
    with torch.no_grad():
        assert torch.equal(model.text_encoder.encode(["<cat>"]), trainer.model.text_encoder.encode(["<cat>"]))
