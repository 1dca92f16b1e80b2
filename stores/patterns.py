"""Patterns that select sites: of a live model's modules and of a recorded site table alike.

layers.*.mlp            module paths; `*` is one path segment (or part of one), `**` any number of segments
layers.3:in             a port; `out` is the default, `out[1]` and `out[last_hidden_state]` pick a leaf
layers.3#2              the second call of a module within one forward; without `#` every call
re:.*(mlp|attn)         a regular expression for the whole module path, or for `path:port`
layers.3:out.grad       the gradient at a port; recorded as `out.grad@<target>`, one column per target
layers.3.self_attn:q    what an attention function saw: q k v z weights, and `attention` for all that rebuilds the weights
resid_post[0:12:2]      an alias that every architecture shares, with a slice over layers; `encoder.resid_post` picks a stack
attention               every attention module; also `attention.grad`, `weights`, `cross_attention`, and slices of them
blocks.3.hook_resid_pre a TransformerLens name, the same site as `resid_pre[3]`
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from .errors import SchemaError

ALIASES = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "final_norm", "attention", "cross_attention")
ATTENTION_PORTS = ("q", "k", "v", "z", "weights", "attention")
FACT_PORTS = ("keys", "bias", "sinks", "dropout")  # recorded with `attention`, to rebuild the weights from; not asked for by name

_PORT = re.compile(
    r"(?P<base>in|out)(?P<leaf>(\[[^\[\]]+\])*)(?P<grad>\.grad(@(?P<target>.+))?)?"
    rf"|(?P<part>{'|'.join((*ATTENTION_PORTS, *FACT_PORTS))})"
    r"|(?P<graded>z|weights|attention)\.grad(@(?P<aim>.+))?"
)
_SITE = re.compile(r"(?P<path>[^:#]*)(#(?P<call>\d+))?(:(?P<port>.*))?")
_ALIAS = re.compile(rf"((?P<stack>[\w.]+)\.)?(?P<alias>{'|'.join(ALIASES)})(\[(?P<layers>-?\d*(:-?\d*){{0,2}})\])?(:(?P<port>.*))?")
_SHORT = re.compile(
    r"(?P<stack>([\w.]+\.)?)((?P<port>weights)|(?P<alias>attention|cross_attention)\.grad)(?P<layers>(\[[-\d:]*\])?)"
)
_LENS = re.compile(r"blocks\.(?P<layer>\d+|\*)\.(?P<attention>attn\.)?hook_(?P<name>\w+)")
_LENS_NAMES = {"hook_embed": "embed", "ln_final.hook_normalized": "final_norm"}
_LENS_PORTS = {"pattern": "weights"}


@dataclass(frozen=True)
class SiteName:
    """`<module path>[#call]:<port>`. `leaf` lists the keys that pick one tensor of a nested output."""

    path: str
    port: str = "out"
    call: int = 1

    def __str__(self) -> str:
        return f"{self.path}{f'#{self.call}' if self.call > 1 else ''}:{self.port}"

    @property
    def base(self) -> str:
        """`in`, `out`, or a port of attention."""
        found = _port(self.port)
        return str(found["base"] or found["part"] or found["graded"])

    @property
    def leaf(self) -> tuple[str, ...]:
        """Keys of the leaf, outermost first; empty for the first floating tensor."""
        return tuple(re.findall(r"\[([^\[\]]+)\]", _port(self.port)["leaf"] or ""))

    @property
    def is_gradient(self) -> bool:
        """Whether the site holds a gradient."""
        found = _port(self.port)
        return bool(found["grad"] or found["graded"])

    @property
    def target(self) -> str | None:
        """What was differentiated; None for no gradient, and for a gradient of any target."""
        found = _port(self.port)
        return found["target"] or found["aim"]

    @property
    def is_attention(self) -> bool:
        """Whether the site is part of an attention call rather than a module's input or output."""
        return self.base not in ("in", "out")

    @property
    def value(self) -> SiteName:
        """The site that a gradient is taken with respect to; the site itself for any other."""
        return replace(self, port=self.port.partition(".grad")[0]) if self.is_gradient else self

    def aimed(self, target: str) -> SiteName:
        """The site of a gradient, naming the target."""
        return replace(self, port=f"{self.port.partition('@')[0]}@{target}")


@dataclass(frozen=True)
class Alias:
    """What a site is in every architecture: a stack (empty name if there is one), an alias, a layer of so many."""

    stack: str
    name: str
    layer: int | None = None
    depth: int = 0


def is_companion(port: str | None, reduce: str | None) -> bool:
    """Whether a column only goes with another of its site: a scale, a size, a check, which keys a query sees."""
    return port in FACT_PORTS or str(reduce).rpartition("|")[2] in ("scale", "size", "identity", "residual")


def parse_site(text: str) -> SiteName:
    """A full site name without wildcards."""
    found = _SITE.fullmatch(text)
    if found is None:
        raise SchemaError(f"{text!r} is not a site; write '<module path>' or '<module path>:<port>'")
    port = found["port"] or "out"
    _port(port)
    return SiteName(found["path"], port, int(found["call"] or 1))


@dataclass(frozen=True)
class Pattern:
    """One pattern. `port` is what it asks for; None means `out`, or any port when recorded sites are selected.

    >>> Pattern("layers.*.mlp").matches_path(SiteName("layers.3.mlp"))
    True
    >>> Pattern("resid_post[-1]").matches_alias(Alias("", "resid_post", layer=11, depth=12))
    True
    """

    text: str

    @cached_property
    def port(self) -> str | None:
        """The port asked for; SchemaError if there is no such port."""
        if self.text.startswith("re:"):
            return None
        found = self._alias or _SITE.fullmatch(self.text)
        port = found["port"] if found else None
        if port is not None:
            _port(port)
        return port

    @property
    def is_attention(self) -> bool:
        """Whether the pattern names the attention, or cross-attention, that every architecture shares (or a module so named)."""
        found = self._alias
        if found is None or found["alias"] not in ("attention", "cross_attention"):
            return False
        return found["port"] is None or SiteName("", found["port"]).is_attention

    @property
    def is_cross_attention(self) -> bool:
        """Whether it names cross-attention."""
        return self._alias is not None and self._alias["alias"] == "cross_attention"

    @property
    def is_everywhere(self) -> bool:
        """Whether an alias names neither layers nor a stack."""
        return self._alias is not None and self._alias["layers"] is None and self._alias["stack"] is None

    def matches_alias(self, alias: Alias) -> bool:
        """Whether the pattern selects sites of this alias."""
        found = self._alias
        if found is None or found["alias"] != alias.name or not _in_stack(found["stack"], alias.stack):
            return False
        return found["layers"] is None or (alias.layer is not None and alias.layer in _layers(found["layers"], alias.depth))

    def matches_path(self, site: SiteName) -> bool:
        """Whether the pattern selects this module path and call (and, for regular expressions, port)."""
        if self.text.startswith("re:"):
            expression = _compiled(self.text)
            return any(expression.fullmatch(text) for text in ((str(site),) if site.port != "out" else (str(site), site.path)))
        found = _SITE.fullmatch(self.text)
        if self.is_everywhere and self.is_attention:
            return False  # a module of that name is named by its whole path, or with its port
        if found is None or (found["call"] is not None and int(found["call"]) != site.call):
            return False
        return _glob(_segments(found["path"]), _segments(site.path))

    @cached_property
    def _alias(self) -> re.Match[str] | None:
        return _ALIAS.fullmatch(_from_short(_from_lens(self.text)))


def _port(port: str) -> re.Match[str]:
    found = _PORT.fullmatch(port)
    if found is None:
        raise SchemaError(
            f"there is no port {port!r}; ports are 'out', 'in' and a leaf of either, such as 'out[1]', their gradients, such as "
            f"'out.grad', and of attention {', '.join(map(repr, ATTENTION_PORTS))}, 'z.grad' and 'attention.grad'"
        )
    return found


def _from_lens(text: str) -> str:
    """A TransformerLens hook name as an alias; other text as it is."""
    found = _LENS.fullmatch(text)
    if found is None:
        return _LENS_NAMES.get(text, text)
    name = "attention" if found["attention"] else found["name"]
    port = f":{_LENS_PORTS.get(found['name'], found['name'])}" if found["attention"] else ""
    return f"{name}{port}" if found["layer"] == "*" else f"{name}[{found['layer']}]{port}"


def _from_short(text: str) -> str:
    """`weights` and `attention.grad` on their own: that port at every attention module."""
    found = _SHORT.fullmatch(text)
    if found is None:
        return text
    return f"{found['stack']}{found['alias'] or 'attention'}{found['layers']}:{found['port'] or 'attention.grad'}"


def _in_stack(asked: str | None, stack: str) -> bool:
    return asked is None or stack == asked or stack.endswith(f".{asked}")


def _layers(text: str, depth: int) -> Sequence[int]:
    """The layers that an index or slice picks out of `depth`."""
    try:
        bounds = [int(bound) if bound else None for bound in text.split(":")]
        chosen = range(depth)[slice(*bounds)]
    except ValueError:
        raise SchemaError(f"[{text}] is not an index or slice over layers; write resid_post[-1] or resid_post[0:12:2]") from None
    if len(bounds) == 1 and bounds[0] is not None:
        return [bounds[0] % depth] if -depth <= bounds[0] < depth else []
    return chosen


def _compiled(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text[3:])
    except re.error as error:
        raise SchemaError(f"{text!r} is not a regular expression: {error}") from None


def _segments(path: str) -> list[str]:
    return path.split(".") if path else []


def _glob(pattern: list[str], path: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_glob(pattern[1:], path[skipped:]) for skipped in range(len(path) + 1))
    return bool(path) and _segment(pattern[0], path[0]) and _glob(pattern[1:], path[1:])


def _segment(pattern: str, segment: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), segment) is not None
