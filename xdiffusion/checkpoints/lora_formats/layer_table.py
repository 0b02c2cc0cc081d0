"""The layers that a LoRA can be on: names and weight shapes, in order. What nameless and flattened formats need.

Tables of Stable Diffusion 1.5 and 2.1 follow from their sizes ([LDM] appendix E), without weights or other libraries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod

from torch import nn
from torch.nn.parameter import is_lazy

from xdiffusion.checkpoints.component_names import component_of, exchange_name, plain_name
from xdiffusion.checkpoints.errors import CheckpointError

Shape = tuple[int, ...]
SD_BASES = ("sd15", "sd21")


class LayerTable(dict[str, Shape]):
    """Exchange name -> weight shape, in the order of the model's modules."""

    @classmethod
    def of(cls, model: nn.Module) -> LayerTable:
        """The linear and convolution layers, of known shape, of a model (ours, diffusers', transformers', any other)."""
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
        layers = {plain_name(model, name): m for name, m in model.named_modules() if isinstance(m, kinds)}
        shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items() if name and not is_lazy(layer.weight)}
        return cls((exchange_name(name), shape) for name, shape in shapes.items())

    def part(self, component: str) -> LayerTable:
        """The layers of "unet" or of "text_encoder"."""
        return LayerTable((name, shape) for name, shape in self.items() if component_of(name) == component)


def sd_layer_table(base: str) -> LayerTable:
    """The table of "sd15" or "sd21": UNet2DConditionModel in diffusers' order, then CLIPTextModel in transformers'.

    Raises:
        CheckpointError: for another base.
    """
    if base == "sd15":
        unet, text = _unet_layers(context_dim=768, linear_projection=False), _text_layers(768, 12)
    elif base == "sd21":
        unet, text = _unet_layers(context_dim=1024, linear_projection=True), _text_layers(1024, 23)
    else:
        raise CheckpointError(f"base {base!r} is none of {', '.join(SD_BASES)}")
    table = LayerTable((f"unet.{name}", shape) for name, shape in unet)
    table.update((f"text_encoder.text_model.encoder.layers.{name}", shape) for name, shape in text)
    return table


def sd_base_of(flat_shapes: Mapping[str, tuple[int, int]]) -> str | None:
    """The base that has all these layers with fitting weights, given as (out, in * kernel); None if neither has."""
    if flat_shapes:
        for base in SD_BASES:
            table = sd_layer_table(base)
            if all(name in table and (table[name][0], prod(table[name][1:])) == f for name, f in flat_shapes.items()):
                return base
    return None


_ORDER = {word: place for place, word in enumerate((
    "unet", "text_encoder", "conv_in", "time_embedding", "down_blocks", "up_blocks", "mid_block", "conv_out",
    "attentions", "resnets", "downsamplers", "upsamplers", "proj_in", "transformer_blocks", "proj_out",
    "attn1", "ff", "attn2", "to_q", "to_k", "to_v", "to_out", "conv1", "time_emb_proj", "conv2", "conv_shortcut",
    "linear_1", "linear_2", "self_attn", "mlp", "k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2",
))}  # fmt: skip


def in_old_diffusers_order(names: Iterable[str]) -> list[str]:
    """Sorted as the modules of diffusers stood in cloneofsimo's time: ff before attn2, the middle block behind the up blocks.

    Positional files of that time count layers in this order, whatever the order of the model that reads them.
    """
    return sorted(names, key=lambda name: [int(w) if w.isdigit() else _ORDER.get(w, 99) for w in name.split(".")])


def _unet_layers(context_dim: int, linear_projection: bool) -> Iterator[tuple[str, Shape]]:
    channels, has_attention, per_level = (320, 640, 1280, 1280), (True, True, True, False), 2
    time_dim = 4 * channels[0]
    yield "conv_in", (channels[0], 4, 3, 3)
    yield "time_embedding.linear_1", (time_dim, channels[0])
    yield "time_embedding.linear_2", (time_dim, time_dim)

    def level(block: str, width: int, inputs: list[int], attentions: int) -> Iterator[tuple[str, Shape]]:
        for i in range(attentions):
            yield from _transformer_layers(f"{block}.attentions.{i}", width, context_dim, linear_projection)
        for i, width_in in enumerate(inputs):
            yield from _resnet_layers(f"{block}.resnets.{i}", width_in, width, time_dim)

    width, skips = channels[0], [channels[0]]
    for i, wider in enumerate(channels):
        yield from level(f"down_blocks.{i}", wider, [width, wider], per_level * has_attention[i])
        width = wider
        skips += [width] * per_level
        if i < 3:
            yield f"down_blocks.{i}.downsamplers.0.conv", (width, width, 3, 3)
            skips.append(width)
    for i, narrower in enumerate(reversed(channels)):
        inputs = [width + skips.pop(), *(narrower + skips.pop() for _ in range(per_level))]
        attentions = (per_level + 1) * has_attention[3 - i]
        yield from level(f"up_blocks.{i}", narrower, inputs, attentions)
        width = narrower
        if i < 3:
            yield f"up_blocks.{i}.upsamplers.0.conv", (width, width, 3, 3)
    yield from level("mid_block", channels[-1], [channels[-1]] * 2, 1)  # diffusers registers the middle last
    yield "conv_out", (4, channels[0], 3, 3)


def _resnet_layers(name: str, width_in: int, width: int, time_dim: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.conv1", (width, width_in, 3, 3)
    yield f"{name}.time_emb_proj", (width, time_dim)
    yield f"{name}.conv2", (width, width, 3, 3)
    if width_in != width:
        yield f"{name}.conv_shortcut", (width, width_in, 1, 1)


def _transformer_layers(name: str, width: int, context_dim: int, linear_projection: bool) -> Iterator[tuple[str, Shape]]:
    projection = (width, width) if linear_projection else (width, width, 1, 1)
    yield f"{name}.proj_in", projection
    block = f"{name}.transformer_blocks.0"
    for attention, source in (("attn1", width), ("attn2", context_dim)):
        yield f"{block}.{attention}.to_q", (width, width)
        yield f"{block}.{attention}.to_k", (width, source)
        yield f"{block}.{attention}.to_v", (width, source)
        yield f"{block}.{attention}.to_out.0", (width, width)
    yield f"{block}.ff.net.0.proj", (8 * width, width)
    yield f"{block}.ff.net.2", (width, 4 * width)
    yield f"{name}.proj_out", projection


def _text_layers(width: int, layers: int) -> Iterator[tuple[str, Shape]]:
    for i in range(layers):
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield f"{i}.self_attn.{projection}", (width, width)
        yield f"{i}.mlp.fc1", (4 * width, width)
        yield f"{i}.mlp.fc2", (width, 4 * width)
