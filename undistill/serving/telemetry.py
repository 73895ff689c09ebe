"""Metrics, a log of one JSON object a line, and events, for the owner of a server; never an image or an answer."""

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from undistill.serving.keys import Keys

log = logging.getLogger("undistill.serving")

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ALL = "all keys"
"""Stands for all accounts together in an event."""
UNSENT = 1000  # events that may wait for a webhook
SECONDS = 10.0  # that a webhook may take


class Metrics:
    """Counts for Prometheus. They name no key, and hold nothing of an answer."""

    def __init__(self, under_way: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "undistill"}
        self.requests = Counter("requests", "Requests by place and status.", ["place", "status"], **own)
        self.seconds = Histogram("request_seconds", "Time of a request.", ["place"], **own)
        self.images = Counter("images", "Images that were answered.", **own)
        self.batches = Histogram("batch_images", "Images of a batch.", buckets=SIZES, **own)
        self.events = Counter("curve_events", "Keys that passed a point of the audit's curve.", ["gap"], **own)
        Gauge("images_under_way", "Images that were asked and are not answered yet.", **own).set_function(under_way)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class JsonLines(logging.Formatter):
    """A record as one JSON object: its time, its message as `event`, and its fields."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"
        line = {"time": when, "level": record.levelname.lower(), "event": record.getMessage()}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line | getattr(record, "fields", {}))


def note(event: str, level: int = logging.INFO, *, traceback: bool = False, **fields: object) -> None:
    """Write an event with its fields to the log."""
    log.log(level, event, exc_info=traceback, extra={"fields": fields})


class Events:
    """Tells when a key, or all keys together, passed the query counts that bought a copy in the audit.

    Each is told once, also after a restart: logged as a warning, and posted as JSON to a webhook, if there is one, by a
    thread of its own.
    """

    def __init__(self, keys: Keys, within: Mapping[str, int], webhook: str | None = None) -> None:
        """`within` gives for each gap of accuracy, such as '0.05', the fewest queries that bought a copy within it."""
        self.keys, self.within, self.webhook = keys, within, webhook
        self.on_event: Callable[[str], None] = lambda gap: None
        """Told of the gap of every event."""
        self._told: set[tuple[str, str]] = set()
        self._unsent: queue.Queue[dict[str, object] | None] = queue.Queue(UNSENT)
        self._thread = threading.Thread(target=self._send, daemon=True) if webhook else None
        if self._thread:
            self._thread.start()

    def catch_up(self) -> None:
        """Tell of what was passed before this curve was known, or while nobody watched."""
        accounts = self.keys.accounts(everybody=True)
        for account in accounts:
            self.passed(account.name, account.billed)
        self.passed(ALL, sum(account.billed for account in accounts))

    def passed(self, key: str, billed: int) -> None:
        """Tell of every point up to `billed` images that was not told yet of this key."""
        for gap, queries in self.within.items():
            point = f"{gap} by {queries}"
            if billed < queries or (key, point) in self._told:
                continue
            self._told.add((key, point))
            if self.keys.pass_by(key, point):
                self._tell(key, billed, gap, queries)

    def _tell(self, key: str, billed: int, gap: str, queries: int) -> None:
        self.on_event(gap)
        event = {"key": key, "billed": billed, "queries": queries, "within_points": round(100 * float(gap), 6)}
        log.warning("a copy can be bought", extra={"fields": event})
        if self.webhook:
            try:
                self._unsent.put_nowait({"event": "a copy can be bought", **event})
            except queue.Full:
                note("webhook is behind", logging.WARNING, lost=event)

    def close(self) -> None:
        """Send what waits, for some seconds at most."""
        if self._thread:
            self._unsent.put(None)
            self._thread.join(SECONDS)

    def _send(self) -> None:
        import httpx2

        while event := self._unsent.get():
            try:
                httpx2.post(str(self.webhook), json=event, timeout=SECONDS).raise_for_status()
            except Exception as error:  # the server goes on, whatever the webhook does
                note("webhook failed", logging.WARNING, why=type(error).__name__, lost=event)
