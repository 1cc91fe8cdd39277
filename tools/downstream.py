"""What pretraining is worth for segmentation and detection: the same training from the packaged encoder, or any other, and from random weights.

    python tools/downstream.py --camvid camvid --nuclei nuclei            # sizes for two cores: some ten minutes a run
    python tools/downstream.py --camvid camvid --starts runs/first random --seeds 0 1 2 --epochs 40 --side 360

CAMVID holds train/images, train/labels, val/..., NUCLEI annotations in COCO's format. Each run ends in one small JSON file in --results; what is there is left as it is.
Layer-wise decay of the learning rate protects what a pretrained encoder knows; from random weights there is nothing to protect, so all layers learn at the full rate."""
import argparse
import json
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def segmentation(data, encoder, seed, a, decay):
    from bootmae_nb.label_maps import segment_dls
    from bootmae_nb.segment import evaluate_segmenter, segment_learner
    settings = dict(crop=[round(a.side*.8/8)*8, round(a.side*16/15/8)*8], bs=8, side=a.side, lr=2e-3, epochs=a.epochs or 12, layer_decay=decay or .75)
    dls = segment_dls(data, crop=settings['crop'], bs=settings['bs'], side=a.side, ignore='Unlabelled', seed=seed, device=a.device)
    learn = segment_learner(dls, encoder, layer_decay=settings['layer_decay'], seed=seed)
    with learn.no_bar(): learn.fit_one_cycle(settings['epochs'], settings['lr'])
    report = evaluate_segmenter(learn.model, dls)
    figures = dict(miou=report.miou, accuracy=report.accuracy, class_accuracy=report.class_accuracy, iou={o['name']: o['iou'] for o in report.classes})
    return settings, figures


def detection(data, encoder, seed, a, decay):
    from bootmae_nb.coco import detect_dls
    from bootmae_nb.detect import detect_learner, evaluate_detector
    from fastai.callback.core import Callback, CancelValidException
    class NoValidation(Callback):
        "Measured once, at the end"
        def before_validate(self): raise CancelValidException
    look = dict(img_size=128, bs=1, scale=[2., 4.])                       # things as large as in whole images with a short side of 384
    heads = dict(scales=(4, 2, 1), width=64, head_width=128, proposals=200, samples=64, detections=200)
    settings = look | dict(min_size=384, lr=7e-4, epochs=a.epochs or 4, layer_decay=decay or .9, heads=heads)
    dls = detect_dls(data, **look, vflip=True, seed=seed, device=a.device)
    learn = detect_learner(dls, encoder, 'small', min_size=settings['min_size'], max_size=614, layer_decay=settings['layer_decay'], drop_path=0., seed=seed, **heads)
    with learn.no_bar(): learn.fit_one_cycle(settings['epochs'], settings['lr'], cbs=NoValidation())
    report = evaluate_detector(learn.model, dls, max_dets=200)
    return settings, {f'{k}_{n}': report.kinds[k][n] for k in ('box', 'mask') for n in ('AP', 'AP50', 'AP75')}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--camvid', type=Path, help='folder of CamVid, for segmentation')
    p.add_argument('--nuclei', type=Path, help='folder with annotations in COCO\'s format, for detection')
    p.add_argument('--starts', nargs='*', default=['packaged', 'random'],
                   help="encoders: files, folders of runs, names of timm's, 'packaged'; 'random' = the first of them untrained")
    p.add_argument('--seeds', nargs='*', type=int, default=[0])
    p.add_argument('--epochs', type=int, help='12 for segmentation and 4 for detection if not given')
    p.add_argument('--side', type=int, default=120, help='short side of CamVid in pixels, 120 if not given')
    p.add_argument('--results', type=Path, default=ROOT/'nbs'/'study'/'downstream', help='folder for results; nbs/study/downstream if not given')
    p.add_argument('--device', default='cpu')
    a = p.parse_args()
    if not a.camvid and not a.nuclei: p.error('give --camvid, --nuclei or both')
    warnings.simplefilter('ignore')
    import torch

    from bootmae_nb.adapt import bare_config, encoder_source
    from bootmae_nb.files import write_whole
    from bootmae_nb.models import model_from_config
    trained = encoder_source(next(o for o in a.starts if o != 'random') if a.starts != ['random'] else 'packaged')
    for seed in a.seeds:
        for start in a.starts:
            encoder = model_from_config(bare_config(trained), seed=seed) if start == 'random' else start
            for task,data,run in ('camvid', a.camvid, segmentation), ('nuclei', a.nuclei, detection):
                path = a.results/f'{task}-{Path(start).name}-{seed}.json'
                if not data or path.exists(): continue
                clock,cpu = time.perf_counter(), time.process_time()
                settings,figures = run(data, encoder, seed, a, 1. if start == 'random' else None)
                took = dict(seconds=round(time.perf_counter() - clock), cpu_seconds=round(time.process_time() - cpu))
                about = dict(threads=torch.get_num_threads(), device=a.device, torch=torch.__version__)
                res = dict(task=task, start=start, seed=seed, settings=settings, figures=figures) | took | about
                write_whole(path, lambda q, res=res: q.write_text(json.dumps(res, indent=1) + '\n'))
                print(f'{task} from {start}, seed {seed}:', {k: round(v, 3) for k,v in figures.items() if isinstance(v, float)}, took, flush=True)


if __name__ == '__main__': main()
