"""Two real processes (gloo, this machine) share a batch: the same losses, one writer, and no survivor that hangs."""

import atexit
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from commands import ROOT, TRAIN, TRAIN_CLIP, run_script, set_words
from test_resume import COMMON, STEPS

from xdiffusion.checkpoints.reading import load_safetensors
from xdiffusion.training.folder_lock import held
from xdiffusion.training.interruption import resuming_command
from xdiffusion.training.processes import LostProcess, check_shares, leaving_together, spread
from xdiffusion.training.records import read_metrics
from xdiffusion.training.run_record import read_run
from xdiffusion.training.settings import TrainingSettings

LORA = ["--use_lora_training", *set_words(["text_encoder_lora.rank=1", "lora.target_modules=attention"])]
BOUND = 60  # seconds, of a machine that is busy


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(words, processes=2, words_of_last=(), script=ROOT / TRAIN):
    """The processes of one run, as torchrun starts them but without its watch over them."""
    shared = {
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "WORLD_SIZE": str(processes),
    }
    command = [sys.executable, str(script), *map(str, words)]
    return [
        subprocess.Popen(
            [*command, *(words_of_last if rank == processes - 1 else [])],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


def start_machines(words, folders):
    """A run of one process on each of several machines, started on each by torchrun; they share no folder."""
    port, machines = free_port(), []
    for rank, folder in enumerate(folders):
        folder.mkdir()
        launch = ["--nnodes", len(folders), "--node_rank", rank, "--nproc_per_node", 1]
        launch += ["--master_addr", "127.0.0.1", "--master_port", port]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *launch,
            ROOT / TRAIN,
            *words,
            "--output_path",
            folder / "run",
        ]
        machines.append(
            subprocess.Popen(
                [*map(str, command)],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return machines


def finish(process, bound=BOUND):
    """(status, stdout, stderr) of a process that ends in time."""
    try:
        out, err = process.communicate(timeout=bound)
        return process.returncode, out, err
    finally:
        process.kill()


def wait_for_steps(folder, count):
    until = time.monotonic() + BOUND
    while len(list(read_metrics(folder / "metrics.jsonl"))) < count:
        assert time.monotonic() < until, "no step was taken"
        time.sleep(0.05)


def curve(folder):
    return [m["loss"] for m in read_metrics(folder / "metrics.jsonl")]


FIRST_ONES = """
import sys, time
from datetime import timedelta
from accelerate import PartialState
from xdiffusion.training.processes import first_ones_first
process = PartialState(cpu=True, timeout=timedelta(seconds=2))
with first_ones_first(process):
    if process.is_main_process:
        time.sleep(5)
        if "fail" in sys.argv:
            raise ValueError("no download")
    print(process.process_index, time.time())
"""


@pytest.mark.parametrize("words", [[], ["fail"]], ids=["long", "failing"])
def test_what_the_first_process_makes_may_take_longer_than_torch_waits(words, tmp_path):
    (tmp_path / "first_ones.py").write_text(FIRST_ONES)
    statuses, outputs, errors = zip(*map(finish, start(words, script=tmp_path / "first_ones.py")))
    if words:
        assert 0 not in statuses and "no download" in errors[0], errors
        return
    assert statuses == (0, 0), errors
    (first, first_at), (second, second_at) = (map(float, out.split()) for out in outputs)
    assert (first, second) == (0, 1) and first_at < second_at


def test_two_processes_have_the_losses_of_one_and_one_goes_on_where_two_stopped(tmp_path):
    words = [*COMMON, "--batch_size", 8, "--set", "training.gradient_accumulation_steps=2"]
    assert run_script(TRAIN, *words, "--output_path", tmp_path / "one") == 0
    two = start([*words, "--output_path", tmp_path / "two"])
    statuses, outputs, errors = zip(*map(finish, two))
    assert statuses == (0, 0), errors
    assert "parameters: network" in outputs[0]
    assert outputs[1] == ""  # the first alone speaks and writes
    assert read_run(tmp_path / "two")["segments"][0]["processes"] == 2
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-5)
    name = f"diffusion-{STEPS}.safetensors"
    one, other = (load_safetensors(tmp_path / folder / name)[0] for folder in ("one", "two"))
    assert all(torch.allclose(one[key], other[key], atol=1e-4) for key in one)

    for kind in ("safetensors", "state.pt"):
        (tmp_path / "two" / f"diffusion-{STEPS}.{kind}").unlink()
    assert run_script(TRAIN, *words, "--output_path", tmp_path / "two", "--resume_from", "auto") == 0
    assert [s["first_step"] for s in read_run(tmp_path / "two")["segments"]] == [1, STEPS]
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-5)


def test_all_processes_draw_the_noise_of_a_run_that_had_diverged(tmp_path):
    """Only the first knows that it had, from its run.json."""
    words = [*COMMON, "--batch_size", 8, "--resume_from", "auto", "--output_path"]
    assert run_script(TRAIN, *words, tmp_path / "one") == 0
    noises = [curve(tmp_path / "one")]
    for kind in ("safetensors", "state.pt"):
        (tmp_path / "one" / f"diffusion-{STEPS}.{kind}").unlink()
    record = tmp_path / "one/run.json"
    record.write_text(record.read_text().replace('"finished"', '"diverged"'))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert run_script(TRAIN, *words, tmp_path / "one") == 0
    statuses, _, errors = zip(*map(finish, start([*words, tmp_path / "two"])))
    assert statuses == (0, 0), errors
    noises.append(curve(tmp_path / "one"))
    assert noises[0][: STEPS - 1] == noises[1][: STEPS - 1] and noises[0][-1] != noises[1][-1]
    assert curve(tmp_path / "two") == pytest.approx(noises[1], rel=1e-5)


def test_two_machines_without_a_common_disk_have_the_losses_of_one_process(tmp_path, monkeypatch):
    """The first writes; the second makes for itself what the run begins with (here the tiny CLIP), and writes no more."""
    words = [
        *COMMON,
        "--batch_size",
        8,
        *set_words(["model.text_encoder.pretrained=tiny", "clip.training.num_training_steps=3"]),
    ]
    folders = [tmp_path / "first", tmp_path / "second"]
    statuses, _, errors = zip(*map(finish, start_machines(words, folders)))
    assert statuses == (0, 0), errors
    monkeypatch.chdir(tmp_path)
    assert run_script(TRAIN, *words, "--output_path", tmp_path / "one") == 0
    assert curve(folders[0] / "run") == pytest.approx(curve(tmp_path / "one"), rel=1e-5)
    assert read_run(folders[0] / "run")["segments"][0]["processes"] == 2
    written = [sorted(path.suffix for path in folder.rglob("*") if path.is_file()) for folder in folders]
    assert ".pt" in written[0] and written[1] == [".safetensors"]


@pytest.mark.parametrize(
    ("of_last", "what"),
    [
        (["--dataset_name", "image/digits_inverted"], "data: [0-9a-f]*"),
        (["--set", "optimizer.learning_rate=0.1"], "settings: [0-9a-f]*"),
        (["--resume_from", "auto", "--output_path", "{folder}/old"], "checkpoint: step 2, [0-9a-f]*"),
    ],
)
def test_processes_that_do_not_begin_with_the_same_are_told_so(of_last, what, tmp_path):
    """Else the run would end as if all were well, with losses of no run."""
    assert run_script(TRAIN, *COMMON, "--num_training_steps", 2, "--output_path", tmp_path / "old") == 0
    words = [*COMMON, "--batch_size", 8, "--output_path", tmp_path / "run", "--resume_from", "auto"]
    results = map(finish, start(words, words_of_last=[word.format(folder=tmp_path) for word in of_last]))
    for status, _, err in results:
        assert status == 2
        assert re.search(f"error: the processes do not begin with the same {what} in process 1", err.splitlines()[-1])
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_tiny_clip_that_one_process_cannot_begin_is_a_line_in_each(tmp_path):
    words = ["--config_path", COMMON[1], "--force_cpu", "--output_path", tmp_path / "clip.safetensors"]
    with held(tmp_path / "clip"):
        results = [*map(finish, start(words, script=ROOT / TRAIN_CLIP))]
    assert [status for status, _, _ in results] == [2, 1]
    assert "is in use by another run" in results[0][2].splitlines()[-1]
    assert results[1][2].splitlines()[-1].startswith("error: before the first step, another process of this run is gone")


def test_processes_that_do_not_train_the_same_tiny_clip_are_told_so(tmp_path):
    words = ["--config_path", COMMON[1], "--force_cpu", "--output_path", tmp_path / "clip.safetensors"]
    for status, _, err in map(finish, start(words, script=ROOT / TRAIN_CLIP, words_of_last=["--seed", "1"])):
        assert status == 2
        assert "error: the processes do not begin with the same settings" in err.splitlines()[-1]


def test_of_two_processes_the_first_alone_prints(tmp_path):
    words = ["--config_path", COMMON[1], "--force_cpu", "--num_training_steps", 1]
    words += ["--output_path", tmp_path / "clip.safetensors"]
    (_, first, _), (_, second, _) = [*map(finish, start(words, script=ROOT / TRAIN_CLIP))]
    assert "tiny CLIP: zero-shot accuracy" in first and second == ""


def test_a_killed_process_ends_the_other_and_one_goes_on(tmp_path):
    base = tmp_path / "base"
    assert run_script(TRAIN, *COMMON, "--num_training_steps", 1, "--output_path", base) == 0
    words = [*COMMON, *LORA, "--load_model_weights_from_checkpoint", base / "diffusion-1.safetensors"]
    words += ["--set", "optimizer.schedule=constant"]
    assert run_script(TRAIN, *words, "--output_path", tmp_path / "one") == 0
    first, second = start([*words, "--num_training_steps", 10**6, "--output_path", tmp_path / "two"])
    wait_for_steps(tmp_path / "two", STEPS)
    second.kill()
    killed = time.monotonic()
    status, _, err = finish(first)
    second.communicate()
    assert time.monotonic() - killed < 30
    assert status == 1
    line = err.splitlines()[-1]
    assert re.search("error: training stopped after step .* another process of this run is gone or cannot be reached", line)
    assert "last good checkpoint: " in line
    assert "to go on from it: torchrun --nproc_per_node 2 " in line
    assert curve(tmp_path / "two")[:STEPS] == pytest.approx(curve(tmp_path / "one"), rel=1e-4)


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    processes = start([*COMMON, "--num_training_steps", 10**6, "--output_path", tmp_path])
    wait_for_steps(tmp_path, 2)
    processes[1].send_signal(signal.SIGTERM)
    results = [finish(process) for process in processes]
    steps = {int(re.search("after step ([0-9]+)", err)[1]) for _, _, err in results}
    assert len(steps) == 1
    assert [status for status, _, _ in results] == [143, 143]
    assert (tmp_path / f"diffusion-{steps.pop()}.state.pt").is_file()


@pytest.mark.parametrize(("backend", "outcome", "waits"), [
    ("gloo", 0, True), ("gloo", 1, True), ("gloo", ValueError, True), ("gloo", LostProcess, False),
    ("cpu:gloo,cuda:nccl", 0, True), ("nccl", 1, False), ("nccl", ValueError, False), ("nccl", 130, True),
])  # fmt: skip
def test_a_process_that_fails_does_not_wait_for_the_others_of_nccl(backend, outcome, waits, monkeypatch):
    """Whose way of leaving is a step of all; torchrun ends them."""
    left, at_exit = [], []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append(1))
    monkeypatch.setattr(atexit, "register", at_exit.append)

    def work():
        if isinstance(outcome, int):
            return outcome
        raise outcome("no")

    if isinstance(outcome, int) or outcome is LostProcess:
        assert leaving_together(work) == (1 if outcome is LostProcess else outcome)
    else:
        with pytest.raises(outcome):
            leaving_together(work)
    assert bool(left) == waits
    assert len(at_exit) == ("nccl" in backend and not waits)


def test_the_command_to_go_on_with(monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["--config_path", "a b.yaml", "--resume_from", "x.pt", "--seed", "1", "--resume_from=y"]
    command = resuming_command(str(ROOT / TRAIN), words, 1)
    assert command == "python training/image/train.py --config_path 'a b.yaml' --seed 1 --resume_from auto"
    for name, value in {
        "LOCAL_WORLD_SIZE": "4",
        "GROUP_RANK": "1",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
    }.items():
        monkeypatch.setenv(name, value)
    assert resuming_command(str(ROOT / TRAIN), [], 8) == (
        "torchrun --nproc_per_node 4 --nnodes 2 --node_rank 1 --master_addr 10.0.0.1 --master_port 29500 "
        "training/image/train.py --resume_from auto"
    )
    assert (
        resuming_command(str(ROOT / TRAIN), [], 4) == "torchrun --nproc_per_node 4 training/image/train.py --resume_from auto"
    )


@pytest.mark.parametrize(("processes", "batch_size"), [(2, 6), (3, 4)])
def test_a_batch_that_cannot_be_shared(processes, batch_size):
    accelerator = SimpleNamespace(num_processes=processes, distributed_type=DistributedType.MULTI_GPU)

    def task(rows):
        settings = TrainingSettings(batch_size=rows, gradient_accumulation_steps=2)
        return SimpleNamespace(settings=settings, rows=rows)

    with pytest.raises(ValueError, match=f"batch_size={batch_size} cannot be shared by {processes} processes .* must divide"):
        check_shares(accelerator, task(batch_size))
    check_shares(accelerator, task(2 * processes))


def test_a_network_with_nothing_to_train_is_not_wrapped():
    """Of learned words alone, whose gradients are added up after the backward pass."""
    network = torch.nn.Linear(2, 2).requires_grad_(False)
    accelerator = SimpleNamespace(num_processes=2)
    assert spread(accelerator, network) is network
