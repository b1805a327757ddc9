"""Make the notebooks of the class kit.

    python teaching/make_notebooks.py [NAME ...]

| name | made from | what is done |
|---|---|---|
| student/lesson.ipynb | train_mappo.py | no outputs, and nothing that gives the surprise away |
| student/exercises.ipynb | teacher/solutions.py | parts A and B, with blanks for the solutions |
| student/part_c.ipynb | the same | part C, for after class |
| student/colab.ipynb | the same | parts A and B, after a cell that installs everything |
| teacher/lesson.ipynb | train_mappo.py | executed; if only prose has changed, outputs are kept |
| teacher/solutions.ipynb | teacher/solutions.py | executed |

Without names it makes all of them, in a few minutes. "student" and "teacher" stand for all in that
folder. In solutions.py, a comment "# solution: BLANK" begins a solution, and BLANK is what students
find in its place. The solution ends at the next such comment or at "# end of solution". Cells with
an id that begins with "solution_" are the teacher's explanations, and students do not get them.
"""

import os
import re
import sys
import tempfile
import textwrap
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

TEACHING = Path(__file__).resolve().parent
LESSON = TEACHING.parent / "train_mappo.py"
SOLUTIONS = TEACHING / "teacher" / "solutions.py"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
PACKAGES = ("torch", "torchrl", "tensordict", "vmas", "tqdm", "matplotlib", "pillow")
QUOTED = "<details>\n<summary>Run the cell above first. Then open this.</summary>\n\n"
TOLD_TO_STUDENTS = {  # what gives the surprise away, from its first words to its last: instead
    ("After ten iterations, both", "critic has learned."): """\
How many of the test
episodes will succeed with each of them, after 10 and after 15 iterations?

**Write down your guess when your teacher asks for it.**""",
    ("train longer; if the robots", "read Section 10"): "train longer",
}
SECTION_10 = """\
---
## 10. What your critic teaches
Look at your prediction sheet. When everybody has written down a prediction, do the exercise
"Predict, then look". Your teacher then goes through this section with you. The next two cells show
what the critic that you have trained here teaches each robot."""
SECTION_10_END = """\
Compare your picture with that of someone who has trained the other algorithm. The rest of this
section is in `train_mappo.py`, which your teacher gives you after class."""


def read(text):
    """Return a script in percent format as a notebook, its cells with lasting ids."""
    notebook = jupytext.reads(text, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        own = cell.metadata.pop("id", None)
        first = cell.cell_type == "code" and number == 0
        cell.id = own or ("imports" if first else f"cell-{number}")
    return notebook


def pins():
    """Return the packages that the lesson needs, each with its version for a recent Python."""
    lines = (TEACHING.parent / "requirements.txt").read_text("utf-8").split()
    pinned = [line.partition(";") for line in lines if line.split("==")[0] in PACKAGES]
    return [pin for pin, _, condition in pinned if "<" not in condition]


def setup_check(needed):
    """Return the source of a cell that says what is missing to run a notebook."""
    lines = textwrap.fill(" ".join(needed), 76, break_on_hyphens=False)
    return f'''\
# Set-up check: run this cell first. It says what is missing and how to install it.
import importlib.metadata
import sys

needed = """
{lines}
"""
found = {{one.metadata["Name"].lower(): one.version for one in importlib.metadata.distributions()}}
pairs = [pin.split("==") for pin in needed.split()]
missing = [f"{{name}}=={{version}}" for name, version in pairs if name not in found]
other = [name for name, version in pairs if found.get(name, version).split("+")[0] != version]
if sys.version_info < (3, 10):
    print("Python", sys.version.split()[0], "is too old. You need 3.10 or later.")
elif missing:
    print("Something is missing. Run this line in a new cell, then restart the kernel:")
    print("%pip install", *missing)
else:
    print("Everything is installed.")
if other:
    print("Of these, you have another version than the tested one:", *other)'''


def first_cell(source):
    """Return a cell of code for the top of a notebook."""
    cell = nbformat.v4.new_code_cell(source)
    cell.id = "set-up"
    return cell


def make_student_lesson():
    """Return the lesson as a class gets it: no outputs, none of Section 10's answers."""
    notebook = read(LESSON.read_text("utf-8"))
    for (first, last), instead in TOLD_TO_STUDENTS.items():
        told = re.compile(rf"{re.escape(first)}.*?{re.escape(last)}", re.DOTALL)
        counts = 0
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source, count = told.subn(instead, cell.source)
                counts += count
        if counts != 1:
            raise ValueError(f"{first!r} is {counts} times in the lesson, but must be there once")
    cells, section, above = [], "", ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            kept = []
            for part in re.split(r"^(?:---\n)?(?=## )", cell.source, flags=re.MULTILINE):
                heading = re.match(r"## (.*)", part)
                if heading and section.startswith("10."):
                    kept.append(SECTION_10_END)
                section = heading[1] if heading else section
                if section.startswith("10."):
                    kept += [SECTION_10] if heading else []
                elif heading:
                    kept.append(f"---\n{part.strip()}")
                else:
                    hide = above not in ("", "imports")
                    kept.append(with_hidden_outputs(part) if hide else part.strip())
            cell.source = "\n\n".join(part for part in kept if part)
        above = cell.id if cell.cell_type == "code" else ""
        cells += [cell] if cell.source else []
    notebook.cells = [first_cell(setup_check(pins())), *cells]
    return notebook


def with_hidden_outputs(source):
    """Return a text with what it says about the cell above hidden, if it quotes an output."""
    about, rest = re.match(r"(.*?)(^### .*|\Z)", source, re.DOTALL | re.MULTILINE).groups()
    question = re.search(r"^\*Question \d.*", about, re.DOTALL | re.MULTILINE)
    asked = question[0] if question else ""
    about = about.removesuffix(asked).strip()
    hidden = f"{QUOTED}{about}\n\n</details>" if "```" in about else about
    return "\n\n".join(part.strip() for part in (hidden, asked, rest) if part.strip())


def make_exercises(part_c=False):
    """Return parts A and B of the exercises with blanks, or part C, which gives results away."""
    notebook = read(with_blanks(SOLUTIONS.read_text("utf-8")))
    cells = [cell for cell in notebook.cells if not cell.id.startswith("solution_")]
    names = [cell.id for cell in cells]
    begins, start = names.index("part_c"), cells[names.index("start")]
    chosen = [cells[begins], start, *cells[begins + 1 :]] if part_c else cells[:begins]
    notebook.cells = [first_cell(setup_check(pins())), *chosen]
    return notebook


def make_part_c():
    """Return part C of the exercises with blanks."""
    return make_exercises(part_c=True)


def make_colab():
    """Return parts A and B of the exercises for an empty machine, such as Colab's."""
    notebook = make_exercises()
    notebook.cells[0] = first_cell(COLAB)
    note = nbformat.v4.new_markdown_cell(COLAB_NOTE)
    note.id = "colab"
    notebook.cells.insert(0, note)
    return notebook


COLAB_NOTE = """\
# On Colab, or on any empty machine
Upload `mappo-class.zip`, which your teacher sent you, and run the next cell. On Colab, you
upload files in the panel behind the folder symbol on the left. The cell unpacks the ZIP, installs
the packages, and goes to the folder of the exercises. Part C is a notebook of its own,
`part_c.ipynb`. Copy the next cell to its top."""
COLAB = """\
import os
import shutil
import subprocess
import sys
from pathlib import Path

project = Path("mappo-class").resolve()
if not project.exists():
    if not Path("mappo-class.zip").exists():
        raise SystemExit("Upload mappo-class.zip, then run this cell again.")
    shutil.unpack_archive("mappo-class.zip")
pip = [sys.executable, "-m", "pip", "install", "--quiet", "-r"]
subprocess.run([*pip, str(project / "requirements.txt")], check=True)
os.chdir(project / "teaching" / "student")
print("Ready. The lesson is lesson.ipynb in", os.getcwd())"""


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


def without_marks(text):
    """Return the text of solutions.py without the comments that mark its solutions."""
    lines = text.splitlines()
    marks = re.compile(r" *# (solution: .*|end of solution)$")
    return "\n".join(line for line in lines if not marks.match(line)) + "\n"


def make_teacher_lesson():
    """Return the lesson, executed; its cells are those of train_mappo.py.

    If only its prose has changed, the outputs are those of the notebook that is there already.
    """
    notebook, path = read(LESSON.read_text("utf-8")), TEACHING / "teacher" / "lesson.ipynb"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    old = nbformat.read(str(path), as_version=4).cells if path.exists() else []
    old = [cell for cell in old if cell.cell_type == "code"]
    if [cell.source for cell in code] == [cell.source for cell in old]:
        for cell, before in zip(code, old, strict=True):
            cell.outputs, cell.execution_count = before.outputs, before.execution_count
        return notebook
    with tempfile.TemporaryDirectory() as folder:
        return execute(notebook, folder)


def make_solutions():
    """Return the solutions, executed."""
    return execute(read(without_marks(SOLUTIONS.read_text("utf-8"))), SOLUTIONS.parent)


def execute(notebook, folder):
    """Run a notebook in a folder, and keep of its outputs what another run gives as well."""
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ.pop("MPLBACKEND", None)  # figures belong below their cells
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


MAKERS = {
    "student/lesson.ipynb": make_student_lesson,
    "student/exercises.ipynb": make_exercises,
    "student/part_c.ipynb": make_part_c,
    "student/colab.ipynb": make_colab,
    "teacher/lesson.ipynb": make_teacher_lesson,
    "teacher/solutions.ipynb": make_solutions,
}

if __name__ == "__main__":
    names = [name for word in sys.argv[1:] for name in MAKERS if name.startswith(word)]
    unknown = [word for word in sys.argv[1:] if not any(name.startswith(word) for name in MAKERS)]
    if unknown:
        print(f"no notebook {', '.join(unknown)}; there are {', '.join(MAKERS)}", file=sys.stderr)
        sys.exit(2)
    for name in names or MAKERS:
        notebook = MAKERS[name]()
        nbformat.validate(notebook)
        path = TEACHING / name
        nbformat.write(notebook, path)
        print(f"{name}: {len(notebook.cells)} cells, {path.stat().st_size / 1e6:.2f} MB")
