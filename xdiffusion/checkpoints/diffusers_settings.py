"""The settings of a diffusers pipeline's parts, and the sections of our config that say the same. Pure dict -> dict, both ways.

A key that a file leaves out has diffusers' default there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

VERSION = "0.21.0"  # the oldest diffusers for which these settings are whole
FILES = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
    "scheduler/scheduler_config.json",
)
SPECIAL_TOKENS = "tokenizer/special_tokens_map.json"  # of transformers before 5; here only read
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
_SPACINGS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
VOCABULARY = 49408  # tokens of every CLIP
_END, _EXCLAMATION = "<|endoftext|>", "!"  # token 0, with which 2.x pads, is the exclamation mark


def folder_settings(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All settings of a resolved config's model, by their files' paths in the pipeline's folder."""
    parts = config["model"]
    network, text, autoencoder = parts["network"], parts["text_encoder"], parts["autoencoder"]
    image_size = config["data"]["image_size"]
    latent_size = image_size // 2 ** (len(autoencoder["widths"]) - 1)
    settings = (
        unet_settings(network, text["width"], latent_size),
        autoencoder_settings(autoencoder, image_size),
        text_encoder_settings(text),
        tokenizer_settings(text),
        scheduler_settings(config["diffusion"]),
    )
    return dict(zip(FILES, settings))


def config_from(settings: Mapping[str, Mapping[str, Any]], text_layers: int) -> dict[str, Any]:
    """What settings by path say, as sections of a config; what is not there says nothing.

    Args:
        settings: see `folder_settings`.
        text_layers: of the text encoder's weights.

    Raises:
        ValueError: naming the file, for a model that we have no word for, and for settings that are none.
    """

    def said(path: str, read: Callable[[Mapping[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        try:
            return read(settings[path]) if path in settings else {}
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, ZeroDivisionError) as error:
            raise ValueError(f"{path}: {error}") from error

    unet, vae, clip, tokenizer, scheduler = FILES
    network, autoencoder = said(unet, network_from), said(vae, autoencoder_from)
    text = said(clip, partial(text_encoder_from, layers=text_layers)) | said(tokenizer, padding_from)
    if "added_tokens_decoder" not in settings.get(tokenizer, {}):  # which transformers reads in the place of the map
        text |= said(SPECIAL_TOKENS, padding_from)
    latent_size = settings.get(unet, {}).get("sample_size")
    sized = isinstance(latent_size, int) and "widths" in autoencoder
    data = {"image_size": latent_size * 2 ** (len(autoencoder["widths"]) - 1)} if sized else {}
    model = {"network": network, "text_encoder": text, "autoencoder": autoencoder}
    return {"data": data, "model": model, "diffusion": said(scheduler, diffusion_from)}


def unet_settings(network: Mapping[str, Any], context_dim: int, latent_size: int) -> dict[str, Any]:
    """config.json of a UNet2DConditionModel; its attention_head_dim is the number of heads (its known misnomer)."""
    depth, widths = network["transformer_depth"], network["channels"]
    heads = network["num_heads"] or [width // network["head_dim"] for width in widths]
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": VERSION,
        "sample_size": latent_size,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": widths,
        "layers_per_block": network["num_res_blocks"],
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depth],
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depth)],
        "transformer_layers_per_block": [max(1, d) for d in depth],
        "cross_attention_dim": context_dim,
        "attention_head_dim": heads,
        "use_linear_projection": network["projection"] == "linear",
        "norm_num_groups": network["norm_groups"],
        "resnet_time_scale_shift": "scale_shift" if network["time_conditioning"] == "scale_shift" else "default",
    }


def network_from(unet: Mapping[str, Any]) -> dict[str, Any]:
    """`model.network` of a UNet2DConditionModel's config.json.

    Raises:
        ValueError: for a UNet that ours is not.
    """
    widths = list(unet.get("block_out_channels", (320, 640, 1280, 1280)))
    attends = [kind.startswith("CrossAttn") for kind in unet.get("down_block_types", [*["CrossAttn"] * 3, "DownBlock2D"])]
    depths = _per_level(unet.get("transformer_layers_per_block", 1), len(widths))
    heads = _per_level(unet.get("num_attention_heads") or unet.get("attention_head_dim", 8), len(widths))
    network = {
        "channels": widths,
        "num_res_blocks": unet.get("layers_per_block", 2),
        "transformer_depth": [depth if there else 0 for depth, there in zip(depths, attends)],
        "num_heads": heads[0] if len(set(heads)) == 1 else None,
        "head_dim": None if len(set(heads)) == 1 else widths[0] // heads[0],
        "projection": "linear" if unet.get("use_linear_projection") else "conv",
        "norm_groups": unet.get("norm_num_groups", 32),
        "time_conditioning": "scale_shift" if unet.get("resnet_time_scale_shift") == "scale_shift" else "add",
    }
    described = unet_settings(network, 0, 0)
    levels = {"attention_head_dim": heads, "transformer_layers_per_block": depths}
    for key, value in levels.items():
        if value != _per_level(described[key], len(widths)):
            raise ValueError(f"{key}={unet.get(key, value)!r:.80} at the widths {widths} is no UNet that can be built here")
    for key in ("down_block_types", "up_block_types"):
        _check_equal(unet, key, described[key])
    for key, needed in _OF_EVERY_UNET.items():
        _check_equal(unet, key, needed)
    return network


_OF_EVERY_UNET = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "time_cond_proj_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}


def autoencoder_settings(autoencoder: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """config.json of an AutoencoderKL."""
    levels = len(autoencoder["widths"])
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": VERSION,
        "sample_size": image_size,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": autoencoder["latent_channels"],
        "block_out_channels": autoencoder["widths"],
        "layers_per_block": autoencoder["num_res_blocks"],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": autoencoder["norm_groups"],
        "scaling_factor": autoencoder["scale_factor"],
    }


def autoencoder_from(vae: Mapping[str, Any]) -> dict[str, Any]:
    """`model.autoencoder` of an AutoencoderKL's config.json.

    Raises:
        ValueError: for an autoencoder that ours is not.
    """
    for key, needed in {"act_fn": "silu", "shift_factor": None}.items():
        _check_equal(vae, key, needed)
    return {
        "widths": list(vae.get("block_out_channels", (64,))),
        "num_res_blocks": vae.get("layers_per_block", 1),
        "latent_channels": vae.get("latent_channels", 4),
        "norm_groups": vae.get("norm_num_groups", 32),
        "scale_factor": vae.get("scaling_factor", 0.18215),
    }


def text_encoder_settings(text: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a CLIPTextModel, which has the layers that clip_skip uses."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": text["width"],
        "intermediate_size": 4 * text["width"],
        "num_hidden_layers": text["layers"] + 1 - text["clip_skip"],
        "num_attention_heads": text["heads"],
        "max_position_embeddings": text["context_length"],
        "projection_dim": text["embed_dim"] or text["width"],
        "vocab_size": VOCABULARY,
        "hidden_act": text["activation"],
        "layer_norm_eps": 1e-5,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407 if text["pad_with_end_token"] else 0,
    }


def text_encoder_from(clip: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """`model.text_encoder` of a CLIPTextModel's config.json, whose weights have that many layers.

    Its vocab_size may count words that were added; `added_words` reads them.
    """
    return {
        "width": clip.get("hidden_size", 512),
        "layers": layers,
        "clip_skip": layers + 1 - clip.get("num_hidden_layers", 12),
        "heads": clip.get("num_attention_heads", 8),
        "context_length": clip.get("max_position_embeddings", 77),
        "activation": clip.get("hidden_act", "quick_gelu"),
    }


def tokenizer_settings(text: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json of a CLIPTokenizer."""
    return {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": "<|startoftext|>",
        "eos_token": _END,
        "unk_token": _END,
        "pad_token": _END if text["pad_with_end_token"] else _EXCLAMATION,
        "model_max_length": text["context_length"],
        "do_lower_case": True,
    }


def padding_from(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """What a CLIPTokenizer's settings, or its special tokens, say of `model.text_encoder`: maybe nothing."""
    pad = tokenizer.get("pad_token")
    pad = pad.get("content") if isinstance(pad, Mapping) else pad
    return {"pad_with_end_token": pad == _END} if pad in (_END, _EXCLAMATION) else {}


def scheduler_settings(diffusion: Mapping[str, Any]) -> dict[str, Any]:
    """scheduler_config.json of a DDIMScheduler, from which diffusers makes its other schedulers."""
    schedule = diffusion["schedule"]
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": schedule["num_timesteps"],
        "beta_start": schedule["beta_start"],
        "beta_end": schedule["beta_end"],
        "beta_schedule": _SPACINGS[schedule["spacing"]],
        "rescale_betas_zero_snr": schedule["zero_terminal_snr"],
        "prediction_type": PREDICTIONS[diffusion["prediction"]],
        "timestep_spacing": "trailing" if schedule["zero_terminal_snr"] else "leading",  # the last step is pure noise
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "trained_betas": None,
    }


def diffusion_from(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """`diffusion` of any of diffusers' schedulers' settings.

    Raises:
        ValueError: for a prediction or betas that we have no word for.
    """
    _check_equal(scheduler, "trained_betas", None)
    kind = str(scheduler.get("_class_name", ""))
    if "FlowMatch" in kind or "EDM" in kind:
        raise ValueError(f"_class_name={kind!r:.80}: a noise schedule that is none of betas")
    return {
        "prediction": _ours(PREDICTIONS, scheduler, "prediction_type", "epsilon"),
        "schedule": {
            "kind": "betas",
            "num_timesteps": scheduler.get("num_train_timesteps", 1000),
            "spacing": _ours(_SPACINGS, scheduler, "beta_schedule", "linear"),
            "beta_start": scheduler.get("beta_start", 0.0001),
            "beta_end": scheduler.get("beta_end", 0.02),
            "zero_terminal_snr": scheduler.get("rescale_betas_zero_snr", False),
        },
    }


def _ours(table: Mapping[str, str], settings: Mapping[str, Any], key: str, default: str) -> str:
    """Our word for what a setting says."""
    given = settings.get(key, default)
    found = next((ours for ours, theirs in table.items() if theirs == given), None)
    if found is None:
        raise ValueError(f"{key}={given!r:.80}; allowed: {', '.join(table.values())}")
    return found


def _check_equal(settings: Mapping[str, Any], key: str, needed: Any) -> None:
    given = settings.get(key, needed)
    if given != needed:
        raise ValueError(f"{key}={given!r:.80}; here it can only be {needed!r}")


def _per_level(value: Any, levels: int) -> list[Any]:
    return list(value) if isinstance(value, list) else [value] * levels
