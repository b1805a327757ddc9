"""Does TorchRL's own multi-agent PPO tutorial forget, too? Ten seeds of both flags.

    python study/tutorial.py run path/to/multiagent_ppo.py    do every run that tutorial.csv lacks
    python study/tutorial.py report                           print the table of study/README.md

The tutorial is `tutorials/sphinx-tutorials/multiagent_ppo.py` in the repository pytorch/rl. Nothing
of it is kept here: each run executes a copy in a temporary folder, in which only the number of
iterations, the flag and the seed are changed, on the CPU with one thread. A row of tutorial.csv
names the file by its SHA-256 and holds the tutorial's own `episode_reward_mean_list`.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from tqdm import tqdm

ROWS = Path(__file__).resolve().parent / "tutorial.csv"
ITERATIONS = 25  # the tutorial's default of 5 ends before either algorithm has learned the task
SHOWN = [1, 5, 10, 12, 15, 20, 25]  # iterations in the table
SEEDS = range(10)
KEY = ["algorithm", "seed"]


def read_rows():
    """Return the table of all runs so far, with the columns of tutorial.csv."""
    columns = [*KEY, "torchrl", "sha256", "episode_reward_mean"]
    return pd.read_csv(ROWS) if ROWS.exists() else pd.DataFrame(columns=columns)


def add_row(row):
    """Add a row; the file is replaced as a whole, so a kill loses no earlier row."""
    table = pd.concat([read_rows(), pd.DataFrame([row])]) if ROWS.exists() else pd.DataFrame([row])
    new = ROWS.with_suffix(".new")
    table.sort_values(KEY, ascending=[False, True]).to_csv(new, index=False)
    os.replace(new, ROWS)


def patched(source, algorithm, seed, iterations=ITERATIONS):
    """Return the tutorial's text with another flag, seed and number of iterations.

    Raises a ValueError if the text does not hold exactly one of the lines to be changed.
    """
    changes = {
        "\nn_iters = 5 ": f"\nn_iters = {iterations} ",
        "\nmappo = True ": f"\nmappo = {algorithm == 'MAPPO'} ",
        "\ntorch.manual_seed(0)\n": f"\ntorch.manual_seed({seed})\n",
        "\n    scenario=scenario_name,\n": f"\n    scenario=scenario_name,\n    seed={seed},\n",
    }
    for old, new in changes.items():
        if source.count(old) != 1:
            raise ValueError(f"the tutorial has changed: it must hold {old.strip()!r} once")
        source = source.replace(old, new)
    return source + "\nprint('REWARDS', *episode_reward_mean_list)\n"


def run(path, algorithm, seed):
    """Run the tutorial once and return its row; raise a RuntimeError if it fails."""
    source = Path(path).read_text("utf-8")
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "tutorial.py")
        script.write_text(patched(source, algorithm, seed), "utf-8")
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "MPLBACKEND": "agg",
            "CUDA_VISIBLE_DEVICES": "",
        }
        done = subprocess.run(
            [sys.executable, str(script)],
            cwd=folder,
            env=environment,
            capture_output=True,
            encoding="utf-8",
        )
    rewards = [line for line in done.stdout.splitlines() if line.startswith("REWARDS ")]
    if done.returncode != 0 or not rewards:
        raise RuntimeError(f"{algorithm}, seed {seed}: {done.stderr.strip()[-2000:]}")
    curve = " ".join(f"{float(reward):.3f}" for reward in rewards[0].split()[1:])
    return {
        "algorithm": algorithm,
        "seed": seed,
        "torchrl": version("torchrl"),
        "sha256": hashlib.sha256(source.encode()).hexdigest()[:16],
        "episode_reward_mean": curve,
    }


def run_missing(path):
    """Do all runs that have no row yet, two at a time."""
    done = set(read_rows()[KEY].itertuples(index=False, name=None))
    wanted = [(algorithm, seed) for seed in SEEDS for algorithm in ("IPPO", "MAPPO")]
    missing = [pair for pair in wanted if pair not in done]
    if not missing:
        print(f"Nothing is missing: {ROWS.name} has all {len(wanted)} runs")
        return
    with ThreadPoolExecutor(2) as pool, tqdm(total=len(missing), desc="tutorial") as progress:
        for future in as_completed([pool.submit(run, path, *pair) for pair in missing]):
            add_row(future.result())
            progress.update()


def curves():
    """Return the rewards as a table: a row for each algorithm and seed, a column an iteration."""
    table = read_rows().set_index(KEY)["episode_reward_mean"]
    found = table.str.split(expand=True).astype(float)
    found.columns = range(1, found.shape[1] + 1)
    return found


def report():
    """Return the table of study/README.md: mean reward and, in brackets, the lowest run."""
    groups = curves()[SHOWN].groupby("algorithm", sort=False)
    means, lowest, runs = groups.mean(), groups.min(), groups.size()
    lines = ["| after | " + " | ".join(f"{number}" for number in SHOWN) + " |"]
    lines.append("|---" * (len(SHOWN) + 1) + "|")
    for algorithm in runs.index:
        cells = [
            f"{means.loc[algorithm, n]:.2f} (lowest {lowest.loc[algorithm, n]:.2f})" for n in SHOWN
        ]
        lines.append(f"| {algorithm}, {runs[algorithm]} runs | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("path", nargs="?", help="the tutorial's multiagent_ppo.py")
    arguments = parser.parse_args()
    if arguments.command == "run":
        if arguments.path is None or not Path(arguments.path).is_file():
            parser.error(f"path is {arguments.path!r}, but must be the tutorial's file")
        run_missing(arguments.path)
    else:
        print(report())
