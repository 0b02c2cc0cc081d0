"""Text encoders of open_clip's published models: sizes from its model list, weights by its download path."""

from __future__ import annotations

from textwrap import shorten

from jaxtyping import Float
from torch import Tensor

from xdiffusion.downloads import hub_downloads
from xdiffusion.text_encoders.clip import CLIPTextEncoder


def open_clip_text_encoder(model_name: str) -> CLIPTextEncoder:
    """A text encoder of the size of one of open_clip's models, with random weights.

    Args:
        model_name: such as "ViT-B-32-quickgelu".

    Raises:
        ValueError: if open_clip has no such model, or its text tower is not CLIP's own transformer.
    """
    import open_clip

    config = open_clip.get_model_config(model_name)
    if config is None:
        raise ValueError(f"model_name={model_name!r} is none of open_clip's models (open_clip.list_models() lists them)")
    text = config["text_cfg"]
    if "hf_model_name" in text or "width" not in text:
        raise ValueError(f"model_name={model_name!r} has a text tower that is not CLIP's own transformer")
    return CLIPTextEncoder(
        width=text["width"],
        layers=text["layers"],
        heads=text["heads"],
        context_length=text["context_length"],
        embed_dim=config["embed_dim"],
        activation="quick_gelu" if config.get("quick_gelu") else "gelu",
    )


def download_open_clip_weights(model_name: str, tag: str, asked_by: str, otherwise: str) -> dict[str, Float[Tensor, "..."]]:
    """The state dict of a published open_clip model, from its cache or the network.

    Args:
        model_name: such as "ViT-B-32-quickgelu".
        tag: of the weights, such as "openai".
        asked_by: the key or flag that names the tag, for an error.
        otherwise: what to do without a network, for an error.

    Raises:
        ValueError: if there is no such tag, or, within seconds, if the weights cannot be downloaded; the message says
            what to do.
    """
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if tag not in tags:
        raise ValueError(f"{asked_by}: {tag!r} is unknown; open_clip has for {model_name}: {', '.join(tags)}")
    try:
        with hub_downloads():
            return open_clip.create_model(model_name, pretrained=tag).state_dict()
    except Exception as error:  # the hub's own errors, a full disk, a damaged cache: all end here
        reason = shorten(str(error), 200, placeholder="...")
        raise ValueError(
            f"the weights {tag!r} of {model_name} cannot be downloaded ({reason}). Connect to the network, or {otherwise}"
        ) from error
