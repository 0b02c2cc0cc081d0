"""The benchmark of a run's overhead, at its smallest settings."""

import importlib.util
import json
import sys

import pytest
import torch
from commands import ROOT


@pytest.mark.parametrize("threads", [1, 2])
def test_overhead(threads, capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    spec = importlib.util.spec_from_file_location("bench_overhead", ROOT / "bench/overhead.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tiny = [
        "data.image_size=8",
        "model.network.channels=[8,8]",
        "model.network.head_dim=8",
        "model.network.norm_groups=4",
    ]
    tiny += ["model.network.patch_size=1", "model.text_encoder.layers=1", "model.text_encoder.width=8"]
    tiny += ["training.batch_size=4", "lora.target_modules=attention"]
    words = [word for setting in tiny for word in ("--set", setting)]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the benchmark sets both
    assert module.main(["--rounds", "2", "--threads", str(threads), "--json", "--megabytes", "13", *words]) == 0
    torch.set_num_threads(1)
    sys.modules.pop("measure", None)
    lines = {line["figure"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    in_rows = {"row_threads_base", "row_threads_lora"} if threads > 1 else set()
    saves = {"checkpoint_base", "checkpoint_lora"}
    assert lines.keys() == {"overhead_base", "overhead_lora", *saves} | in_rows
    for line in lines.values():
        assert line["ours"]["median"] > 0
    for part in lines.keys() - saves:
        assert lines[part]["ratio"] > 1  # a part is less than the whole
    assert all(lines[save]["ratio"] < 1 for save in saves)
