"""The one HTML page: a frame with a style, in one file that needs no other and no network."""

import base64
from pathlib import Path

import jinja2

FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem;
  color: #222 }
img { max-width: 100% }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
td, th { border: 1px solid #ddd; padding: .3rem .6rem; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 13px }
.answer { white-space: pre-wrap; overflow-wrap: anywhere }
.ok { color: #17703c } .no { color: #a02020 }
.best { background: #fff3d6 } .note { color: #666 } .wide { overflow-x: auto }
.answers { display: table; table-layout: fixed; width: 100% }
@media (max-width: 700px) { /* a phone: a column under the other, a picture to scroll */
  .answers, .answers tr { display: block; margin-bottom: 1.5rem } .answers td { display: block }
  .answers th { display: none } .wide img { max-width: none } }
</style></head><body><h1>{{ title }}</h1>
{% block body %}{% endblock %}
</body></html>
"""
# An answer, ((constraint, whether it follows it), ...), and why it is hollow, if it is.
ANSWER = """{% macro answer(text, verdicts, hollow) %}
<div class="answer">{{ text }}</div>
{% for rule, follows in verdicts %}
<div class="{{ 'ok' if follows else 'no' }}">{{ '✓' if follows else '✗' }} {{ rule }}</div>
{% endfor %}
{% if hollow is defined %}<div class="{{ 'no' if hollow else 'ok' }}">
{{ "hollow: " ~ hollow | join(", ") if hollow else "answers" }}</div>{% endif %}
{% endmacro %}"""
_ENVIRONMENT = jinja2.Environment(
    autoescape=True,
    loader=jinja2.DictLoader({"frame": FRAME, "answer": ANSWER}),
    trim_blocks=True,
)


def page(body: str) -> jinja2.Template:
    """A template of a whole page from the Jinja text of its body; render it with `title`, too.

    The body may call ANSWER's macro `answer`. What is put into it is escaped: texts of models and
    of users may hold markup.
    """
    head = '{% extends "frame" %}{% from "answer" import answer %}{% block body %}'
    return _ENVIRONMENT.from_string(head + body + "{% endblock %}")


def embedded(image: Path) -> str:
    """A PNG as a data: address, for `src`."""
    return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
