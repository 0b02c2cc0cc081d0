"""A run that was stopped and resumed is, bit for bit, the run that was not."""

import io
import zipfile
from threading import Event

import pytest
import torch
from tiny import copies, equal_bits, tiny_config, tiny_model, tiny_trainer

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.hashes import content_hash
from xdiffusion.checkpoints.lora_formats import read_lora
from xdiffusion.checkpoints.native import load_model_file
from xdiffusion.checkpoints.reading import load_pickled, load_safetensors
from xdiffusion.lora.inject import lora_layers
from xdiffusion.training import weights_files
from xdiffusion.training.loop import fit
from xdiffusion.training.state import RunCheckpoints, frozen_factors, saving_path, state_path
from xdiffusion.training.weights_files import AdapterWeights, ModelWeights

BASE_HASH = "0123456789abcdef"
HALF = ["training.mixed_precision=bf16", "training.half_frozen_weights=true"]
VARIANTS = {
    "base": ([], False),
    "lora": (["lora.target_modules=all"], True),
    "lora in half precision files": (["lora.target_modules=all", "checkpoints.lora_dtype=float16"], True),
    "lora with dropout": (["lora.dropout=0.5", "training.gradient_accumulation_steps=2"], True),
    "dora and lora+": (["lora.use_dora=true", "lora.use_rslora=true", "optimizer.lora_plus_ratio=4"], True),
    "pissa": (["lora.init=pissa", "lora.target_modules=all", "lora.rank_pattern={conv_out: 1}"], True),
    "text encoder too": (["text_encoder_lora.rank=1", "text_encoder_lora.learning_rate=1e-3"], True),
    "bfloat16": (["training.mixed_precision=bf16"], False),
    "half precision base": ([*HALF, "lora.target_modules=all", "text_encoder_lora.rank=1"], True),
    "half precision base, dora": ([*HALF, "lora.use_dora=true"], True),
    "half precision base, pissa": ([*HALF, "lora.init=pissa"], True),
}


def fresh(folder, overrides=(), lora=False):
    """A trainer and its checkpoints, as a new process has them."""
    config = tiny_config("training.num_training_steps=5", "training.save_and_sample_every_n=2", *overrides)
    files = AdapterWeights(config, BASE_HASH) if lora else ModelWeights(config)
    return tiny_trainer(config, lora=lora), RunCheckpoints(folder, files)


def train(trainer, checkpoints, first_step=1, stop_after=5):
    """The losses of the steps from first_step on; the process dies after stop_after."""
    losses = []

    def on_step(metrics):
        losses.append((metrics.step, metrics.loss, metrics.grad_norm, metrics.learning_rate))
        if metrics.step == stop_after + 1:
            raise KeyboardInterrupt

    try:
        fit(trainer, first_step=first_step, on_step=on_step, on_checkpoint=lambda n: checkpoints.save(trainer, n))
    except KeyboardInterrupt:
        losses.pop()
    checkpoints.finish()
    return losses


def optimizer_tensors(trainer):
    return {f"{i}.{k}": v for i, moments in trainer.optimizer.state_dict()["state"].items() for k, v in moments.items()}


@pytest.mark.parametrize(("overrides", "lora"), VARIANTS.values(), ids=VARIANTS)
def test_a_resumed_run_repeats_the_uninterrupted_one(overrides, lora, tmp_path):
    whole, whole_files = fresh(tmp_path / "whole", overrides, lora)
    expected = train(whole, whole_files)

    first, files = fresh(tmp_path / "cut", overrides, lora)
    losses = train(first, files, stop_after=3)  # its last checkpoint is that of step 2
    torch.manual_seed(123)
    second, files = fresh(tmp_path / "cut", overrides, lora)
    assert files.resume(second, "auto") == 2
    assert losses + train(second, files, first_step=3) == expected[:3] + expected[2:]

    assert equal_bits(second.model.state_dict(), whole.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(second.ema.average, whole.ema.average))
    assert equal_bits(optimizer_tensors(second), optimizer_tensors(whole))
    for file in (files, whole_files):
        assert file.newest() == file.path(5)
    (tensors, header), (whole_tensors, whole_header) = (load_safetensors(f.path(5)) for f in (files, whole_files))
    assert equal_bits(tensors, whole_tensors) and header == whole_header


def test_a_checkpoint_holds_the_average_and_its_state_the_weights(tmp_path):
    trainer, files = fresh(tmp_path)
    train(trainer, files)
    saved = load_model_file(tmp_path / "diffusion-5.safetensors")
    assert saved.tensors.keys() == trainer.model.state_dict().keys()
    for name, average in trainer.by_name(trainer.ema.average).items():
        assert torch.equal(saved.tensors[name], average)
        assert not torch.equal(average, trainer.trainable[name])
    assert (saved.step, saved.image_shape) == (5, (1, 12, 12))
    assert saved.config["training"]["num_training_steps"] == 5
    state = load_pickled(tmp_path / "diffusion-5.state.pt")
    assert equal_bits(state["trained"], {n: p.data for n, p in trainer.trainable.items()})


def test_a_lora_is_written_as_it_was_while_the_run_goes_on(tmp_path, monkeypatch):
    """By a thread: what it copies must not be what the next step changes."""
    may_write, write = Event(), weights_files.write_lora
    monkeypatch.setattr(weights_files, "write_lora", lambda *a, **k: may_write.wait(60) and write(*a, **k))
    trainer, files = fresh(tmp_path, ["training.ema_decay=0", "lora.use_dora=true"], lora=True)
    trainer.step(1)
    with trainer.ema.in_place():
        files.save(trainer, 1)
        expected = {n: f for n, layer in lora_layers(trainer.model) for f in [copies(vars_of(layer.factors("default")))]}
    trainer.step(2)
    assert not files.path(1).exists()
    may_write.set()
    files.finish()
    found = {name: vars_of(factors) for name, factors in read_lora(files.path(1)).modules.items()}
    assert found.keys() == expected.keys() and all(equal_bits(found[name], expected[name]) for name in found)


def vars_of(factors):
    return {name: value for name, value in vars(factors).items() if isinstance(value, torch.Tensor)}


def test_a_lora_run_leaves_the_base_untouched(tmp_path):
    trainer, files = fresh(tmp_path, lora=True)
    before = content_hash(trainer.model.base_weights())
    train(trainer, files)
    assert content_hash(trainer.model.base_weights()) == before == content_hash(tiny_model(tiny_config()).state_dict())


def test_a_checkpoint_is_weights_and_state(tmp_path):
    _, files = fresh(tmp_path)
    for name in ("diffusion-9.safetensors", "diffusion-9.state.pt", "diffusion-10.safetensors", "diffusion-10.state.pt",
                 "diffusion-20.safetensors", "diffusion-30.state.pt", "diffusion-x.state.pt",
                 "diffusion-40-lora.safetensors", "diffusion-40-lora.state.pt"):  # fmt: skip
        (tmp_path / name).touch()
    assert files._steps() == [9, 10]
    _, lora_files = fresh(tmp_path, lora=True)
    assert lora_files._steps() == [40]


def test_resume_by_name_and_from_nothing(tmp_path, capsys):
    trainer, files = fresh(tmp_path)
    assert files.resume(trainer, "auto") == 0
    train(trainer, files)
    for name, line in (
        ("diffusion-2.safetensors", ""),
        ("diffusion-2.pt", "reading diffusion-2.safetensors beside it"),
    ):
        assert files.resume(trainer, str(tmp_path / name)) == 2
        assert capsys.readouterr().err.rstrip().endswith(line)
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*; there are: diffusion-2\.safetensors"):
        files.resume(trainer, str(tmp_path / "diffusion-3.safetensors"))


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def in_a_tensor(content: bytes) -> int:
    """A place in the numbers near the end; of a zip, whose own words behind them differ by version, in its largest entry."""
    if not content.startswith(b"PK"):
        return len(content) - 2000
    largest = max(zipfile.ZipFile(io.BytesIO(content)).infolist(), key=lambda entry: entry.file_size)
    return largest.header_offset + largest.file_size // 2 + 200  # its header is shorter


DAMAGE = {
    "truncated": lambda content: content[:1000],
    "empty": lambda _: b"",
    "a bit in the middle": lambda content: flipped(content, len(content) // 2),
    "a bit of a tensor": lambda content: flipped(content, in_a_tensor(content)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("part", ["weights", "state"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(part, damage, tmp_path, capsys):
    trainer, files = fresh(tmp_path)
    train(trainer, files)
    path = files.path(5) if part == "weights" else state_path(files.path(5))
    path.write_bytes(damage(path.read_bytes()))
    assert files.resume(trainer, "auto") == 4
    assert path.name in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=path.name):
        files.resume(trainer, str(files.path(5)))
    path.unlink()
    with pytest.raises(CheckpointError, match=path.name):
        files.resume(trainer, str(files.path(5)))
    assert files.resume(trainer, "auto") == 4
    assert path.name in capsys.readouterr().err


def test_where_no_checkpoint_is_whole_the_run_does_not_start_afresh(tmp_path):
    trainer, files = fresh(tmp_path)
    train(trainer, files)
    for step in (2, 4, 5):
        files.path(step).write_bytes(files.path(step - step % 2 or 2).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is whole, of 3 that stand there"):
        files.resume(trainer, "auto")


@pytest.mark.parametrize("part", ["weights", "state"])
def test_where_all_checkpoints_lack_a_file_the_run_does_not_start_afresh(part, tmp_path, capsys):
    trainer, files = fresh(tmp_path)
    train(trainer, files)
    missing = [files.path(step) if part == "weights" else state_path(files.path(step)) for step in (2, 4, 5)]
    for path in missing:
        path.unlink()
    with pytest.raises(CheckpointError, match="is whole, of 3 that stand there; to start afresh, move them away"):
        files.resume(trainer, "auto")
    err = capsys.readouterr().err
    assert all(path.name in err for path in missing)
    assert files.newest() is None


def test_a_run_that_was_killed_in_its_first_checkpoint_starts_afresh(tmp_path, capsys):
    """Where an earlier one's weights stand too, whose states are set aside."""
    trainer, files = fresh(tmp_path)
    train(trainer, files, stop_after=4)
    files.set_aside(after=2)
    state_path(files.path(2)).rename(saving_path(files.path(2)))
    assert files.resume(trainer, "auto") == 0
    assert "no file at" in capsys.readouterr().err


def test_weights_of_a_later_write_do_not_belong_to_the_old_state(tmp_path, capsys):
    """A run that went back and was killed between its two files of a step."""
    trainer, files = fresh(tmp_path)
    train(trainer, files)
    files.path(5).write_bytes(files.path(4).read_bytes())
    assert files.newest() == files.path(4)
    assert "it is not the file that diffusion-5.state.pt was written for" in capsys.readouterr().err


def test_a_failed_write_is_told_of_and_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    trainer, files = fresh(tmp_path)
    train(trainer, files, stop_after=3)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    files.save(trainer, 3)
    with pytest.raises(CheckpointError, match=r"cannot write .*diffusion-3\.state\.pt: .*No space left"):
        files.finish()
    assert files.newest() == files.path(2)
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_file_whose_number_is_none_is_no_checkpoint(tmp_path):
    """Superscripts are digits to Python, and no numbers."""
    trainer, checkpoints = fresh(tmp_path)
    train(trainer, checkpoints, stop_after=2)
    for name in ("²", "٣", "-1", "3 copy", ""):
        (tmp_path / f"diffusion-{name}.state.pt").touch()
    assert checkpoints.newest_step() == 2


def test_pissas_first_factors_come_from_the_file(tmp_path):
    """Where they are computed anew, by another library or thread count, an SVD may round otherwise."""
    overrides = ["lora.init=pissa"]
    trainer, files = fresh(tmp_path, overrides, lora=True)
    train(trainer, files)
    again, files = fresh(tmp_path, overrides, lora=True)
    expected = copies(frozen_factors(again))
    assert expected
    for factor in frozen_factors(again).values():
        factor.mul_(-1)
    files.resume(again, "auto")
    assert equal_bits(frozen_factors(again), expected)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    trainer, files = fresh(tmp_path / "base")
    train(trainer, files)
    lora_trainer, lora_files = fresh(tmp_path / "lora", lora=True)
    train(lora_trainer, lora_files)
    base, lora = (str(f.path(5)) for f in (files, lora_files))

    wider, wider_files = fresh(tmp_path, ["model.network.channels=[32,32]"])
    with pytest.raises(CheckpointError, match=r"diffusion-5\.safetensors does not belong to this run: .* has shape"):
        wider_files.resume(wider, base)
    rank3, rank3_files = fresh(tmp_path, ["lora.rank=3"], lora=True)
    with pytest.raises(CheckpointError, match=r"does not belong to this run: .*lora_A.default has shape \(2, "):
        rank3_files.resume(rank3, lora)
    other_targets, other_files = fresh(tmp_path, ["lora.target_modules=[conv_in]"], lora=True)
    with pytest.raises(CheckpointError, match="does not belong to this run"):
        other_files.resume(other_targets, lora)
    with pytest.raises(CheckpointError, match="is a LoRA"):
        files.resume(trainer, lora)
    with pytest.raises(CheckpointError, match="is not a LoRA file"):
        lora_files.resume(lora_trainer, base)
    other_base = RunCheckpoints(tmp_path / "lora", AdapterWeights(tiny_config(), "f" * 16))
    with pytest.raises(CheckpointError, match=f"is of another base: {BASE_HASH}, this run's is {'f' * 16}"):
        other_base.resume(lora_trainer, "auto")


def test_a_run_does_not_go_on_beside_another_frozen_part(tmp_path):
    trainer, files = fresh(tmp_path)
    train(trainer, files)
    other, files = fresh(tmp_path)
    other.model.text_encoder.token_embedding.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match=r"does not belong to this run: its frozen text_encoder is another one"):
        files.resume(other, "auto")


def test_optimizer_settings_are_those_of_the_config_that_resumes(tmp_path):
    trainer, files = fresh(tmp_path)
    train(trainer, files)
    other, files = fresh(tmp_path, ["optimizer.weight_decay=0.5", "optimizer.betas=[0.5, 0.6]"])
    assert files.resume(other, "auto") == 5
    assert {(g["weight_decay"], tuple(g["betas"])) for g in other.optimizer.param_groups} == {(0.5, (0.5, 0.6))}
    assert equal_bits(optimizer_tensors(other), optimizer_tensors(trainer))


def test_saving_changes_nothing(tmp_path):
    trainer, files = fresh(tmp_path, lora=True)
    trainer.step(1)
    before = copies(trainer.model.state_dict())
    with trainer.ema.in_place():
        files.save(trainer, 1)
    files.finish()
    assert equal_bits(trainer.model.state_dict(), before)
    file = read_lora(files.path(1))
    assert (file.step, file.config["lora"]["rank"]) == (1, 2)


def test_a_state_of_more_weights_than_the_run_has_is_refused(tmp_path):
    trainer, files = fresh(tmp_path, ["lora.target_modules=all"], lora=True)
    train(trainer, files)
    other, files = fresh(tmp_path, ["lora.target_modules=attention"], lora=True)
    with pytest.raises(CheckpointError, match="does not belong to this run"):
        files.resume(other, "auto")
