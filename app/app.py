"""The demo: `python app/app.py`, or `bootmae-demo` where the package is installed. The page itself is made in nbs/17_demo.ipynb."""
from fastcore.script import call_parse

from bootmae_nb.demo import main, make_demo # noqa: F401


@call_parse
def app(
    checkpoint:str=None, # A checkpoint, or a folder that holds some; the newest runs, or the packaged model, if not given
    host:str=None, # Address to listen on; settings.ini's if not given
    port:int=None, # Port; settings.ini's if not given
):
    "Serve the demo"
    main(checkpoint, host, port)
