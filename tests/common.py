"""What several test files use: quiet fits, and whether two states are the same to the bit."""
import torch


def quietly(learn, verb, *args, **kw):
    "A verb of a learner without bars and rows"
    with learn.no_bar(), learn.no_logging(): return getattr(learn, verb)(*args, **kw)


def state(m): return {k: v.clone() for k,v in m.state_dict().items()}
def equal(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())
