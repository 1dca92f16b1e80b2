"""Labels of Python source: hand-written snippets, and real standard library files checked against `ast`."""

import ast
import keyword
import sys
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from tensortape.app.python_labels import (
    LEXICAL_LABELS,
    ROLE_LABELS,
    Span,
    label_tokens,
    lexical_spans,
    role_spans,
)

FORMATTED = ("JoinedStr", "TemplateStr")
STDLIB = Path(sysconfig.get_path("stdlib"))
# Small and middling files only: the tokenizer of Python 3.11 is slow. `dataclasses` has patterns, `ast` walrus
# operators, `asyncio` async functions.
STDLIB_FILES = (
    *("abc.py", "ast.py", "asyncio/locks.py", "asyncio/tasks.py", "asyncio/timeouts.py", "base64.py", "bisect.py"),
    *("calendar.py", "cmd.py", "codeop.py", "collections/abc.py", "colorsys.py", "contextlib.py", "copy.py", "csv.py"),
    *("dataclasses.py", "fnmatch.py", "functools.py", "getopt.py", "graphlib.py", "hashlib.py", "heapq.py"),
    *("html/parser.py", "json/decoder.py", "json/encoder.py", "keyword.py", "queue.py", "re/_casefix.py", "sched.py"),
    *("shlex.py", "stat.py", "string.py", "textwrap.py", "token.py", "wave.py", "zipimport.py"),
)


@dataclass(frozen=True)
class RealFile:
    """A standard library file with everything that is known about it, computed once."""

    source: str
    lexical: list[Span]
    roles: list[Span]
    nodes: list[ast.AST]


def words(spans: list[Span], source: str) -> list[str]:
    """Write each span as `text:label`."""
    return [f"{source[span.start : span.end]}:{span.label}" for span in spans]


def roles(source: str) -> str:
    return " ".join(words(role_spans(source), source))


def lexemes(source: str) -> list[tuple[str, str]]:
    return [(source[span.start : span.end], span.label) for span in lexical_spans(source)]


# ---- lexical spans


def test_every_lexical_label() -> None:
    assert lexemes("if x_1 >= 0x1F:  # why\n    y = 'a'\n") == [
        ("if", "KEYWORD"),
        ("x_1", "NAME"),
        (">=", "OP"),
        ("0x1F", "NUMBER"),
        (":", "OP"),
        ("# why", "COMMENT"),
        ("y", "NAME"),
        ("=", "OP"),
        ("'a'", "STRING"),
    ]


def test_spans_are_character_offsets() -> None:
    assert lexical_spans("ä = 'é'\n# ü") == [
        Span(0, 1, "NAME"),
        Span(2, 3, "OP"),
        Span(4, 7, "STRING"),
        Span(8, 11, "COMMENT"),
    ]


@pytest.mark.parametrize("number", ["1", "1_000", "1.5e-3", "2j", "0b101", "0o17", ".5"])
def test_numbers(number: str) -> None:
    assert lexemes(number) == [(number, "NUMBER")]


@pytest.mark.parametrize("word", ["True", "None", "lambda", "await", "not"])
def test_hard_keywords(word: str) -> None:
    assert lexemes(f"{word}\n") == [(word, "KEYWORD")]


@pytest.mark.parametrize("word", ["match", "case", "_", "type", "print", "self"])
def test_soft_keywords_and_builtins_are_names(word: str) -> None:
    assert lexemes(f"{word} = 1")[0] == (word, "NAME")


def test_a_soft_keyword_in_use_is_a_name() -> None:
    assert lexemes("match x:\n    case _: pass\n")[0] == ("match", "NAME")


@pytest.mark.parametrize("prefix", ["", "r", "b", "Rb", "u", "f", "rF"])
@pytest.mark.parametrize("quote", ["'", '"', "'''", '"""'])
def test_a_string_includes_its_prefix_and_quotes(prefix: str, quote: str) -> None:
    literal = f"{prefix}{quote}some text{quote}"
    assert lexemes(f"x = {literal} # c\n") == [("x", "NAME"), ("=", "OP"), (literal, "STRING"), ("# c", "COMMENT")]


@pytest.mark.parametrize("literal", ['f"{a!r:>{b}} {{}}"', "f'{a}'", "f'{a}{b}c'", "f'''{\na\n} é\n'''", "f''"])
def test_an_f_string_is_one_span(literal: str) -> None:
    assert lexemes(f"x({literal}, 'y')") == [
        ("x", "NAME"),
        ("(", "OP"),
        (literal, "STRING"),
        (",", "OP"),
        ("'y'", "STRING"),
        (")", "OP"),
    ]


def test_an_f_string_within_an_f_string_is_covered() -> None:
    assert lexemes("""a = f"{f'{b}'} c" + d\n""")[2:] == [("""f"{f'{b}'} c\"""", "STRING"), ("+", "OP"), ("d", "NAME")]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="needs the grammar of Python 3.12")
def test_an_f_string_may_reuse_its_quotes() -> None:
    assert lexemes('f"{x["a"]}"') == [('f"{x["a"]}"', "STRING")]


def test_adjacent_strings_are_separate_spans() -> None:
    assert lexemes("'a' f'{b}' \"c\"") == [("'a'", "STRING"), ("f'{b}'", "STRING"), ('"c"', "STRING")]


def test_strings_of_many_lines() -> None:
    literal = '"""é one\n  # no comment\n\n  ünd 1"""'
    assert lexemes(f"x = {literal} + y\n") == [
        ("x", "NAME"),
        ("=", "OP"),
        (literal, "STRING"),
        ("+", "OP"),
        ("y", "NAME"),
    ]


def test_line_ends_and_indentation_give_no_span() -> None:
    assert lexemes("if a:\n\n    b\n\tc if 0 else \\\n  d\n".replace("\tc", "    c"))[-3:] == [
        ("0", "NUMBER"),
        ("else", "KEYWORD"),
        ("d", "NAME"),
    ]


def test_form_feeds_and_odd_separators_do_not_end_a_line() -> None:
    assert lexemes("a = '\x0b\x1c\u2028'\n\x0c\nb = 1\n") == [
        ("a", "NAME"),
        ("=", "OP"),
        ("'\x0b\x1c\u2028'", "STRING"),
        ("b", "NAME"),
        ("=", "OP"),
        ("1", "NUMBER"),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_kind_of_line_end_keeps_the_offsets(end: str) -> None:
    source = end.join(["é = '''a", "b'''; c = é", "def f(x): return x", ""])
    assert words(lexical_spans(source), source)[:7] == [
        *("é:NAME", "=:OP", f"'''a{end}b''':STRING", ";:OP", "c:NAME", "=:OP", "é:NAME"),
    ]
    assert roles(source) == "é:store c:store é:load f:function_def x:param x:load"


def test_empty_source() -> None:
    assert lexical_spans("") == []
    assert role_spans("") == []


def test_text_that_is_not_python_raises() -> None:
    with pytest.raises((SyntaxError, tokenize.TokenError)):
        lexical_spans("x = (\n")
    with pytest.raises(SyntaxError):
        role_spans("x = (\n")


# ---- role spans


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = y", "x:store y:load"),
        ("x += y", "x:store y:load"),
        ("x: int = y", "x:store int:load y:load"),
        ("del x, y.z", "x:store y:load z:attribute"),
        ("a.b.c", "a:load b:attribute c:attribute"),
        ("a.b.c = 1", "a:load b:attribute c:attribute"),
        ("a.a.a", "a:load a:attribute a:attribute"),
        ("a . b\\\n  . c", "a:load b:attribute c:attribute"),
        ("(a\n .b(c)\n .d[e]\n)", "a:load b:attribute c:load d:attribute e:load"),
        ("(a).b", "a:load b:attribute"),
        ("((a.b))", "a:load b:attribute"),
        ("'x'.join(y)", "join:attribute y:load"),
        ("f'{x}'.join(y)", "join:attribute y:load"),
        ("1 .real", "real:attribute"),
        ("f(a, *b, c=d, **e)", "f:load a:load b:load c:kwarg d:load e:load"),
        ("f(a = a)", "f:load a:kwarg a:load"),
        ("(x := y)", "x:store y:load"),
        ("a, (b, *c) = d", "a:store b:store c:store d:load"),
        ("a[b] = c", "a:load b:load c:load"),
        ("[x for x in y if x]", "x:load x:store y:load x:load"),
        ("{k: v for k, v in y.z}", "k:load v:load k:store v:store y:load z:attribute"),
        ("(x async for x in y)", "x:load x:store y:load"),
        ("for i in x: i", "i:store x:load i:load"),
        ("with a as b, c as (d, e.f): g", "a:load b:store c:load d:store e:load f:attribute g:load"),
        ("with (a as b,\n  c): d", "a:load b:store c:load d:load"),
        ("try: a\nexcept E as e: e", "a:load E:load e:store e:load"),
        ("try: a\nexcept (E, F.G) as e: e", "a:load E:load F:load G:attribute e:store e:load"),
        ("try: a\nexcept ((E)) as E: b", "a:load E:load E:store b:load"),
        ("try: a\nexcept E: b\nexcept: c", "a:load E:load b:load c:load"),
        ("try: a\nexcept* E as e: b", "a:load E:load e:store b:load"),
        ("if True: x = None", "x:store"),
        ("x if y else z", "x:load y:load z:load"),
        ("raise a from b", "a:load b:load"),
        ("assert a, b", "a:load b:load"),
        ("print(__name__)", "print:load __name__:load"),
    ],
)
def test_names_and_attributes(source: str, expected: str) -> None:
    assert roles(source) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os", "os:import"),
        ("import os.path as p", "os:import path:import p:import"),
        ("import a, b.c, d as e", "a:import b:import c:import d:import e:import"),
        ("from a.b import c as d, e", "a:import b:import c:import d:import e:import"),
        ("from . import a", "a:import"),
        ("from ...a import (\n    b,  # as c\n    d as e,\n)", "a:import b:import d:import e:import"),
        ("from a import *", "a:import"),
        ("from __future__ import annotations", "__future__:import annotations:import"),
        ("import a; import a; a", "a:import a:import a:load"),
        ("import é.ü as ö", "é:import ü:import ö:import"),
    ],
)
def test_imports(source: str, expected: str) -> None:
    assert roles(source) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(): pass", "f:function_def"),
        ("def  f (f): f", "f:function_def f:param f:load"),
        ("def \\\n  f(): pass", "f:function_def"),
        ("async def f(a): await a", "f:function_def a:param a:load"),
        ("async  def  async_def(): pass", "async_def:function_def"),
        ("class C: pass", "C:class_def"),
        ("class C(B, metaclass=M): x = 1", "C:class_def B:load metaclass:kwarg M:load x:store"),
        ("@d\n@e.f(g=1)\ndef h(): pass", "d:load e:load f:attribute g:kwarg h:function_def"),
        ("@f\ndef f(): pass", "f:load f:function_def"),
        ("@dataclass(frozen=True)\nclass C:\n    x: int", "dataclass:load frozen:kwarg C:class_def x:store int:load"),
        ("@(lambda definition: definition)\ndef f(): pass", "definition:param definition:load f:function_def"),
        (
            "def f(a, /, b: int = c, *args: t, d, e=1, **kw) -> r: pass",
            "f:function_def a:param b:param int:load c:load args:param t:load d:param e:param kw:param r:load",
        ),
        ("def f(*, a): pass", "f:function_def a:param"),
        ("def f(*  args, **  kw): pass", "f:function_def args:param kw:param"),
        ("lambda: x", "x:load"),
        ("lambda x, *y, z=w, **k: x", "x:param y:param z:param w:load k:param x:load"),
        ("def f(x=lambda x: x): pass", "f:function_def x:param x:param x:load"),
        (
            "class A:\n  class B:\n    def c(self): self.d",
            "A:class_def B:class_def c:function_def self:param self:load d:attribute",
        ),
        ("def f():\n    global g, h\n    g = h", "f:function_def g:store h:load"),
        ("def f():\n  x = 1\n  def g():\n    nonlocal x\n", "f:function_def x:store g:function_def"),
    ],
)
def test_definitions_and_parameters(source: str, expected: str) -> None:
    assert roles(source) == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("y", "y:store"),
        ("_", ""),
        ("1 | 2 as y", "y:store"),
        ("[a, *b]", "a:store b:store"),
        ("[a, *_]", "a:store"),
        ("(a.b)", "a:load b:attribute"),
        ("{'k': v, **rest}", "v:store rest:store"),
        ("{'k': (v), ** rest , }", "v:store rest:store"),
        ("P(a, k=1)", "P:load a:store k:kwarg"),
        ("P(k=(1|2), l = ((m)), n=[o])", "P:load k:kwarg l:kwarg m:store n:kwarg o:store"),
        ("q.P(k=P(k=k))", "q:load P:attribute k:kwarg P:load k:kwarg k:store"),
    ],
)
def test_patterns(pattern: str, expected: str) -> None:
    assert roles(f"match x:\n    case {pattern}: pass\n") == f"x:load {expected}".strip()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="needs the grammar of Python 3.12")
def test_type_parameters() -> None:
    expected = "f:function_def T:store int:load Ts:store P:store x:param T:load"
    assert roles("def f[T: int, *Ts, **P](x: T): pass\n") == expected
    assert roles("type A[T] = B\n") == "A:store T:store B:load"


def test_names_in_f_strings_are_skipped() -> None:
    source = 'a = f"{b.c(d=1)} {(lambda e: e)(f)!r:>{g}}" f"{h}" + i\n'
    assert roles(source) == "a:store i:load"


def test_f_strings_of_many_lines_do_not_disturb_their_surroundings() -> None:
    source = 'x = f"""\n{a} {b}\n{c}\n"""\nabc = d\n'
    assert roles(source) == "x:store abc:store d:load"


def test_names_in_plain_strings_and_comments_have_no_role() -> None:
    assert roles("def f(a: 'B') -> \"C\":  # D\n    '''E'''\n") == "f:function_def a:param"


def test_non_ascii_sources() -> None:
    source = "größe = {'ä€😀': é.ü(ö=ß), '😀': lambda ñ: ñ}; class_ = größe\nx = größe\n"
    assert roles(source) == (
        "größe:store é:load ü:attribute ö:kwarg ß:load ñ:param ñ:load class_:store größe:load x:store größe:load"
    )


def test_identifiers_that_the_parser_normalizes() -> None:
    # The parser reads the ligature as two letters; the span keeps the one character of the source.
    assert roles("ﬁ = a.ﬁ(ﬁ=1); b\n") == "ﬁ:store a:load ﬁ:attribute ﬁ:kwarg b:load"


def test_a_form_feed_does_not_move_the_roles() -> None:
    assert roles("a = 1\n\x0c\nb = '\x0b\x1c'; c = a\n") == "a:store b:store c:store a:load"


# ---- labels of sub-word tokens


def test_label_tokens_takes_the_common_label() -> None:
    source = "self.foo_bar = 12"
    offsets = [(0, 4), (4, 5), (5, 8), (8, 12), (12, 14), (14, 16), (16, 17)]
    assert label_tokens(lexical_spans(source), source, offsets) == [
        "NAME",
        "OP",
        "NAME",
        "NAME",
        "OP",
        "NUMBER",
        "NUMBER",
    ]
    assert label_tokens(role_spans(source), source, offsets) == ["load", "", "attribute", "attribute", "", "", ""]


def test_white_space_in_a_token_does_not_count() -> None:
    assert label_tokens([Span(2, 3, "A")], "  x \n", [(0, 3), (2, 5), (0, 5), (1, 3)]) == ["A"] * 4


@pytest.mark.parametrize("offset", [(0, 0), (3, 3), (2, 4), (1, 0)])
def test_a_token_without_characters_is_missing(offset: tuple[int, int]) -> None:
    assert label_tokens([Span(0, 6, "A")], "ab  cd", [offset]) == [""]


def test_a_token_of_two_labels_is_missing() -> None:
    assert label_tokens([Span(0, 1, "A"), Span(1, 2, "B")], "xy", [(0, 2), (0, 1), (1, 2)]) == ["", "A", "B"]


def test_a_token_partly_outside_the_spans_is_missing() -> None:
    assert label_tokens([Span(1, 2, "A")], "xyz", [(0, 2), (1, 3), (1, 2)]) == ["", "", "A"]


def test_a_token_over_two_spans_of_one_label_is_labelled() -> None:
    assert label_tokens([Span(0, 1, "A"), Span(2, 3, "A")], "x y", [(0, 3)]) == ["A"]


def test_tokens_that_share_a_character_all_get_its_label() -> None:
    # A byte-level tokenizer may split one character into tokens with the same offsets.
    assert label_tokens([Span(0, 1, "A")], "😀", [(0, 1), (0, 1)]) == ["A", "A"]


def test_offsets_behind_the_source_are_tolerated() -> None:
    assert label_tokens([Span(0, 1, "A")], "x", [(0, 5), (3, 5)]) == ["A", ""]


def test_no_tokens_and_no_spans() -> None:
    assert label_tokens([Span(0, 1, "A")], "x", []) == []
    assert label_tokens([], "x y", [(0, 1), (2, 3)]) == ["", ""]


def test_label_tokens_takes_arrays_of_many_tokens() -> None:
    source = "x = 'y'\n" * 5_000
    offsets = [(start, start + 1) for start in range(len(source))]
    labels = label_tokens(lexical_spans(source), source, offsets)
    assert labels[:8] == ["NAME", "", "OP", "", "STRING", "STRING", "STRING", ""]
    assert Counter(labels) == {"NAME": 5_000, "OP": 5_000, "STRING": 15_000, "": 15_000}


def test_lexical_labels_of_an_f_string_cover_the_expressions_in_it() -> None:
    source = 'print(f"a {b} c")'
    assert label_tokens(lexical_spans(source), source, [(6, 8), (8, 9), (10, 11), (11, 12)]) == ["STRING"] * 4


# ---- real files


@pytest.fixture(scope="module", params=[name for name in STDLIB_FILES if (STDLIB / name).exists()])
def real(request: pytest.FixtureRequest) -> RealFile:
    source = (STDLIB / str(request.param)).read_text(encoding="utf-8")
    nodes = list(nodes_outside_fstrings(ast.parse(source)))
    return RealFile(source, lexical_spans(source), role_spans(source), nodes)


def nodes_outside_fstrings(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if type(child).__name__ not in FORMATTED:
            yield child
            yield from nodes_outside_fstrings(child)


def expected_roles(node: ast.AST) -> list[str]:
    """List the roles of the identifiers that a node itself holds; imports are left out."""
    match node:
        case ast.Name():
            return ["load" if isinstance(node.ctx, ast.Load) else "store"]
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return ["function_def"]
        case ast.ClassDef():
            return ["class_def"]
        case ast.arg():
            return ["param"]
        case ast.Attribute():
            return ["attribute"]
        case ast.keyword(arg=str()):
            return ["kwarg"]
        case ast.MatchClass():
            return ["kwarg"] * len(node.kwd_attrs)
        case ast.ExceptHandler(name=str()) | ast.MatchAs(name=str()) | ast.MatchStar(name=str()):
            return ["store"]
        case ast.MatchMapping(rest=str()):
            return ["store"]
    return ["store"] if type(node).__name__ in ("TypeVar", "ParamSpec", "TypeVarTuple") else []


def test_enough_real_files_are_checked() -> None:
    assert sum((STDLIB / name).exists() for name in STDLIB_FILES) >= 30


def test_real_role_spans_are_identifiers(real: RealFile) -> None:
    for span in real.roles:
        text = real.source[span.start : span.end]
        assert text.isidentifier()
        assert not keyword.iskeyword(text)
        assert span.label in ROLE_LABELS


def test_real_spans_are_sorted_and_apart(real: RealFile) -> None:
    for spans in (real.lexical, real.roles):
        assert all(0 <= span.start < span.end <= len(real.source) for span in spans)
        assert all(first.end <= second.start for first, second in pairwise(spans))


def test_real_role_spans_are_lexical_names(real: RealFile) -> None:
    names = {(span.start, span.end) for span in real.lexical if span.label == "NAME"}
    assert {(span.start, span.end) for span in real.roles} <= names


def test_real_parameters_match_ast_one_to_one(real: RealFile) -> None:
    params = [real.source[span.start : span.end] for span in real.roles if span.label == "param"]
    arguments = [node for node in real.nodes if isinstance(node, ast.arg)]
    assert params == [node.arg for node in sorted(arguments, key=lambda node: (node.lineno, node.col_offset))]


def test_real_roles_are_complete(real: RealFile) -> None:
    expected = Counter(role for node in real.nodes for role in expected_roles(node))
    assert Counter(span.label for span in real.roles if span.label != "import") == expected


def test_real_lexical_spans_leave_out_only_white_space(real: RealFile) -> None:
    covered = bytearray(len(real.source))
    for span in real.lexical:
        assert span.label in LEXICAL_LABELS
        covered[span.start : span.end] = b"\1" * (span.end - span.start)
    rest = {character for character, inside in zip(real.source, covered, strict=True) if not inside}
    assert rest <= set(" \t\n\x0c\\")
