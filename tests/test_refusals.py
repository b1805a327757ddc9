"""Bad input is refused before anything is trained: status 2, one clear sentence, nothing made.

Most are refused in this process, because importing torch takes longer than a refusal.
"""

import contextlib
import io
import os
import pickle
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
from torchrl.envs import VmasEnv

from cells import SCRIPT, SLOW, read_cells, run_cells, run_inside, sources, write_copy
from conftest import TINY, contents, load, options

CONFIG = run_cells([read_cells()["imports"], read_cells()["config"]])["cfg"]
NUMBERS = [n for n in CONFIG.__slots__ if type(getattr(CONFIG, n)) in (int, float)]
MAY_BE_ZERO = {"seed", "evaluation_seed", "gamma", "lmbda", "entropy_eps"}
BAD_VALUES = {  # words of the command line: what the sentence must hold
    **{
        (f"--{name.replace('_', '-')}", text): (text,)
        for name in NUMBERS
        for text in ["-1", "nan", "inf", "text", *([] if name in MAY_BE_ZERO else ["0"])]
    },
    ("--n-iters", "1.5"): ("n_iters is 1.5", "whole number"),
    ("--n-iters", "true"): ("n_iters is True", "whole number"),
    ("--lr", "true"): ("lr is True", "a number"),
    ("--lr", "nan"): ("lr is nan", "a number above 0"),
    ("--num-cells", "1000000000000"): ("num_cells is 1000000000000", "billion"),
    ("--seed", str(2**64)): (f"seed is {2**64}", "2**32"),
    ("--gamma", "1.01"): ("gamma is 1.01", "from 0 to 1"),
    ("--clip-epsilon", "1.0"): ("clip_epsilon is 1.0", "above 0 and below 1"),
    ("--minibatch-size", "1"): ("minibatch_size is 1",),
    ("--minibatch-size", "70"): ("minibatch_size is 70", "600"),
    ("--frames-per-batch", "610"): ("frames_per_batch is 610", "max_steps", "20"),
    ("--logger", "tensorbord"): ("logger is 'tensorbord'", "tensorboard", "wandb"),
    ("--logger", "mlflow"): ("logger is 'mlflow'", "pip install mlflow omegaconf"),
    ("--scenario-name", "navigatoin"): ("scenario_name is 'navigatoin'", *VmasEnv.available_envs),
    ("--scenario-name", ""): ("scenario_name is ''", "navigation"),
    ("--scenario-name", "{folder}/evil.py"): ("scenario_name is '{folder}/evil.py'", "navigation"),
    ("--scenario-name", "simple_tag"): ("scenario_name is 'simple_tag'", "single team", "agent_0"),
    ("--scenario-name", "diff_drive"): ("scenario_name is 'diff_drive'", "single team"),
    ("--scenario-name", "balance", "--n-agents", "1"): ("balance", "n_agents = 1"),
    ("--scenario-name", "give_way", "--n-agents", "5"): ("n_agents is 5", "must be 2"),
    ("--n-agents", "24", "--evaluation-episodes", "2"): ("n_agents = 24", "spawn"),
    ("--scenario-options", "[1]"): ("scenario_options is [1]", "dict"),
    ("--scenario-options", '{"lidar_range": NaN}'): ("scenario_options", "nan"),
    ("--scenario-options", "{shared_rew: false}"): ("--scenario-options", "JSON"),
    ("--scenario-options", '{"shared": false}'): ("{'shared': False}", "not used by"),
    ("--scenario-options", '{"n_agents": 5}'): ("scenario_options", "n_agents"),
    ("--scenario-options", '{"num_envs": 5}'): ("scenario_options", "num_envs"),
    ("--scenario-options", '{"terminated_truncated": true}'): ("terminated_truncated",),
    ("--device", "nonsense"): ("device is 'nonsense'", "cpu"),
    ("--device", "cuda:99"): ("device is 'cuda:99'", "cpu", "GPUs found: "),
    ("--run-folder", "{folder}/file"): ("run_folder is '{folder}/file'", "a folder"),
    ("--run-folder", "{folder}/file/below"): ("run_folder is '{folder}/file/below'",),
    ("--run-folder", "{folder}/link"): ("run_folder is '{folder}/link'",),
    ("--run-folder", "{folder}/other"): ("run_folder is '{folder}/other'", "diary.txt"),
    ("--run-folder", "{folder}/old"): ("run_folder is '{folder}/old'", "checkpoint-000000000002"),
    ("--run-folder", "/proc/nowhere"): ("run_folder is '/proc/nowhere'", "written"),
    ("--n-itres", "3"): ("--n-itres 3",),
    ("--n-iter", "3"): ("--n-iter 3",),
    ("--no-mapo",): ("--no-mapo",),
    ("--mappo=yes",): ("--mappo", "yes"),
    ("--lr",): ("--lr",),
    ("runs/mappo",): ("runs/mappo",),
}
CONFLICTS = {  # what is given and differs from the run in the folder "good"
    ("--lr", "0.1"): ("lr is 0.1", "0.0003"),
    ("--seed", "5"): ("seed is 5", "must be 0"),
    ("--no-mappo",): ("mappo is False", "must be True"),
    ("--num-cells", "64"): ("num_cells is 64", "32"),
    ("--n-iters", "1"): ("n_iters is 1", "at least 2"),
    ("--scenario-options", '{"lidar_range": 0.2}'): ("scenario_options", "{}"),
}


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mknod, (str(self.victim),)


# What to do to what the checkpoint holds so that it must be refused.
STRANGERS = {
    **{f"no {n}": lambda x, _, n=n: x.pop(n) for n in ("config", "world_size", "history")},
    **{f"no {n}": lambda x, _, n=n: x.pop(n) for n in ("policy", "optimizer", "best_policy")},
    "history of text": lambda x, _: x.update(history=["text"]),
    "one iteration too few": lambda x, _: x["history"].pop(0),
    "config of a list": lambda x, _: x.update(config=[1]),
    "a trap": lambda x, folder: x.update(more=Trap(folder / "victim")),
    # These are found when the networks are there.
    "unknown weights": lambda x, _: x["critic"].update(unknown=torch.zeros(3)),
    "other optimizer": lambda x, _: x["optimizer"].update(param_groups=[]),
    # These are refused under the names of the settings, as if they had been given.
    "depth is '2'": lambda x, _: x["config"].update(depth="2"),
    "mappo is []": lambda x, _: x["config"].update(mappo=[]),
    "scenario_name is ": lambda x, at: x["config"].update(scenario_name=str(at / "evil.py")),
}
DAMAGED = {  # what is done to the bytes of the checkpoint
    "truncated": lambda whole: whole[: len(whole) // 2],
    "emptied": lambda whole: b"",
    "text": lambda whole: b"text\n",
    "pickled": lambda whole: pickle.dumps({"config": {}}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, lean):
    """Make a folder that holds one good run and all the bad ones."""
    folder = tmp_path_factory.mktemp("refusals")
    run_inside(*options(run_folder=folder / "good"), path=lean)
    (folder / "file").write_text("not a folder")
    (folder / "link").symlink_to(folder / "file" / "nowhere")
    (folder / "evil.py").write_text(f"import os\nos.mknod('{folder}/victim')\n")
    for name, file in (("other", "diary.txt"), ("old", "checkpoint-000000000002.torchrl")):
        (folder / name).mkdir()
        (folder / name / file).write_text("Dear diary")
    for name in [*STRANGERS, *DAMAGED]:
        shutil.copytree(folder / "good", folder / name)
        path, saved = folder / name / "checkpoint.pt", load(folder / "good")
        if name in DAMAGED:
            path.write_bytes(DAMAGED[name](path.read_bytes()))
        else:
            STRANGERS[name](saved, folder)
            torch.save(saved, path)
    return folder


def assert_refused(words, expected, folder, script):
    """Check for status 2, a usage line, one sentence that holds words, and no trace on the disk."""
    words = [word.replace("{folder}", str(folder)) for word in words]
    before, err = contents(folder), io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ending:
        run_inside(*words, path=script)
    usage, sentence = err.getvalue().splitlines()
    assert ending.value.code == 2
    assert usage.startswith("usage: ") and sentence.startswith("train_mappo.py: error: ")
    for word in expected:
        assert word.replace("{folder}", str(folder)) in sentence
    if words[0][2:].replace("-", "_") in NUMBERS:
        assert words[0] in sentence or words[0][2:].replace("-", "_") in sentence
    assert contents(folder) == before


@pytest.mark.parametrize("words", BAD_VALUES, ids=" ".join)
def test_bad_input_is_refused_in_one_sentence(words, folder, lean):
    """It names the option, the value and what would be right."""
    new = [] if "--run-folder" in words else ["--run-folder", "{folder}/new/run"]
    assert_refused([*words, *options_without(words), *new], BAD_VALUES[words], folder, lean)


def options_without(words):
    """Return the tiny options but for those that are among the words."""
    return [word for word in options() if not {word.partition("=")[0]} & {*words}]


@pytest.mark.parametrize("words", CONFLICTS, ids=" ".join)
def test_what_contradicts_the_run_is_refused(words, folder, lean):
    assert_refused([*words, "--run-folder", "{folder}/good"], CONFLICTS[words], folder, lean)


@pytest.mark.parametrize("name", [*STRANGERS, *DAMAGED])
def test_damaged_and_foreign_checkpoints_are_refused(name, folder, lean):
    """No code that they hold is run."""
    place = "{folder}/" + name
    if name in ("unknown weights", "other optimizer"):
        with pytest.raises(ValueError, match="run_folder is "):
            run_inside("--run-folder", folder / name, path=lean)
    else:
        expected = [name if " is " in name else f"'{place}'"]
        assert_refused(["--run-folder", place], expected, folder, lean)


def test_the_trap_is_real(folder):
    torch.load(folder / "a trap" / "checkpoint.pt", weights_only=False)
    assert (folder / "victim").exists()
    (folder / "victim").unlink()


def test_a_place_in_which_no_run_can_begin_is_refused_at_once(lean, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("in the way")
    assert_refused(options(), ["run_folder is '"], tmp_path, lean)


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"frames_per_batch": 610}, "frames_per_batch is 610, but must be a multiple of"),
        ({"n_iters": 1.5}, "n_iters is 1.5, but must be a whole number"),
        ({"lr": "3e-4"}, "lr is '3e-4', but must be a number"),
        ({"mappo": "False"}, "mappo is 'False', but must be "),
        ({"scenario_options": {"shared": 1}}, "not used by"),
    ],
)
def test_a_notebook_gets_the_same_checks_as_a_valueerror(values, sentence, tmp_path):
    with pytest.raises(ValueError) as caught:
        run_cells(sources(*SLOW, **TINY | values, run_folder=str(tmp_path / "run")))
    assert sentence in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_misspelled_setting_is_an_error():
    space = run_cells([read_cells()["imports"], read_cells()["config"]])
    with pytest.raises(AttributeError, match="max_step"):
        space["cfg"].max_step = 5


@pytest.mark.parametrize("mistake", ["super().make_wrold", "1 + 'x'", "int('x')"])
def test_a_mistake_in_ones_own_scenario_keeps_its_traceback(mistake, tmp_path):
    own = "from vmas.scenarios import navigation\n\n\nclass Mine(navigation.Scenario):\n"
    own += f"    def make_world(self, *args, **kwargs):\n        {mistake}\n\n\n"
    edits = {'scenario_name: str | type = "navigation"': "scenario_name: str | type = Mine"}
    edits["@dataclass(slots=True)"] = f"{own}@dataclass(slots=True)"
    script = write_copy(tmp_path / "train_mappo.py", *SLOW, edits=edits)
    with pytest.raises((AttributeError, TypeError, ValueError), match="wrold|str|literal") as error:
        run_inside(*options(run_folder=tmp_path / "run"), path=script)
    assert "make_world" in [entry.name for entry in error.traceback]


def test_help_shows_section_1_and_may_be_cut_off(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run_inside("--help")
    assert end.value.code == 0
    assert read_cells()["config"].partition("\n\ncfg")[0] in capsys.readouterr().out
    command = f"set -o pipefail; {sys.executable} {SCRIPT} --help | head -1"
    cut = subprocess.run(["bash", "-c", command], capture_output=True, encoding="utf-8")
    assert cut.stdout.startswith("usage: ") and cut.stderr == ""


def test_it_cannot_be_imported_by_mistake():
    with pytest.raises(ImportError, match="cannot be imported"):
        runpy.run_path(str(SCRIPT), run_name="train_mappo")
