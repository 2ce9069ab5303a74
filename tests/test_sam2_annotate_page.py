"""The page of mode=annotate in a real Chromium: what a person does there is on disk, pixel by pixel, and trains."""

import io
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
import tiny_training
from PIL import Image

from infer_sam2 import infer
from utils import images
from utils.instances.readers import split_items

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
NUCLEI = ("08151b19806eebd58e5acec7e138dbfbb1761f41a1ab9620466584ecc7d5fada", "0acd2c22")
OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
ENTER, TAB, ESCAPE, BACKSPACE, SHIFT = "\ue007", "\ue004", "\ue00c", "\ue003", "\ue008"  # as WebDriver names keys
IS_OPEN = "picture?.bitmap && picture.ids"
IS_DRAWN = "drawing && !drawing.isUnanswered && !drawIsAsked"
IS_SAVED = "byId('saving').textContent === 'saved'"


class Screen:
    """A person before the page: looks at the screen, moves the mouse, presses keys."""

    def __init__(self, driver):
        self.driver = driver

    def see(self, script: str) -> object:
        return self.driver.execute_script(f"return {script}")

    def wait(self, script: str) -> None:
        """Wait until something is true on the page."""
        end = time.monotonic() + 20
        while not self.see(f"Boolean({script})"):
            assert time.monotonic() < end, f"{script}; the page says: {self.text('message')}"
            time.sleep(0.01)

    def text(self, element_id: str) -> str:
        return self.driver.find_element("id", element_id).text

    def press(self, *keys: str) -> None:
        self.actions().send_keys(*keys).perform()

    def actions(self):
        from selenium.webdriver.common.action_chains import ActionChains

        return ActionChains(self.driver, duration=0)

    def drag(self, *points: tuple[float, float], shift: bool = False) -> None:
        """Press the mouse on the first of some points, CSS px of the window, and let go on the last."""
        actions = self.actions()
        actions.w3c_actions.pointer_action.move_to_location(*map(round, points[0]))
        if shift:
            actions.key_down(SHIFT)
        actions.click_and_hold()
        for point in points[1:]:
            actions.w3c_actions.pointer_action.move_to_location(*map(round, point))
        actions.release()
        if shift:
            actions.key_up(SHIFT)
        actions.perform()

    def on_picture(self, x: float, y: float) -> tuple[float, float]:
        """Find a pixel of the picture, which fills the canvas but for 4 %, in the window."""
        width, height, left, top, wide, high = self.see(
            "(({x, y, width, height}) => [picture.width, picture.height, x, y, width, height])"
            "(canvas.getBoundingClientRect())"
        )
        scale = 0.96 * min(wide / width, high / height)
        return left + wide / 2 + scale * (x + 0.5 - width / 2), top + high / 2 + scale * (y + 0.5 - height / 2)

    def screenshot(self) -> np.ndarray:
        return np.array(Image.open(io.BytesIO(self.driver.get_screenshot_as_png())).convert("RGB"))


def open_browser(folder: Path, *options: str):
    selenium = pytest.importorskip("selenium.webdriver", reason="the page needs selenium (requirements-test.txt)")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("the page needs a browser: install chromium and chromium-driver of your distribution")
    choices = selenium.ChromeOptions()
    choices.binary_location = CHROMIUM
    for option in [*OPTIONS, f"--user-data-dir={folder}", "--window-size=1280,800", *options]:
        choices.add_argument(option)
    return selenium.Chrome(options=choices, service=selenium.ChromeService(DRIVER))


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    driver = open_browser(tmp_path_factory.mktemp("browser"))
    yield Screen(driver)
    driver.quit()


@pytest.fixture
def serve(tmp_path, caplog):
    """Run mode=annotate as its command does while a person, in another thread, uses the page; end it by Ctrl-C."""
    num_runs = 0

    def run(photos: Path, person: Callable[[str], object], *overrides: str) -> object:
        nonlocal num_runs
        num_runs, start = num_runs + 1, len(caplog.messages)
        has_ended = threading.Event()

        def use_page() -> object:
            while not (addresses := [line for line in caplog.messages[start:] if "http://" in line]):
                assert not has_ended.wait(0.01), "the server has ended before it began"
            try:
                return person(addresses[0].split("open ")[1].split()[0])
            finally:
                os.kill(os.getpid(), signal.SIGINT)

        config = tiny.compose_config(
            "infer_sam2", "mode=annotate", f"input={photos}", f"labels={tmp_path / 'engine'}", "device=cpu", *overrides
        )
        with caplog.at_level("INFO", logger="infer_sam2"), ThreadPoolExecutor(1) as threads:
            result = threads.submit(use_page)
            try:
                (tmp_path / f"run_{num_runs}").mkdir()
                infer(config, tmp_path / f"run_{num_runs}")
            finally:
                has_ended.set()
            return result.result()

    return run


def read_record(labels_dir: Path, name: str) -> tuple[list[dict], np.ndarray]:
    """A picture's annotations, and its map."""
    annotations = json.loads((labels_dir / "masks" / f"{name}.json").read_text())["annotations"]
    return annotations, cv2.imread(str(labels_dir / "maps" / f"{name}.png"), cv2.IMREAD_UNCHANGED)


def draw_line(start: tuple[float, float], end: tuple[float, float], hw: tuple[int, int]) -> np.ndarray:
    """The distance of each pixel to a line, px."""
    y, x = np.mgrid[: hw[0], : hw[1]]
    along = np.subtract(end, start)
    share = np.clip(((x - start[0]) * along[0] + (y - start[1]) * along[1]) / (along @ along), 0, 1)
    return np.hypot(x - start[0] - share * along[0], y - start[1] - share * along[1])


@pytest.mark.slow
def test_two_objects_from_clicks_to_training(screen, serve, data_root, tmp_path, monkeypatch):
    nuclei = data_root / "DSB2018" / "stage1_train"
    if not nuclei.is_dir():
        pytest.skip("DATA_ROOT has no DSB2018/stage1_train")
    photos, truths = tmp_path / "photos", []
    photos.mkdir()
    for name in NUCLEI:
        (folder,) = nuclei.glob(f"{name}*")
        shutil.copyfile(next((folder / "images").iterdir()), photos / f"{name[:4]}.png")
        masks = [cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 0 for path in sorted((folder / "masks").iterdir())]
        truths.append(sorted(masks, key=np.sum)[-5:])
    (first, second), hw = truths[0][-3:-1], truths[0][0].shape
    inside = [tuple(np.argwhere(mask).mean(0)[::-1]) for mask in (first, second)]
    labels = tmp_path / "engine"

    def label(address: str) -> None:
        screen.driver.get(address)
        screen.wait(IS_OPEN)
        for number, point in enumerate(inside, 1):
            screen.drag(screen.on_picture(*point))
            screen.wait(IS_DRAWN)
            screen.press(ENTER)
            screen.wait(f"picture.objects.length === {number} && {IS_SAVED}")
        screen.press("d")  # done, and the next one
        screen.wait(f"{IS_OPEN} && wanted === 1")
        x1, y1, x2, y2 = images.mask_to_box(truths[1][-1])
        screen.drag(*(screen.on_picture(x, y) for x, y in ((x1, y1), (x1, y2), (x2 - 1, y2 - 1))))
        screen.wait(IS_DRAWN)
        screen.press(" ")
        screen.wait(f"picture.objects.length === 1 && {IS_SAVED}")

    serve(photos, label)
    before, label_map = read_record(labels, "0815")
    assert [(each["origin"], each["clicks"], each["strokes"]) for each in before] == [("assisted", 1, 0)] * 2
    for number, truth in enumerate((first, second), 1):  # each click was where it was meant to be
        mask = label_map == number
        assert (mask & truth).sum() / (mask | truth).sum() > 0.7
    assert (labels / "done.txt").read_text() == "0815\n"
    box_map = read_record(labels, "0acd")[1] > 0
    assert (box_map & truths[1][-1]).sum() / (box_map | truths[1][-1]).sum() > 0.7

    away = np.array(inside[0]) + (0.0, 0.6 * np.sqrt(first.sum()))  # below the nucleus, at its edge
    across = [np.array(inside[0]) - (60, 0), np.array(inside[0]) + (60, 0)]

    def correct(address: str) -> float:
        """In a server that was started again."""
        screen.driver.get(address + "#1")
        screen.wait(IS_OPEN)
        assert screen.text("objects_title") == "2 objects" and screen.see("byId('done').hidden") is False
        screen.press("s")
        screen.drag(screen.on_picture(*inside[0]))
        screen.wait(IS_DRAWN)
        screen.drag(screen.on_picture(*away), shift=True)
        screen.wait(IS_DRAWN)
        screen.press("e")
        screen.drag(*(screen.on_picture(*point) for point in (across[0], inside[0], across[1])))
        screen.wait(IS_DRAWN)
        radius = screen.see("radius")
        screen.press(ENTER)
        screen.wait(IS_SAVED)
        screen.driver.refresh()
        screen.wait(IS_OPEN)
        assert screen.text("objects_title") == "2 objects"
        return radius

    radius = serve(photos, correct)
    after, corrected_map = read_record(labels, "0815")
    assert [(each["origin"], each["clicks"], each["strokes"]) for each in after] == [
        ("person", 2, 1),
        ("assisted", 1, 0),
    ]
    assert after[1] == before[1] and after[0]["seconds"] > before[0]["seconds"] > 0
    distances = draw_line(*across, hw)
    assert not (corrected_map == 1)[distances <= radius - 1].any() and radius >= 3
    kept = (corrected_map == 1) & first
    assert kept[: int(inside[0][1])].any() and kept[int(inside[0][1]) :].any()  # above and below the stroke
    assert not corrected_map[tuple(np.round(away[::-1]).astype(int))]  # the negative click

    train_items, val_items = split_items("labels", str(photos), "stop", 0.0, 0, labels=str(labels))
    assert {item.name for item in [*train_items, *val_items]} == {"0815", "0acd"} and len(train_items) == 1
    (item,) = [item for item in [*train_items, *val_items] if item.name == "0815"]
    layers = item.read().layers
    assert sorted(int(mask.sum()) for mask in (layers[0] == 1, layers[0] == 2)) == sorted(e["area"] for e in after)
    config = tiny.compose_config(
        "train_sam2", "data=labels", f"data.root={photos}", f"data.labels={labels}", "device=cpu", "num_workers=0",
        "model=sam2_nano", "model.checkpoint=none", "model.image_size=64", "train.steps=1", "train.eval_clicks=[1]",
    )  # fmt: skip
    tiny_training.make_runs_quick(monkeypatch)
    tiny_training.train_in(tmp_path / "trained", config)
    metrics = json.loads((tmp_path / "trained" / "run.json").read_text())["metrics"]
    assert metrics["last"]["val/num_images"] == 1


RANDOM_NANO = ("model=sam2_nano", "model.checkpoint=none", "model.image_size=64")


@pytest.fixture
def dots(tmp_path):
    """A picture of 90 x 60 px, dark but for three pixels: (x, y) of the red, the green and the blue one."""
    places = [(70, 7), (3, 55), (44, 30)]
    image_rgb = np.full((60, 90, 3), 40, np.uint8)
    for channel, (x, y) in enumerate(places):
        image_rgb[y, x] = 255 * np.eye(3, dtype=np.uint8)[channel]
    (tmp_path / "photos").mkdir()
    for name in ("a", "b"):
        images.write_image(tmp_path / "photos" / f"{name}.png", image_rgb)
    return tmp_path / "photos", places


def test_a_mouse_on_a_pixel_marks_that_pixel(screen, serve, dots, tmp_path):
    """As it opens, zoomed, and moved, on a screen of 1.5 px for a CSS px: found on the screen by its colour alone."""
    photos, places = dots
    ratio = 1.5

    def mark(channel: int, share: float) -> None:
        pixels = screen.screenshot().astype(int)
        y, x = np.nonzero((pixels[..., channel] > 230) & (pixels.sum(2) - pixels[..., channel] < 30))
        assert len(x) > 100  # the page shows a pixel as a square
        corner, side = np.array([x.min(), y.min()]), np.array([np.ptp(x), np.ptp(y)]) + 1
        screen.drag(tuple((corner + share * side) / ratio))
        screen.wait(IS_DRAWN)
        screen.press(ENTER)
        screen.wait(f"picture.objects.length === {channel + 1} && {IS_SAVED}")

    def person(address: str) -> None:
        metrics = {"width": 1000, "height": 700, "deviceScaleFactor": ratio, "mobile": False}
        screen.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        screen.driver.get(address)
        screen.wait(IS_OPEN)
        screen.press("b", "[[[[")
        mark(0, 0.15)
        x, y = screen.on_picture(10, 50)
        wheel = {"type": "mouseWheel", "x": x, "y": y, "deltaX": 0, "deltaY": -300}
        screen.driver.execute_cdp_cmd("Input.dispatchMouseEvent", wheel)
        screen.wait("view.scale > 11")
        mark(1, 0.85)
        screen.actions().key_down(" ").perform()
        screen.drag((600, 400), (300, 500), (200, 480))
        screen.actions().key_up(" ").perform()
        screen.wait("!drawIsAsked")
        mark(2, 0.85)

    try:
        serve(photos, person, *RANDOM_NANO)
    finally:
        screen.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    _, label_map = read_record(tmp_path / "engine", "a")
    assert [(x, y) for number in (1, 2, 3) for y, x in np.argwhere(label_map == number)] == places


def test_what_goes_wrong_is_said_and_loses_nothing(screen, serve, dots, tmp_path):
    photos, _ = dots

    def person(address: str) -> None:
        screen.driver.get(address)
        screen.wait(IS_OPEN)
        screen.see(  # the answer to a single click is late
            "void (window.fetch = (answer => async (route, options) => { const late = await answer(route, options); "
            "if (route === 'predict' && JSON.parse(options.body).actions.length === 1) "
            "await new Promise(done => setTimeout(done, 500)); return late; })(fetch))"
        )
        screen.drag(screen.on_picture(20, 20))
        screen.drag(screen.on_picture(60, 20))
        screen.wait(IS_DRAWN)
        assert screen.see("[drawing.actions.length, drawing.num_masks]") == [2, 1]
        time.sleep(0.7)
        assert screen.see("[drawing.actions.length, drawing.num_masks]") == [2, 1]
        screen.press("z")
        screen.wait(f"{IS_DRAWN} && drawing.num_masks === 3")  # of a single click
        best, ious = screen.see("drawing.chosen"), screen.see("drawing.predicted_ious")
        screen.press(TAB)
        assert best == np.argmax(ious) and screen.see("drawing.actions[1].mask") == (best + 1) % 3

        screen.press(ESCAPE, "b")  # an object that is erased again cannot be saved, and is not lost
        screen.drag(screen.on_picture(20, 20), screen.on_picture(30, 20))
        screen.wait(IS_DRAWN)
        screen.press("e", "]]]")
        screen.drag(screen.on_picture(10, 20), screen.on_picture(40, 20))
        screen.wait(IS_DRAWN)
        screen.press(ENTER)
        screen.wait("byId('message').className === 'error'")
        assert "empty" in screen.text("message") and screen.text("saving") == "not saved"
        assert not (tmp_path / "engine" / "masks" / "a.json").exists() and screen.see("drawing.actions.length") == 2
        screen.press("n")  # nothing is left behind
        assert screen.see("wanted") == 0
        screen.press("z", ENTER)
        screen.wait(f"picture.objects.length === 1 && {IS_SAVED} && byId('message').className !== 'error'")
        screen.press("b]]")
        screen.drag(screen.on_picture(18, 20), screen.on_picture(32, 20))
        screen.wait(IS_DRAWN)
        screen.press(ENTER)
        screen.wait("picture.objects.length === 2")
        assert screen.text("message") == "object 2 hides 100% of object 1" == screen.text("warnings")

        (labelling,) = screen.driver.window_handles
        screen.driver.switch_to.new_window("tab")
        screen.driver.get(address)
        screen.wait(IS_OPEN)
        assert screen.text("readonly") == "read-only" and screen.text("objects_title") == "2 objects"
        screen.drag(screen.on_picture(60, 20))
        assert screen.see("drawing === null") and "another tab" in screen.text("message")
        reading = screen.driver.current_window_handle
        screen.driver.switch_to.window(labelling)
        screen.driver.close()
        screen.driver.switch_to.window(reading)
        screen.wait("picture.is_writable")
        screen.press("s")
        screen.drag(screen.on_picture(25, 20))
        screen.wait(IS_DRAWN)
        screen.press(BACKSPACE)
        screen.wait("picture.objects.length === 1")
        screen.press("z")
        screen.wait("picture.objects.length === 2")

    serve(photos, person, *RANDOM_NANO)
    screen.drag(screen.on_picture(60, 20))
    screen.wait("byId('message').className === 'error'")
    assert "does not answer" in screen.text("message") and screen.see("drawing.actions.length") == 1
    assert len(read_record(tmp_path / "engine", "a")[0]) == 2
