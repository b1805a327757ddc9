"""On a GPU: what can be checked without one, with fake tensors, and what needs one."""

import json

import pytest
import torch

from cells import assigned_names, cell_that_defines, read_cells, without
from conftest import PROGRAMS, SCRIPT, assert_same, finish, load, options, rows, start

BOXES = {"critic_by_hand", "gae_by_hand", "loss_by_hand", "explained_variance_of"}
NEEDS_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def test_everything_that_learns_is_on_the_gpu(tmp_path):
    """Networks, loss, value estimator and optimizer: each parameter and buffer lies there."""
    before = without("engineering", *map(str, range(2, 11)))
    before.append(cell_that_defines("seed_for").partition("def make_env")[0])
    learn = [cell.source for cell in read_cells() if cell.part in ("3", "4", "5", "6", "7")]
    learn = [source for source in learn if not BOXES & assigned_names(source)]
    (tmp_path / "cells").write_text(json.dumps([before, learn]))
    out, _ = finish(start(tmp_path / "cells", program=[PROGRAMS / "fake_cuda.py"]))
    devices = json.loads(out)
    assert [len(devices[name]) for name in ("loss", "parameters", "optimizer")] == [1, 12, 12]
    assert len(devices["buffers"]) >= 4
    assert {name for found in devices.values() for name in found} == {"cuda:0"}


@NEEDS_A_GPU
@pytest.mark.parametrize("flag", ["--mappo", "--no-mappo"])
def test_a_run_on_a_gpu(flag, tmp_path):
    """From the first to the last section, and the same seed is the same run there, too."""
    for name in ("one", "two"):
        finish(start(*options(device="cuda", run_folder=tmp_path / name), flag))
    assert_same(tmp_path / "one", tmp_path / "two")


@NEEDS_A_GPU
@pytest.mark.parametrize("before, now", [("cpu", "cuda"), ("cuda", "cpu")])
def test_going_on_on_another_device(before, now, tmp_path):
    """Only where it is asked for; the run and its untrained policy are kept."""
    folder = tmp_path / "run"
    finish(start(*options(device=before, run_folder=folder)))
    untrained = load(folder)["untrained_policy"]
    finish(start("--run-folder", folder, "--n-iters", 3))
    recorded = json.loads((folder / "hyperparameters.json").read_text())
    assert recorded["device"] == before
    finish(start("--run-folder", folder, "--n-iters", 4, "--device", now))
    for name, tensor in load(folder)["untrained_policy"].items():
        if isinstance(tensor, torch.Tensor):
            torch.testing.assert_close(tensor.cpu(), untrained[name].cpu(), rtol=0, atol=0)
    assert len(rows(folder)) == 4


@NEEDS_A_GPU
def test_one_process_under_nccl(tmp_path):
    """DistributedDataParallel's first exchange, over NCCL, finds every buffer on the GPU."""
    words = options(device="cuda", run_folder=tmp_path / "run")
    out, _ = finish(start(SCRIPT, *words, program=[PROGRAMS / "nccl.py"]))
    assert "The results are in" in out
