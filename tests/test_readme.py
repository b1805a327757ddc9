"""What README.md and the script's head tell users to do is what works."""

import re
import shlex

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

from conftest import REPOSITORY, SCRIPT, TINY, options, rows, run_inside

LOWEST = "3.10"
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
LOOP = "\n# %%\nfor function in before_training:"


def block(word):
    """Return the only block of Python that holds a word."""
    [found] = [source for source in BLOCKS if word in source]
    return found


@pytest.fixture(scope="module")
def used(mappo):
    """Run README's lines on the policy of a run; return the names that they define."""
    path = repr(str(mappo["folder"] / "policy.pt"))
    names = {}
    exec(re.sub(r'"runs/FOLDER/policy\.pt"', path, block("class Policy")), names)
    return names


def test_the_policy_can_be_used_as_the_readme_shows(mappo, used):
    """It acts as the script's deterministic policy does."""
    observation = mappo["batch"]["agents", "observation"]
    team = TensorDict({"agents": {"observation": observation}}, observation.shape[:-2])
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        expected = mappo["policy"](team)["agents", "action"]
    torch.testing.assert_close(used["policy"](observation), expected, atol=1e-5, rtol=0)


def test_the_policy_works_for_one_robot_and_for_other_teams(used):
    assert used["action"].shape == (2,) and used["actions"].shape == (5, 2)
    torch.testing.assert_close(used["actions"][0], used["action"])


def test_the_exported_program_acts_like_the_policy(used, mappo, tmp_path):
    """Also when it was saved and loaded, and for other numbers of robots."""
    torch.export.save(used["program"], tmp_path / "policy.pt2")
    program = torch.export.load(tmp_path / "policy.pt2").module()
    observations = mappo["batch"]["agents", "observation"].flatten(0, 2)
    for number in (3, 7):
        seen = observations[:number]
        torch.testing.assert_close(program(seen), used["policy"](seen), atol=1e-6, rtol=0)


def changed(lean, folder, old, new):
    """Return a copy of the script with a piece replaced."""
    text = lean.read_text("utf-8")
    assert text.count(old) == 1
    (folder / "train_mappo.py").write_text(text.replace(old, new), "utf-8")
    return folder / "train_mappo.py"


def test_a_policy_can_be_fine_tuned(mappo, lean, tmp_path):
    """The new run starts from the other one's weights."""
    path = repr(str(mappo["folder"] / "policy.pt"))
    lines = block("policy_network.load_state_dict").replace('"runs/FOLDER/policy.pt"', path)
    heading = "\n# ## 4. Critic"
    script = changed(
        lean,
        tmp_path,
        "\n# %% [markdown]\n# ```\n# mean actions",
        f"\n# %%\n{lines}\n\n# %% [markdown]\n# ```\n# mean actions",
    )
    assert heading in script.read_text("utf-8")
    names = run_inside(*options(run_folder=tmp_path / "run", n_iters=1, lr=1e-12), path=script)
    trained = mappo["policy"].state_dict()
    torch.testing.assert_close(names["untrained_policy"].state_dict(), trained)
    torch.testing.assert_close(names["policy"].state_dict(), trained, atol=1e-6, rtol=0)


def test_the_best_policy_is_kept(lean, tmp_path):
    """By the function that README shows, also over a resumed run."""
    new = f"\n# %%\n{block('def keep_best')}\n{LOOP}"
    script, run = changed(lean, tmp_path, LOOP, new), tmp_path / "run"
    for n_iters in (2, 4):
        names = run_inside(*options(run_folder=run, n_iters=n_iters, lr=3e-3), path=script)
    scores = [float(row["test_success"]) for row in rows(run)]
    best = torch.load(run / "best_policy.pt", weights_only=True)
    names["policy"].load_state_dict(best)
    assert names["evaluate"](names["policy"])["success_rate"] == max(scores)


def test_a_scenario_of_ones_own_is_trained(lean, tmp_path):
    """README's class, in at most 25 lines, in the place where the scenario is named."""
    source = block("class Meet")
    assert len(source.splitlines()) <= 25
    old = re.search(r"^scenario_name = .*$", lean.read_text("utf-8"), re.MULTILINE)[0]
    script = changed(lean, tmp_path, old, source)
    names = run_inside(*options(run_folder=tmp_path / "run"), path=script)
    assert names["scenario"] == "Meet" and len(names["history"]) == TINY["n_iters"]


def test_every_command_is_accepted(lean, tmp_path):
    """The options in the table of experiments, with few iterations of little work."""
    commands = re.findall(r"^\| `(--[^`]*)` \|", README, re.MULTILINE)
    assert len(commands) >= 5
    for number, command in enumerate(commands):
        words = [*shlex.split(command), "--n-iters", "1", "--num-epochs", "1", "--device", "cpu"]
        words += ["--frames-per-batch", "200", "--minibatch-size", "100", "--num-cells", "8"]
        words += [
            "--evaluation-episodes",
            "2",
            "--max-steps",
            "10",
            "--run-folder",
            tmp_path / str(number),
        ]
        run_inside(*words, path=lean)
        assert (tmp_path / str(number) / "evaluation.json").exists()


def test_the_script_names_the_packages_of_requirements_txt():
    """Its head (PEP 723), by which `uv run train_mappo.py` installs them, says the same."""
    text = SCRIPT.read_text(encoding="utf-8")
    head = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", text, re.MULTILINE)[1]
    required = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").split()
    assert sorted(re.findall(r'^#     "(.+)",$', head, re.MULTILINE)) == sorted(required)
    assert f'requires-python = ">={LOWEST}"' in head and f"Python {LOWEST}" in README
