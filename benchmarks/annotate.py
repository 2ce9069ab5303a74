"""The page of infer_sam2.py mode=annotate: kills, latency in a real browser, a folder of 2,000 pictures.

    DATA_ROOT=/my/datasets python -m benchmarks.annotate kills [20]
    DATA_ROOT=/my/datasets python -m benchmarks.annotate latency [model=sam2.1_hiera_tiny checkpoint=none ...]
    DATA_ROOT=/my/datasets python -m benchmarks.annotate answers [model=sam2.1_hiera_tiny checkpoint=none ...]
    python -m benchmarks.annotate folder [2000]

kills: a scripted annotator opens pictures, clicks, paints, saves, corrects, deletes, takes back and finishes over HTTP;
the server is killed at a random moment, SIGKILL, and started again. After each kill every record and map is read: no
object that the server had answered for may be missing or changed, no file torn.
latency: Chromium (with selenium) clicks on photographs, pages on, and clicks while the next one is encoded; the times
are those of the page's own log, latency.csv. Further words go to infer_sam2.py.
answers: the server's own share of that, on the chosen device: clicks over HTTP without a browser, the first three of
them on each picture as soon as it is open, while the next one is encoded.
folder: time from the command to the list of all pictures, and the server's memory while all are paged through.
Each prints one JSON line.
"""

import base64
import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from utils.instances import label_folder
from utils.instances.label_edit import place

REPOSITORY = Path(__file__).resolve().parent.parent
START_S = 120  # for a server to start in
SIGNED = ("origin", "class", "area")  # what the page is told of an object and its record has, too


class Server:
    """infer_sam2.py mode=annotate in a process of its own."""

    def __init__(self, folder: Path, *overrides: str):
        command = [sys.executable, "infer_sam2.py", "mode=annotate", f"input={folder / 'photos'}"]
        command += [f"labels={folder / 'engine'}", f"hydra.run.dir={folder / f'run_{time.time_ns()}'}", *overrides]
        self.run_dir = Path(command[-1 - len(overrides)].split("=")[1])
        self.process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        self.address = read_address(self.process.stdout)

    def end(self, number: int) -> None:
        """Send a signal, and wait for the end."""
        self.process.send_signal(number)
        self.process.communicate(timeout=START_S)


def read_address(lines) -> str:
    """Read the page's address from what a server prints."""
    for line in lines:
        if match := re.search(r"open (http://127\.0\.0\.1:\S+)", line):
            return match.group(1)
    raise ValueError("the server ended before it gave its address")


def ask(address: str, route: str, body: dict | None = None) -> bytes:
    """Ask a server as its page does; an error for all but an answer."""
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(address + route, data), timeout=60) as answer:
        return answer.read()


# ---------------------------------------------------------------------------------------------------------------------
# kills


class Annotator:
    """A scripted person, and what the server has answered for."""

    def __init__(self, address: str, seed: int):
        self.address, self.rng = address, np.random.default_rng(seed)
        self.answered: dict[str, list[dict]] = {}  # name of a picture -> its objects
        self.done: dict[str, bool] = {}
        self.history: dict[str, list[list[dict]]] = {}
        self.in_flight: tuple[str, str, dict] | None = None  # name, route, body
        self.num_answers, self.opened = 0, set()

    def work(self) -> None:
        """Annotate until the server is gone."""
        with contextlib.suppress(urllib.error.URLError, OSError, ValueError):  # a kill may cut an answer short
            pictures = json.loads(ask(self.address, "pictures"))["pictures"]
            while True:
                self.annotate(int(self.rng.integers(len(pictures))))

    def annotate(self, number: int) -> None:
        """Do a few things with a picture."""
        opened = json.loads(ask(self.address, "open", {"number": number, "tab": "a"}))
        assert opened["error"] is None and opened["is_writable"], opened
        name = opened["name"]
        if name in self.answered:
            assert sign(opened["objects"]) == self.answered[name], (name, opened["objects"], self.answered[name])
            assert opened["is_done"] == self.done.get(name, opened["is_done"])
        self.answered[name] = sign(opened["objects"])
        self.opened.add(name)
        self.history[name] = []  # a picture that was out of memory has nothing to take back
        for _ in range(int(self.rng.integers(1, 6))):
            self.act(number, name, opened["width"], opened["height"])

    def act(self, number: int, name: str, width: int, height: int) -> None:
        """Do one thing, and note that the server has answered for it."""
        route, body = self.choose(name, width, height)
        body = {"number": number, "tab": "a"} | body
        if route == "save" and body["actions"][-1]["type"] == "click":
            ask(self.address, "predict", {key: body[key] for key in ("number", "tab", "actions")})
        self.in_flight = name, route, body
        try:
            state = json.loads(ask(self.address, route, body))
        except urllib.error.HTTPError as error:
            if error.code != 409:  # an empty mask, or nothing to take back
                raise
        else:
            if route in ("save", "delete"):
                self.history[name].append(self.answered[name])
            if route == "undo" and self.history[name]:
                assert sign(state["objects"]) == self.history[name].pop()
            self.answered[name] = sign(state["objects"])
            self.done[name] = state["is_done"]
            self.num_answers += 1
        self.in_flight = None

    def choose(self, name: str, width: int, height: int) -> tuple[str, dict]:
        """Draw what to do next."""
        kind, num_objects = self.rng.random(), len(self.answered[name])
        points = (self.rng.random((6, 2)) * [width - 1, height - 1]).tolist()
        click = {"type": "click", "x": points[0][0], "y": points[0][1], "label": 1}
        stroke = {"type": "stroke", "erase": False, "radius": max(1.0, width / 60), "points": points}
        saved = {"class": None, "seconds": 1.5}
        if num_objects and kind < 0.2:
            start = {"type": "object", "id": int(self.rng.integers(num_objects)) + 1}
            return "save", saved | {"actions": [start, stroke]}
        if num_objects and kind < 0.35:
            return "delete", {"id": int(self.rng.integers(num_objects)) + 1}
        if self.history[name] and kind < 0.45:
            return "undo", {}
        if kind < 0.55:
            return "done", {"is_done": bool(self.rng.random() < 0.5)}
        return "save", saved | {"actions": [click] if kind < 0.8 else [stroke]}


def sign(objects: list[dict]) -> list[dict]:
    """Keep of objects what the page is told and their record has, too."""
    return [{key: each.get(key) for key in SIGNED} for each in objects]


def check_folder(labels_dir: Path, annotator: Annotator, cut_short: set[str]) -> tuple[int, bool]:
    """Check a folder of labels after its server was killed.

    Args:
        cut_short: pictures whose change was cut short by an earlier kill; this one's is added. Until such a picture is
            opened again, its map may be that of the change.
    Returns:
        how many objects were looked for; whether the kill cut a change short.
    Raises:
        AssertionError: for a torn file, and for an object that the server has answered for and that is not there.
    """
    name_in_flight, route, body = annotator.in_flight or (None, None, {})
    num_objects, done_names = 0, label_folder.read_done(labels_dir)
    for path in [*labels_dir.glob("masks/*"), *labels_dir.glob("maps/*"), *labels_dir.glob("*.txt")]:
        assert path.suffix in (".json", ".png", ".txt") or path.name.endswith(".tmp"), path
    for path in labels_dir.glob("maps/*.png"):
        assert cv2.imread(str(path), cv2.IMREAD_UNCHANGED) is not None, f"{path} is torn"
    for name, answered in annotator.answered.items():
        record = label_folder.read_record(label_folder.record_path(labels_dir, name))  # checks each mask
        placed = [place(annotation) for annotation in record.get("annotations", [])]
        now = sign([each.annotation | {"area": each.area} for each in placed])
        num_objects += len(answered)
        is_same = now == answered
        if name != name_in_flight:
            assert is_same, (name, now, answered)
            assert annotator.done.get(name) in (None, name in done_names), name
            if record and (name in annotator.opened or name not in cut_short):
                orig_hw = record["image"]["height"], record["image"]["width"]
                label_map = cv2.imread(str(labels_dir / "maps" / f"{name}.png"), cv2.IMREAD_UNCHANGED)
                assert np.array_equal(label_map, label_folder.draw_map(record["annotations"], orig_hw)), name
        elif not is_same:  # then the change is there as a whole
            number = body["actions"][0].get("id") if route == "save" else body.get("id")
            if route == "save" and number is None:
                assert now[:-1] == answered, (name, now, answered)
            elif route == "save":
                others = [[each for i, each in enumerate(each_list, 1) if i != number] for each_list in (now, answered)]
                assert others[0] == others[1] and len(now) == len(answered), (name, now, answered)
            elif route == "delete":
                assert now == answered[: number - 1] + answered[number:], (name, now, answered)
            else:
                assert route == "undo" and now == annotator.history[name][-1], (name, route, now, answered)
            annotator.answered[name] = now
    cut_short -= annotator.opened
    cut_short |= {name_in_flight} - {None}
    return num_objects, annotator.in_flight is not None


def kill_servers(
    start: Callable[[], tuple[str, Callable[[], None]]], labels_dir: Path, kills: int, longest_s: float, seed: int
) -> dict:
    """Kill servers under a scripted annotator, and check their folder after each kill.

    Args:
        start: starts a server of the folder: its address, and a function that kills it and waits for its end.
        longest_s: that the annotator works, from the first change on.
    Returns:
        {"kills", "in_flight": kills that cut a request short, "answers": changes that were answered for, "objects":
        looked for, all kills together}.
    """
    rng, counts = np.random.default_rng(seed), {"kills": kills, "in_flight": 0, "answers": 0, "objects": 0}
    answered, done, cut_short = {}, {}, set()
    for kill in range(kills):
        address, end = start()
        annotator = Annotator(address, seed + kill)
        annotator.answered, annotator.done = answered, done
        worker = threading.Thread(target=annotator.work)
        worker.start()
        while annotator.num_answers == 0 and worker.is_alive():
            time.sleep(0.001)
        time.sleep(rng.random() * longest_s)
        assert worker.is_alive(), "the annotator stopped before the kill"
        end()
        worker.join()
        num_objects, is_cut = check_folder(labels_dir, annotator, cut_short)
        if annotator.in_flight is not None:
            done.pop(annotator.in_flight[0], None)  # either way is right
        counts["in_flight"] += is_cut
        counts["objects"] += num_objects
        counts["answers"] += annotator.num_answers
    return counts


def measure_kills(folder: Path, kills: int) -> dict:
    """Kill real servers of the bundled model on photographs, a large one among them."""
    copy_photographs(folder / "photos", 6)
    large = cv2.imread(str(next((folder / "photos").iterdir())))
    cv2.imwrite(str(folder / "photos" / "large.jpg"), cv2.resize(large, (3840, 2160), interpolation=cv2.INTER_CUBIC))

    def start() -> tuple[str, Callable[[], None]]:
        server = Server(folder, "device=cpu")
        return server.address, lambda: server.end(signal.SIGKILL)

    return kill_servers(start, folder / "engine", kills, longest_s=2.0, seed=0)


def copy_photographs(photos: Path, count: int) -> None:
    """Copy photographs of Oxford-IIIT Pet."""
    photos.mkdir()
    source = Path(os.environ["DATA_ROOT"]) / "oxford-iiit-pet" / "images"
    for path in sorted(source.glob("*.jpg"))[:count]:
        shutil.copy(path, photos)


# ---------------------------------------------------------------------------------------------------------------------
# latency


def measure_latency(folder: Path, overrides: list[str]) -> dict:
    """Click on photographs in Chromium; give the 95th percentiles of what the page added to the decoder's time."""
    from selenium import webdriver
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    copy_photographs(folder / "photos", 12)
    server = Server(folder, "device=cpu", *overrides)
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    switches = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    switches += f"disable-component-update disable-sync window-size=1280,800 user-data-dir={folder / 'browser'}"
    for switch in switches.split():
        options.add_argument(f"--{switch}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    rng = np.random.default_rng(0)

    def wait(script: str) -> None:
        end = time.monotonic() + 60
        while not driver.execute_script(f"return Boolean({script})"):
            assert time.monotonic() < end, script
            time.sleep(0.02)

    try:
        driver.get(server.address)
        for number in range(12):
            wait(f"wanted === {number} && picture?.bitmap && picture.ids")
            place = driver.execute_script(
                "const {x, y, width, height} = canvas.getBoundingClientRect(); return [x, y, width, height]"
            )
            for _ in range(4):  # objects
                for _ in range(3):  # clicks, near the middle
                    x, y = (np.array(place[:2]) + np.array(place[2:]) * (0.5 + 0.3 * (rng.random(2) - 0.5))).round()
                    actions = ActionChains(driver, duration=0)
                    actions.w3c_actions.pointer_action.move_to_location(int(x), int(y)).click()
                    actions.perform()
                    wait("drawing && !drawing.isUnanswered && !drawIsAsked")
                ActionChains(driver).send_keys(Keys.ESCAPE).perform()  # drops it
                wait("!drawing")
            ActionChains(driver).send_keys("n").perform()
        time.sleep(4)  # the page sends its log with its next heartbeat
    finally:
        driver.quit()
        server.end(signal.SIGINT)
    with (server.run_dir / "latency.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    result = {"clicks": len(rows)}
    for name, is_encoding in (("idle", "0"), ("encoding", "1")):
        chosen = [row for row in rows if row["is_encoding"] == is_encoding]
        times = np.array([[float(row[key]) for key in ("added_ms", "decoder_ms")] for row in chosen])
        if len(times):
            for share in (50, 95):
                added, decoder = np.percentile(times, share, axis=0).round(1).tolist()
                result |= {f"added_ms_p{share}_{name}": added, f"decoder_ms_p{share}_{name}": decoder}
            result[f"clicks_{name}"] = len(times)
    return result


def measure_answers(folder: Path, overrides: list[str]) -> dict:
    """Click over HTTP; give percentiles of what the server added to the decoder's time, and of that time."""
    count = 12
    copy_photographs(folder / "photos", count)
    server = Server(folder, *overrides)
    rng = np.random.default_rng(0)
    times: dict[str, list[tuple[float, float]]] = {"idle": [], "encoding": []}
    for number in range(count):
        opened = json.loads(ask(server.address, "open", {"number": number, "tab": "a"}))
        size = np.array([opened["width"], opened["height"]])
        for click in range(6):
            x, y = (rng.random(2) * (size - 1)).tolist()
            body = {"number": number, "tab": "a", "actions": [{"type": "click", "x": x, "y": y, "label": 1}]}
            start = time.perf_counter()
            answer = json.loads(ask(server.address, "predict", body))
            added_ms = 1000 * (time.perf_counter() - start) - answer["decoder_ms"]
            if number > 0 or click > 0:  # the first waits for its picture, and for the libraries
                times["encoding" if answer["is_encoding"] else "idle"].append((added_ms, answer["decoder_ms"]))
            if click == 2:
                time.sleep(1.0)  # then the next picture is encoded
        ask(server.address, "release", {"number": number, "tab": "a"})
    server.end(signal.SIGINT)
    result = {}
    for name, rows in times.items():
        result[f"clicks_{name}"] = len(rows)
        for share in (50, 95) if rows else ():
            added, decoder = np.percentile(rows, share, axis=0).round(1).tolist()
            result |= {f"added_ms_p{share}_{name}": added, f"decoder_ms_p{share}_{name}": decoder}
    return result


# ---------------------------------------------------------------------------------------------------------------------
# a large folder


def measure_folder(folder: Path, count: int) -> dict:
    """List a folder of many pictures, then page through it."""
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = cv2.resize(rng.integers(0, 256, (8, 8, 3), np.uint8), (512, 384), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / "photos" / f"{number:05}.jpg"), pixels)
    (folder / "one" / "photos").mkdir(parents=True)
    shutil.copy(folder / "photos" / "00000.jpg", folder / "one" / "photos")
    start = time.perf_counter()
    Server(folder / "one", "device=cpu").end(signal.SIGINT)
    served_one_s = time.perf_counter() - start
    start = time.perf_counter()
    server = Server(folder, "device=cpu")
    served_s = time.perf_counter() - start
    num_listed = len(json.loads(ask(server.address, "pictures"))["pictures"])
    listed_s = time.perf_counter() - start
    ask(server.address, "open", {"number": 0, "tab": "a"})
    ask(server.address, "picture?number=0&side=1024")
    opened_s = time.perf_counter() - start
    memory_mb = {}
    for number in range(count):
        opened = json.loads(ask(server.address, "open", {"number": number, "tab": "a"}))
        ask(server.address, f"picture?number={number}&side=1024")
        click = {"type": "click", "x": opened["width"] / 2, "y": opened["height"] / 2, "label": 1}
        body = {"number": number, "tab": "a", "actions": [click]}
        base64.b64decode(json.loads(ask(server.address, "predict", body))["masks"])
        ask(server.address, "release", {"number": number, "tab": "a"})
        if number + 1 in (20, 50, 100, 200, 500, 1000, 1500, count):
            status = Path(f"/proc/{server.process.pid}/status").read_text()
            memory_mb[number + 1] = round(int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) / 1024)
    paged_s = time.perf_counter() - start - opened_s
    server.end(signal.SIGINT)
    return {
        "pictures": num_listed,
        "served_one_s": round(served_one_s, 2),  # from the command, imports and model included: of one picture
        "served_s": round(served_s, 2),
        "listed_s": round(listed_s, 2),
        "first_picture_s": round(opened_s, 2),
        "paged_s": round(paged_s, 1),
        "memory_mb": memory_mb,
    }


def main() -> None:
    what, *words = sys.argv[1:] or [""]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if what == "kills":
            result = measure_kills(folder, int(words[0]) if words else 20)
        elif what == "latency":
            result = measure_latency(folder, words)
        elif what == "answers":
            result = measure_answers(folder, words)
        elif what == "folder":
            result = measure_folder(folder, int(words[0]) if words else 2000)
        else:
            sys.exit("give kills, latency, answers or folder")
    print(json.dumps({"name": f"annotate {what}"} | result), flush=True)


if __name__ == "__main__":
    main()
