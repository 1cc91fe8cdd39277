"""Studies: runs go on where they were stopped, results are kept and compared as written down, and all variants hide equally much."""
import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from PIL import Image
from scipy.stats import t

from common import equal, state
from bootmae_nb import study
from bootmae_nb.analyse import cka
from bootmae_nb.checkpoints import load_model, save_model
from bootmae_nb.evaluate import encoder_features
from bootmae_nb.models import mim_model
from bootmae_nb.study import (Claim, Scale, StudyData, _half_width, alike, alike_table, cifar_files, claim_table, claims, compare, measure_run,
                              measures_of, plot_study, pretrain, read_images, read_result, read_results, right_of, run_study, study_learner, summary,
                              variants, verdict)
from bootmae_nb.viz import mask_for

tiny = Scale(width=16, depth=2, heads=2, patch_size=4, img_size=16, plain_width=16, plain_depth=1, plain_heads=2, per_class=8, epochs=2, bs=8, strengths=(.01, 1.),
             few=(2,), finetune_labels=4, finetune_epochs=1)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "Dark and light images of 16 x 16 pixels, as in CIFAR-10's folders"
    root,g = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for part,n in ('train', 12), ('valid', 5):
        for i,c in enumerate(['dark', 'light']):
            (root/part/c).mkdir(parents=True)
            for k in range(n): Image.fromarray((g.random((16, 16, 3))*127 + 128*i).astype('uint8')).save(root/part/c/f'{k:02}.png')
    return root


@pytest.fixture(scope='module')
def chain(images, tmp_path_factory):
    "Runs of dBOT and of those that teach it"
    runs = tmp_path_factory.mktemp('runs')
    for name in ('dbot2', 'dbot_mae2'): pretrain(name, 1, images, runs, replace(tiny, epochs=1), progress=False)
    return runs


class Stop(Callback):
    "Interrupt after a step"
    order = -5
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.training and self.learn.train_iter == self.at: raise KeyboardInterrupt


# files

def test_files_are_in_the_order_of_their_names(tmp_path):
    for part,names in ('train', 'ba'), ('test', 'ab'):
        for c in names:
            (tmp_path/part/c).mkdir(parents=True)
            for o in ('2.png', '10.png', '1.JPG', 'notes.txt'): (tmp_path/part/c/o).write_bytes(b'')
    (tmp_path/'train'/'.cache').mkdir(); (tmp_path/'train'/'list.png').write_bytes(b'')
    files,y,vocab = cifar_files(tmp_path)
    assert [str(o.relative_to(tmp_path/'train')) for o in files] == ['a/1.JPG', 'a/10.png', 'a/2.png', 'b/1.JPG', 'b/10.png', 'b/2.png']
    assert y == [0, 0, 0, 1, 1, 1] and vocab == ['a', 'b']
    files,y,_ = cifar_files(tmp_path, 'valid', 1)
    assert [str(o.relative_to(tmp_path)) for o in files] == ['test/a/1.JPG', 'test/b/1.JPG'] and y == [0, 1]
    (tmp_path/'valid'/'c').mkdir(parents=True)
    assert cifar_files(tmp_path, 'valid')[2] == ['c']                                       # `valid` before `test`
    with pytest.raises(ValueError, match=r"other classes for training \(\['a', 'b'\]\) than for validation \(\['c'\]\)"): StudyData.of(tmp_path, tiny)


def test_folders_that_are_not_there_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='holds no folder train'): cifar_files(tmp_path)
    with pytest.raises(FileNotFoundError, match='holds no folder valid or test'): cifar_files(tmp_path, 'valid')
    (tmp_path/'train').mkdir()
    with pytest.raises(FileNotFoundError, match='train holds no folders of classes'): cifar_files(tmp_path)


def test_images_are_read_as_they_are_and_resized_where_they_must(images):
    files = cifar_files(images)[0][:3]
    x = read_images(files, 16)
    assert x.shape == (3, 3, 16, 16) and torch.equal((x[1]*255).round().byte(), torch.from_numpy(np.array(Image.open(files[1]))).permute(2, 0, 1))
    assert read_images(files, 8).shape == (3, 3, 8, 8)


# pretraining

def test_a_run_that_is_interrupted_ends_as_one_that_is_not(images, tmp_path, monkeypatch):
    whole,own = pretrain('bootmae', 0, images, tmp_path/'whole', tiny, progress=False), study.study_learner
    def cut(*args):
        learn = own(*args); learn.add_cb(Stop(3)); return learn
    with monkeypatch.context() as m:
        m.setattr(study, 'study_learner', cut)
        with pytest.raises(KeyboardInterrupt): pretrain('bootmae', 0, images, tmp_path/'cut', tiny, progress=False)
    out = tmp_path/'cut'/'bootmae-0'
    assert not (out/'model.safetensors').exists()
    sofar = json.loads((out/'study.json').read_text())['seconds']
    for other,says in (dict(epochs=3), 'epochs: 2 -> 3'), (dict(lr=1e-3), 'lr: 0.002 -> 0.001'):                      # else it would end with sizes that it does not have
        with pytest.raises(ValueError, match=f'run of other sizes .*{says}'): pretrain('bootmae', 0, images, tmp_path/'cut', replace(tiny, **other), progress=False)
    pretrain('bootmae', 0, images, tmp_path/'cut', tiny, progress=False)
    a,b = (json.loads((o/'model.json').read_text()) for o in (whole, out))
    assert equal(state(load_model(whole)), state(load_model(out))) and a['losses'] == b['losses'] and len(a['losses']['epochs']) == 2
    assert b['seconds'] > sofar > 0 and a['variant'] == 'bootmae' and a['seed'] == 0 and a['scale']['epochs'] == 2


def test_a_finished_run_is_left_alone_and_one_of_other_sizes_refused(images, tmp_path):
    run = pretrain('untrained', 0, images, tmp_path, tiny, progress=False)
    before = (run/'model.safetensors').stat().st_mtime_ns
    assert pretrain('untrained', 0, tmp_path/'nowhere', tmp_path, replace(tiny, few=(7,), finetune_epochs=9), progress=False) == run      # what follows is for measuring
    assert (run/'model.safetensors').stat().st_mtime_ns == before
    for other in (dict(per_class=4), dict(epochs=3), dict(precision='bf16')):
        with pytest.raises(ValueError, match=f'{next(iter(other))}: .* -> '): pretrain('untrained', 0, images, tmp_path, replace(tiny, **other), progress=False)


def test_the_untrained_variant_has_the_initial_weights(images, tmp_path):
    run = pretrain('untrained', 4, images, tmp_path, tiny, progress=False)
    files = cifar_files(images)[0]
    assert equal(state(load_model(run)), state(study_learner('bootmae', 4, tiny, files, files[:2], tmp_path/'o').model))


def test_the_teacher_is_the_run_before_and_the_student_begins_anew(images, chain):
    files = cifar_files(images)[0]
    fresh = state(study_learner('dbot', 1, replace(tiny, epochs=1), files, files[:2], chain).model.encoder)
    for name,before in (('dbot2', 'dbot'), ('dbot_mae', 'mae'), ('dbot_mae2', 'dbot_mae')):
        assert variants[name].teacher == before
        taught = state(load_model(chain/f'{before}-1').encoder)
        learn = study_learner(name, 1, replace(tiny, epochs=1), files, files[:2], chain, chain/f'{before}-1'/'model.safetensors')
        for model in (learn.model, load_model(chain/f'{name}-1')):                          # before, and after it was trained
            teacher = state(model.teacher)
            assert teacher.keys() <= taught.keys() and equal(teacher, {k: taught[k] for k in teacher}) and any('blocks.1' in k for k in teacher)
            assert not any(p.requires_grad for p in model.teacher.parameters())
        assert equal(state(learn.model.encoder), fresh)
    assert sorted(o.name for o in chain.iterdir()) == ['dbot-1', 'dbot2-1', 'dbot_mae-1', 'dbot_mae2-1', 'mae-1']


@pytest.mark.parametrize('name', variants)
def test_each_variant_hides_as_many_patches_and_has_the_encoder_of_the_others(name, images, chain):
    files,v = cifar_files(images)[0], variants[name]
    scale = replace(tiny, img_size=32)                                                      # the study's grid of 8 x 8
    teacher = None if v.teacher is None else chain/f'{v.teacher}-1'/'model.safetensors'
    if teacher is not None: scale = replace(tiny, epochs=1)
    model = study_learner(name, 0, scale, files, files[:2], chain, teacher).model
    L = model.grid[0]*model.grid[1]
    hidden = mask_for(model, bs=16).sum(1).tolist()
    assert set(hidden) == {L*3//4} and sum(p.numel() for p in model.encoder.parameters()) == sum(
        p.numel() for p in study_learner('mae', 0, scale, files, files[:2], chain).model.encoder.parameters())
    assert v.method in ('bootmae', 'mae', 'dbot') and all(k in model.config['method'] for k,_ in v.ablations)
    for k,value in v.ablations: assert model.config['method'][k] in (value, list(value) if isinstance(value, tuple) else value)


def test_the_ablations_differ_from_bootmae_in_what_they_say():
    ab = {n: dict(variants[n].ablations) for n in ('pixels', 'features', 'bootmae', 'random', 'untrained')}
    assert ab == dict(pixels=dict(targets=('pixels',), pixel_inject=None), features=dict(pixel_inject=None, feature_inject=None), bootmae={}, random=dict(mask='random'),
                      untrained={})


# measuring

def test_which_were_right_comes_back_at_every_length():
    g = np.random.default_rng(0)
    for n in (1, 7, 8, 9, 13, 16, 1000):
        y = torch.from_numpy(g.integers(0, 2, n))
        m = study._measured(torch.ones(n, dtype=torch.long), y, more=3)
        assert right_of(json.loads(json.dumps(m))).tolist() == (y == 1).tolist() and m['n'] == n and m['accuracy'] == pytest.approx((y == 1).double().mean().item())
        assert len(m['right']) == 2*-(-n//8) and m['more'] == 3


def test_measuring_goes_on_between_measures_and_repeats_none(images, tmp_path, monkeypatch):
    run,data,path = pretrain('untrained', 0, images, tmp_path, tiny, progress=False), StudyData.of(images, tiny), tmp_path/'untrained-0.json'
    calls,probe,tune = [], study.probe_all, study.fine_tune
    def broken(*a): raise KeyboardInterrupt
    monkeypatch.setattr(study, 'probe_all', lambda *a: calls.append('probes') or probe(*a))
    monkeypatch.setattr(study, 'fine_tune', broken)
    measure = lambda **kw: measure_run('untrained', 0, data, run, path, tiny, progress=False, **kw)
    with pytest.raises(KeyboardInterrupt): measure()
    got = json.loads(path.read_text())
    assert set(got['measures']) == {'knn', 'linear', 'few_2'} and calls == ['probes']
    assert measure(finetune=False)['measures'] == got['measures'] and calls == ['probes']
    monkeypatch.setattr(study, 'fine_tune', lambda *a: calls.append('finetune') or tune(*a))
    res = measure()
    assert calls == ['probes', 'finetune'] and set(res['measures']) == {'knn', 'linear', 'few_2', 'finetune'} and res['measures']['knn'] == got['measures']['knn']
    assert measure() == res == read_result(path) | dict(scale=res['scale'], losses=res['losses']) and calls == ['probes', 'finetune']
    assert res['measures']['finetune']['labels'] == 8 and res['measures']['finetune']['n'] == 10 and not list(tmp_path.glob('*.tmp*'))
    before = path.read_bytes()
    for other in (dict(few=(1,)), dict(epochs=1), dict(finetune_lr=1.)):
        with pytest.raises(ValueError, match='untrained-0.json is the result of another study'): measure_run('untrained', 0, data, run, path, replace(tiny, **other))
    assert path.read_bytes() == before
    path.write_text('{"key": ')
    with pytest.raises(ValueError, match=r'untrained-0.json is damaged \(.*\): remove it'): measure()


def test_fine_tuning_reads_the_test_images_where_the_model_is_and_leaves_the_encoder(images, tmp_path):
    data = StudyData.of(images, tiny)
    model = load_model(pretrain('untrained', 0, images, tmp_path, tiny, progress=False))
    before = state(model)
    a,b = (study.fine_tune(model, data.train, data.test_x, data.test[1], data.vocab, 0, replace(tiny, finetune_labels=n), progress=False) for n in (4, None))
    assert (a['labels'], b['labels']) == (8, 16) and equal(before, state(model))
    assert study.fine_tune(model, data.train, data.test_x, data.test[1], data.vocab, 0, tiny, progress=False) == a


def test_a_study_goes_on_and_says_so(images, tmp_path, capsys, monkeypatch):
    with pytest.raises(ValueError, match='simmim is no variant: choose from untrained'): run_study(images, tmp_path/'r', tmp_path/'s', tiny, [('simmim', 0)])
    go = lambda **kw: run_study(images, tmp_path/'r', tmp_path/'s', tiny, [('untrained', 0), ('untrained', 1)], finetune=False, progress=False, **kw)
    go(hours=0.)
    assert 'start again to go on' in capsys.readouterr().out and [o.name for o in (tmp_path/'s').iterdir()] == ['raw-0.json']
    go()
    assert [(r['variant'], r['seed']) for r in read_results(tmp_path/'s')] == [('raw', 0), ('untrained', 0), ('untrained', 1)]
    assert capsys.readouterr().out.count('untrained') == 2
    before = {o: o.read_bytes() for o in (tmp_path/'s').iterdir()}
    monkeypatch.setattr(study, 'probe_all', lambda *a: pytest.fail('measured again'))
    go()
    assert before == {o: o.read_bytes() for o in (tmp_path/'s').iterdir()}
    shutil.copy(tmp_path/'s'/'raw-0.json', tmp_path/'one.json')
    other = json.loads((tmp_path/'one.json').read_text()); other['scale']['epochs'] = 77
    (tmp_path/'s'/'other.json').write_text(json.dumps(other))
    with pytest.raises(ValueError, match='results of studies of 2 different sizes'): read_results(tmp_path/'s')
    with pytest.raises(FileNotFoundError, match='holds no results'): read_results(tmp_path/'r')


# what the results say

def result(name, seed, right, measure='knn', **more):
    "A result as it is kept"
    right = np.asarray(right, bool)
    return dict(variant=name, seed=seed, scale=asdict(tiny), measures={measure: dict(accuracy=float(right.mean()), n=len(right), right=study._packed(right))} | more)


@pytest.fixture(scope='module')
def made():
    "Three seeds of two variants whose figures go up and down together, one of a third, and pixels"
    g = np.random.default_rng(1)
    base = {s: g.random(403) < p for s,p in ((0, .3), (1, .5), (2, .7))}
    better = {s: b.copy() for s,b in base.items()}
    for s,b in better.items(): b[np.flatnonzero(~b)[:36 + 4*s]] = True
    return ([result('mae', s, b) for s,b in base.items()] + [result('bootmae', s, better[s]) for s in (2, 0, 1)] + [result('pixels', 1, better[1])] +
            [result('raw', 0, g.random(403) < .45)]), base, better


def test_a_difference_is_paired_by_seed_and_image_and_its_interval_is_the_formula(made):
    results,base,better = made
    c = compare(results, 'bootmae', 'mae')
    d = np.stack([better[s].astype(float) - base[s] for s in range(3)])
    per_seed,per_image = d.mean(1), d.mean(0)
    se_seeds = np.sqrt(((per_seed - per_seed.mean())**2).sum()/2/3)
    se_images = np.sqrt(((per_image - per_image.mean())**2).sum()/402/403)
    assert t.ppf(.975, 2) == pytest.approx(4.3027, abs=1e-4)
    assert c['seeds'] == 3 and c['per_seed'] == pytest.approx(per_seed.tolist()) and c['difference'] == pytest.approx(d.mean())
    assert c['half'] == pytest.approx(np.sqrt((4.302652729911275*se_seeds)**2 + (1.96*se_images)**2), rel=1e-9)
    assert verdict(c) == 'holds' and verdict(compare(results, 'mae', 'bootmae')) == 'the opposite'
    mixed = [r | dict(seed=(r['seed'] + 1) % 3) if r['variant'] == 'mae' else r for r in results]                 # other pairs: the seeds' own ups and downs show
    assert compare(mixed, 'bootmae', 'mae')['half'] > 5*c['half'] and verdict(compare(mixed, 'bootmae', 'mae')) == 'no difference seen'


def test_of_one_seed_only_the_images_count_and_the_verdict_says_so(made):
    results,base,better = made
    c = compare(results, 'pixels', 'mae')                                                  # seed 1 of both
    d = better[1].astype(float) - base[1]
    assert c['seeds'] == 1 and c['difference'] == pytest.approx(d.mean()) and c['half'] == pytest.approx(1.96*d.std(ddof=1)/np.sqrt(403))
    assert verdict(c) == 'holds (one seed)'
    assert compare(results, 'pixels', 'untrained') is None and verdict(None) == 'not run' and compare(results, 'pixels', 'mae', 'linear') is None


def test_pixels_are_compared_with_every_seed(made):
    results,base,_ = made
    raw = right_of(next(r for r in results if r['variant'] == 'raw')['measures']['knn'])
    c = compare(results, 'mae', 'raw')
    assert c['seeds'] == 3 and c['per_seed'] == pytest.approx([(base[s].astype(float) - raw).mean() for s in range(3)])


@pytest.mark.parametrize('difference,half,seeds,says', [(.1, .1, 3, 'no difference seen'), (.1, .099, 3, 'holds'), (-.1, .099, 3, 'the opposite'),
                                                        (-.1, .2, 1, 'no difference seen (one seed)'), (-.3, .2, 1, 'the opposite (one seed)')])
def test_the_words_of_a_verdict(difference, half, seeds, says): assert verdict(dict(difference=difference, half=half, seeds=seeds)) == says


def test_tables(made):
    results,base,better = made
    s = summary(results)
    x = np.stack([*base.values()]).astype(float)
    assert s.loc['mae', 'knn'] == f'{100*x.mean():.1f} ± {100*study._half_width(x):.1f}' and s.seeds.to_dict() == dict(mae=3, bootmae=3, pixels=1, raw=1)
    assert s.loc['raw', 'what'] == 'pixels as they are' and s.loc['mae', 'what'] == 'MAE'
    more = [*results, result('dbot', 0, [True, False]*10, 'few_2')]
    assert measures_of(more) == ['knn', 'few_2'] and summary(more).loc['mae', 'few_2'] == ''
    c,d = claim_table(results, ('knn', 'linear')), compare(results, 'bootmae', 'mae')
    assert len(c) == len(claims) and (c.linear == 'not run').all()
    row = c[c.what == 'BootMAE beats MAE'].iloc[0]
    assert row.name == 'a' and row.knn == f"{100*d['difference']:+.1f} ± {100*d['half']:.1f}: holds"
    assert (c.knn == 'not run').sum() == sum(compare(results, o.better, o.worse) is None for o in claims)


def test_claims_are_of_variants():
    assert all(isinstance(o, Claim) and {o.better, o.worse} <= {'raw', *variants} and o.better != o.worse for o in claims)
    assert {v.teacher for v in variants.values()} - {None} <= set(variants)


def test_a_dot_for_each_seed(made):
    results = made[0]
    fig = plot_study(results, ('knn', 'linear'))
    assert len(fig.axes) == 1                                                              # a panel of what was measured
    dots = {round(float(y)): sorted(float(x) for x in o.get_offsets()[:, 0]) for o in fig.axes[0].collections for y in o.get_offsets()[:1, 1]}
    names = ['raw', 'pixels', 'bootmae', 'mae']
    want = {i: sorted(100*r['measures']['knn']['accuracy'] for r in results if r['variant'] == n) for i,n in enumerate(names)}
    assert dots.keys() == want.keys() and all(dots[i] == pytest.approx(want[i]) for i in want)
    lines = [o.get_xdata()[0] for o in fig.axes[0].lines]
    assert lines == pytest.approx([np.mean(want[i]) for i in want])
    assert [o.get_text() for o in fig.axes[0].get_yticklabels()] == ['raw pixels', 'pixels only', '+ injection = BootMAE', 'MAE']


def test_a_file_that_is_no_result_is_named(tmp_path):
    (tmp_path/'other.json').write_text('[1]')
    with pytest.raises(ValueError, match='other.json is no result of a study'): read_results(tmp_path)


def test_one_image_says_nothing():
    assert _half_width(np.array([[1.], [0.]])) == np.inf


def test_likeness_of_runs(images, tmp_path):
    x = StudyData.of(images, tiny).test_x
    for name,seed in (('untrained', 0), ('untrained', 1), ('mae', 0)):
        size = dict(patch_size=4, width=16, depth=2, heads=2, pixel_width=16, pixel_depth=1, pixel_heads=2)
        save_model(mim_model('mae', 'vit_tiny_patch16_224', 16, **size, seed=seed + 5*(name == 'mae')), tmp_path/f'{name}-{seed}'/'model')
    res = alike(tmp_path, tmp_path/'cka.json', x)
    f = {o: encoder_features(load_model(tmp_path/o), x)[0] for o in ('untrained-0', 'untrained-1', 'mae-0')}
    assert list(res) == ['mae 0 | untrained 0', 'untrained 0 | untrained 1']
    assert [*res.values()] == pytest.approx([cka(f[a], f['untrained-0']) for a in ('mae-0', 'untrained-1')], abs=1e-4)
    t = alike_table(tmp_path/'cka.json')
    assert list(t.index) == ['mae and untrained', 'untrained, another seed'] and t.runs.tolist() == [1, 1]
    with pytest.raises(FileNotFoundError, match='no two runs'): alike(tmp_path/'none', tmp_path/'c.json', x)
