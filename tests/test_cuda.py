"""On a GPU: what can be checked without one, with fake tensors, and what needs one."""

import json

import pytest
import torch

from cells import read_cells, without
from conftest import SCRIPT, assert_same, finish, load, options, rows, start

NEEDS_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

# Sections 3 to 5 with fake tensors on "cuda:0". These know their shape and device, and an operation
# fails if devices do not match; they have no values, so what draws numbers or asks for some is
# replaced. Where PyTorch was built without CUDA, taking such tensors down again can crash: so this
# is a process of its own, which leaves without doing so.
FAKE = """
import ast, gc, json, os, sys
from types import SimpleNamespace

import torch
from tensordict import TensorDict
from torch._subclasses import FakeTensor, FakeTensorMode
from torchrl.data import Composite, Unbounded

gc.disable()
before, cells = json.load(open(sys.argv[1]))
zeros = lambda shape, dtype, device: torch.zeros(shape, dtype=dtype, device=device)
torch.nn.Linear.reset_parameters = lambda self: None
torch.nn.init.orthogonal_ = lambda matrix, gain: matrix
torch.distributions.normal._standard_normal = zeros
torch.normal = lambda mean, std: torch.zeros_like(mean)
FakeTensor.__bool__ = lambda self: True

script = {"__name__": "fake"}
for source in before:
    exec(compile(source, "cell", "exec"), script)
with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
    spec = Composite({"action": Unbounded((3, 2), device="cuda:0")}, shape=(3,))
    env = SimpleNamespace(n_agents=3, full_action_spec_unbatched=Composite({"agents": spec}))
    script |= {"device": "cuda:0", "env": env, "n_obs": 18, "n_actions": 2}
    script["action_spec"] = SimpleNamespace(space=SimpleNamespace(low=-1.0, high=1.0))
    for source in cells:
        tree = ast.parse(source)  # without the bare expressions that show something: they simulate
        tree.body = [node for node in tree.body if "env.reset" not in ast.unparse(node)]
        exec(compile(tree, "cell", "exec"), script)
    observation = torch.zeros(60, 3, 18, device="cuda:0")
    ones = {name: torch.ones(60, 3, 1, device="cuda:0") for name in ("advantage", "value_target")}
    frames = TensorDict({"agents": {"observation": observation}, **ones}, [60], device="cuda:0")
    script["policy"](frames)
    losses = script["loss_module"](frames)
    loss = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
modules = (script["loss_module"], script["estimate_advantages"])
[group] = script["optimizer"].param_groups
devices = {
    "loss": [str(loss.device)],
    "parameters": [str(item.device) for module in modules for item in module.parameters()],
    "buffers": [str(item.device) for module in modules for item in module.buffers()],
    "optimizer": [str(item.device) for item in group["params"]],
}
print(json.dumps(devices), flush=True)
os._exit(0)
"""


def test_everything_that_learns_is_on_the_gpu(tmp_path):
    """Networks, loss, value estimator and optimizer: each parameter and buffer lies there."""
    cells = read_cells()
    seed_for = next(cell.source for cell in cells if "def seed_for" in cell.source)
    before = [*without("A", "B", "C", *"2345678"), seed_for.partition("def make_env")[0]]
    learn = [cell.source for cell in cells if cell.part in ("3", "4", "5")]
    # The collector simulates; the policy is made in the same cell.
    learn = [source.partition("collector = Collector(")[0] for source in learn]
    (tmp_path / "cells").write_text(json.dumps([before, learn]))
    out, _ = finish(start(tmp_path / "cells", program=["-c", FAKE]))
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
    assert load(folder)["hyperparameters"]["device"] == before
    finish(start("--run-folder", folder, "--n-iters", 4, "--device", now))
    states = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")
    for name, tensor in states["untrained_policy"].items():
        if isinstance(tensor, torch.Tensor):
            torch.testing.assert_close(tensor, untrained[name].cpu(), rtol=0, atol=0)
    assert len(rows(folder)) == 4


@NEEDS_A_GPU
def test_one_process_under_nccl(tmp_path):
    """DistributedDataParallel's first exchange, over NCCL, finds every buffer on the GPU."""
    program = tmp_path / "look.py"
    program.write_text(
        "import os, runpy, sys, torch\n"
        "from torch import distributed as dist\n"
        "dist.init_process_group('nccl', init_method='tcp://127.0.0.1:0', rank=0, world_size=1)\n"
        "script = runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
        "module = torch.nn.parallel.DistributedDataParallel(script['loss_module'])\n"
        "module(script['minibatch'])['loss_objective'].backward()\n"
        "assert all(buffer.is_cuda for buffer in module.buffers())\n",
        encoding="utf-8",
    )
    words = options(device="cuda", run_folder=tmp_path / "run")
    out, _ = finish(start(SCRIPT, *words, program=[program]))
    assert "The results of this run" in out
