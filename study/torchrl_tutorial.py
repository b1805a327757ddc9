"""Does IPPO unlearn the task in TorchRL's own multi-agent PPO tutorial, too? Ten seeds each.

    python study/torchrl_tutorial.py path/to/multiagent_ppo.py

does every run that torchrl_tutorial.csv lacks, two at a time. The tutorial is
`tutorials/sphinx-tutorials/multiagent_ppo.py` in the repository pytorch/rl. Nothing of it is kept
here: each run executes a copy in a temporary folder, in which only the number of iterations, the
flag and the seed are changed, on the CPU with one thread. There is a row for each iteration, which
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

from study import add_rows, read_rows
from tables import TUTORIAL

ITERATIONS = 25  # the tutorial's default of 5 ends before either algorithm has learned the task
SEEDS = range(10)


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
    """Run the tutorial once and return its rows; raise a RuntimeError if it fails."""
    source = Path(path).read_text("utf-8")
    settings = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "multiagent_ppo.py")
        script.write_text(patched(source, algorithm, seed), "utf-8")
        done = subprocess.run(
            [sys.executable, str(script)],
            cwd=folder,
            env=os.environ | settings,
            capture_output=True,
            encoding="utf-8",
        )
    rewards = [line for line in done.stdout.splitlines() if line.startswith("REWARDS ")]
    if done.returncode != 0 or not rewards:
        raise RuntimeError(f"{algorithm}, seed {seed}: {done.stderr.strip()[-2000:]}")
    rewards = [f"{float(reward):.3f}" for reward in rewards[0].split()[1:]]
    return pd.DataFrame(
        {
            "algorithm": algorithm,
            "seed": str(seed),
            "torchrl": version("torchrl"),
            "sha256": hashlib.sha256(source.encode()).hexdigest()[:16],
            "iteration": range(len(rewards)),
            "episode_reward_mean": rewards,
        }
    )


def run_missing(path):
    """Do all runs that have no rows yet, two at a time."""
    rows = read_rows(TUTORIAL)
    done = set(zip(rows["algorithm"], rows["seed"], strict=True))
    wanted = [(algorithm, seed) for seed in SEEDS for algorithm in ("MAPPO", "IPPO")]
    missing = [pair for pair in wanted if (pair[0], str(pair[1])) not in done]
    if not missing:
        print(f"Nothing is missing: {TUTORIAL.name} has all {len(wanted)} runs")
        return
    with ThreadPoolExecutor(2) as pool, tqdm(total=len(missing), desc="tutorial") as progress:
        for future in as_completed([pool.submit(run, path, *pair) for pair in missing]):
            add_rows(future.result(), TUTORIAL)
            progress.update()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", help="the tutorial's multiagent_ppo.py")
    arguments = parser.parse_args()
    if not Path(arguments.path).is_file():
        parser.error(f"path is {arguments.path!r}, but must be the tutorial's file")
    run_missing(arguments.path)
