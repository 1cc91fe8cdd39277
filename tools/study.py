"""Train and measure the runs of the study of the papers' claims, one after another.

    python tools/study.py --data cifar10                               # on two cores: some seven minutes a run, 10,000 images, ten epochs
    python tools/study.py --data cifar10 --scale gpu                   # on a GPU: a small ViT, all images, 200 epochs
    python tools/study.py --data cifar10 --runs mae bootmae --seeds 0 1 2 --hours 1

DATA is a folder with `train/<class>` and `valid/<class>` (or `test`); without it CIFAR-10 is fetched by fastai. Stopped at any moment, the same command goes on;
what is done is left as it is. Results are small JSON files in nbs/study/SCALE, and the likeness of all
models that are there in nbs/study/SCALE-cka.json; the notebook nbs/42_claims.ipynb draws them. Models are kept in the folder of --keep."""
import argparse
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, help='folder of CIFAR-10; fetched if not given')
    p.add_argument('--scale', default='laptop', help='laptop or gpu')
    p.add_argument('--runs', nargs='*', help='variants; all if not given')
    p.add_argument('--seeds', nargs='*', type=int, help='seeds; 0 1 2 if not given')
    p.add_argument('--keep', type=Path, help='folder for models; runs/study-SCALE if not given')
    p.add_argument('--results', type=Path, help='folder for results; nbs/study/SCALE if not given')
    p.add_argument('--hours', type=float, help='begin no further run after so long')
    p.add_argument('--no-finetune', action='store_true', help='features alone')
    p.add_argument('--device', help='auto, cuda or cpu')
    p.add_argument('--progress', action='store_true', help='show bars and losses of each run')
    a = p.parse_args()
    warnings.simplefilter('ignore', FutureWarning)
    from bootmae_nb.settings import load_settings, pick_device
    from bootmae_nb.study import StudyData, alike, order, run_study, scales
    if a.scale not in scales: p.error(f"scale {a.scale!r} is unknown: choose {' or '.join(scales)}")
    data = a.data
    if data is None:
        from fastai.data.external import URLs, untar_data
        data = untar_data(URLs.CIFAR)
    s, device = load_settings(), pick_device(a.device or 'auto')
    jobs = [(n, i) for n, i in order if (not a.runs or n in a.runs) and (not a.seeds or i in a.seeds)]
    jobs += [(n, i) for i in a.seeds or () for n in a.runs or () if (n, i) not in order]
    keep, results = a.keep or s.run_dir/f'study-{a.scale}', a.results or ROOT/'nbs'/'study'/a.scale
    run_study(data, keep, results, scales[a.scale], jobs, not a.no_finetune, device, a.progress, a.hours)
    if len([*keep.glob('*/model.safetensors')]) > 1: alike(keep, results.with_name(f'{results.name}-cka.json'), StudyData.of(data, scales[a.scale]).test_x, device)


if __name__ == '__main__': main()
