"""Run the script and look into each process at its end, or end one of them before.

look.py FOLDER SCRIPT [WORD ...], also under torchrun. If the folder holds a file "die", the second
process is killed in its second exchange of measurements; with "fail" it raises an error there. Each
process leaves its networks, and its gradients on a minibatch that a single process has left.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

import torch

folder = Path(sys.argv[1])
sys.argv = sys.argv[2:]
rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
destroy_process_group = torch.distributed.destroy_process_group
all_reduce = torch.distributed.all_reduce
calls = 0


def die_once(*args, **kwargs):
    """Exchange measurements, unless this process is to end."""
    global calls
    calls += 1
    if rank == 1 and calls == 2 and (folder / "die").exists():
        (folder / "die").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and (folder / "fail").exists():
        raise OSError("the disk is gone")
    return all_reduce(*args, **kwargs)


def look(script):
    """Save what this process has learned, and its gradient on its share of the minibatch."""
    networks = {name: script[name].state_dict() for name in ("policy", "critic")}
    torch.save(networks, folder / f"networks {rank} of {world_size}")
    if world_size == 1:
        torch.save([networks, script["replay_buffer"].sample()], folder / "minibatch")
    if (folder / "minibatch").exists():
        networks, frames = torch.load(folder / "minibatch", weights_only=False)
        for name, state in networks.items():
            script[name].load_state_dict(state)
        losses = script["loss_module"](frames.chunk(world_size)[rank])
        script["optimizer"].zero_grad()
        sum(losses[name] for name in ("loss_objective", "loss_critic", "loss_entropy")).backward()
        gradients = [parameter.grad for parameter in script["loss_module"].parameters()]
        torch.save(gradients, folder / f"gradients {rank} of {world_size}")


def look_and_leave():
    """Look before the processes part."""
    look(sys._getframe(1).f_globals)
    destroy_process_group()


torch.distributed.all_reduce, torch.distributed.destroy_process_group = die_once, look_and_leave
finished = runpy.run_path(sys.argv[0], run_name="__main__")
if world_size == 1:
    look(finished)
