"""The runs behind study/README.md: many trainings by train_mappo.py, a row of results.csv for each.

    python study/study.py run                do every run that results.csv lacks, two at a time
    python study/study.py run flag rewards   only the runs of these experiments
    python study/study.py report             update the tables and the figures of README.md

A run is a process of its own, in a temporary folder, on the CPU with one thread. Its row comes from
the files that it leaves. A study that was stopped or killed goes on with the runs it lacks.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import jupytext
import pandas as pd
from tqdm import tqdm

import tables
import tutorial
from tables import ARRIVALS, CURVES, EVALUATION, KEY, band, draw_over_time, draw_runs, grid, versus

STUDY = Path(__file__).resolve().parent
SCRIPT = STUDY.parent / "train_mappo.py"
VARIANTS = STUDY / "variants.py"
README = STUDY / "README.md"
RESULTS = STUDY / "results.csv"
SPEED = STUDY / "speed.csv"  # by benchmark.py
TRANSFER = STUDY / "transfer.csv"  # by transfer.py

# A row of results.csv. `script` is the Git blob of train_mappo.py, which `git show ID` prints. An
# evaluation has a number for each of `evaluated_after`, a curve one for each iteration.
COLUMNS = [*KEY, "script", "evaluated_after", *EVALUATION, "value_slope"]
COLUMNS += [*(f"untrained_{name}" for name in EVALUATION), "training_seconds", *CURVES]


# ------------------------------------------------------------------------------------- the plan


class Runs(NamedTuple):
    """Runs of an experiment: the options, a variant of the method ("a + b"), and the seeds.

    Those with `stops` are stopped after these iterations, evaluated, and resumed.
    """

    experiment: str
    options: str = ""
    variant: str = ""
    algorithms: tuple[str, ...] = ("MAPPO", "IPPO")
    seeds: Sequence[int] = range(10)
    stops: tuple[int, ...] = ()

    def of(self, algorithm, *stops):
        """Return those of one algorithm, as they are after `stops` iterations or in the end."""
        return self._replace(algorithms=(algorithm,), stops=stops)


PLAN = []


def plan(*what, **how):
    """Add `Runs` to the study and return them."""
    PLAN.append(Runs(*what, **how))
    return PLAN[-1]


MAPPO, IPPO = ("MAPPO",), ("IPPO",)
TEAM = "--n-agents 8 --lr 1e-3 --anneal-lr --num-epochs 10 --num-cells 128 --scenario-options "
EIGHT_SHARED = TEAM + """'{"collisions": false, "shared_rew": true}'"""
EIGHT_INDIVIDUAL = TEAM + """'{"collisions": false, "shared_rew": false}'"""
SMALL = "--anneal-lr --lmbda 0.8 --num-cells 64 --gamma 0.95"
LARGE = "--lr 2e-3 --frames-per-batch 12000 --minibatch-size 1200 --n-iters 12"
RECIPES = {
    "quick": f"{SMALL} --num-epochs 5 --lr 5e-3 --minibatch-size 600 --n-iters 11",
    "thorough": f"{SMALL} --num-epochs 8 {LARGE}",
}
LONGER = "--max-steps 200 --frames-per-batch 12000"
WIDE = "--lr 1e-3 --num-epochs 10 --num-cells 128"
LIGHT = """--scenario-name reverse_transport --scenario-options '{"package_mass": 1}'"""
PUSH = f"{LIGHT} --n-agents 4 {LONGER} --minibatch-size 600 {WIDE} --n-iters 40"
GIVE_WAY = f"--scenario-name multi_give_way {LONGER} {WIDE} --n-iters 15"
EACH_ITS_OWN = """--n-iters 15 --scenario-options '{"shared_rew": false}'"""
SEPARATE = "--no-share-parameters-policy"

# Variants of the method, in variants.py, and one of how it is run.
TWO_THREADS, SLOPES, BOOTSTRAP = "two threads", "slopes measured", "arrivals bootstrapped"
OTHERS, OWN = "others' distance", "own distance"  # an additional input of the critic

FLAG, FRESH = plan("flag"), plan("fresh", seeds=range(10, 20))
plan("newcomer", "", TWO_THREADS, MAPPO, [0])  # what README.md of the project shows
SHARED, INDIVIDUAL = plan("rewards", EIGHT_SHARED), plan("rewards", EIGHT_INDIVIDUAL)
SHARED_FRESH = plan("rewards-fresh", EIGHT_SHARED, seeds=range(10, 20))
INDIVIDUAL_FRESH = plan("rewards-fresh", EIGHT_INDIVIDUAL, seeds=range(10, 20))
OWN_CRITICS = plan("critics", f"{EIGHT_INDIVIDUAL} --no-share-parameters-critic", "", MAPPO)
LONG = plan("long", "--n-iters 50", stops=tuple(range(5, 51, 5)))
ARRIVED = plan("arrivals", "--n-iters 10", "arrivals measured")
REMEDIES = {
    "arrivals bootstrapped": plan("remedies", "--n-iters 15", BOOTSTRAP, IPPO),
    "individual rewards": plan("remedies", EACH_ITS_OWN),
    "gamma 0.9": plan("remedies", "--gamma 0.9 --n-iters 15"),
}
LAMBDA_LONG = plan("remedies", "--lmbda 1 --n-iters 15")
BOOTSTRAPPED = plan("bootstrapped", "", BOOTSTRAP)
BOOTSTRAPPED_EIGHT = plan("bootstrapped", EIGHT_SHARED, BOOTSTRAP)
WITH_OTHERS = plan("distance", EIGHT_SHARED, OTHERS, IPPO)
WITH_OWN = plan("distance", EIGHT_SHARED, OWN, IPPO)
WITH_OTHERS_LONG = plan("distance", "--n-iters 20", OTHERS, IPPO, stops=(10, 15, 20))
SLOPES_SHORT = plan("slopes", "--n-iters 10", SLOPES)
SLOPES_LONG = plan("slopes", "--n-iters 15", SLOPES, IPPO)
SLOPES_BOOTSTRAPPED = plan("slopes", "--n-iters 15", f"{BOOTSTRAP} + {SLOPES}", IPPO)
SLOPES_SHARED = plan("slopes", EIGHT_SHARED, SLOPES)
SLOPES_INDIVIDUAL = plan("slopes", EIGHT_INDIVIDUAL, SLOPES)
SLOPES_OTHERS = plan("slopes", EIGHT_SHARED, f"{OTHERS} + {SLOPES}", IPPO)
SLOPES_OWN = plan("slopes", EIGHT_SHARED, f"{OWN} + {SLOPES}", IPPO)
LAMBDA = plan("lambda", f"{EIGHT_SHARED} --lmbda 1")
EPOCHS = {f"{n} epochs": plan("epochs", f"--num-epochs {n}") for n in (5, 10)}
FEWER_EPOCHS = {
    f"{n} epochs": plan("fewer-epochs", f"--num-epochs {n} --n-iters {n_iters}", SLOPES)
    for n, n_iters in ((10, 50), (5, 70))
}
HORIZON, POLICIES = plan("horizon", "--gamma 0.9"), plan("policies", SEPARATE)
SHARING = {
    label: plan("sharing", options, "", MAPPO)
    for label, options in {
        "separate critics": "--no-share-parameters-critic",
        "separate policies and critics": f"{SEPARATE} --no-share-parameters-critic",
        "separate policies, 30 iterations": f"{SEPARATE} --n-iters 30",
        "separate policies, three times the frames in as many gradient steps": (
            f"{SEPARATE} --frames-per-batch 18000 --minibatch-size 1200"
        ),
    }.items()
}
BY_RECIPE = {name: plan("recipes", options) for name, options in RECIPES.items()}
BY_RECIPE["quick, seeds 30 to 49"] = plan("recipes-fresh", RECIPES["quick"], seeds=range(30, 50))
BY_RECIPE["thorough, 10 epochs"] = plan("rejected", f"{SMALL} --num-epochs 10 {LARGE}")
REPAIRED = {
    (name, variant): plan("recipes-remedies", RECIPES[name], variant, IPPO)
    for name in RECIPES
    for variant in (BOOTSTRAP, OTHERS)
}
TEAMS = {f"{n} robots": plan("teams", f"{RECIPES['thorough']} --n-agents {n}") for n in (2, 4, 8)}
TRANSPORT = plan("transport", PUSH, stops=(5, 10, 20, 40))
plan("give-way", GIVE_WAY, seeds=[0])
# The defaults and the recipes by train_mappo.py as it is since it was rewritten.
REBUILT = plan("rebuilt", "--n-iters 15", SLOPES, stops=(10, 15))
REBUILT_RECIPES = {name: plan("rebuilt", options, SLOPES) for name, options in RECIPES.items()}


# -------------------------------------------------------------------------------------- running


def find_cell(cells, what):
    """Return the index of the one cell of train_mappo.py that assigns the name `what`.

    "loop" is the training loop's cell, in which a `for` calls `estimate_advantages`; "the end" is
    behind the last cell. Raises a ValueError unless there is exactly one.
    """
    found = [len(cells)] if what == "the end" else []
    for place, cell in enumerate(cells):
        body = ast.parse(cell.source).body if cell.cell_type == "code" else []
        targets = [target for one in body for target in getattr(one, "targets", [])]
        names = {target.id for target in targets if isinstance(target, ast.Name)}
        inner = [node for one in body if isinstance(one, ast.For) for node in ast.walk(one)]
        called = {ast.unparse(node.func) for node in inner if isinstance(node, ast.Call)}
        if what in names or (what == "loop" and "estimate_advantages" in called):
            found.append(place)
    if len(found) != 1:
        raise ValueError(f"{what!r}: {len(found)} cells of {SCRIPT.name} match, but must be one")
    return found[0]


def with_variant(source, variant):
    """Return the text of train_mappo.py with the cells of `variant`, such as "a + b", in it."""
    if variant in ("", TWO_THREADS):
        return source
    notebook = jupytext.reads(source, fmt="py:percent")
    cells = jupytext.read(VARIANTS, fmt="py:percent").cells
    for name in variant.split(" + "):
        chosen = [cell for cell in cells if name in cell.metadata.get("title", "").split(", ")]
        if not chosen:
            raise ValueError(f"{VARIANTS.name} has no variant {name!r}")
        for cell in chosen:
            notebook.cells.insert(find_cell(notebook.cells, cell.metadata["before"]), cell)
    return jupytext.writes(notebook, fmt="py:percent")


def row_of(key, script, evaluations, metrics):
    """Return a row of results.csv, in which all values are text.

    `key` holds the values of KEY, `script` the bytes of train_mappo.py, `evaluations` what was in
    evaluation.json at each stop, and `metrics` is the path of metrics.csv.
    """
    row = dict.fromkeys(COLUMNS, "") | dict(zip(KEY, map(str, key), strict=True))
    row["script"] = hashlib.sha1(b"blob %d\0" % len(script) + script).hexdigest()[:12]
    row["evaluated_after"] = " ".join(str(one["iterations"]) for one in evaluations)
    renamed = {"terminated_rate": "success_rate"}  # as it is called outside navigation
    curves = pd.read_csv(metrics).rename(columns=renamed).add_prefix("curve_")
    for name in curves.columns.intersection(CURVES):
        row[name] = " ".join(f"{x:.5g}" for x in curves[name])
    row["training_seconds"] = f"{curves['curve_seconds'].sum():.1f}"
    trained = pd.DataFrame(one["trained"] for one in evaluations).rename(columns=renamed)
    for name in trained:
        row[name] = " ".join(f"{x:.4f}" for x in trained[name])
    for name, x in evaluations[0]["untrained"].items():
        row[f"untrained_{renamed.get(name, name)}"] = f"{x:.4f}"
    return row


def train(runs, algorithm, seed, threads=1):
    """Do one of `runs` and return its row; raise a RuntimeError if it fails."""
    source, evaluations = SCRIPT.read_bytes(), []
    threads = 2 if runs.variant == TWO_THREADS else threads
    with tempfile.TemporaryDirectory() as parent:
        script, folder = Path(parent, SCRIPT.name), Path(parent, "run")
        script.write_text(with_variant(source.decode(), runs.variant), "utf-8")
        command = [sys.executable, str(script), *shlex.split(runs.options), "--device", "cpu"]
        command += ["--mappo" if algorithm == "MAPPO" else "--no-mappo"]
        command += ["--seed", str(seed), "--run-folder", str(folder)]
        for stop in [["--n-iters", str(n)] for n in runs.stops] or [[]]:
            done = subprocess.run(
                [*command, *stop],
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                capture_output=True,
                encoding="utf-8",
            )
            if done.returncode:
                said = done.stderr.strip().splitlines() or ["no message"]
                raise RuntimeError(f"{runs.experiment}, {algorithm}, seed {seed}: {said[-1]}")
            evaluations.append(json.loads((folder / "evaluation.json").read_text("utf-8")))
        key = (*runs[:3], algorithm, seed)
        return row_of(key, source, evaluations, folder / "metrics.csv")


def read_rows(path):
    """Return the table in a .csv as text; an empty one with the columns KEY if there is no file."""
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS)
    return pd.read_csv(path, dtype=str, keep_default_na=False)


WRITING = threading.Lock()


def write_whole(path, text):
    """Replace a file as a whole: a kill at any moment leaves the old one or the new one."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, "utf-8")
    os.replace(new, path)


def add_row(row, path):
    """Add a row, a dictionary, to the table in a .csv."""
    with WRITING:
        table = [read_rows(path)] if path.exists() else []
        table = pd.concat([*table, pd.DataFrame([row])])
        write_whole(path, table.to_csv(index=False, lineterminator="\n"))


def lacking(runs, rows):
    """Return which of `runs` have no row, as a list of (runs, algorithm, seed)."""
    have = set(rows[KEY].itertuples(index=False, name=None))
    wanted = [(algorithm, seed) for seed in runs.seeds for algorithm in runs.algorithms]
    return [(runs, *one) for one in wanted if (*runs[:3], one[0], str(one[1])) not in have]


def run_lacking(experiments):
    """Do the runs of these experiments that have no row yet; return how many of them failed."""
    rows, failed = read_rows(RESULTS), 0
    jobs = [job for runs in PLAN if runs.experiment in experiments for job in lacking(runs, rows)]
    if not jobs:
        print(f"Nothing is missing: {RESULTS.name} has all runs of {', '.join(experiments)}")
        return 0
    pool = ThreadPoolExecutor(2)  # each thread waits for a process
    futures = [pool.submit(lambda *job: add_row(train(*job), RESULTS), *job) for job in jobs]
    try:
        for future in tqdm(as_completed(futures), total=len(jobs), desc="runs"):
            if future.exception() is not None:
                failed += 1
                tqdm.write(str(future.exception()), file=sys.stderr)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, do not begin those that still wait
    return failed


# ------------------------------------------------------------------------------------ reporting

TABLES, FIGURES = {}, {}


def table(name, show, groups, **how):
    """Define a table of README.md: the runs of `groups`, shown by a function of tables.py."""
    TABLES[name] = (show, groups, how)


def figure(name, draw, groups, **how):
    """Define a figure, likewise."""
    FIGURES[name] = (draw, groups, how)


def each_algorithm(groups, *stops):
    """Split labels by algorithm."""
    both = [(label, one) for label in groups for one in groups[label].algorithms]
    return {f"{label}, {one}": groups[label].of(one, *stops) for label, one in both}


seeds = {"seeds 0 to 9": FLAG, "seeds 10 to 19": FRESH, "all twenty": [FLAG, FRESH]}
table("flag", versus, seeds)
shorter = {"3 robots": [FLAG, FRESH], "8 robots, shared reward": SHARED}
table("successful", versus, shorter, columns=["successful_length"])
rewards = {"shared reward": SHARED, "individual rewards": INDIVIDUAL}
fresh = {"shared, seeds 10 to 19": SHARED_FRESH, "individual, seeds 10 to 19": INDIVIDUAL_FRESH}
table("rewards", versus, rewards | fresh)
figure("rewards", draw_runs, rewards)
known = each_algorithm(rewards, 1, 5, 10)
known["individual rewards, MAPPO, a critic for each robot"] = OWN_CRITICS.of("MAPPO", 1, 5, 10)
table("critics", grid, known, columns=["curve_explained_variance", "curve_advantage_std"])
critics = {"MAPPO, one critic for all": INDIVIDUAL.of("MAPPO")}
critics |= {"MAPPO, a critic for each robot": OWN_CRITICS}
critics |= {"IPPO, one critic for all": INDIVIDUAL.of("IPPO")}
table("own-critics", grid, critics, against="episode_length")

rate = (-0.03, 1.03)
tested = {"success_rate": ("success rate in test episodes", rate)}
in_training = {"curve_success_rate": ("success rate in training", rate)}
reward = {"episode_reward": ("reward per agent in test episodes", (0, 3.4))}
first_twenty = LONG._replace(stops=tuple(range(1, 21)))
table("long", versus, {"": LONG}, columns=["success_rate", "episode_reward"])
figure("twenty", draw_over_time, {"": first_twenty}, columns=in_training | tested)
figure("long", draw_over_time, {"": LONG}, columns=tested | reward)
table("arrivals", versus, {"": ARRIVED}, columns=[f"curve_{name}" for name in ARRIVALS])
default = {"the default": LONG.of("IPPO", 15)}
repaired = {label: runs.of("IPPO") for label, runs in REMEDIES.items()}
table("remedies", grid, default | repaired, against="success_rate")
both = {label: REMEDIES[label] for label in ("individual rewards", "gamma 0.9")}
both["lambda 1"] = LAMBDA_LONG
table("remedies-mappo", versus, both, columns=["success_rate", "episode_length"])
with_bootstrap = {"3 robots": BOOTSTRAPPED, "8 robots, shared reward": BOOTSTRAPPED_EIGHT}
table("bootstrapped", versus, with_bootstrap)

inputs = {"IPPO": SHARED.of("IPPO"), "IPPO with the others' distance": WITH_OTHERS}
inputs |= {"IPPO with its own distance": WITH_OWN, "MAPPO": SHARED.of("MAPPO")}
table("distance", grid, inputs, against="episode_length")
figure("distance", draw_runs, inputs)
stops = (10, 15, 20)
inputs = {"IPPO": LONG.of("IPPO", *stops), "IPPO with the others' distance": WITH_OTHERS_LONG}
inputs |= {"MAPPO": LONG.of("MAPPO", *stops)}
table("distance-long", grid, inputs, columns=["success_rate"])
inputs = {"individual rewards, o_i (IPPO)": SLOPES_INDIVIDUAL.of("IPPO")}
inputs |= {"individual rewards, o_1, ..., o_n (MAPPO)": SLOPES_INDIVIDUAL.of("MAPPO")}
inputs |= {"shared reward, o_1, ..., o_n (MAPPO)": SLOPES_SHARED.of("MAPPO")}
inputs |= {"shared reward, o_i and the others' distance": SLOPES_OTHERS}
inputs |= {"shared reward, o_i (IPPO)": SLOPES_SHARED.of("IPPO")}
inputs |= {"shared reward, o_i and its own distance": SLOPES_OWN}
columns = ["curve_value_slope", "success_rate", "episode_length"]
table("slopes", grid, inputs, columns=columns)
growth = {"MAPPO": [SLOPES_SHORT.of("MAPPO", 5, 10), REBUILT.of("MAPPO", 15)]}
growth |= {"IPPO": SLOPES_LONG.of("IPPO", 5, 10, 15)}
growth |= {"IPPO, arrivals bootstrapped": SLOPES_BOOTSTRAPPED.of("IPPO", 5, 10, 15)}
table("slopes-long", grid, growth, columns=["curve_value_slope"])
table("lambda", versus, {"lambda 1": LAMBDA, "lambda 0.9": SHARED})
repaired = each_algorithm({name: BY_RECIPE[name] for name in RECIPES})
repaired |= {f"{name}, IPPO, {variant}": runs for (name, variant), runs in REPAIRED.items()}
table("recipes-remedies", grid, dict(sorted(repaired.items())), columns=["success_rate"])

table("epochs", versus, EPOCHS | {"30 epochs": FLAG})
table("fewer-epochs", versus, FEWER_EPOCHS)
longer = each_algorithm(FEWER_EPOCHS, 10, 20, 30, 40, 50, 60, 70)
table("fewer-epochs-reward", grid, longer, columns=["curve_episode_reward"])
table("horizon", versus, {"gamma 0.9": HORIZON, "gamma 0.99": FLAG})
table("policies", versus, {"separate policies": POLICIES, "a shared policy": FLAG})
sharing = {"both shared, the default": FLAG.of("MAPPO"), "separate policies": POLICIES.of("MAPPO")}
sharing |= SHARING | {"both shared, 30 iterations": LONG.of("MAPPO", 30)}
table("sharing", grid, sharing, against="success_rate")
table("recipes", versus, BY_RECIPE)
figure("recipes", draw_runs, {name: BY_RECIPE[name] for name in RECIPES})
table("teams", versus, TEAMS)
figure("teams", draw_runs, TEAMS)
table("transport", versus, {"": TRANSPORT}, columns=["success_rate", "episode_length"])
pushed = {"episode_length": ("steps, 200 for a failed episode", (40, 125))}
figure("transport", draw_over_time, {"": TRANSPORT}, columns=tested | pushed)
columns = ["success_rate", "episode_length", "value_slope"]
table("rebuilt", versus, {"": REBUILT}, columns=columns)
table("rebuilt-recipes", versus, REBUILT_RECIPES)
table("band", band, {"": REBUILT._replace(stops=(1, 10))})
OTHER_TABLES = {
    "speed": (SPEED, tables.speed),
    "transfer": (TRANSFER, tables.transfer),
    "tutorial": (tutorial.ROWS, lambda rows: tutorial.report()),
}


def make_table(name, numbers):
    """Return the table of README.md that is called `name`; `numbers` is what `tidy` returns."""
    if name in OTHER_TABLES:
        path, show = OTHER_TABLES[name]
        data, how = read_rows(path), {}
    else:
        show, groups, how = TABLES[name]
        data = tables.gather(numbers, groups)
    return show(data, **how) if len(data) else "*Not run yet.*"


def with_tables(text, numbers):
    """Return a README's text with new tables between <!-- table:NAME --> and <!-- /table -->."""
    return re.sub(
        r"<!-- table:([\w-]+) -->.*?<!-- /table -->",
        lambda mark: f"<!-- table:{mark[1]} -->\n{make_table(mark[1], numbers)}\n<!-- /table -->",
        text,
        flags=re.DOTALL,
    )


def report():
    """Update the tables of README.md and the figures; name the runs that have no row."""
    rows = read_rows(RESULTS)
    numbers = tables.tidy(rows)
    write_whole(README, with_tables(README.read_text("utf-8"), numbers))
    for name, (draw, groups, how) in FIGURES.items():
        data = tables.gather(numbers, groups)
        if len(data):
            draw(data, **how).savefig(STUDY / f"{name}.png", dpi=120)
    for runs in PLAN:
        missing, wanted = lacking(runs, rows), len(runs.algorithms) * len(runs.seeds)
        if missing:
            what = ", ".join(filter(None, runs[1:3])) or "the defaults"
            print(f"{runs.experiment}: {len(missing)} of {wanted} runs are missing ({what})")
    for path, _ in OTHER_TABLES.values():
        if not path.exists():
            print(f"{path.name} is missing")


if __name__ == "__main__":
    names = list(dict.fromkeys(runs.experiment for runs in PLAN))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("experiments", nargs="*", help=f"of {', '.join(names)}")
    arguments = parser.parse_args()
    unknown = ", ".join(set(arguments.experiments) - set(names))
    if unknown:
        parser.error(f"there is no experiment {unknown}, only {', '.join(names)}")
    if arguments.command == "run":
        sys.exit(1 if run_lacking(arguments.experiments or names) else 0)
    report()
