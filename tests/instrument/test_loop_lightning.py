"""RecorderCallback: what Lightning computes stays the same, and the run says what it was."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import lightning_training as small
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning_training import LENGTHS, SITES, Batches, Language, Saves, Whole, batch_of, probe_set, trainer
from tiny_models import hook_count, packed

from tensortape.instrument import Schedule
from tensortape.instrument.errors import BatchError, ForwardError, SiteNotFoundError
from tensortape.instrument.loops.lightning import RecorderCallback
from tensortape.stores import Run, open_run
from tensortape.stores.errors import BrokenWriterError, LostPartError, RunExistsError

pytestmark = [  # of Lightning itself
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]
Tensor = torch.Tensor
NORM = "param.transformer.h.0.attn.c_proj.weight.grad"


class Spy(pl.Callback):
    """Notes, with plain hooks, what happens in each batch and each step."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.gradients: list[list[Tensor]] = []
        self.clipped: list[list[Tensor]] = []
        self.rates: list[float] = []
        self.hooks: list[int] = []
        self.outputs: list[dict[int, Tensor]] = []
        self.output_gradients: list[dict[int, Tensor]] = []
        self._handles: list[Any] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.hooks.append(hooks_on(pl_module))
        self.outputs.append({})
        self.output_gradients.append({})
        for layer, block in enumerate(pl_module.model.transformer.h):
            self._handles.append(block.register_forward_hook(lambda m, a, out, layer=layer: self._note(layer, out)))

    def _note(self, layer: int, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if layer not in self.outputs[-1]:  # a checkpoint computes it once more
            self.outputs[-1][layer], gradients = tensor.detach().clone(), self.output_gradients[-1]
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: gradients.update({layer: gradient.clone()}))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.gradients.append(gradients_of(pl_module))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].clone())
        while len(self.clipped) < len(self.gradients):
            self.clipped.append(gradients_of(pl_module))
        while self._handles:
            self._handles.pop().remove()


def gradients_of(module: torch.nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]


def hooks_on(module: torch.nn.Module) -> int:
    """Hooks on modules and on parameters."""
    of_parameters = [getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in module.parameters()]
    return hook_count(module) + sum(len(hooks) for hooks in of_parameters if hooks)


def callback_at(to: Path, **options: Any) -> RecorderCallback:
    given = {"sites": SITES, "every": 2, "module": "model", "durability": "rename", **options}
    return RecorderCallback(to=to, **given)


def fitted(folder: Path, *callbacks: pl.Callback, module: pl.LightningModule | None = None, **options: Any) -> Any:
    """Train: two epochs of 7 batches, three to a step (the last step of an epoch has one); the module."""
    module = module or Language()
    torch.manual_seed(3)
    given = {"max_epochs": 2, "accumulate_grad_batches": 3, **options}
    trainer(folder, *callbacks, **given).fit(module, Batches(7), Batches(2, first=50))
    return module


def same(one: list[Any], other: list[Any]) -> bool:
    """Bit for bit."""
    pairs = zip(one, other, strict=True)
    return all(same(a, b) if isinstance(a, list) else torch.equal(a, b) for a, b in pairs)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "dropout": ({"dropout": 0.2}, {}),
    "clipped": ({}, {"gradient_clip_val": 0.05}),
    "bf16": ({"dropout": 0.2}, {"precision": "bf16-mixed"}),
    "checkpointing": ({"dropout": 0.2, "checkpoints": True}, {}),
    "validating": ({}, {"val_check_interval": 2, "num_sanity_val_steps": 1}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_is_the_same_to_the_bit(tmp_path: Path, variant: str) -> None:
    of_module, of_trainer = VARIANTS[variant]
    plain, watched = Spy(), Spy()
    before = fitted(tmp_path, plain, module=Language(**of_module), **of_trainer)
    callback = callback_at(tmp_path / "run.zarr", probe=probe_set())
    after = fitted(tmp_path, callback, watched, module=Language(**of_module), **of_trainer)
    assert len(plain.gradients) == 6
    assert same(plain.losses, watched.losses)
    assert same(plain.gradients, watched.gradients)
    assert same(plain.clipped, watched.clipped)
    assert same(list(before.parameters()), list(after.parameters()))
    assert_recorded(open_run(tmp_path / "run.zarr"), watched)


def assert_recorded(run: Run, spy: Spy) -> None:
    """Steps 1, 3 and 5 (of batches 0 to 2, 6, 10 to 12) hold what plain hooks saw, and every step has its row."""
    batches = {1: [0, 1, 2], 3: [6], 5: [10, 11, 12]}
    expected = [(f"b{number % 7}-{letter}", "train", step) for step in batches for number in batches[step] for letter in "abc"]
    assert [key for key in run.keys if key[1] == "train"] == expected
    mask = batch_of(0)["attention_mask"]
    for layer in range(small.LAYERS):
        seen = torch.cat([packed(spy.outputs[number][layer], mask) for step in batches for number in batches[step]])
        numbers = [number for number, key in enumerate(run.keys) if key[1] == "train"]
        assert torch.equal(rows_of(run, f"transformer.h.{layer}:out", numbers, seen.dtype), seen)
    assert_step_rows(run, spy)
    assert run.verify().ok


def assert_step_rows(run: Run, spy: Spy) -> None:
    steps = run.steps.set_index("step")
    ends = [0, 3, 6, 7, 10, 13, 14]
    losses = [torch.stack(spy.losses[first:last]).sum().item() for first, last in pairwise(ends)]
    assert steps.index.tolist() == [1, 2, 3, 4, 5, 6]
    assert steps["loss"].tolist() == losses
    assert steps["lr"].tolist() == spy.rates
    names = [name for name, _ in Language().model.named_parameters()]
    of_weight, of_bias = names.index("transformer.h.0.attn.c_proj.weight"), names.index("transformer.ln_f.bias")
    norms = [torch.linalg.vector_norm(spy.gradients[step - 1][of_weight]).item() for step in (1, 3, 5)]
    assert steps[f"{NORM}|norm"].dropna().tolist() == norms
    clipped = np.stack([spy.clipped[step - 1][of_bias].numpy() for step in (1, 3, 5)])
    np.testing.assert_array_equal(run["step/param.transformer.ln_f.bias.clipped"].rows(), clipped)


def rows_of(run: Run, site: str, numbers: list[int], dtype: torch.dtype) -> Tensor:
    """Rows of some examples; they are stored in this dtype."""
    assert str(run[site].dtype) == str(dtype).removeprefix("torch.")
    return torch.from_numpy(np.concatenate([run[site][number] for number in numbers]).astype(np.float32)).to(dtype)


def test_gradients_are_those_of_the_backward(tmp_path):
    spy = Spy()
    fitted(tmp_path, callback_at(tmp_path / "run.zarr"), spy)
    run = open_run(tmp_path / "run.zarr")
    seen = [packed(spy.output_gradients[number][0], batch_of(0)["attention_mask"]) for number in (0, 1, 2, 6, 10, 11, 12)]
    np.testing.assert_array_equal(run["transformer.h.0:out.grad@loss"].rows(), torch.cat(seen).numpy())


@pytest.mark.parametrize("scaled", [False, True])
def test_declared_gradients_are_those_of_each_example(tmp_path, scaled):
    """Undone: the mean over examples, the division by the batches of a step, and the scale of a GradScaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugins = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]} if scaled else {}
    callback = callback_at(tmp_path / "run.zarr", reduction="mean", every=100)
    fitted(tmp_path, callback, **plugins)
    module, rows, autocast = Language(), [], torch.autocast("cpu", torch.float16, enabled=scaled, cache_enabled=False)
    module.model.transformer.h[0].register_forward_hook(lambda m, a, out: outputs.append(out))
    for number in range(3):
        outputs: list[Tensor] = []
        with autocast:
            losses = module.losses(batch_of(number))
        rows.append(packed(torch.autograd.grad(losses.sum(), outputs[0])[0], batch_of(number)["attention_mask"]))
    found = open_run(tmp_path / "run.zarr")["transformer.h.0:out.grad@loss"]
    close = {"rtol": 2e-2, "atol": 1e-4} if scaled else {"rtol": 1e-4, "atol": 1e-7}
    np.testing.assert_allclose(found.rows().astype(np.float32), torch.cat(rows).float().numpy(), **close)


def test_scaled_parameter_gradients_are_recorded_without_the_scale(tmp_path):
    spy, scaler = Spy(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    callback = callback_at(tmp_path / "run.zarr", every=1, sites=[NORM, NORM.replace(".grad", ".clipped")])
    fitted(tmp_path, callback, spy, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    run, at = open_run(tmp_path / "run.zarr"), [name for name, _ in Language().model.named_parameters()].index(NORM[6:-5])
    unscaled = np.stack([gradients[at].numpy() for gradients in spy.gradients])
    np.testing.assert_array_equal(run[f"step/{NORM}"].rows(), unscaled)
    np.testing.assert_array_equal(run[f"step/{NORM.replace('.grad', '.clipped')}"].rows(), unscaled)


def test_hooks_are_there_in_due_steps_only(tmp_path):
    spy = Spy()
    module = fitted(tmp_path, callback_at(tmp_path / "run.zarr", sites=SITES[:3]), spy)
    due = [number in (0, 1, 2, 6, 10, 11, 12) for number in range(14)]
    assert [count > 0 for count in spy.hooks] == due
    assert hooks_on(module) == 0


def test_the_probe_set_is_recorded_before_due_steps_and_at_the_end(tmp_path):
    """With the weights of then, and in the precision of the trainer."""
    weights: dict[int, Any] = {}

    class Keeps(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            weights[trainer.global_step] = {name: value.clone() for name, value in pl_module.model.state_dict().items()}

    callback = callback_at(tmp_path / "run.zarr", sites="resid_post", probe=probe_set())
    module = fitted(tmp_path, callback, Keeps(), precision="bf16-mixed")
    weights[6] = {name: value.clone() for name, value in module.model.state_dict().items()}
    run, batch, seen = open_run(tmp_path / "run.zarr"), batch_of(101), []
    found = [key for key in run.keys if key[1] == "probe"]
    assert found == [(f"b{number}-{letter}", "probe", step) for step in (0, 2, 4, 6) for number in (100, 101) for letter in "abc"]
    module.model.transformer.h[1].register_forward_hook(lambda m, a, out: seen.append(out))
    for step in (0, 2, 4, 6):
        module.model.load_state_dict(weights[step])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            module.model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        expected = packed(seen[-1], batch["attention_mask"])
        numbers = [run.keys.index((f"b101-{letter}", "probe", step)) for letter in "abc"]
        assert torch.equal(rows_of(run, "transformer.h.1:out", numbers, expected.dtype), expected)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ("id", ["b0-a", "b0-b", "b0-c"]),
        (lambda batch: [f"x{number}" for number in batch["topic"].tolist()], ["x0", "x1", "x2"]),
        ("topic", [0, 1, 2]),
    ],
)
def test_ids_and_labels_are_of_the_batch(tmp_path, ids, expected):
    labels = {"example/topic": "topic", "token/odd": lambda batch: batch["input_ids"] % 2}
    fitted(tmp_path, callback_at(tmp_path / "run.zarr", sites="resid_post[0]", ids=ids, labels=labels, every=100))
    run = open_run(tmp_path / "run.zarr")
    assert run.ids[:3] == expected
    assert run["example/topic"].rows().tolist() == list(range(9))
    odd = packed(batch_of(1)["input_ids"] % 2, batch_of(1)["attention_mask"])
    assert run["token/odd"].rows()[sum(LENGTHS) : 2 * sum(LENGTHS)].tolist() == odd.tolist()


def test_content_ids_and_batches_that_are_tuples(tmp_path):
    class Tuples(Language):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step({"input_ids": batch[1], "attention_mask": batch[2]}, batch_idx)

    given = [tuple(batch_of(number)[key] for key in ("id", "input_ids", "attention_mask")) for number in range(3)]
    for name, ids in (("hashed", "content"), ("indexed", 0)):
        callback = callback_at(tmp_path / f"{name}.zarr", sites="resid_post", ids=ids)
        trainer(tmp_path, callback, max_epochs=1).fit(Tuples(), torch.utils.data.DataLoader(given, batch_size=None))
    indexed, hashed = open_run(tmp_path / "indexed.zarr"), open_run(tmp_path / "hashed.zarr")
    assert indexed.ids == [f"b{number}-{letter}" for number in (0, 2) for letter in "abc"]
    assert len(set(hashed.ids)) == 6
    np.testing.assert_array_equal(indexed["transformer.h.1:out"].rows(), hashed["transformer.h.1:out"].rows())


def test_the_lightning_module_itself(tmp_path):
    fitted(tmp_path, callback_at(tmp_path / "run.zarr", module=None, sites="model.transformer.h.*"), module=Whole())
    run = open_run(tmp_path / "run.zarr")
    assert run["model.transformer.h.1:out"][0].shape == (7, small.WIDTH)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"module": None}, ValueError, "no forward of its own.* module=: model"),
        ({"module": "modle"}, ValueError, "module='modle' is no module of Language, which has model"),
        ({"module": "model.lm_head.nothing"}, ValueError, "is no module of Language"),
        ({"sites": "resid_pots"}, SiteNotFoundError, "resid_post"),
        ({"ids": "uid"}, BatchError, "the batch has no 'uid'; it is a dict with id, topic, input_ids, attention_mask"),
        ({"ids": 7}, BatchError, "the batch has no 7"),
    ],
)
def test_mistakes_are_told_before_the_first_step(tmp_path, options, kind, text):
    spy = Spy()
    with pytest.raises(kind, match=text):
        fitted(tmp_path, callback_at(tmp_path / "run.zarr", **options), spy)
    assert spy.gradients == []
    assert not (tmp_path / "run.zarr").exists()


def test_a_module_that_training_step_does_not_call_is_an_error(tmp_path):
    class Elsewhere(Whole):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.losses(batch).mean()

    with pytest.raises(ForwardError, match="ran 0 times"):
        fitted(tmp_path, callback_at(tmp_path / "run.zarr", module=None, sites="model.lm_head"), module=Elsewhere())


class Manual(Language):
    """Two optimizers, the second one in every other batch; and a loss for each."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        one, other = self.optimizers()
        loss = self.losses(batch).mean()
        self.manual_backward(loss)
        for optimizer in (one, other)[: 1 + batch_idx % 2]:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    def configure_optimizers(self) -> Any:
        body, head = list(self.model.transformer.h.parameters()), list(self.model.transformer.ln_f.parameters())
        return [torch.optim.SGD(body, lr=0.25), torch.optim.SGD(head, lr=0.5)]


def test_a_step_of_manual_optimization_is_a_batch(tmp_path):
    callback, keeps = callback_at(tmp_path / "run.zarr", sites="resid_post", every=3), ModelCheckpoint(tmp_path)
    fitted(tmp_path, callback, keeps, module=Manual(), accumulate_grad_batches=1, enable_checkpointing=True, max_epochs=1)
    run = open_run(tmp_path / "run.zarr")
    assert run.ids == [f"b{number}-{letter}" for number in (0, 3, 6) for letter in "abc"]
    assert run.steps["step"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert run.steps["lr"].tolist() == [0.25] * 7
    going, again = trainer(tmp_path, callback_at(tmp_path / "run.zarr", sites="resid_post", every=3), max_epochs=2), Manual()
    going.fit(again, Batches(7), ckpt_path=keeps.best_model_path)
    assert going.global_step == 20, "what Lightning counts: optimizer steps"
    run = open_run(tmp_path / "run.zarr")
    assert run.steps["step"].tolist() == list(range(1, 15))
    assert [key[2] for key in run.keys[::3]] == [1, 4, 7, 10, 13]


def test_a_module_may_say_itself_what_it_records(tmp_path):
    """Two forwards of the model in a batch, each recorded, as generators and critics have."""

    class Twice(Manual):
        callback: RecorderCallback

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for phase in ("real", "fake"):
                with self.callback.recorder.batch(ids=batch["id"], phase=phase):
                    self.manual_backward(self.losses(batch).mean())
            self.optimizers()[0].step()
            self.optimizers()[0].zero_grad()

    module, callback = Twice(), callback_at(tmp_path / "run.zarr", sites="resid_post", ids=None)
    module.callback = callback
    fitted(tmp_path, callback, module=module, accumulate_grad_batches=1, max_epochs=1)
    run = open_run(tmp_path / "run.zarr")
    assert [key[1:] for key in run.keys[::3]] == [(phase, step) for step in (1, 3, 5, 7) for phase in ("real", "fake")]


class Numbers(Logger):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, dict[str, float]]] = []

    name = version = "numbers"

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.told.append((step, dict(metrics)))


def test_scalars_go_to_every_logger(tmp_path):
    loggers = [Numbers(), Numbers()]
    callback = callback_at(tmp_path / "run.zarr", sites="resid_post", probe=probe_set())
    fitted(tmp_path, callback, logger=loggers, log_every_n_steps=1)
    run = open_run(tmp_path / "run.zarr")
    for logger in loggers:
        assert [step for step, _ in logger.told] == [0, 1, 2, 3, 4, 5, 6]
        assert all(type(value) is float for _, scalars in logger.told for value in scalars.values())
    rows = np.concatenate([run["transformer.h.1:out"][number] for number in run.where(phase="train", step=3)])
    told = dict(loggers[0].told)[3]
    assert told["tensortape/transformer.h.1:out/norm"] == pytest.approx(np.linalg.norm(rows, axis=1).mean(), rel=1e-5)
    assert "tensortape/probe/transformer.h.1:out/norm" in dict(loggers[0].told)[2]


def test_a_tracker_of_ones_own_is_told_instead(tmp_path):
    logger, told = Numbers(), []
    callback = callback_at(tmp_path / "run.zarr", sites="resid_post", log=lambda scalars, step: told.append(step))
    fitted(tmp_path, callback, logger=logger, log_every_n_steps=1)
    assert (told, logger.told) == ([1, 3, 5], [])


@pytest.mark.parametrize(("every", "steps"), [(Schedule(epochs=1), [1, 4]), (Schedule(seconds=1e6), [1]), ([2, 3], [2, 3])])
def test_schedules(tmp_path, every, steps):
    fitted(tmp_path, callback_at(tmp_path / "run.zarr", sites="resid_post", every=every))
    assert sorted({key[2] for key in open_run(tmp_path / "run.zarr").keys}) == steps


def test_an_epoch_may_be_cut_short(tmp_path):
    """A module that says so has a batch begin that never runs."""

    class Short(Language):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 2 else None

    callback = callback_at(tmp_path / "run.zarr", every=1, sites=["resid_post", NORM])
    module = fitted(tmp_path, callback, module=Short(), accumulate_grad_batches=1)
    run = open_run(tmp_path / "run.zarr")
    assert [key[2] for key in run.keys[::3]] == run.steps["step"].tolist() == [1, 2, 3, 4]
    assert len(run[f"step/{NORM}"]) == 4
    assert hooks_on(module) == 0


class Fails(pl.Callback):
    """Raises at an event, the nth time."""

    def __init__(self, event: str, at: int, error: BaseException) -> None:
        def fail(*_: Any) -> None:
            self.left -= 1
            if not self.left:
                raise error

        self.left = at
        setattr(self, event, fail)


@pytest.mark.parametrize("event", ["on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end"])
@pytest.mark.parametrize("order", [1, -1])
def test_an_exception_leaves_no_hook_and_a_sound_run(tmp_path, event, order):
    """In the second batch of the third step, or at its end; whichever callback comes first."""
    at = 3 if event == "on_before_optimizer_step" else 8
    callback, fails = callback_at(tmp_path / "run.zarr", every=1), Fails(event, at, RuntimeError("spilt coffee"))
    module = Language()
    with pytest.raises(RuntimeError, match="spilt coffee"):
        fitted(tmp_path, *[callback, fails][::order], module=module)
    run = open_run(tmp_path / "run.zarr")
    assert hooks_on(module) == 0
    assert run.verify().ok
    assert run.steps["step"].tolist() == ([1, 2, 3] if at == 8 else [1, 2])
    assert all(len([key for key in run.keys if key[2] == step]) == 9 for step in (1, 2))
    assert len(run) % 3 == 0, "no half of a batch"
    fitted(tmp_path, callback_at(tmp_path / "other.zarr"), module=module)


def test_a_checkpoint_of_an_exception_goes_on_from_there(tmp_path):
    """Lightning saves it after the run is closed."""
    keeps = ModelCheckpoint(tmp_path, save_on_exception=True, every_n_train_steps=100)
    fails = Fails("on_before_backward", 5, RuntimeError("spilt coffee"))
    options = {"enable_checkpointing": True, "accumulate_grad_batches": 1}
    with pytest.raises(RuntimeError, match="spilt coffee"):
        fitted(tmp_path, callback_at(tmp_path / "run.zarr"), fails, keeps, **options)
    (path,) = tmp_path.glob("*.ckpt")
    trainer(tmp_path, callback_at(tmp_path / "run.zarr"), max_epochs=1).fit(Language(), Batches(7), ckpt_path=path)
    run = open_run(tmp_path / "run.zarr")
    assert run.steps["step"].tolist() == [1, 2, 3, 4, 5, 6], "Lightning goes on after the batch that failed"
    assert run.ids == [f"b{number}-{letter}" for number in (0, 2, 5) for letter in "abc"]


@pytest.mark.parametrize("on_error", ["raise", "drop"])
def test_a_run_that_is_lost(tmp_path, on_error, caplog):
    """Somebody moves the run's folder away while it is written."""

    class Moves(pl.Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            if not (tmp_path / "elsewhere.zarr").exists():
                callback.recorder.commit()  # nothing is being written now
                (tmp_path / "run.zarr").rename(tmp_path / "elsewhere.zarr")

    spy, module = Spy(), Language()
    callback = callback_at(tmp_path / "run.zarr", on_error=on_error, every=1, commit_bytes=1)
    if on_error == "drop":
        fitted(tmp_path, callback, Moves(), spy, module=module)
        assert len(spy.gradients) == 6
        assert callback.recorder.dropped > 0
        assert "goes on without it" in caplog.text
    else:
        with pytest.raises((LostPartError, BrokenWriterError), match="no longer the run"):
            fitted(tmp_path, callback, Moves(), module=module)
    assert hooks_on(module) == 0


def test_the_same_trainer_goes_on_with_its_run(tmp_path):
    callback, module = callback_at(tmp_path / "run.zarr"), Language()
    going = trainer(tmp_path, callback, max_epochs=1)
    going.fit(module, Batches(7))
    going.fit_loop.max_epochs = 2
    going.fit(module, Batches(7))
    assert open_run(tmp_path / "run.zarr").steps["step"].tolist() == list(range(1, 15))
    with pytest.raises(RunExistsError, match="overwrite"):
        trainer(tmp_path, callback, max_epochs=1).fit(Language(), Batches(7))
    assert len(open_run(tmp_path / "run.zarr").steps) == 14


def test_a_checkpoint_that_knows_of_no_run(tmp_path):
    """Recording begins later than the training; steps are counted from its beginning."""
    going = trainer(tmp_path, max_epochs=1)
    going.fit(Language(), Batches(7))
    going.save_checkpoint(tmp_path / "plain.ckpt")
    trainer(tmp_path, callback_at(tmp_path / "run.zarr"), max_epochs=2).fit(
        Language(), Batches(7), ckpt_path=tmp_path / "plain.ckpt"
    )
    run = open_run(tmp_path / "run.zarr")
    assert run.steps["step"].tolist() == list(range(8, 15))
    with pytest.raises(RunExistsError):
        trainer(tmp_path, callback_at(tmp_path / "run.zarr"), max_epochs=2).fit(
            Language(), Batches(7), ckpt_path=tmp_path / "plain.ckpt"
        )


@pytest.mark.slow
def test_ranks_record_into_one_run(tmp_path):
    """Two processes that gloo connects, and two more that go on from a checkpoint of theirs."""
    subprocess.run([sys.executable, small.__file__, tmp_path, "ranks"], check=True, capture_output=True, timeout=120)
    run = open_run(tmp_path / "run.zarr")
    assert run.verify().ok
    assert run.steps[["step", "rank"]].values.tolist() == [[step, rank] for step in range(1, 9) for rank in (0, 1)]
    of_ranks = run.steps.pivot(index="step", columns="rank", values=f"{NORM}|norm").dropna()
    assert of_ranks.index.tolist() == [1, 3, 5, 7]
    assert (of_ranks[0] == of_ranks[1]).all(), "gradients are averaged over the ranks"
    numbers = {step: [0, 1, 2, 3, 4, 5, 6][2 * ((step - 1) % 4) :][:2] for step in (1, 3, 5, 7)}
    expected = [(f"b{rank * 200 + n}-{x}", "train", s) for s in numbers for rank in (0, 1) for n in numbers[s] for x in "abc"]
    assert sorted(key for key in run.keys if key[1] == "train") == sorted(expected)
    assert {key[2] for key in run.keys if key[1] == "probe"} == {0, 2, 4, 6, 8}
    with pytest.raises(subprocess.CalledProcessError) as failed:
        subprocess.run([sys.executable, small.__file__, tmp_path, "whole"], check=True, capture_output=True, text=True, timeout=120)
    assert "DDPStrategy calls training_step by the forward of Whole" in failed.value.stderr


def test_validating_from_a_checkpoint_is_no_training(tmp_path):
    callback = callback_at(tmp_path / "run.zarr", sites="resid_post")
    going = trainer(tmp_path, callback, Saves(tmp_path), max_epochs=1)
    going.fit(Language(), Batches(7))
    going.validate(Language(), Batches(2), ckpt_path=tmp_path / "003.ckpt", verbose=False)
    assert callback.state_dict() == {"step": 7}


def test_two_callbacks_in_one_training(tmp_path):
    both = [callback_at(tmp_path / f"{name}.zarr", sites=f"resid_post[{name}]") for name in (0, 1)]
    fitted(tmp_path, *both, Saves(tmp_path))
    assert [len(open_run(tmp_path / f"{name}.zarr")) for name in (0, 1)] == [21, 21]
    trainer(tmp_path, *both, max_epochs=3).fit(Language(), Batches(7), ckpt_path=tmp_path / "003.ckpt")
    assert open_run(tmp_path / "0.zarr").steps["step"].tolist() == open_run(tmp_path / "1.zarr").steps["step"].tolist()


@pytest.mark.slow
def test_killed_and_resumed_every_step_is_there_once(tmp_path):
    """Again and again from the last checkpoint; the run ends as that of a training that nobody killed."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for folder in (whole, torn):
        folder.mkdir()
    small.train(whole)
    subprocess.run([sys.executable, small.__file__, torn, "3", "11"], check=True, capture_output=True, timeout=120)
    assert len(list(torn.glob("*.ckpt"))) > 0
    small.train(torn)
    expected, run = open_run(whole / "run.zarr"), open_run(torn / "run.zarr")
    assert run.verify().ok
    assert len(run.parts) > len(expected.parts)
    assert sorted(run.keys, key=str) == sorted(expected.keys, key=str)
    pd.testing.assert_frame_equal(run.steps[expected.steps.columns], expected.steps)
    for name in ("transformer.h.0:out", "transformer.h.1:out", "token/input_ids"):
        for number, key in enumerate(expected.keys):
            np.testing.assert_array_equal(run[name][run.keys.index(key)], expected[name][number])
    for key in [key for key in expected.keys if key[1] == "train"]:
        here, there = run.keys.index(key), expected.keys.index(key)
        name = "transformer.h.0:out.grad@loss"
        np.testing.assert_array_equal(run[name][here], expected[name][there])
