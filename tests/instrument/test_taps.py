"""The hooks themselves: they look, copy nothing back, and never raise into the forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import (
    PAD,
    SdpaDecoder,
    SharedBlocks,
    batch,
    hook_count,
    llama,
    pair_batch,
    random_tokens,
    sdpa_decoder,
    seeded,
    t5,
    torch_encoder,
)
from torch import Tensor, nn

from tensortape.instrument.sites import Tap, resolve
from tensortape.instrument.taps import TapSet
from tensortape.stores.patterns import SiteName


class Notes:
    """A receiver that writes down what it is told."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.decoder_calls: list[dict[str, Any]] = []
        self.tensors: dict[str, Tensor] = {}
        self.errors: list[Exception] = []
        self.grad_modes: set[bool] = set()

    def started(self, arguments: Any) -> None:
        """A forward of the root."""
        self.calls.append(dict(arguments))

    def ended(self) -> None:
        """The forward is over."""

    def decoder_started(self, arguments: Any) -> None:
        """A forward of its decoder."""
        self.decoder_calls.append(dict(arguments))

    def captured(self, tap: Tap, site: SiteName, tensor: Tensor) -> None:
        """A tensor."""
        self.grad_modes.add(torch.is_grad_enabled())
        self.tensors[str(site)] = tensor.clone()

    def failed(self, error: Exception) -> None:
        """An error in a hook."""
        self.errors.append(error)


class Failing(Notes):
    """A receiver that fails at whatever it is told."""

    def started(self, arguments: Any) -> None:
        """Fails."""
        raise RuntimeError("started")

    def captured(self, tap: Tap, site: SiteName, tensor: Tensor) -> None:
        """Fails."""
        raise ValueError(str(site))


def taps_on(model: nn.Module, *patterns: str) -> TapSet:
    """Taps for patterns."""
    return TapSet(model, resolve(model, list(patterns)))


def test_hooks_are_there_only_while_attached() -> None:
    """Attached and removed together; removing twice is fine."""
    model = llama()
    taps = taps_on(model, "resid_post")
    assert (taps.attached, hook_count(model)) == (False, 0)
    with taps:
        assert taps.attached
        assert hook_count(model) > 0
    taps.remove()
    assert (taps.attached, hook_count(model)) == (False, 0)
    taps.attach()
    taps.remove()
    taps.remove()
    assert hook_count(model) == 0


def test_hooks_of_others_stay() -> None:
    """Only what was attached is removed, and others' hooks go on working."""
    model, seen = sdpa_decoder(), []
    model.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
    with taps_on(model, "resid_post") as taps, taps.sending_to(Notes()):
        model(random_tokens(2, 3))
    model(random_tokens(2, 3))
    assert len(seen) == 2
    assert hook_count(model) == 1


def test_a_users_hook_that_changes_the_output_comes_first() -> None:
    """What is recorded is what the next module sees."""
    model, notes = sdpa_decoder(), Notes()
    model.blocks[0].register_forward_hook(lambda module, args, output: output * 2)
    model.blocks[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    with taps_on(model, "resid_post[0]", "resid_pre[1]") as taps, taps.sending_to(notes):
        model(random_tokens(2, 3))
    assert torch.equal(notes.tensors["blocks.0:out"] + 1, notes.tensors["blocks.1:in"])


class Refuses(nn.Linear):
    """A module that takes no hook."""

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Fails."""
        raise RuntimeError("no hooks here")


def test_all_hooks_or_none() -> None:
    """If one cannot be placed, those placed before are taken away again."""
    model = nn.Sequential(nn.Linear(2, 2), nn.TransformerEncoderLayer(2, 1, 2), Refuses(2, 2))
    taps = taps_on(model, "0", "2")
    with pytest.raises(RuntimeError, match="no hooks here"):
        taps.attach()
    assert not taps.attached
    assert hook_count(model) == 0
    assert torch.backends.mha.get_fastpath_enabled()


def test_nothing_is_sent_without_a_receiver() -> None:
    """Attached hooks do nothing by themselves."""
    model, notes = sdpa_decoder(), Notes()
    with taps_on(model, "resid_post") as taps:
        model(random_tokens(2, 3))
        with taps.sending_to(notes):
            pass
        model(random_tokens(2, 3))
    assert (notes.calls, notes.tensors) == ([], {})


def test_arguments_by_name() -> None:
    """Whether given by place or by name, in the order of the signature, also what goes into **kwargs."""

    class Model(nn.Module):
        def forward(self, first: Tensor, second: int = 2, *, third: int = 3, **more: Any) -> Tensor:
            return first * second

    model, notes = Model(), Notes()
    one = torch.ones(1)
    with TapSet(model, [Tap("", "out", None, None)]) as taps, taps.sending_to(notes):  # type: ignore[arg-type]
        model(one)
        model(third=4, first=one)
        model(one, 5, other=6)
    assert [list(call.items()) for call in notes.calls] == [
        [("first", one)],
        [("first", one), ("third", 4)],
        [("first", one), ("second", 5), ("other", 6)],
    ]
    assert notes.errors == []


def test_the_decoder_is_announced() -> None:
    """With the arguments its own forward was given."""
    model, notes, inputs = t5(), Notes(), pair_batch()
    with taps_on(model, "resid_post") as taps, taps.sending_to(notes), torch.no_grad():
        model(**inputs)
        model.decoder(input_ids=inputs["decoder_input_ids"], encoder_hidden_states=torch.zeros(5, 7, model.config.d_model))
    assert len(notes.calls) == len(notes.decoder_calls) == 1
    assert torch.equal(notes.decoder_calls[0]["input_ids"], inputs["decoder_input_ids"])
    assert torch.equal(notes.decoder_calls[0]["attention_mask"], inputs["decoder_attention_mask"])


def test_errors_in_hooks_are_reported_not_raised() -> None:
    """The forward goes on as if nothing had happened."""
    model, failing = sdpa_decoder(), Failing()
    tokens = random_tokens(2, 3)
    plain = model(tokens)
    with taps_on(model, "resid_post", "table:out[7]") as taps, taps.sending_to(failing):
        assert torch.equal(model(tokens), plain)
    assert [str(error) for error in failing.errors[:2]] == [
        "started",
        "site 'table:out[7]': the module gives no tensor [7]; it gives [] float32[2, 3, 52]",
    ]
    assert [str(error) for error in failing.errors[2:]] == [f"blocks.{layer}:out" for layer in range(3)]


def test_calls_are_counted_anew_in_every_forward() -> None:
    """The first call has no suffix, in the second forward as in the first."""
    model = seeded(SharedBlocks)
    for _ in range(2):
        notes = Notes()
        with taps_on(model, "blocks.0", "blocks.0:in") as taps, taps.sending_to(notes):
            model(random_tokens(2, 3))
        assert set(notes.tensors) == {f"blocks.0{suffix}:{port}" for suffix in ("", "#2", "#3") for port in ("in", "out")}


def test_calls_are_counted_anew_after_an_error() -> None:
    """A forward that broke off in the middle leaves no count behind, nor is it still going on."""
    model, notes = seeded(SharedBlocks), Notes()
    with taps_on(model, "blocks.0", "blocks.0.mlp:in") as taps, taps.sending_to(notes):
        handle = model.blocks[0].mlp.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(random_tokens(2, 3))
        handle.remove()
        notes.tensors.clear()
        model.blocks[0](torch.zeros(2, 3, 52))
        assert notes.tensors == {}
        model(random_tokens(2, 3))
    assert len(notes.calls) == 2
    assert set(notes.tensors) >= {"blocks.0:out", "blocks.0#2:out", "blocks.0#3:out"}
    assert "blocks.0#4:out" not in notes.tensors


def test_hooks_see_no_gradients() -> None:
    """Copying is not part of the graph; the forward's own grad mode is untouched."""
    model, notes = sdpa_decoder(), Notes()
    with taps_on(model, "resid_post") as taps, taps.sending_to(notes):
        output = model(random_tokens(2, 3))
    assert output.requires_grad
    assert notes.grad_modes == {False}
    assert not any(tensor.requires_grad for tensor in notes.tensors.values())


def test_outputs_are_the_very_same_objects() -> None:
    """A hook that returned something would replace them."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept: Any = None

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            self.kept = (x + 1, None)
            return self.kept

    model = nn.Sequential(Keeps())
    with taps_on(model, "0", "0:in", "") as taps, taps.sending_to(Notes()):
        assert model(torch.zeros(2, 3)) is model[0].kept


def test_the_fast_path_belongs_to_models_that_have_one() -> None:
    """It is switched off for nn.TransformerEncoder alone."""
    with taps_on(sdpa_decoder(), "resid_post"):
        assert torch.backends.mha.get_fastpath_enabled()
    with taps_on(torch_encoder(batch_first=True, norm_first=True), "resid_post"):
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_module_that_calls_itself() -> None:
    """Calls within a call are counted as they begin, and outputs go by the number of their own call."""

    class Twice(nn.Module):
        def forward(self, x: Tensor, again: bool = True) -> Tensor:
            return self(x * 2, again=False) + 1 if again else x

    model, notes = nn.Sequential(Twice()), Notes()
    with taps_on(model, "0", "0:in") as taps, taps.sending_to(notes):
        model(torch.ones(1))
    assert {name: tensor.item() for name, tensor in notes.tensors.items()} == {"0:in": 1, "0#2:in": 2, "0#2:out": 2, "0:out": 3}


def test_the_root_is_a_site() -> None:
    """Its input and its output, whatever else is tapped."""
    model, notes = seeded(SdpaDecoder), Notes()
    with taps_on(model, ":out", "resid_post[2]") as taps, taps.sending_to(notes):
        output = model(batch()["input_ids"])
    assert torch.equal(notes.tensors[":out"], output)
    assert PAD in batch()["input_ids"]
