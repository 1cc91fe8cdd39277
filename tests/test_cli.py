"""The commands as a user runs them, most of them in processes of their own."""
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image

from bootmae_nb import cli
from bootmae_nb.checkpoints import load_model, save_model
from bootmae_nb.images import sample_photo, sample_photos
from bootmae_nb.models import encoder_only, mim_model

bin = Path(sys.executable).parent
small = ['--arch', 'vit_tiny_patch16_224', '--img-size', '32x48', '--patch-size', '8', '--bs', '4', '--set', 'width=48', 'depth=2', 'heads=3', 'pixel_width=48']
env = dict(os.environ, BOOTMAE_DEVICE='cpu', OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore::FutureWarning')


def run(*args, **kw):
    "A finished command"
    return subprocess.run([bin/args[0], *map(str, args[1:])], capture_output=True, text=True, timeout=300, env=env, **kw)


@pytest.fixture
def here(console):
    "As `run`, in this process"
    return lambda *args: SimpleNamespace(**dict(zip(('returncode', 'stdout', 'stderr'), console(*args))))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Six photographs in nested folders, and a file that is none"
    root = tmp_path_factory.mktemp('images')
    for i,p in enumerate(sample_photos()[:6]):
        (root/f'{i % 2}'/'deep').mkdir(parents=True, exist_ok=True)
        sample_photo(p.name).resize((96, 64)).save(root/f'{i % 2}'/'deep'/f'{p.name}.jpg')
    (root/'broken.png').write_text('<html>not found</html>')
    return root


@pytest.fixture(scope='module')
def trained(folder, tmp_path_factory):
    "A short run on that folder: its output folder and what it printed"
    out = tmp_path_factory.mktemp('runs')/'first'
    done = run('bootmae-train', folder, *small, '--epochs', 3, '--crops', 4, '--lr', 1e-3, '--out', out, '--seed', 3)
    assert done.returncode == 0, done.stderr
    return out, done


@pytest.mark.parametrize('command', ['bootmae-train', 'bootmae-reconstruct', 'bootmae-convert'])
def test_help_answers_at_once(command):
    times = []
    for _ in range(3):
        start = time.perf_counter(); done = run(command, '--help')
        times.append(time.perf_counter() - start)
        assert done.returncode == 0 and 'usage:' in done.stdout and 'out' in done.stdout
    assert min(times) < 2, times


def test_a_run_leaves_model_losses_and_pictures(trained):
    out,done = trained
    assert sorted(p.name for p in out.iterdir()) == [
        'best.json', 'best.safetensors', 'history.csv', 'losses.png', 'model.json', 'model.safetensors', 'reconstructions', 'run.json', 'state']
    assert [p.name for p in sorted((out/'reconstructions').iterdir())] == [f'epoch_{i:04}.png' for i in (1, 2, 3)]
    rows = list(csv.DictReader((out/'history.csv').open()))
    assert len(rows) == 4 and float(rows[-1]['valid_pixels']) < float(rows[0]['valid_pixels']) and rows[0]['train_loss'] == '' and float(rows[3]['train_features']) > 0
    about = json.loads((out/'model.json').read_text())
    assert about['training']['seed'] == 3 and about['config']['method']['pixel_width'] == 48 and about['config']['depth'] == 2
    for p in (out/'losses.png', out/'reconstructions'/'epoch_0003.png'): Image.open(p).verify()
    assert 'broken.png' in done.stderr and '\r' not in done.stdout


def test_the_same_command_gives_the_same_weights(here, trained, folder, tmp_path):
    done = here('bootmae-train', folder, *small, '--epochs', 3, '--crops', 4, '--lr', 1e-3, '--out', tmp_path/'again', '--seed', 3)
    assert done.returncode == 0
    a,b = (load_model(o).state_dict() for o in (trained[0], tmp_path/'again'))
    assert all(torch.equal(v, b[k]) for k,v in a.items())


def test_reconstruct_writes_a_picture_for_each_image(here, trained, folder, tmp_path):
    one = folder/'0'/'deep'
    done = here('bootmae-reconstruct', trained[0], one, next(one.iterdir()), '--out', tmp_path/'p', '--mask', 'random', '--mask-ratio', '0.5')
    assert done.returncode == 0, done.stderr
    names = sorted(p.name for p in (tmp_path/'p').iterdir())
    assert len(names) == 5 and 'sheet.png' in names and any(n.endswith('_2.png') for n in names)
    for p in (tmp_path/'p').iterdir(): assert Image.open(p).width > 600


@pytest.mark.parametrize('args,says', [
    (['/no/such/folder'], '/no/such/folder'),
    (['photos', '--method', 'simmim'], "method 'simmim' is unknown: choose one of bootmae, mae, dbot"),
    (['photos', '--mask-ratio', '1.5'], 'mask ratio 1.5 is outside (0, 1)'),
    (['photos', '--img-size', '100'], 'not divisible by the patch size 16 x 16'),
    (['photos', '--img-size', 'big'], "image size 'big' is not understood"),
    (['photos', '--set', 'pixel_dept=3'], 'did you mean pixel_depth?'),
    (['photos', '--in-chans', '2'], 'in_chans'),
    (['photos', '--device', 'cuda:9'], 'device'),
    (['photos', '--precision', 'fp16'], 'fp16 is not supported on a CPU'),
    (['photos', '--epochs', '0'], 'epochs 0 is below 1')])
def test_errors_are_one_sentence(args, says, tmp_path, console):
    status,_,text = console('bootmae-train', *args, '--arch', 'vit_tiny_patch16_224', '--out', tmp_path/'o')
    assert status == 2 and says in text and len(text.strip().splitlines()) == 1
    assert not (tmp_path/'o').exists()


def test_an_error_leaves_with_status_2():
    done = run('bootmae-train', '/no/such/folder')
    assert done.returncode == 2 and '/no/such/folder' in done.stderr and 'Traceback' not in done.stderr


def test_an_earlier_model_is_not_written_over(here, trained):
    before = (trained[0]/'model.safetensors').read_bytes()
    done = here('bootmae-train', 'photos', *small, '--out', trained[0])
    assert done.returncode == 2 and '--overwrite' in done.stderr
    assert (trained[0]/'model.safetensors').read_bytes() == before


def test_an_interrupt_keeps_what_was_learnt(folder, tmp_path):
    out = tmp_path/'cut'
    p = subprocess.Popen([bin/'bootmae-train', folder, *small, '--epochs', '500', '--out', out], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) # a test run in the background has it ignored
    while not (out/'reconstructions'/'epoch_0001.png').exists(): assert p.poll() is None, p.stderr.read(); time.sleep(.1)
    p.send_signal(signal.SIGINT)
    text,_ = p.communicate(timeout=60)
    assert p.returncode == 130 and 'interrupted' in text
    assert json.loads((out/'model.json').read_text())['training']['interrupted'] is True
    load_model(out)


def test_a_checkpoint_loads_and_draws_without_fastai(trained):
    code = f"""
import sys
from bootmae_nb import cli
from bootmae_nb.checkpoints import load_model, save_model
from bootmae_nb.images import sample_photo
from bootmae_nb.viz import reconstruct
reconstruct(load_model({str(trained[0])!r}), sample_photo('coffee'))
assert not [m for m in sys.modules if m.split('.')[0] in ('fastai', 'gradio')]"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr


# dBOT in stages, recipes, weights and their forms

def test_two_stages_leave_two_encoders(here, folder, tmp_path):
    dbot = [o for o in small if not o.startswith('pixel')]
    done = here('bootmae-train', folder, *dbot, 'feature_width=32', 'feature_depth=1', 'feature_heads=2', 'teacher_depth=0',
                '--method', 'dbot', '--stages', 2, '--epochs', 1, '--crops', 2, '--out', tmp_path/'o')
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path/'o'/'stages').glob('*.safetensors')) == ['stage_1.safetensors', 'stage_2.safetensors']
    model, first = load_model(tmp_path/'o'), load_model(tmp_path/'o'/'stages'/'stage_1.safetensors')
    assert all(torch.equal(v, first.encoder.state_dict()[k]) for k,v in model.teacher.state_dict().items())
    assert len(list(csv.DictReader((tmp_path/'o'/'history.csv').open()))) == 3


def test_a_recipe_is_printed_and_followed_and_weights_are_taken(here, trained, folder, tmp_path):
    done = here('bootmae-train', folder, *small, '--recipe', 'bootmae_base_800', '--epochs', 2, '--crops', 2, '--lr', 1e-4,
                '--weights', trained[0]/'model.safetensors', '--out', tmp_path/'o')
    assert done.returncode == 0, done.stderr
    assert 'bootmae_base_800' in done.stdout and '2 epochs' in done.stdout and 'cosine to' in done.stdout
    about = json.loads((tmp_path/'o'/'model.json').read_text())
    assert about['training']['recipe'] == 'bootmae_base_800' and about['training']['epochs'] == 2
    start, end = load_model(trained[0]), load_model(tmp_path/'o')
    moved = (start.encoder.vit.blocks[0].mlp.fc1.weight - end.encoder.vit.blocks[0].mlp.fc1.weight).abs().max()
    assert 0 < moved < .01


def test_teacher_by_file(here, trained, folder, tmp_path):
    done = here('bootmae-train', folder, *small, '--method', 'bootmae', '--teacher', trained[0]/'model.safetensors', '--epochs', 1, '--crops', 2, '--out', tmp_path/'o')
    assert done.returncode == 0, done.stderr
    model, teacher = load_model(tmp_path/'o'), load_model(trained[0])
    assert model.method.teacher == 'external' and torch.equal(model.teacher.vit.cls_token, teacher.encoder.vit.cls_token)


def test_sizes_and_masks_in_set(here, folder, tmp_path):
    "They count there too; an option of their own wins"
    args = ['bootmae-train', folder, '--arch', 'vit_tiny_patch16_224', '--img-size', 32, '--bs', 4, '--epochs', 1, '--crops', 1, '--set', 'patch_size=8',
            'width=48', 'depth=1', 'heads=3', 'pixel_width=32', 'mask=random', 'mask_ratio=.5']
    done = here(*args, '--out', tmp_path/'a')
    assert '4 x 4 patches of 8 px, 8 of them hidden (random mask)' in done.stdout, done.stderr
    done = here(*args, '--patch-size', 16, '--mask', 'block', '--out', tmp_path/'b')
    assert '2 x 2 patches of 16 px, 2 of them hidden (block mask)' in done.stdout, done.stderr


def test_an_encoder_alone_takes_the_names_that_are_asked_for(here, tmp_path):
    model = encoder_only(mim_model('mae', 'vit_tiny_patch16_224', img_size=32, patch_size=8, width=48, depth=1, heads=3, pixel_width=32, pixel_depth=1))
    save_model(model, tmp_path/'m')
    for to in ('bootmae', 'dbot'):
        done = here('bootmae-convert', tmp_path/'m.safetensors', tmp_path/f'{to}.pth', '--to', to)
        assert done.returncode == 0, done.stderr
        names = torch.load(tmp_path/f'{to}.pth', weights_only=True)['model']
        assert ('blocks.0.attn.q_bias' in names) == (to == 'bootmae')
    assert here('bootmae-convert', tmp_path/'m.safetensors', tmp_path/'vit', '--to', 'timm').returncode == 0
    done = here('bootmae-convert', tmp_path/'vit', tmp_path/'back', '--from', 'timm')
    assert done.returncode == 0 and not load_model(tmp_path/'back.safetensors').decoders, 'no decoders out of nothing'
    done = here('bootmae-convert', tmp_path/'nowhere.safetensors', tmp_path/'x', '--to', 'timm')
    assert done.returncode == 2 and 'nowhere.safetensors is not there' in done.stderr


def test_convert_there_and_back(trained, tmp_path, capsys):
    model = load_model(trained[0])
    bias = model.decoders['pixels'].head.bias
    bias.data = bias.data.reshape(-1, 3).mean(0).repeat(len(bias)//3)             # the authors' layout has one for each channel
    save_model(model, tmp_path/'even')
    even = tmp_path/'even.safetensors'
    done = run('bootmae-convert', even, tmp_path/'vit', '--to', 'timm')             # as a user types it; the rest in this process
    assert done.returncode == 0, done.stderr
    vit = timm.create_model(f'local-dir:{tmp_path/"vit"}', pretrained=True)
    assert torch.equal(vit.blocks[0].mlp.fc1.weight, model.encoder.vit.blocks[0].mlp.fc1.weight)
    cli.bootmae_convert(even, tmp_path/'theirs.pth', to_layout='bootmae')
    cli.bootmae_convert(even, tmp_path/'hub', to_layout='hub')
    again = load_model(tmp_path/'hub')
    assert all(torch.equal(v, again.state_dict()[k]) for k,v in model.state_dict().items())
    cli.bootmae_convert(tmp_path/'theirs.pth', tmp_path/'again', from_layout='bootmae', num_heads=3, img_size='32x48')
    again = load_model(tmp_path/'again.safetensors')
    assert all(torch.equal(v, again.decoders.state_dict()[k]) for k,v in model.decoders.state_dict().items())
    assert 'read as bootmae' in capsys.readouterr().out


@pytest.mark.parametrize('args,says', [
    (dict(out='hub', to_layout='onnx'), 'choose one of bootmae_nb'), (dict(out='there.safetensors'), 'is there already'),
    (dict(out='x.pth', to_layout='mae'), 'has no place in the layout of mae'), (dict(out='x', source='vit_nonsense.in1k'), 'cannot be had from timm'),
    (dict(out='x', source='nowhere.pth'), 'nowhere.pth')])
def test_convert_refuses_in_a_sentence(trained, args, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path); (tmp_path/'there.safetensors').touch()
    args = dict(source=trained[0]/'model.safetensors') | args
    with pytest.raises(SystemExit) as e: cli.bootmae_convert(args.pop('source'), Path(args.pop('out')), **args)
    text = capsys.readouterr().err
    assert e.value.code == 2 and says in text and len(text.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ['there.safetensors']


# ---- stopped, and gone on with

def started(*args, until, cwd=None):
    "A command that runs until a file is there"
    p = subprocess.Popen([bin/'bootmae-train', *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True, cwd=cwd,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    while not until.exists(): assert p.poll() is None, p.stderr.read(); time.sleep(.02)
    return p


def refused(console, *args):
    "What a command that must be refused says"
    status,_,err = console('bootmae-train', *args)
    assert status == 2
    return err


slow = dict(marks=pytest.mark.slow)


@pytest.mark.parametrize('number,status,workers', [
    pytest.param(signal.SIGKILL, -9, 0, **slow), pytest.param(signal.SIGINT, 130, 0, **slow), (signal.SIGTERM, 143, 2)])
def test_a_run_that_is_stopped_goes_on_to_the_weights_of_one_that_was_not(number, status, workers, trained, folder, tmp_path, console):
    "By a kill, by Ctrl-C to all processes, or by SIGTERM to all processes"
    out = tmp_path/'run'
    args = folder, *small, '--epochs', 3, '--crops', 4, '--lr', 1e-3, '--out', out, '--seed', 3
    p = started(*args, '--state-steps', 1, '--workers', workers, until=out/'reconstructions'/'epoch_0001.png')
    os.killpg(p.pid, number)
    text,_ = p.communicate(timeout=60)
    assert p.returncode == status and ('--resume' in text) == (number != signal.SIGKILL)
    text = refused(console, *args)
    assert 'holds a run that stopped in epoch' in text and '--resume' in text
    text = refused(console, '--resume', out, '--bs', 2)
    assert 'bs: 4 -> 2' in text and '--allow-changes' in text
    done = run('bootmae-train', '--resume', out)
    assert done.returncode == 0, done.stderr
    assert same_weights(out, trained[0])
    mine,theirs = ([{k: v for k,v in row.items()} for row in csv.DictReader(open(o/'history.csv'))] for o in (out, trained[0]))
    assert mine == theirs and len(mine) == 4


def same_weights(a, b):
    a,b = (load_model(o).state_dict() for o in (a, b))
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())


@pytest.mark.slow
def test_a_recipe_with_stages_goes_on(folder, tmp_path):
    sizes = 'width=48', 'depth=2', 'heads=3', 'feature_width=32', 'feature_depth=1', 'feature_heads=2'
    args = folder, *small[:8], '--set', *sizes, '--method', 'dbot', '--stages', 2, '--epochs', 2, '--crops', 4, '--seed', 3
    whole = run('bootmae-train', *args, '--out', tmp_path/'whole')
    assert whole.returncode == 0, whole.stderr
    p = started(*args, '--out', tmp_path/'run', '--state-steps', 1, until=tmp_path/'run'/'stages'/'stage_1.safetensors')
    p.kill(); p.communicate(timeout=60)
    done = run('bootmae-train', '--resume', tmp_path/'run')
    assert done.returncode == 0, done.stderr
    assert same_weights(tmp_path/'run', tmp_path/'whole') and (tmp_path/'run'/'stages'/'stage_2.safetensors').exists()


def test_a_file_that_went_bad_in_the_meantime_keeps_its_place(folder, tmp_path):
    "Another takes it, and the run goes on with the same list of images; what was left out at first stays out"
    import shutil
    images = tmp_path/'images'; shutil.copytree(folder, images)
    (tmp_path/'bootmae').mkdir(); (tmp_path/'photos').mkdir()           # folders of the names of arguments
    p = started('images', *small, '--method', 'bootmae', '--epochs', 3, '--crops', 4, '--out', 'run', '--state-steps', 1, cwd=tmp_path,
                until=tmp_path/'run'/'reconstructions'/'epoch_0001.png')
    p.kill(); p.communicate(timeout=60)
    spoilt = sorted(images.rglob('*.jpg'))[2]
    spoilt.write_bytes(spoilt.read_bytes()[:700])
    done = run('bootmae-train', '--resume', tmp_path/'run')
    assert done.returncode == 0 and spoilt.name in done.stderr and 'Traceback' not in done.stderr, done.stderr
    assert json.loads((tmp_path/'run'/'run.json').read_text())['left_out'] == ['broken.png']


@pytest.mark.slow
def test_a_run_is_made_longer_and_what_was_changed_is_remembered(folder, tmp_path):
    assert run('bootmae-train', folder, *small, '--epochs', 3, '--crops', 4, '--out', tmp_path/'run').returncode == 0
    assert run('bootmae-train', '--resume', tmp_path/'run').returncode == 0, 'a finished run is finished'
    more = run('bootmae-train', '--resume', tmp_path/'run', '--epochs', 4, '--bs', 5, '--allow-changes')
    assert more.returncode == 0 and len((tmp_path/'run'/'history.csv').read_text().splitlines()) == 6, more.stderr       # names, before training, four epochs
    again = run('bootmae-train', '--resume', tmp_path/'run')
    assert again.returncode == 0, again.stderr                          # what was changed is remembered


def test_what_cannot_be_gone_on_with(tmp_path, console):
    for args,says in ((['--resume', tmp_path], 'holds no run of bootmae-train'), ([], 'no images were named')):
        text = refused(console, *args)
        assert says in text and len(text.strip().splitlines()) == 1
    (tmp_path/'run.json').write_text('{}')
    assert 'run.json lacks' in refused(console, '--resume', tmp_path)


@pytest.mark.slow
def test_two_processes_by_one_flag_that_are_stopped_and_gone_on_with(folder, tmp_path):
    args = folder, *small, '--epochs', 3, '--crops', 4, '--lr', 1e-3, '--seed', 3, '--nproc', 2, '--device', 'cpu'
    whole = run('bootmae-train', *args, '--out', tmp_path/'whole')
    assert whole.returncode == 0 and whole.stdout.count('writing to') == 1, whole.stderr
    p = started(*args, '--out', tmp_path/'run', '--state-steps', 1, until=tmp_path/'run'/'reconstructions'/'epoch_0001.png')
    p.send_signal(signal.SIGTERM)
    text,_ = p.communicate(timeout=120)
    assert p.returncode == 143 and '--resume' in text
    done = run('bootmae-train', '--resume', tmp_path/'run')
    assert done.returncode == 0, done.stderr
    assert same_weights(tmp_path/'run', tmp_path/'whole')
    assert json.loads((tmp_path/'run'/'model.json').read_text())['training']['processes'] == 2
    other = run('bootmae-train', '--resume', tmp_path/'run', '--nproc', 1)
    assert other.returncode == 2 and 'nproc: 2 -> 1' in other.stderr


@pytest.mark.parametrize('given,want', [(None, '10000'), ('5', '5')])
def test_waiting_threads_of_a_command_spin_shortly_unless_told_otherwise(given, want):
    "On cores that other programs use as well, spinning threads make small models several times slower"
    env = {k: v for k,v in os.environ.items() if k != 'GOMP_SPINCOUNT'} | ({} if given is None else dict(GOMP_SPINCOUNT=given))
    code = "import os; from bootmae_nb.cli import plain_errors; plain_errors(lambda: print(os.environ['GOMP_SPINCOUNT']))()"
    assert subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True).stdout.strip() == want
