"""JupyterLab in a headless Chromium, for tests: nothing of the user's Jupyter configuration is read or written, and every request and console message is kept."""
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest

import browser
from browser import free_port

try: import playwright
except ImportError: playwright = None

root = Path(__file__).parents[1]
LOCAL = ('127.0.0.1', 'localhost')


def find_chromium():
    "A Chromium on this machine, or a skip that says what is missing."
    if playwright is None: pytest.skip('BROWSER TEST LEFT OUT: playwright is not installed; pip install playwright')
    found = browser.find_chromium()
    if not found: pytest.skip('BROWSER TEST LEFT OUT: there is no Chromium here; on Debian: apt install chromium, elsewhere: playwright install chromium')
    return found


@contextmanager
def jupyter_lab(folder, wait=120):
    "The address of a JupyterLab that serves `folder`; it ends with the block."
    port, home = free_port(), folder/'.jupyter'
    quiet = home/'config'/'lab'/'user-settings'/'@jupyterlab'/'apputils-extension'/'notification.jupyterlab-settings'
    quiet.parent.mkdir(parents=True); quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    folders = dict(JUPYTER_CONFIG_DIR='config', JUPYTER_DATA_DIR='data', JUPYTER_RUNTIME_DIR='runtime', IPYTHONDIR='ipython')
    path = os.pathsep.join(filter(None, [str(root), os.environ.get('PYTHONPATH')]))
    env = os.environ | {k: str(home/v) for k,v in folders.items()} | dict(PYTHONPATH=path, OMP_NUM_THREADS='1')
    options = ['--no-browser', '--ip=127.0.0.1', f'--port={port}', '--port-retries=0', '--allow-root', '--IdentityProvider.token=t', f'--ServerApp.root_dir={folder}',
               '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    with open(folder/'jupyter.log', 'wb') as log:
        server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', *options], env=env, stdout=log, stderr=log)
    try:
        address, start = f'http://127.0.0.1:{port}', time.monotonic()
        while not browser.answers(f'{address}/api/status?token=t'):
            if server.poll() is not None or time.monotonic() - start > wait: raise RuntimeError('JupyterLab did not start: ' + (folder/'jupyter.log').read_text()[-2000:])
            time.sleep(.3)
        yield address
    finally:
        server.terminate()                        # it ends its kernels
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill(); server.wait()


@contextmanager
def browser_page(width=1280, height=1000):
    "A page of a headless Chromium, with `page.foreign` (requests to other hosts) and `page.errors` (console errors, exceptions)."
    with browser.chromium(find_chromium()) as window:
        page = window.new_page(viewport=dict(width=width, height=height)); page.set_default_timeout(90_000)
        page.foreign, page.errors = [], []
        page.on('request', lambda r: _is_foreign(r.url) and page.foreign.append(r.url))
        page.on('websocket', lambda s: _is_foreign(s.url) and page.foreign.append(s.url))
        page.on('console', lambda m: m.type == 'error' and page.errors.append(m.text))
        page.on('pageerror', lambda e: page.errors.append(str(e)))
        yield page


def _is_foreign(url):
    parts = urlsplit(url)
    return parts.scheme in ('http', 'https', 'ws', 'wss') and parts.hostname not in LOCAL


def write_notebook(path, *cells):
    "A notebook of code cells."
    nb = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python')))
    nb.cells = [nbformat.v4.new_code_cell(o) for o in cells]
    nbformat.write(nb, path)


def run_all(page, address, notebook):
    "Open a notebook and run its cells."
    page.goto(f'{address}/lab/tree/{notebook}?token=t&reset')
    page.get_by_text('| Idle').wait_for()
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_role('menuitem', name='Run All Cells', exact=True).click()
