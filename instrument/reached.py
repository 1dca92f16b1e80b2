"""Whether a batch has every site that was asked for: a column is never empty without a word."""

from __future__ import annotations

from collections.abc import Collection

from tensortape.stores.patterns import SiteName

from .errors import SiteNotFoundError
from .sites import Tap
from .steps import Key


def check(found: Collection[Key], taps: list[Tap], expected: set[Key] | None, graphless: Collection[SiteName]) -> None:
    """SiteNotFoundError unless all sites are there.

    Args:
        found: what the batch has.
        expected: what earlier batches had; None for the first, which must have something of every tap.
        graphless: sites whose gradient was asked for, but that have none.
    """
    for tap in taps:
        needed = expected is None or (tap.site.is_gradient and tap.options.missing == "error")
        if needed and not any(tap.takes(site) for site, _ in found):
            raise SiteNotFoundError(_never(tap, graphless))
    if expected is not None:
        _check_same(found, taps, expected)


def _check_same(found: Collection[Key], taps: list[Tap], expected: set[Key]) -> None:
    optional = [tap for tap in taps if tap.options.missing == "absent"]
    absent = expected.difference(found)
    missing = sorted(str(site) for site, _ in absent if not any(tap.takes(site) for tap in optional))
    new = sorted(str(site) for site, _ in set(found).difference(expected))
    if missing or new:
        what = f"did not run: {', '.join(missing)}" if missing else f"ran for the first time: {', '.join(new)}"
        raise SiteNotFoundError(
            f"unlike in the first batch, some sites {what}; Site(..., missing='absent') records sites that do not always run"
        )


def _never(tap: Tap, graphless: Collection[SiteName]) -> str:
    if tap.site.is_gradient and any(tap.takes(site) for site in graphless):
        return (
            f"site {tap.site} has no gradient: nothing its tensor was computed from requires one, or the forward ran under "
            "no_grad. Where all parameters are frozen, give the model inputs_embeds after inputs_embeds.requires_grad_()"
        )
    if tap.site.is_gradient:
        return f"site {tap.site} was reached by no backward: call backward() inside `with recorder.batch(...)`"
    if tap.site.is_attention:
        return (
            f"no attention was seen at {str(tap.site)!r}: it goes neither through transformers' attention interface, "
            "nn.MultiheadAttention, scaled_dot_product_attention nor a softmax of an attention module, or the model was "
            "compiled before the recorder was attached; record module outputs instead"
        )
    return (
        f"site {tap.site} was never reached by the forward: the module was not called"
        + (f" {tap.call} times" if tap.call else "")
        + " (some modules only hold weights that their parent uses), or was compiled without the recorder attached; choose "
        "another site, or call recorder.attach() before torch.compile"
    )
