"""A headless Chromium, spoken to in its DevTools protocol over two pipes: no driver, no package.

    with Browser() as page:
        page.open("http://127.0.0.1:8000")
        page.run("document.title")              the value of an expression; of a promise, once it is there

Protocol: chromedevtools.github.io/devtools-protocol; each message is JSON and a zero byte.
"""

import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page of one browser, whose profile is thrown away."""

    def __init__(self) -> None:
        assert CHROMIUM is not None, "no Chromium here"
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)     # a helper may still write as it dies
        its_input, self.to = os.pipe()
        self.back, its_output = os.pipe()
        command = f'exec "$@" 3<&{its_input} 4>&{its_output}'
        self.process = subprocess.Popen(
            ["bash", "-c", command, "bash", CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu",
             "--remote-debugging-pipe", "--disable-dev-shm-usage", "--no-first-run",
             f"--user-data-dir={self.profile.name}", "about:blank"],
            pass_fds=(its_input, its_output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True)
        os.close(its_input)
        os.close(its_output)
        self.number, self.held, self.session = 0, b"", None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)        # its helpers too: each writes to the profile
        self.process.wait()
        os.close(self.to)
        os.close(self.back)
        self.profile.cleanup()

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """What a method of the protocol returns."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        os.write(self.to, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while True:
            while b"\0" not in self.held:
                part = os.read(self.back, 1 << 20)
                assert part, "the browser has ended"
                self.held += part
            line, _, self.held = self.held.partition(b"\0")
            told = json.loads(line)
            if told.get("id") == self.number:               # others are events
                assert "error" not in told, told
                return told["result"]

    def open(self, address: str) -> None:
        """Go to a page, and wait until it is there."""
        self.ask("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, expression: str) -> Any:
        """The value of JavaScript."""
        told = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def until(self, expression: str, seconds: float = 60) -> None:
        """Wait until it is true."""
        end = time.monotonic() + seconds
        while not self.run(expression):
            assert time.monotonic() < end, f"it never came: {expression}"
            time.sleep(0.02)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.ask("Input.insertText", text=text)

    def press_enter(self) -> None:
        """The key, down and up."""
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r",
                     windowsVirtualKeyCode=13)

    def look(self, width: int, height: int, scheme: str, scale: float = 1) -> bytes:
        """A picture (PNG) of the page on such a screen, light or dark."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale,
                 mobile=False)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        return base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"])
