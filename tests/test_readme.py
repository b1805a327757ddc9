"""What README.md tells users to type is what runs: its two commands, and its lines that load a policy."""

import re

import torch
from conftest import REPOSITORY
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_ci_runs_the_commands_of_the_readme():
    """README.md is the only place that holds them: one command to install and train, one to install and test."""
    [section] = [
        part for part in re.split(r"^#+ ", README, flags=re.MULTILINE) if part.startswith("Start\n")
    ]
    [block] = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    train, test = block.splitlines()
    assert "requirements.txt" in train and "train_mappo.py" in train
    assert "tests/requirements.txt" in test and "pytest" in test
    runner = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in runner
    assert not re.search("train_mappo|pytest|pip install", runner)


def test_the_policy_can_be_used_as_the_readme_shows(mappo):
    """Its lines act as the script's deterministic policy does, also on observations other than their own."""
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if "policy.pt" in block]
    assert len(block.splitlines()) <= 12
    lines, count = re.subn(
        r'"[^"]*/policy\.pt"', repr(str(mappo["run_folder"] / "policy.pt")), block
    )
    assert count == 1
    with_others, count = re.subn(r"^observations = .*$", "", lines, flags=re.MULTILINE)
    assert count == 1
    for code, names in (
        (lines, {}),
        (with_others, {"observations": mappo["batch"]["agents", "observation"]}),
    ):
        exec(code, names)
        observations, actions = names["observations"], names["actions"]
        assert (
            actions.shape == (*observations.shape[:-1], 2)
            and actions.shape[-2] == mappo["n_agents"]
        )
        space = mappo["action_spec"].space
        assert (space.low <= actions).all() and (actions <= space.high).all()
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            team = TensorDict({"observation": observations}, observations.shape[:-1])
            expected = mappo["policy"](TensorDict({"agents": team}, observations.shape[:-2]))[
                "agents", "action"
            ]
        torch.testing.assert_close(actions, expected, atol=1e-5, rtol=0)
