"""The cells of train_mappo.py, found by their ids, and the ways to run them."""

import os
import re
import runpy
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import jupytext

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = Path(os.environ.get("TRAIN_MAPPO", REPOSITORY / "train_mappo.py")).resolve()
BY_HAND = ("critic_by_hand", "critic_check", "gae_by_hand", "gae_check")
BY_HAND += ("loss_by_hand", "loss_check")  # what the reader may leave out
PICTURES = ("arrow_map", "slope", "curves", "video")  # what takes longer than a tiny training
SLOW = ("probe", *PICTURES)
LONGEST = 300  # seconds; only a process that hangs needs as much


def read_cells(path=SCRIPT):
    """Return {id: source} of the cells of code from top to bottom; the first is "imports"."""
    found = [cell for cell in jupytext.read(path).cells if cell.cell_type == "code"]
    names = ["imports", *(cell.metadata["id"] for cell in found[1:])]
    assert len({*names}) == len(names), "two cells have the same id"
    return dict(zip(names, (cell.source for cell in found), strict=True))


def with_values(config, **values):
    """Return the source of Section 1's cell with other defaults, as a reader changes them."""
    for name, value in values.items():
        new = f"field(default_factory=lambda: {value!r})" if value == {} else repr(value)
        new = f"field(default_factory=lambda: {value!r})" if isinstance(value, dict) else new
        config, count = re.subn(
            rf"^(    {name}: [^=\n]+ = ).*?(?=  #|$)", rf"\g<1>{new}", config, flags=re.MULTILINE
        )
        assert count == 1, name
    return config


def sources(*left_out, begin="imports", **values):
    """Return the sources from a cell on, some left out and with other defaults in Section 1."""
    cells = read_cells()
    cells["config"] = with_values(cells["config"], **values)
    names = [*cells]
    chosen = names[names.index(begin) :]
    assert {*left_out} <= {*names}
    return [cells[name] for name in chosen if name not in left_out]


def write_copy(path, *left_out, edits=(), **values):
    """Write a copy of the file without some cells, with other defaults and pieces replaced.

    `edits` is {old: new}; each old piece must occur exactly once. Returns `path`.
    """
    text, cells = SCRIPT.read_text("utf-8"), read_cells()
    pieces = {cells[name]: "" for name in left_out}
    pieces[cells["config"]] = with_values(cells["config"], **values)
    for old, new in {**pieces, **dict(edits)}.items():
        assert text.count(old) == 1, f"{text.count(old)} times: {old}"
        text = text.replace(old, new)
    path.write_text(text, "utf-8")
    return path


def run_cells(sources, space=None):
    """Run cells as a notebook does; return the names that they define."""
    space = {"__name__": "__main__"} if space is None else space
    for source in sources:
        exec(compile(source, "cell", "exec"), space)
    return space


def run_inside(*words, path=SCRIPT):
    """Run the file in this process, command line and all, and return its global names."""
    before, pipe = (sys.argv, sys.excepthook), signal.getsignal(signal.SIGPIPE)
    sys.argv = [str(path), *map(str, words)]
    try:
        with warnings.catch_warnings():
            return runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv, sys.excepthook = before
        signal.signal(signal.SIGPIPE, pipe)


def start(*words, program=(SCRIPT,), **how):
    """Start the file, or another Python program, in a process of its own; return the process."""
    return subprocess.Popen(
        [sys.executable, *map(str, [*program, *words])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        **how,
    )


def finish(process, status=0):
    """Wait for a process, check its exit status, and return what it wrote to stdout and stderr."""
    try:
        out, err = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        process.terminate()  # not kill: torchrun then ends the processes that it has started
        raise
    assert process.returncode == status, err
    return out, err
