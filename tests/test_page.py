"""The page in a headless Chromium: `apt-get install chromium chromium-driver`."""

import json
import shutil
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from conftest import babble, write_audio, write_manifest
from ordinary import room, telephone
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from test_serve import Running

from tiny_audio.asr.asr_audio import SAMPLE_RATE, load_audio
from tiny_audio.commands import adapt, demo
from tiny_audio.commands.assets import Assets
from tiny_audio.commands.serve import create_app
from tiny_audio.commands.speech import read_manifest
from tiny_audio.training.manifests import read_source
from tiny_audio.training.recipe import compose_recipe
from tiny_audio.training.train import train

SCREENS = {"desktop": (1200, 900), "phone": (390, 844)}


@pytest.fixture
def page(model_folder, tmp_path):
    """The page's address."""
    example = str(write_audio(tmp_path / "example.wav", babble(1.0, 3), 16_000, "pcm_s16le"))
    blocks = demo.build([str(model_folder)], [example], folder=tmp_path / "mine")
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, css=demo.CSS)
    yield url
    blocks.close()


@pytest.fixture
def driver(tmp_path):
    """A headless Chromium that saves into tmp_path; its microphone hears tmp_path/said.wav."""
    assert shutil.which("chromium") and shutil.which("chromedriver"), __doc__
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless=new", "no-sandbox", "autoplay-policy=no-user-gesture-required",
                 "use-fake-ui-for-media-stream", "use-fake-device-for-media-stream",
                 f"use-file-for-fake-audio-capture={tmp_path / 'said.wav'}%noloop"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def upload(driver, wait, file: Path) -> None:
    """Give a file to the page and have it transcribed."""
    waiting = "#recording input[type=file]"
    wait.until(lambda d: d.find_element(By.CSS_SELECTOR, waiting)).send_keys(str(file))
    wait.until(lambda d: not d.find_elements(By.CSS_SELECTOR, waiting))
    time.sleep(1)
    driver.find_element(By.CSS_SELECTOR, "#go").click()


def record(driver, wait, seconds: float) -> None:
    """Record so much from the microphone and have it transcribed."""
    microphone = "#recording button[aria-label='Record audio']"
    wait.until(lambda d: d.find_element(By.CSS_SELECTOR, microphone)).click()
    start = "#recording .record-button"
    wait.until(lambda d: d.find_element(By.CSS_SELECTOR, start)).click()
    time.sleep(seconds)
    driver.find_element(By.CSS_SELECTOR, "#recording .stop-button").click()
    wait.until(lambda d: not d.find_elements(By.CSS_SELECTOR, start))
    time.sleep(1)
    driver.find_element(By.CSS_SELECTOR, "#go").click()


def correct(driver, wait, text: str) -> None:
    """Overwrite the text of the page and keep it as a training clip."""
    box = driver.find_element(By.CSS_SELECTOR, "#text textarea")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(Keys.DELETE, text, Keys.TAB)
    driver.find_element(By.CSS_SELECTOR, "#keep").click()
    wait.until(lambda d: "adapt MODEL" in d.find_element(By.CSS_SELECTOR, "#kept").text)


@pytest.mark.long
@pytest.mark.parametrize("screen", SCREENS)
def test_the_page(page, driver, pipe, tmp_path, screen):
    driver.set_window_size(*SCREENS[screen])
    wait = WebDriverWait(driver, 60)

    def text(selector: str) -> str:
        return driver.execute_script(
            "const e = document.querySelector(arguments[0]); return e ? e.textContent : ''",
            selector,
        )

    def give(file: Path, status: str) -> None:
        driver.get(page)
        upload(driver, wait, file)
        wait.until(lambda d: status in text(".status"))

    talk = write_audio(tmp_path / "talk.wav", babble(6.0, 5), 16_000, "pcm_s16le")
    shutil.copy(talk, tmp_path / "said.wav")  # the microphone hears it
    give(talk, "times real time")
    words = pipe(str(talk), return_timestamps="word")
    assert text(".words").split() == words["text"].split()
    driver.execute_script("document.querySelector('.result audio').play()")
    wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, ".words .now"))
    first = text(".words .now")
    wait.until(lambda d: text(".words .now") not in ("", first) or len(words["chunks"]) == 1)
    driver.save_screenshot(str(tmp_path.parent / f"{screen}.png"))
    for kind in ("srt", "txt"):
        driver.find_element(By.CSS_SELECTOR, f"a[download='talk.{kind}']").click()
        wait.until(lambda d, kind=kind: (tmp_path / f"talk.{kind}").exists())
    assert (tmp_path / "talk.txt").read_text().strip() == words["text"].strip()
    assert "-->" in (tmp_path / "talk.srt").read_text()
    correct(driver, wait, "what was really said")
    (example,) = read_source({"path": str(tmp_path / "mine" / "clips.csv")})
    assert example.text == "what was really said"
    assert np.array_equal(load_audio(example.audio), load_audio(talk))
    width = driver.execute_script("return document.documentElement.scrollWidth")
    assert width <= driver.execute_script("return window.innerWidth") + 1
    inside = "const e = document.querySelector('.words'); return e.scrollWidth <= e.clientWidth"
    assert driver.execute_script(inside)
    assert driver.find_element(By.CSS_SELECTOR, ".status").get_attribute("role") == "status"
    driver.get(page)
    wait.until(lambda d: d.find_element(By.CSS_SELECTOR, "#live button")).click()
    speak = "#live .record-button"
    wait.until(lambda d: d.find_element(By.CSS_SELECTOR, speak)).click()
    wait.until(lambda d: text(".status") == "Listening ..." and text(".words").strip())
    broken = tmp_path / "broken.wav"
    broken.write_text("this is no audio")
    give(broken, "Error: broken.wav")


# A page that another program serves: it uploads a file of its own folder to the endpoint.
CALLER = """<!doctype html><title>A page of another origin</title><script>
const say = text => { document.title = text }
async function ask(url) {
  const form = new FormData()
  form.append("model", "tiny")
  form.append("file", await (await fetch("talk.wav")).blob(), "talk.wav")
  const answer = await fetch(url + "/v1/audio/transcriptions", {method: "POST", body: form})
  say("heard: " + (await answer.json()).text)
}
ask(new URLSearchParams(location.search).get("endpoint")).catch(e => say("refused: " + e.message))
</script>"""


@pytest.mark.long
def test_a_page_of_another_origin_calls_the_endpoint(driver, pipe, tmp_path):
    """Where `--cors` names its origin, and not without."""
    talk = write_audio(tmp_path / "talk.wav", babble(2.0, 5), 16_000, "pcm_s16le")
    (tmp_path / "index.html").write_text(CALLER)
    site = ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    )
    Thread(target=site.serve_forever, daemon=True).start()
    origin = f"http://127.0.0.1:{site.server_port}"
    said = {"allowed": "heard: " + pipe(str(talk))["text"], "other": "refused: Failed to fetch"}
    for name, cors in (("allowed", [origin]), ("other", [])):
        running = Running(create_app(pipe, "tiny", cors=cors))
        driver.get(f"{origin}/index.html?endpoint={running.url}")
        WebDriverWait(driver, 60).until(lambda d: d.title.startswith(("heard", "refused")))
        running.stop()
        assert driver.title.strip() == said[name].strip()
    site.shutdown()


def briefly_trained(real_bases: Assets, folder: Path) -> Path:
    """Train the quickstart's character head on the recorded prompts alone, for a minute."""
    stage = "{name: characters, training: {character_loss_weight: 1.0, ctc_loss_weight: 0.0, "
    stage += "decoder_loss_weight: 0.0, decoder_learning_rate: 0.0, learning_rate: 2.0e-3, "
    stage += "max_grad_norm: 4.0, batch_seconds: 64, max_steps: 200, save_steps: 200}}"
    overrides = [f"stages=[{stage}]", f"run.output_dir={folder / 'model'}", "model.tune=false",
                 f"data.train=[{{path: {real_bases.train}}}]",
                 f"data.eval=[{{path: {real_bases.dev}}}]",
                 "training.eval_strategy=no", "training.load_best_model_at_end=false"]  # fmt: skip
    return train(compose_recipe(["+experiments=quickstart", *overrides]))


def through_a_line(manifest: Path, count: int, folder: Path) -> list[dict[str, str]]:
    """Write so many clips of a manifest as they sound through a room and a telephone line."""
    folder.mkdir()
    rng, rows = np.random.default_rng(0), []
    clips = [row for row in read_manifest(manifest) if 1.5 < row["duration"] < 5]
    for i, row in enumerate(clips[:count]):
        samples = telephone(room(load_audio(manifest.parent / row["audio"]), rng))
        audio = write_audio(folder / f"{i}.wav", samples, SAMPLE_RATE, "pcm_s16le")
        rows.append({"audio": str(audio), "text": row["text"]})
    return rows


@pytest.mark.long
def test_corrected_recordings_make_a_better_model(driver, real_bases, tmp_path):
    """Record, correct, adapt: real speech in a room, on the telephone."""
    model = briefly_trained(real_bases, tmp_path)
    heard = through_a_line(real_bases.train, 24, tmp_path / "heard")
    shutil.copy(heard[0]["audio"], tmp_path / "said.wav")
    blocks = demo.build([str(model)], [], folder=tmp_path / "mine")
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, css=demo.CSS)
    wait = WebDriverWait(driver, 120)
    for i, row in enumerate(heard):
        driver.get(url)
        if i == 0:
            record(driver, wait, seconds=6.0)
        else:
            upload(driver, wait, Path(row["audio"]))
        wait.until(lambda d: "times real time" in d.find_element(By.CSS_SELECTOR, "#result").text)
        correct(driver, wait, row["text"])
    blocks.close()
    mine = tmp_path / "mine/clips.csv"
    assert [clip.text for clip in read_source({"path": str(mine)})] == [c["text"] for c in heard]
    unheard = through_a_line(real_bases.dev, 40, tmp_path / "unheard")
    dev = write_manifest(tmp_path / "unheard.jsonl", unheard)
    options = ["--dev", str(dev), "--out", str(tmp_path / "adapted")]
    assert adapt.main([str(model), "--data", str(mine), *options]) == 0
    before, after = (json.loads((tmp_path / f"adapted/{when}0/summary.json").read_text())["wer"]
                     for when in ("before", "after"))  # fmt: skip
    assert after < 0.9 * before, (before, after)
