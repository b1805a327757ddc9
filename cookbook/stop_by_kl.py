"""Stop the epochs by KL: no more passes over a batch once the policy has moved far enough.

Clipping does not force the policy to stay near the one that collected the batch. This measures how
far it has moved, before each epoch and on the whole batch, and skips the epochs that are left once
the KL divergence exceeds `target_kl`. Use it with a learning rate or a number of epochs that is
right for one part of the training and too large for another. A limit that is too tight wastes data,
so compare. For a limit that is recorded and an option of the command line, add a field `target_kl`
to `Config`, and write `cfg.target_kl` here.

The cell goes before the cell `loop`.
"""
# ruff: noqa: F821

# %% before="loop"
target_kl = 0.01


class BufferWithLimit(ReplayBuffer):
    """A replay buffer whose epochs are empty while the policy is too far from the data's."""

    def __iter__(self):
        data = self[:]  # the batch, (batch_frames,)
        with torch.no_grad():
            log_prob = policy.get_dist(data).log_prob(data["agents", "action"])
        log_ratio = log_prob - data["agents", "action_log_prob"]
        kl = (log_ratio.exp() - 1 - log_ratio).mean()  # never negative, as the KL divergence
        if world_size > 1:  # all processes have to stop in the same epoch
            torch.distributed.all_reduce(kl)
            kl /= world_size
        if kl <= target_kl:
            yield from super().__iter__()


replay_buffer = BufferWithLimit(
    storage=LazyTensorStorage(batch_frames, device=cfg.device),
    sampler=SamplerWithoutReplacement(),
    batch_size=minibatch_frames,
)
