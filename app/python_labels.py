"""Exact labels of Python source characters, and their transfer to sub-word tokens.

Two labellings are offered. `lexical_spans` says what kind of token a character belongs to (from `tokenize`), and
`role_spans` says what an identifier does in the program (from `ast`). `label_tokens` puts either on the tokens of a
language model. All offsets count characters of the source string from zero and are half open.
"""

import ast
import io
import keyword
import re
import tokenize
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, singledispatch
from itertools import accumulate

LEXICAL_LABELS = ("NAME", "KEYWORD", "OP", "NUMBER", "STRING", "COMMENT")
ROLE_LABELS = ("function_def", "class_def", "param", "attribute", "import", "kwarg", "load", "store")

_LABEL_OF_KIND = {
    tokenize.NAME: "NAME",
    tokenize.OP: "OP",
    tokenize.NUMBER: "NUMBER",
    tokenize.STRING: "STRING",
    tokenize.COMMENT: "COMMENT",
}
_Located = ast.stmt | ast.expr | ast.arg | ast.keyword | ast.pattern | ast.excepthandler


@dataclass(frozen=True)
class Span:
    """Characters `start` to `end` (half open) of a source, and their label."""

    start: int
    end: int
    label: str


def lexical_spans(source: str) -> list[Span]:
    """Label every lexical token of `source` with one of LEXICAL_LABELS, in source order.

    Soft keywords (`match`, `type`, ...) count as NAME. An f-string is one STRING span from its prefix to its closing
    quote, with the expressions inside it, on every Python version. Line ends and indentation give no span.
    Raises whatever `tokenize` raises on text that is not Python.
    """
    text = _plain_newlines(source)
    starts = _line_starts(text)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return list(_merge_formatted_strings(_to_spans(tokens, starts)))


def role_spans(source: str) -> list[Span]:
    """Label the identifiers of `source` with one of ROLE_LABELS, in source order.

    A span covers exactly one identifier. Every dotted component and alias of an import is `import`; `del x`, an
    `except ... as x`, a pattern capture and a type parameter are `store`; the keyword of a class pattern is `kwarg`.
    The names of `global` and `nonlocal` statements do nothing at run time and get no span, and neither do names inside
    f-strings, whose positions are unreliable before Python 3.12. Raises SyntaxError on text that is not Python.
    """
    text = _plain_newlines(source)
    tree = ast.parse(text)
    words = _Words(text)
    spans = [span for node in _nodes_outside_fstrings(tree) for span in _roles(node, words)]
    return sorted(spans, key=lambda span: span.start)


def label_tokens(spans: list[Span], source: str, offsets: Sequence[tuple[int, int]]) -> list[str]:
    """Give each sub-word token the label of its characters, or "" where there is no single one.

    `spans` must not overlap each other. `offsets` holds one half-open character range per token, as a fast tokenizer
    returns it. A token is labelled only if it has a character that is not white space and all such characters lie in
    spans of one and the same label. Returns one label per offset; time is linear in the characters covered.
    """
    labels = [""] * len(source)
    for span in spans:
        labels[span.start : span.end] = [span.label] * (span.end - span.start)
    return [_common_label(labels, source, start, end) for start, end in offsets]


def _common_label(labels: list[str], source: str, start: int, end: int) -> str:
    found = {labels[i] for i in range(start, min(end, len(source))) if not source[i].isspace()}
    return found.pop() if len(found) == 1 else ""


def _plain_newlines(source: str) -> str:
    # Python ends a line at a lone carriage return, tokenize does not; the replacement keeps every offset.
    return re.sub(r"\r(?!\n)", "\n", source)


def _line_starts(text: str) -> list[int]:
    """Return the character offset at which each line begins; only "\\n" ends a line, unlike in `str.splitlines`."""
    return list(accumulate((len(line) + 1 for line in text.split("\n")), initial=0))


def _to_spans(tokens: Iterator[tokenize.TokenInfo], starts: list[int]) -> Iterator[Span]:
    for token in tokens:
        label = _token_label(token)
        if label:
            start = starts[token.start[0] - 1] + token.start[1]
            # Not `token.end`: early Python 3.12 counts it wrongly behind a non-ASCII string of many lines.
            yield Span(start, start + len(token.string), label)


def _token_label(token: tokenize.TokenInfo) -> str:
    name = tokenize.tok_name[token.type]
    if name.endswith(("STRING_START", "STRING_END")):  # FSTRING_* since Python 3.12, TSTRING_* since 3.14
        return name
    if keyword.iskeyword(token.string):
        return "KEYWORD"
    return _LABEL_OF_KIND.get(token.type, "")


def _merge_formatted_strings(spans: Iterator[Span]) -> Iterator[Span]:
    """Replace everything from each outermost STRING_START to its STRING_END by one STRING span."""
    opened: list[int] = []
    for span in spans:
        if span.label.endswith("STRING_START"):
            opened.append(span.start)
        elif span.label.endswith("STRING_END"):
            start = opened.pop()
            if not opened:
                yield Span(start, span.end, "STRING")
        elif not opened:
            yield span


class _Words:
    """The identifiers and keywords of a source outside strings, found by their character offset."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._lines = text.split("\n")
        self._line_starts = _line_starts(text)
        self._words = [span for span in lexical_spans(text) if span.label in ("NAME", "KEYWORD")]
        self._starts = [word.start for word in self._words]

    def start_of(self, node: _Located) -> int:
        return self._offset(node.lineno, node.col_offset)

    def end_of(self, node: _Located) -> int:
        return self._offset(node.end_lineno or node.lineno, node.end_col_offset or 0)

    def within(self, node: _Located) -> list[Span]:
        first, last = (bisect_left(self._starts, place) for place in (self.start_of(node), self.end_of(node)))
        return self._words[first:last]

    def first_from(self, offset: int, name: str, label: str, after: str = "") -> Iterator[Span]:
        """Yield the first word at or behind `offset` as a span, or the word behind the keyword `after`."""
        index = bisect_left(self._starts, offset)
        while after and self._text_at(index) not in (after, ""):
            index += 1
        return self._labelled(index + bool(after), name, label)

    def last_before(self, offset: int, name: str, label: str) -> Iterator[Span]:
        """Yield the last word that starts before `offset` as a span."""
        return self._labelled(bisect_left(self._starts, offset) - 1, name, label)

    def _labelled(self, index: int, name: str, label: str) -> Iterator[Span]:
        # The comparison drops a word that tokenize split differently from the parser; ast holds names in NFKC form.
        if unicodedata.normalize("NFKC", self._text_at(index)) == name:
            word = self._words[index]
            yield Span(word.start, word.end, label)

    def _text_at(self, index: int) -> str:
        if not 0 <= index < len(self._words):
            return ""
        return self._text[self._words[index].start : self._words[index].end]

    def _offset(self, line_number: int, byte_column: int) -> int:
        return self._line_starts[line_number - 1] + _character_column(self._lines[line_number - 1], byte_column)


def _character_column(line: str, byte_column: int) -> int:
    return byte_column if line.isascii() else bisect_left(_byte_columns(line), byte_column)


@lru_cache(maxsize=256)
def _byte_columns(line: str) -> list[int]:
    return list(accumulate((len(character.encode()) for character in line), initial=0))


def _nodes_outside_fstrings(tree: ast.AST) -> Iterator[ast.AST]:
    pending = [tree]
    while pending:
        node = pending.pop()
        yield node
        pending += [child for child in ast.iter_child_nodes(node) if not _is_formatted_string(child)]


def _is_formatted_string(node: ast.AST) -> bool:
    return type(node).__name__ in ("JoinedStr", "TemplateStr")


@singledispatch
def _roles(node: ast.AST, words: _Words) -> Iterator[Span]:
    """Yield the spans of the identifiers that `node` itself holds, not those of its children."""
    if type(node).__name__ in ("TypeVar", "ParamSpec", "TypeVarTuple"):  # by name: they are new in Python 3.12
        parameter: ast.expr = node  # type: ignore[assignment]
        yield from words.first_from(words.start_of(parameter), node.name, "store")  # type: ignore[attr-defined]


@_roles.register
def _function_roles(node: ast.FunctionDef | ast.AsyncFunctionDef, words: _Words) -> Iterator[Span]:
    return words.first_from(words.start_of(node), node.name, "function_def", after="def")


@_roles.register
def _class_roles(node: ast.ClassDef, words: _Words) -> Iterator[Span]:
    return words.first_from(words.start_of(node), node.name, "class_def", after="class")


@_roles.register
def _param_roles(node: ast.arg, words: _Words) -> Iterator[Span]:
    return words.first_from(words.start_of(node), node.arg, "param")


@_roles.register
def _name_roles(node: ast.Name, words: _Words) -> Iterator[Span]:
    label = "load" if isinstance(node.ctx, ast.Load) else "store"
    return words.first_from(words.start_of(node), node.id, label)


@_roles.register
def _attribute_roles(node: ast.Attribute, words: _Words) -> Iterator[Span]:
    return words.last_before(words.end_of(node), node.attr, "attribute")


@_roles.register
def _keyword_roles(node: ast.keyword, words: _Words) -> Iterator[Span]:
    return words.first_from(words.start_of(node), node.arg, "kwarg") if node.arg else iter(())


@_roles.register
def _import_roles(node: ast.Import | ast.ImportFrom, words: _Words) -> Iterator[Span]:
    return (Span(word.start, word.end, "import") for word in words.within(node) if word.label == "NAME")


@_roles.register
def _handler_roles(node: ast.ExceptHandler, words: _Words) -> Iterator[Span]:
    if node.name and node.type:
        yield from words.first_from(words.end_of(node.type), node.name, "store", after="as")


@_roles.register
def _capture_roles(node: ast.MatchAs | ast.MatchStar, words: _Words) -> Iterator[Span]:
    return words.last_before(words.end_of(node), node.name, "store") if node.name else iter(())


@_roles.register
def _mapping_pattern_roles(node: ast.MatchMapping, words: _Words) -> Iterator[Span]:
    return words.last_before(words.end_of(node), node.rest, "store") if node.rest else iter(())


@_roles.register
def _class_pattern_roles(node: ast.MatchClass, words: _Words) -> Iterator[Span]:
    for name, pattern in zip(node.kwd_attrs, node.kwd_patterns, strict=True):
        yield from words.last_before(words.start_of(pattern), name, "kwarg")
