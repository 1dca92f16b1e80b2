"""One number per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tensortape.stores.dtypes import Array

from .results import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class TokenScores(Result):
    """A score of every token of some examples. `scores[n]` is the n-th of them, float64 [tokens]; `len` is how many there are.

    Args:
        method: what a score is: `gradient`, or `gradient x input`, which is signed.
        site, target: what was differentiated with respect to, and what.
        reduce: how the features of a token became one number: `l1`, `l2`, `max`, or the signed `sum`.
        ids, examples: of the examples: their ids, and their numbers in the run [n].
        lengths: tokens of each [n].
        values: all scores, of one example after another [rows].
        tokens: the text of each token [rows]; empty where the run keeps neither texts nor token ids.
    """

    method: str
    site: str
    target: str
    reduce: str
    ids: tuple[str | int, ...]
    examples: Array
    lengths: Array
    values: Array
    tokens: tuple[str, ...]

    @property
    def signed(self) -> bool:
        """Whether scores have a sign that means something."""
        return self.reduce == "sum"

    def text(self, number: int) -> tuple[str, ...]:
        """The tokens of the n-th example."""
        return self.tokens[self._span(number)]

    def to_pandas(self) -> pd.DataFrame:
        """One row per token: example (its number in the run), id, place within the example, token (where known), score."""
        import pandas as pd

        owner = np.repeat(np.arange(len(self)), self.lengths)
        frame = pd.DataFrame(
            {
                "example": self.examples[owner],
                "id": [self.ids[number] for number in owner.tolist()],
                "place": np.arange(len(owner)) - (np.cumsum(self.lengths) - self.lengths)[owner],
                "score": self.values,
            }
        )
        if self.tokens:
            frame.insert(3, "token", list(self.tokens))
        return frame

    def plot(self, number: int = 0) -> Figure:
        """The n-th example as text on coloured ground; as bars where its tokens are not known. Needs the extra `plots`."""
        from .figures.saliency import score_figure

        return score_figure(self, number)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> Array:
        return self.values[self._span(number)]

    def __repr__(self) -> str:
        what = f"{self.method} ({self.reduce}) of {self.target} at {self.site}"
        return f"<TokenScores {what}: {len(self.values)} tokens of {len(self)} examples>"

    def _span(self, number: int) -> slice:
        """Where the n-th example's tokens lie."""
        at = range(len(self))[number]
        first = int(self.lengths[:at].sum())
        return slice(first, first + int(self.lengths[at]))
