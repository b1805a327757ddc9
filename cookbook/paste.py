"""Paste recipes into a copy of the lesson, each cell at the place that it names.

    python cookbook/paste.py mine.py own_scenario discrete_actions

writes mine.py, which you can change and run like train_mappo.py. This is a program, not a cell.
"""

import argparse
import re
from pathlib import Path

COOKBOOK = Path(__file__).resolve().parent


def split(text):
    """Return the cells of a text in percent format; the first is what precedes the others."""
    return re.split(r"^(?=# %%)", text, flags=re.MULTILINE)


def paste(lesson, recipe):
    """Return the text of the lesson with the cells of a recipe in it.

    Raises a ValueError if the lesson lacks the cell that one of them names as its place.
    """
    cells = split(lesson)
    for new in split(recipe)[1:]:
        how, names = re.match(r'# %% (before|after|replaces)="(.+)"', new).groups()
        target, *left_out = [f'# %% id="{name}"' for name in names.split(", ")]
        place = next((i for i, cell in enumerate(cells) if cell.startswith(target)), None)
        if place is None:
            raise ValueError(f"the lesson has no cell that begins with {target}")
        old, renamed = cells[place], target + "\n" + new.partition("\n")[2]
        together = {"before": [new, old], "after": [old, new], "replaces": [renamed]}
        cells[place : place + 1] = together[how]
        cells = [cell for cell in cells if not cell.startswith(tuple(left_out))]
    return "".join(cells)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Paste recipes into a copy of train_mappo.py.")
    names = sorted(
        path.stem for path in COOKBOOK.glob("*.py") if "\n# %% " in path.read_text("utf-8")
    )
    parser.add_argument("file", type=Path, help="the new file to write")
    parser.add_argument(
        "recipes", nargs="+", choices=names, metavar="recipe", help=", ".join(names)
    )
    given = parser.parse_args()
    if given.file.exists():
        parser.error(f"{given.file} exists already. Name a new file")
    text = (COOKBOOK.parent / "train_mappo.py").read_text("utf-8")
    for name in given.recipes:
        text = paste(text, (COOKBOOK / f"{name}.py").read_text("utf-8"))
    given.file.write_text(text, "utf-8")
    print(f"Wrote {given.file}")
