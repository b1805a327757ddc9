"""What README.md and the script's head tell users to do is what works."""

import re

import torch
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

from conftest import REPOSITORY, SCRIPT

LOWEST = "3.10"
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_the_policy_can_be_used_as_the_readme_shows(mappo):
    """Its lines act as the script's deterministic policy does, also on other observations."""
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if "policy.pt" in block]
    assert len(block.splitlines()) <= 12
    path = repr(str(mappo["folder"] / "policy.pt"))
    lines, count = re.subn(r'"[^"]*/policy\.pt"', path, block)
    assert count == 1
    with_others, count = re.subn(r"^observations = .*$", "", lines, flags=re.MULTILINE)
    assert count == 1
    others = {"observations": mappo["batch"]["agents", "observation"]}
    for code, names in ((lines, {}), (with_others, others)):
        exec(code, names)
        observations, actions = names["observations"], names["actions"]
        assert actions.shape == (*observations.shape[:-1], 2)
        space = mappo["action_spec"].space
        assert (space.low <= actions).all() and (actions <= space.high).all()
        team = TensorDict({"observation": observations}, observations.shape[:-1])
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            td = mappo["policy"](TensorDict({"agents": team}, observations.shape[:-2]))
        torch.testing.assert_close(actions, td["agents", "action"], atol=1e-5, rtol=0)


def test_the_script_names_the_packages_of_requirements_txt():
    """Its head (PEP 723), by which `uv run train_mappo.py` installs them, says the same."""
    text = SCRIPT.read_text(encoding="utf-8")
    head = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", text, re.MULTILINE)[1]
    required = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").split()
    assert sorted(re.findall(r'^#     "(.+)",$', head, re.MULTILINE)) == sorted(required)
    assert f'requires-python = ">={LOWEST}"' in head and f"Python {LOWEST}" in README
