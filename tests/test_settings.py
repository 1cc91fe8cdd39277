"""Settings beyond what their notebook shows: precedence, damaged files, other tools' files, devices that are absent."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st

from bootmae_nb.settings import Settings, SettingsError, load_settings, pick_device, pick_precision, pick_workers

root = Path(__file__).parents[1]


@pytest.fixture
def ini(tmp_path):
    "Writes a settings.ini into a fresh folder and returns the folder."
    def write(text, folder='.', **kwargs):
        (tmp_path/folder).mkdir(parents=True, exist_ok=True)
        (tmp_path/folder/'settings.ini').write_text(text, **kwargs)
        return tmp_path
    return write


def test_committed_file_holds_the_defaults():
    defaults = Settings(data_dir=root/'data', run_dir=root/'runs')
    assert load_settings(root/'settings.ini', {}) == defaults
    assert load_settings(root/'nbs', {}) == defaults
    text = (root/'settings.ini').read_text()
    assert 'pyproject.toml' in text.splitlines()[0]
    assert all(f'\n{key} = ' in text for key in Settings.__dataclass_fields__)


def test_defaults_without_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('BOOTMAE_SEED', raising=False)
    assert load_settings(environ={}) == Settings(data_dir=tmp_path/'data', run_dir=tmp_path/'runs')
    monkeypatch.setenv('BOOTMAE_SEED', '7')
    assert load_settings().seed == 7


def test_nearest_file_wins_and_variables_win_over_it(ini):
    ini('[DEFAULT]\nseed = 1\nworkers = 1')
    top = ini('[DEFAULT]\nseed = 2', folder='a')
    (top/'a'/'b').mkdir()
    assert load_settings(top/'a'/'b', {}).seed == 2
    assert load_settings(top/'a'/'b', {}).workers == 'auto', 'files must not be merged'
    assert load_settings(top/'a'/'b', {'BOOTMAE_SEED': '3'}).seed == 3


def test_values_are_typed_and_folders_absolute(ini):
    top = ini('[DEFAULT]\nDATA_DIR = ../images 100%  # all of them\nrun_dir = ~/runs\nworkers = 3\ndemo_upload_mb = 2.5\nprecision = BF16')
    s = load_settings(top, {})
    assert s.data_dir == top.parent/'images 100%' and s.run_dir == Path.home()/'runs'
    assert (s.workers, s.demo_upload_mb, s.precision) == (3, 2.5, 'bf16')


@pytest.mark.parametrize('text, expected', [
    ('[DEFAULT]\ndevcie = cpu', "did you mean 'device'"),
    ('[DEFAULT]\nzzz = 1', "no setting 'zzz'"),
    ('[DEFAULT]\nworkers = -1', 'auto or a whole number'),
    ('[DEFAULT]\nworkers = 1.5', 'auto or a whole number'),
    ('[DEFAULT]\nseed = 2e3', 'seed is'),
    ('[DEFAULT]\nprecision = fp64', 'auto, fp32, bf16 or fp16'),
    ('[DEFAULT]\nrun_dir =', 'expected a folder'),
    ('[DEFAULT]\ndemo_host = http://a/b', 'name or address'),
    ('[DEFAULT]\ndemo_port = 65536', '1 to 65535'),
    ('[DEFAULT]\nseed = 1\nseed = 2', 'already exists'),
    ('[settings]\ndevice = cpu', 'section [settings] is not read'),
    ('[DEFAULT]\nseed = 1\n[demo]\nport = 3', 'section [demo] is not read'),
    ('device = cpu', 'expected [DEFAULT]'),
    ('[DEFAULT]\ndevice', 'expected [DEFAULT]'),
])
def test_mistakes_in_a_file_are_one_sentence_that_names_it(ini, text, expected):
    top = ini(text)
    with pytest.raises(SettingsError) as error: load_settings(top, {})
    message = str(error.value)
    assert message.startswith(str(top/'settings.ini')) and expected in message and '\n' not in message


def test_files_that_cannot_be_read(ini, tmp_path):
    with pytest.raises(SettingsError, match='cannot be read'): load_settings(tmp_path/'absent.ini', {})
    with pytest.raises(SettingsError, match='settings.ini'): load_settings(ini('[DEFAULT]\ndata_dir = Bücher', encoding='latin-1'), {})
    (tmp_path/'a'/'settings.ini').mkdir(parents=True)
    with pytest.raises(SettingsError, match='cannot be read'): load_settings(tmp_path/'a', {})


keys = st.sampled_from([*Settings.__dataclass_fields__, 'devcie', '[DEFAULT]', '[demo]', '#', '%(seed)s', 'lib_name', ''])
values = st.one_of(st.text(max_size=8), st.integers().map(str), st.floats().map(str), st.sampled_from(['auto', 'cpu', '~nobody/x', '%', '\0', '٣']))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(keys, values), max_size=4), st.binary(max_size=4))
@example([('data_dir', '~nobody/x')], b'')
def test_any_file_gives_settings_or_a_settings_error(tmp_path, lines, rest):
    text = '[DEFAULT]\n' + '\n'.join(f'{key} = {value}' for key, value in lines)
    (tmp_path/'settings.ini').write_bytes(text.encode('utf-8', 'surrogatepass') + rest)
    for load in (lambda: load_settings(tmp_path/'settings.ini', {}), lambda: load_settings(tmp_path, {f'BOOTMAE_{k}': v for k, v in lines})):
        try: assert load().data_dir.is_absolute()
        except SettingsError as error: assert '\n' not in str(error)


@pytest.mark.parametrize('foreign', ['[DEFAULT]\nlib_name = x\nversion = 1', '[Settings]\ngtk-theme-name = Adwaita'])
def test_files_of_other_tools_are_passed_over(ini, foreign):
    ini('[DEFAULT]\nseed = 5')
    top = ini(foreign, folder='project')
    assert load_settings(top/'project', {}).seed == 5
    (top/'settings.ini').unlink()
    assert load_settings(top/'project', {}).run_dir == top/'project'/'runs'


@pytest.mark.parametrize('name, text, expected', [
    ('BOOTMAE_DEVCIE', 'cpu', "did you mean 'device'"), ('BOOTMAE_DEVICE', 'cdua', "did you mean 'cuda'"), ('BOOTMAE_', 'x', "no setting ''")])
def test_mistakes_in_a_variable_name_it(tmp_path, name, text, expected):
    with pytest.raises(SettingsError) as error: load_settings(tmp_path, {name: text})
    assert name in str(error.value) and expected in str(error.value)


def test_devices_in_order_of_preference(monkeypatch):
    def machine(cuda, mps):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)
    machine(cuda=2, mps=True)
    assert pick_device() == torch.device('cuda') and pick_device('cuda:1') == torch.device('cuda', 1)
    with pytest.raises(SettingsError, match="'cuda:2' is not there"): pick_device('cuda:2')
    machine(cuda=0, mps=True)
    assert pick_device() == torch.device('mps')
    machine(cuda=0, mps=False)
    assert pick_device() == torch.device('cpu')
    for name in 'cuda', 'mps':
        with pytest.raises(SettingsError, match='PyTorch sees cpu'): pick_device(name)


def test_bf16_only_where_it_is_native(monkeypatch):
    for capability, expected in [((7, 5), 'fp32'), ((8, 0), 'bf16'), ((9, 0), 'bf16')]:
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device, c=capability: c)
        assert pick_precision('auto', 'cuda') == expected
    queries = '_is_amx_tile_supported', '_is_avx512_bf16_supported'
    for answers, expected in [((False, False), 'fp32'), ((True, False), 'bf16'), ((False, True), 'bf16')]:
        for query, answer in zip(queries, answers): monkeypatch.setattr(torch.cpu, query, lambda a=answer: a)
        assert pick_precision('auto', 'cpu') == expected
    monkeypatch.delattr(torch.cpu, queries[0])
    assert pick_precision('auto', 'cpu') == 'bf16'
    monkeypatch.delattr(torch.cpu, queries[1])
    assert pick_precision('auto', 'cpu') == 'fp32', 'an older PyTorch cannot tell'


@pytest.mark.cuda
def test_a_real_cuda_device_is_picked():
    assert pick_device().type == 'cuda'
    assert (torch.ones(2, device=pick_device('cuda:0')) + 1).sum().item() == 4
    assert pick_precision('auto', pick_device()) == ('bf16' if torch.cuda.get_device_capability() >= (8, 0) else 'fp32')
    assert pick_precision('fp16', 'cuda') == 'fp16'


@pytest.mark.parametrize('cores, expected', [(1, 0), (2, 0), (4, 3), (64, 8)])
def test_workers_leave_a_core_for_the_computation(monkeypatch, cores, expected):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(cores)), raising=False)
    assert pick_workers() == expected and pick_workers(n_items=100_000) == expected and pick_workers(n_items=10) == 0


def test_import_is_light():
    code = "import sys, bootmae_nb.settings as s; s.load_settings('.', {}); sys.exit(bool({'torch', 'fastai', 'numpy', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, '-c', code], cwd=root, timeout=60).returncode == 0
