"""Tar shards: the order, the shares of processes, resuming, and files that cannot be trusted."""

import io
import json
import sys
import tarfile
from itertools import islice

import pytest
import torch
from commands import ROOT, TRAIN, run_script, set_words
from PIL import Image
from test_resume import COMMON, STEPS

from xdiffusion.data import shards as module
from xdiffusion.data.shards import MAX_TEXT_BYTES, ShardError, Shards, load_shards, read_shard, shard_paths
from xdiffusion.training.batches import Batches, Source
from xdiffusion.training.records import read_metrics
from xdiffusion.training.run_record import read_run
from xdiffusion.training.settings import TrainingSettings

sys.path.append(str(ROOT / "bench"))
from measure import peak_resident


def png(value, size=(6, 4)):
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


@pytest.fixture
def shards(tmp_path):
    """Three shards of four pictures; picture n is grey of value 10 n, its caption its number."""
    paths = []
    for s in range(3):
        members = []
        for n in range(4 * s, 4 * s + 4):
            text = ("json", json.dumps({"caption": str(n)}).encode()) if n % 2 else ("txt", f"{n}\n".encode())
            members += [(f"part/{n:04d}.png", png(10 * n)), (f"part/{n:04d}.{text[0]}", text[1])]
        paths.append(write_tar(tmp_path / f"{s:05d}.tar", members))
    return paths


def captions(pictures, count):
    return [picture.caption for picture in islice(pictures, count)]


def test_hidden_files_and_empty_captions_beside_others_are_passed_by(tmp_path):
    words, empty = b'\xef\xbb\xbf{"caption": " words "}', b"\n"
    members = [("._1.png", b"mac"), ("1.png", png(1)), ("1.txt", empty), ("1.json", words), ("._1.json", b"mac")]
    members += [("2.png", png(2)), ("2.json", words), ("2.txt", empty)]
    path = write_tar(tmp_path / "a.tar", members)
    assert [(p.name, p.caption) for p in read_shard(path)] == [("a.tar/1", "words"), ("a.tar/2", "words")]


@pytest.mark.parametrize("first", ["txt", "json"])
def test_of_two_captions_a_sample_s_text_file_counts(first, tmp_path):
    texts = {"txt": b"of txt", "json": b'{"caption": "of json"}'}
    members = [("1.png", png(1)), *(("1." + kind, texts[kind]) for kind in sorted(texts, key=lambda k: k != first))]
    assert [p.caption for p in read_shard(write_tar(tmp_path / "a.tar", members))] == ["of txt"]


def test_a_shard_is_read_in_its_order(shards):
    pictures = list(read_shard(shards[1]))
    assert [p.caption for p in pictures] == ["4", "5", "6", "7"]
    assert [p.name for p in pictures] == [f"00001.tar/part/000{n}" for n in range(4, 8)]
    assert pictures[2].pixels().getpixel((0, 0)) == (60, 60, 60)


def test_every_epoch_holds_every_picture_once_in_another_order(shards):
    order = captions(Shards(shards, 4, buffer=5).pictures(), 36)
    epochs = [order[i : i + 12] for i in (0, 12, 24)]
    assert all(sorted(map(int, epoch)) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order == captions(Shards(list(reversed(shards)), 4, buffer=5).pictures(), 36)
    assert order != captions(Shards(shards, 4, buffer=5, seed=1).pictures(), 36)
    firsts = {captions(Shards(shards[:1], 4, buffer=3, seed=seed).pictures(), 1)[0] for seed in range(20)}
    assert firsts == {"0", "1", "2"}  # any of those in the buffer


@pytest.mark.parametrize("first", [1, 11, 12, 30, 127])
def test_the_sequence_can_be_entered_anywhere(shards, first, monkeypatch):
    """And of the epochs before, the first alone is read, which tells how many pictures each has."""
    data, read = Shards(shards, 4, buffer=5), []
    expected = captions(data.pictures(), first + 5)[first:]
    monkeypatch.setattr(module, "read_shard", lambda shard: read.append(shard) or read_shard(shard))
    assert captions(data.pictures(first), 5) == expected
    assert len(read) <= 3 * len(shards)


def rows(data, step, part=0, parts=1, **given):
    """A process' rows of a step's batch of four, as training asks for them."""
    settings = TrainingSettings(batch_size=4, caption_dropout=0.0, **given)
    return Batches([Source(data)], lambda x: (x, None), settings).part(step, part, parts)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_processes_take_rows_of_the_same_batches(shards, parts):
    """However many there are, and after a resume."""
    order = captions(Shards(shards, 4, buffer=3).pictures(), 20)
    for step in (1, 4):
        whole = rows(Shards(shards, 4, buffer=3), step)
        pieces = [rows(Shards(shards, 4, buffer=3), step, part, parts) for part in range(parts)]
        assert torch.equal(torch.cat([p.x0 for p in pieces]), whole.x0)
        assert [c for p in pieces for c in p.captions] == whole.captions == order[4 * step - 4 : 4 * step]
        assert whole.x0.shape == (4, 3, 4, 4)
        greys = [10 * int(caption) / 127.5 - 1 for caption in whole.captions]
        assert whole.x0[:, 0, 0, 0].tolist() == pytest.approx(greys, abs=1e-6)


def test_numbers_can_be_asked_for_in_any_order(shards, monkeypatch):
    monkeypatch.setattr(module, "HELD", 6)
    data, order = Shards(shards, 4, buffer=3), captions(Shards(shards, 4, buffer=3).pictures(), 100)
    for number in (3, 1, 8, 4, 90, 2, 20, 99, 94, 0):
        batch = data.batch(torch.tensor([number]), torch.zeros(1), torch.zeros(3, 1))
        assert (batch.captions, batch.labels.tolist()) == ([order[number]], [number])
        assert len(data._held) <= 6


def test_pictures_are_moved_as_settings_say(tmp_path):
    file = io.BytesIO()
    picture = Image.new("RGB", (8, 4))
    picture.paste((255, 255, 255), (4, 0, 8, 4))  # the right half
    picture.save(file, "PNG")
    path = write_tar(tmp_path / "a.tar", [("a.png", file.getvalue()), ("a.txt", b"a")])
    index, wording = torch.arange(2), torch.zeros(2)
    moves = torch.tensor([[0.1, 0.9], [0.0, 0.0], [0.0, 0.0]])  # the first is flipped; crops begin at the left
    centre, still, moved = (
        Shards([path], 4, **given).batch(index, wording, moves).images[:, 0, 0]
        for given in ({}, {"random_crop": True}, {"random_crop": True, "flip": True})
    )
    assert centre.tolist() == [[-1, -1, 1, 1]] * 2
    assert still.tolist() == [[-1] * 4] * 2
    flipped = Shards([path], 4, flip=True).batch(index, wording, moves).images[:, 0, 0]
    assert flipped.tolist() == [[1, 1, -1, -1], [-1, -1, 1, 1]]
    assert torch.equal(moved, still)


@pytest.mark.parametrize("damaged", [[0], [3]])
def test_a_picture_that_cannot_be_decoded_is_replaced_and_named(tmp_path, damaged, capsys):
    members = []
    for n in range(4):
        members += [(f"{n}.png", b"no picture" if n in damaged else png(10 * n)), (f"{n}.txt", str(n).encode())]
    path = write_tar(tmp_path / "a.tar", members)
    data = Shards([path], 4, buffer=1)
    batch = data.batch(torch.arange(4), torch.zeros(4), torch.zeros(3, 4))
    assert set(data.damaged) == {f"a.tar/{n}" for n in damaged}
    assert f"warning: a.tar/{damaged[0]} is replaced by the next picture" in capsys.readouterr().err
    order = captions(Shards([path], 4, buffer=1).pictures(), 9)
    whole = lambda n: n if int(order[n]) not in damaged else whole(n + 1)  # noqa: E731
    assert batch.labels.tolist() == [whole(n) for n in range(4)]
    assert batch.captions == [order[whole(n)] for n in range(4)]


def test_pictures_none_of_which_can_be_decoded(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", b"no picture"), ("a.txt", b"a")])
    with pytest.raises(ShardError, match=r"100 pictures in a row cannot be decoded, the last a\.tar/a"):
        Shards([path], 4).batch(torch.arange(1), torch.zeros(1), torch.zeros(3, 1))


def link(name):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info


def typed(name, kind):
    info = tarfile.TarInfo(name)
    info.type = kind
    return info


BAD = {
    "a name that leads out": ([("../a.png", png(1)), ("../a.txt", b"a")], "is no plain file inside the shard"),
    "an absolute name": ([("/a.png", png(1))], "is no plain file inside the shard"),
    "a link": ([("a.png", link("a.png"))], "is no plain file inside the shard"),
    "a long text": ([("a.txt", b"a" * (MAX_TEXT_BYTES + 1))], "allowed 1,048,576"),
    "no samples": ([], "holds no sample"),
    "a file with holes": ([("a.png", typed("a.png", tarfile.GNUTYPE_SPARSE))], "is no plain file inside the shard"),
}
SKIPPED = {
    "no caption": ([("a.png", png(1))], "no caption"),
    "no picture": ([("a.txt", b"a")], "no jpg, jpeg, png, webp"),
    "a picture of another kind": ([("a.gif", png(1)), ("a.txt", b"a")], "no jpg, jpeg, png, webp"),
    "an empty caption": ([("a.png", png(1)), ("a.txt", b" \n")], "no caption"),
    "a caption of img2dataset's": ([("a.png", png(1)), ("a.txt", b""), ("a.json", b'{"caption": null}')], "no caption"),
    "half a letter": ([("a.png", png(1)), ("a.json", b'{"caption": "\\ud83d"}')], "its caption is no Unicode text"),
    "a caption that is no text": ([("a.png", png(1)), ("a.json", b'{"caption": 3}')], "no caption"),
    "text that is no UTF-8": ([("a.png", png(1)), ("a.txt", b"\xff\xfe")], "no caption, or none in UTF-8"),
    "a caption without end": (
        [("a.png", png(1)), ("a.txt", b"a" * 16_385)],
        "its caption has more than 16,384 letters",
    ),
    "deep JSON": ([("a.png", png(1)), ("a.json", b"[" * 100_000)], "no caption"),
}


@pytest.mark.parametrize(("members", "reason"), BAD.values(), ids=BAD)
def test_a_shard_that_cannot_be_trusted_is_named(members, reason, tmp_path):
    with pytest.raises(ShardError, match=rf"a\.tar.*{reason}"):
        list(read_shard(write_tar(tmp_path / "a.tar", members)))


@pytest.mark.parametrize(("members", "reason"), SKIPPED.values(), ids=SKIPPED)
def test_a_sample_that_cannot_be_learned_from_is_skipped_named_and_counted(members, reason, tmp_path, capsys):
    """Wherever it stands: a run does not end at it after an hour."""
    sound = [[(f"{n}.png", png(n)), (f"{n}.txt", str(n).encode())] for n in range(4)]
    write_tar(tmp_path / "0.tar", [*sound[0], *sound[1]])
    write_tar(tmp_path / "1.tar", [*sound[2], *members, *sound[3]])
    write_tar(tmp_path / "._1.tar", [])
    shards = load_shards(4, 0, str(tmp_path), buffer=2)
    for epoch in range(2):
        assert sorted(captions(islice(shards.pictures(), 4 * epoch, None), 4)) == ["0", "1", "2", "3"]
    err = capsys.readouterr().err
    assert f"warning: 1.tar/a is skipped: {reason}" in err and "image/shards: 1 samples skipped, as in every epoch" in err
    alone = Shards([write_tar(tmp_path / "alone.tar", members)], 4)
    with pytest.raises(ShardError, match="none of 1 samples can be used"):
        next(alone.pictures())


def test_headers_that_lie_and_files_that_are_cut(shards, tmp_path):
    content = shards[0].read_bytes()
    cut = tmp_path / "cut.tar"
    for length in (100, 512, 700, 3000):
        cut.write_bytes(content[:length])
        with pytest.raises(ShardError, match=r"cut\.tar"):
            list(read_shard(cut))
    with tarfile.open(shards[0]) as tar:
        cut.write_bytes(content[: tar.getmembers()[4].offset])  # between two samples
    with pytest.raises(ShardError, match=r"cut\.tar.*it is cut: the blocks of zeros that end a tar are missing"):
        list(read_shard(cut))
    lie = tarfile.TarInfo("a.png")
    lie.size = 2**40
    cut.write_bytes(lie.tobuf() + b"\0" * 1024)
    with pytest.raises(ShardError, match="says it has 1,099,511,627,776 bytes"):
        list(read_shard(cut))


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_a_shard_of_any_form_is_read(form, tmp_path):
    """Long names and names of other scripts are headers of their own, in GNU's form and in pax'."""
    folder = "a folder/" * 10 if form == tarfile.USTAR_FORMAT else "ein Ordner für Bilder/" * 20
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        tar.addfile(typed(folder, tarfile.DIRTYPE))
        for name, content in ((f"{folder}1.png", png(7)), (f"{folder}1.txt", b"words")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (picture,) = read_shard(tmp_path / "a.tar")
    assert picture.caption == "words" and picture.name == f"a.tar/{folder}1"
    assert picture.pixels().getpixel((0, 0)) == (7, 7, 7)


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ("comment=" + "x" * 10**7, "an extended header of 10,000,0"),
        ("GNU.sparse.map=" + "0,1," * 15_000, "is no plain file inside the shard"),
        ("size=1099511627776", "says it has 1,099,511,627,776 bytes"),
        ("size=-1", "says it has -1 bytes"),
        ("path=../../a.png", "is no plain file inside the shard"),
    ],
    ids=["length", "holes", "size", "negative", "path"],
)
def test_what_a_pax_header_says_is_bounded(records, reason, tmp_path):
    record = f" {records}\n"
    length = next(n for n in range(len(record), len(record) + 20) if len(f"{n}{record}") == n)
    header = typed("pax", tarfile.XHDTYPE)
    header.size = length
    content = f"{length}{record}".encode().ljust(-(-length // 512) * 512, b"\0")
    path = tmp_path / "a.tar"
    path.write_bytes(header.tobuf() + content + typed("a.png", tarfile.REGTYPE).tobuf() + b"\0" * 1024)

    def read():
        with pytest.raises(ShardError, match=reason):
            list(read_shard(path))

    assert peak_resident(read) < 4 * 2**20


def test_settings_that_cannot_be(shards, tmp_path):
    with pytest.raises(ShardError, match="no shards are named"):
        Shards([], 4)
    with pytest.raises(ShardError, match=r"no shard at .*nowhere"):
        Shards([*shards, tmp_path / "nowhere.tar"], 4)
    with pytest.raises(ShardError, match="buffer=0"):
        Shards(shards, 4, buffer=0)


def test_a_folder_and_a_pattern_name_the_same_shards(shards, tmp_path):
    assert shard_paths(str(tmp_path)) == shards == shard_paths(f"{tmp_path}/{{00000..00002}}.tar")
    assert shard_paths(str(shards[0])) == shards[:1]
    assert [path.name for path in shard_paths("a-{8..11}.tar")] == ["a-8.tar", "a-9.tar", "a-10.tar", "a-11.tar"]


@pytest.mark.parametrize(
    ("data_dir", "reason"),
    [
        ("empty", "empty holds no .tar file"),
        ("{3..1}.tar", "one pair of numbers"),
        ("{0..999999}.tar", "one pair of numbers"),
        ("{0..1}/{0..1}.tar", "one pair of numbers"),
        ("{00000..00003}.tar", "no shard at .*00003.tar"),
        ("nowhere", "no shard at .*nowhere"),
        (None, "image/shards needs its tar files: --data_dir"),
    ],
)
def test_places_without_shards(shards, tmp_path, data_dir, reason):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ShardError, match=reason):
        load_shards(4, 0, data_dir and f"{tmp_path}/{data_dir}")


def test_training_on_shards_goes_on_where_it_stopped(shards, tmp_path, capfd):
    words = [*COMMON, "--dataset_name", "image/shards", "--data_dir", f"{tmp_path}/{{00000..00002}}.tar"]
    words += set_words(["data.buffer=3", "data.random_crop=true", "optimizer.schedule=constant"])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_script(TRAIN, *words, "--output_path", whole) == 0
    assert "image/shards" in capfd.readouterr().out
    assert run_script(TRAIN, *words, "--num_training_steps", 2, "--output_path", cut) == 0
    assert run_script(TRAIN, *words, "--output_path", cut, "--resume_from", "auto") == 0
    losses = [[m["loss"] for m in read_metrics(folder / "metrics.jsonl")] for folder in (whole, cut)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
    assert read_run(whole)["data"] == read_run(cut)["data"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--data_dir", "nowhere"], "no shard at nowhere"),
        (["--set", "data.seed=3"], "seed"),
        (["--set", "cache.latents=true"], "cache.latents=true is for image/folder"),
    ],
)
def test_runs_that_shards_do_not_allow(shards, tmp_path, words, reason, capfd):
    common = [*COMMON, "--dataset_name", "image/shards", "--data_dir", tmp_path, "--output_path", tmp_path / "run"]
    assert run_script(TRAIN, *common, *words) == 2
    assert reason in capfd.readouterr().err.splitlines()[-1]
