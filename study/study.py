"""The runs behind study/README.md: many trainings by train_mappo.py, and one row of results for each.

    python study/study.py run                 do every run that study/results.csv lacks, two at a time
    python study/study.py run flag payment    only the runs of these experiments
    python study/study.py report              print the tables of study/README.md, draw its figures

Each run is `python train_mappo.py` with the options in its row, in a process and a folder of its
own, on the CPU with one thread. What is known of it comes from the files it leaves: evaluation.json,
and metrics.csv for the curves. A stopped study goes on where it was.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

STUDY = Path(__file__).resolve().parent
SCRIPT = STUDY.parent / "train_mappo.py"
RESULTS = STUDY / "results.csv"

# What a row of results.csv says: which run it is, its evaluation, and its curves, a value for each
# iteration, separated by spaces.
RUN = ["experiment", "options", "algorithm", "seed"]
EVALUATION = ["success_rate", "episode_reward", "episode_length", "collisions"]
CURVES = ["success_rate", "episode_reward", "explained_variance", "advantage_std", "kl_approx"]
COLUMNS = [*RUN, *EVALUATION, "training_seconds", *(f"curve_{name}" for name in CURVES)]

EIGHT = "--n-agents 8 --lr 1e-3 --anneal-lr --num-epochs 10 --num-cells 128"
SHARED = """--scenario-options '{"collisions": false, "shared_rew": true}'"""
OWN = """--scenario-options '{"collisions": false, "shared_rew": false}'"""


def pairs(options, seeds=range(10), algorithms=("MAPPO", "IPPO")):
    """Runs with the same options: (options, algorithm, seed), both algorithms of a seed side by side."""
    return [(options, algorithm, seed) for seed in seeds for algorithm in algorithms]


EPOCHS = ["--num-epochs 5", "--num-epochs 10"]
EXPERIMENTS = {
    "flag": pairs(""),
    "fresh": pairs("", seeds=range(10, 20)),
    "payment": [*pairs(f"{EIGHT} {SHARED}"), *pairs(f"{EIGHT} {OWN}")],
    "epochs": [run for options in EPOCHS for run in pairs(options)],
}


def train(experiment, options, algorithm, seed):
    """Do one run and return its row, a dictionary with the keys COLUMNS; a RuntimeError if it fails."""
    flag = "--mappo" if algorithm == "MAPPO" else "--no-mappo"
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "run")
        given = ["--device", "cpu", flag, "--seed", str(seed), "--run-folder", str(folder)]
        process = subprocess.run(
            [sys.executable, str(SCRIPT), *split(options), *given],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if process.returncode:
            reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"{options} {given}: exit status {process.returncode}: {reason}")
        trained = json.loads((folder / "evaluation.json").read_text())["trained"]
        with open(folder / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    row = {"experiment": experiment, "options": options, "algorithm": algorithm, "seed": seed}
    for name in EVALUATION:
        row[name] = f"{trained[name]:.4f}" if name in trained else ""
    row["training_seconds"] = f"{sum(float(line['seconds']) for line in rows):.1f}"
    for name in CURVES:
        row[f"curve_{name}"] = " ".join(f"{float(line.get(name) or 'nan'):.4f}" for line in rows)
    return row


def split(options):
    """The words of an option string, quotes as in a shell."""
    import shlex

    return shlex.split(options)


def read_results():
    """The rows of results.csv, as a list of dictionaries of strings; none if there is no such file."""
    if not RESULTS.exists():
        return []
    with open(RESULTS, newline="") as file:
        return list(csv.DictReader(file))


def add_result(row):
    """Add a row to results.csv, after the names of the columns if it is the first."""
    with open(RESULTS, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def run_missing(names):
    """Do the runs of these experiments that results.csv lacks; return how many of them failed."""
    done = {tuple(row[column] for column in RUN[1:]) for row in read_results()}
    missing = {}
    for name in names:
        for options, algorithm, seed in EXPERIMENTS[name]:
            if (options, algorithm, str(seed)) not in done:
                missing.setdefault((options, algorithm, seed), name)
    failed = 0
    pool = ThreadPoolExecutor(max_workers=2)  # each thread waits for one process
    try:
        started = [pool.submit(train, missing[run], *run) for run in missing]
        for number, future in enumerate(as_completed(started), start=1):
            try:
                row = future.result()
            except RuntimeError as error:
                failed += 1
                print(error, file=sys.stderr, flush=True)
            else:
                add_result(row)
                text = ", ".join(str(row[name]) for name in [*RUN, *EVALUATION])
                print(f"{number} of {len(missing)}: {text}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # on Ctrl-C, do not begin the runs that still wait
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("experiments", nargs="*", default=list(EXPERIMENTS))
    arguments = parser.parse_args()
    sys.exit(1 if run_missing(arguments.experiments) else 0)
