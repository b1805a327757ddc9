"""Sections 5 to 8 of the lesson, with one mistake. Read it; it does not run alone."""


# Cell: collector
policy = copy.deepcopy(untrained_policy)  # this one learns; Section 9 compares the two
collector = Collector(
    env,
    policy,
    device=cfg.device,
    frames_per_batch=batch_frames,
    reset_at_each_iter=True,
    track_traj_ids=False,  # trajectory IDs are not needed here
    auto_register_policy_transforms=False,  # these are for recurrent policies
)
replay_buffer = ReplayBuffer(
    storage=LazyTensorStorage(batch_frames, device=cfg.device),
    sampler=SamplerWithoutReplacement(),
    batch_size=minibatch_frames,
)

first_batch = collector.next()
print("batch:", tuple(first_batch.shape))
print("rewards for three steps, one column per robot:")
for rewards in first_batch["next", "agents", "reward"][0, :3, :, 0].tolist():
    print(*(f"{x:9.4f}" for x in rewards))


# Cell: gae
estimate_advantages = MultiAgentGAE(
    gamma=cfg.gamma, lmbda=cfg.lmbda, value_network=critic, device=cfg.device
)
estimate_advantages.set_keys(reward=("agents", "reward"), value=("agents", "state_value"))


# Cell: loss
loss_module = ClipPPOLoss(
    policy,
    critic,
    clip_epsilon=cfg.clip_epsilon,
    entropy_coeff=cfg.entropy_eps,
    critic_coeff=cfg.critic_coeff,
    normalize_advantage=cfg.normalize_advantage,
    normalize_advantage_exclude_dims=(-2,),
    loss_critic_type="smooth_l1",
    functional=False,  # use the networks themselves; stateless copies are slower
    log_explained_variance=False,  # Section 8 computes it, before the update
)
loss_module.set_keys(value=("agents", "state_value"))
optimizer = torch.optim.Adam(policy.parameters(), lr=cfg.lr, fused=True)


# Cell: setup
algorithm = "MAPPO" if cfg.mappo else "IPPO"
scenario = getattr(cfg.scenario_name, "__name__", cfg.scenario_name)
run_name = f"{algorithm.lower()}-{scenario}-seed{cfg.seed}-{datetime.now():%Y%m%d-%H%M%S-%f}"
folder = Path(cfg.run_folder or f"runs/{run_name}").expanduser()
history = []  # a dictionary of metrics for each iteration
best_policy = copy.deepcopy(policy)
learner = {"policy": policy, "critic": critic, "optimizer": optimizer, "best_policy": best_policy}


# Cell: measures
navigation = scenario == "navigation"
success_key = "success_rate" if navigation else "terminated_rate"
test_key = f"test_{success_key}"


def measure(data):
    """Return the mean reward, success rate, length and collisions of the first episodes in `data`.

    `data` is a TensorDict of shape (environments, steps). Rewards are summed over an episode and
    averaged over agents. A collision is a step in which an agent touches another agent, counted
    per agent. Navigation reports them only if they are penalized.
    """
    done = data["next", "done"].squeeze(-1)  # (environments, steps)
    first = done.cumsum(1) - done.int() == 0  # True up to the first done
    reward = data["next", "agents", "reward"].squeeze(-1).mean(-1)
    success = (data["next", "terminated"].squeeze(-1) & first).any(1)
    means = {
        "episode_reward": (reward * first).sum(1).mean().item(),
        success_key: success.float().mean().item(),
        "episode_length": first.sum(1).float().mean().item(),
    }
    penalty = {"collisions": True, "agent_collision_penalty": -1, **cfg.scenario_options}
    unknown = navigation and not (penalty["collisions"] and penalty["agent_collision_penalty"])
    contact = ("next", "agents", "info", "agent_collisions")
    if contact in data.keys(include_nested=True) and not unknown:
        touches = data[contact].squeeze(-1) != 0
        means["collisions"] = (touches.float().mean(-1) * first).sum(1).mean().item()
    return means


def evaluate(policy):
    """Play `evaluation_episodes` episodes with the deterministic policy and `measure` them."""
    test_env = make_env(cfg.evaluation_episodes, cfg.evaluation_seed)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        return measure(test_env.rollout(cfg.max_steps, policy, break_when_all_done=True))


# Cell: loop
run.resume(cfg, folder, history, learner)  # the engineering cell; without it, these four do nothing
loss_module = run.distribute(loss_module)
inputs = [("agents", "observation"), ("agents", "action"), ("agents", "action_log_prob")]
update_metrics = ["loss_objective", "loss_critic", "loss_entropy"]
update_metrics += ["entropy", "kl_approx", "clip_fraction"]
todo = range(len(history), cfg.n_iters)
progress = tqdm(todo, algorithm, total=cfg.n_iters, initial=len(history), disable=rank > 0)
for iteration in progress:
    start = time.perf_counter()
    env.set_seed(seed_for("simulator", iteration, rank))  # so that each iteration is reproducible
    torch.manual_seed(seed_for("actions and minibatches", iteration, rank))
    if cfg.anneal_lr:
        optimizer.param_groups[0]["lr"] = cfg.lr * (1 - iteration / cfg.n_iters)

    batch = collector.next()  # (num_envs, max_steps)
    estimate_advantages(batch)  # adds "advantage" and "value_target"

    frames = batch.reshape(-1).select(*inputs, "advantage", "value_target")  # (batch_frames,)
    replay_buffer.empty()
    replay_buffer.extend(frames)
    minibatch_losses = []
    for _ in range(cfg.num_epochs):
        for minibatch in replay_buffer:  # (minibatch_frames,)
            losses = loss_module(minibatch)
            loss = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(loss_module.parameters(), cfg.max_grad_norm)
            optimizer.step()
            minibatch_losses.append(losses.detach())

    losses = torch.stack(minibatch_losses).mean(dim=0)
    row = {"iteration": iteration, "frames": (iteration + 1) * cfg.frames_per_batch}
    row |= measure(batch)
    row |= {name: losses[name].item() for name in update_metrics}
    unexplained = frames["advantage"].var() / frames["value_target"].var()
    row["explained_variance"] = 1 - unexplained.item()
    row["advantage_std"] = frames["advantage"].std().item()
    row["seconds"] = time.perf_counter() - start
    if (iteration + 1) % cfg.evaluation_interval == 0:
        row |= {f"test_{key}": value for key, value in evaluate(policy).items()}
        if row[test_key] >= max((old.get(test_key, 0.0) for old in history), default=0.0):
            best_policy.load_state_dict(policy.state_dict())
    history.append(row)
    run.save(history, learner)
    progress.set_postfix({key: round(row[key], 2) for key in ("episode_reward", success_key)})
run.finish()
