"""What learners do to the file: add settings and measurements, use a scenario of their own, log."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import matplotlib
import pytest
from PIL import Image

from cells import SLOW, read_cells, run_cells, run_inside, sources, write_copy
from conftest import TINY, contents, options, rows, strange_lines

SEED = re.search(r"^    seed: int = .*$", read_cells()["config"], re.MULTILINE)[0]
APPEND = "    history.append(row)\n"


def adding(*lines):
    """Return an edit that adds fields to Config."""
    return {SEED: "\n    ".join([SEED, *lines])}


def recorded(folder):
    """Return the hyperparameters that a run has recorded."""
    return json.loads((folder / "hyperparameters.json").read_text("utf-8"))


def test_settings_of_ones_own_are_options_and_kept_by_the_run(tmp_path, capfd):
    """Of any kind that JSON knows; what is not given on resuming comes from the run."""
    lines = ["target_kl: float | None = None", "betas: tuple = (0.9, 0.999)", 'how: str = "z"']
    lines += ["layers: list = field(default_factory=lambda: [1, 2])", "momentum: float = 0.8"]
    lines += ["nested: dict = field(default_factory=dict)", "nesterov: bool = False", "k: int = 3"]
    script = write_copy(tmp_path / "train_mappo.py", *SLOW, edits=adding(*lines), gamma=0.5)
    words = ["--betas", "[0.5, 0.9]", "--target-kl", "0.02", "--nesterov", "--momentum", "1"]
    words += ["--layers", "[3]", "--nested", '{"a": [1, null]}', "--how", "mine"]
    run = tmp_path / "run"
    run_inside(*options(run_folder=run), *words, path=script)
    expected = {"betas": [0.5, 0.9], "target_kl": 0.02, "nesterov": True, "momentum": 1, "k": 3}
    expected |= {"layers": [3], "nested": {"a": [1, None]}, "how": "mine", "gamma": 0.5}
    assert recorded(run).items() >= expected.items()
    run_inside("--run-folder", run, "--n-iters", 3, path=script)
    assert recorded(run).items() >= {**expected, "n_iters": 3}.items()
    assert "momentum = 1" in capfd.readouterr().out
    for option, value, sentence in (
        ("--betas", "[0.1, 0.9]", "betas is [0.1, 0.9], but must be [0.5, 0.9]"),
        ("--k", "text", "--k"),
        ("--k", "1.5", "k is 1.5, but must be"),
        ("--nested", "[]", "nested is [], but must be"),
    ):
        with pytest.raises(SystemExit):
            run_inside("--run-folder", run, option, value, path=script)
        assert sentence in capfd.readouterr().err


def test_a_value_that_follows_from_others_is_a_property(tmp_path):
    minibatch = re.search(r"^    minibatch_size: .*\n", read_cells()["config"], re.MULTILINE)[0]
    last = "    @property\n    def num_vmas_envs"
    new = "    @property\n    def minibatch_size(self): return self.frames_per_batch // 6\n\n"
    edits = {minibatch: "", last: new + last}
    script = write_copy(tmp_path / "train_mappo.py", *SLOW, edits=edits)
    words = [word for word in options(n_iters=1) if "minibatch" not in word]
    words += ["--frames-per-batch", "1200", "--run-folder", tmp_path / "run"]
    assert run_inside(*words, path=script)["minibatch_frames"] == 200


def test_a_value_that_json_cannot_hold_is_refused(tmp_path, capfd):
    script = write_copy(tmp_path / "train_mappo.py", *SLOW, edits=adding("own: object = object()"))
    with pytest.raises(SystemExit) as end:
        run_inside(*options(run_folder=tmp_path / "run"), path=script)
    assert end.value.code == 2 and "own is <object" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_measurements_of_ones_own_are_saved(tmp_path):
    """Also if only some rows have them; a tensor with one number will do, but no text."""
    own = "    row['twice'] = torch.tensor(2.0 * iteration)\n"
    own += "    if iteration < 1: row['x'] = 7\n    if iteration == 2: row['y'] = 'text'\n"
    script = write_copy(tmp_path / "train_mappo.py", *SLOW, edits={APPEND: own + APPEND})
    run_inside(*options(run_folder=tmp_path / "run"), path=script)
    with pytest.raises(ValueError, match="could not convert string to float"):
        run_inside("--run-folder", tmp_path / "run", "--n-iters", 3, path=script)
    assert [(row["twice"], row["x"]) for row in rows(tmp_path / "run")] == [
        ("0.0", "7"),
        ("2.0", ""),
    ]


@pytest.mark.parametrize("options_", [{"agent_collision_penalty": 0}, {"collisions": False}])
def test_collisions_are_not_counted_where_they_have_no_price(options_, lean, tmp_path):
    """There, VMAS does not say where they happen: no number is better than a wrong one."""
    words = options(n_iters=1, run_folder=tmp_path / "run", scenario_options=json.dumps(options_))
    run_inside(*words, path=lean)
    assert "collisions" not in rows(tmp_path / "run")[0]


OWN = """
from vmas.scenarios import navigation


class Mine(navigation.Scenario):
    def done(self):
        return self.world.agents[0].state.pos[:, 0] > 0.5
"""


@pytest.mark.parametrize("engineering", [True, False])
def test_a_scenario_of_ones_own_is_trained_and_resumed(engineering, tmp_path, monkeypatch):
    """Defined in a notebook; it ends where it says, and its name names the folder."""
    monkeypatch.chdir(tmp_path)
    cells = sources(*SLOW, *([] if engineering else ["engineering"]), **TINY)
    space = run_cells([*cells[:2], OWN, "cfg.scenario_name = Mine", *cells[2:]])
    [folder] = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("mappo-Mine-seed0-") and len(space["history"]) == 2
    assert space["evaluation"]["trained"]["terminated_rate"] > 0
    if engineering:
        space["cfg"].run_folder, space["cfg"].n_iters = str(folder), 3
        run_cells([read_cells()["setup"], read_cells()["loop"]], space)
        assert len(rows(folder)) == 3 and recorded(folder)["scenario_name"] == "Mine"


def test_a_scenario_of_ones_own_that_was_renamed_is_refused(tmp_path, capsys):
    """A record holds only the name of a class, so it cannot be taken from there."""
    config, run = read_cells()["config"], tmp_path / "run"
    scripts = []
    for name in ("Mine", "Other"):
        own = OWN.replace("Mine", name) + f"\n\ncfg.scenario_name = {name}"
        (tmp_path / name).mkdir()
        script = tmp_path / name / "mine.py"
        scripts.append(write_copy(script, *SLOW, edits={config: f"{config}\n{own}"}))
    run_inside(*options(run_folder=run, n_iters=1), path=scripts[0])
    assert "usage: python mine.py" in help_of(scripts[0], capsys)
    run_inside("--run-folder", run, "--n-iters", 2, path=scripts[0])
    before = contents(run)
    for script, now in ((scripts[1], "Other'>"), (write_copy(tmp_path / "a.py"), "'navigation'")):
        with pytest.raises(SystemExit, match="2"):
            run_inside("--run-folder", run, path=script)
        said = capsys.readouterr().err
        assert f"{now}, but must be 'Mine', as in the run you are resuming" in said
    assert contents(run) == before


def help_of(script, capsys):
    """Return what `--help` prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        run_inside("--help", path=script)
    return capsys.readouterr().out


def read_tensorboard(folder):
    """Return {tag: [(step, value)]} of the event files in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder))
    log.Reload()
    tags = log.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in tags}


def test_tensorboard_gets_every_measurement_once_under_its_iteration(lean, tmp_path, capfd):
    """Also if it is added late, and in a run that is resumed with it."""
    run = tmp_path / "run"
    run_inside(*options(run_folder=run, n_iters=1), path=lean)
    for n_iters in (2, 3):
        words = ("--run-folder", run, "--n-iters", n_iters, "--logger", "tensorboard")
        run_inside(*words, path=lean)
    assert strange_lines(capfd.readouterr().err) == []
    newest = max((path for path in run.rglob("events.*")), key=lambda path: path.stat().st_mtime_ns)
    found, table = read_tensorboard(newest.parent), rows(run)
    assert [row["iteration"] for row in table] == ["0", "1", "2"]
    for name in table[0].keys() - {"iteration"}:
        expected = [(i, pytest.approx(float(r[name]))) for i, r in enumerate(table) if r[name]]
        assert found[name] == expected, name
    assert {step for step, _ in found["test_success_rate"]} == {1}


KEYS = ("episode_reward", "test_success_rate")


@pytest.fixture
def neighbors(mappo, ippo, tmp_path):
    """Return a folder of runs, of which "run" is the one at hand."""
    for name, (space, changes) in {
        "run": (mappo, {}),
        "other-seed": (mappo, {"seed": 1}),
        "longer": (mappo, {"n_iters": 20, "device": "cuda", "logger": "csv"}),
        "ippo": (ippo, {}),
        "discounted": (mappo, {"gamma": 0.5}),
        "larger-team": (mappo, {"n_agents": 5}),
        "damaged-table": (mappo, {}),
        "damaged-settings": (mappo, {}),
        "without-settings": (mappo, {}),
    }.items():
        shutil.copytree(space["folder"], tmp_path / name)
        text = json.dumps({**recorded(tmp_path / name), **changes})
        (tmp_path / name / "hyperparameters.json").write_text(text)
    (tmp_path / "damaged-table" / "metrics.csv").write_text("iteration,frames\n0,x\n")
    (tmp_path / "damaged-settings" / "hyperparameters.json").write_text("no JSON")
    (tmp_path / "without-settings" / "hyperparameters.json").write_text('{"mappo": true}')
    (tmp_path / "link").symlink_to(tmp_path / "run")
    return tmp_path


def test_learning_curves_compare_runs_that_are_alike_each_once(
    neighbors, mappo, monkeypatch, capfd
):
    """A run is alike if it differs at most in seed, algorithm, length, and what only keeps books.

    Damaged neighbors are left out and named. The run may be named in another way.
    """
    monkeypatch.chdir(neighbors / "run")
    for folder in (neighbors / "run", Path(), neighbors / "link"):
        space = run_cells([read_cells()["curves"]], {**mappo, "folder": folder})
        out = capfd.readouterr().out
        for name in ("damaged-table", "damaged-settings", "without-settings"):
            assert name in out
        figure = space["draw_learning_curves"](space["comparable_runs"]())
        for panel, marker, key in zip(figure.axes, ".o", KEYS, strict=True):
            lines = [line for line in panel.lines if line.get_marker() == marker]  # seen alone
            found = sorted((line.get_label(), line.get_linewidth()) for line in lines)
            assert found == [("IPPO", 1), ("MAPPO", 1), ("MAPPO", 1), ("MAPPO", 3)]
            [thick] = [line for line in lines if line.get_linewidth() == 3]
            measured = [(row["frames"], row[key]) for row in mappo["history"] if key in row]
            assert [tuple(point) for point in thick.get_xydata()] == measured
    assert (neighbors / "run" / "learning_curves.png").exists()


def test_runs_with_a_tuple_among_their_settings_are_alike(mappo, tmp_path):
    """JSON knows no tuples, so the other run has recorded a list."""
    for name in ("run", "other"):
        shutil.copytree(mappo["folder"], tmp_path / name)
        text = json.dumps(
            {**recorded(tmp_path / name), "scenario_options": {"viewer_size": [9, 9]}}
        )
        (tmp_path / name / "hyperparameters.json").write_text(text)
    cfg = dataclasses.replace(mappo["cfg"], scenario_options={"viewer_size": (9, 9)})
    names = {**mappo, "cfg": cfg, "folder": tmp_path / "run"}
    assert len(run_cells([read_cells()["curves"]], names)["comparable_runs"]()) == 2


def test_pictures_are_drawn_whatever_the_readers_matplotlibrc_says(mappo, tmp_path):
    """Here it wants LaTeX, which few have; and no figure stays open."""
    with matplotlib.rc_context({"text.usetex": True, "figure.max_open_warning": 1}):
        names = ("arrow_map", "slope", "curves")
        run_cells([read_cells()[name] for name in names], {**mappo, "folder": tmp_path})
    for name in ("arrows.png", "learning_curves.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
    from matplotlib import pyplot

    assert pyplot.get_fignums() == []


def test_a_video_that_cannot_be_rendered_is_left_out_with_its_reason(
    mappo, tmp_path, capfd, monkeypatch
):
    """The renderer's own words are printed: not every failure means that OpenGL is missing."""

    def render(*_, **__):
        raise RuntimeError("no such display")

    monkeypatch.setattr("vmas.simulator.environment.Environment.render", render)
    run_cells([read_cells()["video"]], {**mappo, "folder": tmp_path})
    out = capfd.readouterr().out
    assert "No rollout.gif" in out and "RuntimeError: no such display" in out
    assert not [*tmp_path.iterdir()]
