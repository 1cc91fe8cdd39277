"""Makes README.md from nbs/index.ipynb: `python tools/readme.py` writes it, `--check` fails where it differs."""
import argparse
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parents[1]
note = '<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook, then run `make readme`. -->\n\n'


def is_shown(cell):
    "False for cells marked `#| hide`, which are there for the machinery and not for readers."
    return not re.search(r'^#\|\s*hide\s*$', cell.source, flags=re.M)


def for_readers(cell):
    "The cell without its `#| …` lines, or with links that count from the root instead of nbs/."
    if cell.cell_type == 'code': cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip('\n')
    if cell.cell_type == 'markdown': cell.source = re.sub(r'(\]\(|src=")([^)"\s#]+)', from_root, cell.source)
    return cell


def from_root(link):
    "A link, matched as its opening and its target, with the target seen from the root; addresses stay as they are."
    start, target = link.groups()
    return start + (target if ':' in target else posixpath.normpath(f'nbs/{target}'))


def has_picture(cell):
    "Does an output hold an image, which a README cannot?"
    return any(kind.startswith('image/') for output in cell.get('outputs', []) for kind in output.get('data', {}))


def readme():
    "The text of README.md."
    notebook = nbformat.read(root/'nbs'/'index.ipynb', as_version=4)
    notebook.cells = [for_readers(cell) for cell in notebook.cells if is_shown(cell)]
    if any(map(has_picture, notebook.cells)):
        sys.exit('nbs/index.ipynb has a picture among its outputs, expected text: save the picture in nbs/images and link to it.')
    notebook.metadata.language_info = {'name': 'python'} # marks code blocks
    body, _ = MarkdownExporter().from_notebook_node(notebook)
    return note + re.sub(r'\n(\s*\n){2,}', '\n\n', body).strip() + '\n'


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='write nothing, exit with 1 where README.md differs')
    check, file, text = parser.parse_args().check, root/'README.md', readme()
    if not check: file.write_text(text, encoding='utf-8')
    elif not file.exists() or file.read_text(encoding='utf-8') != text:
        sys.exit('README.md differs from nbs/index.ipynb: run `make readme` and commit the result.')
