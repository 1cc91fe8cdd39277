"""Keep of widgets only what a file can show: python tools/static_widgets.py nbs/19_explore.ipynb

Running a notebook from the command line stores the state of every widget in it, pictures included, under names that change each time. This takes the state and the
views out again and leaves the static pictures, which stand beside every widget.
"""
import json
import sys
from pathlib import Path

VIEW = 'application/vnd.jupyter.widget-view+json'


def static(nb):
    "Whether anything had to be taken out of a notebook; changed in place."
    found = nb['metadata'].pop('widgets', None) is not None
    for cell in nb['cells']:
        for out in cell.get('outputs', []): found |= out.get('data', {}).pop(VIEW, None) is not None
    return found


if __name__ == '__main__':
    for path in map(Path, sys.argv[1:]):
        nb = json.loads(path.read_text(encoding='utf-8'))
        if static(nb): path.write_text(json.dumps(nb, ensure_ascii=False, indent=1, sort_keys=True) + '\n', encoding='utf-8')
