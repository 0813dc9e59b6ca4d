"""The page of the images API in a Chromium: at two widths, by keys alone, in the light and in the dark."""

import json
import shutil
import threading
from itertools import groupby
from types import SimpleNamespace

import pytest
from images_api import SECONDS, asked, models_over, serving, until
from playwright.sync_api import expect, sync_playwright
from profiles import PLAN, made

from taylorseer_export.bundle.profile import write_profile
from taylorseer_export.bundle.store import open_bundle
from taylorseer_export.errors import StepError
from taylorseer_export.runtime.denoiser import load
from taylorseer_export.runtime.slot import Slot
from taylorseer_export.serve.api.settings import Settings, _digest

pytestmark = pytest.mark.slow

CAPTION = "a red circle left of a blue square"
PHONE, DESK = 375, 1280  # pixels
NAMES = ("chromium", "chromium-browser", "google-chrome")
# Nothing that Chromium does of its own accord, and no name that it could find an address for.
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)

# What the page shows, at every change of it: of each picture its source, whether it is a preview, and its strip.
WATCH = """() => {
  window.seen = { with: [], without: [] };
  new MutationObserver(() => {
    for (const [id, states] of Object.entries(window.seen)) {
      const picture = document.querySelector(`#${id} img`);
      const cells = [...document.querySelectorAll(`#${id} .strip i`)];
      states.push({
        source: picture && picture.src, preview: Boolean(picture && picture.className),
        kinds: cells.map((cell) => (cell.classList[0] === "F" ? "F" : ".")).join(""),
        done: cells.map((cell) => (cell.classList.contains("done") ? "1" : "0")).join(""),
      });
    }
  }).observe(document.querySelector("#sheets"), { subtree: true, childList: true, attributes: true });
}"""

# [[what, its color, the color behind it]] of all text that can be read, and of the bars of the strips.
COLORS = """() => {
  const clear = (color) => color === "rgba(0, 0, 0, 0)";
  const behind = (one) => {
    while (one && clear(getComputedStyle(one).backgroundColor)) one = one.parentElement;
    return one ? getComputedStyle(one).backgroundColor : "none";
  };
  const texts = [], bars = [];
  for (const one of document.body.querySelectorAll("*")) {
    if (!one.checkVisibility() || one.disabled || one.matches("script, option")) continue;
    const name = one.id || one.className || one.localName;
    const own = [...one.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    if (own || one.value) texts.push([name, getComputedStyle(one).color, behind(one)]);
    if (one.placeholder) texts.push([name, getComputedStyle(one, "::placeholder").color, behind(one)]);
    if (one.matches("i.done")) bars.push([name, getComputedStyle(one).backgroundColor, behind(one.parentElement)]);
  }
  return { texts, bars, page: getComputedStyle(document.body).backgroundColor };
}"""


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(NAMES)} is on the path; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        expect.set_options(timeout=1e3 * SECONDS)
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS, timeout=1e3 * SECONDS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def models(browser, embedded, tmp_path_factory):
    """The embedded FLUX, with a profile `fast`."""
    folder = tmp_path_factory.mktemp("profiled") / "flux-tiny"
    shutil.copytree(embedded("shapes"), folder)
    bundle = open_bundle(folder)
    write_profile(bundle, made(bundle.manifest))
    with load(folder, threads=1) as denoiser, models_over(denoiser, slots=1, queue=2, workers=1) as models:
        yield models


@pytest.fixture(scope="module")
def port(models):
    with serving(models) as port:
        yield port


@pytest.fixture
def opened(browser, port):
    """(width, scheme) -> the page, ready; at the end nothing was asked of anyone else, and all errors were expected."""
    contexts, requests, errors = [], [], []

    def make(width=DESK, scheme="light", of=port):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("request", lambda request: requests.append((request.url, of)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"http://127.0.0.1:{of}/")
        page.evaluate(WATCH)
        return page

    yield SimpleNamespace(page=make, errors=errors)
    for context in contexts:
        context.close()
    assert requests and all(url.startswith(f"http://127.0.0.1:{of}/") for url, of in requests), requests
    assert not errors


def ready(page):
    expect(page.locator("#model option")).to_have_text(["flux-tiny"])
    return page


def focused(page):
    """The control that has the keys, and whether it shows so."""
    name, style, width = page.evaluate(
        "() => { const one = document.activeElement, how = getComputedStyle(one);"
        " return [one.id, how.outlineStyle, parseFloat(how.outlineWidth)]; }"
    )
    assert style == "solid" and width >= 2, name
    return name


def fits(page, width):
    """Nothing is cut off at the sides, and nothing has to be scrolled to."""
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    for one in page.locator("input, select, textarea, button, figure, h1, p").all():
        if one.is_visible():
            box = one.bounding_box()
            assert 0 <= box["x"] and box["x"] + box["width"] <= width
            assert one.evaluate("(one) => one.scrollWidth <= one.clientWidth"), one


def answer(port, **more):
    """(source of the picture as a page shows it, its plan) of the API's own answer."""
    status, _, text = asked(port, "/v1/images/generations", {"prompt": CAPTION, **more})
    assert status == 200, text
    told = json.loads(text)
    return f"data:image/png;base64,{told['data'][0]['b64_json']}", told["taylorseer"]["pictures"][0]["executed"]


def check_drawn(page, sheet, source, plan):
    """A sheet showed three previews, then this picture, and its strip filled step by step."""
    states = page.evaluate("(sheet) => window.seen[sheet]", sheet)
    shown = [key for key, _ in groupby((state["source"], state["preview"]) for state in states if state["source"])]
    assert [preview for _, preview in shown] == [True, True, True, False]
    assert len({one for one, _ in shown}) == 4 and shown[-1][0] == source
    assert page.locator(f"#{sheet} img").evaluate("(one) => one.complete && one.naturalWidth") > 0
    strips = [key for key, _ in groupby((state["kinds"], state["done"]) for state in states if state["kinds"])]
    assert {kinds for kinds, _ in strips} == {plan}
    assert [done for _, done in strips] == ["1" * k + "0" * (len(plan) - k) for k in range(1, len(plan) + 1)]
    facts = dict(zip(*(page.locator(f"#{sheet} {one}").all_inner_texts() for one in ("dt", "dd")), strict=True))
    assert facts["full steps"] == f"{plan.count('F')} of {len(plan)}"
    times = {name: facts[name] for name in ("a full step", "a forecast step", "all steps", "decoding")}
    if "." not in plan:
        assert times.pop("a forecast step") == "none"
    assert all(text.endswith(" ms") and float(text[:-3]) >= 0 for text in times.values())
    return facts


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_it_fits_its_width(opened, width):
    page = ready(opened.page(width))
    for label in ("Prompt", "Model", "Size, width x height", "Profile", "Seed"):
        expect(page.get_by_label(label)).to_be_visible()
    for name in ("Draw", "Same seed without forecasts", "Stop"):
        expect(page.get_by_role("button", name=name)).to_be_visible()
    for control in page.locator("input:visible, select, textarea, button").all():
        assert control.bounding_box()["height"] >= 44  # a finger's
    fits(page, width)
    page.get_by_label("Prompt").fill("a" * 300)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#said")).to_have_text("done")
    page.keyboard.press("Alt+Enter")
    expect(page.locator("#without dd")).to_have_count(6)
    fits(page, width)


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_keys_alone_draw_and_compare(opened, port, width):
    page = ready(opened.page(width))
    assert focused(page) == "prompt"
    page.keyboard.type(CAPTION)
    order = []
    for text in ("", "48x32", "", "7", ""):
        page.keyboard.press("Tab")
        order.append(focused(page))
        page.keyboard.type(text)
    assert order == ["model", "size", "profile", "seed", "draw"]
    page.keyboard.press("Enter")
    expect(page.locator("#said")).to_have_text("done")
    source, plan = answer(port, size="48x32", seed=7)
    assert 1 < plan.count("F") < len(plan)
    assert check_drawn(page, "with", source, plan)["seed"] == "7"
    expect(page.locator("#without")).to_be_hidden()
    assert focused(page) == "draw"  # though it could not be pressed meanwhile
    page.keyboard.press("Tab")
    assert focused(page) == "beside"
    page.keyboard.press("Enter")
    expect(page.locator("#without dd")).to_have_count(6)
    whole, executed = answer(port, size="48x32", seed=7, plan="F" * len(plan))
    assert executed == "F" * len(plan) and whole != source
    assert check_drawn(page, "without", whole, executed)["seed"] == "7"
    assert page.locator("#with img").get_attribute("src") == source  # beside it


def test_a_click_draws_by_a_profile_with_a_seed_of_its_own(opened, port):
    page = ready(opened.page())
    page.get_by_label("Prompt").fill(CAPTION)
    page.get_by_label("Profile").select_option("fast")
    page.get_by_role("button", name="Draw").click()
    expect(page.locator("#said")).to_have_text("done")
    seed = page.locator("#with dd").last.inner_text()
    source, plan = answer(port, profile="fast", seed=int(seed))
    assert plan == PLAN and check_drawn(page, "with", source, plan)["seed"] == seed
    page.get_by_role("button", name="Same seed without forecasts").click()
    expect(page.locator("#without dd")).to_have_count(6)
    source, plan = answer(port, plan="F" * len(PLAN), seed=int(seed))
    assert check_drawn(page, "without", source, plan)["seed"] == seed
    page.get_by_role("button", name="Draw").click()  # another seed: what was beside it is gone
    expect(page.locator("#without")).to_be_hidden()
    expect(page.locator("#said")).to_have_text("done")
    assert page.locator("#with dd").last.inner_text() != seed


def luminance(color):
    """Relative luminance of `rgb(r, g, b)`, as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in color.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_wcag():
    white = "rgb(255, 255, 255)"
    assert contrast("rgb(0, 0, 0)", white) == 21
    assert contrast("rgb(119, 119, 119)", white) < 4.5 < contrast("rgb(118, 118, 118)", white)


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_everything_can_be_read_in_the_light_and_in_the_dark(opened, width):
    behind = {}
    for scheme in ("light", "dark"):
        page = ready(opened.page(width, scheme))
        states = [page.evaluate(COLORS)]
        page.get_by_label("Prompt").fill(CAPTION)
        page.keyboard.press("Control+Enter")
        expect(page.locator("#said")).to_have_text("done")
        page.keyboard.press("Alt+Enter")
        expect(page.locator("#without dd")).to_have_count(6)
        states.append(page.evaluate(COLORS))
        page.get_by_label("Size, width x height").fill("48x31")
        page.keyboard.press("Enter")
        expect(page.locator("#said.bad")).to_be_visible()
        states.append(page.evaluate(COLORS))
        texts = [text for state in states for text in state["texts"]]
        assert {"prompt", "seed", "draw", "beside", "said", "key", "dt", "dd", "h2"} <= {name for name, *_ in texts}
        assert [text for text in texts if contrast(*text[1:]) < 4.5] == []
        bars = [bar for state in states for bar in state["bars"]]
        assert len(bars) > 100 and [bar for bar in bars if contrast(*bar[1:]) < 3] == []  # WCAG's for what is no text
        behind[scheme] = luminance(states[0]["page"])
    assert behind["dark"] < 0.05 < 0.8 < behind["light"]
    assert all("status of 400" in error for error in opened.errors) and len(opened.errors) == 2
    opened.errors.clear()


@pytest.fixture
def held(monkeypatch):
    """While it is not set, no engine call ends."""
    run, event = Slot.run, threading.Event()

    def waiting(slot):
        assert event.wait(SECONDS)
        run(slot)

    monkeypatch.setattr(Slot, "run", waiting)
    yield event
    event.set()


def test_what_is_refused_is_said_in_words(opened, monkeypatch):
    page = ready(opened.page(PHONE))
    said = page.locator("#said")
    page.keyboard.press("Control+Enter")  # Chromium itself asks for a prompt
    assert page.get_by_label("Prompt").evaluate("(one) => one.matches(':invalid')") and said.inner_text() == ""
    page.get_by_label("Prompt").fill("a" * 5000)
    page.get_by_role("button", name="Draw").click()
    expect(said).to_have_text("prompt is 5000 characters long, expected at most 4096; shorten it")
    expect(said).to_have_class("bad")
    page.get_by_label("Prompt").fill(CAPTION)
    page.get_by_label("Size, width x height").fill("48x31")
    page.keyboard.press("Enter")
    expect(said).to_have_text("size height is 31, expected a multiple of 8 (pixels); change it")
    expect(page.locator("#with")).to_be_hidden()
    fits(page, PHONE)
    assert len(opened.errors) == 2 and all("status of 400" in error for error in opened.errors)
    opened.errors.clear()  # of Chromium, which tells of every status
    page.get_by_label("Size, width x height").fill("")
    with monkeypatch.context() as broken:

        def fails(slot):
            raise StepError("step is broken, expected a whole one; mend it")

        broken.setattr(Slot, "run", fails)
        page.keyboard.press("Enter")  # the stream has begun, and ends with the error
        expect(said).to_have_text("step is broken, expected a whole one; mend it")
    page.keyboard.press("Enter")
    expect(said).to_have_text("done")
    expect(said).to_have_class("")


def test_escape_stops(opened, models, held):
    page, service = ready(opened.page()), next(iter(models)).service
    before = service.snapshot().get("requests.cancelled", 0)
    page.get_by_label("Prompt").fill(CAPTION)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#said")).to_have_text("drawing …")
    expect(page.get_by_role("button", name="Draw")).to_be_disabled()
    page.keyboard.press("Escape")
    expect(page.locator("#said")).to_have_text("stopped")
    held.set()
    until(lambda: service.snapshot().get("requests.cancelled", 0) > before)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#said")).to_have_text("done")
    assert page.locator("#with img").get_attribute("src").startswith("data:image/png;base64,")


def test_a_server_with_keys_is_given_one(opened, models):
    with serving(models, Settings(keys=(_digest("a-key-of-the-page"),))) as port:
        page = opened.page(of=port)
        expect(page.locator("#said")).to_contain_text("the API key is missing or wrong")
        page.get_by_label("API key").fill("a-key-of-the-page")
        page.keyboard.press("Tab")
        ready(page)
        page.get_by_label("Prompt").fill(CAPTION)
        page.get_by_role("button", name="Draw").click()
        expect(page.locator("#said")).to_have_text("done")
        page.close()  # and its connections with it
    assert len(opened.errors) == 1 and "status of 401" in opened.errors.pop()
