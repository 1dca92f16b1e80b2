"""Principal components of what sites give, and coordinates in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tensortape.stores import Column
from tensortape.stores.basis import Basis
from tensortape.stores.dtypes import Array
from tensortape.stores.selection import site_name

from .errors import BatchError

FIT_TOKENS = 16_384


@dataclass(frozen=True)
class PCA:
    """The first k principal components of every site it is used at.

    A fresh one is fitted by `record` on the first tokens; `PCA.from_run` makes one that is fitted.

    Args:
        k: how many components.
        fit_tokens: on how many tokens they are fitted.
        bases: the components of each site, by its name, once they are fitted.
    """

    k: int
    fit_tokens: int = FIT_TOKENS
    bases: Mapping[str, Basis] = field(default_factory=dict, repr=False)
    _placed: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.k < 1 or self.fit_tokens <= self.k:
            raise ValueError(
                f"PCA needs at least one component, and more fit_tokens than components; got {self.k} and {self.fit_tokens}"
            )

    @classmethod
    def from_run(cls, columns: Column | Sequence[Column], k: int, *, fit_tokens: int = FIT_TOKENS, seed: int = 0) -> PCA:
        """Fitted on recorded columns of whole rows, at most `fit_tokens` of each: a seeded sample where there are more.

        >>> from tensortape.stores import RunWriter, open_run
        >>> site = {"path": "layers.0", "port": "out", "call": 1}
        >>> with RunWriter("rows.zarr") as writer:
        ...     writer.describe("token/layers.0:out", site=site)
        ...     writer.append(ids=[0], columns={"token/layers.0:out": [np.outer(np.arange(9), [3.0, 4.0])]})
        >>> pca = PCA.from_run(open_run("rows.zarr")["layers.0:out"], 1)
        >>> np.abs(pca.bases["layers.0:out"].components).round(2)
        array([[0.6, 0.8]], dtype=float32)
        """
        several = [columns] if isinstance(columns, Column) else columns
        return cls(k, fit_tokens, {str(site_name(one)): fitted(_rows(one, fit_tokens, seed), k, one.name) for one in several})

    @property
    def name(self) -> str:
        """What columns of coordinates are named by."""
        return f"pca{self.k}"

    def basis(self, site: str) -> Basis:
        """The components of a site; BatchError if they were not fitted."""
        if site not in self.bases:
            raise BatchError(f"PCA({self.k}) is not fitted for site {site}; it is for {', '.join(self.bases) or 'none'}")
        return self.bases[site]

    def coordinates(self, site: str, rows: torch.Tensor) -> torch.Tensor:
        """Coordinates of rows [n, *feature] at a site, and the norm of what the components leave out: [n, k + 1], in float32."""
        mean, components = self._on(site, rows.device)
        if rows.shape[1:] != self.basis(site).mean.shape:
            shapes = [list(shape) for shape in (rows.shape[1:], self.basis(site).mean.shape)]
            raise BatchError(f"site {site} gives rows of shape {shapes[0]}, but was fitted on rows of {shapes[1]}")
        centred = rows.reshape(len(rows), -1).float() - mean
        found = centred @ components.T
        residual = torch.linalg.vector_norm(centred - found @ components, dim=1, keepdim=True)
        return torch.cat([found, residual], 1)

    def said(self, site: str) -> dict[str, Any]:
        """What the run says of the components of a site."""
        basis = self.basis(site)
        return {"asset": basis.asset, "digest": basis.digest, "components": self.k, "tokens": basis.tokens}

    def _on(self, site: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean [d], components [k, d]) on a device."""
        if (site, device) not in self._placed:
            basis = self.basis(site)
            both = (torch.from_numpy(one).to(device) for one in (basis.mean.reshape(-1), basis.components.reshape(self.k, -1)))
            self._placed[site, device] = tuple(both)
        mean, components = self._placed[site, device]
        return mean, components


def fitted(rows: Array, k: int, what: str) -> Basis:
    """The first k principal components of rows [n, *feature], fitted in float64; rows with NaN or infinity are left out."""
    from sklearn.decomposition import PCA as Exact

    flat = rows.reshape(len(rows), -1).astype(np.float64)
    flat = flat[np.isfinite(flat).all(1)]
    count, width = flat.shape
    if k > width or k >= count:
        raise ValueError(f"PCA({k}) of {what} needs more than {k} rows of at least {k} features; got {count} rows of {width}")
    found = Exact(k, svd_solver="covariance_eigh" if count > width else "full").fit(flat)
    return Basis(
        mean=found.mean_.astype(np.float32).reshape(rows.shape[1:]),
        components=np.ascontiguousarray(found.components_, np.float32).reshape(k, *rows.shape[1:]),
        variance=found.explained_variance_,
        total=float(flat.var(0, ddof=1).sum()),
        tokens=count,
    )


def _rows(column: Column, most: int, seed: int) -> Array:
    count = len(column)
    chosen = np.arange(count) if count <= most else np.sort(np.random.default_rng(seed).choice(count, most, replace=False))
    found: Array = column.rows(chosen)
    return found
