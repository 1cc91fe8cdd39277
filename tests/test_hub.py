"""Released files over unreliable servers, models on the Hugging Face Hub and back, encoders that timm alone can load."""
import argparse
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from bootmae_nb import hub
from bootmae_nb.checkpoints import CheckpointError, from_authors, load_model
from bootmae_nb.hub import Released, fetch, from_pretrained, from_released, push_to_hub, released, save_pretrained, save_timm, timm_args, write_folder
from bootmae_nb.models import mim_model
from bootmae_nb.vit import Encoder

DATA = bytes(range(256))*40_000 + b'end'
TINY = dict(arch='vit_tiny_patch16_224', img_size=(32, 48), patch_size=8, width=48, depth=2, heads=4)


def sha(data): return hashlib.sha256(data).hexdigest()


def equal(a, b):
    "The same names, types and bits"
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


class Server(http.server.ThreadingHTTPServer):
    "Serves one file, with any of the faults that servers have"
    daemon_threads = True

    def __init__(self, data=DATA, **kw):
        super().__init__(('127.0.0.1', 0), Handler)
        self.data, self.asked, self.served = data, [], 0
        self.tag, self.date, self.ranges, self.if_range = '"1"', None, True, True
        self.cuts = []                  # bytes after which the next answers stop
        self.status, self.headers, self.length, self.delay, self.redirect = None, {}, True, 0, None
        vars(self).update(kw)
        threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=.01), daemon=True).start()

    def url(self, name='w.pth'): return f'http://127.0.0.1:{self.server_port}/{name}'
    def handle_error(self, *args): pass     # a client that hangs up
    def __exit__(self, *args): self.shutdown(); self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass

    def start_of_answer(self, s):
        "Where the answer begins, 0 for the whole file"
        m = re.fullmatch(r'bytes=(\d+)-', self.headers['Range'] or '')
        if not m or not s.ranges: return 0
        return 0 if s.if_range and self.headers['If-Range'] not in (s.tag, s.date) else int(m[1])

    def do_GET(self):
        s = self.server
        s.asked.append((self.path, self.headers['Range'], self.headers['If-Range']))
        if s.redirect and self.path != s.redirect: self.answer(302, {'Location': s.redirect, 'Content-Length': 0}); return
        if s.status: self.answer(s.status, {'Content-Length': 0}); return
        start, size = self.start_of_answer(s), len(s.data)
        if start >= size: self.answer(416, {'Content-Range': f'bytes */{size}', 'Content-Length': 0}); return
        head = ({'Content-Length': size - start} if s.length else {}) | ({'ETag': s.tag} if s.tag else {}) | ({'Last-Modified': s.date} if s.date else {})
        self.answer(206 if start else 200, head | ({'Content-Range': f'bytes {start}-{size-1}/{size}'} if start else {}) | s.headers)
        piece = s.data[start:][:s.cuts.pop(0) if s.cuts else None]
        for i in range(0, len(piece), 1 << 20):
            time.sleep(s.delay)
            self.wfile.write(piece[i:i + (1 << 20)])
        s.served += len(piece)

    def answer(self, status, headers):
        self.send_response(status)
        for k, v in headers.items(): self.send_header(k, str(v))
        self.end_headers()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch): monkeypatch.setenv('no_proxy', '127.0.0.1')


@pytest.fixture
def register(monkeypatch):
    "Add a row to the table of released files"
    def add(name, url, **kw): monkeypatch.setitem(released, name, Released(name, kw.pop('method', 'mae'), url, 'pretrained', 'tiny', 'none', **kw))
    return add


def refused(contains, *args, **kw):
    "`fetch` raises one line that contains this"
    with pytest.raises(CheckpointError) as e: fetch(*args, progress=False, **kw)
    assert contains in str(e.value) and '\n' not in str(e.value), str(e.value)
    return str(e.value)


def get(*args, **kw): return fetch(*args, progress=False, **kw)


# The table

def test_table():
    assert len(released) == 29 and all(k == o.name == o.url.rpartition('/')[2] for k, o in released.items())
    assert {o.method for o in released.values()} == {'bootmae', 'mae', 'dbot'} and {o.kind for o in released.values()} == {'pretrained', 'finetuned'}
    assert released['BootMAE_Large_800_FT.pth'].url == 'https://github.com/LightDXY/BootMAE/releases/download/v0.1.0/BootMAE_Large_800_FT.pth'
    assert released['BootMAE_Large_800_FT.pth'].kind == 'finetuned' and released['BootMAE_Base_800_PT.pth'].kind == 'pretrained'
    assert released['mae_pretrain_vit_huge_full.pth'].url == 'https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_huge_full.pth'
    assert released['mae_finetuned_vit_base.pth'].url == 'https://dl.fbaipublicfiles.com/mae/finetune/mae_finetuned_vit_base.pth'
    assert released['mae_visualize_vit_large_ganloss.pth'].url == 'https://dl.fbaipublicfiles.com/mae/visualize/mae_visualize_vit_large_ganloss.pth'
    dbot = 'https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/mmodal/dbot/'
    assert released['84.6_dbot_huge_base_pre.pth'].url == dbot + '84.6_dbot_huge_base_pre.pth'
    assert released['84.6_dbot_huge_base_pre.pth'].arch == 'ViT-B/16' and released['86.8_dbot_huge_large_finetune.pth'].arch == 'ViT-L/16'
    assert {k: o.md5 for k, o in released.items() if o.md5} == {
        'mae_pretrain_vit_base.pth': '8cad7c', 'mae_pretrain_vit_large.pth': 'b8b06e', 'mae_pretrain_vit_huge.pth': '9bdbb0',
        'mae_finetuned_vit_base.pth': '1b25e9', 'mae_finetuned_vit_large.pth': '51f550', 'mae_finetuned_vit_huge.pth': '2541f2'}
    assert {k for k, o in released.items() if o.keywords} == {k for k in released if '_visualize_' in k}
    assert all(o.keywords == dict(norm_pixels=False) for o in released.values() if o.keywords)
    assert {(o.method, o.licence) for o in released.values()} == {('bootmae', 'see the repository'), ('mae', 'CC-BY-NC 4.0'), ('dbot', 'Apache 2.0')}
    assert not any('clip' in k for k in released)
    assert {hash(o) for o in released.values()}


@pytest.mark.parametrize('name, near', [('bootmae_base_800_pt.pth', 'BootMAE_Base_800_PT.pth'), ('mae_visualise_vit_huge.pth', 'mae_visualize_vit_huge.pth'),
                                        ('zebra', 'released_files() lists them')])
def test_unknown_name(tmp_path, name, near):
    with pytest.raises(CheckpointError, match=re.escape(near)): fetch(name, tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(near)): from_released(name, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('url', ['ftp://127.0.0.1/w.pth', 'file:///w.pth', 'data://w.pth', 's3://bucket/w.pth'])
def test_only_http(tmp_path, url): refused('begins with https:// or http://', url, folder=tmp_path)


@pytest.mark.parametrize('path', ['', 'a/', '..', 'a/%2e%2e', 'a%2f', '.hidden', '%00', 'a%5cb'])
def test_url_without_a_file_name(tmp_path, path):
    refused('ends in no file name', f'https://127.0.0.1/{path}', folder=tmp_path)
    assert not list(tmp_path.iterdir())


# Fetching

def test_fetch_once(tmp_path):
    with Server() as s:
        path = get(s.url('w.pth?token=secret'), folder=str(tmp_path/'new'))
        assert path == tmp_path/'new'/'w.pth' and path.read_bytes() == DATA
        assert get(s.url(), folder=tmp_path/'new') == path and len(s.asked) == 1 and s.asked[0] == ('/w.pth?token=secret', None, None)
        assert sorted(os.listdir(path.parent)) == ['w.pth', 'w.pth.sha256']
        assert (path.parent/'w.pth.sha256').read_text() == f'{sha(DATA)}  w.pth\n# {s.url()}\n'
    assert get(s.url(), folder=tmp_path/'new') == path          # the server is gone
    path.unlink()
    assert 'put it at ' + str(path) in refused(f'{s.url()} could not be fetched (', s.url(), folder=tmp_path/'new')


@pytest.mark.parametrize('cuts', [[1_000_000], [1, 3_000_000, 100], [len(DATA) - 1]])
def test_resume(tmp_path, cuts):
    with Server(cuts=list(cuts)) as s:
        have = 0
        for cut in cuts:
            have += cut
            text = refused(f'the connection ended after {have} of {len(DATA)} bytes', s.url(), folder=tmp_path)
            assert text.endswith('what has come is kept, and the next call goes on from there') and not (tmp_path/'w.pth').exists()
        path = get(s.url(), folder=tmp_path)
        assert path.read_bytes() == DATA and s.served == len(DATA)
        assert s.asked[-1] == ('/w.pth', f'bytes={have}-', '"1"')
        assert sorted(os.listdir(tmp_path)) == ['w.pth', 'w.pth.sha256']


def after_a_cut(tmp_path, change=lambda s: None, cut=1_000_000, **kw):
    "Cut the first answer, change the server, fetch: the server"
    with Server(cuts=[cut], **kw) as s:
        refused('the connection ended after', s.url(), folder=tmp_path)
        change(s)
        path = get(s.url(), folder=tmp_path)
        assert path.read_bytes() == s.data and (tmp_path/'w.pth.sha256').read_text().split()[:2] == [sha(s.data), 'w.pth']
        assert sorted(os.listdir(tmp_path)) == ['w.pth', 'w.pth.sha256']
    return s


def test_server_without_ranges_starts_anew(tmp_path):
    s = after_a_cut(tmp_path, ranges=False)
    assert s.served == 1_000_000 + len(DATA)


def test_changed_file_starts_anew(tmp_path):
    s = after_a_cut(tmp_path, lambda s: vars(s).update(tag='"2"', data=DATA[::-1]))
    assert s.asked[1:] == [('/w.pth', 'bytes=1000000-', '"1"')]


def test_changed_file_of_a_server_that_ignores_if_range(tmp_path):
    s = after_a_cut(tmp_path, lambda s: vars(s).update(tag='"2"', data=DATA[::-1]), if_range=False)
    assert s.asked[2][1] is None


@pytest.mark.parametrize('change', [dict(data=DATA[::-1] + b'longer', tag=None), dict(headers={'Content-Range': f'bytes 0-{len(DATA)-1}/{len(DATA)}'}),
                                    dict(headers={'Content-Range': f'bytes 1000000-{len(DATA)-1}/*'}), dict(headers={'Content-Range': 'nonsense'})])
def test_answer_that_does_not_fit_the_question_is_not_appended(tmp_path, change):
    s = after_a_cut(tmp_path, lambda s: vars(s).update(change), if_range=False)
    assert [o[1] for o in s.asked] == [None, 'bytes=1000000-', None]


def test_file_that_became_shorter_starts_anew(tmp_path):
    s = after_a_cut(tmp_path, lambda s: vars(s).update(data=DATA[:500]), if_range=False)       # 416
    assert [o[1] for o in s.asked] == [None, 'bytes=1000000-', None]


@pytest.mark.parametrize('kw, validator', [(dict(tag=None, date='Mon, 01 Jan 2024 00:00:00 GMT'), 'Mon, 01 Jan 2024 00:00:00 GMT'),
                                           (dict(tag='W/"1"', date='Mon, 01 Jan 2024 00:00:00 GMT'), 'Mon, 01 Jan 2024 00:00:00 GMT')])
def test_date_tells_versions_where_there_is_no_strong_tag(tmp_path, kw, validator):
    s = after_a_cut(tmp_path, **kw)
    assert s.asked[1] == ('/w.pth', 'bytes=1000000-', validator) and s.served == len(DATA)


@pytest.mark.parametrize('tag', [None, 'W/"1"'])
def test_without_a_version_nothing_is_continued(tmp_path, tag):
    with Server(cuts=[1000], tag=tag) as s:
        assert 'is kept' not in refused('the connection ended', s.url(), folder=tmp_path)
        assert get(s.url(), folder=tmp_path).read_bytes() == DATA and s.asked[1][1] is None


def test_partial_file_of_another_address_is_not_continued(tmp_path):
    with Server(cuts=[1000]) as a, Server(data=DATA[::-1]) as b:
        refused('the connection ended', a.url(), folder=tmp_path)
        assert get(b.url(), folder=tmp_path).read_bytes() == DATA[::-1] and b.asked[0][1] is None


@pytest.mark.parametrize('note', ['', '{"url": ', None])
def test_partial_file_with_a_bad_note_is_not_continued(tmp_path, note):
    (tmp_path/'w.pth.part').write_bytes(b'something else')
    if note is not None: (tmp_path/'w.pth.part.json').write_text(note)
    with Server() as s: assert get(s.url(), folder=tmp_path).read_bytes() == DATA and s.asked[0][1] is None


def test_killed_between_the_last_byte_and_the_rename(tmp_path, monkeypatch):
    with Server() as s:
        with monkeypatch.context() as m:
            m.setattr(hub, 'file_digest', lambda path: 1/0)
            with pytest.raises(ZeroDivisionError): get(s.url(), folder=tmp_path)
        assert not (tmp_path/'w.pth').exists()
        assert get(s.url(), folder=tmp_path).read_bytes() == DATA and len(s.asked) == 1


def test_the_record_is_there_before_the_file(tmp_path, monkeypatch):
    def rename(a, b):
        if str(b).endswith('w.pth'): assert (tmp_path/'w.pth.sha256').exists(); raise KeyboardInterrupt
        return real(a, b)
    real = os.replace
    monkeypatch.setattr(os, 'replace', rename)
    with Server() as s, pytest.raises(KeyboardInterrupt): get(s.url(), folder=tmp_path)
    assert not (tmp_path/'w.pth').exists()


@pytest.mark.parametrize('status', [403, 404, 500])
def test_error_of_the_server(tmp_path, status):
    with Server(status=status) as s: text = refused(f'{s.url()} could not be fetched (HTTP status {status}', s.url(), folder=tmp_path)
    assert f'put it at {tmp_path/"w.pth"}' in text and 'is kept' not in text
    assert not (tmp_path/'w.pth').exists()


def test_error_of_the_server_keeps_what_has_come(tmp_path):
    s = after_a_cut(tmp_path, lambda s: vars(s).update(status=503) or refused('is kept', s.url(), folder=tmp_path) and vars(s).update(status=None))
    assert s.served == len(DATA)


def test_connection_refused(tmp_path):
    with Server() as s: pass
    text = refused('Connection refused', s.url(), folder=tmp_path)
    assert s.url() in text and str(tmp_path/'w.pth') in text


def test_silent_server(tmp_path):
    with Server(delay=3, cuts=[1 << 20]) as s: refused('timed out', s.url(), folder=tmp_path, timeout=.2)


def test_web_page_instead_of_a_file(tmp_path):
    with Server(data=b'<html>Log in</html>', headers={'Content-Type': 'text/html; charset=utf-8'}) as s: refused('a web page instead', s.url(), folder=tmp_path)
    assert not (tmp_path/'w.pth').exists() and not (tmp_path/'w.pth.part').exists()


def test_unknown_length(tmp_path):
    with Server(length=False) as s: refused('does not say how long', s.url(), folder=tmp_path)


@pytest.mark.parametrize('whole', [True, False])
def test_chunks(tmp_path, whole):
    "A chunked answer has no length but tells where it ends"
    body = b''.join(b'%x\r\n%s\r\n' % (len(o), o) for o in (DATA[:70_000], DATA[70_000:])) + b'0\r\n\r\n'
    class Chunked(Handler): protocol_version = 'HTTP/1.1'
    with Server(data=body if whole else body[:100_000], length=False, headers={'Transfer-Encoding': 'chunked', 'Connection': 'close'}) as s:
        s.RequestHandlerClass = Chunked
        if whole: assert get(s.url(), folder=tmp_path).read_bytes() == DATA
        else: refused('IncompleteRead', s.url(), folder=tmp_path)


def test_redirects_keep_the_range(tmp_path):
    s = after_a_cut(tmp_path, redirect='/elsewhere')
    assert s.asked[-1] == ('/elsewhere', 'bytes=1000000-', '"1"') and s.served == len(DATA)


@pytest.mark.parametrize('target, why', [('ftp://127.0.0.1/w.pth', 'unknown url type: ftp'), ('file:///etc/hostname', 'HTTP status 302')])
def test_redirects_stay_on_http(tmp_path, target, why):
    with Server(redirect=target) as s: refused(why, s.url(), folder=tmp_path)
    assert not (tmp_path/'w.pth').exists()


def test_at_the_same_time(tmp_path):
    "Several askers get the file from one download"
    with Server(delay=.02) as s:
        results = []
        threads = [threading.Thread(target=lambda: results.append(get(s.url(), folder=tmp_path))) for _ in range(4)]
        for o in threads: o.start()
        for o in threads: o.join()
        assert results == [tmp_path/'w.pth']*4 and s.served == len(DATA) and len(s.asked) == 1
    assert sorted(os.listdir(tmp_path)) == ['w.pth', 'w.pth.sha256']


# What lies there already

def test_wrong_md5(tmp_path, register):
    with Server() as s:
        register('w.pth', s.url(), md5='000000')
        refused('its MD5 begins', 'w.pth', folder=tmp_path)
        assert {o for o in os.listdir(tmp_path) if not o.endswith(('.lock', '.json'))} == set()
        register('w.pth', s.url(), md5=hashlib.md5(DATA).hexdigest()[:6])
        assert get('w.pth', folder=tmp_path).read_bytes() == DATA and len(s.asked) == 2


def test_file_put_there_by_hand(tmp_path, register):
    (tmp_path/'w.pth').write_bytes(b'mine')
    register('w.pth', 'http://127.0.0.1:9/w.pth', md5='000000')
    refused('is not the file that its authors released', 'w.pth', folder=tmp_path)
    assert not (tmp_path/'w.pth.sha256').exists()
    register('w.pth', 'http://127.0.0.1:9/w.pth', md5=hashlib.md5(b'mine').hexdigest()[:6])
    assert get('w.pth', folder=tmp_path) == tmp_path/'w.pth'
    assert (tmp_path/'w.pth.sha256').read_text() == f"{sha(b'mine')}  w.pth\n"
    (tmp_path/'w.pth').write_bytes(b'Mine')
    refused('is not what it was', 'w.pth', folder=tmp_path)


def test_file_in_a_folder_that_one_may_only_read(tmp_path, monkeypatch):
    def no(*args): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(hub, 'write_whole', no)
    (tmp_path/'w.pth').write_bytes(DATA)
    assert get('http://127.0.0.1:9/w.pth', folder=tmp_path) == tmp_path/'w.pth' and os.listdir(tmp_path) == ['w.pth']
    with Server() as s: refused('w.pth cannot be written (', s.url(), folder=tmp_path/'new')
    (tmp_path/'file').touch()
    refused('w.pth cannot be written (', 'http://127.0.0.1:9/w.pth', folder=tmp_path/'file')


def test_file_changed_on_the_disk(tmp_path):
    with Server() as s:
        path = get(s.url(), folder=tmp_path)
        path.write_bytes(DATA[:-1] + b'!')
        text = refused('is not what it was', s.url(), folder=tmp_path)
        assert str(path) in text and 'w.pth.sha256' in text and len(s.asked) == 1
        assert path.read_bytes()[-1:] == b'!' and (tmp_path/'w.pth.sha256').exists()
        path.unlink(); (tmp_path/'w.pth.sha256').unlink()
        assert get(s.url(), folder=tmp_path).read_bytes() == DATA


def test_record_that_is_none(tmp_path):
    (tmp_path/'w.pth').write_bytes(DATA); (tmp_path/'w.pth.sha256').write_text('')
    refused('w.pth.sha256 holds no SHA-256', 'http://127.0.0.1:9/w.pth', folder=tmp_path)


def test_same_name_from_another_address(tmp_path):
    with Server() as a, Server() as b:
        get(a.url(), folder=tmp_path)
        refused(f'came from {a.url()}, not from {b.url()}', b.url('w.pth?secret'), folder=tmp_path)
        assert get(a.url('w.pth?other=query'), folder=tmp_path)


def test_default_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('BOOTMAE_DATA_DIR', str(tmp_path/'d'))
    with Server() as s: assert get(s.url()) == tmp_path/'d'/'weights'/'w.pth'


def test_progress(tmp_path, capsys, monkeypatch):
    with Server(cuts=[1_000_000]) as s:
        with pytest.raises(CheckpointError): fetch(s.url(), tmp_path/'a')
        fetch(s.url(), tmp_path/'a'); fetch(s.url(), tmp_path/'a')
        out = capsys.readouterr()
        assert out.out.splitlines() == ['fetching w.pth, 10.2 MB', 'fetching w.pth, 9.2 MB of 10.2'] and out.err == ''
        fetch(s.url(), tmp_path/'b', progress=False)
        assert capsys.readouterr() == ('', '')
        monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
        s.cuts = [4_000_000]
        with pytest.raises(CheckpointError): fetch(s.url(), tmp_path/'c')
        out = capsys.readouterr()
        assert out.out == '' and '4.00M/10.2M' in out.err
        fetch(s.url(), tmp_path/'c')
        out = capsys.readouterr()
        assert out.out == '' and '10.2M/10.2M' in out.err
        fetch(s.url(), tmp_path/'d', progress=False)
        assert capsys.readouterr() == ('', '')


# Released models

def mae_layout(model):
    "State dict of a MAE of ours under its authors' names"
    names = {'embed.': 'decoder_embed.', 'pos_embed': 'decoder_pos_embed', 'blocks.': 'decoder_blocks.', 'norm.': 'decoder_norm.', 'head.': 'decoder_pred.',
             'mask_token': 'mask_token'}
    res = {}
    for k, v in model.state_dict().items():
        if k.startswith('encoder.'): res[k.removeprefix('encoder.vit.')] = v; continue
        k = k.removeprefix('decoders.pixels.')
        ours = next(o for o in names if k.startswith(o))
        res[names[ours] + k.removeprefix(ours)] = v
    return res


def test_from_released(tmp_path, register):
    model = mim_model('mae', **TINY | dict(img_size=32), pixel_width=32, pixel_depth=1, pixel_heads=4, seed=0)
    torch.save(dict(model=mae_layout(model), args=argparse.Namespace(epochs=1), epoch=1), tmp_path/'source.pth')
    with Server(data=(tmp_path/'source.pth').read_bytes()) as s:
        register('raw.pth', s.url('raw.pth'), keywords=dict(num_heads=4, norm_pixels=False))
        loaded = from_released('raw.pth', tmp_path/'weights')
        assert equal(loaded, model) and loaded.method.norm_pixels is False and not loaded.training
        assert from_released('raw.pth', tmp_path/'weights', norm_pixels='channel').method.norm_pixels == 'channel' and len(s.asked) == 1


@pytest.mark.parametrize('name', ['bootmae', 'mae', 'dbot'])
def test_from_released_with_recorded_weights(tmp_path, register, reference, name):
    state = {k.removeprefix('model.'): v for k, v in load_file(reference/f'{name}_small.safetensors').items() if k.startswith('model.')}
    torch.save(dict(model=state), tmp_path/'source.pth')
    from safetensors import safe_open
    with safe_open(reference/f'{name}_small.safetensors', 'pt') as f: config = json.loads(f.metadata()['config'])
    size = dict(num_heads=config['num_heads'], inject=config.get('fea_list'))
    with Server(data=(tmp_path/'source.pth').read_bytes(), cuts=[500]) as s:
        register('small.pth', s.url('small.pth'), method=name, keywords=size)
        with pytest.raises(CheckpointError): from_released('small.pth', tmp_path)
        assert equal(from_released('small.pth', tmp_path), from_authors(state, name, **size))


# Folders

def test_folder_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = tmp_path/'deep'/'m'
    write = lambda text: lambda p: (p/'config.json').write_text(text)
    def half(p): write('half')(p); raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): write_folder(folder, half)
    assert list((tmp_path/'deep').iterdir()) == []
    assert write_folder(folder, write('one')) == folder
    with pytest.raises(CheckpointError, match='overwrite=True'): write_folder(folder, write('two'))
    with pytest.raises(KeyboardInterrupt): write_folder(folder, half, overwrite=True)
    real, calls = os.rename, []
    def rename(a, b):
        calls.append(a)
        if len(calls) == 2: raise OSError('disk gone')
        return real(a, b)
    with monkeypatch.context() as m, pytest.raises(OSError, match='disk gone'):
        m.setattr(os, 'rename', rename); write_folder(folder, write('two'), overwrite=True)
    assert (folder/'config.json').read_text() == 'one'
    write_folder(folder, write('two'), overwrite=True)
    assert (folder/'config.json').read_text() == 'two' and os.listdir(folder) == ['config.json'] and os.listdir(tmp_path/'deep') == ['m']


def test_what_a_folder_does_not_replace(tmp_path):
    write = lambda p: (p/'config.json').write_text('new')
    (tmp_path/'file').write_text('mine'); (tmp_path/'full').mkdir(); (tmp_path/'full'/'thesis.txt').write_text('mine'); (tmp_path/'empty').mkdir()
    with pytest.raises(CheckpointError, match='is no folder'): write_folder(tmp_path/'file', write, overwrite=True)
    with pytest.raises(CheckpointError, match='also holds thesis.txt'): write_folder(tmp_path/'full', write, overwrite=True)
    assert (tmp_path/'file').read_text() == (tmp_path/'full'/'thesis.txt').read_text() == 'mine'
    write_folder(tmp_path/'empty', write)
    (tmp_path/'link').symlink_to(tmp_path/'empty')
    write_folder(tmp_path/'link', lambda p: (p/'README.md').write_text('new'), overwrite=True)
    assert (tmp_path/'link').is_symlink() and os.listdir(tmp_path/'empty') == ['README.md']


# The Hugging Face Hub

@pytest.fixture(scope='module')
def model():
    model = mim_model('bootmae', **TINY, pixel_width=32, seed=0)
    model.teacher.vit.norm.weight.data.mul_(2)
    return model.eval()


@pytest.mark.parametrize('method, size', [('bootmae', dict(pixel_width=32)), ('mae', dict(pixel_width=32, pixel_depth=1, pixel_heads=4)),
                                          ('dbot', dict(feature_width=32, feature_depth=1, feature_heads=4, in_chans=1, class_token=False))])
def test_save_pretrained_and_back(tmp_path, method, size):
    model = mim_model(method, **TINY, **size, seed=1).train()
    folder = save_pretrained(model, tmp_path/'m', about='Two steps on noise.')
    assert sorted(os.listdir(folder)) == ['README.md', 'config.json', 'model.safetensors']
    back = from_pretrained(folder)
    assert equal(back, model) and back.config == model.config and not back.training and model.training
    assert equal(from_pretrained(str(folder)), model) and equal(load_model(folder), model)
    assert json.loads((folder/'config.json').read_text()) == json.loads(json.dumps(model.config))


def test_card(tmp_path, model, monkeypatch):
    save_pretrained(model, tmp_path/'tiny', licence='cc-by-nc-4.0', about='Two steps on noise.')
    card = ModelCard.load(tmp_path/'tiny'/'README.md')
    assert card.data.library_name == 'bootmae_nb' and card.data.license == 'cc-by-nc-4.0'
    assert {'masked-image-modeling', 'bootmae', 'arxiv:2207.07116'} <= set(card.data.tags)
    for text in ('# tiny', 'Two steps on noise.', '32 x 48 px, 3 channels', '8 x 8 px', 'width 48, 2 blocks, 4 heads', '| mask_ratio | 0.75 |', 'minus [0.5, 0.5, 0.5]',
                 f'| parameters, encoder | {sum(o.numel() for o in model.encoder.parameters()):,} |'): assert text in card.text, text
    monkeypatch.chdir(tmp_path)
    scope = {}
    for code in re.findall(r'```python\n(.*?)```', card.text, re.S): exec(code, scope)
    assert equal(scope['model'], model) and equal(scope['vit'], model.encoder.vit)
    assert '| pixel_width | 32 |' in card.text and '| feature_depth | 2 |' in card.text
    save_pretrained(mim_model('mae', **TINY, pixel_width=32, pixel_depth=1, pixel_heads=4), 'mae')
    assert 'feature_' not in (text := Path('mae/README.md').read_text()) and '| norm_pixels | patch |' in text and 'teacher' not in text.partition('## Load')[0]
    save_pretrained(model, 'unlicensed')
    card = ModelCard.load('unlicensed/README.md')
    assert card.data.license is None and 'Not stated yet' in card.text


def test_save_pretrained_overwrites_only_when_asked(tmp_path, model, monkeypatch):
    other = mim_model('mae', **TINY, pixel_width=32, pixel_depth=1, pixel_heads=4, seed=2)
    save_pretrained(model, tmp_path/'m')
    with pytest.raises(CheckpointError, match='overwrite=True'): save_pretrained(other, tmp_path/'m')
    with monkeypatch.context() as m:
        m.setattr(hub, 'model_card', lambda *args, **kw: 1/0)           # the last of the three files
        with pytest.raises(ZeroDivisionError): save_pretrained(other, tmp_path/'m', overwrite=True)
    assert equal(from_pretrained(tmp_path/'m'), model) and os.listdir(tmp_path) == ['m']
    save_pretrained(other, tmp_path/'m', overwrite=True)
    assert equal(from_pretrained(tmp_path/'m'), other)


def test_damaged_or_foreign_folders_are_refused(tmp_path, model):
    save_pretrained(model, tmp_path/'m')
    (tmp_path/'m'/'config.json').write_text('for readers')
    assert equal(from_pretrained(tmp_path/'m'), model)
    file = tmp_path/'m'/'model.safetensors'
    data = bytearray(file.read_bytes()); data[-100] ^= 1; file.write_bytes(data)
    with pytest.raises(CheckpointError, match='is damaged'): from_pretrained(tmp_path/'m')
    save_timm(model, tmp_path/'t')
    with pytest.raises(CheckpointError, match='no configuration of ours'): from_pretrained(tmp_path/'t')
    (tmp_path/'e').mkdir()
    with pytest.raises(CheckpointError, match='model.safetensors is not there'): from_pretrained(tmp_path/'e')


@pytest.mark.parametrize('name', ['no/such/folder/here', '/no/such/folder', 'two//slashes'])
def test_neither_folder_nor_repository(name):
    with pytest.raises(CheckpointError, match='is no folder here, and could not be fetched') as e: from_pretrained(name)
    assert '\n' not in str(e.value)


class Pushed:
    "Stands in for the Hub's API: what would be sent"
    def __init__(self, monkeypatch, tmp_path, existing=()):
        self.calls, self.folder = [], tmp_path/'pushed'
        monkeypatch.setattr(hub, 'get_token', lambda: None)
        monkeypatch.setattr(HfApi, 'create_repo', lambda api, repo_id, **kw: self.log('create', api, repo_id, **kw) or argparse.Namespace(repo_id=repo_id))
        monkeypatch.setattr(HfApi, 'file_exists', lambda api, repo_id, filename, **kw: self.log('exists', api, repo_id, filename=filename, **kw) or filename in existing)
        monkeypatch.setattr(HfApi, 'upload_folder', self.upload)

    def log(self, what, api, repo_id, **kw): self.calls.append((what, api.token, repo_id, kw))

    def upload(self, folder_path, repo_id, ignore_patterns=None, allow_patterns=None, **kw):
        files = [str(o.relative_to(folder_path)) for o in Path(folder_path).rglob('*') if o.is_file()]
        self.files = sorted(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        self.folder.mkdir()
        for o in self.files: (self.folder/o).write_bytes((Path(folder_path)/o).read_bytes())
        self.calls.append(('upload', None, repo_id, kw))
        return 'https://huggingface.co/me/tiny/commit/1'


def test_push(tmp_path, model, monkeypatch):
    there = Pushed(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert push_to_hub(model, 'me/tiny', token='hf_secret', licence='apache-2.0', branch='dev', commit_message='Tiny', create_pr=True).endswith('/commit/1')
    assert there.files == ['README.md', 'config.json', 'model.safetensors'] and equal(from_pretrained(there.folder), model)
    calls = {what: (token, repo, kw) for what, token, repo, kw in there.calls}
    assert list(calls) == ['exists', 'create', 'upload'] and {o[1] for o in calls.values()} == {'me/tiny'}
    assert calls['create'][0] == calls['exists'][0] == 'hf_secret' and calls['create'][2] == dict(private=True, exist_ok=True)
    assert calls['exists'][2] == dict(filename='README.md', revision='dev')
    assert {k: calls['upload'][2][k] for k in ('revision', 'create_pr', 'commit_message')} == dict(revision='dev', create_pr=True, commit_message='Tiny')
    card = ModelCard.load(there.folder/'README.md')
    assert card.data.license == 'apache-2.0' and "from_pretrained('me/tiny')" in card.text and '# tiny' in card.text
    assert 'hf_secret' not in ''.join((there.folder/o).read_bytes().decode('latin1') for o in there.files)
    assert os.listdir(tmp_path) == ['pushed']


@pytest.mark.parametrize('overwrite', [False, True])
def test_push_leaves_a_card_alone(tmp_path, model, monkeypatch, overwrite):
    there = Pushed(monkeypatch, tmp_path, existing=['README.md'])
    push_to_hub(model, 'me/tiny', token='t', private=False, overwrite_card=overwrite)
    assert there.files == ['README.md']*overwrite + ['config.json', 'model.safetensors']
    assert dict((o[0], o[3]) for o in there.calls)['create']['private'] is False


def test_push_without_token_or_owner(tmp_path, model, monkeypatch):
    there = Pushed(monkeypatch, tmp_path)
    with pytest.raises(CheckpointError, match='there is no token') as e: push_to_hub(model, 'me/tiny')
    assert '\n' not in str(e.value) and 'hf auth login' in str(e.value)
    for name in ('tiny', 'me/', 'a/b/c', 'me/ti ny'):
        with pytest.raises(CheckpointError, match='write the owner'): push_to_hub(model, name, token='t')
    assert not there.calls
    monkeypatch.setattr(hub, 'get_token', lambda: 'stored')
    push_to_hub(model, 'me/tiny')
    assert there.calls[0][1] == 'stored'


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    "A server that huggingface_hub takes for the Hub; it holds the folder `repo`"
    import huggingface_hub.constants as c
    class Hub(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args): pass
        def do_HEAD(self): self.do_GET()
        def do_POST(self): self.reply(403, b'{"error": "You may not"}')
        def do_GET(self):
            file = tmp_path/'repo'/self.path.rpartition('/')[2]
            if self.path.startswith('/me/tiny/resolve/main/') and file.is_file(): self.reply(200, file.read_bytes())
            else: self.reply(404, b'', **{'X-Error-Code': 'EntryNotFound' if '/me/tiny/' in self.path else 'RepoNotFound'})
        def reply(self, status, data, **headers):
            self.send_response(status)
            for k, v in {'Content-Length': len(data), 'ETag': f'"{sha(data)}"', 'X-Repo-Commit': '1'*40, **headers}.items(): self.send_header(k, str(v))
            self.end_headers()
            if self.command != 'HEAD': self.wfile.write(data)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.01), daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}'
    monkeypatch.setattr(c, 'HUGGINGFACE_CO_URL_TEMPLATE', c.HUGGINGFACE_CO_URL_TEMPLATE.replace(c.ENDPOINT, url)); monkeypatch.setattr(c, 'ENDPOINT', url)
    monkeypatch.setattr('huggingface_hub.utils._http.time.sleep', lambda s: None)
    yield server
    server.shutdown(); server.server_close()


def test_from_the_hub(tmp_path, model, fake_hub):
    save_pretrained(model, tmp_path/'repo')
    assert equal(from_pretrained('me/tiny', cache_dir=tmp_path/'cache', device='cpu'), model)
    with pytest.raises(CheckpointError, match='could not be fetched'): from_pretrained('me/tiny', cache_dir=tmp_path/'none', local_files_only=True)
    assert equal(hub.HubModel.from_pretrained('me/tiny', cache_dir=tmp_path/'cache').held, model)
    with pytest.raises(CheckpointError, match='me/other is no folder here') as e: from_pretrained('me/other', cache_dir=tmp_path/'cache')
    assert '\n' not in str(e.value)
    fake_hub.shutdown(); fake_hub.server_close()
    assert equal(from_pretrained('me/tiny', cache_dir=tmp_path/'cache'), model)            # from the cache
    assert equal(from_pretrained('me/tiny', cache_dir=tmp_path/'cache', local_files_only=True), model)
    with pytest.raises(CheckpointError, match='could not be fetched'): from_pretrained('me/tiny', cache_dir=tmp_path/'none')
    with pytest.raises(CheckpointError, match='could not be fetched'): from_pretrained('me/tiny', cache_dir=tmp_path/'none', local_files_only=True)


def test_another_library_on_the_hub(tmp_path, model, fake_hub):
    save_timm(model, tmp_path/'repo')
    with pytest.raises(CheckpointError, match='no configuration of ours') as e: from_pretrained('me/tiny', cache_dir=tmp_path/'cache')
    assert 'could not be fetched' not in str(e.value)


def test_push_that_the_hub_refuses(model, fake_hub):
    with pytest.raises(CheckpointError, match=r'me/tiny could not be pushed .*403') as e: push_to_hub(model, 'me/tiny', token='hf_x')
    assert '\n' not in str(e.value) and 'hf_x' not in str(e.value)


def test_push_without_network(model, fake_hub):
    fake_hub.shutdown(); fake_hub.server_close()
    with pytest.raises(CheckpointError, match='me/tiny could not be pushed .*save_pretrained') as e: push_to_hub(model, 'me/tiny', token='hf_x')
    assert '\n' not in str(e.value)


def test_import_needs_neither_network_nor_fastai():
    code = ("import socket, sys\n"
            "def no(*args, **kw): raise AssertionError('network')\n"
            "socket.socket.connect = socket.getaddrinfo = no\n"
            "import bootmae_nb.hub\n"
            "assert not [o for o in sys.modules if o.split('.')[0] == 'fastai']")
    subprocess.run([sys.executable, '-c', code], check=True, timeout=300)


# timm

SIZES = {'non-square': {}, 'square': dict(img_size=32), 'patch 16': dict(patch_size=16), 'grey': dict(in_chans=1), 'four channels': dict(in_chans=4),
         'no class token': dict(class_token=False), 'wide': dict(width=64, depth=3, heads=8), 'thin mlp': dict(mlp_ratio=2.5),
         'registers': dict(arch='vit_little_patch16_reg4_gap_256'), 'plain names': dict(arch='vit_small_patch32_224')}


@pytest.mark.parametrize('kw', SIZES.values(), ids=SIZES.keys())
def test_timm_has_the_encoder(tmp_path, kw):
    model = mim_model('mae', **TINY | kw, pixel_width=32, pixel_depth=1, pixel_heads=4, mean=(.1, .2, .3), std=(.4, .5, .6), seed=3).eval()
    for p in model.parameters(): p.data += .05*torch.randn(p.shape, generator=torch.Generator().manual_seed(4))
    x = torch.randn(2, model.in_chans, *model.img_size)
    with torch.no_grad(): want = model.encoder.norm(model.encoder(x)[-1])
    folder = save_timm(model, tmp_path/'m')
    assert sorted(os.listdir(folder)) == ['config.json', 'model.safetensors']
    vit = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    with torch.no_grad(): assert torch.allclose(vit.forward_features(x), want, atol=1e-5)
    config = timm.data.resolve_model_data_config(vit)
    assert tuple(config['input_size']) == (model.in_chans, *model.img_size)
    assert config['mean'] == pytest.approx(model.method.mean) and config['std'] == pytest.approx(model.method.std)
    arch, args = timm_args(model, num_classes=3)
    vit = timm.create_model(arch, checkpoint_path=save_timm(model, tmp_path/'m.safetensors', num_classes=3), **args).eval()
    with torch.no_grad(): assert torch.allclose(vit.forward_features(x), want, atol=1e-5) and vit(x).shape == (2, 3)


def test_timm_with_a_head(tmp_path, model):
    vit = timm.create_model(f"local-dir:{save_timm(model, tmp_path/'m', num_classes=7)}", pretrained=True).eval()
    weights = load_file(tmp_path/'m'/'model.safetensors')
    assert vit.num_classes == 7 and torch.equal(vit.head.weight, weights['head.weight'])
    other = timm.create_model(f"local-dir:{tmp_path/'m'}", pretrained=True, num_classes=5).eval()
    assert other(torch.randn(1, 3, 32, 48)).shape == (1, 5) and torch.equal(other.norm.weight, vit.norm.weight)


def test_timm_keeps_the_classifier_of_a_fine_tuned_model(tmp_path):
    model = mim_model('mae', **TINY, pixel_width=32, pixel_depth=1, pixel_heads=4, seed=0)
    arch, args = timm_args(model)
    model.encoder = Encoder(timm.create_model(arch, **args | dict(num_classes=5, global_pool='avg', fc_norm=True)))
    for p in model.encoder.parameters(): p.data += .05*torch.randn_like(p)
    x = torch.randn(2, 3, 32, 48)
    save_timm(model, tmp_path/'m'); save_timm(model, tmp_path/'m.safetensors')
    arch, args = timm_args(model)
    for vit in (timm.create_model(f"local-dir:{tmp_path/'m'}", pretrained=True), timm.create_model(arch, checkpoint_path=tmp_path/'m.safetensors', **args)):
        with torch.no_grad(): assert vit(x).shape == (2, 5) and torch.allclose(vit.eval()(x), model.encoder.vit.eval()(x), atol=1e-5)


def test_timm_knows_a_standard_size_by_its_name(tmp_path):
    model = mim_model('mae', 'vit_tiny_patch16_224', pixel_width=32, pixel_depth=1, pixel_heads=4, seed=0).eval()
    vit = timm.create_model('vit_tiny_patch16_224', checkpoint_path=save_timm(model, tmp_path/'m.safetensors'), num_classes=0).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad(): assert torch.allclose(vit.forward_features(x), model.encoder.norm(model.encoder(x)[-1]), atol=1e-5)


def test_timm_says_nothing_of_other_weights(tmp_path):
    model = mim_model('mae', **TINY | dict(arch='vit_base_patch16_224'), pixel_width=32, pixel_depth=1, pixel_heads=4, seed=0)
    config = json.loads((save_timm(model, tmp_path/'m')/'config.json').read_text())
    assert config['architecture'] == 'vit_base_patch16_224' and not {'tag', 'url', 'hf_hub_id', 'license', 'label_names'} & set(config['pretrained_cfg'])


@pytest.mark.parametrize('chans', [1, 3, 4])
def test_timm_has_no_first_layer_to_adapt_unless_it_takes_colour(tmp_path, chans):
    "timm 1.0.20 would draw a first layer of 4 channels at random"
    model = mim_model('mae', **TINY, in_chans=chans, pixel_width=32, pixel_depth=1, pixel_heads=4, seed=0)
    config = json.loads((save_timm(model, tmp_path/'m')/'config.json').read_text())
    assert ('first_conv' in config['pretrained_cfg']) == (chans == 3)


def test_saving_for_timm_leaves_the_model_alone(tmp_path, model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cfg = dict(vars(model.encoder.vit.pretrained_cfg)) if hasattr(model.encoder.vit.pretrained_cfg, '__dict__') else dict(model.encoder.vit.pretrained_cfg)
    model.to(memory_format=torch.channels_last)
    strides = model.encoder.vit.patch_embed.proj.weight.stride()
    save_timm(model, tmp_path/'m', num_classes=4)
    assert model.encoder.vit.patch_embed.proj.weight.stride() == strides
    model.to(memory_format=torch.contiguous_format)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(before[k], after[k]) for k in before)
    now = model.encoder.vit.pretrained_cfg
    assert (dict(vars(now)) if hasattr(now, '__dict__') else dict(now)) == cfg
    assert torch.equal(load_file(tmp_path/'m'/'model.safetensors')['patch_embed.proj.weight'], before['encoder.vit.patch_embed.proj.weight'])


def test_timm_overwrites_only_when_asked(tmp_path, model, monkeypatch):
    for name in ('m', 'm.safetensors'):
        save_timm(model, tmp_path/name)
        with pytest.raises(CheckpointError, match='overwrite=True'): save_timm(model, tmp_path/name)
    other = mim_model('mae', **TINY, pixel_width=32, pixel_depth=1, pixel_heads=4, seed=9)
    def half(vit, folder, **kw): save_file(vit.state_dict(), folder/'model.safetensors'); raise OSError('disk full')
    with monkeypatch.context() as m, pytest.raises(OSError, match='disk full'):
        m.setattr(hub, 'save_for_hf', half); save_timm(other, tmp_path/'m', overwrite=True)
    assert torch.equal(load_file(tmp_path/'m'/'model.safetensors')['norm.weight'], model.encoder.vit.norm.weight)
    for name in ('m', 'm.safetensors'): save_timm(other, tmp_path/name, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ['m', 'm.safetensors']
    for file in ('m/model.safetensors', 'm.safetensors'):
        assert torch.equal(load_file(tmp_path/file)['blocks.0.mlp.fc1.weight'], other.encoder.vit.blocks[0].mlp.fc1.weight)
