"""From prompts to images: what is computed once, where parts work, and starting from an image."""

import pytest
import torch
from tiny import SIZE, tiny_config, tiny_model

from xdiffusion.build import build_sampling
from xdiffusion.model import ImagesNotFinite, generate, generators_for
from xdiffusion.samplers.image_to_image import StartImage
from xdiffusion.text_encoders.clip import VOCAB_SIZE

PROMPTS = ["1", "2", "1"]


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config()).eval().requires_grad_(False)


def draw(model, prompts=PROMPTS, *overrides, **more):
    sampling = build_sampling(tiny_config("sampling.steps=3", *overrides), model.schedule)
    return generate(model, prompts, generators_for(0, len(prompts)), **sampling, **more)


def picture(count=1):
    return torch.rand(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_each_different_prompt_is_embedded_once(model):
    rows = []
    handle = model.text_encoder.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    draw(model, PROMPTS, batch_size=1)
    draw(model, PROMPTS, "sampling.negative_prompt='2'")
    handle.remove()
    assert rows == [3, 2]  # "1", "2" and the empty prompt; "1" and "2"


def test_keys_of_the_text_are_computed_once_for_all_steps(model):
    calls = []
    layer = model.network.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    draw(model)
    handle.remove()
    assert len(calls) == 1


def test_blocks_change_nothing_but_rounding(model):
    torch.testing.assert_close(draw(model, batch_size=2), draw(model), atol=1e-5, rtol=0)


def test_the_negative_prompt_and_the_syntax_reach_the_images(model):
    plain = draw(model)
    assert not torch.allclose(draw(model, PROMPTS, "sampling.negative_prompt='7'"), plain, atol=1e-4)
    assert torch.equal(draw(model, PROMPTS, "sampling.prompt_syntax=weighted"), plain)
    bracketed = ["(1)", "(2:1.4)", "1"]
    assert not torch.equal(draw(model, bracketed, "sampling.prompt_syntax=weighted"), plain)
    with pytest.raises(ValueError, match=r"prompt '\(1': '\(' is never closed"):
        draw(model, ["(1"], "sampling.prompt_syntax=weighted")


def test_long_weighted_prompts_and_short_ones_go_together(model):
    long = "one two three four five six seven eight nine"
    images = draw(model, [long, "1"], "sampling.prompt_syntax=weighted")
    assert images.isfinite().all()
    assert not torch.allclose(images[:1], draw(model, [long]), atol=1e-4)  # plain prompts are cut


def test_without_guidance_the_negative_prompt_changes_nothing(model):
    """However long it is, and it is not embedded; a mistake in it is one all the same."""
    syntax, long = "sampling.prompt_syntax=weighted", "one two three four five six seven eight nine"
    rows = []
    handle = model.text_encoder.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    plain = draw(model, PROMPTS, syntax, "sampling.cfg_scale=1")
    assert torch.equal(draw(model, PROMPTS, syntax, "sampling.cfg_scale=1", f"sampling.negative_prompt='{long}'"), plain)
    handle.remove()
    assert rows == [2, 2]  # "1", "2"
    with pytest.raises(ValueError, match=r"prompt '\(7': '\(' is never closed"):
        draw(model, PROMPTS, syntax, "sampling.cfg_scale=1", "sampling.negative_prompt='(7'")


def test_an_image_does_not_depend_on_longer_prompts_beside_its_own(model):
    syntax, long = "sampling.prompt_syntax=weighted", "one two three four five six seven eight nine"
    prompts, taken = ["1", "2", long, "1", long], []
    together = draw(model, prompts, syntax, batch_size=2, on_start=lambda x_T: taken.append(len(x_T)))
    assert taken == [2, 1, 1, 1]
    for same in (["1", "2", "1", "1", "1"], [long] * 5):
        alone = draw(model, same, syntax)
        rows = [i for i, prompt in enumerate(prompts) if prompt == same[i]]
        torch.testing.assert_close(together[rows], alone[rows], atol=1e-5, rtol=0)
    negative = draw(model, ["1", long], syntax, f"sampling.negative_prompt='{long}'")  # both as long as the negative one
    assert not torch.allclose(negative[:1], together[:1], atol=1e-4)


def test_half_precision_is_for_the_call_or_the_caller_s(model):
    exact, half = draw(model), draw(model, autocast=torch.bfloat16)
    assert half.dtype == torch.float32 and 0 < (half - exact).abs().mean() < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(draw(model), half, atol=0.05)


def test_the_start_noise_may_be_the_share_of_xt(model):
    first = []

    def draw_first(start_noise):
        sampling = build_sampling(tiny_config(f"sampling.start_noise={start_noise}"), model.schedule)
        sampling["times"] = torch.tensor([0.5, 0.0], dtype=torch.float64)
        sampling["sampler"] = lambda denoiser, x_T, times, **_: first.append(x_T) or x_T
        generate(model, ["1"], generators_for(0, 1), **sampling)

    draw_first("unit")
    draw_first("sigma")
    torch.testing.assert_close(first[1], first[0] * model.schedule.alpha_sigma(torch.tensor(0.5))[1])


def test_images_that_are_not_finite_are_no_images(model, monkeypatch):
    decode = model.autoencoder.decode

    def damaged(x0):
        images = decode(x0).clone()
        images[1, :, 0, 0] = torch.tensor([torch.inf])  # which a clamp would take for white
        return images

    monkeypatch.setattr(model.autoencoder, "decode", damaged)
    with pytest.raises(ImagesNotFinite, match=r"1 of the first 3 images .*not finite"):
        draw(model)
    broken = tiny_model(tiny_config()).eval()
    broken.network.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(ImagesNotFinite, match=r"2 of the first 2 images"):
        draw(broken, batch_size=2)


# --- starting from an image ---


def test_strength_zero_gives_the_image_back_and_one_takes_every_step(model):
    steps = []
    images = draw(model, PROMPTS, start_image=StartImage(picture(), 0.0), on_step=lambda i, *_: steps.append(i))
    torch.testing.assert_close(images, picture().expand(3, -1, -1, -1))
    assert steps == []
    draw(model, PROMPTS, start_image=StartImage(picture(), 1.0), on_step=lambda i, *_: steps.append(i))
    assert steps == [0, 1, 2]


def test_images_of_their_own_stay_with_their_rows(model):
    images = draw(model, PROMPTS, start_image=StartImage(picture(3), 0.0), batch_size=2)
    torch.testing.assert_close(images, picture(3))


def test_a_mask_keeps_what_is_dark(model):
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., :6] = 1
    images = draw(model, PROMPTS, start_image=StartImage(picture(), 0.7, mask))
    torch.testing.assert_close(images[..., 6:], picture()[..., 6:].expand(3, -1, -1, -1))
    assert ((images - picture()).abs()[..., :6].mean(dim=(1, 2, 3)) > 0.05).all()


@pytest.mark.parametrize("start_noise", ["unit", "sigma"])
def test_at_strength_one_a_mask_shows_nothing_of_what_it_draws_anew(model, start_noise):
    overrides = ["sampling.times={kind: uniform, t_max: 0.9}", f"sampling.start_noise={start_noise}"]
    mask = torch.ones(1, 1, SIZE, SIZE)
    drawn = draw(model, PROMPTS, *overrides)
    assert torch.equal(draw(model, PROMPTS, *overrides, start_image=StartImage(picture(), 1.0, mask)), drawn)
    mask[..., 6:] = 0
    other = picture()
    other[..., :6] = -other[..., :6]
    first, second = (draw(model, PROMPTS, *overrides, start_image=StartImage(p, 1.0, mask)) for p in (picture(), other))
    assert torch.equal(first, second) and not torch.equal(first, drawn)


@pytest.mark.parametrize(
    ("start_image", "message"),
    [
        (StartImage(picture(), 1.5), r"strength=1.5 must be in \[0, 1\]"),
        (StartImage(picture(2), 0.5), "2 start images or masks, not 1 nor 3, the number of prompts"),
        (StartImage(picture(), 0.5, torch.ones(2, 1, 12, 12)), "2 start images or masks, not 1 nor 3"),
        (StartImage(torch.zeros(1, 1, 8, 8)), r"the start image has shape \(1, 8, 8\), the model \(1, 12, 12\)"),
        (StartImage(picture(), 0.5, torch.ones(1, 1, 8, 12)), r"the mask is \(8, 12\) pixels, the image \(12, 12\)"),
        (
            StartImage(picture(3), 0.5, torch.ones(3, 1, 12, 12) * torch.tensor([1, 0, 1]).view(3, 1, 1, 1)),
            r"the mask selects nothing of the latents \(12x12\), .* at least 1x1 of the image's 12x12 pixels",
        ),
    ],
)
def test_start_images_that_do_not_fit(model, start_image, message):
    with pytest.raises(ValueError, match=message):
        draw(model, PROMPTS, start_image=start_image)


# --- size, place, names ---


def test_another_size_is_drawn_after_a_resize():
    model = tiny_model(tiny_config()).eval()
    model.resize(16, 24)
    assert draw(model, ["1"]).shape == (1, 1, 16, 24)
    for height, width in [(0, 8), (-8, 8)]:
        with pytest.raises(ValueError, match=f"height={height}, width={width}: .* multiples of 1"):
            model.resize(height, width)


def test_offloading_moves_each_part_for_its_work_alone(model, monkeypatch):
    """On one device nothing moves, so the moves themselves are watched."""
    moves = []
    expected = draw(model, batch_size=2)
    parts = {name: getattr(model, name) for name in ("text_encoder", "network", "autoencoder")}
    for name, part in parts.items():
        monkeypatch.setattr(part, "to", lambda device, name=name: moves.append((name, str(device))))
    model.offload_to = torch.device("cpu", 0)
    try:
        images = draw(model, batch_size=2)
        with pytest.raises(RuntimeError, match="stopped"), model.at_work(model.network):
            raise RuntimeError("stopped")
    finally:
        model.offload_to = None
    assert torch.equal(images, expected)
    per_block = [("network", "cpu:0"), ("network", "cpu"), ("autoencoder", "cpu:0"), ("autoencoder", "cpu")]
    assert moves == [
        *[("text_encoder", "cpu:0"), ("text_encoder", "cpu")], *per_block, *per_block, *per_block[:2],
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_of_the_network_and_the_text_encoder(dtype):
    model = tiny_model(tiny_config()).eval()
    expected = draw(model)
    model.network.to(dtype)
    model.text_encoder.to(dtype)
    images = draw(model)
    assert images.dtype == torch.float32
    assert 0 < (images - expected).abs().mean() < 0.05


def test_the_base_weights_are_without_learned_words():
    model = tiny_model(tiny_config())
    before = set(model.base_weights())
    model.text_encoder.add_tokens({"<cat>": torch.ones(model.text_encoder.width)})
    assert model.text_encoder.tokenize(["<cat>"])[0, 1] == VOCAB_SIZE
    assert set(model.base_weights()) == before
