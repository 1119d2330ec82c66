"""What a template may not do: reach out of its row, run on, or fill the memory, in whatever thread it is rendered."""

import re
import resource
import sys
import threading
import time
from collections.abc import Callable

import pytest
from wording import assert_names, raises_naming

from cappy.errors import CappyError, ConfigError, RecordError
from cappy.preparation.templates import RenderedRow, Template, render

Make = Callable[..., Template]

ROW = {"text": "abc", "items": [1, 2], "call": open}
FOREVER = "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}"
GROW = "{% set ns = namespace(x='ab', y=['ab']) %}{% for i in range(99) %}{% set ns.x = BODY %}{% endfor %}{{ ns.x }}"

OUT_OF_REACH = {
    "a class": ("{{ text.__class__ }}", "reads '__class__' of a str"),
    "a class by item": ("{{ text['__class__'] }}", "reads '__class__' of a str"),
    "a class by filter": ("{{ text | attr('__class__') }}", "reads '__class__' of a str"),
    "a class by map": ("{{ [text] | map(attribute='__class__') | list }}", "reads '__class__' of a str"),
    "the bases": ("{{ ().__class__.__base__.__subclasses__() }}", "reads '__class__' of a tuple"),
    "a function's globals": ("{{ range.__globals__ }}", "reads '__globals__' of a function"),
    "a method's globals": ("{{ cycler.__init__.__globals__ }}", "reads '__init__' of a type"),
    "a generator's frame": ("{{ (items | map('string')).gi_frame }}", "reads 'gi_frame' of a generator"),
    "format": ("{{ '{0.__class__}'.format(text) }}", "calls 'format' of a str"),
    "format by sorting": ("{{ [text].sort(key='{0.__class__.__name__}'.format) }}", "sorts by 'format'"),
    "format_map": ("{{ '{a.__class__}'.format_map({'a': text}) }}", "calls 'format_map' of a str"),
    "a function of the row": ("{{ call('/tmp/x', 'w') }}", "calls 'open'"),
    "another template": ("{% include 'x' %}", "no loader"),
}

FURTHER_OUT = {
    "a class, escaped": "{{ text['\\x5f\\x5fclass\\x5f\\x5f'] }}",
    "a class, put together": "{{ text['_' ~ '_class_' ~ '_'] }}",
    "a class by a list's index": "{{ text[['__class__'][0]] }}",
    "a class by select": "{{ [text] | selectattr('__class__') | list }}",
    "a class by reject": "{{ [text] | rejectattr('__class__') | list }}",
    "a class by sort": "{{ [text, text] | sort(attribute='__class__') }}",
    "a class by groupby": "{{ [text] | groupby('__class__') }}",
    "a class by unique": "{{ [text, text] | unique(attribute='__class__') | list }}",
    "a class by max": "{{ [text, text] | max(attribute='__class__') }}",
    "a class by join": "{{ [text] | join(attribute='__class__') }}",
    "a class by printf": "{{ '%(a.__class__)s' % {'a': text} }}",
    "a class of nothing": "{{ missing.__class__ }}",
    "a class of the loop": "{% for i in items %}{{ loop.__class__ }}{% endfor %}",
    "subclasses of dict": "{{ dict.__subclasses__() }}",
    "subclasses of dict, called": "{{ dict.mro() }}",
    "a joiner's globals": "{{ joiner.__init__.__globals__ }}",
    "a namespace's dictionary": "{{ namespace(a=1).__dict__ }}",
    "a namespace's attribute": "{% set ns = namespace(a=1) %}{% set ns.__class__ = 1 %}{{ ns.__class__ }}",
    "a macro's function": "{% macro f() %}{% endmacro %}{{ f._func.__globals__ }}",
    "a macro's globals": "{% macro f() %}{% endmacro %}{{ f.__globals__ }}",
    "a caller's globals": "{% macro f() %}{{ caller.__globals__ }}{% endmacro %}{% call f() %}{% endcall %}",
    "the template's own context": "{{ self._TemplateReference__context }}",
    "a block's context": "{% block b %}{{ self.b.__self__ }}{% endblock %}",
    "a method's owner": "{{ items.append.__self__ }}",
    "a method's module": "{{ text.upper.__module__ }}",
    "lipsum": "{{ lipsum.__globals__ }}",
    "config": "{{ config.items() }}",
    "the builtins": "{% set x = __builtins__ %}{{ x.open('/etc/passwd').read() }}",
    "a file, imported": "{% import '/etc/passwd' as p %}{{ p }}",
    "a file, extended": "{% extends '/etc/passwd' %}",
    "a generator's code": "{{ (items | select).gi_code }}",
    "a coroutine's frame": "{{ (items | map('string')).cr_frame }}",
    "an exception's frame": "{{ (1 // 0).__traceback__ }}",
    "format as a filter's argument": "{{ ['{0.__class__}'] | map('format', text) | list }}",
    "encode": "{{ text.encode('unicode_escape').__class__ }}",
    "a translation": "{{ text.translate({97: '__class__'}) }}",
}
"""Ways out of a sandbox that are known from reports on Jinja and on programs that use it."""
LEAKS = re.compile(r"<class|<module|<function|<built-in|<bound|object at|__\w+__|root:|gi_|frame")

ENDLESS = {
    "loops": FOREVER,
    "loops that print": FOREVER.replace("{% endfor %}", "{{ i }}{% endfor %}", 1),
    "loops that filter": FOREVER.replace("j in r", "j in r if false"),
    "a macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a recursive loop": (
        "{% for i in range(9999) recursive %}{{ loop(range(9999)) if loop.depth < 5 else '' }}{% endfor %}"
    ),
    "conversions": FOREVER.replace("{% endfor %}", "{% set x = ('9' * 4300) | int %}{% endfor %}", 1),
}

BOMBS = {
    "a text times": "{% set x = 'a' * 1000000000 %}",
    "a constant printed": "{{ ('a' * 1000000000) }}",
    "times a text": "{% set x = 1000000000 * 'a' %}",
    "a list times": "{% set x = [0] * 1000000000 %}",
    "a power": "{% set x = 10 ** 10000000000 %}",
    "powers": "{% set x = 9 ** 99 ** 99 %}",
    "squares": GROW.replace("BODY", "3 if loop.first else ns.x * ns.x"),
    "texts put together": GROW.replace("BODY", "ns.x ~ ns.x"),
    "texts added": GROW.replace("BODY", "ns.x + ns.x"),
    "lists added": GROW.replace("BODY", "[1] if loop.first else ns.x + ns.x"),
    "lists in lists": GROW.replace("BODY", "[ns.x, ns.x]"),
    "mappings in mappings": GROW.replace("BODY", "dict(a=ns.x, b=ns.x)"),
    "pairs of pairs": GROW.replace("BODY", "zip([ns.x], [ns.x]) | list"),
    "a list extended by itself": "{% set x = [1] %}{% for i in range(99) %}{% set _ = x.extend(x) %}{% endfor %}",
    "ranges in a list": "{% set x = [] %}{% for i in range(99999) %}{% set _ = x.extend(range(99999)) %}{% endfor %}",
    "long texts in a list": "{% set x = [] %}{% for i in range(9999) %}{% set _ = x.append('a' * 99999) %}{% endfor %}",
    "slices": "{% set a = 'a' * 999999 %}{% set x = [] %}{% for i in range(999) %}{{ x.append(a[1:]) }}{% endfor %}",
    "slices, each in a call": (
        "{% set a = [0] * 999999 %}{% macro f() %}{% set b = a[1:] %}{{ f() }}{% endmacro %}{{ f() }}"
    ),
    "copies, each in a call": (
        "{% set a = [0] * 999999 %}{% macro f() %}{% set b = a.copy() %}{{ f() }}{% endmacro %}{{ f() }}"
    ),
    "a printed text, often": "{% set a = 'a' * 999999 %}{% for i in range(99999) %}{{ a }}{% endfor %}",
    "a block of it": (
        "{% set a = 'a' * 999999 %}{% set b %}{% for i in range(99999) %}{{ a }}{{ a }}{{ a }}{% endfor %}{% endset %}"
    ),
    "a width": "{% set x = '%1000000000d' % 1 %}",
    "a named width": "{% set x = '%((a))1000000000d' | format(**{'(a)': 1}) %}",
    "a width as argument": "{% set x = '%*d' % (1000000000, 1) %}",
    "many digits": "{% set x = '%.1000000000f' | format(1.5) %}",
    "rounding": "{% set x = 5 | round(-1000000000) %}",
    "center": "{% set x = text.center(1000000000) %}",
    "zfill": "{% set x = text.zfill(1000000000) %}",
    "to_bytes": "{% set x = (5).to_bytes(1000000000, 'big') %}",
    "replace": "{% set a = 'a' * 99999 %}{% set x = a.replace('', a) %}",
    "replace as filter": "{% set a = 'a' * 99999 %}{% set x = a | replace('a', a) %}",
    "join": "{% set a = 'a' * 99999 %}{% set x = a.join(range(9999) | map('string')) %}",
    "join as filter": "{% set a = 'a' * 99999 %}{% set x = range(9999) | join(a) %}",
    "zip of many": "{% set x = zip(*([range(99999)] * 99999)) | list %}",
    "search from the right": "{% set x = ('a' * 9999999).rfind('a' * 99999 ~ 'b' ~ 'a' * 99999) %}",
    "strip of many": "{% set x = ('a' * 9999999).strip('b' * 9999999 ~ 'a') %}",
}


@pytest.mark.parametrize(("jinja", "reason"), OUT_OF_REACH.values(), ids=OUT_OF_REACH)
def test_a_template_reaches_only_its_row(template: Make, jinja: str, reason: str) -> None:
    with pytest.raises(RecordError, match=f"ours: template 'mine' .*{reason}"):
        render(template(f"x ||| {jinja}"), ROW)


@pytest.mark.parametrize("thread", [False, True], ids=["main thread", "another thread"])
@pytest.mark.parametrize("jinja", ENDLESS.values(), ids=ENDLESS)
def test_a_render_that_takes_too_long_is_stopped(template: Make, jinja: str, thread: bool) -> None:
    start = time.monotonic()
    error = raised(lambda: render(template(f"x ||| y{jinja}"), ROW, seconds=0.2), thread=thread)
    assert isinstance(error, RecordError)
    assert_names(str(error), "ours: template 'mine' ", "0.2 seconds")
    assert time.monotonic() - start < 100


@pytest.mark.parametrize("jinja", BOMBS.values(), ids=BOMBS)
def test_a_render_fills_no_memory(template: Make, jinja: str) -> None:
    before = peak_bytes()
    error = raised(lambda: render(template(f"x ||| y{jinja}"), ROW, seconds=0.5))
    # A constant is computed when the template is compiled.
    assert isinstance(error, RecordError | ConfigError)
    assert re.match(r"ours: template 'mine' .*(\(SecurityError| MiB| seconds)", str(error))
    assert peak_bytes() - before < 100 * 2**20


def test_a_range_is_bounded(template: Make) -> None:
    with pytest.raises(RecordError, match="Range too big"):
        render(template("x ||| {% for i in range(1000000000000) %}{% endfor %}"), ROW)


@pytest.mark.parametrize(
    "jinja",
    ["{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "{% for i in items %}" * 40 + "{% endfor %}" * 40],
    ids=["brackets", "loops"],
)
def test_a_template_too_deep_to_compile_is_an_error_of_its_own(template: Make, jinja: str) -> None:
    with raises_naming(ConfigError, "ours: template 'mine' "):
        render(template(f"x ||| {jinja}"), ROW)


def test_a_template_that_was_stopped_spoils_no_other(template: Make) -> None:
    assert raised(lambda: render(template(f"x ||| {FOREVER}"), ROW, seconds=0.1))
    assert render(template("{{text}} ||| y"), ROW) == RenderedRow(instruction="abc", target="y")


def test_threads_render_side_by_side_each_within_its_own_time(template: Make) -> None:
    quick, endless = template("{{text}} ||| {{items[0]}}"), template(f"x ||| {FOREVER}")
    errors: list[CappyError | None] = []
    hog = threading.Thread(target=lambda: errors.append(raised(lambda: render(endless, ROW, seconds=0.5))))
    hog.start()
    while hog.is_alive():
        assert render(quick, ROW) == RenderedRow(instruction="abc", target="1")
    assert "takes longer" in str(errors)


def peak_bytes() -> int:
    """The most memory that this process ever had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def raised(act: Callable[[], object], *, thread: bool = False) -> CappyError | None:
    """The error that `act` ends with, run here or in a thread."""
    errors: list[CappyError] = []

    def run() -> None:
        try:
            act()
        except CappyError as error:
            errors.append(error)

    if thread:
        other = threading.Thread(target=run)
        other.start()
        other.join()
    else:
        run()
    return errors[0] if errors else None


@pytest.mark.parametrize("jinja", FURTHER_OUT.values(), ids=FURTHER_OUT)
def test_no_way_out_of_the_row_shows_anything(jinja: str, template: Make) -> None:
    try:
        rendered = render(template(f"{{{{ items }}}} {jinja} ||| x"), ROW)
    except CappyError:
        return
    assert rendered is None or not LEAKS.search(rendered.instruction), rendered
