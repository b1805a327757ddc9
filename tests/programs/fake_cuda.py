"""Run Sections 3 to 7 with fake tensors on "cuda:0": fake_cuda.py CELLS.

CELLS is a JSON list of two lists of sources, those to run as they are and those to run with fake
tensors. These know their shape and device, and an operation fails if devices do not match. They
have no values, so what draws numbers or asks for some is replaced. Prints the devices of all that
learns, as JSON. Where PyTorch was built without CUDA, taking such tensors down again can crash, so
the process leaves without doing so.
"""

import ast
import gc
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from tensordict import TensorDict
from torch._subclasses import FakeTensor, FakeTensorMode
from torchrl.data import Composite, Unbounded

gc.disable()
before, cells = json.loads(Path(sys.argv[1]).read_text("utf-8"))


def zeros(shape, dtype, device):
    """Take the place of a function that draws numbers."""
    return torch.zeros(shape, dtype=dtype, device=device)


torch.nn.Linear.reset_parameters = lambda self: None
torch.nn.init.orthogonal_ = lambda matrix, gain: matrix
torch.distributions.normal._standard_normal = zeros
torch.normal = lambda mean, std: torch.zeros_like(mean)
FakeTensor.__bool__ = lambda self: True  # the loss asks whether critic_coeff is above 0

script = {"__name__": "fake"}
for source in before:
    exec(compile(source, "cell", "exec"), script)
with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
    spec = Composite({"action": Unbounded((3, 2), device="cuda:0")}, shape=(3,))
    env = SimpleNamespace(n_agents=3, full_action_spec_unbatched=Composite({"agents": spec}))
    script |= {"device": "cuda:0", "env": env, "n_obs": 18, "n_actions": 2}
    script["action_spec"] = SimpleNamespace(space=SimpleNamespace(low=-1.0, high=1.0))
    for source in cells:
        tree = ast.parse(source)
        # Without what shows something: it simulates, and it prints.
        shown = ("env.reset", "print(", "first_batch", "Collector(")
        tree.body = [
            node for node in tree.body if not any(word in ast.unparse(node) for word in shown)
        ]
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
