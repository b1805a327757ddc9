"""Run a script with runpy, as other programs do, and be interrupted: host.py SCRIPT [WORD ...]."""

import os
import runpy
import signal
import sys

before = signal.getsignal(signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[1:]
names = runpy.run_path(sys.argv[0], run_name="__main__")
print("handler:", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
sys.stdout.flush()
os.kill(os.getpid(), signal.SIGINT)
