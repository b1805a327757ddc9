"""Another simulator: PettingZoo's simple_spread through TorchRL's wrapper, with the same loop.

All that the lesson needs from a simulator is `make_env`: a function that returns a TorchRL
environment of batch size (num_envs,), in which the agents are stacked under "agents". Three agents
have to cover three landmarks without touching. An episode is never terminated, so watch the reward.

First, `pip install pettingzoo==1.27.0 mpe2==1.1.1`. The first cell goes after the cell `config`,
the second one replaces `make_env`, and the third one goes after `measures`. Leave out `video`,
which shows VMAS only. The engineering cell accepts scenarios of VMAS, which happens to have one of
this name, too. For a task that VMAS does not have, make `return` the first line of the function
`check_scenario` in that cell.

It is slow because Python goes from one environment to the next in every step, and three quarters of
that time go into the wrapper, which turns the dictionaries of each one into a TensorDict. VMAS
computes a step of all environments at once.
"""
# ruff: noqa: E402, F821

# %% after="config"
cfg.scenario_name = "simple_spread"
cfg.max_steps, cfg.gamma = 25, 0.95  # as short as in PettingZoo
cfg.frames_per_batch, cfg.minibatch_size, cfg.n_iters = 3000, 300, 30
cfg.num_epochs, cfg.num_cells, cfg.lr = 10, 128, 1e-3
cfg.evaluation_interval, cfg.evaluation_episodes = 10, 100  # fewer frames to wait for

# %% replaces="make_env, video"
from mpe2 import simple_spread_v3
from torchrl.envs import PettingZooWrapper, SerialEnv

warnings.filterwarnings("ignore", "PettingZoo in TorchRL is tested using version")


def seed_for(*purpose):
    """Derive a separate random seed from `cfg.seed` for each purpose."""
    return random.Random(f"{cfg.seed} {purpose}").getrandbits(32)


def make_one():
    """Return one environment, with its agents stacked under "agents"."""
    game = simple_spread_v3.parallel_env(
        N=cfg.n_agents, max_cycles=cfg.max_steps, continuous_actions=True, **cfg.scenario_options
    )
    return PettingZooWrapper(
        game,
        group_map=MarlGroupMapType.ALL_IN_ONE_GROUP,
        use_mask=False,  # all agents act in every step
        done_on_any=True,  # the episode ends for all agents at once
        device=cfg.device,
    )


def make_env(num_envs, seed):
    """Return `num_envs` environments, which take their steps one after the other."""
    simulator = SerialEnv(num_envs, make_one)
    simulator.set_seed(seed)
    return simulator.append_transform(StepCounter(cfg.max_steps))


# %% after="measures"
# The first rollout of Section 2 took random actions.
print(f"episode_reward with random actions: {measure(rollout)['episode_reward']:.1f}")
