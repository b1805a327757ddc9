"""Make the tables of the exercise "The silent bug" by training with one planted mistake each.

    python teaching/make_silent_bugs.py [NAME ...]

For each name, the lesson is trained up to the end of Section 8 with MAPPO, seed 0 and eight
iterations on one CPU thread. What it measured goes to student/silent_bug/NAME.csv, without the
column "seconds". The name "program" stands for program_with_a_bug.py, in which students look for
the mistake. Without names it makes everything, one after another, in five minutes or so.
"""

import csv
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat

TEACHING = Path(__file__).resolve().parent
LESSON = TEACHING.parent / "train_mappo.py"
PLACE = TEACHING / "student" / "silent_bug"
N_ITERS = 8
LAST_CELL = "loop"
# The mistakes: a line of the lesson, or a part of one, and what stands there instead.
RECOMPUTED = """\
new_log_prob = policy.get_dist(minibatch).log_prob(minibatch["agents", "action"])
            minibatch["agents", "action_log_prob"] = new_log_prob.detach()
            losses = loss_module(minibatch)"""
MISTAKES = {
    "run_a": ('reward=("agents", "reward")', 'reward=("agents", "info", "agent_collisions")'),
    "run_b": ("lr=cfg.lr, fused", "lr=100 * cfg.lr, fused"),
    "run_c": ("", ""),  # none
    "run_d": ("Adam(loss_module.parameters(), lr", "Adam(policy.parameters(), lr"),
    "run_e": ("losses = loss_module(minibatch)", RECOMPUTED),
}
IN_THE_PROGRAM = "run_d"


def cells_with(mistake):
    """Return the lesson's cells of code up to the training loop, with a mistake planted.

    The hand-written cells are left out, because their checks would find the mistake.
    """
    right, wrong = MISTAKES[mistake]
    cells, planted = [], 0
    for cell in jupytext.read(LESSON).cells:
        if cell.cell_type == "code":
            name, source = cell.metadata.get("id", "imports"), cell.source
            if name == "probe" or name.endswith(("_check", "_by_hand")):
                continue
            if right:
                planted += source.count(right)
                source = source.replace(right, wrong)
            cells.append((name, source))
            if name == LAST_CELL:
                break
    if right and planted != 1:
        raise ValueError(f"{right!r} is {planted} times in the lesson, but must be there once")
    return cells


def train(mistake):
    """Train with a mistake and return the rows of metrics.csv, without their seconds."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "train.py")
        sources = [source for _, source in cells_with(mistake)]
        script.write_text("\n\n".join(sources), encoding="utf-8")
        run = Path(folder, "run")
        options = ["--run-folder", run, "--n-iters", N_ITERS, "--device", "cpu"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, script, *map(str, options)], check=True, env=environment)
        with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
            return [
                {name: x for name, x in row.items() if name != "seconds"}
                for row in csv.DictReader(file)
            ]


def make_table(mistake):
    """Train with a mistake and write what was measured."""
    rows = train(mistake)
    with open(PLACE / f"{mistake}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: shortened(text) for name, text in row.items()})


def shortened(text):
    """Return a number as text with five digits, and anything else as it is."""
    return f"{float(text):.5g}" if re.fullmatch(r"-?\d+\.\d+(e-?\d+)?", text) else text


def make_program():
    """Return a program with the mistake to be found: the lesson's code without its engineering."""
    cells = [source for name, source in cells_with(IN_THE_PROGRAM) if name != "engineering"]
    head = [
        "# ruff: noqa: E402, F401, F811",
        "# The lesson's code up to the training loop, with one mistake in it. It runs.",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(one) for one in cells])
    return "\n".join([*head, "", jupytext.writes(notebook, fmt="py:percent").split("---\n")[-1]])


if __name__ == "__main__":
    names = sys.argv[1:] or ["program", *MISTAKES]
    unknown = [name for name in names if name not in ("program", *MISTAKES)]
    if unknown:
        print(
            f"no table {', '.join(unknown)}; there are program, {', '.join(MISTAKES)}",
            file=sys.stderr,
        )
        sys.exit(2)
    PLACE.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name == "program":
            (PLACE / "program_with_a_bug.py").write_text(make_program(), encoding="utf-8")
        else:
            make_table(name)
        print(name)
