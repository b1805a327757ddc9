"""Discrete actions: each robot chooses among nine pushes instead of setting a continuous force.

Use it when your actuators are switches, or to compare with methods that need discrete actions. VMAS
offers three pushes per axis (none, backward, forward), so a robot that moves in a plane has nine
actions. The policy is then a categorical distribution, whose entropy has a closed form.

The first cell replaces the cell `make_env`, to which it adds a single line. The second one replaces
`policy`, and the third one goes after `loss_by_hand`. Lines that end in "# new" differ from the
lesson.
"""
# ruff: noqa: F821


# %% replaces="make_env"
def seed_for(*purpose):
    """Derive a separate random seed from `cfg.seed` for each purpose."""
    return random.Random(f"{cfg.seed} {purpose}").getrandbits(32)


def make_env(num_envs, seed):
    """Build a batch of `num_envs` copies of the scenario; `seed` sets their initial states."""
    own_class = isinstance(cfg.scenario_name, type)
    simulator = VmasEnv(
        cfg.scenario_name() if own_class else cfg.scenario_name,
        num_envs=num_envs,
        seed=seed,
        device=cfg.device,
        continuous_actions=False,  # new
        group_map=MarlGroupMapType.ALL_IN_ONE_GROUP,
        scenario_kwargs={"n_agents": cfg.n_agents, **cfg.scenario_options},
    )
    return simulator.append_transform(StepCounter(cfg.max_steps))


# %% replaces="policy"
torch.manual_seed(seed_for("policy"))
network_options = {
    "n_agents": n_agents,
    "n_agent_inputs": n_obs,
    "depth": cfg.depth,
    "num_cells": cfg.num_cells,
}
policy_options = {
    **network_options,
    "n_agent_outputs": action_spec.space.n,  # a logit for each action  # new
    "centralized": False,
    "share_params": cfg.share_parameters_policy,
}
policy_network = MultiAgentMLP(**policy_options, device=cfg.device)
orthogonal_init(policy_network, final_gain=0.01)
policy_module = TensorDictModule(
    nn.Sequential(policy_network),  # new
    in_keys=[("agents", "observation")],
    out_keys=[("agents", "logits")],  # new
)
action_bounds = {}  # new
untrained_policy = ProbabilisticActor(
    policy_module,
    in_keys=[("agents", "logits")],  # new
    out_keys=[("agents", "action")],
    spec=env.full_action_spec_unbatched,
    distribution_class=torch.distributions.Categorical,  # new
    return_log_prob=True,
    default_interaction_type=ExplorationType.RANDOM,
)
logits = untrained_policy(first_step.clone())["agents", "logits"]  # (num_envs, n_agents, actions)
print("probabilities of the actions in one environment, one row per robot:")
for row in logits[0].softmax(-1).tolist():
    print(*(f"{x:6.3f}" for x in row))


# %% after="loss_by_hand"
def entropy_by_hand(pi):
    """Return the mean entropy of the categorical distribution `pi`, minus the mean of log p."""
    return -(pi.probs * pi.logits).sum(-1).mean()  # its logits are normalized to log p
