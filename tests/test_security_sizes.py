"""Files from strangers that claim more than they hold: no memory, no time, no depth beyond what their size lets expect."""

import json
import os
import re
import struct
import sys
import zipfile
import zlib

import pytest
import torch
from commands import EVALUATE, ROOT, run_script
from hostile_files import READERS, write_changed_model
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from xdiffusion.build import load_config
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.checkpoints.lora_formats import read_lora, write_lora
from xdiffusion.checkpoints.native import load_model_file, save_model
from xdiffusion.checkpoints.patterns import is_ending, module_pattern
from xdiffusion.checkpoints.reading import MAX_HEADER_BYTES, load_pickled, load_safetensors
from xdiffusion.checkpoints.streaming import StoredTensors
from xdiffusion.config_files import ConfigError, load_yaml
from xdiffusion.loading import load_model
from xdiffusion.pictures import read_metadata
from xdiffusion.training.state import whole_state

sys.path.append(str(ROOT / "bench"))
from measure import peak_resident


def write_header(path, entries, body=b""):
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [1]\nb: [*a, *a]\n", "aliases are not read"),
        ("a: &a {x: 1}\nb: {<<: *a}\n", "aliases are not read"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested more than 16 deep"),
        ("a: " + "1:" * 50_000 + "1", "allowed are 65,536"),
        (f"a: {'1:' * 300}1.5", "too large to convert to float"),
        (f"a: [{'1,' * 5000}]", "more than 2,000 values"),
        ("a: " + "1" * 5000, "Exceeds the limit"),
        (f"a: {'${' * 2000}{'}' * 2000}", "nothing in it is replaced"),
        ("base: [a.yaml]", "reads itself"),
        (f"base: {'a' * 5000}.yaml", "no config file at"),
    ],
    ids=["laughs", "merged laughs", "depth", "length", "base 60", "values", "digits", "interpolation", "itself", "name"],
)  # fmt: skip
def test_a_config_bomb_is_refused(text, message, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "a.yaml")


def test_bases_that_multiply_are_refused(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.yaml").write_text(f"base: [{', '.join([f'{i + 1}.yaml'] * 8)}]\n")
    (tmp_path / "8.yaml").write_text("a: 1\n")
    with pytest.raises(ConfigError, match="names more than 64 files"):
        load_config(tmp_path / "0.yaml")


def test_values_of_bases_are_counted_as_often_as_they_are_read(tmp_path):
    """Merging takes a tenth of a millisecond and more for each."""
    (tmp_path / "a.yaml").write_text(f"base: [{'b.yaml,' * 60}]\n")
    (tmp_path / "b.yaml").write_text(f"a: [{'1,' * 1000}]\n")
    with pytest.raises(ConfigError, match=r"b\.yaml.* more than 2,000 values"):
        load_config(tmp_path / "a.yaml")


def test_bases_are_laid_over_each_other_once(tmp_path):
    """Not again at every level of a chain of bases, or a long one would cost its length squared."""
    laid = []
    for i in range(30):
        (tmp_path / f"{i}.yaml").write_text(f"base: {i + 1}.yaml\n")
    (tmp_path / "30.yaml").write_text("a: 1\n")
    assert load_yaml(tmp_path / "0.yaml", lambda source, below, above: laid.append(above) or below | above) == {"a": 1}
    assert laid == [{"a": 1}, *[{}] * 30]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.network.num_res_blocks", 10**9),
        ("model.network.transformer_depth", [10**9, 10**9]),
        ("model.network.channels", [2**62, 2**62]),
        ("model.network.kind", [1]),
        ("model.text_encoder.layers", 10**9),
        ("model.text_encoder.width", 2**70),
        ("diffusion.schedule", {"kind": "betas", "num_timesteps": 10**12}),
        ("data.image_size", 10**6),
        ("data.image_size", -1),
        ("data.image_size", 1e6),
        ("data.image_size", 24),  # the header says 12 x 12
        ("data.image_size", [[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]),
    ],
)
def test_a_config_that_asks_for_too_much_is_refused(key, value, tmp_path):
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        load_model(write_changed_model(tmp_path / "a.safetensors", **{key: value}))


@pytest.mark.parametrize(
    ("lora_says", "message"),
    [
        (None, "base.safetensors: data: image_size=1024: 14,376 images of image/digits take 15,074,328,576 bytes in memory"),
        (8190, "lora.safetensors: data: image_size=8190: 14,376 images of image/digits take 964,286,013,600 bytes in memory"),
        (10**9, "lora.safetensors: data.image_size=1000000000 must be from 1 to 8,192"),
    ],
)
def test_a_size_in_a_header_does_not_fill_the_memory_of_an_evaluation(lora_says, message, tmp_path, capsys):
    file = load_model_file(write_changed_model(tmp_path / "base.safetensors"))
    base_size = 12 if lora_says else 1024
    config = file.config | {"data": file.config["data"] | {"image_size": base_size}}
    save_model(file.path, file.tensors, config=config, image_shape=(1, base_size, base_size), step=0)
    says = config | {"data": config["data"] | {"image_size": lora_says or 0}}
    factors = LoRAFactors(torch.ones(1, 16), torch.ones(16, 1), 1.0)
    lora = LoRAFile({"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": factors}, config=says)
    write_lora(lora, tmp_path / "lora.safetensors", "native")
    words = ["--lora_path", tmp_path / "lora.safetensors"] if lora_says else []
    assert run_script(EVALUATE, "--checkpoint", file.path, *words, "--dataset_name", "image/digits", "--force_cpu") == 2
    assert message in capsys.readouterr().err


def test_a_header_of_many_values_is_refused(tmp_path):
    path = write_changed_model(tmp_path / "a.safetensors", **{"model.network.channels": [16] * 100_000})
    with pytest.raises(ConfigError, match=r"a\.safetensors: model\.network\.channels has more than 2,000 values"):
        load_model(path)


@pytest.mark.parametrize("config", ["[" * 5000, "5", '"text"', "NaN", '{"data":' * 500 + "1" + "}" * 500])
def test_a_config_of_a_header_that_is_none_is_named(config, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", {"config": config})
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        load_model(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["captions, jsonl", "run.json", "LoRA, peft config"])
def test_deep_json_is_named(name, tmp_path):
    READERS[name].write(tmp_path)
    (tmp_path / READERS[name].damaged).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=READERS[name].damaged.rpartition("/")[2]):
        READERS[name].read(tmp_path)


@pytest.mark.parametrize("name", ["LoRA, peft config", "recipe in a PNG", "tar shard", "run.json", "config, YAML"])
def test_a_pipe_is_not_waited_for(name, tmp_path):
    READERS[name].write(tmp_path)
    path = tmp_path / READERS[name].damaged
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=str(tmp_path)):
        READERS[name].read(tmp_path)


@pytest.mark.parametrize("said", ["[" * 100_000, " " * 2**20 + "{}", '{"prediction_type": []}', "[]"])
def test_a_scheduler_that_is_none_is_named(said, tmp_path):
    for folder in ("unet", "vae", "text_encoder", "scheduler"):
        (tmp_path / folder).mkdir()
        save_file({"a": torch.ones(1)}, tmp_path / folder / "model.safetensors")
    (tmp_path / "unet" / "config.json").write_text("{}")
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(said)
    with pytest.raises(CheckpointError, match="scheduler_config"):
        load_model_file(tmp_path)


def test_a_long_header_is_refused_before_it_is_read(tmp_path):
    path = write_header(tmp_path / "a.safetensors", b"{" + b" " * MAX_HEADER_BYTES)
    with pytest.raises(CheckpointError, match="header has 8,388,609 bytes"):
        load_safetensors(path)


@pytest.mark.parametrize("content", [b"# A model card\n", b"version https://git-lfs.github.com/spec/v1\n", bytes(16)])
@pytest.mark.parametrize("name", ["README.safetensors", "README"])
def test_what_does_not_begin_as_safetensors_do_is_said_to_be_none(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(f"{name} is no safetensors file: it begins with {content[:9]!r}")):
        load_model_file(tmp_path / name)


@pytest.mark.parametrize("shape", [[2**63, 0], [0, 2**64 - 1]])
def test_a_shape_of_no_bytes_that_torch_cannot_have_is_named(shape, tmp_path):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    path = write_header(tmp_path / "a.safetensors", {"a": entry})
    for read in (load_safetensors, lambda path: dict(StoredTensors(path)), load_model_file):
        with pytest.raises(CheckpointError, match=r"a\.safetensors"):
            read(path)


def repack(source, target, compression, change=lambda name, content: content):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for record in old.infolist():
            new.writestr(record.filename, change(record.filename, old.read(record)))
    return target


def test_a_pickle_that_inflates_is_refused(tmp_path):
    torch.save({"a": torch.ones(4)}, tmp_path / "a.pt")
    bomb = repack(
        tmp_path / "a.pt", tmp_path / "b.pt", zipfile.ZIP_DEFLATED,
        lambda name, content: content + bytes(10**7) if name.endswith(".pkl") else content,
    )  # fmt: skip
    assert bomb.stat().st_size < 50_000
    with pytest.raises(CheckpointError, match="records are compressed"):
        load_pickled(bomb)


def test_a_directory_without_end_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for i in range(20_000):
            archive.writestr(f"a/data/{i}", b"")
    with pytest.raises(CheckpointError, match=r"its directory has 1,[0-9,]+ bytes; allowed are 1,048,576"):
        load_pickled(tmp_path / "a.pt")


def nested(levels):
    value = ["a"]
    for _ in range(levels):
        value = [value, value]
    return value


def in_itself():
    value = []
    value.append(value)
    return value


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: torch.ones(1).expand(10**6, 10**6), "claims the shape"),
        (lambda: [torch.ones(1000)] * 100, "tensors claim 400,000 bytes"),
        (lambda: nested(40), "names more than 100,000 values"),
        (in_itself, "names more than 100,000 values"),
        (lambda: torch.ones(2, 2).to_sparse(), "sparse_tensor, which no weights need"),
        (lambda: torch.ones(2, device="meta"), "meta_tensor_no_storage, which no weights need"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj(), "ComplexFloatStorage, which no weights need"),
        (lambda: torch.ones(1).as_strided((1,) * 65, (1,) * 65), "a tensor of 65 sides and 65 strides"),
        (lambda: {k * (2**61 - 1): 0 for k in range(9)}, "a number of more than 60 bits as a key"),
    ],
    ids=["shape", "sharing", "laughs", "itself", "sparse", "meta", "complex", "sides", "equal hashes"],
)
def test_a_pickle_that_claims_more_than_it_holds_is_refused(content, message, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    torch.save({"hash": "", "a": content()}, tmp_path / "a.state.pt")
    with pytest.raises(CheckpointError, match=message):
        whole_state(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+", "(a|a)*b", "(a*)*", "a?" * 30 + "a" * 30, "(a|a)" * 30, ".*" * 20, "(", "x" * 1000),
        *("b|.*.*.*a", "(.*a|.*b|.*c)", r".*\|.*|.*[|]a.*b.*|c", "(?x)(.*a#)\n|.*b.*#(\n)", "a|" * 20),
        *("(?x)(a+) +$", "(?x:(a+)\n+)$", "(?-i:(?x)(a+) +)$"),
    ],
)
def test_a_pattern_that_could_take_for_ever_is_refused(pattern):
    with pytest.raises(ValueError, match=r"is too long, or has too many|repeats a group|sets flags|is no regular expression"):
        module_pattern(pattern)


@pytest.mark.parametrize(
    ("name", "found"),
    [("a.to_q", True), ("a.ff.proj_in", True), ("a.conv1", True), ("conv_in", True), ("a.proj", False), ("|", True)],
)
def test_each_alternative_of_a_pattern_may_hold_repetitions(name, found):
    pattern = module_pattern(r".*to_[qkv]|.*(ff|mlp)\.proj_(in|out)|.*conv.*|[|]")
    assert bool(pattern.fullmatch(name)) is found


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("to_q", True),
        ("attn.to_q", True),
        ("o_q", False),
        (r".*\.to_[qk]", True),
        ("^to_q", False),
        (r"b\.\d+\..*", True),
    ],
)
def test_a_pattern_is_an_ending_of_a_name(pattern, found):
    assert is_ending(pattern, "b.10.attn.to_q") is found


@pytest.mark.parametrize("content", ["[" + "[]," * 10**6 + "[]]", "[[" + "0," * 2**22 + "0]]", "[" + "{}," * 10**6 + "{}]"])
def test_lists_without_end_in_a_lora_are_not_read(content, tmp_path, no_hang):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"a\.json holds more than 4,194,304 numbers or 524,288 lists"):
        read_lora(tmp_path / "a.json")


def test_the_largest_lists_of_a_lora_take_what_is_promised(tmp_path):
    rows = ",".join(["[" + ",".join(["0.123"] * 8) + "]"] * 500_000)  # 24 MB
    (tmp_path / "a.json").write_text(f"[[{rows}]]")

    def read():
        with pytest.raises(CheckpointError, match="no list of pairs"):
            read_lora(tmp_path / "a.json")

    assert peak_resident(read) < 256 * 2**20


def test_a_long_name_is_not_compared():
    with pytest.raises(ValueError, match="is no module's name"):
        is_ending("(a|b)", "a" * 100_000)


def png(*chunks):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)


def test_a_text_that_inflates_in_a_picture_is_refused(tmp_path):
    text = b"command\0\0" + zlib.compress(bytes(50 * 2**20), 9)
    header = struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(png((b"IHDR", header), (b"zTXt", text), (b"IDAT", zlib.compress(bytes(20)))))
    with pytest.raises(ValueError, match=r"a\.png cannot be read as a PNG: Decompressed [dD]ata [tT]oo [lL]arge"):
        read_metadata(tmp_path / "a.png")


def test_the_recipe_of_a_huge_picture_is_read_without_its_pixels(tmp_path, monkeypatch):
    info = PngInfo()
    info.add_text("command", "[]")
    Image.new("1", (9000, 9000)).save(tmp_path / "a.png", pnginfo=info)
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
    assert read_metadata(tmp_path / "a.png") == {"command": "[]"}
