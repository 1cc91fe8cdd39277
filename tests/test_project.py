"""The repository as a whole: what is generated equals its source, what is committed is clean, what is declared is used."""
import ast
import filecmp
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

root = Path(__file__).parents[1]
notebooks = sorted((root/'nbs').rglob('[!.]*.ipynb'))

# Declared without an import of ours, each for a reason
never_imported = {
    'ipywidgets': 'JupyterLab draws sliders and progress bars with it',
    'jupyterlab': '`make lab`',
    'lightly': 'a peer of the benchmark, which imports it by name if it is there',
    'pytest-xdist': '`make test`',
    'ruff': '`make test`',
    'scikit-image': 'its photographs, opened as files',
    'setuptools': 'a test builds the wheel with it',
    'transformers': 'a peer of the benchmark, as lightly'}


def run(*args, cwd=root):
    "The finished process of a Python command in this environment."
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope='module')
def files():
    "Files that are in git or would be with `git add .`"
    try: found = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError): pytest.skip('needs a git checkout to know which files belong to the project')
    return [root/o for o in found.stdout.split('\0') if o and (root/o).is_file()]


def differences(a, b):
    "Names that only one of two folders holds or that differ in content."
    compared = filecmp.dircmp(a, b, ignore=['__pycache__', 'data'])
    _, changed, unreadable = filecmp.cmpfiles(a, b, compared.common_files, shallow=False)
    inner = [f'{name}/{o}' for name in compared.common_dirs for o in differences(a/name, b/name)]
    return compared.left_only + compared.right_only + changed + unreadable + inner


def test_package_equals_notebooks(tmp_path):
    shutil.copytree(root/'nbs', tmp_path/'nbs')
    shutil.copy(root/'pyproject.toml', tmp_path)
    (tmp_path/'bootmae_nb').mkdir()
    shutil.copy(root/'bootmae_nb'/'__init__.py', tmp_path/'bootmae_nb')
    done = run('-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    differing = differences(tmp_path/'bootmae_nb', root/'bootmae_nb')
    assert not differing, f'{differing} are not what the notebooks export: edit notebooks, not the package, then run nbdev-export'


def test_readme_equals_index():
    done = run('tools/readme.py', '--check')
    assert done.returncode == 0, done.stderr


def test_readme_check_notices_a_difference(tmp_path):
    for name in 'tools/readme.py', 'nbs/index.ipynb', 'README.md':
        (tmp_path/name).parent.mkdir(exist_ok=True)
        shutil.copy(root/name, tmp_path/name)
    with open(tmp_path/'README.md', 'a') as file: file.write('Edited by hand.\n')
    done = run('tools/readme.py', '--check', cwd=tmp_path)
    assert done.returncode == 1 and 'README.md differs' in done.stderr
    assert run('tools/readme.py', cwd=tmp_path).returncode == 0
    assert run('tools/readme.py', '--check', cwd=tmp_path).returncode == 0


def test_links_of_readmes_lead_somewhere():
    for readme in root/'README.md', root/'app'/'README.md':
        targets = re.findall(r'(?:\]\(|src=")([^)"\s#:]+)[)"#]', readme.read_text())
        dead = [o for o in targets if not (readme.parent/o).exists()]
        assert targets and not dead


@pytest.mark.parametrize('notebook', notebooks, ids=lambda o: o.stem)
def test_notebook_holds_no_error(notebook):
    outputs = [o for cell in json.loads(notebook.read_text())['cells'] for o in cell.get('outputs', [])]
    assert not [o['ename'] for o in outputs if o['output_type'] == 'error']


def test_no_file_is_large(files):
    limits = {root/'bootmae_nb'/'data'/'bootmae_tiny.safetensors': 25_000_000}
    assert not [str(o.relative_to(root)) for o in files if o.stat().st_size > limits.get(o, 2_000_000)]


def test_no_path_of_a_machine_is_committed(files):
    machine = re.compile(rb'(?<![\w./-])/(?:home|Users|root|work|workspace|mnt|tmp)/[\w.-]+|\b[A-Z]:\\+Users\\')
    found = {str(o.relative_to(root)): machine.findall(content) for o in files if b'\0' not in (content := o.read_bytes())}
    assert not {name: paths[:3] for name, paths in found.items() if paths}


def imports_of(source):
    "Top-level names of the modules that Python source imports, relative imports aside."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): yield from (o.name.split('.')[0] for o in node.names)
        if isinstance(node, ast.ImportFrom) and not node.level: yield node.module.split('.')[0]


def sources(folder):
    "Python source of all modules and notebook cells below a folder."
    yield from (o.read_text() for o in (root/folder).rglob('*.py'))
    for notebook in (root/folder).rglob('[!.]*.ipynb'):
        cells = (''.join(o['source']) for o in json.loads(notebook.read_text())['cells'] if o['cell_type'] == 'code')
        yield from (re.sub(r'^\s*[%!].*$', '', o, flags=re.M) for o in cells)


def imported(*folders):
    "Names of the distributions that the code in some folders imports, ours and Python's own aside."
    ours = {'bootmae_nb', *(o.stem for folder in ('app', 'tests', 'tools') for o in (root/folder).glob('*.py'))}
    modules = {o for folder in folders for source in sources(folder) for o in imports_of(source)} - ours - sys.stdlib_module_names
    owners = packages_distributions()
    return {normalised(owners.get(o, [o])[0]) for o in modules}


def normalised(name): return re.sub(r'[-_.]+', '-', name).lower()


def declared(requirements): return {normalised(re.match(r'[\w.-]+', o)[0]) for o in requirements}


def test_dependencies_are_those_that_are_used():
    project = tomllib.loads((root/'pyproject.toml').read_text())['project']
    needed = declared(project['dependencies'])
    everything = needed.union(*map(declared, project['optional-dependencies'].values()))
    used = imported('bootmae_nb', 'app', 'nbs', 'tests', 'tools')
    wrong = {
        'imported by the package, but only an extra or not declared': imported('bootmae_nb') - needed,
        'imported, but not declared in pyproject.toml': used - everything,
        'declared in pyproject.toml, but not imported': everything - used - set(never_imported),
        'listed in this test, but no longer declared': set(never_imported) - everything}
    assert not {reason: names for reason, names in wrong.items() if names}
