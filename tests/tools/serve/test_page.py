"""The chat page in a real browser without a screen."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from moe_lm.generate.decode import Settings
from moe_lm.generate.session import Session
from moe_lm.generate.strategies import GREEDY
from moe_lm.tokenizer.tokenizer import Tokenizer
from tests.texts import text_of
from tests.tools.serve.conftest import Serve, Served


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    """One browser for all tests; a page error or a breach of the page's policy fails them at the end."""
    browser, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    errors = [entry for entry in chrome.get_log("browser") if entry["level"] == "SEVERE"]
    chrome.quit()
    assert [entry for entry in errors if not any(status in entry["message"] for status in ("400", "401"))] == []


@pytest.fixture
def page(chromium: webdriver.Chrome) -> Callable[[Served], Page]:
    def opened(served: Served) -> Page:
        chromium.get(served.url)
        chromium.execute_script("sessionStorage.clear()")
        chromium.get(served.url)
        return Page(chromium)

    return opened


class Page:
    """What a person sees and does."""

    def __init__(self, browser: webdriver.Chrome) -> None:
        self.browser = browser

    def find(self, name: str) -> WebElement:
        return self.browser.find_element(By.ID, name)

    def said(self, who: str) -> list[str]:
        """The texts of the conversation that are by `who`, as they stand in the document."""
        words = self.browser.find_elements(By.CSS_SELECTOR, f".{who} .words")
        return [str(item.get_property("textContent")) for item in words]

    def wait(self, condition: Callable[[], bool]) -> None:
        WebDriverWait(self.browser, 30, poll_frequency=0.02).until(lambda _: condition())

    def ended(self) -> None:
        self.wait(lambda: self.find("log").get_attribute("aria-busy") == "false")

    def type(self, text: str) -> None:
        self.wait(lambda: self.find("model").text != "")
        self.find("text").send_keys(text)

    def send(self, text: str) -> None:
        self.type(text)
        self.find("send").click()
        self.ended()

    def newest(self) -> int:
        """Experts that are marked as the newest token's."""
        return len(self.browser.find_elements(By.CSS_SELECTOR, "#strip .layer i.now"))

    def set(self, name: str, value: object) -> None:
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
        self.browser.execute_script(script, self.find(name), str(value))


Open = Callable[[Served], Page]


def test_a_message_gets_an_answer_with_its_speed_and_its_experts(
    served: Served, session: Session, page: Open, tmp_path: Path
) -> None:
    here = page(served)
    here.wait(lambda: here.find("model").text.startswith("tiny · 0."))
    assert here.find("chosen").text == "2 of 4 a token"
    here.set("temperature", 0)
    here.set("max-tokens", 20)
    here.send("what is an import?")
    talk = [{"role": "user", "content": "what is an import?"}]
    expected = text_of(session.chat(talk, Settings(20, GREEDY)))
    assert here.said("user") == ["what is an import?"]
    assert here.said("assistant") == [expected]
    figures = here.browser.find_element(By.CLASS_NAME, "figures").text
    assert "tokens/s" in figures
    assert "20 tokens" in figures or "complete" in figures
    cells = here.browser.find_elements(By.CSS_SELECTOR, "#strip .layer i")
    assert len(cells) == 2 * 4
    label = here.find("strip").get_attribute("aria-label") or ""
    assert "layer 1 mostly expert" in label
    assert "layer 2 mostly expert" in label
    shares = [float(str(cell.get_attribute("title")).split(": ")[1].split("%")[0]) for cell in cells]
    assert sum(shares[:4]) == pytest.approx(200, abs=3)  # two experts a token
    here.wait(lambda: here.newest() == 0)

    here.find("text").send_keys("and a", Keys.SHIFT, Keys.ENTER, Keys.NULL, "class?", Keys.ENTER)
    here.wait(lambda: len(here.said("assistant")) == 2)
    here.ended()
    talk += [{"role": "assistant", "content": expected}, {"role": "user", "content": "and a\nclass?"}]
    assert here.said("user")[1] == "and a\nclass?"
    assert here.said("assistant")[1] == text_of(session.chat(talk, Settings(20, GREEDY)))
    file = tmp_path / "chat.png"
    assert here.browser.save_screenshot(str(file))
    assert file.stat().st_size > 10_000

    here.find("fresh").click()
    assert here.said("user") == here.said("assistant") == []


def test_an_answer_is_copied_and_written_again_and_outlives_a_reload(
    served: Served, session: Session, page: Open
) -> None:
    here = page(served)
    here.set("temperature", 0)
    here.set("max-tokens", 5)
    here.set("system", "Be brief.")
    scale = here.find("most").text
    here.send("why?")
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "why?"}]
    expected = text_of(session.chat(talk, Settings(5, GREEDY)))
    assert here.said("assistant") == [expected]

    here.browser.find_element(By.CSS_SELECTOR, ".again").click()
    here.ended()
    assert (here.said("user"), here.said("assistant")) == (["why?"], [expected])
    here.browser.find_element(By.CSS_SELECTOR, ".copy").click()
    here.wait(lambda: here.find("status").get_property("textContent") == "Copied")
    assert here.find("most").text == scale == "100%"  # the same for every answer

    here.browser.refresh()
    here.wait(lambda: here.said("assistant") == [expected])
    assert here.said("user") == ["why?"]
    here.find("fresh").click()
    here.browser.refresh()
    here.wait(lambda: here.find("model").text != "")
    assert here.said("user") == []


def test_stop_ends_the_answer_and_frees_its_row(serve: Serve, session: Session, page: Open) -> None:
    """The model holds still after 20 steps, so that the answer is surely still being written."""
    served = serve(slots=1)
    here = page(served)
    here.set("max-tokens", 100)
    here.find("continue").click()
    go_on, steps = threading.Event(), []

    def hold(*_: object) -> None:
        steps.append(1)
        if len(steps) > 20:
            go_on.wait(60)

    hook = session.model.model.register_forward_pre_hook(hold)
    try:
        here.type("import os")
        here.find("send").click()
        here.wait(lambda: here.newest() == 4)  # two layers with two experts each
        here.find("stop").click()
        here.ended()
    finally:
        go_on.set()
        hook.remove()
    assert "stopped" in here.browser.find_element(By.CLASS_NAME, "figures").text
    assert here.said("text")[0].startswith("import os")
    served.wait(lambda: served.scheduler.running == 0)


def test_without_a_chat_template_the_page_continues_texts(serve: Serve, session: Session, page: Open) -> None:
    config = {key: value for key, value in session.tokenizer._config.items() if key != "chat_template"}
    plain = Session(session.checkpoint, session.model, Tokenizer(session.tokenizer._backend, config))
    here = page(serve(plain))
    here.wait(lambda: here.find("send").text == "Continue")
    assert not here.find("modes").is_displayed()
    here.set("temperature", 0)
    here.set("max-tokens", 12)
    here.send("import os")
    assert here.said("text") == ["import os" + text_of(plain.complete("import os", Settings(12, GREEDY)))]


def test_what_people_and_models_write_stays_text(served: Served, page: Open) -> None:
    here = page(served)
    here.set("max-tokens", 2)
    here.send("<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>")
    assert here.said("user")[0].startswith("<img src=x")
    assert here.browser.find_elements(By.CSS_SELECTOR, "#log img, #log script") == []
    assert here.browser.title != "broken"


def test_a_long_conversation_loses_its_beginning_and_an_error_is_shown(served: Served, page: Open) -> None:
    here = page(served)
    here.set("temperature", 0)
    here.set("max-tokens", 8)
    for _ in range(4):
        here.send("what is an import and what is a class in a module of a package?")
    assert len(here.said("assistant")) == 4
    assert "only the last" in here.browser.find_elements(By.CLASS_NAME, "figures")[-1].text
    here.find("fresh").click()
    here.send("import os " * 90)
    assert "more than the context" in here.said("error")[0]


def test_the_page_asks_for_the_key(serve: Serve, page: Open) -> None:
    here = page(serve(api_key="secret"))
    here.wait(lambda: here.find("key").is_displayed())
    assert "API key is missing" in here.said("error")[0]
    here.find("key").send_keys("secret", Keys.ENTER)
    here.wait(lambda: here.find("model").text != "")
    here.send("hello")
    assert len(here.said("assistant")) == 1


def test_the_page_loads_nothing_from_elsewhere(served: Served) -> None:
    answer = served.http.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http://" not in answer.text
    assert "https://" not in answer.text
    assert "innerHTML" not in answer.text
