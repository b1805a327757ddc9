"""The cells of train_mappo.py, each with the part of the lesson that it belongs to."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import jupytext

SCRIPT = Path(__file__).resolve().parents[1] / "train_mappo.py"
PROBE = "explained_variance_of"  # defined by the cell of Section 4 that takes seconds
PICTURES = "runs"  # defined by the cell that draws


class Cell(NamedTuple):
    """A cell of code; its part is "engineering" or the number of its section."""

    part: str
    heading: str
    source: str


def read_cells(path=SCRIPT):
    """Return all cells of code from top to bottom; the imports on top are one of them."""
    part, heading, found = "", "", []
    for cell in jupytext.read(path).cells:
        if cell.cell_type == "markdown":
            for line in re.findall(r"^##+ .*", cell.source, re.MULTILINE):
                heading = line.lstrip("# ")
                if line.startswith("## "):
                    part = "engineering" if "skip" in line else heading.partition(".")[0]
        else:
            found.append(Cell(part, heading, cell.source))
    return found


def without(*parts, defining=(), boxes=True):
    """Return sources of cells, but for some parts, cells that define some names, and the boxes."""
    return [
        cell.source
        for cell in read_cells()
        if cell.part not in parts
        and not (not boxes and "box" in cell.heading)
        and not set(defining) & assigned_names(cell.source)
    ]


def assigned_names(source):
    """Return the names that a cell defines at its top level."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            found = [one for one in ast.walk(node) if isinstance(one, ast.Name)]
            names |= {one.id for one in found if isinstance(one.ctx, ast.Store)}
    return names


def cell_that_defines(name):
    """Return the source of the only cell that defines a name."""
    [source] = [cell.source for cell in read_cells() if name in assigned_names(cell.source)]
    return source


def with_values(source, **values):
    """Return Section 1's cell with other values in its assignments, as a reader changes them."""
    for name, value in values.items():
        source, count = re.subn(
            rf"^{name} = .*?(?=  #)", f"{name} = {value!r}", source, flags=re.MULTILINE
        )
        assert count == 1, name
    return source


def run_cells(sources, **values):
    """Run cells as a notebook does, Section 1's with other values; return the names they define."""
    space = {"__name__": "notebook"}
    for source in sources:
        if "mappo" in assigned_names(source):
            source = with_values(source, **values)
        exec(compile(source, "cell", "exec"), space)
    return space
