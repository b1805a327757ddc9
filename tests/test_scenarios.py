"""Every scenario of VMAS is either trained on by its name alone or refused in one sentence."""

import io
import json
import re
import runpy
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context

import matplotlib.pyplot as plt
import pytest
from torchrl.envs import VmasEnv

from conftest import BAR, options

# Teams that play against each other, or agents that observe or steer differently from their team
# mates.
UNLIKE = {
    "simple_adversary",
    "simple_crypto",
    "simple_push",
    "simple_speaker_listener",
    "simple_tag",
    "simple_world_comm",
    "diff_drive",
    "kinematic_bicycle",
}


def run_by_name(scenario, folder, script):
    """Run the script in this process; return its exit status, stderr, files and evaluation."""
    tiny = {"max_steps": 5, "frames_per_batch": 20, "minibatch_size": 10, "n_iters": 1}
    run = folder / scenario
    words = options(**tiny, evaluation_episodes=2, scenario_name=scenario, run_folder=run)
    sys.argv = [str(script), *words]
    status, err = 0, io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(err), warnings.catch_warnings():
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as ending:
            status = ending.code
        except Exception as error:
            status = repr(error)
        finally:
            plt.close("all")  # many runs in one process: matplotlib warns of figures that are left
    files = {path.name for path in run.glob("*")}
    found = run / "evaluation.json"
    return status, err.getvalue(), files, json.loads(found.read_text()) if found.exists() else {}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, lean):
    """Return what `run_by_name` returned for each scenario; two processes share them out."""
    scenarios = list(VmasEnv.available_envs)
    folder = tmp_path_factory.mktemp("scenarios")
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        found = list(
            pool.map(run_by_name, scenarios, [folder] * len(scenarios), [lean] * len(scenarios))
        )
    return dict(zip(scenarios, found, strict=True))


@pytest.mark.parametrize("scenario", sorted({*VmasEnv.available_envs} - UNLIKE))
def test_one_team_of_similar_agents_is_trained(outcome, scenario):
    """The name is all that is needed, whatever VMAS calls the team (in football "agent_blue").

    Ends before the time limit are called successes in navigation only.
    """
    status, err, files, evaluation = outcome[scenario]
    assert status == 0, err
    assert {"metrics.csv", "policy.pt", "evaluation.json"} <= files
    success = "success_rate" if scenario == "navigation" else "terminated_rate"
    assert success in evaluation["trained"]
    own = r"^.*/vmas/.*Warning: .*\n.*\n"  # VMAS's own warnings of what it does itself
    ours = re.sub(own, "", err.replace("\r", "\n"), flags=re.MULTILINE)
    assert [line for line in ours.splitlines() if line.strip() and not BAR.match(line)] == []


@pytest.mark.parametrize("scenario", sorted(UNLIKE))
def test_unlike_agents_are_refused(outcome, scenario):
    """Nothing is trained; one sentence names the option to change."""
    status, err, files, _ = outcome[scenario]
    assert status == 2 and files == set()
    assert f"scenario_name is '{scenario}', but must be one with a single team" in err
