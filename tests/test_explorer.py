"""teaching/explore.html in headless Chromium: its numbers, its switches, its layout."""

import json
import re
import runpy
import shutil

import pytest
import torch
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.actions.pointer_input import PointerInput
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from vmas import make_env

from cells import SCRIPT

TEACHING = SCRIPT.parent / "teaching"
PAGE = TEACHING / "explore.html"
MAKER = runpy.run_path(str(TEACHING / "make_explorer.py"))
NAMES = [f"{algorithm}-{iterations}" for algorithm in ("mappo", "ippo") for iterations in (10, 15)]
CRITICS = {name: MAKER["load"](*name.split("-"))[1] for name in NAMES}
LASTING = 0.99 * (1 - 0.9) / (1 - 0.99 * 0.9)  # gamma (1 - lmbda) / (1 - gamma lmbda)
SHIFT = torch.zeros(2, 18)  # what a step along x, and one along y, adds to an observation
SHIFT[[0, 0, 1, 1], [0, 4, 1, 5]] = 1.0

BROWSER = next(
    filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), ""
)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs Chromium or Chrome, and chromedriver, on the PATH"
)
OPTIONS = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
OPTIONS += " disable-component-update disable-sync"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Return a browser; all tests share it."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in OPTIONS.split():
        options.add_argument(f"--{option}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(params=[(1280, 800), (390, 844)], ids=["desktop", "phone"])
def page(browser, request):
    """Return the browser with the page just opened; the console must stay empty."""
    width, height = request.param
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(PAGE.as_uri())
    settle(browser)
    yield browser
    assert browser.get_log("browser") == []


def settle(page):
    """Wait until the page has drawn everything."""
    page.execute_async_script(
        "const done = arguments[0];"
        "(function check() { waiting ? requestAnimationFrame(check) : done(); })();"
    )


def find(page, selector):
    """Return the first element that the CSS selector finds."""
    return page.find_element(By.CSS_SELECTOR, selector)


def scene(page):
    """Return the robots as a tensor of shape (robots, 6): position, velocity, goal."""
    rows = page.execute_script(
        "return robots.map((one) => [one.x, one.y, one.vx, one.vy, one.goalX, one.goalY])"
    )
    return torch.tensor(rows)


def observe(scenes):
    """Return what VMAS lets the robots observe, (scenes, robots, 18)."""
    env = make_env("navigation", num_envs=len(scenes), n_agents=3, seed=0)
    for index, agent in enumerate(env.agents):
        position, velocity, goal = scenes[:, index].split(2, dim=-1)
        agent.set_pos(position, batch_index=None)
        agent.set_vel(velocity, batch_index=None)
        agent.goal.set_pos(goal, batch_index=None)
    return torch.stack([env.scenario.observation(agent) for agent in env.agents], dim=1)


def value(name, seen):
    """Return the value of robot 1."""
    return CRITICS[name](seen)[..., 0, 0]


def step(name, robots, everybody):
    """Return the reward of a step, its lasting change in value as GAE weights it, and their sum."""
    seen = observe(robots[None])
    way = robots[:, 4:] - robots[:, :2]
    length = way.norm(dim=-1, keepdim=True).clamp(max=0.05)
    if not everybody:
        length[1:] = 0.0
    after = seen + (length * way / way.norm(dim=-1, keepdim=True)) @ SHIFT
    with torch.no_grad():
        change = LASTING * (value(name, after) - value(name, seen)).item()
    reward = length.sum().item()
    return [reward, change, reward + change]


def arrows(name, robots, places):
    """Return the gradient of -distance + 0.91 V with respect to robot 1's position, at places."""
    scenes = robots.repeat(len(places), 1, 1)
    scenes[:, 0, :2] = places
    seen = observe(scenes)
    moved = torch.zeros(len(places), 2, requires_grad=True)
    seen = torch.cat([seen[:, :1] + (moved @ SHIFT)[:, None], seen[:, 1:]], dim=1)
    distance = (places + moved - robots[0, 4:]).norm(dim=-1)
    return torch.autograd.grad((LASTING * value(name, seen) - distance).sum(), moved)[0]


def assert_shown(page):
    """Compare the numbers of the step that the page shows with PyTorch's."""
    settle(page)
    robots = scene(page)
    iterations = find(page, "[name=iterations]:checked").get_attribute("value")
    everybody = find(page, "[name=movers]:checked").get_attribute("value") == "all"
    for algorithm in ("mappo", "ippo"):
        terms = page.find_elements(By.CSS_SELECTOR, f"#step-{algorithm} .number")
        shown = [float(term.text.replace("−", "-")) for term in terms]
        expected = step(f"{algorithm}-{iterations}", robots, everybody)
        assert shown == pytest.approx(expected, abs=1e-3)
        word = "gain" if shown[2] > 0 else "loss"
        verdict = find(page, f"#step-{algorithm} [role=status]").text
        assert verdict == f"Coming closer looks like a {word}."


def shapes(page, algorithm):
    """Return the arrows drawn in a map as a set."""
    paths = page.execute_script(
        f"return [...document.querySelectorAll('#map-{algorithm} path')]"
        ".map((one) => one.getAttribute('d'))"
    )
    return set(re.findall(r"M[^M]*L[^M]*L[^M]*Z|M[^M]*M[^M]*", "".join(paths)))


def press(page, *keys):
    """Press these keys, one after the other."""
    ActionChains(page).send_keys(*keys).perform()
    settle(page)


def drag(page, selector, right, down, kind="mouse"):
    """Drag an element by this many pixels, with the mouse or a finger."""
    box = find(page, selector).rect
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    y -= page.execute_script("return scrollY")
    actions = ActionBuilder(page, mouse=PointerInput(kind, kind), duration=20)
    pointer = actions.pointer_action
    pointer.move_to_location(round(x), round(y)).pointer_down()
    for part in range(1, 5):
        pointer.move_to_location(round(x + right * part / 4), round(y + down * part / 4))
    pointer.pointer_up()
    actions.perform()
    settle(page)


def world_units(page, pixels):
    """Return a distance on the screen in units of the square."""
    return pixels * 2.3 / find(page, "#world").rect["width"]


def test_page_is_up_to_date():
    """The committed page is what make_explorer.py makes, stands alone and is small."""
    pattern = re.compile(r'(<script type="application/json" id="data">)(.*?)(</script>)', re.DOTALL)
    made, committed = MAKER["make_page"](), PAGE.read_text("utf-8")
    again = "run python teaching/make_explorer.py"
    assert pattern.sub("", made) == pattern.sub("", committed), again
    made, committed = (json.loads(pattern.search(text)[2]) for text in (made, committed))
    assert made["weights"] == committed["weights"], again
    for name in NAMES:  # other processors round differently
        episodes = torch.tensor(made["episodes"][name]), torch.tensor(committed["episodes"][name])
        torch.testing.assert_close(*episodes, rtol=0, atol=0.01, msg=again)
        last = episodes[1][-1]
        arrived = (last[:, :2] - last[:, 4:]).norm(dim=-1) < 0.1
        assert not arrived.any() if name == "ippo-15" else arrived.all()  # as the page says

    text = PAGE.read_text("utf-8")
    assert len(text) < 3e6
    assert not re.search(r'(?:src|href)="(?!data:)|@import|url\((?!#)|fetch\(', text)


@needs_browser
@pytest.mark.parametrize("page", [(1280, 800)], indirect=True)
def test_same_numbers_as_pytorch(page):
    """In random scenes, observations are VMAS's, and values, arrows and steps PyTorch's."""
    torch.manual_seed(0)
    scenes = []
    while len(scenes) < 10:
        robots = torch.rand(3, 6) * 2 - 1
        if torch.pdist(robots[:, :2]).min() > 0.2:
            scenes.append(robots)
    scenes[0][1, :2] = scenes[0][0, :2] + torch.tensor([0.25, 0.05])  # well within lidar range
    for robots in scenes:
        found = page.execute_script(
            "robots = arguments[0].map(([x, y, vx, vy, goalX, goalY]) =>"
            "  ({x, y, vx, vy, goalX, goalY}));"
            "const seen = observe(robots), result = {seen};"
            "for (const [name, critic] of Object.entries(critics)) result[name] = {"
            "  value: evaluate(critic, [seen]).values[0], map: arrowMap(critic, robots),"
            "  one: oneStep(critic, robots, 'one'), all: oneStep(critic, robots, 'all'),"
            "  home: wayHome(critic, robots, 'one', 2)};"
            "return result",
            robots.tolist(),
        )
        seen = observe(robots[None])
        close = {"rtol": 0, "atol": 1e-3}
        torch.testing.assert_close(torch.tensor(found["seen"]), seen.flatten(), rtol=0, atol=1e-4)
        for name in NAMES:
            one = found[name]
            assert one["value"] == pytest.approx(value(name, seen).item(), abs=1e-3)
            for movers in ("one", "all"):
                expected = step(name, robots, movers == "all")
                shown = [one[movers][key] for key in ("reward", "change", "advantage")]
                assert shown == pytest.approx(expected, abs=1e-3)
            drawn = torch.tensor(one["map"], dtype=torch.float32)
            expected = arrows(name, robots, drawn[:, :2])
            torch.testing.assert_close(drawn[:, 2:4], expected, **close)
            toward = (expected * (robots[0, 4:] - drawn[:, :2])).sum(-1) > 0
            assert (drawn[:, 4].bool() == toward).float().mean() > 0.99  # but for rounding
            assert 90 < len(drawn) <= 121

            way, (length, at_goal, _) = robots[0, 4:] - robots[0, :2], one["home"][0]
            home = seen.clone()
            home[0, 0] += way @ SHIFT
            assert length == 0
            assert at_goal == pytest.approx(value(name, home).item(), abs=1e-3)


@needs_browser
def test_drag_with_the_mouse(page):
    """Robots and goals follow the mouse; only MAPPO's map depends on a robot that is far away."""
    assert_shown(page)
    before = scene(page)
    drag(page, "#world .robot.one .disc", 30, 40)
    after = scene(page)
    moved = world_units(page, torch.tensor([30.0, -40.0]))
    torch.testing.assert_close(after[0, :2] - before[0, :2], moved, rtol=0, atol=0.03)
    torch.testing.assert_close(after[1:], before[1:])
    assert_shown(page)

    maps = {algorithm: shapes(page, algorithm) for algorithm in ("mappo", "ippo")}
    drag(page, "#world .robot.two .disc", 20, -20)
    kept = {one: len(maps[one] & shapes(page, one)) / len(maps[one]) for one in maps}
    assert kept["mappo"] < 0.1
    assert kept["ippo"] > 0.7
    assert_shown(page)

    drag(page, "#world .goal.one .disc", -25, -10)
    assert not torch.equal(scene(page)[0, 4:], before[0, 4:])
    assert_shown(page)

    drag(page, "#world .robot.three .disc", -35, 45)  # out of the square
    assert scene(page)[2, :2].tolist() == [-1, -1]
    page.execute_script("scrollTo(0, 300)")
    drag(page, "#map-ippo .robot.three .disc", 20, -10)  # in a map
    assert scene(page)[2, 0] > -1

    page.execute_script("scrollTo(0, 0); byId('time').value = 10; showFrame()")
    assert (scene(page)[:, 2:4] != 0).all()
    drag(page, "#world .robot.one .disc", 5, 5)
    assert (scene(page)[:, 2:4] == 0).all()  # velocities
    assert_shown(page)
    find(page, "#reset").click()
    settle(page)
    torch.testing.assert_close(scene(page), before)


@needs_browser
@pytest.mark.parametrize("page", [(390, 844)], indirect=True)
def test_drag_with_a_finger(page):
    """A finger moves a robot without scrolling; robots do not overlap."""
    before = scene(page)
    drag(page, "#world .robot.one .disc", 20, -50, kind="touch")
    assert page.execute_script("return scrollY") == 0
    moved = world_units(page, torch.tensor([20.0, 50.0]))
    torch.testing.assert_close(scene(page)[0, :2] - before[0, :2], moved, rtol=0, atol=0.03)
    drag(page, "#world .robot.two .disc", 0, 45, kind="touch")  # onto robot 3
    assert torch.pdist(scene(page)[:, :2]).min() > 0.2 - 1e-6
    assert_shown(page)


@needs_browser
def test_every_switch(page):
    """All combinations of the switches show PyTorch's numbers, and reset restores the first."""
    first = find(page, "main").text
    for movers in ("all", "one"):
        for iterations in ("10", "15"):
            find(page, f"[name=movers][value={movers}]").click()
            find(page, f"[name=iterations][value='{iterations}']").click()
            assert_shown(page)
            why = "all three robots have earned" if movers == "all" else "they have not moved"
            assert why in find(page, ".why").text  # the cause can be read without opening anything
    find(page, "[name=movers][value=all]").click()
    for details in page.find_elements(By.TAG_NAME, "summary"):
        details.click()
        assert len(find(page, "details[open] p").text) > 50
        details.click()
    for driver, arrives in (("mappo", True), ("ippo", False)):
        find(page, f"[name=driver][value={driver}]").click()
        settle(page)
        page.execute_script(
            "byId('time').value = 100; byId('time').dispatchEvent(new Event('input'))"
        )
        settle(page)
        robots = scene(page)
        assert ((robots[:, :2] - robots[:, 4:]).norm(dim=-1) < 0.1).all() == arrives
        text = "All robots have arrived" if arrives else "Time runs out"
        assert text in find(page, "#film-caption").text
    assert_shown(page)
    find(page, "#reset").click()
    settle(page)
    assert find(page, "main").text == first


@needs_browser
def test_keyboard_alone(page):
    """Everything can be reached with Tab, in the order of the page, and used with keys."""
    before = scene(page)
    press(page, Keys.TAB)  # goal 1
    press(page, Keys.ARROW_RIGHT)
    assert scene(page)[0, 4] == pytest.approx(before[0, 4] + 0.05)
    focus = "return document.activeElement.getAttribute('aria-label')"
    assert page.execute_script(focus).startswith("Goal 1 at x 0.05, y 0.15.")
    press(page, *[Keys.TAB] * 3)  # robot 1
    press(page, Keys.ARROW_UP, Keys.ARROW_UP)
    assert scene(page)[0, 1] == pytest.approx(before[0, 1] + 0.1)
    assert_shown(page)
    press(page, *[Keys.TAB] * 3)  # who moves?
    press(page, Keys.ARROW_RIGHT)
    press(page, Keys.TAB)  # iterations
    press(page, Keys.ARROW_LEFT)
    assert find(page, "[name=movers]:checked").get_attribute("value") == "all"
    assert find(page, "[name=iterations]:checked").get_attribute("value") == "10"
    assert_shown(page)
    press(page, Keys.TAB)
    press(page, Keys.ENTER)  # reset
    torch.testing.assert_close(scene(page), before)
    for _ in range(3):
        press(page, Keys.TAB)
        press(page, Keys.ENTER)  # an answer, which closes the one before
        assert len(page.find_elements(By.CSS_SELECTOR, "details[open]")) == 1
    press(page, Keys.TAB)  # who drives?
    press(page, Keys.ARROW_LEFT)
    assert find(page, "[name=driver]:checked").get_attribute("value") == "mappo"
    press(page, Keys.TAB)
    press(page, Keys.SPACE)  # play
    assert find(page, "#play").text == "Pause"
    press(page, Keys.SPACE)
    assert find(page, "#play").text == "Play"
    press(page, Keys.TAB)
    press(page, Keys.HOME, Keys.ARROW_RIGHT)  # the first step of the episode
    expected = page.execute_script("return DATA.episodes['mappo-15'][1]")
    torch.testing.assert_close(scene(page), torch.tensor(expected))
    press(page, Keys.TAB)
    press(page, Keys.ENTER)  # the notes
    assert len(page.find_elements(By.CSS_SELECTOR, "details[open]")) == 2


@needs_browser
def test_layout(page):
    """Nothing is cut off at the right, and on a phone the square stays in view."""
    width = page.execute_script("return innerWidth")
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    if width < 500:
        for part in ("#count-ippo", "#curve-ippo", ".questions", "#time"):
            page.execute_script(
                f"document.querySelector('{part}').scrollIntoView({{block: 'end'}})"
            )
            top = page.execute_script("return byId('world').getBoundingClientRect().top")
            assert 0 <= top < 300
