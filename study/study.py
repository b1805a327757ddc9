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
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jupytext
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats
from tqdm import tqdm

import tutorial

STUDY = Path(__file__).resolve().parent
SCRIPT = STUDY.parent / "train_mappo.py"
VARIANTS = STUDY / "variants.py"
README = STUDY / "README.md"
RESULTS = STUDY / "results.csv"
SPEED = STUDY / "speed.csv"  # by benchmark.py
TRANSFER = STUDY / "transfer.csv"  # by transfer.py

# A row of results.csv. Evaluations are one number for each entry of evaluated_after, curves one for
# each iteration, separated by spaces. `script` is the Git blob of train_mappo.py: `git show ID`.
KEY = ["experiment", "options", "variant", "algorithm", "seed"]
EVALUATION = ["success_rate", "episode_reward", "episode_length", "collisions"]
ARRIVALS = ["value_at_arrival", "reward_at_arrival", "advantage_at_arrival"]
METRICS = ["episode_reward", "success_rate", "collisions", "loss_critic", "entropy", "kl_approx"]
METRICS += ["clip_fraction", "explained_variance", "advantage_std"]  # of metrics.csv
CURVES = [f"curve_{name}" for name in [*METRICS, *ARRIVALS, "value_slope"]]
COLUMNS = [*KEY, "script", "evaluated_after", *EVALUATION, "value_slope"]
COLUMNS += [*(f"untrained_{name}" for name in EVALUATION), "training_seconds", *CURVES]

TITLES = {"success_rate": "success rate", "episode_reward": "reward per agent"}
TITLES |= {"episode_length": "steps", "successful_length": "steps of successful episodes"}
TITLES |= {"value_slope": "slope of the value", "value_at_arrival": "value before it"}
TITLES |= {"reward_at_arrival": "reward of it", "advantage_at_arrival": "advantage, in std"}
DIGITS = {"success_rate": 3, "episode_length": 1, "successful_length": 1, "collisions": 3}  # or 2
FEWER_IS_BETTER = ["episode_length", "successful_length", "collisions", "value_slope"]
TRUSTED = 0.85  # the least coverage with which an interval is shown


# ---------------------------------------------------------------------------------- what is run


class Runs(NamedTuple):
    """Runs of an experiment: the options, a variant of the method ("a + b"), and the seeds.

    Runs with `stops` are stopped after these iterations, evaluated, and resumed.
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
    """Add runs to the study and return them; see `Runs`."""
    PLAN.append(Runs(*what, **how))
    return PLAN[-1]


MAPPO, IPPO = ("MAPPO",), ("IPPO",)
EIGHT = "--n-agents 8 --lr 1e-3 --anneal-lr --num-epochs 10 --num-cells 128"
SHARED_REWARD = f"""{EIGHT} --scenario-options '{{"collisions": false, "shared_rew": true}}'"""
OWN_REWARD = f"""{EIGHT} --scenario-options '{{"collisions": false, "shared_rew": false}}'"""
SMALL = "--anneal-lr --lmbda 0.8 --num-cells 64 --gamma 0.95"
LARGE_BATCHES = "--lr 2e-3 --frames-per-batch 12000 --minibatch-size 1200 --n-iters 12"
QUICK = f"{SMALL} --num-epochs 5 --lr 5e-3 --minibatch-size 600 --n-iters 11"
THOROUGH = f"{SMALL} --num-epochs 8 {LARGE_BATCHES}"
RECIPES = {"quick": QUICK, "thorough": THOROUGH}
PUSH = """--scenario-name reverse_transport --scenario-options '{"package_mass": 1}' --n-agents 4"""
PUSH += " --max-steps 200 --frames-per-batch 12000 --minibatch-size 600"
PUSH += " --lr 1e-3 --num-epochs 10 --num-cells 128 --n-iters 40"
GIVE_WAY = "--scenario-name multi_give_way --max-steps 200 --frames-per-batch 12000"
GIVE_WAY += " --lr 1e-3 --num-epochs 10 --num-cells 128 --n-iters 15"
SEPARATE = "--no-share-parameters-policy"
ONE_REWARD_EACH = """--n-iters 15 --scenario-options '{"shared_rew": false}'"""

TWO_THREADS, SLOPES, BOOTSTRAP = "two threads", "slopes measured", "arrivals bootstrapped"
OTHERS, OWN = "others' distance", "own distance"  # what the critic gets as an additional input

FLAG = plan("flag")
FRESH = plan("fresh", seeds=range(10, 20))
plan("newcomer", "", TWO_THREADS, MAPPO, [0])  # what the first command of ../README.md prints
SHARED, INDIVIDUAL = plan("rewards", SHARED_REWARD), plan("rewards", OWN_REWARD)
SHARED_FRESH = plan("rewards-fresh", SHARED_REWARD, seeds=range(10, 20))
INDIVIDUAL_FRESH = plan("rewards-fresh", OWN_REWARD, seeds=range(10, 20))
CRITICS = plan("critics", f"{OWN_REWARD} --no-share-parameters-critic", "", MAPPO)
LONG = plan("long", "--n-iters 50", stops=tuple(range(5, 51, 5)))
MEASURED = plan("arrivals", "--n-iters 10", "arrivals measured")
ENDLESS = plan("remedies", "--n-iters 15", BOOTSTRAP, IPPO)
EACH_ITS_OWN = plan("remedies", ONE_REWARD_EACH, "", IPPO)
SHORT_SIGHTED = plan("remedies", "--gamma 0.9 --n-iters 15", "", IPPO)
BOOTSTRAPPED = plan("bootstrapped", "", BOOTSTRAP)
BOOTSTRAPPED_EIGHT = plan("bootstrapped", SHARED_REWARD, BOOTSTRAP)
TOLD_OTHERS = plan("distance", SHARED_REWARD, OTHERS, IPPO)
TOLD_OWN = plan("distance", SHARED_REWARD, OWN, IPPO)
TOLD_LONG = plan("distance", "--n-iters 20", OTHERS, IPPO, stops=(10, 15, 20))
SLOPES_TEN = plan("slopes", "--n-iters 10", SLOPES)
SLOPES_SHARED = plan("slopes", SHARED_REWARD, SLOPES)
SLOPES_INDIVIDUAL = plan("slopes", OWN_REWARD, SLOPES)
SLOPES_OTHERS = plan("slopes", SHARED_REWARD, f"{OTHERS} + {SLOPES}", IPPO)
SLOPES_OWN = plan("slopes", SHARED_REWARD, f"{OWN} + {SLOPES}", IPPO)
SLOPES_LONG = plan("slopes", "--n-iters 15", SLOPES, IPPO)
SLOPES_ENDLESS = plan("slopes", "--n-iters 15", f"{BOOTSTRAP} + {SLOPES}", IPPO)
LAMBDA_ONE = plan("lambda", f"{SHARED_REWARD} --lmbda 1")
FIVE, TEN = plan("epochs", "--num-epochs 5"), plan("epochs", "--num-epochs 10")
FIVE_LONG = plan("fewer-epochs", "--num-epochs 5 --n-iters 70", SLOPES)
TEN_LONG = plan("fewer-epochs", "--num-epochs 10 --n-iters 50", SLOPES)
HORIZON = plan("horizon", "--gamma 0.9")
POLICIES = plan("policies", SEPARATE)
SHARING = {
    "separate critics": "--no-share-parameters-critic",
    "separate policies and critics": f"{SEPARATE} --no-share-parameters-critic",
    "separate policies, 30 iterations": f"{SEPARATE} --n-iters 30",
    "separate policies, three times the frames in as many gradient steps": (
        f"{SEPARATE} --frames-per-batch 18000 --minibatch-size 1200"
    ),
}
SHARING = {label: plan("sharing", options, "", MAPPO) for label, options in SHARING.items()}
BY_RECIPE = {name: plan("recipes", options) for name, options in RECIPES.items()}
QUICK_FRESH = plan("recipes-fresh", QUICK, seeds=range(30, 50))
plan("rejected", f"{SMALL} --num-epochs 10 {LARGE_BATCHES}")
REPAIRED = {
    (name, variant): plan("recipes-remedies", options, variant, IPPO)
    for name, options in RECIPES.items()
    for variant in (BOOTSTRAP, OTHERS)
}
TEAMS = {f"{n} robots": plan("teams", f"{THOROUGH} --n-agents {n}") for n in (2, 4, 8)}
TRANSPORT = plan("transport", PUSH, stops=(5, 10, 20, 40))
plan("give-way", GIVE_WAY, seeds=[0])
# The defaults and the recipes once more, by train_mappo.py as it is since it was rewritten.
REBUILT = plan("rebuilt", "--n-iters 15", SLOPES, stops=(10, 15))
REBUILT_RECIPES = {name: plan("rebuilt", options, SLOPES) for name, options in RECIPES.items()}


# -------------------------------------------------------------------------------------- running


def find_cell(cells, what):
    """Return the index of the one cell of train_mappo.py that assigns the name `what`.

    "loop" is the training loop's cell, in which a `for` calls `estimate_advantages`. "the end" is
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

    `key` are the values of KEY, `script` the bytes of train_mappo.py, `evaluations` the contents of
    evaluation.json at each stop, and `metrics` the path of metrics.csv.
    """
    row = dict.fromkeys(COLUMNS, "") | dict(zip(KEY, map(str, key), strict=True))
    row["script"] = hashlib.sha1(b"blob %d\0" % len(script) + script).hexdigest()[:12]
    row["evaluated_after"] = " ".join(str(one["iterations"]) for one in evaluations)
    curves = pd.read_csv(metrics).rename(columns={"terminated_rate": "success_rate"})
    row["training_seconds"] = f"{curves['seconds'].sum():.1f}"
    for name in curves.columns.intersection([curve.removeprefix("curve_") for curve in CURVES]):
        row[f"curve_{name}"] = " ".join(f"{x:.5g}" for x in curves[name])
    for name in [*EVALUATION, "value_slope"]:
        measured = "terminated_rate" if "terminated_rate" in evaluations[0]["trained"] else name
        key = measured if name == "success_rate" else name
        found = [one["trained"][key] for one in evaluations if key in one["trained"]]
        row[name] = " ".join(f"{x:.4f}" for x in found)
        if key in evaluations[0]["untrained"]:
            row[f"untrained_{name}"] = f"{evaluations[0]['untrained'][key]:.4f}"
    return row


def train(runs, algorithm, seed, threads=1):
    """Do one of `runs` and return its row; raise a RuntimeError if it fails."""
    source = SCRIPT.read_bytes()
    threads = 2 if runs.variant == TWO_THREADS else threads
    with tempfile.TemporaryDirectory() as parent:
        script, folder, evaluations = Path(parent, SCRIPT.name), Path(parent, "run"), []
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


def read_rows(path=None):
    """Return the table in results.csv, or in another file, as text; empty if there is none."""
    path = path or RESULTS
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS)
    return pd.read_csv(path, dtype=str, keep_default_na=False)


WRITING = threading.Lock()


def write_whole(path, text):
    """Replace a file as a whole: a kill at any moment leaves the old one or the new one."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, "utf-8")
    os.replace(new, path)


def add_row(row, path=None):
    """Add a row, a dictionary, to results.csv or to another file."""
    path = path or RESULTS
    with WRITING:
        table = pd.concat([read_rows(path), pd.DataFrame([row])]) if path.exists() else [row]
        write_whole(path, pd.DataFrame(table).to_csv(index=False, lineterminator="\n"))


def lacking(runs, rows):
    """Return those of `runs` that have no row, as a list of (runs, algorithm, seed)."""
    have = set(rows[KEY].itertuples(index=False, name=None))
    wanted = [(algorithm, seed) for seed in runs.seeds for algorithm in runs.algorithms]
    return [(runs, *one) for one in wanted if (*runs[:3], one[0], str(one[1])) not in have]


def run_lacking(experiments):
    """Do the runs of these experiments that have no row yet; return how many of them failed."""
    rows, failed = read_rows(), 0
    planned = [runs for runs in PLAN if runs.experiment in experiments]
    jobs = [job for runs in planned for job in lacking(runs, rows)]
    if not jobs:
        print(f"Nothing is missing: {RESULTS.name} has all runs of {', '.join(experiments)}")
    pool = ThreadPoolExecutor(2)  # each thread waits for a process
    progress = tqdm(total=len(jobs), desc="runs", disable=not jobs)
    try:
        for future in as_completed(
            [pool.submit(lambda *job: add_row(train(*job)), *job) for job in jobs]
        ):
            if future.exception() is not None:
                failed += 1
                progress.write(str(future.exception()), file=sys.stderr)
            progress.update()
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, do not begin those that still wait
        progress.close()
    return failed


# ----------------------------------------------------------------------------- rows to numbers


def tidy(rows):
    """Return results.csv as numbers: a line for each run and iteration, sorted by them.

    Its columns are those of KEY, "iterations" (from 1 on), the evaluation where there was one, and
    the curves.
    """
    rows = rows.astype({"seed": int}).set_index(KEY)
    columns = {}
    for name in CURVES:
        numbers = rows[name].str.split().explode().dropna().astype(float)
        place = numbers.groupby(level=KEY).cumcount() + 1
        columns[name] = numbers.set_axis(place.rename("iterations"), append=True)
    for name in [*EVALUATION, "value_slope"]:
        found = rows.loc[rows[name] != "", ["evaluated_after", name]]
        found = found.apply(lambda column: column.str.split()).explode(["evaluated_after", name])
        found = found.set_index(found.pop("evaluated_after").astype(int), append=True)
        columns[name] = found[name].astype(float).rename_axis([*KEY, "iterations"])
    return pd.DataFrame(columns).sort_index().reset_index()


def choose(table, runs):
    """Return the lines of `runs`: at their stops, or at the end of each if they have none."""
    same = (table[["experiment", "options", "variant"]] == runs[:3]).all(axis=1)
    same &= table["algorithm"].isin(runs.algorithms) & table["seed"].isin(runs.seeds)
    found = table[same]
    if runs.stops:
        return found[found["iterations"].isin(runs.stops)]
    return found.groupby(["algorithm", "seed"]).tail(1)


def gather(table, groups):
    """Return the lines of `groups`, a dictionary of a label and runs (or a list of them).

    The index is (label, algorithm, iterations, seed), in the order of the groups and with MAPPO
    first. A label without rows is left out.
    """
    parts = {
        label: pd.concat(
            [choose(table, one) for one in (runs if isinstance(runs, list) else [runs])]
        )
        for label, runs in groups.items()
    }
    found = pd.concat(parts, names=["label"]).reset_index("label")
    found = found.set_index(["label", "algorithm", "iterations", "seed"])
    return found.sort_index(level="algorithm", ascending=False, sort_remaining=False, kind="stable")


# ----------------------------------------------------------------------------------- statistics


def coverage(differences, draws=20_000):
    """Return how often Student's 95% interval of the mean holds the mean of its population.

    The samples are as large as `differences`, and drawn from them.
    """
    n, generator = len(differences), np.random.default_rng(0)
    samples = generator.choice(differences.to_numpy(), (draws, n))
    width = stats.t.ppf(0.975, n - 1) * stats.sem(samples, axis=1)
    return (np.abs(samples.mean(axis=1) - differences.mean()) <= width + 1e-12).mean()


def sign_of(name):
    """Return -1 for a measurement of which less is better, otherwise 1."""
    return -1 if name in FEWER_IS_BETTER else 1


def mean(runs):
    """Return the mean over runs as text."""
    return f"{runs.mean():.{DIGITS.get(runs.name, 2)}f}"


def mean_and_worst(runs):
    """Return the mean over runs and the worst of them, such as "0.953 (worst 0.920)"."""
    worst = runs.min() if sign_of(runs.name) == 1 else runs.max()
    return f"{mean(runs)} (worst {worst:.{DIGITS.get(runs.name, 2)}f})"


def mean_and_range(runs):
    """Return the mean over runs with the lowest and the highest: "0.37 (0.35 to 0.39)"."""
    return f"{mean(runs)} ({runs.min():.2f} to {runs.max():.2f})"


def lowest_to_highest(runs):
    """Return the range of runs with three significant digits."""
    return f"{runs.min():.3g} to {runs.max():.3g}"


def difference(ours, theirs):
    """Compare runs with the same seeds: mean difference, 95% interval, and pairs that are better.

    Such as "+0.08 [+0.02, +0.14], 9 of 10". Without the interval if it could not be trusted, as its
    coverage is below TRUSTED. Both are Series indexed by seed.
    """
    ours, theirs = ours.align(theirs, join="inner")
    gaps, digits = ours - theirs, DIGITS.get(ours.name, 2)
    if not gaps.any():
        return "none"
    text = f"{gaps.mean():+.{digits}f}"
    if gaps.nunique() > 1 and coverage(gaps) >= TRUSTED:
        low, high = stats.ttest_rel(ours, theirs).confidence_interval()
        text += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{text}, {(sign_of(ours.name) * gaps > 0).sum()} of {len(gaps)}"


def probability_better(ours, theirs):
    """Return the probability that one of our runs is better than one of theirs; ties count half.

    The probability of improvement of Agarwal et al. 2021, arXiv:2108.13264.
    """
    sign = sign_of(ours.name)
    test = stats.mannwhitneyu(sign * ours, sign * theirs, method="asymptotic")
    return f"{test.statistic / (len(ours) * len(theirs)):.2f}"


# --------------------------------------------------------------------------------------- tables


def markdown(head, lines):
    """Return a table in Markdown; all lines are lists of cells."""
    lines = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def pairs(runs):
    """Split lines of one label by algorithm: tables of MAPPO and of IPPO indexed by seed."""
    found = [runs[runs.index.get_level_values("algorithm") == one] for one in ("MAPPO", "IPPO")]
    return [one.reset_index().set_index("seed") for one in found]


def comparison(data, columns=EVALUATION, form=mean_and_worst):
    """Show mean and worst run of each algorithm; below them, MAPPO minus IPPO and P(better)."""
    lines = []
    for label, runs in data.groupby("label", sort=False):
        for algorithm, found in runs.groupby("algorithm", sort=False):
            lines.append([label, algorithm, len(found), *(form(found[one]) for one in columns)])
        ours, theirs = pairs(runs)
        if len(ours) and len(theirs):
            number = f"{len(ours.index.intersection(theirs.index))} pairs"
            cells = [difference(ours[one], theirs[one]) for one in columns]
            lines.append([label, "difference", number, *cells])
            cells = [probability_better(ours[one], theirs[one]) for one in columns]
            lines.append([label, "P(MAPPO better)", "", *cells])
    titles = [TITLES.get(one, one) for one in columns]
    return markdown(["", "algorithm", "runs", *titles], lines)


def successful(data):
    """Compare the steps of those episodes that succeed; one that fails counts as 100."""
    succeeded = data["success_rate"]
    length = (data["episode_length"] - 100 * (1 - succeeded)) / succeeded
    return comparison(data.assign(successful_length=length), ["successful_length"])


def over_time(data, columns):
    """Compare the algorithms after each number of iterations."""
    lines = []
    for iterations, runs in data.groupby("iterations"):
        line = [iterations]
        ours, theirs = pairs(runs)
        for one in columns:
            line += [mean_and_worst(runs[one]) if len(runs) else "" for runs in (ours, theirs)]
            known = len(ours) and len(theirs)
            line += [difference(ours[one], theirs[one]) if known else ""]
            line += [probability_better(ours[one], theirs[one]) if known else ""]
        lines.append(line)
    head = [TITLES[one] for one in columns]
    head = [x for one in head for x in (f"{one}: MAPPO", "IPPO", "difference", "P(MAPPO better)")]
    return markdown(["iterations", *head], lines)


def against_the_first(data, column="success_rate"):
    """Compare each label with the first one."""
    lines, first = [], None
    for label, runs in data.groupby("label", sort=False):
        runs = runs.reset_index().set_index("seed")
        compared = ["", ""]
        if first is not None:
            compared = [difference(runs[column], first), probability_better(runs[column], first)]
        first = runs[column] if first is None else first
        cells = [mean_and_worst(runs[one]) for one in EVALUATION]
        lines.append([label, len(runs), *cells, *compared])
    titles = [TITLES.get(one, one) for one in EVALUATION]
    head = ["", "runs", *titles, f"{TITLES[column]}: difference to the first", "P(better)"]
    return markdown(head, lines)


def grid(data, columns, over=False):
    """Show a line for each label; `columns` are {title: (measurement, form)}.

    With `over`, a measurement has a column for each number of iterations.
    """
    places = sorted(set(data.index.get_level_values("iterations"))) if over else [None]
    lines = []
    for label, runs in data.groupby("label", sort=False):
        line = [label]
        for name, form in columns.values():
            for n in places:
                chosen = runs.index.get_level_values("iterations") == n if over else slice(None)
                found = runs.loc[chosen, name].dropna()
                line.append(form(found) if len(found) else "")
        lines.append(line)
    head = [title if n is None else f"{title}, {n}" for title in columns for n in places]
    return markdown(["", *head], lines)


def band(data):
    """Show the range over runs of each column of metrics.csv, a line for each."""
    groups = data.groupby(["algorithm", "iterations"], sort=False)
    cells = groups[[f"curve_{name}" for name in METRICS]].agg(lowest_to_highest)
    head = [f"{algorithm}, iteration {n}" for algorithm, n in cells.index]
    lines = [[f"`{name}`", *cells[f"curve_{name}"]] for name in METRICS]
    return markdown(["", *head], lines)


def transfer():
    """Show how policies that were trained in one team act in others."""
    rows = read_rows(TRANSFER)
    groups = rows.astype(float).astype({"n_agents": int}).groupby("n_agents")
    lines = [
        [f"{n} robots", len(runs), *(mean_and_worst(runs[one]) for one in EVALUATION)]
        for n, runs in groups
    ]
    return markdown(["", "runs", *(TITLES.get(one, one) for one in EVALUATION)], lines)


def ratio(these, those):
    """Return the median ratio over turns, with the lowest and the highest."""
    ratios = these / those
    return f"{ratios.median():.2f} ({ratios.min():.2f} to {ratios.max():.2f})"


def speed(rows=None):
    """Show the median time of each thing, and its ratio, turn by turn, to the first of its table.

    `rows` has the columns of speed.csv.
    """
    rows = read_rows(SPEED) if rows is None else rows
    rows = rows.assign(each=rows["seconds"].astype(float) / rows["amount"].astype(float))
    forms = {"gradient step": lambda s: f"{1000 * s:.2f} ms", "frame": lambda s: f"{1 / s:,.0f}/s"}
    lines = []
    for (table, unit), found in rows.groupby(["table", "unit"], sort=False):
        turns = found.set_index("turn").groupby("name", sort=False)["each"]
        reference = next(iter(turns))[1]
        for name, taken in turns:
            form = forms.get(unit, lambda s: f"{s:.1f} s")
            lines.append([table, name, form(taken.median()), ratio(taken, reference)])
    return markdown(["", "", "median", "times the first"], lines)


success, steps = ("success_rate", mean_and_worst), ("episode_length", mean_and_worst)
slope = ("curve_value_slope", mean_and_range)
TABLES = {
    "flag": (
        {"seeds 0 to 9": FLAG, "seeds 10 to 19": FRESH, "all twenty": [FLAG, FRESH]},
        comparison,
    ),
    "successful": ({"3 robots": [FLAG, FRESH], "8 robots, shared reward": SHARED}, successful),
    "rewards": (
        {
            "shared reward": SHARED,
            "individual rewards": INDIVIDUAL,
            "shared reward, seeds 10 to 19": SHARED_FRESH,
            "individual rewards, seeds 10 to 19": INDIVIDUAL_FRESH,
        },
        comparison,
    ),
    "critics": (
        {
            "shared reward, MAPPO": SHARED.of("MAPPO", 1, 5, 10),
            "shared reward, IPPO": SHARED.of("IPPO", 1, 5, 10),
            "individual rewards, MAPPO": INDIVIDUAL.of("MAPPO", 1, 5, 10),
            "individual rewards, MAPPO, a critic for each robot": CRITICS.of("MAPPO", 1, 5, 10),
            "individual rewards, IPPO": INDIVIDUAL.of("IPPO", 1, 5, 10),
        },
        partial(
            grid,
            columns={
                "explained variance, iteration": ("curve_explained_variance", mean),
                "std of advantages, iteration": ("curve_advantage_std", mean),
            },
            over=True,
        ),
    ),
    "own-critics": (
        {
            "MAPPO, one critic for all": INDIVIDUAL.of("MAPPO"),
            "MAPPO, a critic for each robot": CRITICS,
            "IPPO, one critic for all": INDIVIDUAL.of("IPPO"),
        },
        partial(against_the_first, column="episode_length"),
    ),
    "long": ({"": LONG}, partial(over_time, columns=["success_rate", "episode_reward"])),
    "arrivals": ({"": MEASURED}, partial(comparison, columns=ARRIVALS, form=mean_and_range)),
    "remedies": (
        {
            "the default": LONG.of("IPPO", 15),
            "arrivals bootstrapped": ENDLESS,
            "individual rewards": EACH_ITS_OWN,
            "gamma 0.9": SHORT_SIGHTED,
        },
        against_the_first,
    ),
    "bootstrapped": (
        {"3 robots": BOOTSTRAPPED, "8 robots, shared reward": BOOTSTRAPPED_EIGHT},
        comparison,
    ),
    "distance": (
        {
            "IPPO": SHARED.of("IPPO"),
            "IPPO, the others' distance": TOLD_OTHERS,
            "IPPO, the robot's own distance": TOLD_OWN,
            "MAPPO": SHARED.of("MAPPO"),
        },
        partial(against_the_first, column="episode_length"),
    ),
    "distance-long": (
        {
            "IPPO": LONG.of("IPPO", 10, 15, 20),
            "IPPO, the others' distance": TOLD_LONG,
            "MAPPO": LONG.of("MAPPO", 10, 15, 20),
        },
        partial(grid, columns={"success rate, iteration": success}, over=True),
    ),
    "slopes": (
        {
            "individual rewards, own observation (IPPO)": SLOPES_INDIVIDUAL.of("IPPO"),
            "individual rewards, all observations (MAPPO)": SLOPES_INDIVIDUAL.of("MAPPO"),
            "shared reward, all observations (MAPPO)": SLOPES_SHARED.of("MAPPO"),
            "shared reward, own observation and the others' distance": SLOPES_OTHERS,
            "shared reward, own observation (IPPO)": SLOPES_SHARED.of("IPPO"),
            "shared reward, own observation and own distance": SLOPES_OWN,
        },
        partial(
            grid, columns={"slope of the value": slope, "success rate": success, "steps": steps}
        ),
    ),
    "slopes-long": (
        {
            "MAPPO": [SLOPES_TEN.of("MAPPO", 5, 10), REBUILT.of("MAPPO", 15)],
            "IPPO": SLOPES_LONG.of("IPPO", 5, 10, 15),
            "IPPO, arrivals bootstrapped": SLOPES_ENDLESS.of("IPPO", 5, 10, 15),
        },
        partial(grid, columns={"slope of the value, iteration": slope}, over=True),
    ),
    "lambda": ({"lambda 1": LAMBDA_ONE, "lambda 0.9": SHARED}, comparison),
    "recipes-remedies": (
        {
            f"{name}, {label}": runs
            for name in RECIPES
            for label, runs in {
                "MAPPO": BY_RECIPE[name].of("MAPPO"),
                "IPPO": BY_RECIPE[name].of("IPPO"),
                "IPPO, arrivals bootstrapped": REPAIRED[name, BOOTSTRAP],
                "IPPO, the others' distance": REPAIRED[name, OTHERS],
            }.items()
        },
        partial(grid, columns={"success rate": success, "steps": steps}),
    ),
    "epochs": ({"5 epochs": FIVE, "10 epochs": TEN, "30 epochs": FLAG}, comparison),
    "fewer-epochs": (
        {"10 epochs, 50 iterations": TEN_LONG, "5 epochs, 70 iterations": FIVE_LONG},
        comparison,
    ),
    "fewer-epochs-reward": (
        {
            f"{label}, {algorithm}": runs.of(algorithm, 10, 20, 30, 40, 50, 60, 70)
            for label, runs in {"10 epochs": TEN_LONG, "5 epochs": FIVE_LONG}.items()
            for algorithm in ("MAPPO", "IPPO")
        },
        partial(
            grid, columns={"training reward, iteration": ("curve_episode_reward", mean)}, over=True
        ),
    ),
    "horizon": ({"gamma 0.9": HORIZON, "gamma 0.99": FLAG}, comparison),
    "policies": ({"separate policies": POLICIES, "a shared policy": FLAG}, comparison),
    "sharing": (
        {
            "both shared, the default": FLAG.of("MAPPO"),
            "separate policies": POLICIES.of("MAPPO"),
            **SHARING,
            "both shared, 30 iterations": LONG.of("MAPPO", 30),
        },
        against_the_first,
    ),
    "recipes": ({**BY_RECIPE, "quick, seeds 30 to 49": QUICK_FRESH}, comparison),
    "teams": (TEAMS, comparison),
    "transport": ({"": TRANSPORT}, partial(over_time, columns=["success_rate", "episode_length"])),
    "rebuilt": (
        {"": REBUILT},
        partial(over_time, columns=["success_rate", "episode_length", "value_slope"]),
    ),
    "rebuilt-recipes": (REBUILT_RECIPES, comparison),
    "band": ({"": REBUILT._replace(stops=(1, 10))}, band),
}
OTHER_TABLES = {"transfer": transfer, "speed": speed, "tutorial": tutorial.report}


def make_table(name, table):
    """Return the table of README.md that is called `name`; `table` is what `tidy` returns."""
    if name in OTHER_TABLES:
        return OTHER_TABLES[name]()
    groups, show = TABLES[name]
    data = gather(table, groups)
    return show(data) if len(data) else "*Not run yet.*"


def with_tables(text, table):
    """Return a README's text with new tables between <!-- table:NAME --> and <!-- /table -->."""
    return re.sub(
        r"<!-- table:([\w-]+) -->.*?<!-- /table -->",
        lambda mark: f"<!-- table:{mark[1]} -->\n{make_table(mark[1], table)}\n<!-- /table -->",
        text,
        flags=re.DOTALL,
    )


# -------------------------------------------------------------------------------------- figures

STYLE = {
    "MAPPO": {"color": "tab:blue", "marker": "o", "markerfacecolor": "tab:blue"},
    "IPPO": {"color": "tab:orange", "marker": "s", "markerfacecolor": "white", "linestyle": "--"},
}


def draw_runs(data):
    """Draw success rate and steps: a mark for each run, and a line for their mean."""
    lines = data.groupby(["label", "algorithm"], sort=False)
    figure = Figure(figsize=(8, 1 + 0.3 * len(lines)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, column in zip(panels, ("success_rate", "episode_length"), strict=True):
        for place, ((_, algorithm), runs) in enumerate(lines):
            where = place + np.linspace(-0.25, 0.25, len(runs))
            axes.plot(runs[column], where, **STYLE[algorithm] | {"linestyle": "none"}, markersize=4)
            axes.vlines(runs[column].mean(), place - 0.35, place + 0.35, color="black", linewidth=2)
        axes.grid(axis="x", alpha=0.3)
    labels = [
        label if algorithm in label else f"{label}, {algorithm}"
        for label, algorithm in lines.groups
    ]
    panels[0].set_yticks(range(len(lines)), labels)
    panels[0].set(ylim=(len(lines) - 0.5, -0.5), xlabel="success rate", xlim=(-0.03, 1.03))
    panels[1].set_xlabel("steps, 100 for a failed episode")
    return figure


def draw_over_time(data, columns):
    """Draw measurements over iterations: a thin line for each run, a thick one for their mean.

    `columns` are {measurement: (title, limits)}.
    """
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = figure.subplots(1, len(columns))
    for axes, (column, (title, limits)) in zip(panels, columns.items(), strict=True):
        for algorithm, runs in data[column].dropna().groupby("algorithm", sort=False):
            runs = runs.droplevel(["label", "algorithm"]).unstack("seed")
            color, style = STYLE[algorithm]["color"], STYLE[algorithm] | {"markersize": 5}
            axes.plot(runs, color=color, linewidth=0.6, alpha=0.5)
            label = f"{algorithm}, mean of {runs.shape[1]} runs"
            axes.plot(runs.mean(axis=1), **style, linewidth=2.5, label=label)
        axes.set(xlabel="iterations", title=title, ylim=limits)
        axes.grid(axis="y", alpha=0.3)
    panels[0].legend(fontsize="small")
    return figure


rate = (-0.03, 1.03)
tested = {"success_rate": ("success rate in test episodes", rate)}
FIGURES = {
    "twenty": (
        {"": LONG._replace(stops=tuple(range(1, 21)))},
        partial(
            draw_over_time,
            columns={"curve_success_rate": ("success rate in training", rate), **tested},
        ),
    ),
    "long": (
        TABLES["long"][0],
        partial(
            draw_over_time,
            columns={**tested, "episode_reward": ("reward per agent in test episodes", (0, 3.4))},
        ),
    ),
    "transport": (
        TABLES["transport"][0],
        partial(
            draw_over_time,
            columns={**tested, "episode_length": ("steps, 200 for a failed episode", (40, 125))},
        ),
    ),
    **{
        name: (TABLES[name][0], draw_runs)
        for name in ("rewards", "distance", "sharing", "recipes", "teams")
    },
}


def report():
    """Update the tables of README.md and the figures; name the runs that have no row."""
    rows = read_rows()
    table = tidy(rows)
    write_whole(README, with_tables(README.read_text("utf-8"), table))
    for name, (groups, draw) in FIGURES.items():
        data = gather(table, groups)
        if len(data):
            draw(data).savefig(STUDY / f"{name}.png", dpi=120)
    for runs in PLAN:
        missing, wanted = lacking(runs, rows), len(runs.algorithms) * len(runs.seeds)
        if missing:
            what = " # ".join(filter(None, [runs.options, runs.variant])) or "the defaults"
            print(f"{runs.experiment}: {len(missing)} of {wanted} runs are missing ({what})")


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
