"""The diagrams of the lessons: `python docs/diagrams.py` writes docs/pictures/unet.svg and docs/pictures/lora.svg.

Nothing in them is typed in that the built model knows: their shapes are those that hooks saw while it was called.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch
from torch import Tensor, nn

from xdiffusion.build import build_model, load_config
from xdiffusion.model import DiffusionModel
from xdiffusion.training.trainable import make_trainable

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs/image/digits/ddpm_24x24_v_continuous_clip.yaml"
PICTURES = ROOT / "docs/pictures"
# left: what writes a skip, right: what reads it, from the picture's resolution down
SKIPS = (
    ("conv_in", "up_blocks.1.stage(1)"),
    ("down_blocks.0.stage(0)", "up_blocks.1.stage(0)"),
    ("down_blocks.0.downsample", "up_blocks.0.stage(1)"),
    ("down_blocks.1.stage(0)", "up_blocks.0.stage(0)"),
)
ADAPTED = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FEW, FROZEN, TIME, TEXT, SKIP, PLAIN = "#e4ecf7", "#dddddd", "#1f5fa8", "#b4540a", "#2b7a3d", "#f0efe9"
INK, PAPER, SANS, MONO = "#282828", "#f6f6f4", "system-ui, sans-serif", "ui-monospace, monospace"


def digits_model(lora: bool = False) -> DiffusionModel:
    """The model of the digits' config, with its LoRA if asked for."""
    torch.manual_seed(0)
    config = load_config(CONFIG, use_lora_training=lora)
    model = build_model(config)
    if lora:
        make_trainable(model, config, lora=True)
    return model


@torch.no_grad()
def seen(model: DiffusionModel) -> dict[str, tuple[Tensor, Tensor]]:
    """First input and output of every module of the network, of one picture."""
    tensors = {}

    def hook(name: str):
        return lambda module, inputs, output: tensors.update({name: (inputs[0], output)})

    handles = [module.register_forward_hook(hook(name)) for name, module in model.network.named_modules()]
    model.network(torch.randn(1, *model.latent_shape), torch.tensor([500.0]), model.text_encoder.encode(["seven"]))
    for handle in handles:
        handle.remove()
    return tensors


def size(tensor: Tensor) -> str:
    """The shape of one picture's tensor."""
    return " x ".join(map(str, tensor.shape[1:]))


class Drawing:
    """An SVG that is put together line by line."""

    def __init__(self, width: int, height: int, title: str):
        self.lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        ]

    def text(self, x: float, y: float, text: str, *, font: str = SANS, points: int = 13, anchor="middle", fill=INK):
        self.lines.append(
            f'<text x="{x:g}" y="{y:g}" font-family="{font}" font-size="{points}" text-anchor="{anchor}" '
            f'fill="{fill}">{escape(text)}</text>'
        )

    def box(self, x: float, y: float, width: float, height: float, fill: str, texts: Sequence[str] = ()):
        """A box about (x, y): its first text is words, the others are names and shapes."""
        place = f'x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}"'
        self.lines.append(f'<rect {place} rx="4" fill="{fill}" stroke="{INK}"/>')
        for i, text in enumerate(texts):
            below = y + 4 + 16 * (i - (len(texts) - 1) / 2)
            self.text(x, below, text, font=MONO if i else SANS, points=11 if i else 13)

    def arrow(self, *points: tuple[float, float], colour: str = INK):
        """Along the points, of which the last two lie beside or above each other."""
        (x0, y0), (x, y) = points[-2:]
        dx, dy = (6 * (x > x0) - 6 * (x < x0), 6 * (y > y0) - 6 * (y < y0))
        path = " L".join(f"{x:g} {y:g}" for x, y in points)
        head = f"M{x:g} {y:g} L{x - dx - dy / 2:g} {y - dy - dx / 2:g} L{x - dx + dy / 2:g} {y - dy + dx / 2:g} z"
        self.lines.append(f'<path d="M{path}" fill="none" stroke="{colour}"/><path d="{head}" fill="{colour}"/>')

    def badge(self, x: float, y: float, letter: str, fill: str):
        self.lines.append(f'<circle cx="{x:g}" cy="{y:g}" r="9" fill="{fill}"/>')
        self.text(x, y + 4, letter, fill="#ffffff", points=12)

    def svg(self) -> str:
        return "\n".join([*self.lines, "</svg>", ""])


def unet_svg() -> str:
    """The UNet of the digits: down on the left, up on the right, each skip from left to right."""
    model = digits_model()
    tensors = seen(model)
    drawing = Drawing(800, 650, "The UNet of the digits, with the shape of every tensor between its stages")
    left, right, middle, wide, high, top, row = 170, 630, 400, 260, 54, 180, 84
    drawing.box(left, 34, wide, 34, PLAIN, [f"xt: {size(tensors[''][0])}"])
    drawing.box(left, 96, wide, 40, PLAIN, ["pixel_unshuffle", f"-> {size(tensors['conv_in'][0])}"])
    drawing.box(right, 34, wide, 34, PLAIN, [f"v: {size(tensors[''][1])}"])
    out = [
        "norm, SiLU, conv_out, pixel_shuffle",
        f"{size(tensors['conv_norm_out'][0])} -> {size(tensors['conv_out'][1])}",
    ]
    drawing.box(right, 96, wide, 40, PLAIN, out)
    drawing.arrow((left, 51), (left, 76))
    drawing.arrow((right, 76), (right, 51))
    drawing.arrow((left, 116), (left, top - high / 2))
    drawing.arrow((right, top - high / 2), (right, 116))
    for i, (writer, reader) in enumerate(SKIPS):
        y = top + i * row
        drawing.box(left, y, wide, high, *_stage(tensors, writer))
        drawing.box(right, y, wide, high, *_stage(tensors, reader))
        for x in [left - wide / 2] * (".stage" in writer) + [right + wide / 2]:
            drawing.badge(x, y - 12, "t", TIME)
            drawing.badge(x, y + 12, "c", TEXT)
        drawing.arrow((left + wide / 2, y), (right - wide / 2, y), colour=SKIP)
        drawing.text(middle, y - 6, f"skip: {size(ends(tensors, writer)[1])}", font=MONO, points=11, fill=SKIP)
        if i < len(SKIPS) - 1:
            drawing.arrow((left, y + high / 2), (left, y + row - high / 2))
            drawing.arrow((right, y + row - high / 2), (right, y + high / 2))
    up = tensors["up_blocks.0.upsample"]
    drawing.box(right, top + 1.5 * row, wide - 20, 18, PLAIN)
    drawing.text(right, top + 1.5 * row + 4, f"upsample: {size(up[0])} -> {size(up[1])}", font=MONO, points=11)
    last, y = top + 3 * row + high / 2, top + 4 * row
    middle_block = tensors["mid_block.resnets.0"][0], tensors["mid_block.resnets.1"][1]
    words = ["residual block, transformer, residual block", "mid_block", " -> ".join(map(size, middle_block))]
    drawing.box(middle, y, wide + 60, high, FEW, words)
    drawing.arrow((left, last), (left, y), (middle - wide / 2 - 30, y))
    drawing.arrow((middle + wide / 2 + 30, y), (right, y), (right, last))
    drawing.badge(middle - 136, y + high / 2, "t", TIME)
    drawing.badge(middle - 114, y + high / 2, "c", TEXT)
    _unet_legend(drawing, tensors, y + 62)
    return drawing.svg()


def ends(tensors: dict[str, tuple[Tensor, Tensor]], name: str) -> tuple[Tensor, Tensor]:
    """Input and output of a layer, or of a stage: a residual block and the transformer behind it."""
    level, _, i = name.rstrip(")").partition(".stage(")
    if not i:
        return tensors[name]
    return tensors[f"{level}.resnets.{i}"][0], tensors[f"{level}.attentions.{i}"][1]


def _stage(tensors: dict[str, tuple[Tensor, Tensor]], name: str) -> tuple[str, list[str]]:
    """Colour and texts of a box."""
    convolution = "convolution, stride 2" if name.endswith("downsample") else "convolution"
    words = "residual block, transformer" if ".stage(" in name else convolution
    return FEW if ".stage(" in name else PLAIN, [words, name, " -> ".join(map(size, ends(tensors, name)))]


def _unet_legend(drawing: Drawing, tensors: dict[str, tuple[Tensor, Tensor]], y: float) -> None:
    sinusoids, embedded = tensors["time_embedding.linear_1"][0], tensors["time_embedding"][1]
    context = tensors[ADAPTED.replace("attn1.to_q", "attn2.to_k")][0]
    lines = [
        f"time: {size(sinusoids)} sinusoids, two linear layers: {size(embedded)}; scale and shift of each residual block's "
        "second norm",
        f"context, the caption: {size(context)} (tokens x width); keys and values of each transformer's cross-attention",
    ]
    for i, (letter, fill) in enumerate((("t", TIME), ("c", TEXT))):
        drawing.badge(46, y + 26 * i, letter, fill)
        drawing.text(62, y + 4 + 26 * i, lines[i], anchor="start")
    drawing.text(
        37,
        y + 56,
        "Sizes are channels x height x width. A skip is put behind what comes from below: hence 128 channels there.",
        anchor="start",
    )


def lora_svg() -> str:
    """One adapted layer; the matrices are drawn in the proportions that they have."""
    model = digits_model(lora=True)
    layer = model.network.get_submodule(ADAPTED)
    (lora_A,), (lora_B,), (adapter,) = layer.lora_A.values(), layer.lora_B.values(), layer.adapters.values()
    (rank, width_in), width_out = lora_A.shape, len(lora_B)
    x, y = seen(model)[ADAPTED]
    drawing = Drawing(800, 306, "A linear layer with a LoRA: the frozen weight, and beside it A, B and the scale")
    pixels = 120 / max(width_in, width_out)
    high, low = 96, 232
    drawing.box(80, high, 110, 44, PLAIN, ["x", size(x)])
    drawing.box(330, high, pixels * width_in, pixels * width_out, FROZEN)
    _matrix(drawing, 330, high, "W, frozen", layer.weight)
    drawing.box(720, high, 110, 44, PLAIN, ["y", size(y)])
    drawing.box(240, low, pixels * width_in, pixels * rank, FEW)
    drawing.text(240, low - 16, "A, starts random")
    drawing.text(240, low + 26, f"{rank} x {width_in} = {lora_A.numel():,}", font=MONO, points=11)
    drawing.box(400, low, pixels * rank, pixels * width_out, FEW)
    drawing.text(414, low - 6, "B, starts at 0", anchor="start")
    drawing.text(414, low + 26, f"{width_out} x {rank} = {lora_B.numel():,}", font=MONO, points=11, anchor="start")
    drawing.box(610, low, 204, 44, PLAIN, ["times scale * lora_alpha / rank", f"scale * {adapter.lora_alpha:g} / {rank}"])
    drawing.lines.append(f'<circle cx="610" cy="{high}" r="13" fill="{PAPER}" stroke="{INK}"/>')
    drawing.text(610, high + 5, "+", points=17)
    drawing.arrow((135, high), (330 - pixels * width_in / 2, high))
    drawing.arrow((330 + pixels * width_in / 2, high), (597, high))
    drawing.arrow((623, high), (665, high))
    drawing.arrow((80, high + 22), (80, low), (240 - pixels * width_in / 2, low))
    drawing.arrow((240 + pixels * width_in / 2, low), (400 - pixels * rank / 2, low))
    drawing.text(346, low - 8, size(x @ lora_A.T), font=MONO, points=11)
    drawing.arrow((400 + pixels * rank / 2, low), (508, low))
    drawing.arrow((610, low - 22), (610, high + 13))
    return drawing.svg()


def _matrix(drawing: Drawing, x: float, y: float, name: str, weight: nn.Parameter) -> None:
    drawing.text(x, y - 4, name)
    drawing.text(x, y + 14, f"{' x '.join(map(str, weight.shape))} = {weight.numel():,}", font=MONO, points=11)


DRAWN = {"unet.svg": unet_svg, "lora.svg": lora_svg}

if __name__ == "__main__":
    for name, draw in DRAWN.items():
        (PICTURES / name).write_text(draw())
        print(PICTURES / name)
