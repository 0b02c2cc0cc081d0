"""A training step and the loop around it: what is drawn, what changes, what does not, and when it stops."""

import dataclasses
import math

import pytest
import torch
from accelerate.state import GradientState
from tiny import copies, equal_bits, tiny_config, tiny_images, tiny_model, tiny_trainer

from xdiffusion.diffusion.objective import loss
from xdiffusion.lora.inject import apply_lora_to_model
from xdiffusion.training.diffusion_task import DiffusionTask
from xdiffusion.training.divergence import TrainingDiverged
from xdiffusion.training.loop import fit, learning_rate_at
from xdiffusion.training.randomness import generator_at
from xdiffusion.training.settings import OptimizerSettings
from xdiffusion.training.trainable import describe_model, make_trainable


def run(trainer, steps):
    return [trainer.step(step) for step in range(1, steps + 1)]


def weights(trainer):
    return copies(trainer.model.state_dict())


def flat(tensors):
    return torch.cat([t.detach().flatten().clone() for t in tensors])


def assert_moved_alike(before, actual, expected):
    """AdamW blows rounding up where a gradient is next to nothing, so the whole change is compared."""
    assert (actual - expected).norm() < 0.01 * (expected - before).norm()


# one step


def test_a_step_written_out():
    """Batch, captions, objective, clipping, AdamW and average, each called by hand."""
    config = tiny_config("training.caption_dropout=0.5", "optimizer.max_grad_norm=0.1", "training.seed=5")
    data, trainer = tiny_images(), tiny_trainer(config)
    metrics = run(trainer, 2)

    model = tiny_model(config)
    make_trainable(model, config, lora=False)
    parameters = list(model.network.parameters())
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, betas=(0.9, 0.99), weight_decay=0.01)
    order = torch.randperm(60, generator=generator_at(5, "order", 0))
    for step, rows, rate, decay in ((1, slice(0, 8), 0.005, 2 / 11), (2, slice(8, 16), 0.01, 3 / 12)):
        wording, dropped = torch.rand(2, 8, generator=generator_at(5, "captions", step))
        index = order[rows]
        choices = [data.prompts.captions[label] for label in data.train.labels[index].tolist()]
        captions = [c[int(w * len(c))] if d >= 0.5 else "" for c, w, d in zip(choices, wording, dropped)]
        assert 0 < captions.count("") < 8
        x0, context = data.train.images[index] / 127.5 - 1, model.text_encoder.encode(captions)
        value = loss(model.network, model.schedule, "v", x0, context, generator=generator_at(5, "noise", step))
        optimizer.zero_grad()
        value.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters))
        for parameter in parameters:
            parameter.grad *= 0.1 / norm
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        averages = [decay * a + (1 - decay) * p.detach() for a, p in zip(averages, parameters)]

        assert (metrics[step - 1].step, metrics[step - 1].learning_rate) == (step, rate)
        assert metrics[step - 1].loss == pytest.approx(value.item(), rel=1e-4)
        assert metrics[step - 1].grad_norm == pytest.approx(norm, rel=1e-3)
        assert norm > 0.1  # so that there was something to clip
        assert metrics[step - 1].images_per_second > 0
    before = flat(tiny_model(config).network.parameters())
    assert_moved_alike(before, flat(trainer.model.network.parameters()), flat(parameters))
    assert_moved_alike(before, flat(trainer.by_name(trainer.ema.average).values()), flat(averages))


def test_training_repeats_bit_for_bit_and_the_seed_matters():
    first, second = tiny_trainer(tiny_config()), tiny_trainer(tiny_config())
    other = tiny_trainer(tiny_config("training.seed=1"))
    torch.manual_seed(99)  # no draw may come from the global generator
    losses = [[m.loss for m in run(trainer, 3)] for trainer in (first, second, other)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    assert equal_bits(weights(first), weights(second))


def test_no_environment_variable_divides_the_gradients(monkeypatch):
    norms = [run(tiny_trainer(tiny_config()), 1)[0].grad_norm]
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    GradientState._reset_state()  # it is of the first trainer of a process
    norms.append(run(tiny_trainer(tiny_config()), 1)[0].grad_norm)
    assert norms[0] == norms[1]


@pytest.mark.parametrize("lora", [False, True])
def test_two_accumulated_parts_are_the_whole_batch(lora):
    """The same images, captions, times and noise, however the batch is cut."""
    configs = [tiny_config(f"training.gradient_accumulation_steps={parts}", "training.caption_dropout=0.5") for parts in (1, 4)]
    whole, cut = (tiny_trainer(config, lora=lora) for config in configs)
    before = flat(whole.trainable.values())
    for a, b in zip(run(whole, 2), run(cut, 2)):
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4)
    assert_moved_alike(before, flat(cut.trainable.values()), flat(whole.trainable.values()))


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_changes_no_bit(lora):
    plain = tiny_trainer(tiny_config("lora.dropout=0.5"), lora=lora)
    frugal = tiny_trainer(tiny_config("training.gradient_checkpointing=true", "lora.dropout=0.5"), lora=lora)
    assert [m.loss for m in run(plain, 2)] == [m.loss for m in run(frugal, 2)]
    assert equal_bits(weights(plain), weights(frugal))


def test_min_snr_reaches_the_objective():
    plain, weighted = (tiny_trainer(tiny_config(*o)) for o in ([], ["diffusion.min_snr_gamma=0.5"]))
    assert weighted.step(1).loss < plain.step(1).loss


# what changes


@pytest.mark.parametrize("lora", [False, True])
def test_only_the_network_or_its_lora_changes(lora):
    trainer = tiny_trainer(tiny_config(), lora=lora)
    before = weights(trainer)
    run(trainer, 2)
    changed = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(trainer.trainable)
    assert all(name.startswith("network.") for name in changed)
    assert all((".lora_" in name) == lora for name in changed)
    assert not any(p.requires_grad for p in trainer.model.text_encoder.parameters())


TEXT = ["text_encoder_lora.rank=1", "text_encoder_lora.alpha=2", "text_encoder_lora.learning_rate=1e-3"]


def test_a_text_encoders_lora_is_trained_with_the_networks():
    trainer = tiny_trainer(tiny_config(*TEXT), lora=True)
    before = weights(trainer)
    run(trainer, 2)
    changed = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(trainer.trainable)
    assert {name.split(".")[0] for name in changed} == {"network", "text_encoder"}
    assert all(".lora_" in name for name in changed)
    assert not any(name.startswith("text_encoder.") for name in tiny_trainer(tiny_config(*TEXT)).trainable)


def test_a_changing_text_encoder_is_asked_anew_in_every_step():
    """Its embeddings are of its present weights, and carry a gradient."""
    trainer = tiny_trainer(tiny_config(*TEXT), lora=True)
    first = trainer.task.embed(["a seven"])
    run(trainer, 2)
    assert first.requires_grad
    assert not torch.equal(trainer.task.embed(["a seven"]), first)


@pytest.mark.parametrize("overrides", [TEXT, [*TEXT, "text_encoder_lora.dropout=0.5", "lora.use_dora=true"]])
def test_text_encoder_and_network_learn_alike_however_the_batch_is_cut(overrides):
    parts = [tiny_config(f"training.gradient_accumulation_steps={n}", *overrides) for n in (1, 2)]
    whole, cut = (tiny_trainer(config, lora=True) for config in parts)
    before = flat(whole.trainable.values())
    losses = [[m.loss for m in run(trainer, 2)] for trainer in (whole, cut)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2 if "dropout" in str(overrides) else 1e-5)
    if "dropout" not in str(overrides):
        assert_moved_alike(before, flat(cut.trainable.values()), flat(whole.trainable.values()))


def test_learning_rates_by_part_and_factor():
    """Every group follows the schedule, times its own rate over the network's."""
    trainer = tiny_trainer(tiny_config(*TEXT, "optimizer.lora_plus_ratio=4"), lora=True)
    metrics = trainer.step(1)
    filled = [torch.full_like(p, group["lr"]) for group in trainer.optimizer.param_groups for p in group["params"]]
    rates = {name: float(rate.max()) for name, rate in trainer.by_name(filled).items()}
    assert rates.keys() == trainer.trainable.keys()
    for name, rate in rates.items():
        of_part = 0.1 if name.startswith("text_encoder.") else 1.0
        assert rate == pytest.approx(metrics.learning_rate * of_part * (4 if ".lora_B." in name else 1)), name
    assert len(trainer.optimizer.param_groups) == 4
    assert len(tiny_trainer(tiny_config(), lora=True).optimizer.param_groups) == 1


@pytest.mark.parametrize("ratio", [0, -1])
def test_a_lora_plus_ratio_that_cannot_be(ratio):
    with pytest.raises(ValueError, match=f"optimizer.lora_plus_ratio={ratio} must be above 0"):
        tiny_trainer(tiny_config(f"optimizer.lora_plus_ratio={ratio}"), lora=True)


@pytest.mark.parametrize("lora", [False, True])
def test_bfloat16_computes_low_and_keeps_weights_high(lora):
    exact = tiny_trainer(tiny_config(), lora=lora)
    exact_losses = [m.loss for m in run(exact, 2)]
    trainer = tiny_trainer(tiny_config("training.mixed_precision=bf16"), lora=lora)
    seen = []
    layer = trainer.model.network.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    metrics = run(trainer, 2)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    state = trainer.optimizer.state_dict()["state"]
    assert {moments["exp_avg"].dtype for moments in state.values()} == {torch.float32}
    assert [m.loss for m in metrics] != exact_losses
    assert [m.loss for m in metrics] == pytest.approx(exact_losses, rel=0.05)


def test_the_network_is_left_in_channels_last():
    trainer = tiny_trainer(tiny_config())
    run(trainer, 1)
    assert trainer.model.network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("lora", [False, True])
def test_training_learns(lora):
    """On the same ten images over and over; the times are stratified, so losses of one step can be compared."""
    config = tiny_config("training.num_training_steps=12", "training.batch_size=10", "lora.target_modules=all")
    losses = [m.loss for m in run(tiny_trainer(config, tiny_images(train=10), lora=lora), 12)]
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])


# the loop


def test_fit_saves_in_its_rhythm_with_the_average_in_place():
    config = tiny_config("training.num_training_steps=5", "training.save_and_sample_every_n=2")
    trainer = tiny_trainer(config)
    steps, averages, checkpoints = [], [], []

    def on_step(metrics):
        assert trainer.model.training
        steps.append(metrics.step)
        averages.append(copies(trainer.by_name(trainer.ema.average)))

    def on_checkpoint(step):
        assert equal_bits(trainer.trainable, averages[-1])
        assert not trainer.model.training
        checkpoints.append(step)

    fit(trainer, first_step=1, on_step=on_step, on_checkpoint=on_checkpoint)
    assert steps == [1, 2, 3, 4, 5]
    assert checkpoints == [2, 4, 5]
    assert trainer.model.training
    undisturbed = tiny_trainer(config)
    run(undisturbed, 5)
    assert equal_bits(weights(trainer), weights(undisturbed))


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_before_any_weight_changes(bad):
    trainer = tiny_trainer(tiny_config())
    trainer.step(1)
    if bad == "loss":
        trainer.model.text_encoder.final_norm.bias.fill_(torch.nan)
        trainer.task.embed.rows, trainer.task.embed.table = {}, None
    else:
        trainer.model.network.conv_in.weight.register_hook(lambda gradient: gradient * torch.inf)
    before, average = weights(trainer), [a.clone() for a in trainer.ema.average]
    checkpoints = []
    with pytest.raises(TrainingDiverged, match=r"gradient norm (nan|inf) at step 2"):
        fit(trainer, first_step=2, on_step=lambda m: None, on_checkpoint=checkpoints.append)
    after = weights(trainer)
    assert all(torch.equal(after[n].nan_to_num(7), t.nan_to_num(7)) for n, t in before.items())
    assert all(torch.equal(a, b) for a, b in zip(average, trainer.ema.average))
    assert checkpoints == []


# learning rate and settings


def test_the_learning_rate_warms_up_and_falls():
    settings = OptimizerSettings(learning_rate=2.0, warmup_steps=10, schedule="cosine", final_factor=0.1)
    rate = lambda step: learning_rate_at(step, 110, settings)  # noqa: E731
    assert [rate(step) for step in (1, 5, 10)] == pytest.approx([0.2, 1.0, 2.0])
    assert rate(35) == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2))
    assert rate(60) == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rate(110) == pytest.approx(0.2)
    falling = [rate(step) for step in range(10, 111)]
    assert falling == sorted(falling, reverse=True)


def test_the_learning_rate_may_stay():
    settings = OptimizerSettings(learning_rate=2.0, warmup_steps=4, schedule="constant")
    assert [learning_rate_at(step, 6, settings) for step in (1, 4, 6)] == [0.5, 2.0, 2.0]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_no_warm_up_and_a_warm_up_longer_than_the_run(schedule):
    settings = OptimizerSettings(learning_rate=2.0, warmup_steps=0, schedule=schedule)
    assert learning_rate_at(1, 1000, settings) == pytest.approx(2.0, rel=1e-4)
    settings = dataclasses.replace(settings, warmup_steps=10)
    assert [learning_rate_at(step, 3, settings) for step in (1, 2, 3)] == pytest.approx([0.2, 0.4, 0.6])


def test_a_task_checks_its_settings():
    model = tiny_model(tiny_config())
    with pytest.raises(ValueError, match="must divide"):
        DiffusionTask(model, tiny_images(), tiny_config("training.gradient_accumulation_steps=3"))


def test_half_precision_of_a_gpu_is_refused_on_a_cpu():
    """accelerate would compute in float32 without a word."""
    with pytest.raises(ValueError, match=r"training.mixed_precision=fp16 needs a GPU; on a CPU take bf16 or no"):
        tiny_trainer(tiny_config("training.mixed_precision=fp16"))


# what a run says of itself


def test_a_run_counts_its_parameters():
    config = tiny_config()
    model = tiny_model(config)
    network = sum(t.numel() for n, t in model.state_dict().items() if n.startswith("network."))
    encoder = sum(t.numel() for t in model.text_encoder.state_dict().values())
    make_trainable(model, config, lora=False)
    plain = "parameters: network {}, text encoder {} (frozen), autoencoder 0 (frozen)"
    assert describe_model(model) == plain.format(f"{network:,}", f"{encoder:,}")

    make_trainable(model, config, lora=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    share = f"{100 * count / network:.2f}% of the network's {network:,}"
    lora = f"LoRA: {count:,} trainable parameters in {len(trained) // 2} layers, {share}"
    frozen = plain.format(f"{network:,} (frozen)", f"{encoder:,}")
    assert describe_model(model) == f"{frozen}\n{lora}"
    assert describe_model(model, config).startswith("data:\n  kind: image/digits")

    apply_lora_to_model(model.text_encoder, 1)
    share = f"{100 * 8 * 8 / encoder:.2f}% of the text encoder's {encoder:,}"  # four layers of 8 to 8
    assert describe_model(model) == f"{frozen}\n{lora}\nLoRA: 64 trainable parameters in 4 layers, {share}"


def test_a_loras_settings_are_the_configs():
    overrides = ["lora.rank=3", "lora.alpha=6", "lora.dropout=0.25", "lora.target_modules=[to_q]"]
    variant = ["lora.use_rslora=true", "lora.use_dora=true", "lora.init=pissa", "lora.rank_pattern={attn1.to_q: 2}"]
    config = tiny_config(*overrides, *variant)
    by_config, by_hand = tiny_model(config), tiny_model(config)
    make_trainable(by_config, config, lora=True)
    kwargs = {"use_rslora": True, "use_dora": True, "init": "pissa", "rank_pattern": {"attn1.to_q": 2}}
    apply_lora_to_model(by_hand.network, 3, 6.0, 0.25, ["to_q"], **kwargs)
    adapters = [{n: m.adapters for n, m in model.named_modules() if hasattr(m, "adapters")} for model in (by_config, by_hand)]
    assert adapters[0] == adapters[1]
    assert len(adapters[0]) == 8
