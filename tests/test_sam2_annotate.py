"""mode=annotate: what is refused, who may write, what is on disk when, which masks are shown, ratings, kills."""

import asyncio
import base64
import hashlib
import json
import os
import signal
import time
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.stats
import tifffile
import torch
from options import read_option
from tiny import changed_config, compose_config
from tornado.httpclient import AsyncHTTPClient, HTTPRequest

from benchmarks.annotate import kill_servers
from infer_sam2 import infer
from utils.images import list_pictures, write_image
from utils.instances import label_folder
from utils.instances.codecs import mask_to_rle, rle_to_mask
from utils.instances.readers import list_labels
from utils.run import seed_everything
from utils.sam2 import annotate, served_folder
from utils.sam2 import model as models
from utils.sam2.checked_labels import choose_confident_iou, order_pictures
from utils.sam2.rate import Rating
from utils.sam2.served_folder import AnnotateSettings, ServedFolder

ROOT = Path(__file__).resolve().parent.parent
NANO = read_option("sam2", "model", "sam2_nano") | {"checkpoint": "none", "image_size": 64}
NAMES = ["a", "b", "c d", "é"]
HW = 60, 90


def stroke(x1, y1, x2, y2, radius=4.0, erase=False):
    return {"type": "stroke", "erase": erase, "radius": radius, "points": [[x1, y1], [x2, y2]]}


def click(x, y, label=1):
    return {"type": "click", "x": x, "y": y, "label": label}


def automatic(x, y, side, predicted_iou, hw=HW, **more):
    mask = np.zeros(hw, bool)
    mask[y : y + side, x : x + side] = True
    return {"segmentation": mask_to_rle(mask), "origin": "automatic", "predicted_iou": predicted_iou} | more


def write_record(labels_dir, name, annotations, hw=HW, **more):
    image = {"file_name": f"{name}.png", "height": hw[0], "width": hw[1]}
    annotations = [annotation | {"id": number} for number, annotation in enumerate(annotations, 1)]
    path = label_folder.record_path(labels_dir, name)
    for folder in ("masks", "maps"):
        (labels_dir / folder).mkdir(parents=True, exist_ok=True)
    label_map = label_folder.draw_map(annotations, hw).astype(np.uint16)
    cv2.imwrite(str(labels_dir / "maps" / f"{name}.png"), label_map)
    path.write_text(json.dumps({"image": image, "annotations": annotations, "made_by": "m"} | more))


@pytest.fixture(scope="module")
def model():
    seed_everything(0)
    with torch.inference_mode():
        return models.build_sam2(**NANO, device="cpu", fast_decoder=True)


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for number, name in enumerate(NAMES):
        pixels = np.random.default_rng(number).integers(0, 256, (*HW, 3), np.uint8)
        write_image(tmp_path / "photos" / f"{name}.png", pixels)
    return tmp_path / "photos"


def make_folder(model, photos, confident_iou=None, rating=None, **settings):
    labels_dir = photos.parent / "engine"
    for name in ("masks", "maps"):
        (labels_dir / name).mkdir(parents=True, exist_ok=True)
    pictures = list_pictures(photos)
    label_folder.draw_validation(labels_dir, {picture.name for picture in pictures}, 0.25, 0)
    settings = AnnotateSettings(**settings)
    pictures = order_pictures(pictures, labels_dir, settings.order)
    classes = settings.classes or []
    return ServedFolder(model, pictures, labels_dir, settings, classes, confident_iou, "fp32", rating, photos.parent)


class Client:
    """Asks as the page does."""

    def __init__(self, address):
        self.address, self.port = address, int(address.split(":")[2].split("/")[0])

    async def ask(self, route, method="GET", body=None, **headers):
        text = body if body is None or isinstance(body, (str, bytes)) else json.dumps(body)
        root = f"http://127.0.0.1:{self.port}" if route.startswith("/") else self.address
        request = HTTPRequest(root + route, method, headers, text, allow_nonstandard_methods=True)
        return await AsyncHTTPClient().fetch(request, raise_error=False)

    async def get(self, route):
        return json.loads((await self.ask(route)).body)

    async def post(self, route, number=0, tab="t", **keys):
        answer = await self.ask(route, "POST", {"number": number, "tab": tab} | keys)
        return json.loads(answer.body) if answer.code == 200 else (answer.code, answer.body.decode())

    async def save(self, *actions, number=0, tab="t", class_name=None, seconds=1.0):
        keys = {"actions": list(actions), "class": class_name, "seconds": seconds}
        return await self.post("save", number, tab, **keys)


def serve(folder, scenario):
    """Run a scenario, an async function of a Client, against a server of a folder."""

    async def run():
        server, address = annotate.make_server(folder, None)
        try:
            return await scenario(Client(address))
        finally:
            server.stop()
            await folder.close()
            await server.close_all_connections()

    return asyncio.run(run())


def read_pixels(png):
    data = base64.b64decode(png) if isinstance(png, str) else png
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def read_ids(answer):
    pixels = read_pixels(answer["map"]).astype(int)
    return pixels[..., 2] + 256 * pixels[..., 1]


def read_masks(predicted, hw):
    """Read the masks of an answer, bool (M, H, W): bits of a grey PNG of the part where they are."""
    part, bits = read_pixels(predicted["masks"]), np.zeros(hw, np.uint8)
    assert part.ndim == 2 and part[0].any() and part[-1].any() and part[:, 0].any() and part[:, -1].any()
    left, top = predicted["left"], predicted["top"]
    bits[top : top + part.shape[0], left : left + part.shape[1]] = part
    return np.stack([bits >> number & 1 for number in range(predicted["num_masks"])]).astype(bool)


def read_record(folder, name):
    """Read the record of a picture, having seen that its map is drawn from it."""
    record = json.loads(label_folder.record_path(folder.labels_dir, name).read_text())
    drawn = cv2.imread(str(folder.labels_dir / "maps" / f"{name}.png"), cv2.IMREAD_UNCHANGED)
    expected = np.zeros(drawn.shape, int)
    for number, annotation in enumerate(record["annotations"], 1):
        assert annotation["id"] == number
        expected[rle_to_mask(annotation["segmentation"])] = number
    assert np.array_equal(drawn, expected)
    return record


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(path).encode() + path.read_bytes() for path in files)).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# what comes from outside


def test_what_does_not_come_from_the_page_is_refused_in_one_line(model, photos):
    folder = make_folder(model, photos, classes=["cell"])
    ok = {"number": 0, "tab": "t"}
    draw, save = ok | {"actions": [click(9, 9)]}, ok | {"actions": [click(9, 9)], "class": None, "seconds": 1}
    many = [click(9, 9) | {"type": "stroke", "erase": False, "radius": 1, "points": [[1, 1]] * 100_000}]
    del many[0]["x"], many[0]["y"], many[0]["label"]
    mask = {"type": "mask", "segmentation": mask_to_rle(np.ones((2, 2), bool))}
    requests = [  # status, route, body, headers
        (403, "pictures", None, {"Host": "evil.example"}), (403, "pictures", None, {"Host": "127.0.0.1:1"}),
        (403, "save", save, {"Origin": "http://evil.example"}), (403, "save", save, {"Origin": "null"}),
        (403, "/save", save, {}), (403, "/", None, {}), (403, "/wrong/pictures", None, {}),
        (403, "/favicon.ico", None, {}), (403, "//etc/passwd", None, {}), (404, "../save", save, {}),
        (404, "etc/passwd", None, {}), (404, "annotate.html", None, {}), (404, "save", None, {}),
        (404, "rate", None, {}), (404, "rate", {"item": 0, "rating": 5}, {}),
        (404, "open", ok | {"number": 99}, {}), (404, "open", ok | {"number": -1}, {}), (404, "eval", ok, {}),
        (400, "open", ok | {"number": "../../etc/passwd"}, {}), (400, "open", ok | {"number": 1.5}, {}),
        (400, "open", ok | {"number": True}, {}), (400, "open", ok | {"tab": "x" * 65}, {}),
        (400, "open", ok | {"more": 1}, {}), (400, "open", {"number": 0}, {}), (400, "open", [1], {}),
        (400, "picture?number=../a.png&side=1024", None, {}), (400, "picture?number=0&side=1000", None, {}),
        (400, "picture?number=0", None, {}), (400, "picture?number=0&side=1024&path=/etc/passwd", None, {}),
        (404, "picture?number=4&side=1024", None, {}),
        (400, "predict", ok | {"actions": [mask]}, {}), (400, "predict", ok | {"actions": many}, {}),
        (400, "predict", json.dumps(draw).replace("9", "NaN"), {}),
        (400, "predict", json.dumps(draw).replace("9", "1e999"), {}),
        (400, "predict", json.dumps(draw).replace("9", "9" * 5000), {}), (400, "predict", ok | {"actions": []}, {}),
        (413, "predict", "x" * (annotate.MOST_BODY_BYTES + 1), {}),
        (400, "predict", "[" * 500_000, {}), (400, "predict", b"\xff\xfe", {}), (400, "predict", "", {}),
        (409, "predict", ok | {"actions": [{"type": "object", "id": 1}]}, {}),
        (400, "save", save | {"seconds": -1}, {}), (400, "save", save | {"seconds": 1e300}, {}),
        (400, "save", save | {"class": "unknown"}, {}), (400, "save", save | {"class": ["cell"]}, {}),
        (409, "save", save | {"actions": [stroke(1, 1, 9, 9, erase=True)]}, {}),
        (409, "delete", ok | {"id": 1}, {}), (409, "delete", ok | {"id": 0}, {}), (409, "undo", ok, {}),
        (400, "latency", {"entries": [{}]}, {}), (400, "done", ok | {"is_done": 1}, {}),
    ]  # fmt: skip

    async def scenario(client):
        await client.post("open")
        before = digest(photos.parent)
        for status, route, body, headers in requests:
            answer = await client.ask(route, "GET" if body is None else "POST", body, **headers)
            line = answer.body.decode()
            assert answer.code == status and 5 < len(line) < 250 and line.count("\n") == 1, (route, body, answer, line)
            assert answer.headers["Content-Type"].startswith("text/plain")
        for method in ("PUT", "DELETE", "OPTIONS", "PATCH", "HEAD"):
            answer = await client.ask("save", method, json.dumps(save) if method != "HEAD" else None)
            assert answer.code == 405
        assert digest(photos.parent) == before
        return await client.get("pictures")

    assert [each["name"] for each in serve(folder, scenario)["pictures"]] == NAMES  # it is alive


def test_a_huge_body_and_a_slow_client_are_dropped_and_others_served(model, photos, monkeypatch):
    monkeypatch.setattr(annotate, "BODY_TIMEOUT_S", 0.7)
    monkeypatch.setattr(annotate, "IDLE_TIMEOUT_S", 0.7)
    folder = make_folder(model, photos)

    async def scenario(client):
        path = client.address.split("/", 3)[3]
        head = f"POST /{path}open HTTP/1.1\r\nHost: 127.0.0.1:{client.port}\r\nContent-Length: "
        sent = {"huge": f"{head}{2**31}\r\n\r\n" + "x" * 5000, "slow body": f"{head}500\r\n\r\n{{", "slow head": head}
        streams = {name: await asyncio.open_connection("127.0.0.1", client.port) for name in sent}
        for name, (_, writer) in streams.items():
            writer.write(sent[name].encode())
        assert len((await client.get("pictures"))["pictures"]) == 4  # meanwhile
        start = time.monotonic()
        answers = {name: await asyncio.wait_for(reader.read(), 5) for name, (reader, _) in streams.items()}
        assert time.monotonic() - start < 4
        assert answers["huge"].startswith(b"HTTP/1.1 400") and answers["slow body"] == answers["slow head"] == b""
        for _, writer in streams.values():
            writer.close()
        return await client.get("pictures")

    assert len(serve(folder, scenario)["pictures"]) == 4
    assert list((folder.labels_dir / "masks").iterdir()) == []


def test_a_port_that_is_taken_is_said(model, photos):
    folder = make_folder(model, photos)

    async def scenario(client):
        with pytest.raises(ValueError, match=f"annotate.port is {client.port}, which cannot be used"):
            annotate.make_server(folder, client.port)

    serve(folder, scenario)


def test_the_page_may_run_its_own_script_and_ask_this_server_alone(model, photos):
    folder = make_folder(model, photos)
    answer = serve(folder, lambda client: client.ask(""))
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))
    script = answer.body.decode().split("<script>")[1].split("</script>")[0]
    expected = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["script-src"] == f"'sha256-{expected}'" and policy["frame-ancestors"] == "'none'"
    assert answer.headers["Cache-Control"] == "no-store" and answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer" and "Server" not in answer.headers
    assert not [word for word in ("http://", "https://", "//cdn", "@import") if word in answer.body.decode()]


# ---------------------------------------------------------------------------------------------------------------------
# pictures and masks


def test_pictures_and_masks_are_shown_as_they_are(model, photos):
    write_image(photos / "large.png", np.random.default_rng(9).integers(0, 256, (1200, 1600, 3), np.uint8))
    write_image(photos / "one.png", np.full((1, 1, 3), 77, np.uint8))
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    folder = make_folder(model, photos)
    places = {picture.name: number for number, picture in enumerate(folder.pictures)}

    async def scenario(client):
        shown = {}
        for name in ("a", "large", "one"):
            opened = await client.post("open", places[name])
            pixels = read_pixels((await client.ask(f"picture?number={places[name]}&side=1024")).body)
            actions = [click(opened["width"] / 2 - 0.5, opened["height"] / 2 - 0.5)]
            shown[name] = opened, pixels, await client.post("predict", places[name], actions=actions)
        wide = read_pixels((await client.ask(f"picture?number={places['large']}&side=2048")).body)
        return shown, wide, await client.post("open", places["broken"])

    shown, wide, broken = serve(folder, scenario)
    opened, pixels, predicted = shown["a"]
    assert np.array_equal(pixels[..., ::-1], cv2.imread(str(photos / "a.png"))[..., ::-1])  # lossless
    assert (opened["width"], opened["height"], opened["view_width"], opened["view_height"]) == (90, 60, 90, 60)
    assert opened["is_writable"] and opened["error"] is None and predicted["num_masks"] == 3
    opened, pixels, predicted = shown["large"]
    assert (opened["width"], opened["height"], opened["view_width"], opened["view_height"]) == (1600, 1200, 1024, 768)
    assert pixels.shape == (768, 1024, 3) and read_masks(predicted, (768, 1024)).shape == (3, 768, 1024)
    assert wide.shape == (1200, 1600, 3) and read_ids(opened).shape == (768, 1024)
    assert shown["one"][1].shape == (1, 1, 3) and shown["one"][2]["num_masks"] == 3
    assert broken["width"] == 0 and "broken.png" in broken["error"] and not broken["is_writable"]


def test_few_pictures_are_in_memory_and_a_click_does_not_wait_for_the_next(model, photos, monkeypatch):
    for number in range(5):
        write_image(photos / f"x{number}.png", np.zeros((*HW, 3), np.uint8))
    folder = make_folder(model, photos)
    following = models.preprocess(cv2.imread(str(photos / "b.png"))[..., ::-1], 64)  # after the first picture
    real, encoded, may_go_on = models.encode, [], asyncio.Event()

    def encode(model, images):
        encoded.append(len(encoded))
        if torch.equal(images[0], following):
            while not may_go_on.is_set():
                time.sleep(0.01)
        return real(model, images)

    monkeypatch.setattr(models, "encode", encode)

    async def scenario(client):
        await client.post("open", 0)
        while len(encoded) < 2:
            await asyncio.sleep(0.01)
        predicted = await client.post("predict", 0, actions=[click(9, 9)])
        assert predicted["is_encoding"] and predicted["num_masks"] == 3
        may_go_on.set()
        for number in range(1, 9):
            await client.post("open", number)
            assert (await client.post("predict", number, actions=[click(9, 9)]))["num_masks"] == 3
        assert len(folder.prepared) <= 3 and len(folder.edited) <= 3 and set(folder.prepared) <= {6, 7, 8}
        assert (await client.post("predict", 0, actions=[click(9, 9)]))["num_masks"] == 3  # which is encoded again

    serve(folder, scenario)
    assert len(encoded) == 10  # each once, and the first again


def test_what_other_tabs_displace_is_prepared_again(model, photos):
    folder = make_folder(model, photos)

    async def scenario(client):
        asked = [client.post("predict", number % 4, actions=[click(9, 9)]) for number in range(16)]
        saved = [client.save(stroke(9, 9, 30, 9 + number), number=number % 4) for number in range(16)]
        return await asyncio.gather(*asked, *saved)

    answers = serve(folder, scenario)
    assert all(isinstance(answer, dict) for answer in answers), answers
    assert [len(read_record(folder, name)["annotations"]) for name in NAMES] == [4, 4, 4, 4]


# ---------------------------------------------------------------------------------------------------------------------
# what is on disk


def test_each_change_is_on_disk_before_it_is_answered_and_can_be_taken_back(model, photos):
    labels_dir = photos.parent / "engine"
    write_record(labels_dir, "a", [automatic(5, 5, 20, 0.7), automatic(10, 10, 30, 0.8)])
    (labels_dir / "rounds.csv").write_text("round,pictures\n1,4\n2,4\n")
    folder = make_folder(model, photos, classes=["cell", "dirt"])
    records, states = [], []

    async def scenario(client):
        async def note(answer):
            states.append(answer)
            records.append(read_record(folder, "a"))
            assert len(answer["objects"]) == len(records[-1]["annotations"])
            assert np.array_equal(read_ids(answer), label_folder.draw_map(records[-1]["annotations"], HW))

        opened = await client.post("open")
        assert [each["origin"] for each in opened["objects"]] == ["automatic"] * 2 and not opened["can_undo"]
        await note(await client.save(stroke(70, 5, 70, 50), class_name="cell", seconds=3.5))
        await note(await client.save({"type": "object", "id": 1}, stroke(5, 40, 5, 50), seconds=2))
        await note(await client.save({"type": "object", "id": 3}, stroke(70, 5, 70, 9, erase=True), seconds=1))
        await note(await client.post("delete", id=2))
        await note(await client.post("set_class", id=1, **{"class": "dirt"}))
        for _ in range(5):
            await note(await client.post("undo"))
        assert (await client.post("undo"))[0] == 409

    serve(folder, scenario)
    first, corrected, again, deleted, classed, *undone = [record["annotations"] for record in records]
    drawn = first[2]
    assert (drawn["origin"], drawn["class"], drawn["strokes"], drawn["clicks"]) == ("person", "cell", 1, 0)
    assert (drawn["seconds"], drawn["round"], "predicted_iou" in drawn) == (3.5, 3, False)
    mask = rle_to_mask(drawn["segmentation"])
    assert drawn["area"] == mask.sum() and mask[5:50, 68:73].all() and not mask[:, :60].any()
    assert corrected[0]["origin"] == "person" and records[1]["rejected"] == [0.7]  # in its place
    before = rle_to_mask(first[0]["segmentation"])
    assert np.array_equal(rle_to_mask(corrected[0]["segmentation"]) & before, before)
    assert (again[2]["strokes"], again[2]["seconds"], "class" in again[2]) == (2, 4.5, False)  # what it took adds up
    assert [each["segmentation"] for each in deleted] == [again[0]["segmentation"], again[2]["segmentation"]]
    assert records[3]["rejected"] == [0.7, 0.8] and records[3]["made_by"] == "m"
    assert classed[0]["class"] == "dirt"
    assert [json.dumps(each) for each in undone[:4]] == [
        json.dumps(each) for each in (deleted, again, corrected, first)
    ]
    assert len(undone[4]) == 2 and "rejected" not in records[9] and undone[4][0]["origin"] == "automatic"


def test_clicks_are_recorded(model, photos):
    folder = make_folder(model, photos)

    async def scenario(client):
        opened = [stroke(40, 20, 60, 40, 12), click(50, 30), click(2, 2, 0)]
        predicted = await client.post("predict", actions=opened)
        saved = await client.save(*opened)
        box = {"type": "box", "x1": 3, "y1": 3, "x2": 60, "y2": 50}
        empty = await client.post("predict", actions=[click(2, 2, 0)])
        await client.save(box, number=2)
        return predicted, saved, empty

    predicted, saved, empty = serve(folder, scenario)
    assert read_pixels(empty["masks"]).tolist() == [[0]] and (empty["left"], empty["top"]) == (0, 0)
    (annotation,) = read_record(folder, "a")["annotations"]
    assert (annotation["clicks"], annotation["strokes"], annotation["origin"]) == (2, 1, "person")
    assert annotation["predicted_iou"] == pytest.approx(predicted["predicted_ious"][0])
    assert np.array_equal(read_masks(predicted, HW)[0], rle_to_mask(annotation["segmentation"]))
    assert saved["objects"][0]["area"] == annotation["area"] and annotation["round"] == 1
    (annotation,) = read_record(folder, "c d")["annotations"]
    assert (annotation["clicks"], annotation["strokes"], annotation["origin"]) == (1, 0, "assisted")


def test_one_tab_writes_and_others_read(model, photos, monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr(served_folder, "clock_s", lambda: now_s[0])
    folder = make_folder(model, photos)

    async def scenario(client):
        assert (await client.post("open", tab="one"))["is_writable"]
        assert not (await client.post("open", tab="two"))["is_writable"]
        assert (await client.post("open", 1, tab="two"))["is_writable"]  # another picture
        status, line = await client.save(stroke(1, 1, 9, 9), tab="two")
        assert status == 409 and "another tab" in line
        for route, keys in (("delete", {"id": 1}), ("undo", {}), ("done", {"is_done": True})):
            assert (await client.post(route, tab="two", **keys))[0] == 409
        assert (await client.post("release", tab="two")) == {}  # has nothing to release
        for _ in range(3):
            now_s[0] += 9
            assert (await client.post("heartbeat", tab="one")) == {"is_writable": True}
            assert (await client.post("heartbeat", tab="two")) == {"is_writable": False}
        assert not (await client.post("open", tab="two"))["is_writable"]
        now_s[0] += 11
        assert (await client.post("heartbeat", tab="one")) == {"is_writable": True}  # late, but nobody else came
        now_s[0] += 11
        assert (await client.post("open", tab="two"))["is_writable"]  # the first was not heard of
        assert (await client.save(stroke(1, 1, 9, 9), tab="one"))[0] == 409
        assert (await client.post("heartbeat", tab="one")) == {"is_writable": False}
        await client.post("release", tab="two")
        assert (await client.post("open", tab="one"))["is_writable"]
        return await client.save(stroke(1, 1, 9, 9), tab="one")

    assert len(serve(folder, scenario)["objects"]) == 1
    with label_folder.open_folder(folder.labels_dir), pytest.raises(ValueError, match="another process"):
        with label_folder.open_folder(folder.labels_dir):
            pass


def test_what_cannot_be_written_is_not_said_to_be_saved(model, photos, monkeypatch):
    folder = make_folder(model, photos)
    real = label_folder.write_json

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    async def scenario(client):
        await client.save(stroke(1, 1, 9, 9))
        monkeypatch.setattr(label_folder, "write_json", fail)
        status, line = await client.save(stroke(30, 1, 30, 9))
        assert status == 500 and line.startswith("not saved") and "No space" in line and line.count("\n") == 1
        assert (await client.post("done", is_done=True))[0] == 500
        monkeypatch.setattr(label_folder, "write_json", real)
        opened = await client.post("open")
        assert len(opened["objects"]) == 1 and not opened["is_done"]
        return await client.save(stroke(30, 1, 30, 9))

    assert len(serve(folder, scenario)["objects"]) == 2
    assert len(read_record(folder, "a")["annotations"]) == 2


def test_records_that_are_none_and_of_other_sizes_are_left_alone(model, photos):
    labels_dir = photos.parent / "engine"
    write_record(labels_dir, "a", [automatic(1, 1, 5, 0.9, (50, 50))], (50, 50))
    (labels_dir / "masks" / "b.json").write_text("my notes")
    folder = make_folder(model, photos)
    before = digest(labels_dir)

    async def scenario(client):
        for number, words in ((0, "[50, 50] px (height, width)"), (1, "b.json")):
            opened = await client.post("open", number)
            assert words in opened["error"] and "\n" not in opened["error"] and not opened["is_writable"]
            assert (await client.save(stroke(1, 1, 9, 9), number=number))[0] == 409
            assert (await client.post("done", number, is_done=True))[0] == 409

    serve(folder, scenario)
    assert digest(labels_dir) == before


def test_what_other_programs_write_beside_masks_does_no_harm(model, photos):
    labels_dir = photos.parent / "engine"
    strange = [
        {"origin": 5, "predicted_iou": "good", "class": ["x"]},
        {"predicted_iou": float("nan"), "clicks": "many"},
    ]
    segmentation = automatic(5, 5, 20, 0.5)["segmentation"]
    write_record(labels_dir, "a", [{"segmentation": segmentation} | keys for keys in strange], rejected=["x", None])
    label_folder.write_done(labels_dir, {"a"})
    assert choose_confident_iou(labels_dir) == (0.9, 0)
    assert order_pictures(list_pictures(photos), labels_dir, "uncertain")[0].name == "a"
    folder = make_folder(model, photos)

    async def scenario(client):
        opened = await client.post("open")
        for number in (1, 2):
            correction = {"type": "object", "id": number}
            assert (await client.post("predict", actions=[correction]))["predicted_ious"] == [None]
            await client.save(correction, stroke(50, 50, 50, 55))
        return opened

    for each in serve(folder, scenario)["objects"]:
        assert (each["origin"], each["class"], each["predicted_iou"]) == (None, None, None)
    assert [each["strokes"] for each in read_record(folder, "a")["annotations"]] == [1, 1]


def test_finished_pictures_and_what_was_checked(model, photos):
    labels_dir = photos.parent / "engine"
    write_record(labels_dir, "a", [automatic(5, 5, 9, 0.7), automatic(30, 10, 9, 0.8), automatic(50, 10, 9, 0.6)])
    folder = make_folder(model, photos)

    async def scenario(client):
        await client.post("open")
        await client.post("delete", id=1)
        assert (await client.post("done", is_done=True))["is_done"]
        finished = read_record(folder, "a")
        assert (labels_dir / "done.txt").read_text() == "a\n"
        undone = await client.post("undo")  # also in a finished picture
        assert [each["predicted_iou"] for each in undone["objects"]] == [0.7, 0.8, 0.6] and undone["is_done"]
        assert [each.get("checked") for each in read_record(folder, "a")["annotations"]] == [True] * 3
        assert [each["is_done"] for each in (await client.get("pictures"))["pictures"]] == [True, False, False, False]
        await client.save(stroke(1, 1, 9, 9), number=1)
        await client.post("done", 1, is_done=True)
        await client.post("done", is_done=False)
        return finished

    finished = serve(folder, scenario)
    assert [each.get("checked") for each in finished["annotations"]] == [True, True] and finished["rejected"] == [0.7]
    assert not [each for each in read_record(folder, "a")["annotations"] if "checked" in each]
    assert (labels_dir / "done.txt").read_text() == "b\n"
    assert "checked" not in read_record(folder, "b")["annotations"][0]  # a person's
    (labels_dir / "val.txt").write_text("b\n")
    train_items, val_items = list_labels(photos, str(labels_dir))
    assert [item.name for item in train_items] == ["a"] and [item.name for item in val_items] == ["b"]


def test_three_hundred_masks(model, photos):
    labels_dir = photos.parent / "engine"
    rng = np.random.default_rng(4)
    masks = [automatic(*rng.integers(0, (80, 50)).tolist(), 12, 0.9) for _ in range(300)]
    write_record(labels_dir, "a", masks)
    folder = make_folder(model, photos)

    async def scenario(client):
        opened = await client.post("open")
        return opened, await client.save(stroke(2, 2, 80, 50)), await client.post("delete", id=299)

    opened, saved, deleted = serve(folder, scenario)
    assert [len(each["objects"]) for each in (opened, saved, deleted)] == [300, 301, 300]
    assert read_ids(saved).max() == 301 and read_ids(opened)[saved_of(saved, 301)].max() <= 300
    assert len(opened["warnings"]) > 10
    assert len(read_record(folder, "a")["annotations"]) == 300


def saved_of(answer, number):
    return read_ids(answer) == number


# ---------------------------------------------------------------------------------------------------------------------
# stages and orders


def test_confident_iou_is_where_nine_of_ten_were_left_as_they_were(tmp_path):
    (tmp_path / "masks").mkdir()
    rng = np.random.default_rng(0)
    for case in range(12):
        num_checked = int(rng.integers(20, 60))
        scores = rng.random(num_checked).round(2)  # some are equal
        is_good = rng.random(num_checked) < 0.6 + 0.5 * scores
        per_picture = np.array_split(np.arange(num_checked), 3)
        for number, places in enumerate(per_picture):
            good = [automatic(1, 1, 5, float(scores[i]), checked=True) for i in places if is_good[i]]
            people = {"segmentation": good[0]["segmentation"], "origin": "assisted", "predicted_iou": 0.01}
            bad = [float(scores[i]) for i in places if not is_good[i]]
            write_record(tmp_path, f"p{number}", [*good, people], rejected=bad)
        write_record(tmp_path, "unfinished", [automatic(1, 1, 5, 0.0)] * 50, rejected=[0.99] * 50)
        label_folder.write_done(tmp_path, {"p0", "p1", "p2", "gone"})
        expected = 1.0
        for threshold in sorted(set(scores.tolist())):
            above = is_good[scores >= threshold]
            if above.mean() >= 0.9:
                expected = threshold
                break
        assert choose_confident_iou(tmp_path) == (expected, num_checked), case
    label_folder.write_done(tmp_path, {"p0"})
    assert choose_confident_iou(tmp_path)[0] == 0.9  # fewer than 20


def test_the_semi_automatic_stage_shows_confident_masks_and_leaves_out_others(model, photos):
    labels_dir = photos.parent / "engine"
    masks = [automatic(5, 5, 9, 0.7), automatic(30, 10, 9, 0.8), automatic(50, 10, 9, 0.75)]
    masks += [automatic(60, 30, 9, 0.1, checked=True), automatic(5, 30, 9, 0.1) | {"origin": "assisted"}]
    write_record(labels_dir, "a", masks)
    folder = make_folder(model, photos, 0.75, stage="semi")
    before = digest(labels_dir)

    async def scenario(client):
        listed, opened = await client.get("pictures"), await client.post("open")
        assert listed["stage"] == "semi" and listed["confident_iou"] == 0.75
        assert [each["predicted_iou"] for each in opened["objects"]] == [0.8, 0.75, 0.1, 0.1]
        assert digest(labels_dir) == before  # looking changes nothing
        return await client.post("set_class", id=1, **{"class": None})

    serve(folder, scenario)
    record = read_record(folder, "a")
    assert [each["predicted_iou"] for each in record["annotations"]] == [0.8, 0.75, 0.1, 0.1]
    assert "rejected" not in record  # nobody has looked at them


def test_uncertain_pictures_come_first(photos):
    labels_dir, pictures = photos.parent / "engine", list_pictures(photos)
    write_record(labels_dir, "b", [automatic(5, 5, 9, 0.7), automatic(9, 9, 9, 0.9)])
    write_record(labels_dir, "é", [automatic(5, 5, 9, 0.75), automatic(9, 9, 9, 0.1) | {"origin": "person"}])
    write_record(labels_dir, "a", [])
    for order, expected in (("name", NAMES), ("uncertain", ["é", "b", "a", "c d"])):
        assert [each.name for each in order_pictures(pictures, labels_dir, order)] == expected


# ---------------------------------------------------------------------------------------------------------------------
# ratings


def test_masks_are_rated_without_saying_whose_they_are(photos):
    results = [str(photos.parent / name) for name in ("first", "second")]
    labels_dir = photos.parent / "engine"
    labels_dir.mkdir()
    for folder, count in zip(results, (6, 9), strict=True):
        for name in NAMES[:3]:
            write_record(Path(folder), name, [automatic(3 * i, 2 * i, 12, 0.9) for i in range(count)])
    write_record(Path(results[0]), "not among the pictures", [automatic(1, 1, 5, 0.9)])
    asked, given = [], {folder: [] for folder in results}
    rng = np.random.default_rng(5)

    def rate(count):
        pictures = list_pictures(photos)
        rating = Rating(results, pictures, labels_dir, seed=3)
        folder = make_folder(None, photos, rating=rating, stage="rate")

        async def scenario(client):
            shown = await client.get("rate")
            for _ in range(count):
                assert "first" not in json.dumps(shown) and "second" not in json.dumps(shown)
                mask = rating.masks[shown["item"]]
                record = json.loads(label_folder.record_path(Path(mask.results), shown["name"]).read_text())
                assert np.array_equal(read_ids(shown), rle_to_mask(record["annotations"][mask.place]["segmentation"]))
                asked.append(mask)
                mark = int(rng.integers(1, 11))
                for item, wrong in ((shown["item"], 11), (shown["item"], 0), (shown["item"] + 1, 5)):
                    body = {"item": item, "rating": wrong}
                    assert (await client.ask("rate", "POST", body)).code in (400, 409)
                answer = await client.ask("rate", "POST", {"item": shown["item"], "rating": mark})
                given[mask.results].append(mark)
                assert len((labels_dir / "ratings.csv").read_text().splitlines()) == 1 + len(asked)
                shown = json.loads(answer.body)
                assert shown["num_left"] == 45 - len(asked) and shown["num_items"] == 45
            assert (await client.ask("save", "POST", {})).code == 404
            return shown

        return serve(folder, scenario), folder.summarise()

    shown, _ = rate(20)
    assert shown["item"] is not None
    shown, summary = rate(25)  # goes on
    assert shown["item"] is None and len(set(asked)) == 45
    switches = np.diff([results.index(mask.results) for mask in asked])
    assert np.count_nonzero(switches) > 10  # both folders, mixed
    for folder, marks in given.items():
        low, high = scipy.stats.ttest_1samp(marks, 0).confidence_interval(0.95)
        measured = [summary[f"{folder}/{name}"] for name in ("mean", "low", "high", "masks")]
        assert measured == pytest.approx([np.mean(marks), low, high, len(marks)])
    (labels_dir / "ratings.csv").write_text("results,picture,id,rating\nelsewhere,a,1,5\n")
    with pytest.raises(ValueError, match="ratings.csv has elsewhere, a, 1, 5"):
        Rating(results, list_pictures(photos), labels_dir, 3)


def test_names_with_accents_of_their_own_are_met_and_what_is_no_record_is_said(photos):
    decomposed = unicodedata.normalize("NFD", "é")  # as macOS writes names
    (photos / "é.png").rename(photos / f"{decomposed}.png")
    results = [str(photos.parent / name) for name in ("first", "second")]
    for folder in (*results, photos.parent / "engine"):
        write_record(Path(folder), decomposed, [automatic(1, 1, 5, 0.9)])
    pictures = list_pictures(photos)
    rating = Rating(results, pictures, photos.parent / "engine", 0)
    assert len(rating.masks) == 2 and rating.read_mask(1).sum() == 25
    listed = make_folder(None, photos).list_all()["pictures"]
    assert [each["name"] for each in listed if each["has_labels"]] == [decomposed]
    label_folder.record_path(Path(results[0]), "a").write_text('{"exposure": 3}')  # of a camera's software
    with pytest.raises(ValueError, match="a.json is no record of masks"):
        Rating(results, pictures, photos.parent / "engine", 0)


# ---------------------------------------------------------------------------------------------------------------------
# the command


def test_what_the_command_serves_and_what_it_measures(model, photos, monkeypatch, caplog):
    labels_dir = photos.parent / "engine"
    with label_folder.open_folder(labels_dir):
        pass
    pages = [np.zeros((*HW, 3), np.uint8)] * 2
    tifffile.imwrite(photos / "pages.tif", np.stack(pages), photometric="rgb")
    served = []

    async def serve(folder, port):
        served.append(folder)
        for times in ([30, 10, 0], [50, 20, 5], [70, 10, 0]):
            keys = dict(zip(("total_ms", "decoder_ms", "waited_ms"), times, strict=True))
            folder.note_latency([keys | {"number": 2, "is_encoding": times[0] == 70}])

    monkeypatch.setattr(annotate, "serve", serve)

    def run(**settings):
        with caplog.at_level("INFO"):
            return annotate.annotate_pictures(
                model, list_pictures(photos), labels_dir, AnnotateSettings(**settings), ["of the checkpoint"], 0.25,
                None, 0, "fp32", photos.parent,
            )  # fmt: skip

    measured = run()
    expected = {"clicks_idle": 2, "added_ms_p95_idle": np.percentile([20, 25], 95), "decoder_ms_p95_idle": 19.5}
    expected |= {"clicks_encoding": 1, "added_ms_p95_encoding": 60, "decoder_ms_p95_encoding": 10}
    assert measured == pytest.approx(expected)
    rows = (photos.parent / "latency.csv").read_text().splitlines()
    assert rows[0] == "picture,total_ms,decoder_ms,waited_ms,added_ms,is_encoding"
    assert rows[1:] == ["c d,30.0,10.0,0.0,20.0,0", "c d,50.0,20.0,5.0,25.0,0", "c d,70.0,10.0,0.0,60.0,1"]
    assert served[0].classes == ["of the checkpoint"] and served[0].confident_iou is None
    assert [picture.name for picture in served[0].pictures] == NAMES and "2 pages are left out" in caplog.text
    assert len((labels_dir / "val.txt").read_text().splitlines()) == 1
    run(stage="semi", classes=["mine"])
    assert served[1].classes == ["mine"] and served[1].confident_iou == 0.9 and "IoU of 0.900 and more" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["labels=x"], "mode=annotate needs input="),
        (["input=."], "mode=annotate needs labels="),
        (["input=.", "labels=x", "annotate.stage=rate"], "needs 'results="),
        (["input=.", "labels=x", "results=[a,b]"], "results= is given but annotate.stage is assisted"),
        (["input=.", "labels=x", "annotate.confident_iou=0.5"], "annotate.confident_iou= is given but"),
        (["input=.", "labels=x", "annotate.stage=rate", "results=[a,b]", "checkpoint=y"], "checkpoint= is given but"),
        (["input=.", "labels=x", "annotate.port=0"], "annotate.port is 0"),
        (["input=.", "labels=x", "annotate.stage=other"], "annotate.stage is other"),
        (["input=.", "labels=x", "annotate.order=size"], "annotate.order is size"),
        (["input=.", "labels=x", "automatic.min_area=5"], "automatic.min_area= is given but mode is annotate"),
        (["input=.", "labels=x", "annotate.classes=[a,a]"], "annotate.classes is"),
        (["input=nowhere", "labels=x"], "input nowhere does not exist"),
    ],
)
def test_what_is_missing_or_not_used_is_said_before_anything_is_written(overrides, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = compose_config("infer_sam2", "mode=annotate")
    for change in overrides:
        config = changed_config(config, change)
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        infer(config, tmp_path / "run")
    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_killed_servers_lose_nothing_that_they_have_answered_for(model, photos):
    labels_dir = photos.parent / "engine"
    write_record(labels_dir, "a", [automatic(5, 5, 20, 0.7), automatic(10, 10, 30, 0.8)])

    async def serve_on(write_end):
        _, address = annotate.make_server(make_folder(model, photos), None)
        os.write(write_end, address.encode())
        await asyncio.Event().wait()

    def start():
        read_end, write_end = os.pipe()
        process = os.fork()  # a new process would import torch, which takes seconds
        if process == 0:
            try:
                torch.set_num_threads(1)
                with label_folder.open_folder(labels_dir):  # whose lock ends with each of them
                    asyncio.run(serve_on(write_end))
            finally:
                os._exit(1)
        os.close(write_end)
        address = os.read(read_end, 200).decode()
        os.close(read_end)

        def end():
            os.kill(process, signal.SIGKILL)
            assert os.waitpid(process, 0)[1] == signal.SIGKILL

        return address, end

    counts = kill_servers(start, labels_dir, kills=4, longest_s=0.3, seed=1)
    assert counts["kills"] == 4 and counts["answers"] >= 4 and counts["objects"] > 0, counts


def test_a_map_that_a_kill_has_left_behind_is_drawn_again(model, photos):
    labels_dir = photos.parent / "engine"
    write_record(labels_dir, "a", [automatic(5, 5, 20, 0.7)])
    map_path = labels_dir / "maps" / "a.png"
    cv2.imwrite(str(map_path), np.zeros(HW, np.uint16))
    os.utime(map_path, ns=(0, label_folder.record_path(labels_dir, "a").stat().st_mtime_ns + 10**6))
    folder = make_folder(model, photos)
    serve(folder, lambda client: client.post("open"))
    assert len(read_record(folder, "a")["annotations"]) == 1
    map_path.unlink()
    serve(make_folder(model, photos), lambda client: client.post("open"))
    assert len(read_record(folder, "a")["annotations"]) == 1
