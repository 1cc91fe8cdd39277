"""What tests and screenshots of the demo share: a Chromium that is on this machine, a free port, the demo as a process."""
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

root = Path(__file__).parents[1]


def find_chromium():
    "The path of a Chromium: the one named in CHROMIUM, one on the path, or Playwright's own; None if there is none."
    names = 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'
    found = [os.environ.get('CHROMIUM'), *map(shutil.which, names)]
    try:
        from playwright.sync_api import sync_playwright
        with sync_playwright() as p: found.append(p.chromium.executable_path)
    except Exception: pass # no Playwright, or one without a browser
    return next((o for o in found if o and Path(o).is_file()), None)


@contextmanager
def chromium(path):
    "A headless browser."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=['--no-sandbox'])
        try: yield browser
        finally: browser.close()


def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]


@contextmanager
def running_demo(*args, log, app=root/'app'/'app.py', timeout=180, **env):
    "The demo in a process of its own, ready to answer: its address and its process."
    port = free_port()
    env = dict(os.environ, BOOTMAE_DEVICE='cpu', OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore::FutureWarning', **env)
    with open(log, 'w') as out:
        process = subprocess.Popen([sys.executable, app, '--port', str(port), *map(str, args)], stdout=out, stderr=subprocess.STDOUT, env=env)
    url = f'http://127.0.0.1:{port}'
    try:
        wait_for(lambda: answers(url) or process.poll() is not None, timeout)
        if not answers(url): raise RuntimeError(f'the demo did not start:\n{Path(log).read_text()}')
        yield url, process
    finally:
        process.terminate()
        try: process.wait(20)
        except subprocess.TimeoutExpired: process.kill()


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=20) as r: return r.status == 200
    except OSError: return False


def wait_for(condition, timeout):
    end = time.monotonic() + timeout
    while not condition() and time.monotonic() < end: time.sleep(.2)
