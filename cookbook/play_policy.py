"""Play a saved policy in new episodes, in VMAS alone: how often it succeeds, and a video.

    python cookbook/play_policy.py runs/FOLDER/policy.pt
    python cookbook/play_policy.py runs/FOLDER/best_policy.pt --seed 7 --n-agents 5

The settings come from hyperparameters.json beside the policy, and the video goes there, too. This
is a program, not a cell. For a scenario of your own, put its class into this file, and `Meet()`, for
example, in the place of `settings["scenario_name"]` in the call of `make_env`.
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
given = parser.parse_args()
record = given.policy.with_name("hyperparameters.json")
for path in (given.policy, record):
    if not path.is_file():
        parser.error(f"policy is '{given.policy}', but {path} does not exist")
policy = Policy(given.policy)
settings = json.loads(record.read_text("utf-8"))
env = vmas.make_env(
    settings["scenario_name"],
    num_envs=200,
    seed=given.seed,
    continuous_actions=not policy.discrete,
    n_agents=given.n_agents or settings["n_agents"],
    **settings["scenario_options"],
)
observations, images = env.reset(), []  # one tensor of shape (num_envs, n_obs) for each robot
ended = torch.zeros(env.num_envs, dtype=torch.bool)
for _ in range(settings["max_steps"]):
    if not ended[0]:  # the video shows the first environment
        images.append(Image.fromarray(env.render("rgb_array", env_index=0)).reduce(2))
    with torch.no_grad():
        actions = policy(torch.stack(observations, dim=1))  # (num_envs, n_agents, ...)
    observations, _, done, _ = env.step(list(actions.unbind(dim=1)))
    ended |= done
video = given.policy.with_name(f"{given.policy.stem}-seed{given.seed}.gif")
images[0].save(video, save_all=True, append_images=images[1:], duration=60, loop=0)
print(f"{ended.float().mean():.3f} of 200 episodes ended in time. Video of the first: {video}")
