"""What needs a GPU: a run on it, the same seed twice, resuming on another device."""

import pytest
import torch

from cells import run_inside
from conftest import assert_same, load, options

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("mappo", [True, False])
def test_a_run_on_a_gpu(mappo, drawing, tmp_path):
    """Everything that learns is there, and the same seed is the same run there, too."""
    for name in ("one", "two"):
        words = options(device="cuda", run_folder=tmp_path / name, mappo=mappo)
        module = run_inside(*words, path=drawing)["loss_module"]
        assert all(x.is_cuda for x in [*module.parameters(), *module.buffers()])
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("before, now", [("cpu", "cuda"), ("cuda", "cpu")])
def test_resuming_on_another_device(before, now, lean, tmp_path):
    """Only where it is asked for."""
    run_inside(*options(device=before, run_folder=tmp_path / "run"), path=lean)
    for device, words in ((before, ()), (now, ("--device", now))):
        n_iters = 3 if device == before else 4
        run_inside("--run-folder", tmp_path / "run", "--n-iters", n_iters, *words, path=lean)
        saved = load(tmp_path / "run")
        assert saved["config"]["device"] == device and len(saved["history"]) == n_iters
