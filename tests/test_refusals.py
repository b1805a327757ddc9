"""Bad input is refused before anything is trained: status 2, one clear sentence, nothing made.

The many refusals share one process, because importing torch takes longer than a refusal; a few are
made again in processes of their own.
"""

import json
import os
import pickle
import shlex
import shutil
from contextlib import suppress

import pytest
import torch
from torchrl.envs import VmasEnv

from cells import read_cells, with_values, without
from conftest import CPU, SCRIPT, TINY, contents, finish, load, options, start

REFUSE_ALL = """
import contextlib, io, json, runpy, sys, warnings

script, cases, answers = sys.argv[1:]
given, found = json.load(open(cases)), []
for words in given:
    sys.argv = [script, *words]
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        try:
            runpy.run_path(script, run_name="__main__")
            status = "not refused"
        except BaseException as end:
            status = end.code if type(end) is SystemExit else repr(end)
    found.append([status, out.getvalue(), err.getvalue()])
json.dump(found, open(answers, "w"))
"""

SECTION_1 = next(cell.source for cell in read_cells() if cell.source.startswith("mappo"))
VALUES: dict = {}
exec("import torch\n" + SECTION_1, VALUES)
NUMBERS = [name for name, value in VALUES.items() if type(value) in (int, float)]
MAY_BE_ZERO = {"seed", "evaluation_seed", "gamma", "lmbda", "entropy_eps"}
GOOD = "{folder}/good"
BAD_OPTIONS = {  # words of the command line: what the sentence must hold
    **{
        (f"--{name.replace('_', '-')}", text): (name, text)
        for name in NUMBERS
        for text in ["-1", "nan", "inf", "text", *([] if name in MAY_BE_ZERO else ["0"])]
    },
    ("--n-iters", "1.5"): ("--n-iters", "1.5"),
    ("--num-cells", "1000000000000"): ("num_cells is 1000000000000", "billion"),
    ("--seed", str(2**64)): (f"seed is {2**64}", "2**32"),
    ("--gamma", "1.01"): ("gamma is 1.01", "from 0 to 1"),
    ("--clip-epsilon", "1.0"): ("clip_epsilon is 1.0", "between 0 and 1"),
    ("--minibatch-size", "1"): ("minibatch_size is 1",),
    ("--minibatch-size", "70"): ("minibatch_size is 70", "600"),
    ("--frames-per-batch", "610"): ("frames_per_batch is 610", "max_steps, 20"),
    ("--scenario-name", "navigatoin"): ("scenario_name is 'navigatoin'", *VmasEnv.available_envs),
    ("--scenario-name", "simple_tag"): ("scenario_name is 'simple_tag'", "one team", "agent_0"),
    ("--scenario-name", "diff_drive"): ("scenario_name is 'diff_drive'", "one team"),
    **{("--n-agents", str(n)): (f"n_agents is {n}", "fewer") for n in (24, 30, 100, 1000)},
    ("--scenario-name", "give_way", "--n-agents", "5"): ("n_agents is 5", "must be 2"),
    ("--scenario-options", "[1]"): ("--scenario-options", "[1]", "JSON"),
    ("--scenario-options", "{shared_rew: false}"): ("--scenario-options", "JSON"),
    ("--scenario-options", '{"shared": false}'): ("{'shared': False}", "not used by the scenario"),
    ("--scenario-options", '{"n_agents": 5}'): ("scenario_options", "n_agents"),
    ("--scenario-options", '{"num_envs": 5}'): ("scenario_options", "num_envs"),
    ("--device", "nonsense"): ("device is 'nonsense'", "cpu"),
    ("--device", "cuda:99"): ("device is 'cuda:99'", "cpu", "GPUs here: "),
    ("--run-folder", "{folder}/file"): ("run_folder is '{folder}/file'",),
    ("--run-folder", "{folder}/file/below"): ("run_folder is '{folder}/file/below'",),
    ("--run-folder", "{folder}/other"): ("run_folder is '{folder}/other'", "diary.txt"),
    ("--run-folder", "/proc/nowhere"): ("run_folder is '/proc/nowhere'", "written"),
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


STRANGERS = {  # what to do to the states in a good checkpoint so that it must be refused
    "policy of another shape": lambda states: shorten(states["policy"]),
    "untrained policy of another shape": lambda states: shorten(states["untrained_policy"]),
    "critic of another shape": lambda states: shorten(states["critic"]),
    "moments of another shape": lambda states: states["optimizer"]["state"][0].update(
        exp_avg=torch.zeros(3)
    ),
    "moments missing": lambda states: states["optimizer"]["state"][0].pop("exp_avg"),
    "moments of no parameter": lambda states: states["optimizer"]["state"].clear(),
    "policy missing": lambda states: states.pop("policy"),
    "weights missing": lambda states: states["policy"].popitem(),
    "weights unknown": lambda states: states["policy"].update(unknown=torch.zeros(3)),
    "history missing": lambda states: states.pop("history"),
    "history empty": lambda states: states["history"].clear(),
    "history text": lambda states: states.update(history="text"),
    "history of text": lambda states: states["history"][0].update(seconds="text"),
    "iteration missing": lambda states: states["history"].pop(0),
    "hyperparameters missing": lambda states: states.pop("hyperparameters"),
    "number as text": lambda states: states["hyperparameters"].update(depth="2"),
    "list for a flag": lambda states: states["hyperparameters"].update(mappo=[]),
    "another network": lambda states: states["hyperparameters"].update(num_cells=16),
    "world size missing": lambda states: states.pop("world_size"),
}
TRAPS = {  # how a file that runs code when it is unpickled is written
    "trap in a zip": torch.save,
    "trap in an old file": lambda states, path: torch.save(
        states, path, _use_new_zipfile_serialization=False
    ),
    "trap in a pickle": lambda states, path: path.write_bytes(pickle.dumps(states)),
}
DAMAGED = {  # what is done to the bytes of a good checkpoint
    "truncated": lambda whole: whole[: len(whole) // 2],
    "emptied": lambda whole: b"",
    "text": lambda whole: b"text\n",
}
NAMED = ["foreign", "tensor"]
CHANGED = {"another network": "num_cells is 32, but must be 16"}
BAD_FOLDERS = {
    ("--run-folder", "{folder}/" + name): (
        CHANGED.get(name, "run_folder is '{folder}/" + name + "'"),
    )
    for name in [*STRANGERS, *TRAPS, *DAMAGED, *NAMED]
}
REFUSALS = BAD_OPTIONS | CONFLICTS | BAD_FOLDERS


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(self.victim))}",)


def in_full(words, folder):
    """The words of a command line in which only the words under test can be wrong."""
    words = [word.replace("{folder}", str(folder)) for word in words]
    if "--run-folder" in words:
        return [*(options() if "/good" not in words[1] else CPU), *words]
    return [*options(n_iters=1, run_folder=folder / "new"), *words]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that holds one good run and all the bad ones."""
    folder = tmp_path_factory.mktemp("refusals")
    finish(start(*options(run_folder=folder / "good")))
    whole = (folder / "good" / "checkpoint.pt").read_bytes()
    (folder / "file").write_text("not a folder")
    for name in ["other", *STRANGERS, *TRAPS, *DAMAGED, *NAMED]:
        (folder / name).mkdir()
    (folder / "other" / "diary.txt").write_text("Dear diary")
    for name, change in STRANGERS.items():
        states = load(folder / "good")
        change(states)
        torch.save(states, folder / name / "checkpoint.pt")
    for name, save in TRAPS.items():
        trap = {"trap": Trap(folder / f"made by {name}")}
        save(trap | load(folder / "good"), folder / name / "checkpoint.pt")
    for name, damage in DAMAGED.items():
        (folder / name / "checkpoint.pt").write_bytes(damage(whole))
    torch.save({"model": torch.zeros(3)}, folder / "foreign" / "checkpoint.pt")
    torch.save(torch.zeros(3), folder / "tensor" / "checkpoint.pt")
    return folder


@pytest.fixture(scope="module")
def refusals(folder, tmp_path_factory):
    """For each case: exit status, stdout and stderr, from one process; and the folder before it."""
    files, before = tmp_path_factory.mktemp("answers"), contents(folder)
    cases = [in_full(words, folder) for words in REFUSALS]
    (files / "cases").write_text(json.dumps(cases))
    finish(start(SCRIPT, files / "cases", files / "answers", program=["-c", REFUSE_ALL]))
    answers = json.loads((files / "answers").read_text())
    return dict(zip(REFUSALS, answers, strict=True)), before


def assert_refused(status, out, err, words, folder):
    """argparse's usage line, one sentence, and nothing on stdout."""
    assert (status, out) == (2, ""), err
    usage, sentence = err.splitlines()
    assert usage.startswith("usage: ") and sentence.startswith("train_mappo.py: error: ")
    for word in words:
        if word in NUMBERS and word not in sentence:
            word = "--" + word.replace("_", "-")  # in argparse's own sentences
        assert word.replace("{folder}", str(folder)).replace("{{}}", "{}") in sentence, sentence


@pytest.mark.parametrize("words", REFUSALS, ids=" ".join)
def test_bad_input_is_refused_in_one_sentence(refusals, folder, words):
    """It names the option, the value and what would be right."""
    assert_refused(*refusals[0][words], REFUSALS[words], folder)


def test_refusals_leave_no_trace(refusals, folder):
    """No folder was made, no file was changed, and no code from a stranger's checkpoint has run."""
    assert contents(folder) == refusals[1]
    assert not (folder / "new").exists()


@pytest.mark.parametrize("name", TRAPS)
def test_the_traps_are_real(folder, refusals, name):
    """A script that loads any object would have run their code."""
    victim = folder / f"made by {name}"
    assert not victim.exists()
    with suppress(Exception):
        torch.load(folder / name / "checkpoint.pt", weights_only=False)
    assert victim.exists()
    victim.unlink()


def test_refusals_of_a_process_of_its_own(folder, tmp_path):
    """The same as above, with all that a user's own process may add; also with `python -O`."""
    traps = ("--run-folder", "{folder}/trap in a pickle")
    cases = [("--lr", "text"), ("--n-agents", "30"), traps]
    processes = [
        start(*in_full(words, folder), program=[flag, SCRIPT])
        for words, flag in zip(cases, ("-O", "-B", "-O"), strict=True)
    ]
    for process, words in zip(processes, cases, strict=True):
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
    """Cell A, run where there is no command line."""
    top, section_1, names, cell_a = without("B", "C")[:4]
    space = {"__name__": "notebook"}
    with pytest.raises(ValueError, match="must be|not used") as caught:
        for source in (top, with_values(section_1, **{**TINY, **changed}), names, cell_a):
            exec(compile(source, "cell", "exec"), space)
    assert sentence in str(caught.value)


def test_a_notebook_may_not_change_a_run_that_it_goes_on_with(folder):
    """Cell B refuses what contradicts the run, by name; nothing is changed."""
    good = shutil.copytree(folder / "good", folder.parent / "copy", dirs_exist_ok=True)
    before = contents(good)
    sources = without("A", "C")
    values = {**TINY, "run_folder": str(good), "lr": 0.1}
    space = {"__name__": "notebook"}
    with pytest.raises(ValueError, match=r"lr is 0.1, but must be 0.0003"):
        for source in [sources[0], with_values(sources[1], **values), *sources[2:]]:
            exec(compile(source, "cell", "exec"), space)
    assert contents(good) == before
