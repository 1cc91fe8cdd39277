"""The demo: `python app/app.py`, or `bootmae-demo` where the package is installed. The page itself is made in nbs/17_demo.ipynb."""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1])) # a checkout works without being installed
if os.environ.get('SPACE_ID'): os.environ.setdefault('BOOTMAE_DEMO_HOST', '0.0.0.0') # a Hugging Face Space looks from outside

from bootmae_nb.cli import bootmae_demo # noqa: E402
from bootmae_nb.demo import main, make_demo # noqa: E402, F401

if __name__ == '__main__': bootmae_demo()
