"""Run a script several times, each time in a process that ends itself at a chosen line.

python stop.py PLAN SCRIPT [WORD ...]: PLAN is a JSON list of [moment, number]. Where the script
calls `moment(name)` for the given time, counted from 1 in each process, the process kills itself.
The moment "disk" lets writing past `number` bytes fail like a full disk. Prints how each process
ended, as a JSON list of exit statuses (negative: the signal).
"""

import builtins
import collections
import json
import os
import resource
import runpy
import signal
import sys

import torchrl.envs  # noqa: F401  so that no process has to import it anew
import vmas  # noqa: F401

plan, script, words = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3:]
statuses = []
for name, number in plan:
    child = os.fork()
    if child == 0:
        passed = collections.Counter()

        def moment(here, name=name, number=number, passed=passed):
            """End this process like `kill -9`, if this is the chosen moment."""
            passed[here] += 1
            if (here, passed[here]) == (name, number):
                os.kill(os.getpid(), signal.SIGKILL)

        builtins.moment = moment
        if name == "disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
        sys.argv = [script, *words]
        runpy.run_path(script, run_name="__main__")
        sys.exit()
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print("STATUSES", json.dumps(statuses))
