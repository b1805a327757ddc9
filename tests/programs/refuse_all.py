"""Run a script with many command lines, one after the other, and write down how each ends.

python refuse_all.py SCRIPT CASES ANSWERS: a JSON list of lists of words in, a list of
[exit status, stdout, stderr] out.
"""

import contextlib
import io
import json
import runpy
import sys
import warnings
from pathlib import Path

script, cases, answers = sys.argv[1:]
found = []
for words in json.loads(Path(cases).read_text("utf-8")):
    sys.argv = [script, *words]
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        try:
            runpy.run_path(script, run_name="__main__")
            status = "not refused"
        except SystemExit as end:
            status = end.code
        except BaseException as end:
            status = repr(end)
    found.append([status, out.getvalue(), err.getvalue()])
Path(answers).write_text(json.dumps(found), "utf-8")
