"""Play a saved policy in new episodes: how often it succeeds, and a video if you ask for one.

    python cookbook/play_policy.py runs/FOLDER/policy.pt
    python cookbook/play_policy.py runs/FOLDER/best_policy.pt --n-agents 5 --video five.gif

This is a program, not a cell. It plays in VMAS alone, without TorchRL, with the settings from the
file hyperparameters.json beside the policy. For a scenario of your own, put its class into this
file and change the line that begins with `scenario =`.
"""

import argparse
import json
from pathlib import Path

import torch
import vmas
from PIL import Image
from use_policy import Policy

parser = argparse.ArgumentParser(description="Play 200 episodes with a saved policy.")
parser.add_argument("policy", type=Path, help="policy.pt or best_policy.pt of a run")
parser.add_argument("--seed", type=int, default=1, help="random seed for the episodes")
parser.add_argument("--n-agents", type=int, help="team size, if other than in training")
parser.add_argument("--video", type=Path, help="a new .gif file for a video of the first episode")
given = parser.parse_args()
record = given.policy.with_name("hyperparameters.json")
for path in (given.policy, record):
    if not path.is_file():
        parser.error(f"policy is '{given.policy}', but there is no file '{path}'")
if given.video and (given.video.suffix != ".gif" or given.video.exists()):
    parser.error(f"video is '{given.video}', but must be a new file that ends in .gif")
policy, settings = Policy(given.policy), json.loads(record.read_text("utf-8"))
scenario = settings["scenario_name"]  # for a scenario of your own: its class, such as Meet()
known = [*vmas.scenarios, *vmas.mpe_scenarios, *vmas.debug_scenarios]
if isinstance(scenario, str) and scenario not in known:
    parser.error(f"scenario_name is '{scenario}', not one of VMAS. Put its class into this program")
env = vmas.make_env(
    scenario,
    num_envs=200,
    seed=given.seed,
    continuous_actions=not policy.discrete,
    n_agents=given.n_agents or settings["n_agents"],
    **settings["scenario_options"],
)
observations, images = env.reset(), []  # one tensor of shape (num_envs, n_obs) for each robot
separate = policy.weights[0].dim() == 3 and env.n_agents != policy.n_agents
if separate or observations[0].shape[-1] != policy.n_obs:
    parser.error(f"n_agents is {env.n_agents}, but must be {policy.n_agents} for this policy")
ended = torch.zeros(env.num_envs, dtype=torch.bool)
for _ in range(settings["max_steps"]):
    if given.video and not ended[0]:
        images.append(Image.fromarray(env.render("rgb_array", env_index=0)).reduce(2))
    with torch.no_grad():
        actions = policy(torch.stack(observations, dim=1))  # (num_envs, n_agents, ...)
    observations, _, done, _ = env.step(list(actions.unbind(dim=1)))
    ended |= done
print(f"{ended.float().mean():.3f} of {env.num_envs} episodes ended in time")
if images:
    images[0].save(given.video, save_all=True, append_images=images[1:], duration=60, loop=0)
