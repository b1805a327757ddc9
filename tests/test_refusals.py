"""Bad input is refused before anything is trained: status 2, one clear sentence, nothing made.

The many refusals share one process, because importing torch takes longer than a refusal; a few are
made again in processes of their own.
"""

import copy
import json
import os
import pickle
import shlex
import shutil
import warnings
import zipfile
from contextlib import suppress

import pytest
import torch
from torchrl.checkpoint import Checkpoint, CheckpointRotation
from torchrl.envs import VmasEnv

from cells import cell_that_defines, read_cells, run_cells, without
from conftest import (
    CPU,
    PROGRAMS,
    TINY,
    State,
    contents,
    finish,
    load,
    options,
    run_inside,
    start,
)

VALUES: dict = {}
exec("import torch\n" + cell_that_defines("mappo"), VALUES)
NUMBERS = [name for name, value in VALUES.items() if type(value) in (int, float)]
MAY_BE_ZERO = {"seed", "evaluation_seed", "gamma", "lmbda", "entropy_eps"}
GOOD = "{folder}/good"
BAD_OPTIONS = {  # words of the command line: what the sentence must hold
    **{
        (f"--{name.replace('_', '-')}", text): (name, text)
        for name in NUMBERS
        for text in ["-1", "nan", "inf", "text", *([] if name in MAY_BE_ZERO else ["0"])]
    },
    ("--n-iters", "1.5"): ("n_iters is 1.5", "whole number"),
    ("--n-iters", "true"): ("--n-iters", "true"),
    ("--num-cells", "1000000000000"): ("num_cells is 1000000000000", "billion"),
    ("--seed", str(2**64)): (f"seed is {2**64}", "2**32"),
    ("--gamma", "1.01"): ("gamma is 1.01", "from 0 to 1"),
    ("--clip-epsilon", "1.0"): ("clip_epsilon is 1.0", "between 0 and 1"),
    ("--minibatch-size", "1"): ("minibatch_size is 1",),
    ("--minibatch-size", "70"): ("minibatch_size is 70", "600"),
    ("--frames-per-batch", "610"): ("frames_per_batch is 610", "max_steps, 20"),
    ("--logger", "tensorbord"): ("logger is 'tensorbord'", "tensorboard", "wandb"),
    ("--logger", "mlflow"): ("logger is 'mlflow'", "pip install mlflow"),
    ("--scenario-name", "navigatoin"): ("scenario_name is 'navigatoin'", *VmasEnv.available_envs),
    ("--scenario-name", "simple_tag"): ("scenario_name is 'simple_tag'", "single team", "agent_0"),
    ("--scenario-name", "diff_drive"): ("scenario_name is 'diff_drive'", "single team"),
    **{("--n-agents", str(n)): (f"n_agents is {n}", "fewer") for n in (24,)},
    ("--scenario-name", "give_way", "--n-agents", "5"): ("n_agents is 5", "must be 2"),
    ("--scenario-options", "[1]"): ("scenario_options is [1]", "a dictionary"),
    ("--scenario-options", '{"lidar_range": NaN}'): ("scenario_options", "nan"),
    ("--scenario-options", "{shared_rew: false}"): ("--scenario-options", "JSON"),
    ("--scenario-options", '{"shared": false}'): ("{'shared': False}", "not used by the scenario"),
    ("--scenario-options", '{"n_agents": 5}'): ("scenario_options", "n_agents"),
    ("--scenario-options", '{"num_envs": 5}'): ("scenario_options", "num_envs"),
    ("--device", "nonsense"): ("device is 'nonsense'", "cpu"),
    ("--device", "cuda:99"): ("device is 'cuda:99'", "cpu", "GPUs found: "),
    ("--run-folder", "{folder}/file"): ("run_folder is '{folder}/file'",),
    ("--run-folder", "{folder}/file/below"): ("run_folder is '{folder}/file/below'",),
    ("--run-folder", "{folder}/other"): ("run_folder is '{folder}/other'", "diary.txt"),
    ("--run-folder", "/proc/nowhere"): ("run_folder is '/proc/nowhere'", "writable"),
    ("--n-itres", "3"): ("--n-itres 3",),
    ("--n-iter", "3"): ("--n-iter 3",),
    ("--no-mapo",): ("--no-mapo",),
    ("--mappo=yes",): ("--mappo", "yes"),
    ("--lr",): ("--lr",),
    ("runs/mappo",): ("runs/mappo",),
}
CONFLICTS = {
    ("--run-folder", GOOD, "--lr", "0.1"): ("lr is 0.1", "0.0003"),
    ("--run-folder", GOOD, "--seed", "5"): ("seed is 5", "must be 0"),
    ("--run-folder", GOOD, "--no-mappo"): ("mappo is False", "must be True"),
    ("--run-folder", GOOD, "--num-cells", "64"): ("num_cells is 64", "32"),
    ("--run-folder", GOOD, "--n-iters", "1"): ("n_iters is 1", "at least 2"),
    ("--run-folder", GOOD, "--scenario-options", '{"collisions": true}'): (
        "scenario_options",
        "{{}}",
    ),
}


def shorten(tensors):
    name = next(iter(tensors))
    tensors[name] = tensors[name][:-1]


# What to do to the hyperparameters and the components of a good run so that it must be refused.
STRANGERS = {
    "policy of another shape": lambda record, parts: shorten(parts["policy"]),
    "optimizer of another network": lambda record, parts: parts["optimizer"].update(
        param_groups=[]
    ),
    "policy missing": lambda record, parts: parts.pop("policy"),
    "weights unknown": lambda record, parts: parts["policy"].update(unknown=torch.zeros(3)),
    "history missing": lambda record, parts: parts.pop("history"),
    "history text": lambda record, parts: parts.update(history="text"),
    "history of text": lambda record, parts: parts.update(history=["text"]),
    "iteration missing": lambda record, parts: parts["history"].pop(0),
    "world size missing": lambda record, parts: record.pop("world_size"),
    "record empty": lambda record, parts: record.clear(),
}
CHANGED = {  # values that are refused under their own names, as if they had been given
    "number as text": (lambda record: record.update(depth="2"), "depth is '2'", "whole number"),
    "list for a flag": (lambda record: record.update(mappo=[]), "mappo is []", "True or False"),
    "another network": (lambda record: record.update(num_cells=16), "num_cells is 32", "16"),
}
DAMAGED = {  # what is done to the bytes of the checkpoints, or of the record
    "truncated": ("checkpoint-*", lambda whole: whole[: len(whole) // 2]),
    "emptied": ("checkpoint-*", lambda whole: b""),
    "bits flipped": ("checkpoint-*", lambda whole: whole.replace(b"iteration", b"iteratiom")),
    "text": ("checkpoint-*", lambda whole: b"text\n"),
    "record truncated": ("hyperparameters.json", lambda whole: whole[: len(whole) // 2]),
    "record of a list": ("hyperparameters.json", lambda whole: b"[1, 2]"),
    "record of bytes": ("hyperparameters.json", lambda whole: b"\xff\x00"),
}
TRAPS = ["other.pickle", "state.pt", "state.tdc", "data.pkl"]  # files that can run code when loaded
NAMED = ["of the former version", "without a record"]
BAD_FOLDERS = {
    ("--run-folder", "{folder}/" + name): ("run_folder is '{folder}/" + name + "'",)
    for name in [*STRANGERS, *DAMAGED, *[f"trap in {name}" for name in TRAPS], *NAMED]
} | {("--run-folder", "{folder}/" + name): tuple(CHANGED[name][1:]) for name in CHANGED}
LATE = {  # found when the networks are loaded, after some sections have printed their results
    ("--run-folder", "{folder}/" + name)
    for name in STRANGERS
    if any(word in name for word in ("policy", "critic", "optimizer", "weights"))
}
REFUSALS = BAD_OPTIONS | CONFLICTS | BAD_FOLDERS


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(self.victim))}",)


def save_parts(place, record, parts):
    """Write a run's folder from its hyperparameters and the components of its checkpoint."""
    place.mkdir()
    (place / "hyperparameters.json").write_text(json.dumps(record))
    (place / "metrics.csv").write_text("")
    history = {"history": parts.pop("history")} if "history" in parts else {}
    states = {name: State(state) for name, state in parts.items()}
    Checkpoint(format="archive", **history, **states).save(
        place / "checkpoint-000000000002.torchrl"
    )


def set_a_trap(place, name, victim):
    """Add a file to the policy's part of each checkpoint that runs code when it is loaded.

    Where the name is that of a payload which TorchRL prefers, it would be loaded as the policy.
    """
    for path in place.glob("checkpoint-*"):
        with zipfile.ZipFile(path) as archive:
            files = {member: archive.read(member) for member in archive.namelist()}
        [schema] = [member for member in files if member.endswith("-policy/state.json")]
        part = schema.removesuffix("state.json")
        inside = part + ("state/" if name == "other.pickle" else "") + name
        files[inside] = pickle.dumps(Trap(victim))
        if name == "other.pickle":  # tensordict reads this beside a tensor class
            meta = json.loads(files[part + "state/meta.json"])
            meta["_type"] = "<class 'tensordict.tensorclass.NonTensorData'>"
            files[part + "state/meta.json"] = json.dumps(meta).encode()
        manifest = json.loads(files["manifest.json"])
        manifest["components"]["policy"]["files"].append(inside.removeprefix(part))
        files["manifest.json"] = json.dumps(manifest).encode()
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in files.items():
                archive.writestr(member, content)


def in_full(words, folder):
    """The words of a command line in which only the words under test can be wrong."""
    words = [word.replace("{folder}", str(folder)) for word in words]
    if "--run-folder" in words:
        return [*(options() if "/good" not in words[1] else CPU), *words]
    return [*options(n_iters=1, run_folder=folder / "new"), *words]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, lean):
    """Make a folder that holds one good run and all the bad ones."""
    folder = tmp_path_factory.mktemp("refusals")
    good = folder / "good"
    run_inside(*options(run_folder=good), path=lean)
    record = json.loads((good / "hyperparameters.json").read_text())
    (folder / "file").write_text("not a folder")
    (folder / "other").mkdir()
    (folder / "other" / "diary.txt").write_text("Dear diary")
    for name, change in STRANGERS.items():
        strange, parts = copy.deepcopy(record), load(good)
        change(strange, parts)
        save_parts(folder / name, strange, parts)
    for name, (change, *_) in CHANGED.items():
        strange = copy.deepcopy(record)
        change(strange)
        save_parts(folder / name, strange, load(good))
    for name, (files, damage) in DAMAGED.items():
        shutil.copytree(good, folder / name)
        for path in (folder / name).glob(files):
            path.write_bytes(damage(path.read_bytes()))
    for name in TRAPS:
        shutil.copytree(good, folder / f"trap in {name}")
        set_a_trap(folder / f"trap in {name}", name, folder / f"made by {name}")
    shutil.copytree(good, folder / "without a record")
    (folder / "without a record" / "hyperparameters.json").unlink()
    shutil.copytree(good, folder / "of the former version")
    for path in (folder / "of the former version").glob("checkpoint-*"):
        path.rename(path.with_name("checkpoint.pt"))
    return folder


@pytest.fixture(scope="module")
def refusals(folder, lean, tmp_path_factory):
    """For each case: exit status, stdout and stderr, from one process; and the folder before it."""
    files, before = tmp_path_factory.mktemp("answers"), contents(folder)
    cases = [in_full(words, folder) for words in REFUSALS]
    (files / "cases").write_text(json.dumps(cases))
    words = (lean, files / "cases", files / "answers")
    finish(start(*words, program=[PROGRAMS / "refuse_all.py"]))
    answers = json.loads((files / "answers").read_text())
    return dict(zip(REFUSALS, answers, strict=True)), before


def assert_refused(status, out, err, words, folder, late=False):
    """Check for argparse's usage line and one sentence; and nothing on stdout, if it is early."""
    assert status == 2 and (out == "" or late), err
    usage, sentence = err.splitlines()
    assert usage.startswith("usage: ") and sentence.startswith("train_mappo.py: error: ")
    for word in words:
        if word in NUMBERS and word not in sentence:
            word = "--" + word.replace("_", "-")  # in argparse's own sentences
        assert word.replace("{folder}", str(folder)).replace("{{}}", "{}") in sentence, sentence


@pytest.mark.parametrize("words", REFUSALS, ids=" ".join)
def test_bad_input_is_refused_in_one_sentence(refusals, folder, words):
    """It names the option, the value and what would be right."""
    assert_refused(*refusals[0][words], REFUSALS[words], folder, words in LATE)


def test_refusals_leave_no_trace(refusals, folder):
    """No folder was made, no file was changed, and no code from a stranger's checkpoint has run."""
    assert contents(folder) == refusals[1]
    assert not (folder / "new").exists()


@pytest.mark.parametrize("name", ["other.pickle", "state.pt"])
def test_the_traps_are_real(folder, refusals, name):
    """Loaded without care, what they add to the archive does run code."""
    victim = folder / f"made by {name}"
    assert not victim.exists()
    newest = CheckpointRotation(folder / f"trap in {name}", keep_last=2).latest()
    careless = {"tensor_load_kwargs": {"weights_only": False}}
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Checkpoint(policy=State()).load(newest, **careless)
    assert victim.exists()
    victim.unlink()


def test_a_refusal_of_a_process_of_its_own(folder, lean):
    """The same as above, with all that a user's own process may add."""
    words = ("--run-folder", "{folder}/trap in state.pt")
    process = start(*in_full(words, folder), program=[lean])
    assert_refused(2, *finish(process, 2), REFUSALS[words], folder)


@pytest.mark.parametrize(
    "changed, sentence",
    [
        ({"frames_per_batch": 610}, "frames_per_batch is 610, but must be a multiple of max_steps"),
        ({"n_iters": 1.5}, "n_iters is 1.5, but must be a whole number"),
        ({"lr": "3e-4"}, "lr is '3e-4', but must be a number"),
        ({"mappo": "yes"}, "mappo is 'yes', but must be True or False"),
        ({"scenario_options": {"shared": 1}}, "not used by the scenario"),
    ],
)
def test_a_notebook_gets_the_same_checks_as_a_valueerror(changed, sentence):
    """The engineering cell, run where there is no command line."""
    cells = read_cells()
    engineering = [cell.part for cell in cells].index("engineering")
    sources = [cell.source for cell in cells[: engineering + 1]]
    with pytest.raises(ValueError, match="must be|not used") as caught:
        run_cells(sources, **{**TINY, **changed})
    assert sentence in str(caught.value)


def test_a_notebook_may_not_change_a_run_that_it_resumes(folder):
    """What contradicts the run is refused, by name; nothing is changed."""
    good = shutil.copytree(folder / "good", folder.parent / "copy")
    before = contents(good)
    with pytest.raises(ValueError, match=r"lr is 0.1, but must be 0.0003"):
        run_cells(without(boxes=False), **{**TINY, "run_folder": str(good), "lr": 0.1})
    assert contents(good) == before
