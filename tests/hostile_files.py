"""Every reader of files from strangers, and a small whole file for each."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch
from fake_sets import write_mnist
from omegaconf import OmegaConf
from picture_folders import write_pictures
from PIL import Image
from safetensors.torch import save_file
from sd_files import OfAMac, random_sd, sd_config
from tiny import SETTINGS, tiny_config, tiny_images, tiny_model

from xdiffusion.build import image_shape, load_config
from xdiffusion.checkpoints.added_words import added_words
from xdiffusion.checkpoints.diffusers_folder import write_diffusers_folder
from xdiffusion.checkpoints.diffusers_settings import FILES, SPECIAL_TOKENS, VOCABULARY
from xdiffusion.checkpoints.learned_tokens import read_learned_tokens
from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.checkpoints.lora_formats import read_lora, write_lora
from xdiffusion.checkpoints.native import load_model_file, save_model
from xdiffusion.checkpoints.reading import load_pickled, load_safetensors
from xdiffusion.checkpoints.tensor_cache import TensorCache
from xdiffusion.checkpoints.weight_index import read_indexed
from xdiffusion.clip_towers import own_towers
from xdiffusion.data.captioned_images import Crop
from xdiffusion.data.image_folder import load_image_folder
from xdiffusion.data.shards import read_shard
from xdiffusion.data.torchvision_sets import load_mnist
from xdiffusion.evaluation.judge import Judge
from xdiffusion.loading import load_model
from xdiffusion.pictures import read_metadata, save_png
from xdiffusion.scoring import cached_judge
from xdiffusion.text_encoders.clip import CLIPTextEncoder
from xdiffusion.training.comparison import as_text, comparison_table, draw_curves, read_runs
from xdiffusion.training.state import state_path, whole_state, write_state
from xdiffusion.training.text_encoder import load_text_encoder

LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@dataclass(frozen=True)
class Reader:
    """damaged: the file that is damaged, below the folder. read: the folder -> whatever; ValueError is its one error, which
    names the file, or the folder where that is what was given."""

    damaged: str
    write: Callable[[Path], Any]
    read: Callable[[Path], Any]

    def is_named(self, error: ValueError, folder: Path) -> bool:
        """Whether an error says what is damaged."""
        return any(name in str(error) for name in (str(folder), Path(self.damaged).name))


def _write_model(folder: Path) -> None:
    config = tiny_config()
    tensors, plain = tiny_model(config).state_dict(), OmegaConf.to_container(config)
    save_model(folder / "a.safetensors", tensors, config=plain, image_shape=image_shape(config), step=3)


def _write_pickled(folder: Path) -> None:
    torch.save({"state_dict": {f"layer.{i}": torch.randn(4, 4) for i in range(8)}}, folder / "a.pt")


def _write_original(folder: Path) -> None:
    unet = "model.diffusion_model.input_blocks."
    tensors = {f"{unet}0.0.weight": torch.randn(16, 4, 3, 3)}
    tensors[f"{unet}1.1.transformer_blocks.0.attn2.to_k.weight"] = torch.randn(16, 24)
    save_file(tensors, folder / "a.safetensors", {"modelspec.prediction_type": "v"})
    torch.save({"state_dict": tensors, "global_step": numpy.int64(5), "hparams": OmegaConf.create({"a": 1})}, folder / "a.ckpt")


def _write_state(folder: Path) -> None:
    weights = folder / "diffusion-3.safetensors"
    save_file({"a": torch.ones(4)}, weights)
    write_state(weights, {"step": 3, "trained": {"a": torch.ones(4)}, "optimizer": {"state": {}}, "losses": [1.0, 2.0]})


def _write_tokens(folder: Path) -> None:
    torch.save({"string_to_param": {"*": torch.randn(2, 8)}, "name": "cat"}, folder / "a.pt")
    torch.save({"string_to_param": {"*": OfAMac(torch.randn(2, 8))}, "name": "cat"}, folder / "mac.pt")
    save_file({"<cat>": torch.randn(2, 8)}, folder / "a.safetensors")


def _write_lora(folder: Path, name: str, format: str) -> None:
    write_lora(LoRAFile({LAYER: LoRAFactors(torch.randn(1, 320), torch.randn(320, 1), 2.0)}), folder / name, format)


def _write_json_lora(folder: Path) -> None:
    _write_lora(folder, "a.pt", "cloneofsimo-pt")
    (folder / "a.json").write_text(json.dumps([factor.tolist() for factor in load_pickled(folder / "a.pt")]))


def _write_pipeline(folder: Path) -> None:
    name, token = "sd15_tiny", {"content": "<|endoftext|>", "lstrip": False}
    write_diffusers_folder(folder / "a", random_sd(name).state_dict(), OmegaConf.to_container(sd_config(name)), {}, [])
    (folder / "a" / SPECIAL_TOKENS).write_text(json.dumps({"bos_token": "<|startoftext|>", "pad_token": token}))


def _write_words(folder: Path) -> None:
    ids = {"<cat>": VOCABULARY, "<cat>_1": VOCABULARY + 1, "toy": VOCABULARY + 2}
    tokens = [{"id": i, "content": word, "special": False} for word, i in ids.items()]
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens, "model": {"vocab": {"a": 0}}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {t["id"]: t for t in tokens}}))


def _write_products(folder: Path) -> None:
    """LyCORIS' kinds, on an attention layer and on two convolutions."""
    linear, conv = (
        f"lora_unet_down_blocks_0_{name}" for name in ("attentions_0_transformer_blocks_0_attn1_to_q", "resnets_0_conv1")
    )
    shapes = {
        f"{linear}.hada_w1_a": (320, 1),
        f"{linear}.hada_w1_b": (1, 320),
        f"{linear}.hada_w2_a": (320, 1),
        f"{linear}.hada_w2_b": (1, 320),
        f"{conv}.lokr_w1": (4, 4),
        f"{conv}.lokr_t2": (1, 1, 3, 3),
        f"{conv}.lokr_w2_a": (1, 80),
        f"{conv}.lokr_w2_b": (1, 80),
        "lora_unet_conv_in.lora_up.weight": (320, 1, 1, 1),
        "lora_unet_conv_in.lora_mid.weight": (1, 1, 3, 3),
        "lora_unet_conv_in.lora_down.weight": (1, 4, 1, 1),
    }
    save_file({key: torch.randn(shape) for key, shape in shapes.items()}, folder / "a.safetensors")


def _write_shard(folder: Path) -> None:
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, content in (
            ("0.png", _png()),
            ("0.json", b'{"caption": "a cat"}'),
            ("1.png", _png()),
            ("1.txt", b"b"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _png() -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((12, 8), 50).save(stream, "PNG")
    return stream.getvalue()


def _write_picture(folder: Path, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((40, 24), 50).convert("RGB").save(folder / f"a.{format}", exif=exif)


def _read_picture(folder: Path) -> None:
    images = load_image_folder(16, str(folder), bucket_multiple=4, captions=["words"])
    images.load(0, Crop(False, 0.5, 0.5)), images.pictures[0].content_hash()


def _write_metadata(folder: Path, name: str) -> None:
    write_pictures(folder, [(16, 16), (16, 20)])
    rows = [(f"picture_{i}.png", f"a cat, {i}") for i in range(2)]
    if name.endswith("csv"):
        text = "file_name,text\n" + "".join(f'{n},"{t}"\n' for n, t in rows)
    else:
        text = "".join(json.dumps({"file_name": n, "text": t}) + "\n" for n, t in rows)
    (folder / name).write_text(text)


def _write_caption(folder: Path) -> None:
    write_pictures(folder, [(16, 16)], ["a cat on a mat"])


def _write_run(folder: Path) -> None:
    killed = {"status": "running", "first_step": 1, "command": ["train.py"]}
    rest = {"status": "finished", "first_step": 2, "last_step": 3, "seconds": 1.5, "peak_memory_bytes": 2**20}
    rest |= {"git": {"commit": "a"}, "changes": ["b"]}
    content = {"config": {"a": {"b": 1}}, "data": {"fingerprint": "c"}, "segments": [killed, rest]}
    (folder / "run.json").write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss": 0.5}) + "\n" for i in range(4)))


def _compare(folder: Path, curves: bool) -> None:
    runs = read_runs([folder])
    as_text(comparison_table(runs))
    if curves:
        draw_curves(runs, folder / "curves.png")


def _read_folder(folder: Path) -> None:
    load_image_folder(16, str(folder), bucket_multiple=4)


def _cache(folder: Path) -> TensorCache:
    return TensorCache(folder, {"model": "abc"})


def _write_cached(folder: Path) -> None:
    cache = _cache(folder)
    cache.put("key", {"mean": torch.randn(4, 2, 2), "std": torch.ones(4, 2, 2)})
    cache.path("key").rename(folder / "entry.safetensors")


def _read_cached(folder: Path) -> None:
    path = _cache(folder).path("key")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((folder / "entry.safetensors").read_bytes())
    _cache(folder).get("key")
    load_safetensors(path)


def _write_index(folder: Path) -> None:
    places = {f"layer.{i}": f"model-{i % 2 + 1:05}-of-00002.safetensors" for i in range(6)}
    for file in set(places.values()):
        save_file({name: torch.ones(2) for name in places if places[name] == file}, folder / file)
    text = json.dumps({"metadata": {"total_size": 48}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(text)


def _text_encoder() -> CLIPTextEncoder:
    return CLIPTextEncoder(width=8, layers=1, heads=2, context_length=8)


def _read_judge(folder: Path) -> None:
    with mock.patch("xdiffusion.scoring.train_judge", lambda *given: Judge(1, 12, 10).eval()):
        cached_judge(tiny_images(), folder)


def _read_tower(folder: Path) -> None:
    with mock.patch("xdiffusion.clip_towers.train_contrastive"):
        torch.manual_seed(0)
        own_towers(_text_encoder(), tiny_images(), folder)


def _write_kept(folder: Path, read: Callable[[Path], None]) -> None:
    """What is kept of a training, under a name that tests know."""
    read(folder)
    (kept,) = folder.rglob("*.safetensors")
    (folder / "kept").write_bytes(kept.read_bytes())


def _read_kept(folder: Path, read: Callable[[Path], None]) -> None:
    (kept,) = folder.rglob("*.safetensors")
    kept.write_bytes((folder / "kept").read_bytes())
    read(folder)


READERS: Mapping[str, Reader] = {
    "model, safetensors": Reader("a.safetensors", _write_model, lambda f: load_model(f / "a.safetensors")),
    "model, pickled": Reader("a.pt", _write_pickled, lambda f: load_model_file(f / "a.pt")),
    "Stable Diffusion, safetensors": Reader(
        "a.safetensors", _write_original, lambda f: load_model_file(f / "a.safetensors")
    ),
    "Stable Diffusion, ckpt": Reader("a.ckpt", _write_original, lambda f: load_model_file(f / "a.ckpt")),
    "trainer state": Reader(
        state_path(Path("diffusion-3.safetensors")).name,
        _write_state,
        lambda f: whole_state(f / "diffusion-3.safetensors"),
    ),
    **{
        f"LoRA, {format}": Reader(
            "a.safetensors",
            partial(_write_lora, name="a.safetensors", format=format),
            lambda f: read_lora(f / "a.safetensors"),
        )
        for format in ("native", "kohya", "diffusers", "diffusers-sd15", "cloneofsimo")
    },
    "LoRA, LyCORIS": Reader("a.safetensors", _write_products, lambda f: read_lora(f / "a.safetensors")),
    "LoRA, peft config": Reader(
        "a/unet/adapter_config.json", partial(_write_lora, name="a", format="peft"), lambda f: read_lora(f / "a")
    ),
    "LoRA, peft": Reader(
        "a/unet/adapter_model.safetensors", partial(_write_lora, name="a", format="peft"), lambda f: read_lora(f / "a")
    ),
    "LoRA, JSON": Reader("a.json", _write_json_lora, lambda f: read_lora(f / "a.json")),
    "LoRA, pickled": Reader(
        "a.pt", partial(_write_lora, name="a.pt", format="cloneofsimo-pt"), lambda f: read_lora(f / "a.pt")
    ),
    **{
        f"diffusers folder, {name}": Reader(f"a/{name}", _write_pipeline, lambda f: load_model(f / "a"))
        for name in (*FILES, SPECIAL_TOKENS)
    },
    **{
        f"words of a folder, {name}": Reader(name, _write_words, lambda f: added_words(f, torch.ones(VOCABULARY + 3, 2)))
        for name in ("added_tokens.json", "tokenizer.json", "tokenizer_config.json")
    },
    "learned tokens, safetensors": Reader(
        "a.safetensors", _write_tokens, lambda f: read_learned_tokens(f / "a.safetensors")
    ),
    "learned tokens, pickled": Reader("a.pt", _write_tokens, lambda f: read_learned_tokens(f / "a.pt")),
    "learned tokens, of a Mac": Reader("mac.pt", _write_tokens, lambda f: read_learned_tokens(f / "mac.pt")),
    "weights in several files": Reader(
        "model.safetensors.index.json", _write_index, lambda f: read_indexed(f / "model.safetensors.index.json")
    ),
    "text encoder": Reader(
        "a.safetensors",
        lambda f: save_file(_text_encoder().state_dict(), f / "a.safetensors"),
        lambda f: load_text_encoder(_text_encoder(), f / "a.safetensors"),
    ),
    "judge": Reader("kept", partial(_write_kept, read=_read_judge), partial(_read_kept, read=_read_judge)),
    "vision tower": Reader("kept", partial(_write_kept, read=_read_tower), partial(_read_kept, read=_read_tower)),
    "config, YAML": Reader(
        "a.yaml", lambda f: (f / "a.yaml").write_text(OmegaConf.to_yaml(SETTINGS)), lambda f: load_config(f / "a.yaml")
    ),
    "captions, txt": Reader("picture_0.txt", _write_caption, _read_folder),
    "captions, jsonl": Reader("metadata.jsonl", partial(_write_metadata, name="metadata.jsonl"), _read_folder),
    "captions, csv": Reader("metadata.csv", partial(_write_metadata, name="metadata.csv"), _read_folder),
    **{
        f"picture, {format}": Reader(
            f"a.{format}", partial(_write_picture, format=format), _read_picture
        )
        for format in ("png", "jpg", "webp", "tiff", "gif", "bmp")
    },
    "recipe in a PNG": Reader(
        "a.png",
        lambda f: save_png(Image.new("L", (4, 4)), f / "a.png", {"command": json.dumps(["--seed", "1"])}),
        lambda f: read_metadata(f / "a.png"),
    ),
    "tar shard": Reader("a.tar", _write_shard, lambda f: [p.caption for p in read_shard(f / "a.tar")]),
    "MNIST images": Reader("MNIST/raw/train-images-idx3-ubyte", write_mnist, lambda f: load_mnist(28, str(f))),
    "MNIST labels": Reader("MNIST/raw/train-labels-idx1-ubyte", write_mnist, lambda f: load_mnist(28, str(f))),
    "tensor cache": Reader("entry.safetensors", _write_cached, _read_cached),
    "run.json": Reader("run.json", _write_run, partial(_compare, curves=False)),
    "metrics.jsonl": Reader("metrics.jsonl", _write_run, partial(_compare, curves=True)),
}  # fmt: skip


def write_changed_model(path: Path, **changes: Any) -> Path:
    """A tiny model whose config says what the changes say, by dotted key."""
    config = tiny_config()
    plain = OmegaConf.to_container(config)
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = plain
        for name in sections:
            section = section[name]
        section[last] = value
    save_model(path, tiny_model(config).state_dict(), config=plain, image_shape=(1, 12, 12), step=1)
    return path
