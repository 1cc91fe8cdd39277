"""dBOT's stages: what teaches whom, that everything starts anew, and that a run repeats itself."""
import json

import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.training import GradientAccumulation
from fastai.learner import load_learner

from common import equal, quietly, state
from bootmae_nb.callbacks import StagedTeacher
from bootmae_nb.checkpoints import load_model
from bootmae_nb.data import mim_dls
from bootmae_nb.evaluate import KNNProbe
from bootmae_nb.learner import mim_learner
from bootmae_nb.models import mim_model, next_stage
from bootmae_nb.vit import make_encoder

tiny = dict(arch='vit_tiny_patch16_224', width=48, depth=2, heads=3, patch_size=8, feature_width=32, feature_depth=2, feature_heads=4, method='dbot')


def learner(tmp_path, **kw):
    dls = mim_dls(img_size=32, bs=8, crops_per_image=4, num_workers=0, seed=1, device='cpu')
    return mim_learner(dls, **tiny | dict(path=tmp_path) | kw)


class Watch(Callback):
    "What the model is at the end of each epoch and after the first step of the next, and the learning rate of each step"
    order = 80
    def before_fit(self): self.ends,self.starts,self.lrs,self.moments = [], [], [], []
    def after_epoch(self): self.ends.append(state(self.model))
    def before_train(self):
        self.starts.append(state(self.model))
        self.moments.append(sum(len(o) for o in self.opt.opt.state.values()))
    def after_step(self): self.lrs.append(self.opt.hypers[-1]['lr'])


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp('run')
    learn = learner(path, cbs=Watch())
    log = quietly(learn, 'fit_stages', 2, stages=2, lr=1e-3, probe=lambda m: dict(depth=m.encoder.depth))
    return learn, log, path


def test_the_first_encoder_teaches_the_second_stage_bit_for_bit(run):
    learn,log,_ = run
    part = lambda s, p: {k.removeprefix(p): v for k,v in s.items() if k.startswith(p)}
    stage1 = part(learn.watch.ends[1], 'encoder.')
    assert equal(part(learn.watch.starts[2], 'teacher.'), stage1) and equal(part(state(learn.model), 'teacher.'), stage1)
    assert equal(part(learn.watch.ends[0], 'teacher.'), part(learn.watch.ends[1], 'teacher.')), 'the teacher stays within a stage'
    assert equal(state(load_model(log[0]['file']).encoder), stage1)
    assert equal(state(load_model(log[1]['file']).encoder), state(learn.model.encoder))
    assert not any(p.requires_grad for p in learn.model.teacher.parameters()) and not learn.model.teacher.training


def test_every_parameter_of_the_student_starts_anew(run):
    learn = run[0]
    before,after = learn.watch.ends[1], learn.watch.starts[2]
    learnt = [n for n,p in learn.model.named_parameters() if p.requires_grad]
    assert learnt and all(not torch.equal(before[n], after[n]) for n in learnt)
    assert learn.watch.moments[1] > 0 and learn.watch.moments[2] == 0, 'and so do the moments of the optimiser'
    first = learn.watch.starts[0]
    assert any(not torch.equal(first[n], after[n]) for n in learnt), 'with other random numbers than the first stage'


def test_the_schedule_runs_once_per_stage(run, tmp_path):
    lrs = run[0].watch.lrs
    one = learner(tmp_path, cbs=Watch())
    quietly(one, 'fit_one_cycle', 2, 1e-3)
    assert len(lrs) == 2*len(one.watch.lrs)
    assert lrs == pytest.approx(one.watch.lrs*2, rel=1e-6)


def test_the_first_stage_is_a_run_of_its_own(run, tmp_path):
    "A run of one stage of the same length gives the weights of the first stage"
    one = learner(tmp_path)
    quietly(one, 'fit_one_cycle', 2, 1e-3)
    ends = run[0].watch.ends[1]
    assert all(torch.allclose(v, ends[k], atol=1e-6) for k,v in state(one.model).items())


def test_a_second_run_gives_identical_weights(run, tmp_path):
    again = learner(tmp_path)
    log = quietly(again, 'fit_stages', 2, stages=2, lr=1e-3)
    assert equal(state(again.model), state(run[0].model))
    assert [o['stage'] for o in log] == [1, 2] and run[1][1]['depth'] == 2


def test_resuming_at_the_boundary_and_after_it_equals_the_whole_run(run, tmp_path):
    "Saved at the end of the first stage, or within the second: `start_epoch` goes on with the same weights, and changes nothing when the stage has begun"
    for done in (2, 3):
        half = learner(tmp_path)
        class Stop(Callback):
            order = 85
            def after_epoch(self, done=done):
                if self.epoch + 1 == done: self.learn.save('half'); raise CancelFitException
        quietly(half, 'fit_one_cycle', 4, 1e-3, cbs=[StagedTeacher(2, folder=False), Stop()])
        rest = learner(tmp_path)
        rest.load('half')
        quietly(rest, 'fit_one_cycle', 4, 1e-3, cbs=StagedTeacher(2, folder=False), start_epoch=done)
        assert equal(state(rest.model), state(run[0].model)), f'resumed after {done} epochs'


@pytest.mark.parametrize('kw', [dict(teacher_depth=0), dict(feature_blocks=(0, 1)), dict(teacher='wide')], ids=str)
def test_other_first_teachers_end_as_the_encoder(kw, tmp_path):
    wide = kw.get('teacher') == 'wide'
    if wide: kw = dict(teacher=make_encoder('vit_tiny_patch16_224', 32, patch_size=8, width=64, depth=3, heads=4))
    learn = learner(tmp_path, cbs=Watch(), **kw)
    quietly(learn, 'fit_stages', 1, stages=2, lr=1e-3, folder=False)
    model = learn.model
    assert {k: v.shape for k,v in state(model.teacher).items()} == {k: v.shape for k,v in state(model.encoder).items()}
    assert model.method.teacher == 'frozen' and model.config['teacher'] is None
    assert model.decoders['features'].head.out_features == 48*model.method.n_parts
    ids = {id(p) for g in learn.opt.param_lists for p in g}
    assert ids == {id(p) for p in model.parameters() if p.requires_grad}, 'the optimiser holds the parameters of the model'
    assert [o['wd'] for o in learn.opt.hypers] == [.05, 0.]
    learn.save('m')
    fresh = learner(tmp_path, **kw)
    assert equal(state(fresh.load('m').model), state(model))


def test_a_file_of_a_later_stage_into_a_learner_that_has_trained(tmp_path):
    "The feature head is a new one there, and the optimiser follows it"
    wide = dict(teacher=make_encoder('vit_tiny_patch16_224', 32, patch_size=8, width=64, depth=3, heads=4))
    staged, other = learner(tmp_path, **wide), learner(tmp_path, **wide)
    quietly(staged, 'fit_stages', 1, stages=2, lr=1e-3, folder=False)
    staged.save('m')
    quietly(other, 'fit', 1, 1e-3)
    other.load('m')
    assert equal(state(other.model), state(staged.model))
    assert {id(p) for g in other.opt.param_lists for p in g} == {id(p) for p in other.model.parameters() if p.requires_grad}
    quietly(other, 'fit', 1, 1e-3)
    assert not torch.equal(other.model.decoders['features'].head.weight, staged.model.decoders['features'].head.weight)


def test_stages_survive_lr_find_save_load_export(tmp_path):
    learn = learner(tmp_path)
    before = state(learn.model)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=5, show_plot=False)
    assert equal(state(learn.model), before)
    quietly(learn, 'fit_stages', 1, stages=2, lr=1e-3, folder=False)
    learn.export('l.pkl')
    assert equal(state(load_learner(tmp_path/'l.pkl').model), state(learn.model))
    assert not hasattr(learn, 'stage_epochs')
    quietly(learn, 'fit_one_cycle', 1, 1e-3)


def test_with_gradient_accumulation_and_bf16(tmp_path):
    learn = learner(tmp_path, precision='bf16', cbs=GradientAccumulation(16))
    quietly(learn, 'fit_stages', 1, stages=3, schedule='paper', base_lr=1e-2, folder=False)
    assert all(v.isfinite().all() for v in state(learn.model).values() if v.is_floating_point())


def test_what_is_refused(tmp_path):
    boot = learner(tmp_path, method='bootmae')
    with pytest.raises(ValueError, match="need a teacher that does not move"): quietly(boot, 'fit_stages', 1)
    with pytest.raises(ValueError, match='3 stages do not fit into 2 epochs'): quietly(learner(tmp_path), 'fit_one_cycle', 2, cbs=StagedTeacher(3))
    with pytest.raises(ValueError, match='schedule'): learner(tmp_path).fit_stages(1, schedule='cosine')


def test_the_new_student_depends_on_seed_and_stage_alone():
    "Not on the global generator, nor on the process: so all ranks get the same one"
    ends = []
    for noise,seed in ((1, 5), (2, 5), (1, 6)):
        model = mim_model(img_size=32, seed=0, **tiny)
        torch.manual_seed(noise); before = torch.get_rng_state()
        next_stage(model, seed)
        assert torch.equal(before, torch.get_rng_state())
        ends.append(state(model))
    assert equal(ends[0], ends[1]) and not equal(ends[0], ends[2])


def test_a_knn_probe_per_stage_is_logged_and_changes_no_weight(run, tmp_path):
    x = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0)); y = torch.arange(24) % 3
    learn = learner(tmp_path)
    log = quietly(learn, 'fit_stages', 2, stages=2, lr=1e-3, probe=KNNProbe((x[:16], y[:16]), (x[16:], y[16:]), k=3))
    assert all(0 <= o['knn'] <= 1 for o in log) and json.loads(log[0]['file'].with_suffix('.json').read_text())['knn'] == log[0]['knn']
    assert equal(state(learn.model), state(run[0].model))
