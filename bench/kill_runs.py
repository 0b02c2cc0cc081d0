"""Kill training runs with SIGKILL at random moments, resume them, and compare with runs that nobody disturbed.

    python bench/kill_runs.py --kills 200

A base run and a LoRA run of a tiny model, which write a checkpoint and a picture every second step, are killed and
resumed with --resume_from auto until they are done, over and over until so many kills have hit. After each kill: the
newest whole checkpoint must be at least the last that the run had announced (else it is "lost"). After each finished run:
weights, state, pictures and metrics must be those of the undisturbed run (else "differing").

Every run is training/image/train.py's main in a process forked from this one, which has made the imports by a step of its
own, on one thread: those of OpenMP do not survive a fork. The moments are uniform over the time that the undisturbed run
took; a third of the kills wait for a file to be under way and hit it there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from xdiffusion.cli import REPOSITORY, Parser, positive_int, run

CONFIG = REPOSITORY / "configs/image/digits/ddpm_24x24_v_continuous_clip.yaml"
STEPS = 8
TINY = [
    "data.image_size=12", "model.network.channels=[16,16]", "model.network.head_dim=8", "model.network.norm_groups=4",
    "model.network.patch_size=1", "model.text_encoder.width=8", "model.text_encoder.layers=1",
    "model.text_encoder.pretrained=null", "optimizer.warmup_steps=0", "sampling.steps=1", "lora.dropout=0.1",
    "training.gradient_accumulation_steps=2", "checkpoints.keep_last=2",
]  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--kills", type=positive_int, default=200, metavar="N", help="over both runs (200)")
    parser.add_argument("--threads", type=positive_int, default=1, metavar="N", help="of torch in each run (1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments")
    parser.add_argument("--steps", type=positive_int, default=STEPS, metavar="N", help=f"of each run ({STEPS})")
    parser.add_argument("--json", action="store_true", help="print one JSON line and nothing else")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    import torch

    torch.set_num_threads(1)
    train = runpy.run_path(str(REPOSITORY / "training/image/train.py"))["main"]
    draw = random.Random(args.seed)
    figures = {"kills": 0, "hit_a_write": 0, "finished_runs": 0, "lost_checkpoints": 0, "differing": 0, "failed": 0}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        base, lora = Path(scratch) / "base", Path(scratch) / "lora"
        common = [
            "--config_path",
            str(CONFIG),
            "--force_cpu",
            "--batch_size",
            "4",
            "--num_training_steps",
            str(args.steps),
        ]
        common += ["--save_and_sample_every_n", "2", *(word for setting in TINY for word in ("--set", setting))]
        adapt = ["--use_lora_training", "--dataset_name", "image/digits_inverted"]
        adapt += ["--load_model_weights_from_checkpoint", str(base / f"diffusion-{args.steps}.safetensors")]
        with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):  # noqa: PTH123
            train([*common, "--num_training_steps", "1", "--output_path", str(Path(scratch) / "imports")])
        for folder, words in ((base, common), (lora, common + adapt)):
            began = time.perf_counter()
            assert finish(start(train, [*words, "--output_path", str(folder)], args.threads)) == 0, "undisturbed, it failed"
            seconds = time.perf_counter() - began
            goal = figures["kills"] + (args.kills - figures["kills"]) // (2 if folder is base else 1)
            while figures["kills"] < goal:
                again = Path(scratch) / "again"
                kill_and_resume(train, words, again, args.threads, seconds, draw, figures, goal)
                figures["finished_runs"] += 1
                again = again.rename(Path(scratch) / f"{folder.name}_{figures['finished_runs']}")
                differing = difference(evidence(folder), evidence(again))
                if differing:
                    print(f"{again.name} differs in {differing}", file=sys.stderr)
                    figures["differing"] += 1
            if not args.json:
                print(f"{folder.name}: {figures}", flush=True)
    figures["seconds"] = round(time.perf_counter() - started, 1)
    print(json.dumps({"figure": "kill_runs", **figures}))
    return int(any(figures[bad] for bad in ("lost_checkpoints", "differing", "failed")))


def kill_and_resume(
    train, words, folder: Path, threads: int, seconds: float, draw: random.Random, figures: dict, goal: int
) -> None:
    """One run from its start to its end, killed on the way while the goal is not reached."""
    words = [*words, "--output_path", str(folder), "--resume_from", "auto"]
    while True:
        folder.mkdir(exist_ok=True)
        process = start(train, words, threads)
        if figures["kills"] < goal and killed(process, folder, draw.uniform(0, seconds), draw.random() < 1 / 3, figures):
            figures["kills"] += 1
            figures["lost_checkpoints"] += newest_whole(folder) < announced(folder)
        else:
            status = finish(process)
            figures["failed"] += status != 0
            return


def start(train, words: list[str], threads: int) -> int:
    """Fork a process that runs main(words) on so many threads with its output in run.log; returns its id."""
    folder = Path(words[words.index("--output_path") + 1])
    folder.mkdir(exist_ok=True)
    import torch
    from tqdm import tqdm

    process = os.fork()
    if process:
        return process
    with (folder / "run.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # its own is shared with all forks, and held for ever by one that was killed with it
    status = 1
    try:
        status = run(train, words)
    finally:
        sys.stdout.flush()
        os._exit(status)


def finish(process: int) -> int:
    """Wait for a process; its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed(process: int, folder: Path, delay: float, in_a_write: bool, figures: dict) -> bool:
    """Kill a process after a delay, or at its first write after it; False if it was done before."""
    until = time.perf_counter() + delay
    while time.perf_counter() < until or (in_a_write and not list(folder.glob(".diffusion-*.tmp"))):
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.0005)
    os.kill(process, signal.SIGKILL)
    if os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT).si_code != os.CLD_KILLED:
        return False  # it was done just before
    finish(process)
    figures["hit_a_write"] += bool(list(folder.glob(".diffusion-*.tmp")))
    return True


def announced(folder: Path) -> int:
    """The last step whose checkpoint the run said was written."""
    log = (folder / "run.log").read_text(errors="replace").replace("\r", "\n")
    lines = [line.split("step ")[-1] for line in log.splitlines() if line.endswith(" bytes)")]
    return max((int(line.split(":")[0]) for line in lines), default=0)


def newest_whole(folder: Path) -> int:
    """The step of the newest whole checkpoint, read from the files alone; 0 for none."""
    from xdiffusion.checkpoints.errors import CheckpointError
    from xdiffusion.training.state import whole_state

    steps = [0]
    for weights in folder.glob("diffusion-*.safetensors"):
        try:
            steps.append(whole_state(weights)["step"])
        except CheckpointError:
            continue
    return max(steps)


def evidence(folder: Path) -> dict:
    """All that two runs of the same command must have in common, bit for bit."""
    from xdiffusion.training.records import read_metrics

    metrics = [{k: v for k, v in m.items() if k != "images_per_second"} for m in read_metrics(folder / "metrics.jsonl")]
    files = [*folder.glob("diffusion-*"), *folder.glob("clip-*"), *folder.glob("samples/*"), *folder.glob(".*.tmp")]
    return {"metrics": metrics} | {path.name: content(path) for path in files}


def content(path: Path) -> object:
    """What a file holds; the entries of a safetensors header have no order, so bytes tell nothing."""
    from xdiffusion.checkpoints.hashes import content_hash, file_hash, plain_and_tensors
    from xdiffusion.checkpoints.reading import load_safetensors
    from xdiffusion.training.state import whole_state

    if path.suffix == ".safetensors":
        tensors, header = load_safetensors(path)
        return content_hash(tensors), header
    if path.name.endswith(".state.pt"):
        plain, tensors = plain_and_tensors(whole_state(path.with_name(path.name.replace(".state.pt", ".safetensors"))))
        return content_hash(tensors), {k: v for k, v in plain.items() if k != "/weights_hash"}
    return file_hash(path)


def difference(expected: dict, found: dict) -> list[str]:
    """The names of what differs."""
    return sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))


if __name__ == "__main__":
    sys.exit(run(main))
