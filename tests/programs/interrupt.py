"""Be a script that is interrupted: python interrupt.py NUMBER SCRIPT [WORD ...].

Runs the script as the main program. At the given gradient step it gets what Ctrl-C sends.
"""

import itertools
import os
import signal
import sys
from pathlib import Path

import torch


def interrupt_at(step):
    """Let the given gradient step begin with a Ctrl-C."""
    clip, steps = torch.nn.utils.clip_grad_norm_, itertools.count(1)

    def clip_and_stop(*args, **kwargs):
        if next(steps) == step:
            os.killpg(os.getpgrp(), signal.SIGINT)  # as a terminal does
        return clip(*args, **kwargs)

    torch.nn.utils.clip_grad_norm_ = clip_and_stop


interrupt_at(int(sys.argv[1]))
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell ignores it
sys.argv = sys.argv[2:]
__file__ = sys.argv[0]
exec(compile(Path(__file__).read_text("utf-8"), __file__, "exec"))
