"""Recorders in plain training loops: what is recorded, when, and that the training does not notice."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_loop
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import hook_count
from torch import nn
from training_loop import SITES, Loop, Told, names, optimizer_of, probes, tokens, train

from tensortape.instrument import ProbeSet, Recorder, Schedule, Site
from tensortape.instrument.errors import SiteNotFoundError
from tensortape.stores import Run, open_run
from tensortape.stores.errors import KeyRepeatedError, SchemaError

LOOPS = {
    "plain": Loop(),
    "accumulation": Loop(micro=3),
    "checkpointing": Loop(reentrant=False),
    "reentrant checkpointing": Loop(reentrant=True, micro=2),
    "autocast": Loop(autocast=True, micro=2),
    "scaler and clipping": Loop(scaler=True, clip=0.05, micro=2),
    "everything": Loop(micro=2, reentrant=False, autocast=True, scaler=True, clip=0.05, every=3),
}
STEPS = 5


def same(one: Told, other: Told) -> bool:
    """Bit for bit."""
    gradients = zip(one.gradients, other.gradients, strict=True)
    return (
        one.losses == other.losses
        and all(torch.equal(a, b) for mine, theirs in gradients for a, b in zip(mine, theirs, strict=True))
        and all(torch.equal(a, b) for a, b in zip(one.weights, other.weights, strict=True))
    )


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
def test_a_training_does_not_notice_being_recorded(loop, make, opened):
    """Losses, gradients and final weights, bit for bit."""
    bare, recorded = training_loop.model(loop), training_loop.model(loop)
    alone = train(loop, bare, optimizer_of(bare), range(1, STEPS + 1))
    recorder, before = make(recorded, SITES, every=loop.every), hook_count(recorded)
    watched = train(loop, recorded, optimizer_of(recorded), range(1, STEPS + 1), recorder, probes())
    assert same(alone, watched)
    assert hook_count(recorded) == before
    run = opened(recorder)
    due = [step for step in range(1, STEPS + 1) if (step - 1) % loop.every == 0]
    assert run.steps["step"].tolist() == list(range(1, STEPS + 1))
    assert run.steps["loss"].tolist() == watched.losses
    trained = [(name, "train", step) for step in due for micro in range(loop.micro) for name in names(step, micro)]
    probed = [(name, "probe", step - 1) for step in due for name in ("p", "q")]
    assert sorted(run.keys) == sorted(trained + probed)
    assert run.verify().ok


def states_of(net: Any, batch: dict[str, Any]) -> list[np.ndarray]:
    """Outputs of the last block, without pads."""
    kept: list[torch.Tensor] = []
    handle = net.transformer.h[1].register_forward_hook(
        lambda module, args, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        net(**batch)
    handle.remove()
    return [row[mask.bool()].numpy() for row, mask in zip(kept[0], batch["attention_mask"], strict=True)]


def test_examples_are_of_the_weights_their_step_starts_from(make, opened):
    loop = Loop(every=3)
    net, twin = training_loop.model(loop), training_loop.model(loop)
    optimizer, others = optimizer_of(net), optimizer_of(twin)
    recorder = make(net, SITES, every=3)
    train(loop, net, optimizer, range(1, 8), recorder, probes())
    run = opened(recorder)
    for step in range(1, 8):
        if step in (1, 4, 7):
            batch = tokens(step, 0)
            for name, wanted in zip(names(step, 0), states_of(twin, batch), strict=True):
                np.testing.assert_array_equal(run["resid_post[1]"][int(run.where(id=name, step=step)[0])], wanted)
            first = tokens(0, 0, seed=7)
            [wanted, _] = states_of(twin, {key: first[key][:2] for key in ("input_ids", "attention_mask")})
            np.testing.assert_array_equal(run["resid_post[1]"][int(run.where(id="p", phase="probe", step=step - 1)[0])], wanted)
        train(loop, twin, others, range(step, step + 1))


def taken(net: nn.Module, loop: Loop, name: str, every: int = 1) -> tuple[dict[str, list[np.ndarray]], list[list[torch.Tensor]]]:
    """What autograd gives for a parameter, step by step: before and after clipping, update and value."""
    parameter = dict(net.named_parameters())[name]
    optimizer, found = optimizer_of(net), {kind: [] for kind in ("grad", "clipped", "update", "value")}
    for step in range(1, STEPS + 1):
        for micro in range(loop.micro):
            with torch.autocast("cpu", torch.bfloat16, enabled=loop.autocast):
                loss = net(**tokens(step, micro)).loss / loop.micro
            loss.backward()
        found["grad"].append(parameter.grad.numpy().copy())
        nn.utils.clip_grad_norm_(net.parameters(), loop.clip)
        found["clipped"].append(parameter.grad.numpy().copy())
        before = parameter.detach().clone()
        optimizer.step()
        found["update"].append((parameter.detach() - before).numpy())
        found["value"].append(parameter.detach().numpy().copy())
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_parameters_are_recorded_as_autograd_has_them(make, opened, reentrant, scaler):
    """Accumulated, and without a scaler's scale: a power of two, so that the bits are the same."""
    loop = Loop(micro=2, clip=0.01, scaler=scaler, reentrant=reentrant)
    name = "transformer.h.0.mlp.c_fc.weight"
    kinds = ("grad", "clipped", "update", "value")
    sites = [
        *(f"param.{name}.{kind}" for kind in kinds),
        *(Site(f"param.{name}.{kind}", reduce=how) for kind in kinds for how in ("norm", "row_norm", "cosine")),
    ]
    net = training_loop.model(loop)
    recorder = make(net, sites, every=1)
    train(loop, net, optimizer_of(net), range(1, STEPS + 1), recorder)
    run, wanted = opened(recorder), taken(training_loop.model(loop), loop, name)
    column = run.tables["step"]
    for kind in kinds:
        expected = np.stack(wanted[kind])
        np.testing.assert_array_equal(column[f"param.{name}.{kind}"].rows(), expected)
        flat = expected.reshape(STEPS, -1).astype(np.float64)
        np.testing.assert_allclose(column[f"param.{name}.{kind}|norm"].rows(), np.linalg.norm(flat, axis=1), rtol=1e-5)
        np.testing.assert_allclose(column[f"param.{name}.{kind}|row_norm"].rows(), np.linalg.norm(expected, axis=2), rtol=1e-5)
        cosines = (flat[1:] * flat[:-1]).sum(1) / np.linalg.norm(flat[1:], axis=1) / np.linalg.norm(flat[:-1], axis=1)
        np.testing.assert_allclose(column[f"param.{name}.{kind}|cosine"].rows(), [np.nan, *cosines], rtol=1e-4, atol=1e-6)


def test_random_projections_keep_inner_products(make, opened):
    """On average over seeds, within five standard errors of what the variance bound allows."""
    loop, name, width, seeds = Loop(), "transformer.h.0.mlp.c_fc.weight", 64, 40
    net = training_loop.model(loop)
    sites = [
        f"param.{name}.grad",
        *(Site(f"param.{name}.grad", reduce="random", width=width, sample_seed=seed) for seed in range(seeds)),
    ]
    recorder = make(net, sites, every=1)
    train(loop, net, optimizer_of(net), range(1, 3), recorder)
    run = opened(recorder)
    x, y = run.tables["step"][f"param.{name}.grad"].rows().reshape(2, -1).astype(np.float64)
    found = [run.tables["step"][f"param.{name}.grad|random{width}.seed{seed}"].rows().astype(np.float64) for seed in range(seeds)]
    products = np.array([one[0] @ one[1] for one in found])
    error = np.linalg.norm(x) * np.linalg.norm(y) * np.sqrt(2 / width / seeds)
    assert abs(products.mean() - x @ y) < 5 * error
    assert len({one.tobytes() for one in found}) == seeds


def test_hooks_are_there_in_recorded_steps_only(make):
    net = training_loop.model(Loop())
    recorder, counts = make(net, SITES, every=3), []
    for step in range(1, 8):
        with recorder.batch(ids=names(step, 0)):
            counts.append(hook_count(net) > 0)
            net(**tokens(step, 0)).loss.backward()
        recorder.step()
        net.zero_grad()
    assert counts == [True, False, False, True, False, False, True]
    assert all(not parameter._post_accumulate_grad_hooks for parameter in net.parameters())


@given(
    every=st.none() | st.integers(1, 9),
    steps=st.sets(st.integers(1, 40), max_size=5),
    epochs=st.none() | st.integers(1, 3),
    when=st.none() | st.integers(2, 7),
)
def test_a_schedule_is_due_when_any_of_its_parts_is(every, steps, epochs, when):
    if not (every or steps or epochs or when):
        return
    schedule = Schedule(every=every, steps=steps, epochs=epochs, when=None if when is None else lambda step: step % when == 0)
    for step in range(1, 41):
        epoch = (step - 1) // 10 if (step - 1) % 10 == 0 else None
        wanted = bool(every and step % every == 1 % every) or step in steps or bool(when and step % when == 0)
        wanted = wanted or bool(epochs and epoch is not None and epoch % epochs == 0)
        assert schedule.is_due(step, epoch) == wanted


@pytest.mark.parametrize(
    "given", [{}, {"every": 0}, {"every": -3}, {"seconds": 0}, {"epochs": 0}, {"steps": 3}, {"steps": [0]}, {"steps": "10"}]
)
def test_schedules_that_are_none_are_refused(given):
    with pytest.raises(ValueError, match=r"positive|schedule needs|numbers from 1 on, or a range"):
        Schedule(**given)


@pytest.mark.parametrize(
    ("every", "due"),
    [
        (2, [1, 3, 5]),
        ([2, 5], [2, 5]),
        (range(2, 4), [2, 3]),
        (lambda step: step == 4, [4]),
        (Schedule(steps=[1], every=4), [1, 5]),
    ],
)
def test_recorders_take_schedules_of_every_kind(make, opened, every, due):
    net = nn.Linear(3, 2)
    recorder = make(net, ":out", every=every)
    for step in range(1, 7):
        with recorder.batch(ids=[step]):
            net(torch.ones(1, 3))
        recorder.step()
    assert [step for _, _, step in opened(recorder).keys] == due


def test_epochs_and_time(make, opened):
    net = nn.Linear(3, 2)
    recorder = make(net, ":out", every=Schedule(epochs=2))
    for epoch in range(4):
        recorder.begin_epoch(epoch)
        for batch in range(3):
            with recorder.batch(ids=[batch]):
                net(torch.ones(1, 3))
            recorder.step()
    assert [step for _, _, step in opened(recorder).keys] == [1, 7]
    resumed = make(net, ":out", every=Schedule(seconds=1e9))
    assert resumed.is_due
    resumed.load_state_dict({"step": 5})
    assert resumed.is_due, "the first step after a checkpoint"
    later = Schedule(seconds=1e-9)
    assert [later.is_due(step) for step in (1, 2)] == [True, True]
    assert [schedule.is_due(step) for schedule in [Schedule(seconds=1e9)] for step in (1, 2)] == [True, False]


def test_two_models_and_two_losses(make, opened):
    """A GAN: the discriminator sees two batches of the same ids in a step, each a phase of its own; each model has a recorder."""
    torch.manual_seed(0)
    generator, judge = nn.Sequential(nn.Linear(5, 7), nn.Tanh()), nn.Sequential(nn.Linear(7, 3), nn.Linear(3, 1))
    mine, theirs = make(generator, "0", every=2), make(judge, ["0", "0:out.grad"], every=2)
    for step in range(4):
        noise, ids = torch.randn(2, 5), [f"{step}.{row}" for row in range(2)]
        with theirs.batch(ids=ids, phase="real"), theirs.target("real", reduction="sum"):
            judge(torch.randn(2, 7)).sum().backward()
        with mine.batch(ids=ids), theirs.batch(ids=ids, phase="fake"):
            fake = judge(generator(noise))
            with theirs.target("fake", reduction="sum"):
                fake.sum().backward()
        mine.step(loss=1.0)
        theirs.step(real=0.5, fake=0.25)
    run, other = opened(theirs), opened(mine)
    assert [(phase, step) for _, phase, step in run.keys] == [(p, s) for p in ("real", "fake") for s in (1, 1, 3, 3)]
    assert [(phase, step) for _, phase, step in other.keys] == [("train", s) for s in (1, 1, 3, 3)]
    assert run["0:out.grad@fake"].present.tolist() == [False] * 4 + [True] * 4
    assert run.steps["fake"].tolist() == [0.25] * 4


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # while torch traces
def test_compiled_before_the_schedule_begins(make, opened):
    """Hooks that were compiled in stay, and take nothing in steps that are not due."""
    torch._dynamo.reset()
    net = training_loop.model(Loop())
    recorder = make(net, ["resid_post[1]"], every=2)
    recorder.attach()
    fast = torch.compile(net, backend="eager")
    for step in range(1, 5):
        with recorder.batch(ids=names(step, 0)):
            fast(**tokens(step, 0)).loss.backward()
        recorder.step()
    assert sorted({step for _, _, step in opened(recorder).keys}) == [1, 3]
    torch._dynamo.reset()


def test_an_exception_leaves_no_hook_and_no_half_step(make, opened):
    net = training_loop.model(Loop())
    recorder = make(net, SITES, every=1)
    with suppress(ZeroDivisionError), recorder.batch(ids=names(1, 0)):
        net(**tokens(1, 0))
        raise ZeroDivisionError
    assert hook_count(net) == 0
    assert all(not parameter._post_accumulate_grad_hooks for parameter in net.parameters())
    recorder.step(loss=1.0)  # a loop that skips the batch goes on
    train(Loop(), net, optimizer_of(net), range(2, 4), recorder)
    run = opened(recorder)
    assert sorted({step for _, _, step in run.keys}) == [2, 3]
    assert run.steps["step"].tolist() == [1, 2, 3]


def test_gradients_that_are_gone_are_missed(make):
    net = training_loop.model(Loop())
    recorder = make(net, ["param.transformer.h.0.mlp.c_fc.weight.clipped"], every=1)
    with recorder.batch(ids=names(1, 0)):
        net(**tokens(1, 0)).loss.backward()
    net.zero_grad()
    with pytest.raises(SiteNotFoundError, match=r"before optimizer\.zero_grad"):
        recorder.step()
    unreached = make(net, ["param.transformer.h.0.mlp.c_fc.weight.grad"], every=1)
    with pytest.raises(SiteNotFoundError, match="no backward of this step"):
        unreached.step()


@pytest.mark.parametrize(
    ("site", "error"),
    [
        ("param.nothing.grad", SiteNotFoundError),
        ("param.transformer.h.0.mlp.c_fc.weight.slope", SiteNotFoundError),
        ("param.transformer.h.0.mlp.c_fc.weight", SiteNotFoundError),
    ],
)
def test_parameters_there_are_not_are_refused(make, site, error):
    with pytest.raises(error, match=r"closest|names no port"):
        make(training_loop.model(Loop()), [site], every=1)


@pytest.mark.parametrize(
    "options", [{"reduce": "mean"}, {"positions": [0]}, {"quantize": "int8"}, {"width": 0, "reduce": "random"}]
)
def test_options_of_activations_are_not_for_parameters(options):
    with pytest.raises(ValueError, match=r"parameters|reduce is one of|width="):
        Site("param.**.grad", **options)


def test_parameters_need_steps(make):
    with pytest.raises(ValueError, match="give every="):
        make(training_loop.model(Loop()), ["param.**.grad"])
    recorder = make(nn.Linear(2, 3), ":out")
    with pytest.raises(ValueError, match="every=1 for all"):
        recorder.step()


def test_a_probe_set_leaves_modes_and_random_numbers_alone(make, opened):
    net = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.BatchNorm1d(5))
    net[2].eval()
    recorder = make(net, "0", every=1)
    statistics, probe = net[2].running_mean.clone(), ProbeSet([{"input": torch.randn(2, 3), "id": [1, 2]}])
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    assert probe.record(recorder)
    assert torch.equal(torch.rand(4), wanted)
    assert [module.training for module in net] == [True, True, False]
    assert net.training
    assert torch.equal(net[2].running_mean, statistics)
    assert opened(recorder).keys == [(1, "probe", 0), (2, "probe", 0)]
    with pytest.raises(ValueError, match="again and again"):
        ProbeSet(iter([]))


def test_scalars_go_to_a_tracker(make):
    """Means over the batches of a step, against plain torch."""
    said: list[tuple[int, dict[str, float]]] = []
    net = nn.Linear(3, 2)
    recorder = make(net, [":out"], every=2, log=lambda scalars, step: said.append((step, scalars)))
    batches = [torch.randn(2, 3, generator=torch.Generator().manual_seed(n)) for n in range(6)]
    for step in range(3):
        for micro in range(2):
            with torch.no_grad(), recorder.batch(ids=[f"{step}{micro}{row}" for row in range(2)]):
                net(batches[2 * step + micro])
        recorder.step()
    assert [step for step, _ in said] == [1, 3]
    with torch.no_grad():
        outputs = [net(batch) for batch in batches[:2]]
    scalars = said[0][1]
    assert scalars["tensortape/:out/norm"] == pytest.approx(float(sum(out.norm(dim=1).mean() for out in outputs) / 2), rel=1e-5)
    assert scalars["tensortape/:out/mean"] == pytest.approx(float(sum(out.mean() for out in outputs) / 2), rel=1e-4)
    assert all(isinstance(value, float) for value in scalars.values())


def test_values_of_steps_may_be_tensors_numbers_and_text(make, opened):
    recorder = make(nn.Linear(2, 3), ":out", every=5)
    weight = torch.tensor([1.0, 2.0])
    for step in range(1, 71):
        recorder.step(
            loss=torch.tensor(1 / step, dtype=torch.bfloat16), tokens=step, note="warm" if step < 9 else "cold", weight=weight
        )
        weight += 1
    found = opened(recorder)
    assert found.steps["loss"].tolist() == [float(torch.tensor(1 / step, dtype=torch.bfloat16)) for step in range(1, 71)]
    assert found.steps["tokens"].tolist() == list(range(1, 71))
    assert found.steps["note"].tolist() == ["warm"] * 8 + ["cold"] * 62
    np.testing.assert_array_equal(found["step/weight"].rows(), np.arange(70)[:, None] + np.array([1.0, 2.0]))


def test_a_text_that_comes_twice_in_a_step_is_recorded_once(make, opened):
    """In a batch, and in another of the same step; at the next step it is another example."""
    net = training_loop.model(Loop())
    recorder, batch = make(net, ["resid_post[1]"], every=1), tokens(1, 0)
    batch["input_ids"][2] = batch["input_ids"][0]
    for _ in range(2):
        for _ in range(2):
            with recorder.batch(ids="content"):
                net(**batch)
        recorder.step()
    run = opened(recorder)
    assert [step for _, _, step in run.keys] == [1, 1, 2, 2]
    assert len(set(run.ids)) == 2
    assert run.verify().ok


def test_a_loop_that_fails_keeps_its_steps(tmp_path):
    """Nobody closes the recorder: what steps were given is written at exit."""
    program = """
        import sys, torch
        from tensortape.instrument import Recorder
        recorder = Recorder(torch.nn.Linear(2, 3), sites=":out", to=sys.argv[1], every=[100])
        for step in range(7):
            recorder.step(loss=float(step))
        raise SystemExit(3)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "run.zarr")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (3, "")
    assert open_run(tmp_path / "run.zarr").steps["loss"].tolist() == list(range(7))


@pytest.mark.parametrize("every", ["10", 2.5, True])
def test_what_every_is_not(make, every):
    with pytest.raises(ValueError, match=r"every= is a number|numbers from 1"):
        make(nn.Linear(2, 3), ":out", every=every)


@pytest.mark.parametrize("state", [None, {}, {"step": -1}, {"step": "3"}])
def test_states_that_are_none(make, state):
    with pytest.raises(ValueError, match="what state_dict gave"):
        make(nn.Linear(2, 3), ":out", every=1).load_state_dict(state)


def test_steps_say_one_kind_of_thing(make, opened):
    recorder = make(nn.Linear(2, 3), ":out", every=100)
    with pytest.raises(ValueError, match="one number"):
        recorder.step(loss=torch.ones(3))
    recorder.step(loss=torch.ones(1), score=2.0)
    recorder.step(loss=1.0, score="none", extra=1)
    with pytest.raises(SchemaError, match="of one kind at all steps"):
        recorder.commit()
    assert opened(recorder).steps["loss"].tolist() == [1.0]


def test_a_loop_in_the_wrong_order_is_told_so(make, caplog):
    """Once for each mistake, against a loop without any."""
    net = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def batch(recorder: Recorder, number: int) -> None:
        with recorder.batch(ids=[number]):
            net(torch.ones(1, 3)).sum().backward()

    right = make(net, [":out", "param.weight.update"], every=1)
    probe = ProbeSet([{"input": torch.ones(1, 3), "id": [0]}])
    for number in range(3):
        probe.record(right)
        batch(right, number)
        optimizer.step()
        right.step()
    assert not caplog.records
    early, between, never, unseen = (make(net, [":out", "param.weight.update"], every=1) for _ in range(4))
    for number in range(3):
        batch(early, number)
        early.step()
        optimizer.step()
        batch(between, number)
        optimizer.step()
        probe.record(between)
        between.step()
        batch(never, number)
        optimizer.step()
    for _ in range(3):
        with suppress(SiteNotFoundError):
            unseen.step()
    said = [record.getMessage() for record in caplog.records]
    for text in ("not before", "only then", "all batches are recorded as step 1", "no `with recorder.batch"):
        assert sum(text in one for one in said) >= 1
    assert len(said) < 9


def test_resuming_needs_a_checkpoint(tmp_path):
    net = nn.Linear(2, 3)
    with Recorder(net, sites=":out", to=tmp_path / "run.zarr", every=2) as recorder:
        for _ in range(5):
            recorder.step(loss=1.0)
        assert recorder.state_dict() == {"step": 5}
    with Recorder(net, sites=":out", to=tmp_path / "run.zarr", every=2, mode="resume") as recorder:
        for _ in range(2):
            with pytest.raises(KeyRepeatedError, match=r"steps up to 5.*call recorder\.load_state_dict"), recorder.batch(ids=[1]):
                pass
            with pytest.raises(KeyRepeatedError, match="mode='overwrite'"):
                recorder.step()
    with Recorder(net, sites=":out", to=tmp_path / "run.zarr", every=2, mode="resume") as recorder:
        recorder.load_state_dict({"step": 3})
        assert (recorder.steps, recorder.is_due) == (3, False)
        recorder.step(loss=3.0)
    assert open_run(tmp_path / "run.zarr").steps["loss"].tolist() == [1, 1, 1, 3]


def uninterrupted(folder: Path, last: int) -> Run:
    """The same training without a kill."""
    loop = Loop(clip=0.5)
    net = training_loop.model(loop)
    with Recorder(net, sites=SITES, to=folder / "whole.zarr", every=loop.every) as recorder:
        train(loop, net, optimizer_of(net), range(1, last + 1), recorder, probes())
    return open_run(folder / "whole.zarr")


def test_killed_and_resumed_trainings_have_every_step_once(tmp_path: Path):
    """A real process, killed at random steps and resumed from its checkpoints, against one that was left in peace."""
    draw, last, save_every = random.Random(5), 23, 4
    where: Callable[[], int] = lambda: draw.randint(2, last)  # noqa: E731
    for die_before in [*(where() for _ in range(6)), 0]:
        command = [sys.executable, training_loop.__file__, str(tmp_path), str(die_before), str(last), str(save_every)]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        if (tmp_path / "run.zarr").exists() and done.returncode:
            seen = open_run(tmp_path / "run.zarr")
            assert seen.steps.empty or seen.steps["step"].is_unique
    run, whole = open_run(tmp_path / "run.zarr"), uninterrupted(tmp_path, last)
    assert run.steps["step"].tolist() == list(range(1, last + 1))
    assert len(run.parts) > len(whole.parts), "there was something to rewind"
    assert run.digest() == whole.digest()
    for name in whole.tables["step"]:
        np.testing.assert_array_equal(
            run.steps[name] if name in run.steps else _by_step(run, name),
            whole.steps[name] if name in whole.steps else _by_step(whole, name),
        )
    assert run.verify().ok


def _by_step(run: Run, name: str) -> np.ndarray:
    """A column of the step table in the order of steps, where it has any."""
    column, steps = run.tables["step"][name], run.tables["step"]["step"].rows()
    order = [number for number in np.argsort(steps) if column.present[number]]
    return np.stack([column[int(number)] for number in order])
