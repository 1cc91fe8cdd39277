"""Files: a kill, a full disk, a second writer or bad weights never cost the file that was there."""
import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import time
import warnings

import pytest
import torch
from safetensors.torch import save_file

from common import equal, quietly, state
from forks import run_forked
from bootmae_nb import checkpoints, files
from bootmae_nb.checkpoints import load_model, non_finite, save_model
from bootmae_nb.data import mim_dls
from bootmae_nb.files import refuse_unwritable, CheckpointError, WriteError, sweep, write_whole
from bootmae_nb.hub import write_folder
from bootmae_nb.learner import mim_learner
from bootmae_nb.models import mim_model

tiny = dict(arch='vit_tiny_patch16_224', width=48, depth=1, heads=3, patch_size=8, pixel_width=48, pixel_depth=1, feature_depth=1)
fork = multiprocessing.get_context('fork')


@pytest.fixture
def model(): return mim_model('bootmae', img_size=32, seed=0, **tiny)


def others(folder): return sorted(o.name for o in folder.iterdir() if not o.name.startswith('model.'))


# a kill

def save_for_ever(model, path, begun):
    for i in range(1, 10**6):
        with torch.no_grad(): model.encoder.vit.norm.bias.fill_(i)
        save_model(model, path)
        begun.set()


def test_a_kill_at_any_moment_of_saving_leaves_a_file_that_loads(model, tmp_path):
    save_model(model, tmp_path/'model')
    rng,left = random.Random(0), 0
    for _ in range(20):
        begun = fork.Event()
        p = fork.Process(target=save_for_ever, args=(model, tmp_path/'model', begun))
        p.start(); assert begun.wait(30)
        time.sleep(.04*rng.random())
        os.kill(p.pid, signal.SIGKILL); p.join()
        left += len(others(tmp_path)) > 0
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')                            # the JSON may be that of the save before
            loaded = load_model(tmp_path/'model.safetensors')
        assert len(loaded.encoder.vit.norm.bias.unique()) == 1 and loaded.encoder.vit.norm.bias[0] >= 1
        json.loads((tmp_path/'model.json').read_text())
        assert len(others(tmp_path)) <= 1, 'each process removes what the one before has left'
    sweep(tmp_path)
    assert left and others(tmp_path) == []


def test_what_others_are_writing_or_have_named_alike_is_left_alone(tmp_path):
    stem = f'.a.txt.{files._host()}'
    dead = fork.Process(target=lambda: None); dead.start(); dead.join()
    keep = [f'{stem}.{os.getpid()}-abcdef.tmp', f'{stem}.{dead.pid}-abcdef.txt', f'.a.txt.elsewhere-1.{dead.pid}-abcdef.tmp', '.mine.tmp', 'a.txt',
            f'{stem}.x-abcdef.tmp']
    gone = [f'{stem}.{dead.pid}-abcdef.tmp', f'.b.elsewhere-1.{dead.pid}-123456.tmp']
    for name in keep + gone: (tmp_path/name).mkdir(); (tmp_path/name/'a.txt').write_text('half')
    for o in (tmp_path/gone[1]/'a.txt', tmp_path/gone[1]): os.utime(o, (time.time() - 25*3600,)*2)
    assert sorted(sweep(tmp_path)) == sorted(gone) and {o.name for o in tmp_path.iterdir()} == set(keep)


def test_the_first_write_of_a_process_sweeps_the_folder(tmp_path):
    dead = fork.Process(target=lambda: None); dead.start(); dead.join()
    (tmp_path/f'.old.bin.{files._host()}.{dead.pid}-abcdef.tmp').mkdir()
    write_whole(tmp_path/'a.txt', lambda p: p.write_text('a'))
    assert [o.name for o in tmp_path.iterdir()] == ['a.txt']


# two writers

def save_often(seed, path):
    model = mim_model('bootmae', img_size=32, seed=seed, **tiny)
    for _ in range(15): save_model(model, path)


def test_two_processes_that_write_the_same_file_do_not_harm_each_other(tmp_path):
    procs = [fork.Process(target=save_often, args=(seed, tmp_path/'model')) for seed in (1, 2)]
    for p in procs: p.start()
    for p in procs: p.join(60)
    assert [p.exitcode for p in procs] == [0, 0] and others(tmp_path) == []
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        found = state(load_model(tmp_path/'model.safetensors'))
    assert any(equal(found, state(mim_model('bootmae', img_size=32, seed=seed, **tiny))) for seed in (1, 2))


def test_names_of_temporary_files_are_never_the_same(tmp_path):
    "Also in one process, whose threads may write the same file"
    assert len({files._temporary(tmp_path/'a.txt') for _ in range(50)}) == 50
    assert write_whole(tmp_path/('n'*200), lambda p: p.write_text('a')).read_text() == 'a'


def test_a_new_file_has_the_rights_of_any_other_and_a_replaced_one_keeps_its_own(model, tmp_path):
    (tmp_path/'plain').touch()
    file = save_model(model, tmp_path/'model')
    assert file.stat().st_mode == (tmp_path/'plain').stat().st_mode
    file.chmod(0o640); save_model(model, file)
    assert file.stat().st_mode & 0o777 == 0o640


# a full disk

def limited(write, path, old):
    "Exit 0 if a write that hits the limit on file sizes says so and leaves everything as it was"
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try: write()
    except WriteError as e: ok = f'{path} could not be written' in str(e) and 'as it was' in str(e) and 'free' in str(e)
    except BaseException as e: print(repr(e)[:300], flush=True); os._exit(2)
    os._exit(0 if ok and path.read_bytes() == old and [o for o in os.listdir(path.parent) if o.endswith('.tmp')] == [] else 1)


@pytest.mark.parametrize('kind', ['ours', 'torch', 'bytes', 'learner'])
def test_a_file_that_does_not_fit_is_told_and_the_old_one_stays(kind, model, tmp_path):
    path = tmp_path/'model.safetensors'
    write = dict(ours=lambda: save_model(model, path), torch=lambda: write_whole(path, lambda p: torch.save(model.state_dict(), p)),
                 bytes=lambda: write_whole(path, lambda p: p.write_bytes(b'1'*10_000)))
    if kind == 'learner':
        learn = mim_learner(mim_dls(img_size=32, bs=8, crops_per_image=1, num_workers=0, device='cpu'), arch=model, path=tmp_path, model_dir='.')
        path = learn.save('kept')
        write['learner'] = lambda: learn.save('kept')
    else: save_model(model, path)
    assert run_forked(limited, write[kind], path, path.read_bytes()) == 0


@pytest.mark.parametrize('number, said', [(errno.ENOSPC, 'disk is full'), (errno.EDQUOT, 'your share of the disk'), (errno.EIO, 'disk reports an error'),
                                          (errno.EROFS, 'disk is read-only'), (errno.EACCES, 'no permission to write')])
def test_the_sentence_says_why_and_what_to_do(number, said, model, tmp_path, monkeypatch):
    file = save_model(model, tmp_path/'model')
    before = {o.name: o.read_bytes() for o in tmp_path.iterdir()}
    def full(tensors, p, **kw): p.write_bytes(b'half'); raise OSError(number, os.strerror(number), str(p))
    monkeypatch.setattr(checkpoints, 'save_file', full)
    with pytest.raises(WriteError, match=f'model.safetensors could not be written, because .*{said}.*; what was there before is as it was: ') as e:
        save_model(model, file)
    assert isinstance(e.value, CheckpointError) and isinstance(e.value, OSError) and ('needed' in str(e.value)) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert {o.name: o.read_bytes() for o in tmp_path.iterdir()} == before


def test_errors_that_are_no_matter_of_the_disk_pass_as_they_are(tmp_path):
    def missing(p): open(tmp_path/'nowhere'/'source')
    for f,error in ((missing, FileNotFoundError), (lambda p: 1/0, ZeroDivisionError), (lambda p: save_file({'a': 1}, p), Exception)):
        with pytest.raises(error) as e: write_whole(tmp_path/'a', f)
        assert not isinstance(e.value, WriteError)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_a_folder(model, tmp_path):
    (tmp_path/'runs').write_text('a file')
    for path in (tmp_path/'runs'/'model', tmp_path/'runs'/'deep'/'model'):
        with pytest.raises(WriteError, match='a part of its path is a file.*nothing was written: choose another folder'): save_model(model, path)
    with pytest.raises(WriteError, match='a part of its path is a file'): write_folder(tmp_path/'runs'/'out', lambda p: (p/'a').write_text('a'))
    (tmp_path/'model.safetensors').mkdir()
    with pytest.raises(WriteError, match='a folder has this name'): save_model(model, tmp_path/'model')
    assert sorted(o.name for o in tmp_path.iterdir()) == ['model.safetensors', 'runs']


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_a_folder_without_permission(model, tmp_path):
    (tmp_path/'locked').mkdir(mode=0o500)
    with pytest.raises(WriteError, match='no permission to write in .*locked'): save_model(model, tmp_path/'locked'/'model')


# bad weights

@pytest.mark.parametrize('part', ['encoder.vit.norm.bias', 'teacher.vit.norm.bias', 'feature_mean'])
@pytest.mark.parametrize('value', [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_do_not_replace_good_ones(part, value, model, tmp_path):
    file = save_model(model, tmp_path/'model')
    before = {o.name: o.read_bytes() for o in tmp_path.iterdir()}
    model.state_dict()[part].view(-1)[-1] = value
    assert non_finite(model.state_dict()) == [part]
    with pytest.raises(CheckpointError, match=rf'model.safetensors is not saved, because 1 of \d+ tensors hold NaN or infinity \({part}\); what was there before'):
        save_model(model, file)
    assert {o.name: o.read_bytes() for o in tmp_path.iterdir()} == before
    with pytest.raises(CheckpointError, match='nothing was written'): save_model(model, tmp_path/'new')


# the pair

def test_weights_beside_the_json_of_others_load_with_a_warning(model, tmp_path):
    "As a crash between writing the two leaves them"
    file = save_model(model, tmp_path/'model')
    old = (tmp_path/'model.json').read_text()
    other = mim_model('bootmae', img_size=32, seed=1, **tiny)
    save_model(other, file); (tmp_path/'model.json').write_text(old)
    with pytest.warns(UserWarning, match='model.json tells of other weights than'): loaded = load_model(file)
    assert equal(state(loaded), state(other))
    for text in ('{"half', '[]', '{"format": "of an earlier version"}', None):
        (tmp_path/'model.json').write_text(text) if text else (tmp_path/'model.json').unlink()
        with warnings.catch_warnings(): warnings.simplefilter('error'); load_model(file)


# the learner's own files

def test_save_and_export_are_whole_and_only_the_first_process_writes(model, tmp_path, monkeypatch):
    learn = mim_learner(mim_dls(img_size=32, bs=8, crops_per_image=1, num_workers=0, device='cpu'), arch=model, path=tmp_path)
    quietly(learn, 'fit', 1)
    assert learn.save('a') == tmp_path/'models'/'a.pth' and learn.export('a.pkl') is None
    assert set(torch.load(learn.save('b', with_opt=False), weights_only=True)) == set(model.state_dict())
    before = {o: o.read_bytes() for o in tmp_path.rglob('*') if o.is_file()}
    assert sorted(o.name for o in before) == ['a.pkl', 'a.pth', 'b.pth']
    monkeypatch.setenv('RANK', '1')
    assert learn.save('c') == tmp_path/'models'/'c.pth' and learn.export('c.pkl') is None
    monkeypatch.delenv('RANK')
    def broken(o, f, *args, **kw):
        with open(f, 'wb') as out: out.write(b'half')
        raise RuntimeError('[enforce fail at inline_container.cc:626] . unexpected pos 704 vs 598')
    opt,dls = learn.opt, learn.dls
    with monkeypatch.context() as m:
        m.setattr(torch, 'save', broken)
        for verb,name in ((learn.save, 'a'), (learn.export, 'a.pkl')):
            with pytest.raises(WriteError, match=f'{name}.* could not be written, because the disk is full or a limit is reached'): verb(name)
    assert {o: o.read_bytes() for o in tmp_path.rglob('*') if o.is_file()} == before
    assert learn.opt is opt and learn.dls is dls
    learn.load('a'); quietly(learn, 'fit', 1)


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path/'a').write_text('old')
    refuse_unwritable(tmp_path/'a'); refuse_unwritable(tmp_path/'new'/'b')
    with pytest.raises(WriteError, match='a folder has this name'): refuse_unwritable(tmp_path)
    with pytest.raises(WriteError, match='a part of its path is a file'): refuse_unwritable(tmp_path/'a'/'b')
    with pytest.raises(WriteError, match='its name is too long'): refuse_unwritable(tmp_path/('x'*300))
    assert (tmp_path/'a').read_text() == 'old' and sorted(o.name for o in tmp_path.rglob('*')) == ['a', 'new']
