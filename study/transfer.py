"""Do policies that three robots learned work in teams of other sizes?

    python study/transfer.py                         train ten default runs of MAPPO, then evaluate
    python study/transfer.py runs/*/policy.pt        evaluate these; the seed is read beside each

One network serves all robots, so that it fits a team of any size. Each policy plays the 200 test
episodes of train_mappo.py in teams of 2, 3, 4, 5 and 8. Rows that transfer.csv has are kept.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from benchmark import run_script
from study import SCRIPT, add_rows, read_rows
from tables import TRANSFER

TEAMS = [2, 3, 4, 5, 8]
MEASURES = ["success_rate", "episode_reward", "episode_length", "collisions"]
RUNS = Path("runs/transfer")  # where the ten runs are trained, and resumed


def train(seed):
    """Train a default run, unless it is trained; return the path of its policy."""
    folder = RUNS / f"mappo-{seed}"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--seed", str(seed)]
    subprocess.run(
        [*command, "--run-folder", str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    return folder / "policy.pt"


def make_team(n_agents):
    """Return the names of train_mappo.py for a team, from a run that is as short as can be."""
    sizes = ["--frames-per-batch=200", "--minibatch-size=100", "--num-epochs=1", "--n-iters=1"]
    return run_script(f"--n-agents={n_agents}", *sizes, "--evaluation-episodes=200")


def evaluate(names, path):
    """Return the evaluation of a saved policy in the team of `names`."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    names["policy"][0].module[0].load_state_dict(saved["state_dict"])
    return names["evaluate"](names["policy"])


def run_lacking(paths):
    """Evaluate each policy in each team for which transfer.csv has no row."""
    rows = read_rows(TRANSFER)
    have = set(zip(rows.get("n_agents", []), rows["seed"], strict=True))
    for n_agents in tqdm(TEAMS, desc="teams"):
        names = make_team(n_agents)
        for path in tqdm(paths, desc=f"{n_agents} robots", leave=False):
            settings = json.loads(path.with_name("hyperparameters.json").read_text("utf-8"))
            if (str(n_agents), str(settings["seed"])) not in have:
                measured = evaluate(names, path)
                row = {"n_agents": n_agents, "seed": settings["seed"]}
                row |= {name: f"{measured[name]:.4f}" for name in MEASURES}
                add_rows(pd.DataFrame([row]), TRANSFER)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policies", nargs="*", type=Path, help="files policy.pt of default runs")
    arguments = parser.parse_args()
    run_lacking(arguments.policies or [train(seed) for seed in tqdm(range(10), desc="training")])
