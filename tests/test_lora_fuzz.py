"""Damaged and hostile LoRA files: one documented error that says what is wrong, or a read that says what was mended.

`FUZZ_EXAMPLES=1200 pytest tests/test_lora_fuzz.py` mutates 10,000 files (1,200 of each kind).
"""

import json
import os
import shutil
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.checkpoints.lora_formats import FORMATS, LayerTable, read_lora, sd_layer_table, write_lora

SD15 = sd_layer_table("sd15")
ATTENTION = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))


def kohya_tensors(rank=2):
    return {f"lora_unet_{ATTENTION[5:].replace('.', '_')}_to_q.lora_{way}.weight": tensor
            for way, tensor in (("down", torch.ones(rank, 320)), ("up", torch.ones(320, rank)))}  # fmt: skip


def renamed(old, new):
    return {name.replace(old, new): tensor for name, tensor in kohya_tensors().items()}


DOWN = next(iter(kohya_tensors()))
STEM = DOWN.split(".")[0]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "it holds no factors"),
        ({"weight": torch.ones(2)}, "'weight' is a key of no LoRA format"),
        ({f"{STEM}.hada_w1_a": torch.ones(2)}, "is no whole LoHa, it has hada_w1_a"),
        ({f"{STEM}.lora_mid.weight": torch.ones(2), **kohya_tensors()}, "which the LoCon .* does not fit: .*lora_mid"),
        ({DOWN: torch.ones(2, 320)}, "one factor of .*to_q is missing: lora_B"),
        ({**kohya_tensors(), DOWN: torch.ones(3, 320)}, "have no common rank"),
        ({**kohya_tensors(), DOWN: torch.ones(2, 320, dtype=torch.int64)}, "no plain float tensor"),
        ({**kohya_tensors(), f"{STEM}.alpha": torch.ones(2)}, r"alpha of .* is \(2,\), not one number"),
        ({**kohya_tensors(), f"{STEM}.alpha": torch.tensor(float("nan"))}, "alpha nan .* is no finite number"),
        ({**kohya_tensors(), f"{STEM}.dora_scale": torch.ones(1, 320)}, "DoRA magnitude .* are another method"),
        (renamed("_blocks_0", "_blocks_9"), "1 of its 1 modules are no layers of Stable Diffusion"),
        (
            renamed(STEM, "diffusion_model.double_blocks.0.img_attn.qkv"),
            "no layers of Stable Diffusion .*double_blocks",
        ),
        (renamed("lora_unet", "lora_te2"), "1 of its 1 modules are no layers of Stable Diffusion"),
        ({**kohya_tensors(), "unet.conv_in.lora_A.weight": torch.ones(1)}, "mixes the keys of diffusers and kohya"),
        ({**kohya_tensors(), **renamed("lora_unet", "lora_unet_unet")}, "both give lora_A"),
        ({"unet:1:up": torch.ones(2, 1), "unet:1:down": torch.ones(1, 2)}, "not counted from 0 without gap"),
        ({"unet:0:up": torch.ones(2, 1), "unet:0:down": torch.ones(1, 2)}, "fit no set of layers of unet"),
        ({"vae:0:up": torch.ones(2, 1), "vae:0:down": torch.ones(1, 2)}, "'vae' are not counted"),
        ({"base_model.model.a.lora_A.weight": torch.ones(1, 2)}, "give the folder that holds both"),
    ],
)
def test_malformed_tensors_are_named(tensors, message, tmp_path):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_lora(tmp_path / "a.safetensors", SD15)


def test_a_wrong_shape_for_the_base_is_named(tmp_path):
    save_file({**kohya_tensors(), DOWN: torch.ones(2, 768)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"to_q has weight \(320, 320\), the file's factors are A \(2, 768\)"):
        read_lora(tmp_path / "a.safetensors", SD15)


@pytest.mark.parametrize(
    ("tensors", "repair"),
    [
        (renamed("lora_unet_", "lora_unet_unet_"), "doubled prefix 'lora_unet_unet_' read as 'lora_unet_'"),
        ({**kohya_tensors(), f"{STEM}.alpha": torch.tensor(0.0)}, "alpha 0 read as alpha = rank"),
        ({**kohya_tensors(), DOWN: torch.ones(2, 320, 1, 1)}, "factors of different dimensions"),
        (
            {f"unet.{ATTENTION}.to_q.lora_{x}.default.weight": t for x, t in zip("AB", kohya_tensors().values())},
            "the adapter's name 'default' taken out of the keys",
        ),
    ],
)
def test_repairs_are_named(tensors, repair, tmp_path):
    save_file(tensors, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors", SD15)
    assert list(lora.modules) == [f"{ATTENTION}.to_q"]
    assert torch.equal(lora.modules[f"{ATTENTION}.to_q"].delta(), torch.full((320, 320), 2.0))
    assert any(repair in line for line in lora.repairs)


@pytest.mark.parametrize(
    "content",
    [
        {"a": 1}, 3, [torch.ones(2, 1)], [torch.ones(2, 1), 3], [], [torch.ones(2), torch.ones(2)],
        [torch.ones(1).expand(10**6, 10**6), torch.ones(1).expand(10**6, 10**6)],
        [torch.ones(2, 1).to_sparse(), torch.ones(1, 2)],
    ],
    ids=range(8),
)  # fmt: skip
def test_malformed_pickles_are_named(content, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        read_lora(tmp_path / "a.pt")


# any damage

ANY_BYTE = st.one_of(st.integers(0, 255), st.sampled_from([ord(c) for c in '0123456789"{}[],:.-eN_:']))
EDITS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), ANY_BYTE), max_size=4)


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    """A small file of every format, by name; old diffusers' by hand."""
    folder = tmp_path_factory.mktemp("whole")
    names = [f"{ATTENTION}.to_q", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"]
    modules = {n: LoRAFactors(torch.randn(1, SD15[n][1]), torch.randn(SD15[n][0], 1), 2.0) for n in names}
    lora = LoRAFile(modules, tokens={"<s1>": torch.ones(3)})
    paths = {}
    for format, kind in FORMATS.items():
        paths[format] = folder / f"{format}{kind.suffix}"
        if kind.write:
            write_lora(lora, paths[format], format)
    old = {f"{ATTENTION}.processor.to_q_lora.{way}.weight": torch.ones(s) for way, s in (("down", (1, 320)), ("up", (320, 1)))}
    save_file(old, paths["diffusers-processors"])
    return paths


def parts_of(path):
    """The files that one LoRA is in."""
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file())
    return sorted({path, *(p for p in path.parent.glob(f"{path.stem}.*.pt"))})


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:Validating sparse")
@pytest.mark.parametrize("format", FORMATS)
@given(edits=EDITS, kept=st.one_of(st.just(1.0), st.floats(0, 1)), near_start=st.booleans(), which=st.integers(0, 9))
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_reads_or_raises_the_one_error(format, edits, kept, near_start, which, whole_files, tmp_path):
    copy = tmp_path / whole_files[format].name
    for part in parts_of(whole_files[format]):
        target = copy / part.relative_to(whole_files[format]) if copy.suffix == "" else tmp_path / part.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(part, target)
    damaged = parts_of(copy)[which % len(parts_of(copy))]
    content = bytearray(damaged.read_bytes())
    reach = min(len(content), 3000) if near_start else len(content)  # headers and pickled structure come first
    for place, byte in edits:
        content[int(place * reach)] = byte
    damaged.write_bytes(content[: int(kept * len(content))])
    try:
        lora = read_lora(copy, SD15)
    except CheckpointError as error:
        assert str(tmp_path) in str(error)
    else:
        assert lora.modules
        assert all(factors.delta().dim() >= 2 for factors in lora.modules.values())


@pytest.mark.parametrize("length", [2**62, 2**40, 200_000_000])
def test_an_absurd_header_length(length, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" * 8)
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        read_lora(tmp_path / "a.safetensors")


@pytest.mark.parametrize("shape", [[2**40, 2**40], [2**31, 2], [-1, 4]])
def test_an_absurd_shape(shape, tmp_path):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]}
    header = json.dumps({f"{ATTENTION}.to_q.lora_A.weight": entry}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        read_lora(tmp_path / "a.safetensors")


class Touches:
    """Unpickled by the plain unpickler, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


@pytest.mark.parametrize("name", ["a.pt", "a.text_encoder.pt", "a.ti.pt"])
def test_code_in_a_list_or_beside_it_is_not_run(name, tmp_path, whole_files):
    for part in parts_of(whole_files["cloneofsimo-pt"]):
        shutil.copyfile(part, tmp_path / part.name.replace("cloneofsimo-pt", "a"))
    torch.save([Touches(tmp_path / "made")], tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name} is not a torch file of plain weights"):
        read_lora(tmp_path / "a.pt")
    assert not (tmp_path / "made").exists()


JSON_TABLE = LayerTable({"0": (3, 2), "2": (2, 3)})
JSON_FILE = json.dumps([[[1.0], [2.0], [3.0]], [[0.5, -0.5]], [[1e-3], [2]], [[1, 2, 3]]]).encode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "no JSON list of factors"),
        (b"3", "no JSON list of factors"),
        (b'{"a": 1}', "no JSON list of factors"),
        (b'[["a"], ["b"]]', "no JSON list of factors"),
        (b"[" * 100_000, "no JSON list of factors"),
        (b"[[[1, 2], [3]], [[1]]]", "no JSON list of factors"),
        (b"[[[1" + b"0" * 5000 + b"]], [[1]]]", "no JSON list of factors"),
        (b"[[[1]]]", "no list of pairs"),
        (b"[1, 2]", "no low-rank pair"),
        (b"[]", "fit no set of layers"),
    ],
)
def test_json_that_holds_no_factors_is_refused(text, message, tmp_path):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        read_lora(tmp_path / "a.json", JSON_TABLE)


def test_json_too_large_for_factors_is_not_read(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(33 << 20)
    with pytest.raises(CheckpointError, match="larger than 32 MiB"):
        read_lora(tmp_path / "a.json", JSON_TABLE)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(JSON_FILE)), st.integers(0, 8), st.binary(max_size=8))
def test_json_with_other_bytes_in_it_is_read_or_refused(tmp_path, place, length, other):
    (tmp_path / "a.json").write_bytes(JSON_FILE[:place] + other + JSON_FILE[place + length :])
    try:
        lora = read_lora(tmp_path / "a.json", JSON_TABLE)
    except CheckpointError:
        return
    assert lora.modules.keys() <= JSON_TABLE.keys()
