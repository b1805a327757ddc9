"""The cells called "Open the black box": what they compute by hand is what TorchRL computes."""

import pytest

from cells import assigned_names, read_cells, run_cells, with_values, without
from conftest import TINY, options, run_inside

# How the library's part is made, what is changed in it, and the name of the box that must notice.
CHANGES = {
    "gamma": ("MultiAgentGAE(gamma=gamma,", "MultiAgentGAE(gamma=0.9,", "gae_by_hand"),
    "lambda": ("lmbda=lmbda, value_network", "lmbda=0.8, value_network", "gae_by_hand"),
    "clip_epsilon": ("clip_epsilon=clip_epsilon,", "clip_epsilon=0.1,", "loss_by_hand"),
    "critic_coeff": ("critic_coeff=critic_coeff,", "critic_coeff=1.0,", "loss_by_hand"),
    "entropy": ("entropy_coeff=entropy_eps,", "entropy_coeff=-entropy_eps,", "loss_by_hand"),
    "dimensions": ("exclude_dims=(-2,),", "exclude_dims=(),", "loss_by_hand"),
    "value loss": ('loss_critic_type="smooth_l1",', 'loss_critic_type="l2",', "loss_by_hand"),
    "flag": ("centralized=mappo,", "centralized=not mappo,", "critic_by_hand"),
    # Mistakes in the code by hand must be noticed as well.
    "done for terminated": ("gamma * (1 - terminated)", "gamma * (1 - done)", "gae_by_hand"),
    "terminated for done": ("(1 - done[:, step])", "(1 - terminated[:, step])", "gae_by_hand"),
    "target": ("advantage + value\n", "advantage + next_value\n", "gae_by_hand"),
    "no min": ("torch.minimum(ratio", "torch.maximum(ratio", "loss_by_hand"),
    "wrong axis": ("std = advantage.std(0)", "std = advantage.std()", "loss_by_hand"),
    "no log": ("log_ratio.exp()", "(1 + log_ratio)", "loss_by_hand"),
    "last tanh": ("if layer < depth:", "if layer <= depth:", "critic_by_hand"),
}


def up_to_the_loss():
    """Return the sources of all cells from Section 1 to 7 but the engineering and the probe."""
    cells = [cell for cell in read_cells() if cell.part in ("", *"1234567")]
    return [c.source for c in cells if "explained_variance_of" not in assigned_names(c.source)]


@pytest.mark.parametrize("mappo", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
def test_the_boxes_agree_with_the_library(mappo, shared, normalized, capsys):
    values = {"mappo": mappo, "normalize_advantage": normalized}
    values |= {"share_parameters_policy": shared, "share_parameters_critic": shared}
    run_cells(up_to_the_loss(), **{**TINY, **values, "n_agents": 4, "depth": 3})
    assert "loss_objective" in capsys.readouterr().out


@pytest.mark.parametrize("mappo", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_each_box_notices_a_change(change, mappo):
    """The file ends in an error at the box, and not before."""
    old, new, box = CHANGES[change]
    sources = up_to_the_loss()
    assert sum(source.count(old) for source in sources) == 1, f"{old} must occur once"
    space = {"__name__": "notebook"}
    for source in sources:
        at_the_box = box in assigned_names(source)
        if "mappo" in assigned_names(source):
            source = with_values(source, **{**TINY, "mappo": mappo})
        code = compile(source.replace(old, new), "cell", "exec")
        if at_the_box:
            with pytest.raises((AssertionError, RuntimeError)):
                exec(code, space)
            return
        exec(code, space)


def training(space):
    """Return the measurements of a run, but for the time."""
    return [{**row, "seconds": 0} for row in space["history"]]


@pytest.mark.parametrize("algorithm", ["mappo", "ippo"])
def test_the_method_alone_and_without_boxes_gives_the_same_numbers(algorithm, tmp_path, request):
    """As with the engineering, and with every cell that shows or proves something."""
    whole = request.getfixturevalue(algorithm)
    cells = without("engineering", "9", "10", boxes=False, defining=["explained_variance_of"])
    values = {**TINY, "mappo": algorithm == "mappo", "run_folder": str(tmp_path / "alone")}
    alone = run_cells(cells, **values)
    assert training(alone) == training(whole)
    assert not (tmp_path / "alone").exists()


def test_separate_networks_and_fewer_epochs_agree_as_well(tmp_path):
    words = options(run_folder=tmp_path / "run", num_epochs=1, n_agents=2)
    script = run_inside(*words, "--no-share-parameters-policy", "--no-share-parameters-critic")
    assert len(script["history"]) == 2
