"""A headless Chromium, told what to do over a pair of pipes (the DevTools protocol)."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class AnotherPageError(Exception):
    """The page that was asked has made way for another one."""


class Page:
    """One page of a browser of its own."""

    def __init__(self, folder: Path, width: int = 1100, height: int = 800) -> None:
        ours, self._to = os.pipe()
        self._from, theirs = os.pipe()
        options = (
            "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
            "--disable-background-networking --disable-extensions --disable-component-update "
            "--hide-scrollbars --remote-debugging-pipe"
        )
        line = f'exec "$0" {options} --user-data-dir="$1" about:blank 3<&{ours} 4>&{theirs}'
        self._process = subprocess.Popen(
            ["bash", "-c", line, PROGRAM, str(folder)], pass_fds=(ours, theirs),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(folder)},
        )  # fmt: skip
        os.close(ours)
        os.close(theirs)
        self._rest, self._number, self._session = b"", 0, None
        self.complaints, self.addresses = [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.size(width, height)

    def size(self, width, height, *, mobile=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=mobile)  # fmt: skip

    def call(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                error = found.get("error")
                if error is not None and "navigated" in error["message"]:
                    raise AnotherPageError(error["message"])
                assert error is None, error
                return found["result"]
            self._note(found)

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, code):
        found = self.call(
            "Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, code, seconds=30.0):
        end = time.monotonic() + seconds
        while not self._holds(code):
            assert time.monotonic() < end, f"{code} has not come true"
            time.sleep(0.05)

    def _holds(self, code):
        try:
            return self.run(f"Boolean({code})")
        except AnotherPageError:  # it was left while it was asked
            return False

    def picture(self, path):
        data = self.call("Page.captureScreenshot", format="png")["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def close(self):
        os.close(self._to)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from)

    def _next(self):
        while b"\0" not in self._rest:
            data = os.read(self._from, 65536)
            assert data, "the browser has gone"
            self._rest += data
        first, _, self._rest = self._rest.partition(b"\0")
        return json.loads(first)

    def _note(self, event):
        params = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"])
        elif event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(params["entry"])
        elif event["method"] == "Network.requestWillBeSent":
            self.addresses.append(params["request"]["url"])
