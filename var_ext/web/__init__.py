"""A page to play with a model: `var-ext web`.

Starlette and uvicorn serve it: two packages of 2 MB, whose own dependencies are here anyway. Gradio 6 would bring 18
packages and an older pillow, and neither its queue nor its editor says when a stage is drawn or who has left; FastAPI
adds pydantic and opentelemetry for checks that are a page of code here, with this project's messages. The page is three
files without anything from elsewhere, so it works without a network.

    page  --JSON-->  app  --checked request-->  queue  --one thread-->  drawing  --events, a line of JSON each-->  page
"""

from var_ext.web.app import make_app
from var_ext.web.limits import Limits
from var_ext.web.server import serve

__all__ = ["Limits", "make_app", "serve"]
