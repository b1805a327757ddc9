"""The cells of train_mappo.py, each with the letter or the number of the part it belongs to."""

import re
from typing import NamedTuple

from conftest import SCRIPT


class Cell(NamedTuple):
    """A cell of code: "A", "B" or "C" for the engineering, otherwise "" or the section's number."""

    part: str
    source: str


def read_cells():
    """All cells of code from top to bottom; what stands before the first mark is one of them."""
    text = SCRIPT.read_text(encoding="utf-8")
    part, found = "", []
    for block in re.split(r"^# %%", text, flags=re.MULTILINE):
        mark, _, body = block.partition("\n")
        if not found:
            found.append(Cell("", block))
        elif "[markdown]" in mark:
            for heading in re.findall(r"^# ## (\w+)", body, re.MULTILINE):
                part = heading
        else:
            found.append(Cell(part, body))
    return found


def without(*parts):
    """The script's cells but for some parts, such as "A", as sources."""
    return [cell.source for cell in read_cells() if cell.part not in parts]


def with_values(source, **values):
    """The cell of Section 1 with other values in its assignments, as a reader would change them."""
    for name, value in values.items():
        source, count = re.subn(
            rf"^{name} = .*?(?=  #)", f"{name} = {value!r}", source, flags=re.MULTILINE
        )
        assert count == 1, name
    return source
