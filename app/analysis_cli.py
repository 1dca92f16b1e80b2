"""Commands that analyse runs: one thin function per command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .outcome import Csv, Out, Plot, echo, present
from .runs_given import AsJson, RunPath

commands = typer.Typer()


@commands.command()
def probe(
    run: RunPath,
    labels: Annotated[list[str], typer.Option(help="A column of labels, such as token/tag; may be given several times.")],
    sites: Annotated[list[str], typer.Option(help="Which sites; may be given several times.")] = ["resid_post"],  # noqa: B006
    fit: Annotated[str, typer.Option(help="exact (logistic regression at its optimum), lda or ridge.")] = "exact",
    control: Annotated[bool, typer.Option("--control", help="Also a control task: a random label for each token type.")] = False,
    mdl: Annotated[bool, typer.Option("--mdl", help="Also the bits of an online code of the labels.")] = False,
    baseline: Annotated[str | None, typer.Option(help="A run of the same examples through a model that was not trained.")] = None,
    level: Annotated[str | None, typer.Option(help="token, example, or a column that numbers words or spans.")] = None,
    pool: Annotated[str, typer.Option(help="How tokens are joined: first, last or mean.")] = "mean",
    groups: Annotated[str | None, typer.Option(help="Example column that is never split between training and test.")] = None,
    test_share: Annotated[float, typer.Option(help="About this share of the rows is held out.")] = 0.25,
    folds: Annotated[int | None, typer.Option(help="Instead, test on each of so many folds.")] = None,
    strength: Annotated[float, typer.Option(help="Of the penalty.")] = 1.0,
    per_step: Annotated[bool, typer.Option("--per-step", help="At each step of a training, on the same examples.")] = False,
    phase: Annotated[str, typer.Option(help="With --per-step: of these examples.")] = "probe",
    seed: Annotated[int, typer.Option(help="Of the split and the control task.")] = 0,
    csv: Csv = None,
    plot: Plot = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Fit a linear probe per site for each column of labels, beside what it is to be held against."""
    from tensortape.analyses import fit_probes, probe_steps
    from tensortape.stores import open_run

    opened = open_run(run)
    options: dict[str, Any] = {
        "fit": fit, "control": control, "level": level, "pool": pool, "groups": groups, "test_share": test_share, "folds": folds,
        "strength": strength, "seed": seed,
    }  # fmt: skip
    if per_step:
        if mdl or baseline is not None:
            raise typer.BadParameter("--per-step goes without --mdl and --baseline: step 0 is the model before training")
        steps = probe_steps(opened, labels, sites, phase=phase, **options)
        present(steps, csv=csv, plot=plot, out=out, as_json=as_json)
        return
    untrained = None if baseline is None else open_run(baseline)
    report = fit_probes(opened, labels=labels, sites=sites, mdl=mdl, baseline=untrained, **options)
    present(report, csv=csv, plot=plot, out=out, as_json=as_json)


@commands.command()
def drift(
    run: RunPath,
    sites: Annotated[list[str], typer.Option(help="Which sites; may be given several times.")] = ["resid_post"],  # noqa: B006
    phase: Annotated[str, typer.Option(help="Of the examples that are recorded at every step.")] = "probe",
    steps: Annotated[list[int] | None, typer.Option("--step", help="Which steps; may be given several times; all if not.")] = None,
    reference: Annotated[int | None, typer.Option(help="The step to compare with; the first if not given.")] = None,
    level: Annotated[str, typer.Option(help="What a row is: token, example, or a column that numbers words.")] = "token",
    pool: Annotated[str, typer.Option(help="How tokens are joined: first, last or mean.")] = "mean",
    seed: Annotated[int, typer.Option(help="Of the minibatches that wide sites are estimated from.")] = 0,
    csv: Csv = None,
    plot: Plot = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Compare sites across the steps of a training: CKA, cosine and norm, beside a reference step and the step before."""
    from tensortape.analyses import drift as compare
    from tensortape.stores import open_run

    found = compare(
        open_run(run),
        sites,
        phase=phase,
        steps=steps,
        reference=reference,
        level=level,
        pool=pool,  # type: ignore[arg-type]
        seed=seed,
    )
    present(found, csv=csv, plot=plot, out=out, as_json=as_json)


@commands.command()
def heads(
    run: RunPath,
    sites: Annotated[list[str] | None, typer.Option(help="Layers, names or patterns of attention sites; all by default.")] = None,
    examples: Annotated[int | None, typer.Option(help="Only so many examples, drawn at random.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    csv: Csv = None,
    plot: Plot = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Say what each attention head looks at: entropy, distance, and mass on first, previous, own and once-followed tokens."""
    from tensortape.analyses import head_stats
    from tensortape.stores import open_run

    from . import head_lines

    wanted = [int(site) if site.lstrip("-").isdigit() else site for site in sites or []]
    stats = head_stats(open_run(run), sites=wanted or None, examples=examples, seed=seed)
    present(stats, csv=csv, plot=plot, out=out, as_json=as_json, lines=head_lines.lines)


@commands.command()
def neurons(
    run: RunPath,
    site: Annotated[str, typer.Argument(help="A recorded site, such as 'mlp_out[3]'.", show_default=False)],
    labels: Annotated[str | None, typer.Option(help="A column of classes; adds AUC and mean differences.")] = None,
    target: Annotated[str | None, typer.Option(help="Importance for this target, whose gradient was recorded at the site.")] = None,
    assume_sum: Annotated[
        bool, typer.Option("--assume-sum", help="Take gradients of an undeclared reduction as they are.")
    ] = False,
    level: Annotated[str, typer.Option(help="What a row is: token, example, or a column that numbers words.")] = "token",
    top: Annotated[int, typer.Option(help="How many of the highest rows of each neuron.")] = 5,
    by: Annotated[str | None, typer.Option(help="Rank by importance, selectivity or deviation.")] = None,
    first: Annotated[int, typer.Option(help="How many neurons to show.")] = 10,
    csv: Csv = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Show the neurons of a site: how they are spread, what they tell apart, and the tokens in which they are highest."""
    from tensortape.stores import open_run

    from . import neurons_command

    found = neurons_command.found(
        open_run(run),
        site,
        labels=labels,
        target=target,
        assume_sum=assume_sum,
        level=level,
        top=top,
        by=by,  # type: ignore[arg-type]
        first=first,
        csv=csv,
        plot=plot,
    )
    echo(found, neurons_command.lines, as_json=as_json)


@commands.command()
def pca(
    run: RunPath,
    sites: Annotated[list[str] | None, typer.Option(help="Which sites; resid_post by default.")] = None,
    components: Annotated[int, typer.Option(help="How many components.")] = 10,
    labels: Annotated[str | None, typer.Option(help="A column of classes, to colour the picture by.")] = None,
    level: Annotated[str, typer.Option(help="What a row is: token, example, or a column that numbers words.")] = "token",
    sample: Annotated[int, typer.Option(help="How many rows to draw.")] = 2000,
    seed: Annotated[int, typer.Option(help="Which rows to draw.")] = 0,
    csv: Csv = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Find the principal components of sites, and how much of the variance they have."""
    from tensortape.stores import open_run

    from . import pca_command

    found = pca_command.found(
        open_run(run), sites, components=components, labels=labels, level=level, sample=sample, seed=seed, csv=csv, plot=plot
    )
    echo(found, pca_command.lines, as_json=as_json)


@commands.command()
def cav(
    run: RunPath,
    concept: Annotated[list[str], typer.Option(help="A concept, as example/topic=asyncio; may be given several times.")],
    out: Annotated[Path, typer.Option(help="Write the vectors here: OUT.json and OUT.safetensors.")],
    sites: Annotated[list[str], typer.Option(help="At which sites; may be given several times.")] = ["resid_post"],  # noqa: B006
    kind: Annotated[str, typer.Option(help="lda, logistic, mean_difference, or mean_gradient (with --target).")] = "lda",
    against: Annotated[str | None, typer.Option(help="What it is told from: other rows, or random; all others by default.")] = None,
    target: Annotated[str | None, typer.Option(help="For mean_gradient: what was differentiated.")] = None,
    level: Annotated[str | None, typer.Option(help="What a row is: example, token, or a column that numbers words.")] = None,
    pool: Annotated[str, typer.Option(help="How tokens are joined: mean, first or last.")] = "mean",
    groups: Annotated[str | None, typer.Option(help="Column of groups that are not split.")] = None,
    test_share: Annotated[float, typer.Option(help="About this share of the rows is held out.")] = 0.25,
    strength: Annotated[float, typer.Option(help="Of the penalty; 1 / C of scikit-learn.")] = 1.0,
    null: Annotated[int, typer.Option(help="How many random sets to fit, which tcav holds the concept against.")] = 200,
    assume: Annotated[str | None, typer.Option(help="sum: take gradients of an undeclared reduction as they are.")] = None,
    seed: Annotated[int, typer.Option(help="Of the split and the random sets.")] = 0,
    csv: Csv = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Fit concept activation vectors."""
    from tensortape.analyses import fit_cavs
    from tensortape.stores import open_run

    from . import concepts_command

    found = fit_cavs(
        open_run(run),
        concepts=concept,
        sites=sites,
        kind=kind,  # type: ignore[arg-type]
        against=against,
        target=target,
        level=level,
        pool=pool,  # type: ignore[arg-type]
        groups=groups,
        test_share=test_share,
        strength=strength,
        null=null,
        assume=assume,  # type: ignore[arg-type]
        seed=seed,
    )
    shown = concepts_command.written(found, csv, plot, out)
    echo(shown, lambda one: concepts_command.lines(one, concepts_command.CAV_COLUMNS), as_json=as_json)


@commands.command()
def tcav(
    run: RunPath,
    cavs: Annotated[Path, typer.Option(help="Vectors that `cav` wrote.")],
    target: Annotated[str, typer.Option(help="What was differentiated.")],
    examples: Annotated[
        str | None, typer.Option(help="Those of the class that is tested, as example/label=x; all by default.")
    ] = None,
    sites: Annotated[list[str] | None, typer.Option(help="Only the vectors at these sites.")] = None,
    assume: Annotated[str | None, typer.Option(help="sum: take gradients of an undeclared reduction as they are.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result here: OUT.json and OUT.safetensors.")] = None,
    csv: Csv = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Test whether a target of the model changes along concepts."""
    from tensortape.analyses import CAVs
    from tensortape.analyses import tcav as test
    from tensortape.stores import open_run

    from . import concepts_command

    opened, vectors = open_run(run), CAVs.load(cavs)
    found = test(opened, vectors, target=target, examples=examples, sites=sites, assume=assume)  # type: ignore[arg-type]
    shown = concepts_command.written(found, csv, plot, out)
    echo(shown, lambda one: concepts_command.lines(one, concepts_command.TCAV_COLUMNS), as_json=as_json)


@commands.command()
def anchors(
    run: RunPath,
    label: Annotated[list[str], typer.Option(help="A label word (its first token counts), or a token id; once for each.")],
    prefix: Annotated[str, typer.Option(help="What label words follow, as text or token ids with commas.")] = "",
    query: Annotated[
        str, typer.Option(help="The query's label comes after the last token (last), or after the last prefix.")
    ] = "last",
    by: Annotated[
        str, typer.Option(help="Classes: label words (word), or the first, second, ... to appear (appearance).")
    ] = "word",
    target: Annotated[str, typer.Option(help="What was differentiated.")] = "loss",
    predictions: Annotated[str | None, typer.Option(help="Column of predicted label words; adds AUCROC_l and R_l.")] = None,
    flow: Annotated[bool, typer.Option("--flow/--no-flow", help="Flow of saliency, which needs attention.grad.")] = True,
    sites: Annotated[list[str] | None, typer.Option(help="Which attention sites; all by default.")] = None,
    csv: Csv = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Measure how information flows into the label words of demonstrations, and from them into the prediction."""
    from tensortape.stores import open_run

    from . import anchors_command

    found = anchors_command.find(
        open_run(run), label, prefix=prefix, query=query, by=by, target=target, predictions=predictions, flow=flow, sites=sites
    )
    if csv is not None:
        found.table.to_csv(csv, index=False)
    if plot is not None:
        found.draw(plot)
    echo(found.to_json() if as_json else found, anchors_command.Anchors.lines, as_json=as_json)
