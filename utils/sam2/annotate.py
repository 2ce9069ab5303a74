"""mode=annotate: a local page on which a person labels pictures with the model's help, into a folder of labels.

The page is annotate.html beside this file; what it asks and is answered, below its secret address, in json:

    GET   pictures, picture?number=N&side=S, rate
    POST  open, predict, save, delete, set_class, undo, done, heartbeat, release, latency, rate

An unfinished object is with the page alone, as its list of actions (utils/sam2/interactive.py); a finished one is on
disk before it is answered for. The folder of labels is utils/instances/label_folder.py's. Everything from outside is
checked here, and refused in one line; pictures are asked for by their number, never by a path.

Source: Kirillov et al. 2023 (Segment Anything), section 4 (assisted and semi-automatic stage), appendix E (rating).
"""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import re
import secrets
import signal
import socket
from pathlib import Path

import torch
import tornado.httpserver
import tornado.netutil
import tornado.web

from utils import images
from utils.instances import label_folder
from utils.sam2.checked_labels import choose_confident_iou, order_pictures
from utils.sam2.rate import Rating
from utils.sam2.served_folder import AnnotateSettings, Refusal, ServedFolder
from utils.settings import is_number

log = logging.getLogger("infer_sam2")
PAGE = Path(__file__).with_suffix(".html")
MOST_BODY_BYTES, BODY_TIMEOUT_S, IDLE_TIMEOUT_S = 2**20, 10, 60
SIDES = (1024, 2048, 4096)  # px, longest side of a picture that the page may ask for
MOST_SECONDS, MOST_ENTRIES = 1e6, 1000  # of one object; of one message about latency


def annotate_pictures(
    model: torch.nn.Module | None,
    pictures: list[images.Picture],
    labels_dir: Path,
    settings: AnnotateSettings,
    class_names: list[str],
    val_fraction: float,
    results: list[str] | None,
    seed: int,
    precision: str,
    run_dir: Path,
) -> dict[str, float]:
    """Serve the page until Ctrl-C.

    Args:
        model: in eval mode; None for stage=rate.
        labels_dir: a folder of labels, opened for writing.
        class_names: of the checkpoint, used where settings have none.
        val_fraction: of the pictures, that validate, where that was not drawn before.
        results: stage=rate: two folders of masks.
    Returns:
        what was measured, for run.json.
    """
    pages = [picture for picture in pictures if picture.page is not None]
    if pages:
        log.info(f"{len(pages)} pages are left out, such as {pages[0]}: a dataset has none; save them as files")
    pictures = [picture for picture in pictures if picture.page is None]
    if not pictures:
        raise ValueError("input has no picture but pages of files of several; save them as files of their own")
    if settings.stage != "rate":
        label_folder.check_names(labels_dir, pictures)
        label_folder.draw_validation(labels_dir, {picture.name for picture in pictures}, val_fraction, seed)
    confident_iou = settings.confident_iou if settings.stage == "semi" else None
    if settings.stage == "semi" and confident_iou is None:
        confident_iou, num_checked = choose_confident_iou(labels_dir)
        log.info(
            f"automatic masks of a predicted IoU of {confident_iou:.3f} and more are shown ({num_checked} checked)"
        )
    classes = class_names if settings.classes is None else settings.classes
    pictures = order_pictures(pictures, labels_dir, settings.order)
    rating = Rating(results, pictures, labels_dir, seed) if settings.stage == "rate" else None
    folder = ServedFolder(model, pictures, labels_dir, settings, classes, confident_iou, precision, rating, run_dir)
    asyncio.run(serve(folder, settings.port))
    return folder.summarise()


# ---------------------------------------------------------------------------------------------------------------------
# what comes in over HTTP


class Page(tornado.web.RequestHandler):
    """Every request: checked, answered in json, or refused in one line of plain text."""

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        for name, value in self.settings["headers"].items():
            self.set_header(name, value)

    def prepare(self) -> None:
        """Refuse who does not come from this page on this machine."""
        allowed = [f"{name}:{self.settings['port']}" for name in ("127.0.0.1", "localhost")]
        host, origin = self.request.headers.get("Host", ""), self.request.headers.get("Origin")
        if host not in allowed:
            raise Refusal(403, f"the page is at {allowed[0]} alone; a tunnel must have the same port at its other end")
        if origin is not None and origin != f"http://{host}":
            raise Refusal(403, "asked for by another page")
        token, _, self.route = self.request.path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode(), self.settings["token"].encode()):
            raise Refusal(403, "the address lacks its secret part; take the one that the server has printed")

    async def get(self) -> None:
        """Answer what does not change anything."""
        folder: ServedFolder = self.settings["folder"]
        if self.route == "" and self.request.path.endswith("/"):
            self.set_header("Content-Type", "text/html; charset=utf-8")
            self.write(self.settings["page"])
        elif self.route == "pictures":
            self.answer(folder.list_all())
        elif self.route == "rate" and folder.rating:
            self.answer(await folder.show_item())
        elif self.route == "picture":
            number, side = (self.read_number(name) for name in ("number", "side"))
            if side not in SIDES:
                raise Refusal(400, f"side is {side}; must be among {SIDES}")
            data = await folder.show(self.check_number(number), side)
            self.set_header("Content-Type", "image/png" if data[:4] == b"\x89PNG" else "image/jpeg")
            self.write(data)
        else:
            raise Refusal(404, "there is no such page")

    async def post(self) -> None:
        """Answer what the page's actions ask for."""
        folder: ServedFolder = self.settings["folder"]
        if self.route == "latency" and not folder.rating:
            self.answer(folder.note_latency(self.read_entries()))
            return
        if self.route == "rate" and folder.rating:
            body = self.read_body({"item": int, "rating": int})
            folder.rate(body["item"], body["rating"])
            self.answer(await folder.show_item())
            return
        if self.route not in POST_KEYS or folder.rating:
            raise Refusal(404, f"there is no such page with annotate.stage={folder.settings.stage}")
        body = self.read_body({"number": int, "tab": str} | POST_KEYS[self.route])
        self.check_number(body["number"])
        number, tab = body["number"], body["tab"]
        if not 1 <= len(tab) <= 64:
            raise Refusal(400, "tab must have 1 to 64 characters")
        if not 0 <= body.get("seconds", 0) <= MOST_SECONDS:
            raise Refusal(400, f"seconds must be in 0..{MOST_SECONDS:.0f}")
        if self.route == "open":
            self.answer(await folder.open(number, tab))
        elif self.route == "predict":
            self.answer(await folder.predict(number, body["actions"]))
        elif self.route == "save":
            self.answer(await folder.save(number, tab, body["actions"], body["class"], body["seconds"]))
        elif self.route == "delete":
            self.answer(await folder.delete(number, tab, body["id"]))
        elif self.route == "set_class":
            self.answer(await folder.set_class(number, tab, body["id"], body["class"]))
        elif self.route == "undo":
            self.answer(await folder.undo(number, tab))
        elif self.route == "done":
            self.answer(await folder.set_done(number, tab, body["is_done"]))
        elif self.route == "heartbeat":
            self.answer({"is_writable": folder.hear(number, tab)})
        else:
            folder.release(number, tab)
            self.answer({})

    def answer(self, content: dict) -> None:
        """Answer in json."""
        self.set_header("Content-Type", "application/json")
        self.write(json.dumps(content, allow_nan=False))

    def read_number(self, name: str) -> int:
        """Read a number from the address, whose names must be those of `picture`."""
        if set(self.request.arguments) != {"number", "side"} or len(self.get_query_arguments(name)) != 1:
            raise Refusal(400, "must have number= and side=, once each, and nothing else")
        text = self.get_query_argument(name, strip=False)
        if not re.fullmatch("[0-9]{1,9}", text):
            raise Refusal(400, f"{name} must be a whole number")
        return int(text)

    def check_number(self, number: int) -> int:
        """Refuse a number that is no picture's."""
        num_pictures = len(self.settings["folder"].pictures)
        if not 0 <= number < num_pictures:
            raise Refusal(404, f"there is no such picture; number must be in 0..{num_pictures - 1}")
        return number

    def read_json(self) -> object:
        """Read the body."""
        if len(self.request.body) > MOST_BODY_BYTES:
            raise Refusal(
                413, f"the body has {len(self.request.body)} bytes; at most {MOST_BODY_BYTES}: finish the object"
            )
        try:
            return json.loads(self.request.body, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise Refusal(400, "the body is no json, or has NaN or Infinity, which json lacks") from error

    def read_body(self, kinds: dict[str, type]) -> dict:
        """Read a body that has exactly some keys, of some types."""
        body = self.read_json()
        if not isinstance(body, dict) or set(body) != set(kinds):
            raise Refusal(400, f"the body must have {', '.join(kinds)} and nothing else")
        for key, kind in kinds.items():
            is_fine = is_number(body[key]) if kind is float else isinstance(body[key], kind)
            if not is_fine or (isinstance(body[key], bool) and kind is not bool):
                raise Refusal(400, f"{key} is not of its type")
        return body

    def read_entries(self) -> list[dict]:
        """Read what the page has measured."""
        entries = self.read_body({"entries": list})["entries"]
        times = {"total_ms", "decoder_ms", "waited_ms"}
        keys = times | {"number", "is_encoding"}
        for entry in entries[: MOST_ENTRIES + 1]:
            is_fine = isinstance(entry, dict) and set(entry) == keys and type(entry["number"]) is int
            is_fine = is_fine and all(is_number(entry[key]) and 0 <= entry[key] <= 1000 * MOST_SECONDS for key in times)
            if not is_fine or type(entry["is_encoding"]) is not bool or len(entries) > MOST_ENTRIES:
                raise Refusal(400, f"entries must be at most {MOST_ENTRIES} of {', '.join(sorted(keys))}")
            self.check_number(entry["number"])
        return entries

    def send_error(self, status_code: int = 500, **kwargs) -> None:
        error = kwargs.get("exc_info", (None, None, None))[1]
        super().send_error(error.status if isinstance(error, Refusal) else status_code, **kwargs)

    def write_error(self, status_code: int, **kwargs) -> None:
        """Answer in one line what went wrong; after `send_error` has cleared what was prepared."""
        error = kwargs.get("exc_info", (None, None, None))[1]
        line = error.line if isinstance(error, Refusal) else self._reason
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(line + "\n")

    def log_exception(self, kind, error, trace) -> None:
        """Log what should not happen."""
        if not isinstance(error, (Refusal, tornado.web.HTTPError)):
            super().log_exception(kind, error, trace)


POST_KEYS = {
    "open": {},
    "predict": {"actions": list},
    "save": {"actions": list, "class": str | None, "seconds": float},
    "delete": {"id": int},
    "set_class": {"id": int, "class": str | None},
    "undo": {},
    "done": {"is_done": bool},
    "heartbeat": {},
    "release": {},
}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no json")


def page_headers(page: str) -> dict[str, str]:
    """Say what the page may do: run its own script, and talk to this server alone."""
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }


def make_server(folder: ServedFolder, port: int | None) -> tuple[tornado.httpserver.HTTPServer, str]:
    """Start a server of the page, on this machine alone: it, and the page's address with its secret part.

    Raises:
        ValueError: for a port that is taken.
    """
    try:
        sockets = tornado.netutil.bind_sockets(port or 0, "127.0.0.1", socket.AF_INET)
    except OSError as error:
        raise ValueError(f"annotate.port is {port}, which cannot be used; take another, or null ({error})") from error
    port, token = sockets[0].getsockname()[1], secrets.token_urlsafe(16)
    page = PAGE.read_text(encoding="utf-8")
    application = tornado.web.Application(
        [("/.*", Page)],
        default_handler_class=Page,
        log_function=lambda handler: None,
        headers=page_headers(page),
        page=page,
        port=port,
        token=token,
        folder=folder,
    )
    server = tornado.httpserver.HTTPServer(
        application,
        # a little too much is refused by `read_json`, the rest by tornado, without a word
        max_body_size=4 * MOST_BODY_BYTES,
        body_timeout=BODY_TIMEOUT_S,
        idle_connection_timeout=IDLE_TIMEOUT_S,
    )
    server.add_sockets(sockets)
    return server, f"http://127.0.0.1:{port}/{token}/"


async def serve(folder: ServedFolder, port: int | None) -> None:
    """Serve the page until Ctrl-C; what is being saved then is saved.

    Raises:
        ValueError: as `make_server`.
    """
    server, address = make_server(folder, port)
    port = address.split(":")[2].split("/")[0]
    log.info(f"{len(folder.pictures)} pictures; open {address} and end with Ctrl-C")
    log.info(f"from another machine, first: ssh -L {port}:127.0.0.1:{port} <user>@<this machine>")
    is_ended, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, is_ended.set)
    await is_ended.wait()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.remove_signal_handler(number)  # a second Ctrl-C ends at once
    server.stop()
    await folder.close()
    await server.close_all_connections()
