"""What all commands take alike."""

from __future__ import annotations

from typing import Annotated

import typer

RunPath = Annotated[str, typer.Argument(help="A recorded run: a folder, or s3://bucket/path.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
