"""Every scenario of VMAS is either trained on by its name alone or refused in one sentence."""

import pytest
from torchrl.envs import VmasEnv

from cells import BY_HAND, SLOW, run_inside, write_copy
from conftest import options

# Teams that play against each other, or agents that observe or steer differently from their team
# mates.
UNLIKE = {"simple_adversary", "simple_crypto", "simple_push", "simple_speaker_listener"}
UNLIKE |= {"simple_tag", "simple_world_comm", "diff_drive", "kinematic_bicycle"}
TINIEST = {"max_steps": 5, "frames_per_batch": 20, "minibatch_size": 10, "n_iters": 1}
TINIEST |= {"num_epochs": 1, "evaluation_episodes": 2}  # and no evaluation


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Return a copy of the file that ends after the training."""
    left_out = (*SLOW, *BY_HAND, "evaluation", "files")
    return write_copy(tmp_path_factory.mktemp("short") / "train_mappo.py", *left_out)


@pytest.mark.parametrize("scenario", sorted({*VmasEnv.available_envs} - UNLIKE))
def test_one_team_of_similar_agents_is_trained(scenario, script, tmp_path):
    """The name and the team's size are all that is needed, whatever VMAS calls the team.

    Ends before the time limit are called successes in navigation only.
    """
    words = options(**TINIEST, scenario_name=scenario, run_folder=tmp_path / "run")
    try:
        space = run_inside(*words, path=script)
    except SystemExit:  # a team of fixed size, which the sentence names
        size = VmasEnv(scenario, num_envs=1).n_agents
        space = run_inside(*words, f"--n-agents={size}", path=script)
    [row] = space["history"]
    success = "success_rate" if scenario == "navigation" else "terminated_rate"
    assert {success, "episode_reward", "episode_length"} <= row.keys()
    assert (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("scenario", sorted(UNLIKE))
def test_unlike_agents_are_refused(scenario, script, tmp_path, capsys):
    """Nothing is trained; one sentence names the option to change."""
    words = options(**TINIEST, scenario_name=scenario, run_folder=tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        run_inside(*words, path=script)
    assert end.value.code == 2 and not (tmp_path / "run").exists()
    *_, sentence = capsys.readouterr().err.splitlines()
    assert f"scenario_name is '{scenario}', but must be a scenario with a single team" in sentence
