"""What README.md tells its readers: links that exist, options that work, one set of versions."""

import re
import shlex
import sys

import jupytext
import pytest

from cells import SCRIPT

REPOSITORY = SCRIPT.parent
README = (REPOSITORY / "README.md").read_text("utf-8")
OPTIONS = re.findall(r"^\| `(--[^`]*)` \|", README, re.MULTILINE)
OPTIONS += re.findall(r"train_mappo\.py (--[^`\n]*)`", README)


def test_links_and_pictures_exist():
    """Those to places in the project."""
    links = re.findall(r'(?:\]\(|src="|href=")([^)"]+)', README)
    local = [link.partition("#") for link in links if not link.startswith("http")]
    assert len(local) > 5
    assert [path for path, _, _ in local if not (REPOSITORY / path).exists()] == []
    for path, _, heading in local:
        text = (REPOSITORY / path).read_text("utf-8") if heading else ""
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        assert not heading or heading in [one.lower().replace(" ", "-") for one in headings]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_options_are_accepted(options, tmp_path, monkeypatch):
    """Those of the experiments and of the text, each as it stands there."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(options.replace("runs/FOLDER", "runs/mine"))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    names = {"__name__": "__main__", "__file__": str(SCRIPT)}
    for cell in jupytext.read(SCRIPT).cells:
        first = cell.cell_type == "code" and "cfg" not in names  # the imports and Section 1
        if first or cell.metadata.get("id") in ("placeholders", "engineering"):
            exec(compile(cell.source, "cell", "exec"), names)
    given = [word[2:].removeprefix("no-").replace("-", "_") for word in words if word[:2] == "--"]
    for name in given:
        assert getattr(names["cfg"], name) != getattr(names["Config"](), name), name


def test_the_table_of_results_is_the_one_of_the_file():
    """README.md and Section 9 quote the same run."""
    title = r"200 episodes, deterministic policy.*?\n(?=(?:# )?```)"
    [readme] = re.findall(title, README, re.DOTALL)
    [section] = re.findall(title, SCRIPT.read_text("utf-8"), re.DOTALL)
    assert readme == section.replace("# ", "")


def test_versions_are_the_same_everywhere():
    """In requirements.txt and in the head of the file, which uv reads."""
    required = (REPOSITORY / "requirements.txt").read_text("utf-8").split()
    head = SCRIPT.read_text("utf-8").partition("# /// script\n")[2].partition("# ///")[0]
    assert re.findall(r'"(\S+==\S+)"', head) == required
    assert 'requires-python = ">=3.10"' in head and "Python 3.10 to 3.14" in README
