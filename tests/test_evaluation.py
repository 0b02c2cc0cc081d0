"""The scores: each against its definition computed another way, and in cases whose answer is known."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import scipy.linalg
import torch
from tiny import SIZE, label_of, tiny_config, tiny_images, tiny_model
from torch import nn

from xdiffusion import scoring
from xdiffusion.build import build_sampling
from xdiffusion.data.captions import PromptTable
from xdiffusion.data.image_set import ImageSet, Split, invert
from xdiffusion.diffusion.objective import squared_error
from xdiffusion.diffusion.predictions import PREDICTIONS
from xdiffusion.diffusion.schedules import BetaSchedule, CosineSchedule
from xdiffusion.evaluation.background import background_brightness, background_mask
from xdiffusion.evaluation.frechet import frechet_distance
from xdiffusion.evaluation.gap import fixed_draws, gap_closed, gap_interval
from xdiffusion.evaluation.judge import train_judge
from xdiffusion.held_out import gap_scores
from xdiffusion.lora import apply_lora_to_model, get_lora_parameters, merge_lora_weights
from xdiffusion.scoring import Depth, score

# Frechet distance


@pytest.mark.parametrize(("rows", "columns"), [(200, 5), (4, 6)], ids=["full rank", "singular"])
def test_frechet_distance_is_scipys(rows, columns, generator):
    a = torch.randn(rows, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    b = torch.randn(rows + 3, columns, generator=generator) + torch.arange(columns)
    cov_a, cov_b = (np.cov(x.double().numpy(), rowvar=False) for x in (a, b))
    shift = a.double().mean(0) - b.double().mean(0)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = float(shift @ shift) + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_in_closed_form(generator):
    a = torch.randn(50, 4, generator=generator, dtype=torch.float64) + 1
    assert all(0 <= frechet_distance(part, part) < 1e-9 for part in (a, *a.split(5)))
    assert frechet_distance(a, a[torch.randperm(50, generator=generator)]) == pytest.approx(0, abs=1e-9)
    shift = torch.tensor([1.0, -2.0, 0.0, 3.0])
    assert frechet_distance(a, a + shift) == pytest.approx(14.0)
    twice = float(a.mean(0).square().sum() + a.var(0).sum())  # |2m - m|^2 + tr(4S + S - 2*2S)
    assert frechet_distance(a, 2 * a) == pytest.approx(twice)


def test_frechet_distance_needs_finite_features_of_two_images():
    good = torch.ones(3, 2)
    with pytest.raises(ValueError, match="the second set has 1 rows; a covariance needs at least 2"):
        frechet_distance(good, good[:1])
    with pytest.raises(ValueError, match="the first set holds features that are not finite"):
        frechet_distance(good * torch.nan, good)


# background


def test_background_is_what_is_dark_in_nearly_every_image():
    images = torch.zeros(100, 1, 1, 4, dtype=torch.uint8)
    images[:1, ..., 1] = 255  # bright in 1 of 100
    images[:2, ..., 2] = 128  # bright in 2 of 100
    images[..., 3] = 127  # grey, and still below half
    mask = background_mask(images)
    assert mask.flatten().tolist() == [True, True, False, True]


def test_background_brightness_counts_masked_pixels_alone():
    images = torch.tensor([[-1.0, 1.0, 0.0], [0.5, 1.0, 0.0]]).view(2, 1, 1, 3)
    mask = torch.tensor([True, False, True]).view(1, 1, 3)
    assert background_brightness(images, mask).tolist() == pytest.approx([0.25, 0.625])


# gap_closed


def test_gap_closed_is_the_share_of_the_way():
    assert gap_closed(base=0.1, base_inverted=0.5, lora_inverted=0.5) == 0
    assert gap_closed(base=0.1, base_inverted=0.5, lora_inverted=0.1) == 1
    assert gap_closed(base=0.1, base_inverted=0.5, lora_inverted=0.2) == pytest.approx(0.75)
    assert gap_closed(base=0.1, base_inverted=0.5, lora_inverted=0.7) == pytest.approx(-0.5)
    assert math.isnan(gap_closed(base=0.5, base_inverted=0.5, lora_inverted=0.4))


def test_fixed_draws_are_fixed_and_cover_the_times():
    draws, again, other = (fixed_draws(30, (1, 2, 2), count=20, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(draws, again))
    assert not any(torch.equal(a, b) for a, b in zip(draws, other))
    assert len(set(draws.index.tolist())) == 20
    assert draws.eps.shape == (20, 1, 2, 2)
    torch.testing.assert_close(draws.t.sort().values, torch.linspace(0.025, 0.975, 20))
    assert not torch.equal(draws.t, draws.t.sort().values)
    assert len(fixed_draws(5, (1, 2, 2), count=20).index) == 5


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", [CosineSchedule(), BetaSchedule()])
def test_negating_input_and_output_is_the_perfect_adapter(prediction, schedule, generator):
    """f(x, t) = -f_base(-x, t) has on inverted images, with the opposite noise, the base's loss on normal ones."""
    model = tiny_model(tiny_config())
    x0 = torch.rand(6, 1, SIZE, SIZE, generator=generator) * 2 - 1
    eps, t = torch.randn(x0.shape, generator=generator), torch.linspace(0.1, 0.9, 6)
    context = torch.randn(6, 4, 8, generator=generator)

    def negated(xt, time, context):
        return -model.network(-xt, time, context)

    with torch.no_grad():
        base = squared_error(model.network, schedule, prediction, x0, eps, t, context)
        oracle = squared_error(negated, schedule, prediction, -x0, -eps, t, context)
        base_inverted = squared_error(model.network, schedule, prediction, -x0, eps, t, context)
    assert torch.equal(oracle, base)
    assert not torch.allclose(base_inverted, base, rtol=1e-2)


def lora_model(fill):
    model = tiny_model(tiny_config())
    apply_lora_to_model(model.network, 2, 4.0, 0.0, "all")
    with torch.no_grad():
        for parameter in get_lora_parameters(model):
            if fill:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    return model.eval()


def test_an_adapter_that_does_nothing_closes_no_gap():
    data = tiny_images()
    scores = gap_scores(lora_model(fill=False), invert(data), data, 20, 0)
    assert scores == {"gap_closed": 0, "gap_closed_interval": (0, 0)}


def test_gap_scores_from_their_three_losses():
    """Each loss from a model of its own: the adapter folded in, and no adapter at all."""
    data, model = tiny_images(test=200), lora_model(fill=True)
    scores = gap_scores(model, invert(data), data, 200, 0)
    twins = replace(data, test=replace(data.test, variants=2))
    of_twins = gap_scores(model, invert(twins), twins, 200, 0)
    assert all(layer.enabled for module in model.modules() for layer in getattr(module, "adapters", {}).values())

    draws = fixed_draws(len(data.test), (1, SIZE, SIZE))
    context = model.text_encoder.encode([str(label) for label in data.test.labels[draws.index].tolist()])
    normal = data.test.images[draws.index].float() / 127.5 - 1

    def loss(network, x0):
        with torch.no_grad():
            return squared_error(network, model.schedule, "v", x0, draws.eps, draws.t, context)

    bare = tiny_model(tiny_config()).network
    merge_lora_weights(model.network)
    base, base_inverted, inverted = loss(bare, normal), loss(bare, -normal), loss(model.network, -normal)
    gained, way = base_inverted - inverted, base_inverted - base
    gap = float(gained.mean() / way.mean())
    assert scores["gap_closed"] == pytest.approx(gap, rel=1e-3)
    assert abs(gap) > 0.01

    # the delta method's spread of a ratio of means of pairs
    half = 1.96 * float((gained - gap * way).square().sum().sqrt()) / len(gained) / abs(float(way.mean()))
    low, high = scores["gap_closed_interval"]
    assert low < gap < high and high - low == pytest.approx(2 * half, rel=0.2)
    assert of_twins["gap_closed"] == scores["gap_closed"] and of_twins["gap_closed_interval"] != (low, high)


@pytest.mark.parametrize("variants", [1, 4])
def test_an_interval_of_gap_closed_holds_the_truth_as_often_as_it_says(variants, generator):
    """Losses of 0.5, 0.3 and 0.1 that share the chance of the images, and a little of their own: half of the gap."""
    held = {"paired": 0, "wide": 0}
    for _ in range(100):
        groups = torch.arange(200) % (200 // variants)
        of_image, of_draw = (torch.randn(4, 200, generator=generator) for _ in range(2))
        own = 0.05 * of_image[:3, groups] + 0.03 * of_draw[:3]
        losses = torch.tensor([0.1, 0.5, 0.3])[:, None] + 0.5 * of_image[3, groups] + own
        low, high = gap_interval(losses, groups, resamples=80, seed=0)
        held["paired"] += low <= 0.5 <= high
        held["wide"] += high - low > 0.3  # the chance of the images alone, which no pair has
    assert held["paired"] >= 88 and held["wide"] == 0


# all scores of a model


@pytest.fixture
def good_judge(monkeypatch):
    monkeypatch.setattr(scoring, "train_judge", partial(train_judge, steps=150, batch_size=20))


def scored(model, data, tmp_path, **arguments):
    config = tiny_config()
    sampling = build_sampling(config, model.schedule)
    defaults = {"num_samples": 20, "seed": 0, "has_lora": False, "judge_folder": tmp_path}
    return score(model, data, sampling, **defaults | arguments).scores


def test_the_scores_of_a_model(good_judge, tmp_path):
    model = tiny_model(tiny_config()).eval()
    scores = scored(model, tiny_images(), tmp_path)
    assert scores.keys() == {
        "prompt_accuracy", "frechet_distance", "frechet_floor", "frechet_floor_balanced", "background", "gap_closed",
        "seconds_per_image", "judge_accuracy", "dataset", "num_samples", "real_images", "seed",
    }  # fmt: skip
    assert scores["gap_closed"] is None
    assert (scores["dataset"], scores["num_samples"], scores["seed"]) == ("image/digits", 20, 0)
    assert scores["real_images"] == 20 and scored(model, tiny_images(9), tmp_path)["real_images"] == 9
    assert 0 <= scores["prompt_accuracy"] < 0.5  # a fresh network draws noise
    assert scores["frechet_distance"] > 2 * scores["frechet_floor"] > 0

    del scores["seconds_per_image"]
    again, other = (scored(model, tiny_images(), tmp_path, seed=seed) for seed in (0, 1))
    assert {k: again[k] for k in scores} == scores
    assert other["frechet_distance"] != scores["frechet_distance"]


def test_real_images_to_compare_with_are_drawn_from_all_and_noise_by_the_seed(monkeypatch):
    seeds = []

    def generate(model, prompts, generators, **_):
        seeds.append([noise.initial_seed() for noise in generators])
        return torch.zeros(20, 1, SIZE, SIZE)

    monkeypatch.setattr(scoring, "generate", generate)
    drawn = [scoring.draw_samples(None, tiny_images(), {}, 20, seed).real for seed in (0, 1)]
    assert all(len(real.unique()) == 20 <= real.max() for real in drawn) and not torch.equal(*drawn)
    assert seeds == [list(range(20)), list(range(1, 21))]


FULL = {"precision", "recall", "density", "coverage", "copies", "diversity", "data_copying", "nearest_distance"}


def test_a_full_depth_adds_to_the_scores(good_judge, tmp_path):
    """Samples of a fresh network are noise: not among the real images, far from them, and no copies."""
    model, data = tiny_model(tiny_config()).eval(), tiny_images(test=40)
    plain = scored(model, data, tmp_path)
    full = scored(model, data, tmp_path, depth=Depth(resamples=20, full=True))
    assert {k: full[k] for k in plain if k != "seconds_per_image"} == {
        k: v for k, v in plain.items() if k != "seconds_per_image"
    }
    intervals = {"prompt_accuracy", "frechet_distance", "background", *FULL}
    assert {key for key in full if key.endswith("_interval")} == {f"{name}_interval" for name in intervals}
    for name in intervals:
        low, high = full[f"{name}_interval"]
        assert low <= full[name] <= high, name
    assert full["precision"] < full["precision_real"]
    assert full["coverage"] < full["coverage_real"]
    assert full["data_copying"] == 0
    assert full["nearest_distance"] > 2 * full["nearest_distance_real"]
    assert full["bits_per_dim"] is None
    assert full["loss_curve"].keys() == {"model"}
    json.dumps(full)


def test_intervals_take_variants_of_a_held_out_image_as_one(good_judge, tmp_path, monkeypatch):
    """Of 20 images four times each: the scores are the same, and what is of held-out images is less certain."""
    data, twenty = tiny_images(), torch.arange(80) % 20
    images = data.test.images[twenty] + torch.arange(80, dtype=torch.uint8).view(-1, 1, 1, 1) // 20
    noise = 0.3 * torch.randn(80, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    drawn = (data.train.floats(twenty) + noise * torch.linspace(0, 1, 80).view(-1, 1, 1, 1)).clamp(-1, 1)
    monkeypatch.setattr(scoring, "generate", lambda model, prompts, generators, **_: -drawn)
    plain, grouped = (
        scored(
            lora_model(fill=True), invert(replace(data, test=Split(images, data.test.labels[twenty], variants))), tmp_path,
            num_samples=80, has_lora=True, depth=Depth(resamples=100, full=True),
        )
        for variants in (1, 4)
    )  # fmt: skip
    of_held_out = {"frechet_distance", "recall", "coverage", "data_copying"}
    names = [key.removesuffix("_interval") for key in plain if key.endswith("_interval")]
    width = {n: [s[f"{n}_interval"][1] - s[f"{n}_interval"][0] for s in (plain, grouped)] for n in names}
    assert {name for name, (of_rows, of_groups) in width.items() if of_groups > 1.2 * of_rows} == of_held_out
    of_held_out |= {"gap_closed"}  # whose chance is that of times and noise more than of images
    left_out = {"seconds_per_image", "loss_curve", *(f"{name}_interval" for name in of_held_out)}
    assert {k: v for k, v in plain.items() if k not in left_out} == {k: v for k, v in grouped.items() if k not in left_out}
    first, second = (scores["loss_curve"]["model"] for scores in (plain, grouped))
    assert first["loss"] == second["loss"] and first["low"] != second["low"]


def test_samples_that_are_training_images_are_found_out(good_judge, tmp_path, monkeypatch):
    data = invert(tiny_images(test=40))
    monkeypatch.setattr(scoring, "generate", lambda model, prompts, generators, **_: data.train.floats(slice(20)))
    evaluation = score(
        tiny_model(tiny_config()).eval(), data, {}, num_samples=20, seed=0, has_lora=False, judge_folder=tmp_path,
        depth=Depth(resamples=2, full=True),
    )  # fmt: skip
    for name in ("data_copying", "copies"):
        low, high = evaluation.scores[f"{name}_interval"]
        assert 0.8 < low < 0.95 and high == evaluation.scores[name] == 1, name  # not [1, 1]: of 20 samples
    assert evaluation.scores["nearest_distance"] == pytest.approx(0, abs=1e-6)
    assert len(evaluation.suspects) == 12
    for suspect in evaluation.suspects:
        assert torch.equal(suspect.image, suspect.near[0])
        assert suspect.distance[0] == 0 < suspect.distance[1]


@pytest.mark.parametrize("inverted", [False, True])
def test_perfect_samples_have_perfect_scores(inverted, good_judge, tmp_path, monkeypatch):
    """Samples that are held-out images: of an inverted set they are negatives, and the judge must not see them so."""
    data = tiny_images(test=40)
    data = invert(data) if inverted else data
    prompts_seen = []

    def draw_held_out(model, prompts, generators, **sampling):
        prompts_seen.extend(prompts)
        labels = [label_of(data.prompts, prompt) for prompt in prompts]
        return data.test.floats(torch.tensor([label + 10 * (i // 10) for i, label in enumerate(labels)]))

    monkeypatch.setattr(scoring, "generate", draw_held_out)
    scores = scored(lora_model(fill=True), data, tmp_path, num_samples=40, has_lora=True)
    assert [label_of(data.prompts, prompt) for prompt in prompts_seen] == [*range(10)] * 4
    assert scores["prompt_accuracy"] == scores["judge_accuracy"] > 0.8
    assert scores["frechet_distance"] == pytest.approx(0, abs=1e-3)
    dark = data.test.images[:, :, :3].float().mean().item() / 255  # the patterns have a margin of three pixels
    assert scores["background"] == pytest.approx(dark, abs=0.02)
    assert (dark > 0.5) == inverted
    assert (scores["gap_closed"] is not None) == inverted


def test_an_interval_of_no_numbers_is_none():
    values, reasons = scoring.finished({"a": math.nan, "a_interval": (math.nan, math.nan), "b_interval": (0.0, 1.0)}, {})
    assert values == {"a": None, "a_interval": None, "b_interval": [0, 1]}
    assert reasons.keys() == {"a", "a_interval"}


def test_images_without_dark_pixels_have_no_background(good_judge, tmp_path):
    scores = scored(tiny_model(tiny_config()).eval(), replace(invert(tiny_images()), inverted=False), tmp_path)
    assert scores["background"] is None and scores["prompt_accuracy"] is not None


def test_scores_that_cannot_be_had(tmp_path):
    model = tiny_model(tiny_config()).eval()
    with pytest.raises(ValueError, match="--num_samples 1: a Frechet distance needs at least 2"):
        scored(model, tiny_images(), tmp_path, num_samples=1)
    data = tiny_images()
    for given, fewest in ((data, 20), (replace(data, prompts=PromptTable((("a",), ("b",)), ("{}",))), 6)):
        with pytest.raises(ValueError, match=f"neighbours and two of each class need at least {fewest} samples"):
            scored(model, given, tmp_path, num_samples=fewest - 1, depth=Depth(full=True))
    larger = Split(nn.functional.pad(data.train.images, (0, 4, 0, 4)), data.train.labels)
    with pytest.raises(ValueError, match=r"image/digits has images \(1, 16, 16\), the model makes \(1, 12, 12\)"):
        scored(model, ImageSet(data.name, larger, larger, data.prompts), tmp_path)
    for kept, number, of_one_class in ((slice(5), 5, 1), (slice(10), 10, 1)):
        few = Split(data.test.images[kept], torch.arange(10)[kept])
        held_out = rf"has {number} held-out images, of one class at most {of_one_class}: scores with --full need at least 6"
        with pytest.raises(ValueError, match=held_out):
            scored(model, replace(data, test=few), tmp_path, num_samples=20, depth=Depth(full=True))
    assert list(tmp_path.iterdir()) == []
