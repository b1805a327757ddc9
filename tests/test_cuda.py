"""What needs a GPU: a run on it, the same seed twice, resuming on another device."""

import json

import pytest
import torch
from torch import distributed as dist

from cells import finish, run_inside, start
from conftest import assert_same, load, options, rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("flag", ["--mappo", "--no-mappo"])
def test_a_run_on_a_gpu(flag, tmp_path):
    """From the first to the last section, and the same seed is the same run there, too."""
    for name in ("one", "two"):
        finish(start(*options(device="cuda", run_folder=tmp_path / name), flag))
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("before, now", [("cpu", "cuda"), ("cuda", "cpu")])
def test_resuming_on_another_device(before, now, lean, tmp_path):
    """Only where it is asked for."""
    folder = tmp_path / "run"
    run_inside(*options(device=before, run_folder=folder), path=lean)
    run_inside("--run-folder", folder, "--n-iters", 3, path=lean)
    recorded = json.loads((folder / "hyperparameters.json").read_text())
    assert recorded["device"] == before
    run_inside("--run-folder", folder, "--n-iters", 4, "--device", now, path=lean)
    assert len(load(folder)["history"]) == len(rows(folder)) == 4


def test_everything_that_learns_is_on_the_gpu(lean, tmp_path):
    """Each parameter and buffer, also where gradients are exchanged over NCCL."""
    space = run_inside(*options(device="cuda", run_folder=tmp_path / "run"), path=lean)
    module = space["loss_module"]
    assert all(x.is_cuda for x in [*module.parameters(), *module.buffers()])
    dist.init_process_group("nccl", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(module)
        parallel(space["minibatch"])["loss_objective"].backward()
    finally:
        dist.destroy_process_group()
