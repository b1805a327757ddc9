"""Make the notebooks of this folder.

    python teaching/make_notebooks.py [lesson] [exercises] [solutions]

- lesson.ipynb: train_mappo.py, executed with its defaults on a CPU with one thread
- exercises.ipynb: solutions.py with its solutions replaced by blanks
- solutions.ipynb: solutions.py, executed

Without names it makes all three, in a few minutes. In solutions.py, a comment "# solution: BLANK"
begins a solution, and stands for the BLANK that a student finds there instead. The solution ends at
the next such comment or at "# end of solution". With RUN_LONG=1 in the environment, solutions.ipynb
trains where an exercise does, which takes some minutes more.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

TEACHING = Path(__file__).resolve().parent
LESSON = TEACHING.parent / "train_mappo.py"
SOLUTIONS = TEACHING / "solutions.py"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def with_blanks(text):
    """Return the text of solutions.py with each solution replaced by its blank."""
    lines, inside = [], False
    for line in text.splitlines():
        blank = re.match(r"( *)# solution: (.*)", line)
        if blank:
            lines.append(blank[1] + blank[2])
            inside = True
        elif line.strip() == "# end of solution":
            inside = False
        elif not inside:
            lines.append(line)
    return "\n".join(lines) + "\n"


def read(text):
    """Return a script in percent format as a notebook, always with the same cell ids."""
    notebook = jupytext.reads(text, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


def execute(notebook, folder):
    """Run a notebook in a folder, and keep of its outputs what another run gives as well."""
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=resources).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran
        if cell.cell_type == "code":
            outputs = [one for one in cell.outputs if one.get("name") != "stderr"]  # progress bars
            for output in outputs:
                if "text" in output:
                    output.text = without_places(output.text, folder)
            cell.outputs = outputs
    return notebook


def without_places(text, folder):
    """Return an output without the time in the name of a run's folder, and without paths."""
    text = re.sub(r"(seed\d+)-\d{8}-\d{6}-\d{6}", r"\1", text)
    return text.replace(f"{folder}/", "").replace(f"{TEACHING.parent}/", "")


def make_lesson():
    """Return the lesson, executed; its cells are those of train_mappo.py."""
    with tempfile.TemporaryDirectory() as folder:
        return execute(read(LESSON.read_text("utf-8")), folder)


def make_exercises():
    """Return the exercises."""
    return read(with_blanks(SOLUTIONS.read_text("utf-8")))


def make_solutions():
    """Return the solutions, executed."""
    lines = SOLUTIONS.read_text("utf-8").splitlines()
    kept = [one for one in lines if not one.strip().startswith("# solution: ")]
    kept = [one for one in kept if one.strip() != "# end of solution"]
    text = "\n".join(kept) + "\n"
    if os.environ.get("RUN_LONG") == "1":
        text = text.replace("TRAIN = False", "TRAIN = True")
    return execute(read(text), TEACHING)


MAKERS = {"lesson": make_lesson, "exercises": make_exercises, "solutions": make_solutions}

if __name__ == "__main__":
    names = sys.argv[1:] or list(MAKERS)
    unknown = [name for name in names if name not in MAKERS]
    if unknown:
        sys.exit(f"no notebook {', '.join(unknown)}; there are {', '.join(MAKERS)}")
    for name in names:
        notebook = MAKERS[name]()
        nbformat.validate(notebook)
        path = TEACHING / f"{name}.ipynb"
        nbformat.write(notebook, path)
        print(f"{path.name}: {len(notebook.cells)} cells, {path.stat().st_size / 1e6:.2f} MB")
