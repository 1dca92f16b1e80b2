"""The Trainer's callback: what is recorded, that the training does not notice, and what a resumed training leaves in the run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trainer_runs
from tiny_models import hook_count
from torch import nn
from torch.utils.data import IterableDataset
from trainer_runs import BATCH, Watch, batch_of, model, probes, recording, resumable, rows, trainer
from transformers import TrainerCallback, TrainingArguments, default_data_collator

from tensortape.instrument import Schedule
from tensortape.instrument.errors import BatchError, UnsupportedModelError
from tensortape.stores import Run, open_run
from tensortape.stores.errors import RunExistsError

KINDS: dict[str, dict[str, Any]] = {
    "accumulation": {},
    "one micro-batch": {"gradient_accumulation_steps": 1},
    "checkpointing": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    "bf16": {"bf16": True},
    "everything": {
        "bf16": True,
        "gradient_accumulation_steps": 3,
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
    },
}
STEPS = 9
BEST = {"save_strategy": "best", "eval_strategy": "steps", "metric_for_best_model": "loss", "greater_is_better": True}


class Collated:
    """A collator that remembers the ids of each batch."""

    def __init__(self) -> None:
        self.ids: list[list[int]] = []

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        self.ids.append([row["id"] for row in features])
        return default_data_collator(features)


def weights_of(net: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in net.parameters()]


def same(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def without_speed(logged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in one.items() if not name.endswith(("_runtime", "_per_second"))} for one in logged]


def kept(values: torch.Tensor, mask: torch.Tensor) -> list[np.ndarray]:
    """[T_i, *feature] of each row."""
    return [row[real.bool()].float().numpy() for row, real in zip(values, mask, strict=True)]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_training_does_not_notice_being_recorded(tmp_path: Path, kind: dict[str, Any]) -> None:
    """Losses, evaluations, gradients and weights, bit for bit, with dropout: no random number is drawn differently."""
    alone, watched, collated = Watch(), Watch(), Collated()
    asked = {**kind, "eval_strategy": "steps", "eval_steps": 3}
    bare = trainer(tmp_path / "bare", [alone], **asked)
    bare.train()
    recorded = trainer(tmp_path, [recording(tmp_path), watched], **asked)
    recorded.data_collator = collated
    recorded.train()
    assert without_speed(alone.logged) == without_speed(watched.logged)
    assert len(alone.gradients) == len(watched.gradients) > 1
    assert all(map(same, alone.gradients, watched.gradients))
    assert same(weights_of(bare.model), weights_of(recorded.model))
    assert hook_count(recorded.model) == hook_count(bare.model)  # checkpointing has one of its own
    check_run(open_run(tmp_path / "run.zarr"), watched, collated.ids, kind.get("gradient_accumulation_steps", 2))


def check_run(run: Run, watched: Watch, batches: list[list[int]], micro: int) -> None:
    """Every step once, with the loss that the Trainer says; examples of the steps that are due, and the probe set's."""
    logged = {one["step"]: one for one in watched.logged if "loss" in one}
    assert run.steps["step"].tolist() == list(logged)
    assert run.steps["loss"].tolist() == run.steps["log.loss"].tolist() == [one["loss"] for one in logged.values()]
    assert run.steps["lr"].tolist() == [one["learning_rate"] for one in logged.values()]
    assert run.steps["log.grad_norm"].tolist() == [one["grad_norm"] for one in logged.values()]
    evaluated = {one["step"]: one["eval_loss"] for one in watched.logged if "eval_loss" in one}
    assert run.steps.set_index("step")["log.eval_loss"].dropna().to_dict() == evaluated
    assert {name for name in run.steps if name.startswith("log.")} == {
        f"log.{name}" for name in ("loss", "grad_norm", "learning_rate", "eval_loss")
    }
    in_order = [batch for batch in batches if batch[0] < 10_000]  # without those of the evaluation
    per_epoch = -(-trainer_runs.EXAMPLES // BATCH)
    steps = [epoch[at : at + micro] for epoch in np.split(np.arange(len(in_order)), 3) for at in range(0, per_epoch, micro)]
    due = range(1, len(steps) + 1, 2)
    trained = [(id_, "train", step) for step in due for number in steps[step - 1] for id_ in in_order[number]]
    probed = [(id_, "probe", step) for step in {*(step - 1 for step in due), len(steps)} for id_ in (70_100, 70_101)]
    assert sorted(run.keys) == sorted(trained + probed)
    topics = {row["id"]: row["topic"] for row in rows()}
    topic = run.tables["example"]["topic"]
    assert all(topic[number] == topics[id_] for number, (id_, phase, _) in enumerate(run.keys) if phase == "train")
    assert run.verify().ok


class PlainHooks(TrainerCallback):
    """What plain hooks see of the second block's output, and of its gradient; and gradients before they are clipped."""

    def __init__(self) -> None:
        self.states: dict[int, list[torch.Tensor]] = {}
        self.gradients: dict[int, list[torch.Tensor]] = {}
        self.inputs: dict[int, list[torch.Tensor]] = {}
        self.raw: dict[int, torch.Tensor] = {}
        self.clipped: dict[int, torch.Tensor] = {}
        self.step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:
        weight = model.transformer.h[1].mlp.c_fc.weight
        weight.register_post_accumulate_grad_hook(lambda weight: self.raw.update({self.step: weight.grad.clone()}))
        model.transformer.h[1].register_forward_hook(self._seen)
        model.register_forward_pre_hook(self._called, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.step = state.global_step + 1

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:
        self.clipped[self.step] = model.transformer.h[1].mlp.c_fc.weight.grad.clone()

    def _called(self, module: Any, args: Any, kwargs: Any) -> None:
        self.inputs.setdefault(self.step, []).append(kwargs["input_ids"])

    def _seen(self, module: Any, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        self.states.setdefault(self.step, []).append(states.detach().clone())
        states.register_hook(lambda gradient: self.gradients.setdefault(self.step, []).append(gradient.clone()))


def test_what_is_recorded_is_what_plain_hooks_see(tmp_path: Path) -> None:
    """Of a training of its own: states and gradients of each due step's examples, and a parameter's before and after clipping."""
    plain = PlainHooks()
    bare = trainer(tmp_path / "bare", [plain])
    bare.train()
    sites = ["resid_post[1]", "resid_post[1]:out.grad"]
    weight = "param.transformer.h.1.mlp.c_fc.weight"
    trainer(tmp_path, [recording(tmp_path, sites=[*sites, f"{weight}.grad", f"{weight}.clipped"], probe=None)]).train()
    run, masks = open_run(tmp_path / "run.zarr"), {tuple(row["input_ids"].tolist()): row["attention_mask"] for row in rows()}
    states, gradients = run["transformer.h.1:out"], run["transformer.h.1:out.grad@loss"]
    for step in range(1, STEPS + 1, 2):
        found = run.where(step=step)
        real = [masks[tuple(row)] for batch in plain.inputs[step] for row in batch.tolist()]
        seen = [value for values, mask in cut(plain.states[step], real) for value in kept(values, mask)]
        graded = [value for values, mask in cut(plain.gradients[step], real) for value in kept(values, mask)]
        assert len(found) == len(seen) == len(graded) > BATCH
        for number, expected, gradient in zip(found, seen, graded, strict=True):
            np.testing.assert_array_equal(states[int(number)], expected)
            np.testing.assert_array_equal(gradients[int(number)], gradient)
    for kind, expected in (("grad", plain.raw), ("clipped", plain.clipped)):
        values, steps = run.tables["step"][f"{weight}.{kind}"], run.tables["step"]["step"].rows()
        found = {int(steps[number]): values[int(number)] for number in np.flatnonzero(values.present)}
        assert sorted(found) == list(range(1, STEPS + 1, 2))
        for step, value in found.items():
            np.testing.assert_array_equal(value, expected[step].numpy())
    assert not torch.equal(plain.raw[1], plain.clipped[1])


def cut(batches: list[torch.Tensor], masks: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each batch with the masks of its rows."""
    bounds = np.cumsum([0, *map(len, batches)])
    return [(batch, torch.stack(masks[start:end])) for batch, start, end in zip(batches, bounds[:-1], bounds[1:], strict=True)]


def test_a_target_may_be_declared(tmp_path: Path) -> None:
    """With the Trainer's number of tokens, gradients are those of each example's own summed loss."""
    declared: dict[str, Any] = {"target": lambda call: {"reduction": "sum", "factor": call["num_items_in_batch"]}}
    quiet = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    callback = recording(tmp_path, sites="resid_post[1]:out.grad", probe=None, **declared)
    trainer(tmp_path, [callback], model(**quiet), max_steps=1).train()
    run, net, given = open_run(tmp_path / "run.zarr"), model(**quiet), {row["id"]: row for row in rows()}
    column = run["transformer.h.1:out.grad@loss"]
    for number, (id_, _, _) in enumerate(run.keys):
        one, seen = batch_of([given[id_]]), []
        handle = net.transformer.h[1].register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        logits = net(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).logits
        loss = nn.functional.cross_entropy(logits[0, :-1], one["labels"][0, 1:], ignore_index=-100, reduction="sum")
        handle.remove()
        states = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        (gradient,) = torch.autograd.grad(loss, states)
        np.testing.assert_allclose(column[number], kept(gradient, one["attention_mask"])[0], rtol=2e-4, atol=1e-6)


def test_a_scaler_leaves_no_trace_in_gradients(tmp_path: Path) -> None:
    """As with fp16 on a GPU: the loss is scaled for the backward, by a power of two."""
    runs = []
    for name, scaler in (("plain", None), ("scaled", torch.amp.GradScaler("cpu", init_scale=1024.0))):
        callback = recording(tmp_path / name, sites=["resid_post:out.grad", "param.**.c_fc.weight.grad"], probe=None)
        found = trainer(tmp_path / name, [callback], max_steps=1, max_grad_norm=0.0)
        found.accelerator.scaler = scaler
        found.train()
        runs.append(open_run(tmp_path / name / "run.zarr"))
    plain, scaled = runs
    for column in plain.sites:
        np.testing.assert_array_equal(column.rows(), scaled[column.name].rows())
    gradient = "step/param.transformer.h.0.mlp.c_fc.weight.grad"
    np.testing.assert_array_equal(plain[gradient].rows(), scaled[gradient].rows())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_a_compiled_training(tmp_path: Path) -> None:
    """The hooks are compiled in from the first step on, whether that is recorded or not."""
    asked = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 3}
    bare = trainer(tmp_path / "bare", [], model(n_layer=1), max_steps=3)
    bare.train()
    callback = recording(tmp_path, sites="resid_post", every=[2], probe=None)
    recorded = trainer(tmp_path, [callback], model(n_layer=1), **asked)
    recorded.train()
    torch.compiler.reset()
    assert same(weights_of(bare.model), weights_of(recorded.model))
    run = open_run(tmp_path / "run.zarr")
    assert run.steps["step"].tolist() == [1, 2, 3]
    assert {step for _, _, step in run.keys} == {2}
    assert run["transformer.h.0:out"].shape[1:] == (model().config.n_embd,)


# --- resuming ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of a training that nobody killed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    resumable(folder, [recording(folder)])
    return open_run(folder / "run.zarr")


def killed(folder: Path, step: int, event: str) -> int:
    """Train in a process that is killed at an event; its end."""
    program = Path(trainer_runs.__file__)
    environment = {**os.environ, "PYTHONPATH": str(program.parent)}
    done = subprocess.run([sys.executable, program, folder, str(step), event], env=environment, capture_output=True, timeout=300)
    return done.returncode


def test_a_killed_training_goes_on_from_its_checkpoint(tmp_path: Path, uninterrupted: Run) -> None:
    """Killed at random, then around a checkpoint; every step is there once, with the values of the trajectory that counts."""
    draw = random.Random()
    anywhere = draw.randrange(1, 4), draw.choice(["on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"])
    saving = draw.choice([4, 8]), draw.choice(["on_evaluate", "on_save"])
    assert [killed(tmp_path, *when) for when in (anywhere, saving)] == [-signal.SIGKILL] * 2, (anywhere, saving)
    resumable(tmp_path, [recording(tmp_path, mode="resume")])
    assert_same_runs(open_run(tmp_path / "run.zarr"), uninterrupted)


def assert_same_runs(found: Run, expected: Run) -> None:
    assert sorted(found.keys) == sorted(expected.keys)
    assert sorted(found.steps) == sorted(expected.steps)
    for name in expected.steps:
        np.testing.assert_array_equal(found.steps[name], expected.steps[name])
    where = {key: number for number, key in enumerate(found.keys)}
    for column in expected.sites:
        for number, key in enumerate(expected.keys):
            if column.present[number]:
                np.testing.assert_array_equal(found[column.name][where[key]], column[number])
            else:
                assert not found[column.name].present[where[key]]
    assert found.verify().ok


class Seen(TrainerCallback):
    """What readers of a run find at an event."""

    def __init__(self, path: Path, event: str) -> None:
        self._path, self.found = path, []
        setattr(self, event, self._look)

    def _look(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        run = open_run(self._path)
        self.found.append((state.global_step, run.last_step, float(run.steps["log.loss"].iloc[-1])))


@pytest.mark.parametrize(
    "when",
    [
        {"save_strategy": "steps", "save_steps": 2},
        {"save_strategy": "epoch", "eval_strategy": "epoch", "logging_strategy": "epoch"},
        {**BEST, "eval_steps": 2},
    ],
    ids=["steps", "epoch", "best"],
)
def test_a_checkpoint_finds_every_step_committed(tmp_path: Path, when: dict[str, Any]) -> None:
    """On the disk, with what was logged of the step, before on_save."""
    seen = Seen(tmp_path / "run.zarr", "on_save")
    trainer(tmp_path, [recording(tmp_path, sites="resid_post[0]", commit_seconds=1e6), seen], **when).train()
    assert len(seen.found) > 1
    assert all(done == last and not np.isnan(logged) for done, last, logged in seen.found)


def test_epochs_of_a_schedule_begin_where_the_data_do(tmp_path: Path) -> None:
    """A training that goes on in the middle of an epoch begins none."""
    for to in (5, 9):
        callback = recording(tmp_path, sites="resid_post[0]", every=Schedule(epochs=1), probe=None)
        found = trainer(tmp_path, [callback, StopAt(to)], save_strategy="steps", save_steps=5)
        found.train(resume_from_checkpoint=to > 5)
    assert sorted({step for _, _, step in open_run(tmp_path / "run.zarr").keys}) == [1, 4, 7]


class StopAt(TrainerCallback):
    """Asks the Trainer to stop after a step, or before the next micro-batch."""

    def __init__(self, step: int, event: str = "on_step_end") -> None:
        self._step = step
        setattr(self, event, self._stop)

    def _stop(self, args: Any, state: Any, control: Any, **given: Any) -> Any:
        control.should_training_stop = control.should_training_stop or state.global_step >= self._step
        return control


# --- the ends of a training ----------------------------------------------------------------------------------------------------


def test_the_last_probe_is_of_the_last_step(tmp_path: Path) -> None:
    """And not of the best checkpoint, which the Trainer loads before on_train_end."""
    snapshot = Snapshot()
    callback = recording(tmp_path, sites="resid_post[1]", probe=probes())
    found = trainer(tmp_path, [callback, snapshot], load_best_model_at_end=True, eval_steps=4, **BEST)
    found.train()
    assert found.state.best_global_step < STEPS
    net = model().eval()
    net.load_state_dict(snapshot.weights)
    fixed = batch_of(rows(2, seed=7))
    kept_states: list[torch.Tensor] = []
    net.transformer.h[1].register_forward_hook(
        lambda module, args, output: kept_states.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        net(**fixed)
    run = open_run(tmp_path / "run.zarr")
    for number, expected in zip(run.where(step=STEPS, phase="probe"), kept(kept_states[0], fixed["attention_mask"]), strict=True):
        np.testing.assert_array_equal(run["transformer.h.1:out"][int(number)], expected)


class Snapshot(TrainerCallback):
    """The weights after the last step that was taken."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:
        self.weights = {name: value.clone() for name, value in model.state_dict().items()}


def test_a_step_that_is_given_up_half_way(tmp_path: Path) -> None:
    """Stopped after a micro-batch: that is recorded, the next one is not waited for."""
    found = trainer(tmp_path, [recording(tmp_path, sites="resid_post[0]"), StopAt(2, "on_substep_end")])
    hooks = hook_count(found.model)
    found.train()
    run = open_run(tmp_path / "run.zarr")
    assert run.steps["step"].tolist() == [1, 2]
    assert [len(run.where(step=step, phase="train")) for step in (1, 3)] == [2 * BATCH, BATCH]
    assert sorted({step for _, phase, step in run.keys if phase == "probe"}) == [0, 2]
    assert hook_count(found.model) == hooks


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Rows of unknown number: five batches, which two micro-batches do not divide."""

    def __iter__(self) -> Any:
        yield from rows(5 * BATCH)


def test_a_stream_that_ends_within_a_step(tmp_path: Path) -> None:
    """The Trainer adds the odd micro-batch to the first step of the next epoch."""
    found = trainer(tmp_path, [recording(tmp_path, sites="resid_post[0]", every=1, probe=None)], max_steps=4)
    found.train_dataset = Stream()
    found.train()
    run = open_run(tmp_path / "run.zarr")
    assert run.steps["step"].tolist() == [1, 2, 3, 4]
    assert [len(run.where(step=step)) for step in (1, 2, 3, 4)] == [2 * BATCH, 2 * BATCH, 3 * BATCH, 2 * BATCH]


class Fails(TrainerCallback):
    """Makes forward, backward or the optimizer fail in the second micro-batch of a step that is recorded."""

    def __init__(self, where: str) -> None:
        self._where, self._calls = where, 0
        self.handle: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **given: Any) -> None:
        block = model.transformer.h[1]
        if self._where == "forward":
            self.handle = block.register_forward_hook(self._fail)
        elif self._where == "backward":
            self.handle = block.register_full_backward_hook(self._fail)
        else:
            self.handle = optimizer.optimizer.register_step_pre_hook(self._fail)

    def _fail(self, module: nn.Module, *given: Any) -> None:
        self._calls += getattr(module, "training", True)  # without the forwards of the probe set
        if self._calls == (3 if self._where == "optimizer" else 6):  # in step 3
            raise RuntimeError(f"{self._where} fails")


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_a_training_that_fails(tmp_path: Path, where: str) -> None:
    """No hook stays, nothing of the batch that failed is recorded, and all that was done is committed."""
    fails = Fails(where)
    with recording(tmp_path, sites=trainer_runs.SITES) as callback:
        found = trainer(tmp_path, [callback, fails])
        hooks = hook_count(found.model)
        with pytest.raises(RuntimeError, match=f"{where} fails"):
            found.train()
        assert hook_count(found.model) > hooks
        callback.close()
        fails.handle.remove()
        assert hook_count(found.model) == hooks
    run = open_run(tmp_path / "run.zarr")
    assert run.verify().ok
    assert run.steps["step"].tolist() == [1, 2]
    assert len(run.where(step=3, phase="train")) == (5 if where == "optimizer" else BATCH)


def test_a_failed_training_starts_again(tmp_path: Path) -> None:
    """With the same callback, from the start: in the same run, where only the second trajectory counts."""
    callback, fails = recording(tmp_path), Fails("backward")
    found = trainer(tmp_path, [callback, fails])
    hooks = hook_count(found.model)
    with pytest.raises(RuntimeError, match="backward fails"):
        found.train()
    fails.handle.remove()
    found.remove_callback(fails)
    found.train()
    assert hook_count(found.model) == hooks
    run = open_run(tmp_path / "run.zarr")
    assert run.steps["step"].tolist() == list(range(1, STEPS + 1))
    losses = [one["loss"] for one in found.state.log_history if "loss" in one]
    assert run.steps["loss"].tolist() == losses
    assert run.verify().ok


def test_a_failed_process_keeps_what_was_done(tmp_path: Path) -> None:
    """Nobody closes the callback: it is done when the process ends, hooks and step rows included."""
    program = (
        "import sys; from pathlib import Path; from contextlib import suppress; import trainer_runs as t\n"
        "class Fails(t.TrainerCallback):\n"
        "    def on_pre_optimizer_step(self, args, state, control, **given):\n"
        "        if state.global_step == 4: raise RuntimeError('out of memory')\n"
        "t.trainer(Path(sys.argv[1]), [t.recording(Path(sys.argv[1])), Fails()]).train()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(trainer_runs.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", program, tmp_path], env=environment, capture_output=True, text=True, timeout=300)
    assert "RuntimeError: out of memory" in done.stderr
    run = open_run(tmp_path / "run.zarr")
    assert run.steps["step"].tolist() == [1, 2, 3, 4]
    assert all(part.closed for part in run.parts)


# --- trackers ------------------------------------------------------------------------------------------------------------------


def test_statistics_go_where_the_trainer_logs(tmp_path: Path) -> None:
    """To every callback that listens, with the step they are of, and once."""
    before, after = Watch(), Watch()
    callback = recording(tmp_path, sites="resid_post[1]", log=lambda scalars, step: found.log({**scalars, "tensortape/of": step}))
    found = trainer(tmp_path, [before, callback, after])
    found.train()
    name = "tensortape/transformer.h.1:out/norm"
    for watch in (before, after):
        sent = [one for one in watch.logged if "tensortape/of" in one]
        assert all(one["step"] == one["tensortape/of"] for one in sent)
        assert [one["step"] for one in sent if name in one] == [1, 3, 5, 7, 9]
        probed = "tensortape/probe/transformer.h.1:out/norm"
        assert [one["step"] for one in sent if probed in one] == [0, 2, 4, 6, 8, 9]
        assert len([one for one in watch.logged if "loss" in one]) == STEPS
    assert [one["step"] for one in found.state.log_history if name in one] == [1, 3, 5, 7, 9]
    run = open_run(tmp_path / "run.zarr")
    states = [run["transformer.h.1:out"][int(number)] for number in run.where(step=3, phase="train")]
    norms = [np.linalg.norm(np.concatenate(half), axis=1).mean() for half in (states[:3], states[3:])]
    sent_at_3 = next(one[name] for one in after.logged if name in one and one["step"] == 3)
    np.testing.assert_allclose(sent_at_3, np.mean(norms), rtol=1e-5)
    assert not [column for column in run.steps if "tensortape" in column]


# --- mistakes ------------------------------------------------------------------------------------------------------------------


def expect(tmp_path: Path, error: type[Exception], match: str, *, callback: dict[str, Any], **asked: Any) -> None:
    """The training does not begin, nothing is on the disk and no hook on the model."""
    found = trainer(tmp_path, [recording(tmp_path, **callback)], **asked)
    hooks = hook_count(found.model)
    with pytest.raises(error, match=match):
        found.train()
    assert hook_count(found.model) == hooks
    assert not (tmp_path / "run.zarr").exists()


@pytest.mark.parametrize(("given", "column"), [({}, "id"), ({"ids": "content"}, "topic"), ({"labels": None}, "id")])
def test_a_column_that_the_trainer_removes(tmp_path: Path, given: dict[str, Any], column: str) -> None:
    match = f"removes the column '{column}'.*remove_unused_columns=False.*ids='content'"
    expect(tmp_path, ValueError, match, callback=given, remove_unused_columns=True)


def test_the_default_arguments_do_with_content(tmp_path: Path) -> None:
    """No column is needed, and none of the Trainer's settings changed."""
    callback = recording(tmp_path, sites="resid_post[0]", ids="content", labels=None, probe=None)
    trainer(tmp_path, [callback], remove_unused_columns=True).train()
    run, given = open_run(tmp_path / "run.zarr"), rows()
    tokens = {tuple(row["input_ids"][row["attention_mask"].bool()].tolist()) for row in given}
    assert {tuple(run["token/input_ids"][number].tolist()) for number in range(len(run))} <= tokens
    assert len({id_ for id_, _, _ in run.keys}) > BATCH


def test_a_column_that_the_model_takes_is_left_to_it(tmp_path: Path) -> None:
    """Labels of tokens are the model's own labels here, and the Trainer keeps them."""
    callback = recording(tmp_path, sites="resid_post[0]", ids="content", labels={"token/label": "labels"}, probe=None)
    trainer(tmp_path, [callback], remove_unused_columns=True, max_steps=1).train()
    run = open_run(tmp_path / "run.zarr")
    np.testing.assert_array_equal(run["token/label"].rows(), run["token/input_ids"].rows())


def test_data_parallel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda arguments: 2))
    expect(tmp_path, UnsupportedModelError, "torchrun", callback={})


def test_ids_that_the_collator_drops(tmp_path: Path) -> None:
    """Text does not come through transformers' collators."""
    found = trainer(tmp_path, [recording(tmp_path, probe=None)])
    found.train_dataset = [{**row, "id": str(row["id"])} for row in rows()]
    with pytest.raises(BatchError, match=r"without 'id', only with .*input_ids.*drops it"):
        found.train()


def test_ids_of_text(tmp_path: Path) -> None:
    """With a collator that keeps them."""

    def collate(features: list[dict[str, Any]]) -> dict[str, Any]:
        return {**batch_of(features), "id": [f"row {row['id']}" for row in features], "topic": [row["topic"] for row in features]}

    found = trainer(tmp_path, [recording(tmp_path, sites="resid_post[0]", probe=None)], max_steps=1)
    found.data_collator = collate
    found.train()
    assert all(id_.startswith("row 1") for id_ in open_run(tmp_path / "run.zarr").ids)


def test_a_run_that_is_there_is_not_touched(tmp_path: Path) -> None:
    """Unless the mode says so: resume takes its place, from the start."""
    small: dict[str, Any] = {"sites": "resid_post[0]", "probe": None}
    trainer(tmp_path, [recording(tmp_path, **small)]).train()
    with pytest.raises(RunExistsError):
        trainer(tmp_path, [recording(tmp_path, **small)]).train()
    trainer(tmp_path, [recording(tmp_path, mode="resume", **small)], max_steps=3).train()
    assert open_run(tmp_path / "run.zarr").steps["step"].tolist() == [1, 2, 3]
    trainer(tmp_path, [recording(tmp_path, mode="overwrite", **small)], max_steps=2).train()
    assert open_run(tmp_path / "run.zarr").steps["step"].tolist() == [1, 2]


def test_columns_of_an_evaluation_are_kept_from_the_model(tmp_path: Path) -> None:
    """A model that takes nothing it does not know is evaluated on the same columns, in the middle of a training."""
    net = model()
    forward = net.forward
    seen: list[tuple[str, ...]] = []

    def strict(input_ids: Any = None, attention_mask: Any = None, labels: Any = None, num_items_in_batch: Any = None) -> Any:
        seen.append(("train" if net.training else "eval",))
        return forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    net.forward = strict
    callback = recording(tmp_path, sites="resid_post[0]", probe=None)
    trainer(tmp_path, [callback], net, eval_strategy="steps", eval_steps=1, max_steps=2).train()
    assert ("eval",) in seen
    assert {phase for _, phase, _ in open_run(tmp_path / "run.zarr").keys} == {"train"}
