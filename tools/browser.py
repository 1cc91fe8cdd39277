"""Find a Chromium for the browser tests, or install one: Debian's package where packages may be installed, else Playwright's own."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]/'tests'))
from browser import find_chromium # noqa: E402


def attempts():
    "Commands that may bring a Chromium to this machine, the one with fewer bytes first"
    if shutil.which('apt-get') and os.geteuid() == 0:
        yield 'apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium'
    yield f'{sys.executable} -m playwright install chromium'


def main():
    for command in attempts():
        if find_chromium(): break
        print(f'no Chromium here for the browser tests, trying: {command}', flush=True)
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ, DEBIAN_FRONTEND='noninteractive'))
        try: subprocess.run(command, shell=True, timeout=300, **quiet)
        except subprocess.TimeoutExpired: pass
    found = find_chromium()
    print(f'browser tests use {found}' if found else 'no Chromium to be had: the browser tests will be skipped. Set CHROMIUM to the path of one', flush=True)


if __name__ == '__main__': main()
