"""Run a script several times, each time in a process that ends itself at a chosen moment.

python stop.py PLAN SCRIPT [WORD ...]: PLAN is a JSON list of [moment, number]. The moments are
"before" and "after" a file is renamed, "archive" in the middle of writing a checkpoint and "update"
in the middle of learning, each at its given number, counted from 1. There the process kills itself.
At "interrupt" it sends itself what Ctrl-C sends, in the middle of learning. Prints how each process
ended, as a JSON list of exit statuses (negative: the signal).
"""

import json
import os
import runpy
import signal
import sys
import zipfile

import torch
import torchrl.checkpoint  # noqa: F401  so that no process has to import it anew


def at_call(owner, name, number, action, after=False):
    """Let the given call of a function of `owner` be preceded, or followed, by an action."""
    function, calls = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number and not after:
            action()
        result = function(*args, **kwargs)
        if calls == number and after:
            action()
        return result

    setattr(owner, name, counted)


def kill():
    """End this process like `kill -9`."""
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt():
    """Do what Ctrl-C does."""
    os.kill(os.getpid(), signal.SIGINT)


plan, script, words = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3:]
statuses = []
for moment, number in plan:
    child = os.fork()
    if child == 0:
        if moment in ("before", "after"):
            at_call(os, "replace", number, kill, after=moment == "after")
        elif moment == "archive":
            at_call(zipfile.ZipFile, "write", number, kill, after=True)
        elif moment in ("update", "interrupt"):
            action = kill if moment == "update" else interrupt
            at_call(torch.nn.utils, "clip_grad_norm_", number, action)
        sys.argv = [script, *words]
        runpy.run_path(script, run_name="__main__")
        os._exit(0)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print("STATUSES", json.dumps(statuses))
