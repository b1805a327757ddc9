"""The runs behind study/README.md: many trainings by train_mappo.py, a row for each iteration.

    python study/study.py run                   do all runs that results.csv lacks, two at a time
    python study/study.py run defaults moving   only the runs of these experiments
    python study/study.py report                update the tables and the figures of README.md

A run is a process of its own, in a temporary folder, on the CPU with one thread. Its rows come from
the metrics.csv that it leaves. A study that was stopped or killed goes on with the runs it lacks.
"""

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from tqdm import tqdm

import tables
from tables import ARCHIVE, KEY, RESULTS, STUDY

sys.path.append(str(STUDY.parent / "cookbook"))
from paste import COOKBOOK, paste, split  # noqa: E402

SCRIPT = STUDY.parent / "train_mappo.py"
VARIANTS = STUDY / "variants.py"
README = STUDY / "README.md"


# ------------------------------------------------------------------------------------- the plan


class Experiment(NamedTuple):
    """Runs of train_mappo.py: its options, a variant of the lesson ("a + b"), and the seeds."""

    name: str
    options: str = ""
    variant: str = ""
    algorithms: Sequence[str] = ("MAPPO", "IPPO")
    seeds: Sequence[int] = range(10)

    def runs(self):
        """Return KEY for each of its runs, as text."""
        pairs = [(algorithm, str(seed)) for seed in self.seeds for algorithm in self.algorithms]
        return [(self.name, self.options, self.variant, *pair) for pair in pairs]


FIFTEEN, TWENTY, THIRTY = "--n-iters 15", "--n-iters 20", "--n-iters 30"
ALWAYS = "--evaluation-interval 1"
INDIVIDUAL = """--scenario-options '{"shared_rew": false}'"""
CLOSE = "--max-steps 150 --frames-per-batch 9000 --minibatch-size 600 --scenario-options "
CLOSE += """'{"collisions": false, "world_spawning_x": 0.5, "world_spawning_y": 0.5}'"""
CONTACTS = """--scenario-options '{"agent_collision_penalty": -10}'"""
SLOPES = "slopes"
IPPO = ["IPPO"]
EIGHT = "--n-agents 8 --lr 1e-3 --anneal-lr --num-epochs 10 --num-cells 128 --scenario-options "
EIGHT += """'{"collisions": false}'"""
SMALL = "--anneal-lr --lmbda 0.8 --num-cells 64 --gamma 0.95"
LARGE = "--lr 2e-3 --frames-per-batch 12000 --minibatch-size 1200 --n-iters 12"
RECIPES = {  # tested once, at the end
    "quick": f"{SMALL} --num-epochs 5 --lr 5e-3 --minibatch-size 600 --n-iters 11",
    "thorough": f"{SMALL} --num-epochs 8 {LARGE}",
}

PLAN = [
    Experiment("defaults", f"{TWENTY} {ALWAYS}", SLOPES),
    Experiment("individual", f"{FIFTEEN} {INDIVIDUAL}", SLOPES),
    Experiment("near", f"--n-iters 12 {ALWAYS}", SLOPES, IPPO),  # the defaults, with near_slope
    # The correlation of the distances that the robots have left, changed on purpose.
    Experiment("moving", TWENTY, f"goals that move on + {SLOPES}"),
    Experiment("equal", TWENTY, f"equal distances + {SLOPES}"),
    Experiment("turns", f"{TWENTY} {CLOSE}", f"taking turns + {SLOPES}"),
    Experiment("close", f"{TWENTY} {CLOSE}", SLOPES),
    # What keeps IPPO from unlearning, and what only delays it?
    Experiment("gamma", f"{TWENTY} --gamma 0.9", SLOPES),
    Experiment("gamma-lambda", f"{TWENTY} --gamma 0.9 --lmbda 0", SLOPES),
    Experiment("one-number", TWENTY, f"others' distance + {SLOPES}", IPPO),
    Experiment("bootstrapped", TWENTY, f"arrivals bootstrapped + {SLOPES}", IPPO),
    Experiment("lambda", f"{TWENTY} --lmbda 1", SLOPES),
    Experiment("lambda-0.99", f"{TWENTY} --lmbda 0.99", SLOPES),
    Experiment("two-critics", FIFTEEN, f"two critics + {SLOPES}"),
    Experiment("value-norm", THIRTY, f"value_normalization + {SLOPES}", IPPO),
    # The defaults again, on seeds that nobody had seen while the defaults were chosen.
    Experiment("fresh", f"{TWENTY} {ALWAYS}", SLOPES, seeds=range(10, 20)),
    Experiment("quick", f"{RECIPES['quick']} --evaluation-interval 11"),
    Experiment("thorough", f"{RECIPES['thorough']} --evaluation-interval 12"),
    Experiment("eight", EIGHT),
    Experiment("separate", "--no-share-parameters-policy"),
    # Agent IDs for MAPPO's critic. The predictions are in cookbook/predictions.md.
    Experiment("agent-ids", FIFTEEN, f"agent_ids + {SLOPES}", ["MAPPO"]),
    Experiment("contacts", f"{FIFTEEN} {CONTACTS}", SLOPES, ["MAPPO"]),
    Experiment("contacts-agent-ids", f"{FIFTEEN} {CONTACTS}", f"agent_ids + {SLOPES}", ["MAPPO"]),
    Experiment("ten-epochs", "--n-iters 50 --num-epochs 10", SLOPES),
]


# -------------------------------------------------------------------------------------- running


def recipe(name):
    """Return the text of a recipe such as "agent_ids", or of the variant with this title.

    Raises a ValueError if there is neither.
    """
    path = COOKBOOK / f"{name}.py"
    if path.exists():
        return path.read_text("utf-8")
    start = f"# %% {name} before="
    for cell in split(VARIANTS.read_text("utf-8")):
        if cell.startswith(start):
            return "\n" + cell.replace(start, "# %% before=")
    raise ValueError(f"there is no variant {name!r}")


def with_variant(source, variant):
    """Return train_mappo.py up to its training loop, with the cells of `variant` ("a + b") in it.

    Raises a ValueError if there is no such variant, or no cell with an id that it names.
    """
    cells = split(source)
    ids = [cell.partition("\n")[0] for cell in cells]
    cells = cells[: ids.index('# %% id="loop"') + 1]
    text = "".join(cell for cell in cells if not cell.startswith('# %% id="probe"'))
    for name in filter(None, variant.split(" + ")):
        text = paste(text, recipe(name))
    return text


def git_blob(content):
    """Return the first digits of the id under which Git keeps this content of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()[:12]


def train(experiment, options, variant, algorithm, seed, threads=1):
    """Do one run and return its rows as a table; raise a RuntimeError if it fails."""
    source = SCRIPT.read_bytes()
    with tempfile.TemporaryDirectory() as parent:
        script, folder = Path(parent, SCRIPT.name), Path(parent, "run")
        script.write_text(with_variant(source.decode(), variant), "utf-8")
        command = ["nice", "-n", "10", sys.executable, str(script), *shlex.split(options)]
        command += ["--mappo" if algorithm == "MAPPO" else "--no-mappo", "--seed", seed]
        done = subprocess.run(
            [*command, "--device", "cpu", "--run-folder", str(folder)],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            encoding="utf-8",
        )
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no message"]
            raise RuntimeError(f"{experiment}, {algorithm}, seed {seed}: {said[-1]}")
        rows = pd.read_csv(folder / "metrics.csv", dtype={"iteration": str, "frames": str})
    rows.columns = rows.columns.str.replace("terminated_rate", "success_rate")
    for name in rows.select_dtypes("number"):
        rows[name] = [f"{x:.5g}" if x == x else "" for x in rows[name]]
    key = [experiment, options, variant, algorithm, seed, git_blob(source)]
    for place, (name, value) in enumerate(zip([*KEY, "script"], key, strict=True)):
        rows.insert(place, name, value)
    return rows


def read_rows(path):
    """Return the table in a .csv as text; an empty one with the columns KEY if there is no file."""
    if not path.exists():
        return pd.DataFrame(columns=KEY)
    return pd.read_csv(path, dtype=str, keep_default_na=False)


WRITING = threading.Lock()


def write_whole(path, text):
    """Replace a file as a whole: a kill at any moment leaves the old one or the new one."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, "utf-8")
    os.replace(new, path)


def add_rows(rows, path):
    """Add the rows of a run to the table in a .csv."""
    with WRITING:
        table = pd.concat([read_rows(path), rows]) if path.exists() else rows
        write_whole(path, table.to_csv(index=False, lineterminator="\n"))


def lacking(experiment, rows):
    """Return KEY for each run of an experiment that has no rows."""
    have = set(rows[KEY].itertuples(index=False, name=None))
    return [key for key in experiment.runs() if key not in have]


def run_lacking(names):
    """Do the runs of these experiments that have no rows, in this order; return how many failed."""
    rows, failed, plan = read_rows(RESULTS), 0, {experiment.name: experiment for experiment in PLAN}
    keys = [key for name in names for key in lacking(plan[name], rows)]
    if not keys:
        print(f"Nothing is missing: {RESULTS.name} has all runs of {', '.join(names)}")
        return 0
    pool = ThreadPoolExecutor(2)  # each thread waits for a process
    futures = [pool.submit(lambda *key: add_rows(train(*key), RESULTS), *key) for key in keys]
    try:
        for future in tqdm(as_completed(futures), total=len(keys), desc="runs"):
            if future.exception() is not None:
                failed += 1
                tqdm.write(str(future.exception()), file=sys.stderr)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, do not begin those that still wait
    return failed


def report():
    """Update the tables of README.md and its figures; name the runs that have no rows."""
    results, archive = tables.read(RESULTS), tables.read(ARCHIVE)
    write_whole(README, tables.with_tables(README.read_text("utf-8"), results, archive))
    for name, (labels, columns) in tables.FIGURES.items():
        if set(labels.values()) <= set(results["experiment"]):
            tables.draw(results, labels, columns).savefig(STUDY / f"{name}.png", dpi=120)
    rows = read_rows(RESULTS)
    for experiment in PLAN:
        missing, wanted = len(lacking(experiment, rows)), len(experiment.runs())
        if missing:
            print(f"{experiment.name}: {missing} of {wanted} runs are missing")


if __name__ == "__main__":
    names = [experiment.name for experiment in PLAN]
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
