"""What goes wrong when attention and gradients are captured carelessly; one test per trap."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.distributed as dist
from gradient_models import (
    IDS,
    apart,
    build,
    eager,
    gpt_neo,
    loss_of,
    per_example,
    real_parts,
    saliency_of,
    same_gradients,
    without_dropout,
)
from tiny_models import (
    BATCH,
    CASES,
    HEADS,
    HIDDEN,
    LENGTHS,
    SdpaAttention,
    SdpaBlock,
    SdpaDecoder,
    SharedBlocks,
    batch,
    batch_with_positions,
    features,
    hook_count,
    llama,
    observed,
    packed,
    padding_mask,
    random_tokens,
    sdpa_decoder,
    seeded,
    torch_encoder,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention as imported_by_name
from torch.overrides import _get_current_function_mode_stack as function_modes
from transformers import AttentionInterface, AttentionMaskInterface, FalconConfig, FalconModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from tensortape.instrument import Recorder
from tensortape.instrument.errors import AttentionError, CompiledModelError, SiteNotFoundError
from tensortape.stores import Run, open_run
from tensortape.stores.errors import GradientError

Make = Callable[..., Recorder]
Opened = Callable[[Recorder], Run]
MASK = padding_mask()
NEAR = 1e-6
ORIGINAL = AttentionInterface.get_interface


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Whatever a test does, no patch, function mode or fast-path setting is left behind by it."""
    yield
    assert AttentionInterface.get_interface is ORIGINAL
    assert not function_modes()
    assert torch.backends.mha.get_fastpath_enabled()


def weights_of(model: nn.Module, inputs: dict[str, Tensor], mask: Tensor, path: str, call: int = 1) -> list[Any]:
    """[H, T_i, T_i] of every example, of a copy that materialises its weights."""
    return real_parts(eager(model, lambda copied: copied(**inputs))[path][call - 1][0], mask)


def differ(run: Run, site: str, wanted: list[Any], first: int = 0) -> float:
    """The largest difference between recorded and wanted probabilities."""
    found = run.attention(site)
    return max(float(np.abs(found[first + number] - wanted[number]).max()) for number in range(len(wanted)))


def clean_model(model: nn.Module) -> bool:
    """Whether nothing of a recorder is on a model."""
    return hook_count(model) == 0 and not any("tensortape" in name for module in model.modules() for name in vars(module))


# --- 1.3: implementations and their masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_output_attentions(name: str, implementation: str, make: Make, opened: Opened) -> None:
    """A model that is asked for its weights gives what it gives anyway, and the right ones are recorded."""
    model, plain = build(name), build(name)
    for one in (model, plain):
        one.set_attn_implementation(implementation)
    recorder = make(model, "attention")
    with torch.no_grad(), recorder.batch(ids=IDS):
        mine = model(**batch(), output_attentions=True)
    with torch.no_grad():
        other = plain(**batch(), output_attentions=True)
    assert torch.equal(mine[0], other[0])
    assert mine.attentions is None or [type(one) for one in mine.attentions] == [type(one) for one in other.attentions]
    run = opened(recorder)
    for path in run.attention_sites:
        assert differ(run, path, weights_of(plain, batch(), MASK, path)) < NEAR


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_output_attentions_of_a_model_that_calls_sdpa_itself(asked: bool, make: Make, opened: Opened) -> None:
    """Falcon changes its attention, and not for the better, when asked for its weights: recorded is what it did, or nothing."""
    sizes = {"vocab_size": 97, "hidden_size": 52, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = seeded(lambda: FalconModel(FalconConfig(**sizes)))
    recorder = make(model, ["attention", "h.*.self_attention:in"])
    try:
        with torch.no_grad(), recorder.batch(ids=IDS):
            output = model(**batch(), output_attentions=asked)
    except AttentionError:
        assert asked
        return
    run = opened(recorder)
    if asked:
        wanted = [real_parts(weights, MASK) for weights in output.attentions]
    else:
        found = eager(model, lambda copied: copied(**batch()))
        wanted = [real_parts(found[path][0][0], MASK) for path in run.attention_sites]
    for path, parts in zip(run.attention_sites, wanted, strict=True):
        assert differ(run, path, parts) < NEAR


@pytest.fixture
def own_function() -> Iterator[None]:
    """Attention functions of the user's own: with a mask function, without one, and one that is not even causal without."""
    AttentionInterface.register("own", sdpa_attention_forward)
    AttentionInterface.register("own_masked", sdpa_attention_forward)
    AttentionMaskInterface.register("own_masked", sdpa_mask)
    AttentionInterface.register("own_eager", eager_attention_forward)
    yield
    for name in ("own", "own_masked", "own_eager"):
        AttentionInterface._global_mapping.pop(name)
    AttentionMaskInterface._global_mapping.pop("own_masked")


@pytest.mark.usefixtures("own_function")
def test_a_registered_attention_function(make: Make, opened: Opened) -> None:
    """A function of the user's own, with its mask function, is seen like any other."""
    model = llama()
    model.set_attn_implementation("own_masked")
    recorder = make(model, "attention")
    with torch.no_grad(), recorder.batch(ids=IDS):
        model(**batch("left"))
    run = opened(recorder)
    for path in run.attention_sites:
        assert differ(run, path, weights_of(llama(), batch("left"), padding_mask("left"), path)) < NEAR


@pytest.mark.usefixtures("own_function")
@pytest.mark.parametrize("name", ["own", "own_eager"])
def test_a_registered_attention_function_without_a_mask(name: str, make: Make) -> None:
    """transformers then drops the mask: real tokens see pads, or the future; refused rather than recorded as if they did not."""
    model = llama()
    model.set_attn_implementation(name)
    recorder = make(model, "attention")
    with pytest.raises(AttentionError), torch.no_grad(), recorder.batch(ids=IDS):
        model(**batch("left"))
    assert not recorder.writer.path.exists()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_no_mask_means_what_the_implementation_says(name: str, implementation: str, make: Make, opened: Opened) -> None:
    """Without pads there is no mask at all: causal for one model, not for the other."""
    model, inputs = build(name), {"input_ids": random_tokens(BATCH, 7)}
    model.set_attn_implementation(implementation)
    recorder = make(model, "attention")
    with torch.no_grad(), recorder.batch(ids=IDS):
        model(**inputs)
    run = opened(recorder)
    for path in run.attention_sites:
        assert differ(run, path, weights_of(build(name), inputs, torch.ones(BATCH, 7), path)) < NEAR


class Masked(nn.Module):
    """Hand-written attention under a mask of its own, [B, 1, T, T], True where a key counts."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.attention = nn.Embedding(97, HIDDEN), MaskedAttention()

    def forward(self, input_ids: Tensor, seen: Tensor) -> Tensor:
        """[B, T] to [B, T, d]."""
        return self.attention(self.table(input_ids), seen)


class MaskedAttention(SdpaAttention):
    """With a mask."""

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """[B, T, d] to [B, T, d]."""
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))
        return self.proj(imported_by_name(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))


def test_fully_masked_rows_are_nan(make: Make, opened: Opened) -> None:
    """A query that sees nothing has no weights, whatever its implementation gives for it; saliency is none of another number."""
    model, tokens = seeded(Masked), random_tokens(BATCH, 7)
    seen = torch.ones(BATCH, 1, 7, 7, dtype=torch.bool).tril()
    seen[1, :, 4] = False
    seen[3, :, 0] = False
    recorder = make(model, "attention.grad")
    with recorder.batch(ids=IDS), recorder.target("loss", reduction="sum"):
        per_example(model(tokens, seen), torch.ones(BATCH, 7)).sum().backward()
    run = opened(recorder)
    found, saliency = run.attention("attention"), run.saliency("attention")
    for example, query in ((1, 4), (3, 0)):
        assert np.isnan(found[example][:, query]).all()
        assert not np.nan_to_num(saliency[example][:, query]).any()
        others = [number for number in range(7) if number != query]
        assert np.allclose(found[example][:, others].sum(-1), 1, atol=1e-6)
        assert np.isfinite(saliency[example][:, others]).all()


def test_left_pads_with_positions_are_right_pads(make: Make, opened: Opened) -> None:
    """Real tokens' attention does not depend on the side that pads are on."""
    runs = []
    for side in ("left", "right"):
        recorder = make(build("gpt2"), ["attention", "resid_post"])
        with torch.no_grad(), recorder.batch(ids=IDS):
            inputs = batch_with_positions(side)
            order = inputs["input_ids"]
            if side == "left":
                order = torch.stack([row.roll(7 - length) for row, length in zip(batch()["input_ids"], LENGTHS, strict=True)])
            recorder._model(**{**inputs, "input_ids": order})
        runs.append(opened(recorder))
    left, right = runs
    for path in left.attention_sites:
        assert differ(left, path, [right.attention(path)[number] for number in range(BATCH)]) < NEAR


# --- 1.4: several recorders, threads, copies -------------------------------------------------------------------------------------


def test_nested_recorders_on_one_model(make: Make, opened: Opened) -> None:
    """Each sees every call once, and the inner one's end takes nothing from the outer one."""
    for model, inputs, given in (
        (build("llama"), batch(), {}),
        (sdpa_decoder(), {"tokens": batch()["input_ids"]}, {"mask": MASK}),
        (gpt_neo(), batch(), {}),
        (build("torch_encoder"), features(), {}),
    ):
        outer, inner = make(model, ["attention", "resid_post"]), make(model, "attention.grad")
        with outer.batch(ids=IDS, **given):
            with inner.batch(ids=IDS, **given), inner.target("loss", reduction="sum"):
                per_example(model(**inputs), MASK).sum().backward()
            assert not clean_model(model)
        assert clean_model(model)
        one, other = opened(outer), opened(inner)
        assert one.attention_sites == other.attention_sites
        wanted = eager(model, lambda copied, inputs=inputs: copied(**inputs))
        for path in one.attention_sites:
            parts = real_parts(wanted[path][0][0], MASK)
            assert differ(one, path, parts) < NEAR
            assert differ(other, path, parts) < NEAR


def test_recorders_that_end_in_another_order(make: Make, opened: Opened) -> None:
    """The outer context is left before the inner one."""
    model = build("llama")
    first, second = make(model, "attention"), make(model, "attention")
    one, other = first.batch(ids=IDS), second.batch(ids=IDS)
    one.__enter__()
    other.__enter__()
    with torch.no_grad():
        model(**batch())
    one.__exit__(None, None, None)
    other.__exit__(None, None, None)
    assert clean_model(model)
    for run in (opened(first), opened(second)):
        for path in run.attention_sites:
            assert differ(run, path, weights_of(model, batch(), MASK, path)) < NEAR


def test_four_threads_with_four_models(tmp_path: Path) -> None:
    """At the same time, attention and gradients of models of all tiers: each run holds its own model's."""
    models = [build("llama"), sdpa_decoder(), gpt_neo(), build("torch_encoder")]
    given: list[dict[str, Any]] = [batch(), {"tokens": batch()["input_ids"]}, batch(), features()]

    def one(number: int) -> None:
        torch.set_num_threads(1)
        model, more = models[number], {"mask": MASK} if number == 1 else {}
        with Recorder(model, sites="attention.grad", to=tmp_path / f"{number}.zarr", durability="rename") as recorder:
            for part in range(4):
                ids = [f"{part}.{row}" for row in range(BATCH)]
                with recorder.batch(ids=ids, **more), recorder.target("loss", reduction="sum"):
                    per_example(model(**given[number]), MASK, part).sum().backward()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(4)))
    for number, model in enumerate(models):
        run = open_run(tmp_path / f"{number}.zarr")
        assert clean_model(model)
        for part in range(4):
            wanted = eager(model, lambda copied, n=number, part=part: per_example(copied(**given[n]), MASK, part).sum().backward())
            assert sorted(run.attention_sites) == sorted(wanted)
            for path in wanted:
                parts = real_parts(saliency_of(wanted, path), MASK)
                assert apart([run.saliency(path)[part * BATCH + row] for row in range(BATCH)], parts) < 1e-5


def test_another_model_of_the_same_class_in_the_context(make: Make, opened: Opened) -> None:
    """A reference model that runs beside the recorded one is none of the recorder's business."""
    model, other = build("llama"), seeded(llama, 1)
    recorder = make(model, ["attention", "resid_post"])
    with torch.no_grad(), recorder.batch(ids=IDS):
        other(**batch())
        model(**batch())
        other(**batch(seed=1))
    run = opened(recorder)
    for path in run.attention_sites:
        assert differ(run, path, weights_of(model, batch(), MASK, path)) < NEAR


@pytest.mark.parametrize("name", ["llama", "sdpa", "torch_encoder"])
def test_a_deep_copy_made_in_a_batch_context(name: str, make: Make, opened: Opened) -> None:
    """A copy (of an EMA, say) records nothing, computes the same, and carries nothing of the recorder."""
    model = build(name)
    case, recorder = CASES[name], make(model, ["attention.grad", "resid_post"])
    with recorder.batch(ids=IDS, **case.batch("right")), recorder.target("loss", reduction="sum"):
        copied = copy.deepcopy(model)
        loss = loss_of(case, model)
        with torch.no_grad():
            loss_of(case, copied)
        loss.sum().backward()
        with torch.no_grad():
            loss_of(case, copied)
    assert len(opened(recorder)) == BATCH
    assert torch.equal(loss_of(case, copied), loss)
    assert clean_model(model)
    assert not any("tensortape" in name for module in copied.modules() for name in vars(module))


@pytest.mark.parametrize("copies", [False, True])
def test_a_deep_copy_does_not_keep_the_recorded_model(copies: bool, tmp_path: Path) -> None:
    """Whatever a copy carries of the recorder's hooks holds on to nothing."""
    model = llama(num_hidden_layers=1)
    recorder = Recorder(model, sites="attention", to=tmp_path / "run.zarr", durability="rename")
    with torch.no_grad(), recorder.batch(ids=IDS):
        model(**batch())
        copied = copy.deepcopy(model) if copies else None
    recorder.close()
    gone = weakref.ref(model)
    del model, recorder
    gc.collect()
    assert gone() is None
    del copied


# --- 1.5: torch.compile ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Nothing compiled before or after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: Any) -> Any:
    """Without a code generator."""
    return torch.compile(model, backend="eager")


COMPILED = ["llama", "sdpa", "torch_encoder"]


def shallow(name: str) -> Any:
    """A model of one block, which is quick to compile."""
    small: dict[str, Callable[[], Any]] = {
        "llama": lambda: llama(num_hidden_layers=1),
        "sdpa": lambda: seeded(lambda: SdpaDecoder(layers=1)),
        "torch_encoder": lambda: without_dropout(one_block()),
    }
    return small[name]()


def one_block() -> Any:
    """nn.TransformerEncoder with one layer."""
    model = torch_encoder(batch_first=True, norm_first=False)
    model.layers, model.num_layers = model.layers[:1], 1
    return model


quiet = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@quiet
@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("name", COMPILED)
def test_attached_before_compiling(name: str, make: Make, opened: Opened) -> None:
    """The same attention as of the model that is not compiled, in every batch."""
    model, case = shallow(name), CASES[name]
    recorder = make(model, "attention")
    recorder.attach()
    whole = compiled(model)
    for part in range(3):
        with torch.no_grad(), recorder.batch(ids=[f"{part}.{row}" for row in range(BATCH)], **case.batch("right")):
            whole(**case.inputs("right"))
        with torch.no_grad():
            whole(**case.inputs("right"))
    run = opened(recorder)
    wanted = eager(shallow(name), lambda copied: copied(**case.inputs("right")))
    assert sorted(run.attention_sites) == sorted(wanted)
    for path in wanted:
        for part in range(3):
            assert differ(run, path, real_parts(wanted[path][0][0], MASK), part * BATCH) < NEAR
    assert clean_model(model)


@quiet
@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("name", COMPILED)
def test_gradients_of_a_compiled_model(name: str, make: Make, opened: Opened) -> None:
    """Saliency and gradients, too."""
    model, case, plain = shallow(name), CASES[name], shallow(name)
    recorder = make(model, ["attention.grad", "resid_post:out.grad"])
    recorder.attach()
    whole = compiled(model)
    for part in range(2):
        model.zero_grad()
        ids = [f"{part}.{row}" for row in range(BATCH)]
        with recorder.batch(ids=ids, **case.batch("right")), recorder.target("loss", reduction="sum"):
            loss_of(case, whole).sum().backward()
    run = opened(recorder)
    wanted = eager(plain, lambda copied: loss_of(case, copied).sum().backward())
    for path in wanted:
        parts = real_parts(saliency_of(wanted, path), MASK)
        assert apart([run.saliency(path)[BATCH + row] for row in range(BATCH)], parts) < 1e-5
    loss_of(case, plain).sum().backward()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@quiet
@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_before_attaching(name: str, make: Make, opened: Opened) -> None:
    """Refused; recompile=True is the way on, and gives the right attention."""
    model, case = shallow(name), CASES[name]
    whole = compiled(model)
    with torch.no_grad():
        whole(**case.inputs("right"))
    with pytest.raises(CompiledModelError, match="recompile=True"):
        make(whole, "attention")
    recorder = make(whole, "attention", recompile=True)
    for part in range(2):
        with torch.no_grad(), recorder.batch(ids=[f"{part}.{row}" for row in range(BATCH)], **case.batch("right")):
            whole(**case.inputs("right"))
    run = opened(recorder)
    wanted = eager(shallow(name), lambda copied: copied(**case.inputs("right")))
    assert sorted(run.attention_sites) == sorted(wanted)
    for path in wanted:
        assert differ(run, path, real_parts(wanted[path][0][0], MASK), BATCH) < NEAR


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("forgotten")
def test_compiled_behind_the_recorders_back(make: Make, opened: Opened) -> None:
    """Compiled after the recorder was made, without attach(), and called before the first batch: right, or an error."""
    model = shallow("sdpa")
    recorder = make(model, "resid_post")
    whole = compiled(model)
    with torch.no_grad():
        whole(batch()["input_ids"])
        try:
            with recorder.batch(ids=IDS, mask=MASK):
                whole(batch()["input_ids"])
        except (SiteNotFoundError, CompiledModelError, AttentionError) as error:
            assert "compile" in str(error)  # noqa: PT017
            return
    [(_, states)] = observed(shallow("sdpa"), {"tokens": batch()["input_ids"]}, {"blocks.0"})["blocks.0"]
    assert torch.equal(opened(recorder)["blocks.0:out"].to_torch(), packed(states, MASK))


# --- 2: nn.MultiheadAttention and users of plain SDPA ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_fast_path_of_nn_transformer_encoder(mode: Any, make: Make, opened: Opened) -> None:
    """In eval mode without gradients it skips all modules: off inside the context, on again after it."""
    model = build("torch_encoder")
    recorder = make(model, "attention")
    with mode(), recorder.batch(ids=IDS):
        model(**features())
        assert not torch.backends.mha.get_fastpath_enabled()
    run = opened(recorder)
    wanted = eager(model, lambda copied: copied(**features()))
    for path in run.attention_sites:
        assert differ(run, path, real_parts(wanted[path][0][0], MASK)) < NEAR


class Multihead(nn.Module):
    """nn.MultiheadAttention by itself, over vectors [B, T, E] (or [T, B, E])."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.batch_first = options.get("batch_first", True)
        self.attn = nn.MultiheadAttention(HIDDEN, HEADS, **{"batch_first": True, **options})
        self.other = None if options.get("kdim") is None else nn.Linear(HIDDEN, options["kdim"])

    def forward(self, src: Tensor, src_key_padding_mask: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        """[B, T, E] to [B, T, E]."""
        x = src if self.batch_first else src.transpose(0, 1)
        other = x if self.other is None else self.other(x)
        given = {"key_padding_mask": src_key_padding_mask, "attn_mask": attn_mask, "need_weights": False}
        found = self.attn(x, other, other, **given)[0]
        return found if self.batch_first else found.transpose(0, 1)


MULTIHEAD: dict[str, dict[str, Any]] = {
    "batch_first": {},
    "time_first": {"batch_first": False},
    "other_width": {"kdim": 11, "vdim": 11},
    "bias_k": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
    "no_bias": {"bias": False},
}


@pytest.mark.parametrize("masked", ["no", "bool", "float", "per_head"])
@pytest.mark.parametrize("kind", list(MULTIHEAD))
def test_every_kind_of_multihead_attention(kind: str, masked: str, make: Make, opened: Opened) -> None:
    """Weights and saliency with every option of its constructor, and masks in which True means masked."""
    model, inputs = seeded(lambda: Multihead(**MULTIHEAD[kind])), features()
    later = torch.ones(7, 7).triu(1)
    if masked != "no":
        made = torch.randn(BATCH * HEADS, 7, 7, generator=torch.Generator().manual_seed(2)).masked_fill(later.bool(), -torch.inf)
        inputs["attn_mask"] = {"bool": later.bool(), "float": later * -1e9, "per_head": made}[masked]
        if masked != "bool":
            inputs["src_key_padding_mask"] = torch.where(inputs["src_key_padding_mask"], -torch.inf, 0.0)
    recorder = make(model, "attn:attention.grad")
    with recorder.batch(ids=IDS), recorder.target("loss", reduction="sum"):
        per_example(model(**inputs), MASK).sum().backward()
    run = opened(recorder)
    wanted = eager(model, lambda copied: per_example(copied(**inputs), MASK).sum().backward())
    weights, gradients = (grid[..., :7] for grid in wanted["attn"][0])  # extra keys are the last
    assert differ(run, "attn", real_parts(weights, MASK)) < NEAR
    parts = real_parts(torch.where(weights == 0, 0, weights * gradients), MASK)
    assert apart([run.saliency("attn")[number] for number in range(BATCH)], parts) < 1e-5


def test_a_weight_of_which_no_hook_fires(make: Make) -> None:
    """out_proj of nn.MultiheadAttention is a bare weight: asked for, it is an error, not an empty column."""
    recorder = make(build("torch_encoder"), ["layers.0.self_attn.out_proj"])
    with pytest.raises(SiteNotFoundError, match="out_proj"), recorder.batch(ids=IDS):
        recorder._model(**features())


@pytest.mark.parametrize("asked", [{"need_weights": True}, {"need_weights": True, "average_attn_weights": False}])
def test_multihead_attention_that_gives_its_weights(asked: dict[str, bool], make: Make, opened: Opened) -> None:
    """What the user asks of the module, the user gets."""

    class Asking(Multihead):
        def forward(self, src: Tensor, src_key_padding_mask: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
            found, self.weights = self.attn(src, src, src, key_padding_mask=src_key_padding_mask, **asked)
            return found

    model, plain = seeded(Asking), seeded(Asking)
    recorder = make(model, "attn:attention.grad")
    with recorder.batch(ids=IDS), recorder.target("loss", reduction="sum"):
        per_example(model(**features()), MASK).sum().backward()
    plain(**features())
    assert torch.equal(model.weights, plain.weights)
    run = opened(recorder)
    wanted = eager(seeded(Asking), lambda copied: per_example(copied(**features()), MASK).sum().backward())
    parts = real_parts(saliency_of(wanted, "attn"), MASK)
    assert apart([run.saliency("attn")[number] for number in range(BATCH)], parts) < 1e-5


def test_sdpa_imported_by_name(make: Make, opened: Opened) -> None:
    """A patch of torch.nn.functional would not see it."""
    model, tokens = seeded(Masked), random_tokens(BATCH, 7)
    seen = torch.ones(BATCH, 1, 7, 7, dtype=torch.bool).tril()
    recorder = make(model, "attention")
    with torch.no_grad(), recorder.batch(ids=IDS):
        model(tokens, seen)
    found = opened(recorder).attention("attention")
    x = model.table(tokens)
    q, k, _ = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in model.attention.qkv(x).chunk(3, dim=2))
    wanted = torch.softmax((q @ k.transpose(2, 3) * 26**-0.5).masked_fill(~seen, -torch.inf), -1).detach().numpy()
    assert max(np.abs(found[number] - wanted[number]).max() for number in range(BATCH)) < NEAR


class Grouped(SdpaAttention):
    """Key heads shared by groups of query heads, a scale of its own, and dropout as asked, whatever the mode."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = 4, dropout
        self.qkv = nn.Linear(HIDDEN, HIDDEN * 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] to [B, T, d]."""
        q, k, v = self.qkv(x).split([HIDDEN, HIDDEN // 2, HIDDEN // 2], dim=2)
        q, k, v = (part.unflatten(2, (-1, 13)).transpose(1, 2) for part in (q, k, v))
        options = {"is_causal": True, "scale": 0.31, "enable_gqa": True, "dropout_p": self.dropout}
        return self.proj(functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2))


class WithGrouped(nn.Module):
    """A model around it."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.table, self.attention = nn.Embedding(97, HIDDEN), Grouped(dropout=dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, T] to [B, T, d]."""
        return self.attention(self.table(input_ids))


def test_sdpa_with_groups_and_a_scale(make: Make, opened: Opened) -> None:
    """enable_gqa, scale and is_causal are those of the call."""
    model, tokens = seeded(WithGrouped), batch()["input_ids"]
    recorder = make(model, "attention.grad")
    with recorder.batch(ids=IDS, mask=MASK), recorder.target("loss", reduction="sum"):
        per_example(model(tokens), MASK).sum().backward()
    run = opened(recorder)
    wanted = eager(model, lambda copied: per_example(copied(tokens), MASK).sum().backward())
    assert differ(run, "attention", real_parts(wanted["attention"][0][0], MASK)) < NEAR
    parts = real_parts(saliency_of(wanted, "attention"), MASK)
    assert apart([run.saliency("attention")[number] for number in range(BATCH)], parts) < 1e-5


def test_sdpa_dropout_in_eval_mode(make: Make, opened: Opened) -> None:
    """dropout_p counts whatever the mode is: attention is right, saliency is refused."""
    model, tokens = seeded(lambda: WithGrouped(dropout=0.25)).eval(), batch()["input_ids"]
    recorder = make(model, "attention.grad")
    with recorder.batch(ids=IDS, mask=MASK), recorder.target("loss", reduction="sum"):
        per_example(model(tokens), MASK).sum().backward()
    run = opened(recorder)
    wanted = eager(seeded(WithGrouped), lambda copied: copied(tokens))
    assert differ(run, "attention", real_parts(wanted["attention"][0][0], MASK)) < NEAR
    with pytest.raises(GradientError, match=r"dropout of 0\.25"):
        run.saliency("attention")[0]


def test_hugging_faces_own_sdpa_is_seen_once(make: Make, opened: Opened) -> None:
    """Its attention function calls torch's: one call of each module, not two."""
    recorder = make(build("llama"), "attention")
    with torch.no_grad(), recorder.batch(ids=IDS):
        recorder._model(**batch())
    run = opened(recorder)
    assert run.attention_sites == [f"layers.{layer}.self_attn" for layer in range(3)]
    assert {run.attention(site).facts["tier"] for site in run.attention_sites} == {"interface"}


def test_an_exception_that_the_model_handles_itself(make: Make, opened: Opened) -> None:
    """A module that raises and is caught in the forward takes no later call's name."""

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError

    class Careful(SdpaBlock):
        def __init__(self) -> None:
            super().__init__()
            self.failing_attention = Fails()

        def forward(self, x: Tensor) -> Tensor:
            with suppress(ZeroDivisionError):
                x = self.failing_attention(x)
            q = x.unflatten(2, (HEADS, -1)).transpose(1, 2)
            x = x + functional.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)
            return super().forward(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.blocks = nn.Embedding(97, HIDDEN), nn.ModuleList(Careful() for _ in range(2))

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.table(input_ids)
            for block in self.blocks:
                x = block(x)
            return x

    model = seeded(Model)
    recorder = make(model, "attention")
    with torch.no_grad(), recorder.batch(ids=IDS, mask=MASK):
        model(batch()["input_ids"])
    run = opened(recorder)
    assert run.attention_sites == ["blocks.0", "blocks.0.attention", "blocks.1", "blocks.1.attention"]


# --- 6: hooks in general ---------------------------------------------------------------------------------------------------------


def test_attention_called_with_keyword_arguments_only(make: Make, opened: Opened) -> None:
    """transformers calls submodules so: inputs are bound by name, their gradients too."""
    model, plain = build("llama"), build("llama")
    recorder = make(model, ["layers.1.self_attn:in", "layers.1.self_attn:in.grad", "layers.1.self_attn:in[hidden_states].grad"])
    with recorder.batch(ids=IDS):
        per_example(model(**batch()), MASK).sum().backward()
    run = opened(recorder)
    [(states, _)] = observed(plain, batch(), {"layers.1.self_attn"})["layers.1.self_attn"]
    assert torch.equal(run["layers.1.self_attn:in"].to_torch(), packed(states, MASK))
    by_name = run["layers.1.self_attn:in[hidden_states].grad@loss"].rows()
    assert np.array_equal(run["layers.1.self_attn:in.grad@loss"].rows(), by_name)
    assert by_name.any()


def test_blocks_that_share_attention(make: Make, opened: Opened) -> None:
    """One block three times in a list: three calls of one module, under its first name."""
    model, tokens = seeded(SharedBlocks), batch()["input_ids"]
    recorder = make(model, ["attention.grad", "resid_post:out.grad"])
    with recorder.batch(ids=IDS, mask=MASK), recorder.target("loss", reduction="sum"):
        per_example(model(tokens), MASK).sum().backward()
    run = opened(recorder)
    wanted = eager(model, lambda copied: per_example(copied(tokens), MASK).sum().backward())
    [path] = wanted
    assert run.attention_sites == ["blocks.0.attention", "blocks.0.attention#2", "blocks.0.attention#3"]
    for call, site in enumerate(run.attention_sites, 1):
        assert differ(run, site, real_parts(wanted[path][call - 1][0], MASK)) < NEAR
        parts = real_parts(saliency_of(wanted, path, call), MASK)
        assert apart([run.saliency(site)[number] for number in range(BATCH)], parts) < 1e-5
        assert apart([run.saliency(call - 1)[number] for number in range(BATCH)], parts) < 1e-5


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("name", ["llama", "sdpa", "torch_encoder", "gpt_neo"])
def test_an_exception_in_the_forward(name: str, attached: bool, error: type[BaseException], make: Make, opened: Opened) -> None:
    """No hook, patch, function mode or half example is left, and the next batch is right."""
    model = gpt_neo() if name == "gpt_neo" else build(name)
    inputs = {"sdpa": {"tokens": batch()["input_ids"]}, "torch_encoder": features()}.get(name, batch())
    given = {"mask": MASK} if name == "sdpa" else {}
    recorder = make(model, ["attention", "resid_post"])
    if attached:
        recorder.attach()
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))

    def fail(module: nn.Module, args: Any, output: Any) -> None:
        raise error

    handle = blocks[1].register_forward_hook(fail)
    with pytest.raises(error), torch.no_grad(), recorder.batch(ids=IDS, **given):
        model(**inputs)
    handle.remove()
    assert not function_modes()
    if not attached:
        assert clean_model(model)
        assert AttentionInterface.get_interface is ORIGINAL
        assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad(), recorder.batch(ids=IDS, **given):
        model(**inputs)
    run = opened(recorder)
    assert clean_model(model)
    wanted = eager(model, lambda copied: copied(**inputs))
    for path in run.attention_sites:
        assert differ(run, path, real_parts(wanted[path][0][0], MASK)) < NEAR


def test_an_exception_in_the_batch_context_while_another_is_open(make: Make) -> None:
    """A failing inner recorder leaves the outer one's patch where it is."""
    model = build("llama")
    outer, inner = make(model, "attention"), make(model, "attention")
    with outer.batch(ids=IDS):
        with suppress(ZeroDivisionError), inner.batch(ids=IDS):
            raise ZeroDivisionError
        with torch.no_grad():
            model(**batch())
    assert clean_model(model)
    assert len(outer.writer.committed_ids) <= BATCH


@pytest.mark.parametrize("name", ["llama", "bert", "torch_encoder", "sdpa"])
def test_autocast(name: str, make: Make, opened: Opened) -> None:
    """q, k, v, z and gradients in the dtype that the attention function saw; training the same with and without recording."""
    model, plain, case = build(name).train(), build(name).train(), CASES[name]
    recorder = make(model, ["attention.grad", "resid_post:out.grad"])
    with recorder.batch(ids=IDS, **case.batch("right")), recorder.target("loss", reduction="sum"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(case, model).sum()
        loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        other = loss_of(case, plain).sum()
    other.backward()
    assert torch.equal(loss, other)
    assert same_gradients(model, plain)
    run = opened(recorder)
    path = run.attention_sites[1]
    bf16 = np.dtype(ml_dtypes.bfloat16)
    seen = {"llama": np.dtype(np.float32)}.get(name, bf16)  # rotary embedding makes float32 of them
    assert [run[f"{path}:{port}"].dtype for port in ("q", "k")] == [seen, seen]
    assert run[f"{path}:z"].dtype == run[f"{path}:z.grad@loss"].dtype == bf16
    assert np.isfinite(run.saliency(path)[0]).all()
    errors = run[f"example/{path}:z.grad@loss|identity"].rows().astype(np.float64)
    assert np.nanmax(errors) < 0.05


@pytest.mark.parametrize("use_cache", [False, None])
def test_packed_sequences(use_cache: bool | None, make: Make, opened: Opened) -> None:
    """Each document attends to itself; with a cache transformers lets documents see each other, which is an error."""
    lengths = [[3, 4], [5, 2]]
    model, tokens = llama(), random_tokens(2, 7)
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    recorder = make(model, ["attention.grad", "resid_post:out.grad"])
    given = {"input_ids": tokens, "position_ids": positions, **({} if use_cache is None else {"use_cache": use_cache})}

    def run_batch() -> None:
        with recorder.batch(ids=list("abcd")), recorder.target("loss", reduction="sum"):
            per_example(model(**given), torch.ones(2, 7)).sum().backward()

    if use_cache is None:
        with pytest.raises(AttentionError, match="use_cache=False"):
            run_batch()
        return
    run_batch()
    run = opened(recorder)
    pieces = [(row, start, stop) for row, (one, two) in enumerate(lengths) for start, stop in ((0, one), (one, one + two))]
    wanted = eager(model, lambda copied: per_example(copied(**given), torch.ones(2, 7)).sum().backward())
    for path in run.attention_sites:
        weights, saliency = wanted[path][0][0].detach(), saliency_of(wanted, path)
        parts = [saliency[row, :, start:stop, start:stop].numpy() for row, start, stop in pieces]
        assert differ(run, path, [weights[row, :, start:stop, start:stop].numpy() for row, start, stop in pieces]) < NEAR
        assert apart([run.saliency(path)[number] for number in range(4)], parts) < 1e-5


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """One process that is a group by itself."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", ["llama", "torch_encoder", "sdpa"])
def test_distributed_data_parallel(name: str, make: Make, opened: Opened) -> None:
    """Names without `module.`; attention and gradients of the model inside."""
    case, model, plain = CASES[name], build(name), build(name)
    wrapped = nn.parallel.DistributedDataParallel(model)
    recorder = make(wrapped, ["attention.grad", "resid_post:out.grad"])
    with recorder.batch(ids=IDS, **case.batch("right")), recorder.target("loss", reduction="sum"):
        loss_of(case, wrapped).sum().backward()
    run = opened(recorder)
    wanted = eager(plain, lambda copied: loss_of(case, copied).sum().backward())
    assert sorted(run.attention_sites) == sorted(wanted)
    for path in wanted:
        parts = real_parts(saliency_of(wanted, path), MASK)
        assert apart([run.saliency(path)[number] for number in range(BATCH)], parts) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "sdpa", "torch_encoder", "gpt_neo"])
def test_inference_mode(name: str, make: Make, opened: Opened) -> None:
    """Tensors that nothing may be differentiated through are recorded all the same."""
    model = gpt_neo() if name == "gpt_neo" else build(name)
    inputs = {"sdpa": {"tokens": batch()["input_ids"]}, "torch_encoder": features()}.get(name, batch())
    recorder = make(model, ["attention", "weights", "resid_post"])
    with torch.inference_mode(), recorder.batch(ids=IDS, **({"mask": MASK} if name == "sdpa" else {})):
        model(**inputs)
    run = opened(recorder)
    wanted = eager(model, lambda copied: copied(**inputs))
    for path in run.attention_sites:
        assert differ(run, path, real_parts(wanted[path][0][0], MASK)) < NEAR


def test_keys_that_are_changed_after_the_call(make: Make, opened: Opened) -> None:
    """A static cache writes to the very tensor that attention saw: what is recorded is what it was then."""

    class Writes(SdpaAttention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))
            z = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            found = self.proj(z.transpose(1, 2).flatten(2))
            for tensor in (q, k, v, z):
                tensor.fill_(7.0)
            return found

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.attention = nn.Embedding(97, HIDDEN), Writes()

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.attention(self.table(input_ids))

    model, tokens = seeded(Model), batch()["input_ids"]
    recorder = make(model, ["attention", "attention:v"])
    with torch.no_grad(), recorder.batch(ids=IDS, mask=MASK):
        model(tokens)
    run = opened(recorder)
    q, k, v = (part.unflatten(2, (HEADS, -1)).detach() for part in model.attention.qkv(model.table(tokens)).chunk(3, dim=2))
    assert torch.equal(run["attention:q"].to_torch(), packed(q, MASK))
    assert torch.equal(run["attention:k"].to_torch(), packed(k, MASK))
    assert torch.equal(run["attention:v"].to_torch(), packed(v, MASK))


def test_hooks_of_the_users_own(make: Make, opened: Opened) -> None:
    """A user's hook that replaces a block's output: what the next block sees is recorded, and its gradient."""
    model = build("llama")
    model.layers[0].register_forward_hook(lambda module, args, output: output * 2)
    recorder = make(model, ["resid_post[0]", "resid_pre[1]", "resid_post[0]:out.grad", "resid_pre[1]:in.grad", "attention.grad"])
    with recorder.batch(ids=IDS), recorder.target("loss", reduction="sum"):
        per_example(model(**batch()), MASK).sum().backward()
    run = opened(recorder)
    assert np.array_equal(run["layers.0:out"].rows(), run["layers.1:in"].rows())
    assert np.array_equal(run["layers.0:out.grad@loss"].rows(), run["layers.1:in.grad@loss"].rows())
    wanted = eager(model, lambda copied: per_example(copied(**batch()), MASK).sum().backward())
    for path in wanted:
        parts = real_parts(saliency_of(wanted, path), MASK)
        assert apart([run.saliency(path)[number] for number in range(BATCH)], parts) < 1e-5


def test_a_cut_through_the_attention_interface(make: Make, opened: Opened) -> None:
    """A user's own wrapper of the interface, placed before or inside the context, is left in place and seen through."""
    inner = AttentionInterface.get_interface
    calls: list[str] = []

    def wrapper(self: Any, name: str, default: Any) -> Any:
        function = inner(self, name, default)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        return counted

    model = build("llama")
    recorder = make(model, "attention")
    AttentionInterface.get_interface = wrapper  # type: ignore[method-assign, assignment]
    try:
        with torch.no_grad(), recorder.batch(ids=IDS):
            model(**batch())
        assert AttentionInterface.get_interface is wrapper
    finally:
        AttentionInterface.get_interface = inner  # type: ignore[method-assign]
    assert len(calls) == 3
    run = opened(recorder)
    for path in run.attention_sites:
        assert differ(run, path, weights_of(model, batch(), MASK, path)) < NEAR


def test_a_wrapper_placed_inside_the_context(make: Make) -> None:
    """What somebody else put over the patch while it was there is not thrown away when it ends."""
    ours = AttentionInterface.get_interface
    model = build("llama")
    recorder = make(model, "attention")
    try:
        with torch.no_grad(), recorder.batch(ids=IDS):
            patched = AttentionInterface.get_interface

            def theirs(self: Any, name: str, default: Any) -> Any:
                return patched(self, name, default)

            AttentionInterface.get_interface = theirs  # type: ignore[method-assign, assignment]
            model(**batch())
        kept = AttentionInterface.get_interface is theirs
        with torch.no_grad():
            model(**batch())
    finally:
        AttentionInterface.get_interface = ours  # type: ignore[method-assign]
    assert kept


def test_a_function_mode_of_the_users_own(make: Make, opened: Opened) -> None:
    """Around the context or inside the forward, it stays where it is."""
    seen: list[Any] = []

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    model, tokens = sdpa_decoder(), batch()["input_ids"]
    recorder = make(model, "attention")
    with Counting(), torch.no_grad(), recorder.batch(ids=IDS, mask=MASK):
        model(tokens)
        assert len(function_modes()) == 1
    assert seen.count(functional.scaled_dot_product_attention) >= 3
    with Counting():
        wanted = eager(model, lambda copied: copied(tokens))
    run = opened(recorder)
    for path in run.attention_sites:
        assert differ(run, path, real_parts(wanted[path][0][0], MASK)) < NEAR


def test_a_batch_context_inside_a_generator(make: Make) -> None:
    """Several contexts by an ExitStack: all are left in order."""
    models = [build("llama"), sdpa_decoder()]
    recorders = [make(model, "attention") for model in models]
    with ExitStack() as stack:
        for recorder in recorders:
            stack.enter_context(recorder.batch(ids=IDS, mask=MASK))
        with torch.no_grad():
            models[0](**batch())
            models[1](batch()["input_ids"])
    assert all(map(clean_model, models))
