"""The page in a real Chromium: the way of one who looks, and that nothing goes wrong on it."""

import json
import re
import shutil
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from service.api_keys import Role, described, make_key
from tests.service.dummy_model import score_of
from tests.service.histories import DAY_S, NOW, records
from tests.service.live_service import PATIENCE_S, LiveService

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium is installed (apt-get install chromium)"
)
LARGEST = 2**63 - 1


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Tests may run as root, where Chromium knows no sandbox.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def titles(tmp_path) -> Any:
    path = tmp_path / "titles.json"
    path.write_text(json.dumps({"5": "The <b>Fifth</b>", "3": "The Third"}))
    return path


@pytest.fixture
def looking(serve, titles, redis) -> LiveService:
    """A service that explains, with one user who has done three things."""
    redis.set(
        "history:ann",
        records((5, NOW - 9 * DAY_S), (7, NOW - 5 * DAY_S), (LARGEST, NOW - DAY_S)),
    )
    service: LiveService = serve(explains=True, titles=titles)
    return service


class Visit:
    """A page of a service, and what went wrong on it: messages of the console, and errors."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.wrong: list[str] = []
        page.set_default_timeout(1000 * PATIENCE_S)
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("request", lambda request: self.requested.append(request.url))
        self.requested: list[str] = []

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.wrong.append(message.text)


@pytest.fixture
def visit(browser) -> Iterator[Any]:
    """Return a function that opens the page of a service; at the end nothing was wrong on it."""
    contexts = []
    expect.set_options(timeout=1000 * PATIENCE_S)

    def open_page(service: LiveService, *, expected: str | None = None, **options: Any) -> Page:
        context = browser.new_context(viewport={"width": 1280, "height": 1400}, **options)
        opened = Visit(context.new_page())
        contexts.append((context, opened, expected, str(service.client.base_url)))
        opened.page.goto(str(service.client.base_url))
        return opened.page

    yield open_page
    for context, opened, expected, base_url in contexts:
        context.close()
        wrong = [text for text in opened.wrong if expected is None or expected not in text]
        assert wrong == []
        assert {url for url in opened.requested if not url.startswith(base_url)} == set()


def show(page: Page, user: str = "ann") -> None:
    page.get_by_label("User id").fill(user)
    page.get_by_role("button", name="Show history").click()


def score(page: Page, candidates: str) -> None:
    page.get_by_label("Item ids").fill(candidates)
    page.get_by_role("button", name="Score", exact=True).click()


def test_the_way_from_a_user_to_the_reason_of_a_score(looking, visit):
    page = visit(looking)
    expect(page.get_by_text("The service answers, and Redis does.")).to_be_visible()

    page.get_by_role("group", name="Some users").get_by_role("button", name="ann").click()
    expect(
        page.get_by_text("ann: the newest 3 behaviors, 2023-11-05 to 2023-11-13.")
    ).to_be_visible()
    expect(page.get_by_role("img", name="Timeline of 3 behaviors")).to_be_visible()
    expect(page.locator("#timeline rect")).to_have_count(3)
    page.get_by_text("The behaviors, newest first").click()
    behaviors = page.get_by_role("region", name="Behaviors, newest first").get_by_role("listitem")
    expect(behaviors).to_have_text(
        [f"2023-11-13 22:13  item {LARGEST}", re.compile("item 7"), re.compile("The <b>Fifth</b>")]
    )

    score(page, "1, 3 91")
    expect(
        page.get_by_text("3 scores (affinity) by dummy, arm main, from 3 behaviors.")
    ).to_be_visible()
    scores = page.get_by_role("list", name="Candidates by score").get_by_role("button")
    expect(scores).to_have_text([re.compile("item 91"), re.compile("3"), re.compile("item 1")])

    scores.nth(1).click()
    expect(scores.nth(1)).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_text(re.compile("The Third has the score .* 3 behaviors"))).to_be_visible()
    expect(page.locator("#why rect")).to_have_count(3 * 3)
    rows = page.get_by_role("region", name="The heaviest behaviors").get_by_role("row")
    expect(rows.nth(1)).to_contain_text(f"item {LARGEST}")
    expect(rows.nth(1)).to_contain_text("399")
    expect(rows.nth(3)).to_contain_text("The <b>Fifth</b>")
    expect(rows.nth(0)).to_contain_text("Iteration 3")

    expect(page.locator("#latency circle")).to_have_count(1)
    expect(page.get_by_text(re.compile("1 of the latest 1 were within|0 of the"))).to_be_visible()
    expect(page.get_by_role("row", name=re.compile("^main dummy 100 % 1 "))).to_be_visible()


def test_drawn_items_are_scored_with_the_ids_that_they_have(looking, visit):
    page = visit(looking)
    show(page)
    page.get_by_role("button", name="Draw ten items").click()
    expect(page.get_by_label("Item ids")).to_have_value(re.compile(r"^(\d+, ){9}\d+$"))
    page.get_by_role("button", name="Score", exact=True).click()
    expect(page.locator("#scores li")).to_have_count(10)
    score(page, str(LARGEST))
    expect(page.locator("#scores li")).to_have_text([re.compile(f"item {LARGEST}")])
    (asked,) = looking.model.runs[-1].candidate_items
    assert asked.tolist() == [1]  # the row of the unknown: no other id came of it


def test_the_whole_way_can_be_gone_by_keyboard(looking, visit):
    page = visit(looking)
    expect(page.locator("#some-users button")).to_have_count(1)
    page.get_by_label("User id").focus()
    page.keyboard.type("ann")
    page.keyboard.press("Enter")
    expect(page.get_by_role("img", name="Timeline of 3 behaviors")).to_be_visible()
    page.get_by_label("Item ids").focus()
    page.keyboard.type("1 2")
    for _ in range(2):  # past the drawing of items
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#scores li")).to_have_count(2)
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(page.locator("#why rect")).to_have_count(9)
    assert page.evaluate("document.activeElement.dataset.place") == "1"


def test_latency_is_shown_live_while_it_scores_again_and_again(looking, visit):
    page = visit(looking)
    show(page)
    score(page, "1, 2")
    page.get_by_label("Score again every second").check()
    expect(page.locator("#latency circle")).to_have_count(3)
    page.get_by_label("Score again every second").uncheck()


def test_an_unknown_user_is_told_and_scored_all_the_same(looking, visit):
    page = visit(looking)
    show(page, "nobody/at all")
    expect(page.get_by_text("nobody/at all is unknown: no history is stored.")).to_be_visible()
    score(page, "1")
    expect(page.get_by_text("from 0 behaviors")).to_be_visible()
    page.locator("#scores button").click()
    text = f"item 1 has the score {score_of(1):.3f} from no behavior at all."
    expect(page.get_by_text(text)).to_be_visible()


@pytest.mark.parametrize(
    ("candidates", "reason"),
    [
        pytest.param("1 x", '"x" is no item id', id="no number"),
        pytest.param(" ", "Name a candidate first", id="none"),
        pytest.param(" ".join("1" * 21), "21 candidates are too many", id="too many"),
    ],
)
def test_what_cannot_be_scored_is_told_and_forgotten(looking, visit, candidates, reason):
    page = visit(looking)
    show(page)
    score(page, candidates)
    expect(page.get_by_role("alert")).to_contain_text(reason)
    score(page, "1")
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.locator("#scores li")).to_have_count(1)


def test_the_routes_are_described_without_another_host(looking, visit):
    page = visit(looking)
    page.get_by_role("link", name="Routes").click()
    expect(page.get_by_text("Score candidates for a user")).to_be_visible()
    expect(page.get_by_text("/users/{user_id}/history")).to_be_visible()


def test_a_bundle_without_an_explain_graph_says_so(serve, visit):
    page = visit(serve())
    show(page)
    score(page, "1")
    page.locator("#scores button").click()
    expect(page.get_by_text("dummy gives no explanations")).to_be_visible()


def test_redis_away_is_told(serve, visit, stoppable_redis):
    """The browser's console names each answer of 503 by itself."""
    page = visit(serve(explains=True, redis_url=stoppable_redis.url), expected="503")
    expect(page.get_by_text("The service answers, and Redis does.")).to_be_visible()
    stoppable_redis.stop()
    expect(page.get_by_text("Redis is away: histories cannot be read.")).to_be_visible()
    show(page)
    expect(page.get_by_role("alert")).to_contain_text("The history store is away")
    stoppable_redis.start()
    expect(page.get_by_text("The service answers, and Redis does.")).to_be_visible()
    show(page)
    expect(page.get_by_text("ann is unknown")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)


class TestKeys:
    """Where the service asks for keys; the browser's console names each refusal by itself."""

    @pytest.fixture
    def keys(self) -> dict[str, str]:
        return {"all": make_key(), "score": make_key()}

    @pytest.fixture
    def guarded(self, serve, keys, tmp_path, redis) -> LiveService:
        redis.set("history:ann", records((5, NOW - DAY_S)))
        file = tmp_path / "keys.toml"
        roles = {"all": get_args(Role), "score": ["score"]}
        file.write_text("".join(described(name, keys[name], roles=roles[name]) for name in keys))
        service: LiveService = serve(explains=True, api_keys=file)
        return service

    def use(self, page: Page, key: str) -> None:
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Use this key").click()

    def test_it_asks_for_one_and_then_does_everything(self, guarded, visit, keys):
        page = visit(guarded, expected="401")
        expect(page.get_by_role("alert")).to_contain_text("A valid API key is needed")
        expect(page.get_by_text("The service answers.", exact=True)).to_be_visible()
        expect(page.get_by_role("link", name="Metrics")).to_have_count(0)
        self.use(page, keys["all"])
        expect(page.get_by_role("alert")).to_have_count(0)
        expect(page.get_by_text("The service answers, and Redis does.")).to_be_visible()
        page.get_by_role("group", name="Some users").get_by_role("button", name="ann").click()
        expect(page.get_by_text("ann: the newest 1 behaviors")).to_be_visible()
        score(page, "1, 3")
        page.locator("#scores button").first.click()
        expect(page.locator("#why rect")).to_have_count(3)
        expect(page.get_by_role("row", name=re.compile("^main dummy 100 % 1 "))).to_be_visible()

    def test_the_key_is_kept_nowhere(self, guarded, visit, keys):
        page = visit(guarded, expected="401")
        self.use(page, keys["all"])
        expect(page.get_by_text("The service answers, and Redis does.")).to_be_visible()
        kept = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
        assert page.evaluate(kept) == '[{},{},""]'
        assert keys["all"] not in page.url
        page.reload()
        expect(page.get_by_role("alert")).to_contain_text("A valid API key is needed")
        expect(page.get_by_label("API key")).to_have_value("")

    def test_what_a_key_may_not_is_told_and_the_rest_goes_on(self, guarded, visit, keys):
        page = visit(guarded, expected="40")
        self.use(page, "mneme_wrong")
        expect(page.get_by_role("alert")).to_contain_text("this API key is not known")
        self.use(page, keys["score"])
        expect(page.get_by_role("alert")).to_contain_text("this asks for the role read")
        expect(page.get_by_role("region", name="All requests")).to_have_count(0)
        page.get_by_role("button", name="Draw ten items").click()
        expect(page.get_by_label("Item ids")).to_have_value(re.compile(r"^(\d+, ){9}\d+$"))
        expect(page.get_by_role("alert")).to_have_count(0)

    def test_nothing_is_asked_for_where_no_keys_are(self, looking, visit):
        page = visit(looking)
        expect(page.get_by_text("The service answers, and Redis does.")).to_be_visible()
        expect(page.get_by_label("API key")).to_be_hidden()
        expect(page.get_by_role("link", name="Metrics", exact=True)).to_be_visible()


def test_every_control_has_a_name(looking, visit):
    page = visit(looking)
    show(page)
    score(page, "1, 2")
    expect(page.locator("#scores li")).to_have_count(2)
    for control in page.locator("button, input, select, textarea, [tabindex='0']").all():
        if control.is_visible():
            expect(control).to_have_accessible_name(re.compile(r"\w"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_either_scheme(looking, visit, scheme):
    """Contrast as of WCAG 2.2, 1.4.3: 4.5 at least."""
    page = visit(looking, color_scheme=scheme)
    show(page)
    score(page, "1 2")
    expect(page.locator("#scores li")).to_have_count(2)
    lowest = page.evaluate(LOWEST_CONTRAST)
    assert lowest["contrast"] >= 4.5, lowest
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    assert dark == (scheme == "dark")


# Of all elements that hold visible text themselves, the one whose text stands out least.
LOWEST_CONTRAST = """() => {
  const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => {
    const [r, g, b] = rgb(color).slice(0, 3).map((one) => {
      const part = one / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const backOf = (element) => {
    const back = getComputedStyle(element).backgroundColor;
    const opaque = rgb(back).length === 3;
    return opaque || !element.parentElement ? back : backOf(element.parentElement);
  };
  const found = [...document.body.querySelectorAll("*")]
    .filter((one) => !one.closest("svg") && one.checkVisibility())
    .filter((one) => [...one.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
    .map((one) => {
      const colors = [getComputedStyle(one).color, backOf(one)];
      const lights = colors.map(luminance).sort((a, b) => b - a);
      return { text: one.textContent.trim(), contrast: (lights[0] + 0.05) / (lights[1] + 0.05) };
    });
  return found.reduce((least, one) => (one.contrast < least.contrast ? one : least));
}"""
