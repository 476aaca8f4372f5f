"""The report of a healthy run and of runs that are sick on purpose (tests/sick.py), as pages and pictures of them.

    python eval/studies/report_of_sick_runs.py FOLDER

For each it prints what the page says on top; with chromium and chromedriver it looks at the pages on a desk, light and
dark, and on a phone. It ends with 1 unless every page says first what its run has, the healthy one nothing, and none is
wider than its screen.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from moe_lm.common.errors import MoeLmError
from moe_lm.tools.report.reading import read_run
from moe_lm.tools.report.report import report
from tests.sick import HEALTHY, SICK, run_of

RUNS = {
    "healthy": (HEALTHY, {"steps": 400, "eval_every": 50}),
    "rate-too-high": (SICK["rate too high"], {"steps": 100}),
    "router-collapsed": (SICK["collapsed router"], {"steps": 400}),
    "dead-experts": (SICK["dead experts"], {"steps": 100}),
    "starved-by-data": (SICK["starved by data"], {"steps": 100}),
    "nan-skips": (SICK["NaN in the data"], {"steps": 100}),
    "memorising": (SICK["memorising"], {"steps": 100, "eval_every": 10}),
}
SCREENS = {"desk": (1280, 900, "light"), "dark": (1280, 900, "dark"), "phone": (390, 844, "light")}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    wrong = []
    pages = {}
    for name, (sick, settings) in RUNS.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        with suppress(MoeLmError):  # the guards end some
            run_of(sick, folder / name, **settings)()
        found = read_run(folder / name)
        pages[name] = report([folder / name])
        said = [finding.name for finding in sorted(found.findings.values(), key=lambda finding: finding.first)]
        print(f"{name}: {said or 'nothing looks wrong'}, {pages[name].stat().st_size:,} bytes")
        if found.unjudged or said[:1] != ([sick.symptom] if sick.symptom else []):
            wrong.append(name)
    pages["several"] = report(
        [folder / name for name in ("healthy", "rate-too-high", "memorising")], folder / "three.html"
    )
    wrong += [str(file) for file in pictures(folder, pages)]
    sys.exit(f"not as expected: {wrong}" if wrong else 0)


def pictures(folder: Path, pages: dict[str, Path]) -> Iterator[Path]:
    """Takes a picture of every page on every screen; yields those that are wider than the screen."""
    browser, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if browser is None or driver is None:
        print("no pictures: they need chromium and chromedriver")
        return
    from selenium import webdriver

    for screen, (width, height, scheme) in SCREENS.items():
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        feature = {"name": "prefers-color-scheme", "value": scheme}
        chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        for name, page in pages.items():
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": screen == "phone"}
            chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            chrome.get(page.absolute().as_uri())
            tall = chrome.execute_script("return document.documentElement.scrollHeight")
            if chrome.execute_script("return document.documentElement.scrollWidth") > width:
                yield folder / f"{name}-{screen}"
            chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics | {"height": tall})
            chrome.save_screenshot(str(folder / f"{name}-{screen}.png"))
        chrome.quit()


if __name__ == "__main__":
    main()
