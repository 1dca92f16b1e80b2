"""The command line: one thin function per command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .analysis_cli import commands
from .outcome import echo
from .runs_given import AsJson, RunPath

app = typer.Typer(
    help="Record a Transformer once, analyse it for as long as you like.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@app.command()
def record(
    model: Annotated[str, typer.Option(help="Model name or folder, or 'demo' for the embedded one.")],
    to: Annotated[str, typer.Option(help="The run to write: a folder, or s3://bucket/path.")],
    sites: Annotated[list[str], typer.Option(help="What to record, or 'none'; may be given several times.")] = ["resid_post"],  # noqa: B006
    attention: Annotated[str, typer.Option(help="Attention of every layer: none, qk, weights, or auto for the smaller.")] = "none",
    gradients: Annotated[bool, typer.Option("--gradients", help="Also gradients of each example's next-token loss.")] = False,
    sample_tokens: Annotated[float | None, typer.Option(help="Only this share of each example's tokens, at the sites.")] = None,
    project: Annotated[int | None, typer.Option(help="Only so many principal components of each site.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text files or folders of them.")] = None,
    dataset: Annotated[str | None, typer.Option(help="A Hugging Face data set.")] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    text_column: Annotated[str, typer.Option(help="Column of the data set, or field of .jsonl lines.")] = "text",
    lines: Annotated[bool, typer.Option("--lines", help="Each line of a text file is an example.")] = False,
    revision: Annotated[str | None, typer.Option(help="Revision of the model.")] = None,
    dtype: Annotated[str, typer.Option(help="Load the model in this dtype.")] = "auto",
    device: Annotated[str, typer.Option(help="Run the model on this device.")] = "cpu",
    batch_size: Annotated[int | None, typer.Option(help="Most examples per batch.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Most positions per batch.")] = 4096,
    max_length: Annotated[int | None, typer.Option(help="Most tokens per example.")] = None,
    overflow: Annotated[str, typer.Option(help="For longer texts: error, truncate or window.")] = "window",
    mode: Annotated[str, typer.Option(help="create, resume or overwrite.")] = "create",
    budget: Annotated[float, typer.Option(help="Bytes of host memory for buffers.")] = 512 * 2**20,
    as_json: AsJson = False,
) -> None:
    """Record a model over texts."""
    from tensortape.instrument import record as record_run

    from . import differentiated, models, show, sources

    differentiated.check_attention(attention)
    if (text is None) == (dataset is None):
        raise typer.BadParameter("give texts either as --text or as --dataset")
    found = (
        sources.from_files(text, lines=lines, text_column=text_column)
        if text
        else sources.from_dataset(dataset or "", split, text_column)
    )
    loaded, tokenizer = models.load(model, revision=revision, dtype=dtype, device=device)
    run = record_run(
        loaded,
        [content for _, content in found],
        tokenizer=tokenizer,
        ids=[id_ for id_, _ in found],
        to=to,
        sites=differentiated.selection(loaded, sites, attention, gradients=gradients, sample_tokens=sample_tokens, project=project),
        targets=differentiated.next_token_loss(loaded) if gradients else None,
        batch_size=batch_size,
        batch_tokens=batch_tokens,
        max_length=max_length,
        overflow=overflow,  # type: ignore[arg-type]
        mode=mode,  # type: ignore[arg-type]
        memory_budget=int(budget),
    )
    echo(show.info(run), show.info_lines, as_json=as_json)


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="Model name or folder, or 'demo'; only its config is read.")],
    tokens: Annotated[float, typer.Option(help="How many tokens, such as 1e9.")],
    sites: Annotated[list[str], typer.Option(help="What to record, or 'none'; may be given several times.")] = ["resid_post"],  # noqa: B006
    attention: Annotated[str, typer.Option(help="Attention of every layer: none, qk, weights, or auto for the smaller.")] = "none",
    gradients: Annotated[bool, typer.Option("--gradients", help="Also gradients of each example's next-token loss.")] = False,
    sample_tokens: Annotated[float | None, typer.Option(help="Only this share of each example's tokens, at the sites.")] = None,
    project: Annotated[int | None, typer.Option(help="Only so many principal components of each site.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the model.")] = None,
    dtype: Annotated[str, typer.Option(help="The dtype the model would be loaded in.")] = "auto",
    batch_tokens: Annotated[int, typer.Option(help="Most positions per batch.")] = 4096,
    max_length: Annotated[int | None, typer.Option(help="Tokens per example; by default the model's most, up to 2,048.")] = None,
    budget: Annotated[float, typer.Option(help="Bytes of host memory for buffers.")] = 512 * 2**20,
    gpus: Annotated[int, typer.Option(help="How many GPUs compute at once.")] = 1,
    gpu_flops: Annotated[float, typer.Option(help="What one GPU achieves, in floating-point operations per second.")] = 3e14,
    gpu_tokens_per_second: Annotated[float | None, typer.Option(help="Measured tokens per second of one GPU instead.")] = None,
    gpu_price: Annotated[float, typer.Option(help="USD per GPU and hour.")] = 2.5,
    disk_bytes_per_second: Annotated[float, typer.Option(help="What all disks together write.")] = 2e9,
    storage_price: Annotated[float, typer.Option(help="USD per GB and month.")] = 0.023,
    as_json: AsJson = False,
) -> None:
    """Say what a recording will take in bytes, files, memory, time and money, before anything runs."""
    from . import costs, differentiated, models, plan_lines
    from . import plan as planning

    differentiated.check_attention(attention)
    built = models.without_weights(model, revision=revision, dtype=dtype)
    rates = costs.Rates(gpus, gpu_flops, gpu_tokens_per_second, gpu_price, disk_bytes_per_second, storage_price)
    plans = [
        planning.plan(
            built,
            differentiated.selection(built, sites, kind, gradients=gradients, sample_tokens=sample_tokens, project=project),
            int(tokens),
            max_length=max_length,
            batch_tokens=batch_tokens,
            budget=int(budget),
            rates=rates,
        )
        for kind in (("qk", "weights") if attention == "auto" else (attention,))
    ]
    found = min(plans, key=lambda one: one.nbytes)
    echo(found.to_json() if as_json else found, plan_lines.lines, as_json=as_json)


@app.command()
def info(
    run: RunPath,
    follow: Annotated[
        bool, typer.Option("--follow", help="While it is being recorded: a line whenever something was committed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a run holds: tables, columns, dtypes, bytes, model, commits."""
    from tensortape.stores import open_run

    from . import follow_command, show

    if follow:
        follow_command.print_followed(run, as_json=as_json)
        return
    echo(show.info(open_run(run)), show.info_lines, as_json=as_json)


@app.command()
def head(
    run: RunPath,
    examples: Annotated[int, typer.Option("--examples", "-n", help="How many examples.")] = 2,
    tokens: Annotated[int, typer.Option(help="How many tokens of each.")] = 12,
    sites: Annotated[list[str] | None, typer.Option(help="Which sites; all by default.")] = None,
    attention: Annotated[str | None, typer.Option(help="Instead, the strongest edges of this layer or attention module.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the first examples: decoded tokens with the norms of their rows, or with the strongest edges of attention."""
    from tensortape.stores import open_run

    from . import edges, models, show

    opened = open_run(run)
    if attention is not None:
        strongest = edges.strongest(opened, attention, examples=examples, most=tokens, tokenizer=models.recorded_tokenizer(opened))
        echo(strongest, edges.lines, as_json=as_json)
        return
    found = show.head(opened, examples=examples, tokens=tokens, sites=sites, tokenizer=models.recorded_tokenizer(opened))
    echo(found, show.head_lines, as_json=as_json)


@app.command()
def verify(
    run: RunPath,
    quick: Annotated[bool, typer.Option("--quick", help="Look at sizes only, and at everything that is not values.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read everything a run holds and compare it with what was committed; exit code 1 if anything is damaged."""
    from dataclasses import asdict

    from tensortape.stores.verify import verify_run

    found = verify_run(run, quick=quick)
    echo({**asdict(found), "ok": found.ok}, lambda _: [repr(found)[1:-1] if found.ok else repr(found)], as_json=as_json)
    raise typer.Exit(0 if found.ok else 1)


@app.command()
def repair(run: RunPath, as_json: AsJson = False) -> None:
    """Make a damaged run readable again: give up, by name, the examples whose values are damaged, and keep all others."""
    from dataclasses import asdict

    from tensortape.stores.repair import repair_run

    from . import show

    echo(asdict(repair_run(run)), show.repair_lines, as_json=as_json)


@app.command()
def gc(run: RunPath, as_json: AsJson = False) -> None:
    """Remove what killed writers left behind; nothing that was committed, and nothing of a part that may have a writer."""
    from tensortape.stores.leftovers import remove_leftovers

    removed = remove_leftovers(run)
    echo({"removed": removed}, lambda found: [*found["removed"], f"{len(found['removed'])} files removed"], as_json=as_json)


@app.command()
def export(
    run: RunPath,
    to: Annotated[Path, typer.Option(help="The folder to write, a new one.")],
    format: Annotated[str, typer.Option(help="safetensors, npy, or sae-lens (a Hugging Face dataset).")] = "safetensors",
    sites: Annotated[list[str] | None, typer.Option(help="Which sites or columns; all numbers by default.")] = None,
    rows_per_file: Annotated[int | None, typer.Option(help="Most rows per file.")] = None,
    context_size: Annotated[int | None, typer.Option(help="For sae-lens: rows per sequence.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write columns of a run as files for other tools."""
    from tensortape.stores import open_run

    from . import show

    folder = open_run(run).export(
        to,
        format,  # type: ignore[arg-type]
        sites=sites,
        rows_per_file=rows_per_file,
        context_size=context_size,
    )
    echo(show.exported(folder), show.exported_lines, as_json=as_json)


@app.command()
def demo(
    to: Annotated[Path, typer.Option(help="Folder for the run, the table and the plot.")] = Path("demo"),
    files: Annotated[int, typer.Option(help="How many files of the standard library.")] = 30,
    seed: Annotated[int, typer.Option(help="Which files, and which are held out.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Record the embedded model over the Python standard library and probe every layer."""
    from . import demo as demonstration

    found = demonstration.run_demo(to, files=files, seed=seed, say=(lambda line: None) if as_json else typer.echo)
    if as_json:
        typer.echo(json.dumps(found, indent=2))


app.add_typer(commands)  # those that analyse


def main() -> None:
    """Entry point: one clear line and exit code 2 for bad input."""
    from tensortape.analyses.errors import AnalysisError
    from tensortape.stores import StoreError

    try:
        app()
    except (StoreError, AnalysisError, OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if _is_ours_or_input(error):
            from .show import printable

            typer.echo(f"tensortape: {printable(' '.join(str(error).split()))}", err=True)
            sys.exit(2)
        raise


def _is_ours_or_input(error: Exception) -> bool:
    """Our own errors and those of files and names given; anything else is a defect and keeps its traceback."""
    return type(error).__module__.startswith("tensortape") or isinstance(error, (OSError, ValueError, ImportError))


if __name__ == "__main__":
    main()
