"""Every scenario of VMAS is either trained on by its name alone or refused in one line, and football is trained on."""

import io
import re
import runpy
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context

import matplotlib.pyplot as plt
import pytest
from conftest import BAR, SCRIPT, command_line
from torchrl.envs import VmasEnv

# Teams that play against each other, or agents that observe or steer differently from their team mates.
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


def run_by_name(scenario, folder):
    """Run the script in this process; return its exit status, stderr and the names of the files that it left."""
    tiny = [
        "--max-steps=5",
        "--frames-per-batch=20",
        "--minibatch-size=10",
        "--n-iters=1",
        "--evaluation-episodes=2",
    ]
    sys.argv = command_line(folder / scenario, *tiny, f"--scenario-name={scenario}")
    status = 0
    with (
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()) as errors,
        warnings.catch_warnings(),
    ):
        try:
            runpy.run_path(str(SCRIPT))
        except SystemExit as ending:
            status = ending.code
        except Exception as error:
            status = repr(error)
        finally:
            plt.close(
                "all"
            )  # many runs in one process: matplotlib warns of the figures that are left
    return status, errors.getvalue(), {path.name for path in (folder / scenario).glob("*/*")}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """What `run_by_name` returned for each scenario and for a misspelt one; two processes share them out."""
    scenarios = [*VmasEnv.available_envs, "navigaton"]
    folder = tmp_path_factory.mktemp("scenarios")
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        return dict(zip(scenarios, pool.map(run_by_name, scenarios, [folder] * len(scenarios))))


@pytest.mark.parametrize("scenario", sorted({*VmasEnv.available_envs} - UNLIKE))
def test_one_team_of_alike_agents_is_trained(outcome, scenario):
    """The name is all that is needed, whatever VMAS calls the team (in football "agent_blue")."""
    status, errors, files = outcome[scenario]
    assert status == 0, errors
    assert "metrics.csv" in files
    ours = re.sub(
        r"^.*/vmas/.*Warning: .*\n.*\n", "", errors.replace("\r", "\n"), flags=re.MULTILINE
    )  # not VMAS's own
    assert [line for line in ours.splitlines() if line.strip() and not BAR.match(line)] == []


@pytest.mark.parametrize("scenario", sorted(UNLIKE))
def test_unlike_agents_are_refused(outcome, scenario):
    """Nothing is trained; one line names the option to change."""
    status, errors, files = outcome[scenario]
    assert status == 2 and files == set()
    assert errors.count("\n") == 1 and f"--scenario-name {scenario}" in errors


def test_a_misspelt_scenario_is_answered_with_the_known_ones(outcome):
    """One line lists all the scenarios, the most similar name first."""
    status, errors, files = outcome["navigaton"]
    assert status == 2 and errors.count("\n") == 1 and files == set()
    listed = errors.strip().split("give one of ")[1].split(", ")
    assert listed[0] == "navigation" and sorted(listed) == sorted(VmasEnv.available_envs)
