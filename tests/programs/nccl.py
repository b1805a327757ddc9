"""Run a script on a GPU, then exchange its gradients over NCCL: nccl.py SCRIPT [WORD ...]."""

import runpy
import sys

import torch
from torch import distributed as dist

dist.init_process_group("nccl", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
sys.argv = sys.argv[1:]
script = runpy.run_path(sys.argv[0], run_name="__main__")
module = torch.nn.parallel.DistributedDataParallel(script["loss_module"])
module(script["minibatch"])["loss_objective"].backward()
assert all(buffer.is_cuda for buffer in module.buffers())
