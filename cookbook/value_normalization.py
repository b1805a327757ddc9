"""Value normalization: the value loss on targets of mean 0 and standard deviation 1.

Returns of another scenario may be a hundred times as large, and so is their value loss. `MAPPOLoss`
takes a normalizer that keeps the running mean and standard deviation of the targets, and scales
both the targets and the critic's values in the loss. The critic itself still works in the units of
the reward, so nothing else changes. `RunningValueNorm` weighs all past targets equally.
`PopArtValueNorm(shape=1, beta=0.999)` forgets old ones. Under torchrun, each process normalizes by
what it has seen itself.

The first cell replaces the cells `loss` and `loss_check`, and the second one goes before `loop`.
"""
# ruff: noqa: F821

# %% replaces="loss, loss_check"
from torchrl.modules import RunningValueNorm
from torchrl.objectives.multiagent import MAPPOLoss  # IPPOLoss computes the same

value_norm = RunningValueNorm(shape=1, device=cfg.device)
loss_module = MAPPOLoss(
    policy,
    critic,
    value_norm=value_norm,
    clip_epsilon=cfg.clip_epsilon,
    entropy_coeff=cfg.entropy_eps,
    critic_coeff=cfg.critic_coeff,
    normalize_advantage=cfg.normalize_advantage,
    normalize_advantage_exclude_dims=(-2,),
    loss_critic_type="smooth_l1",
    functional=False,
    log_explained_variance=False,
)
loss_module.set_keys(value=("agents", "state_value"))
optimizer = torch.optim.Adam(loss_module.parameters(), lr=cfg.lr, fused=True)

# %% before="loop"
learner["value_norm"] = value_norm  # so that a resumed run continues with its numbers
