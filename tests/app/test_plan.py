"""Plans, against recordings and against arithmetic done by hand."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, ViTConfig, ViTModel

from tensortape.app import cli, models
from tensortape.app.costs import Costs, Rates
from tensortape.app.plan import Plan, plan
from tensortape.app.plan_lines import duration, lines, size
from tensortape.instrument import Site, record
from tensortape.instrument.errors import SiteNotFoundError, UnsupportedModelError
from tensortape.stores import Run, open_run
from tensortape.stores.errors import BudgetError

LENGTH = 16
LLAMA_70B = LlamaConfig(
    hidden_size=8192,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    intermediate_size=28672,
    vocab_size=128256,
    max_position_embeddings=8192,
)


def on_meta(kind: Any, config: Any) -> Any:
    """A model without weights, in bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return kind(config).eval()
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def large() -> Plan:
    """The reference figures: 70 B parameters, the residual stream of all layers, 10^9 tokens."""
    return plan(on_meta(LlamaForCausalLM, LLAMA_70B), "resid_post", 10**9)


def test_a_model_of_70_billion_parameters(large: Plan) -> None:
    """80 layers x 8192 features x 2 bytes: 16 KiB per token and layer, 1.31 PB in all."""
    per_token = {name: count for name, count in large.bytes_per_token.items() if name.endswith(":out")}
    assert set(per_token) == {f"token/model.layers.{layer}:out" for layer in range(80)}
    assert set(per_token.values()) == {16384.0}
    assert sum(per_token.values()) == 1_310_720
    assert 1.3107e15 < large.nbytes < 1.3109e15
    assert large.parameters == 70_553_706_496
    assert large.parameter_bytes == 2 * large.parameters


def test_the_costs_of_70_billion_parameters(large: Plan) -> None:
    """Two operations per weight and token, and four per feature and key that a token is compared with in every layer."""
    weights = large.parameters - 2 * 8192 * 128256 + 8192 * 128256
    flops = 2 * weights + 80 * 4 * 8192 * 2048
    assert large.costs.flops_per_token == pytest.approx(flops, rel=0.001)
    assert large.costs.usd_per_month == pytest.approx(30_150, rel=0.001)
    assert large.costs.gpu_hours == pytest.approx(flops * 1e9 / 3e14 / 3600, rel=0.001)
    assert large.costs.bottleneck == "disk"
    assert "unless the recording is read more than 90 times a month" in large.costs.verdict


def test_the_memory_and_files_of_70_billion_parameters(large: Plan) -> None:
    """Two examples of 2,048 tokens come at once, and take half of the budget; the other half holds a shard of each of 80 layers."""
    assert large.budget == large.least_budget == pytest.approx(2 * 4096 * 1_310_720, rel=0.001)
    assert 80 * 1e9 / 2048 <= large.shards < 80 * 1e9 / 2048 + 10_000  # 32 MiB each, and some of tokens


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Run]:
    """A plan, and the recording it is of."""
    sites = [
        "resid_post",
        Site("mlp_out[1:3]", reduce="mean"),
        Site("embed", positions=[0, -1]),
        Site("attention[2]"),
        "weights[0]",
    ]
    model, tokenizer = models.load(models.DEMO)
    text = Path(cli.__file__).read_text()[:4200]
    tokens = len(tokenizer(text)["input_ids"])
    assert tokens % LENGTH

    def planned(budget: int) -> Plan:
        built = models.without_weights(models.DEMO)
        return plan(built, sites, tokens, max_length=LENGTH, batch_tokens=171, budget=budget)

    tight = planned(0).least_budget * 21 // 20  # shards are then small, and each array has several
    options = {"tokenizer": tokenizer, "max_length": LENGTH, "overflow": "window", "batch_tokens": 171, "durability": "rename"}
    to = tmp_path_factory.mktemp("plan") / "run.zarr"
    return planned(tight), record(model, text, to=to, sites=sites, memory_budget=tight, **options)


def test_bytes_are_those_of_a_recording(pair: tuple[Plan, Run]) -> None:
    """Every column, byte for byte; but for pairs, of which the last window has fewer, and texts."""
    planned, run = pair
    arrays = {name: 0 for name in planned.bytes_per_token}
    for array in planned.arrays:
        arrays[array.column] += array.nbytes
    recorded = {f"{table.name}/{name}": column.nbytes for table in run.tables.values() for name, column in table.items()}
    assert arrays.keys() == recorded.keys()
    vague = [name for name in recorded if name.startswith("pair/") or name in ("example/id", "example/text", "example/document")]
    assert {name: count for name, count in recorded.items() if name not in vague} == {
        name: count for name, count in arrays.items() if name not in vague
    }
    weights = next(name for name in vague if name.startswith("pair/"))
    assert recorded[weights] <= arrays[weights] < 1.01 * recorded[weights]


def test_files_are_those_of_a_recording(pair: tuple[Plan, Run]) -> None:
    planned, run = pair
    files = [file for file in run.path.rglob("*") if file.is_file() and "assets" not in file.parts]
    shards = [file for file in files if file.name.startswith("c.")]
    records = [file for file in files if file.parent.name == "commits" and file.suffix == ".json"]
    assert planned.shards == len(shards) > len(planned.arrays) + 10
    assert planned.documents == len(files) - len(shards) - (len(records) - 1)


def test_a_recording_is_refused_with_less_than_the_least_budget(tmp_path: Path) -> None:
    text = Path(cli.__file__).read_text()[:900]
    model, tokenizer = models.load(models.DEMO)

    def recorded(budget: float) -> Run:
        options = {"tokenizer": tokenizer, "max_length": LENGTH, "overflow": "window", "batch_tokens": 64, "durability": "rename"}
        return record(model, text, to=tmp_path / "r.zarr", sites="resid_post", memory_budget=int(budget), **options)

    least = plan(models.without_weights(models.DEMO), "resid_post", 999, max_length=LENGTH, batch_tokens=64).least_budget
    with pytest.raises(BudgetError):
        recorded(0.99 * least)
    assert recorded(1.01 * least).verify().ok


def test_gradients_and_their_backward() -> None:
    built = models.without_weights(models.DEMO)
    plain, graded = plan(built, "resid_post", 10**6), plan(built, ["resid_post", "resid_post:out.grad"], 10**6)
    of_gradients = {name: count for name, count in graded.bytes_per_token.items() if name.endswith(":out.grad@loss")}
    assert list(of_gradients.values()) == [4 * 128.0] * 6
    assert graded.costs.flops_per_token == 2 * plain.costs.flops_per_token


def test_the_operations_of_experts() -> None:
    """Two of eight experts take part in a token, whichever way their products are computed."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}
    model = on_meta(MixtralForCausalLM, MixtralConfig(**sizes, intermediate_size=96, num_local_experts=8, num_experts_per_tok=2))
    attention = 2 * (64 * 64 * 2 + 64 * 32 * 2) + 4 * 64 * 16
    per_layer = attention + 2 * 64 * 8 + 2 * 2 * 3 * 64 * 96
    assert plan(model, "resid_post", 100, max_length=16).costs.flops_per_token == 2 * per_layer + 2 * 64 * 100


def test_seconds_and_the_bottleneck() -> None:
    rates = Rates(gpus=4, gpu_tokens_per_second=500, gpu_price=3, disk_bytes_per_second=1e6, storage_price=0.1)
    slow_model = Costs(tokens=7_200_000, nbytes=10**9, flops_per_token=1, rates=rates)
    assert (slow_model.forward_seconds, slow_model.disk_seconds) == (3600, 1000)
    assert (slow_model.seconds, slow_model.bottleneck, slow_model.gpu_hours) == (3600, "forward", 4)
    slow_disk = Costs(tokens=7_200_000, nbytes=10**10, flops_per_token=1, rates=rates)
    assert (slow_disk.seconds, slow_disk.bottleneck) == (10_000, "disk")
    assert (slow_disk.usd_per_month, slow_disk.usd_to_recompute) == (1, 12)


def test_when_storing_is_cheaper() -> None:
    """12 USD to compute, 1 USD a month to store: a year of storage for one reading."""
    rates = Rates(gpu_tokens_per_second=500, gpu_price=3, storage_price=0.1)
    assert "at least once in 12.0 months" in Costs(7_200_000, 10**10, 1, rates).verdict
    assert "more than 10 times a month" in Costs(7_200_000, 120 * 10**10, 1, rates).verdict


@pytest.mark.parametrize("name", ["gpus", "gpu_price", "disk_bytes_per_second"])
def test_rates_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Rates(**{name: 0})


def test_what_cannot_be_planned() -> None:
    with torch.device("meta"):
        images = ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8))
    with pytest.raises(UnsupportedModelError, match="input_ids"):
        plan(images, "resid_post", 10)
    built = models.without_weights(models.DEMO)
    with pytest.raises(SiteNotFoundError):
        plan(built, "layer.3", 10)
    with pytest.raises(ValueError, match="at least 1"):
        plan(built, "resid_post", 0)


def test_figures_for_people(large: Plan) -> None:
    shown = "\n".join(lines(large))
    assert "1,310,720.0    1.31 PB  bfloat16 [8192] token/model.layers.0:out and 79 more" in shown
    assert "the default would be refused" in shown
    assert [size(count) for count in (12, 1500, 2.5e12, 4e16)] == ["12 B", "1.5 kB", "2.5 TB", "40.00 PB"]
    assert [duration(seconds) for seconds in (0.5, 90, 7200)] == ["0.5 s", "2 min", "2.0 h"]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs `tensortape plan` and gives what it printed."""

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["tensortape", "plan", "--model", "demo", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        return capsys.readouterr().out

    return run


def test_the_command_prints_a_table_or_json(call: Callable[..., str]) -> None:
    found = json.loads(call("--tokens", "1e6", "--json", "--gpu-tokens-per-second", 1e5, "--gpu-price", 36))
    assert found["bytes_per_token"]["token/model.layers.3:out"] == 512
    assert (found["forward_seconds"], found["usd_to_recompute"]) == (10, 0.1)
    assert found["rates"]["gpu_price"] == 36
    assert call("--tokens", "1e6").strip().splitlines()[-1].startswith("Recomputing is cheaper")


def test_auto_is_the_smaller_attention(call: Callable[..., str]) -> None:
    """Queries and keys take d (H + Hkv) values per token, weights T H: 192 and 4 T here."""
    for length, port in ((64, "q"), (32, "weights")):
        found = json.loads(call("--tokens", 1e6, "--attention", "auto", "--sites", "none", "--max-length", length, "--json"))
        assert any(re.search(f":{port}$", name) for name in found["bytes_per_token"]), port


def test_a_sample_of_tokens(call: Callable[..., str]) -> None:
    """An eighth of the rows, and of what is said of the tokens drawn."""
    found = json.loads(call("--tokens", 8e5, "--sample-tokens", 0.125, "--json"))
    table = "token.sample0.125.seed0"
    assert found["bytes_per_token"][f"{table}/model.layers.3:out|sample0.125.seed0"] == 512 / 8
    assert found["bytes_per_token"][f"{table}/input_ids"] == 1
    assert found["bytes_per_token"]["token/input_ids"] == 8


def test_projections(call: Callable[..., str], tmp_path: Path) -> None:
    """Seven coordinates and a norm per token and layer; and a file for each of the six bases, as in a recording."""
    found = json.loads(call("--tokens", 8e5, "--project", 7, "--json"))
    assert found["bytes_per_token"]["token/model.layers.3:out|pca7"] == 28
    assert found["bytes_per_token"]["token/model.layers.3:out|pca7|residual"] == 4
    plain = json.loads(call("--tokens", 8e5, "--json"))
    assert found["documents"] == plain["documents"] + 6 + 6  # the residual's arrays, and the bases
    (tmp_path / "a.txt").write_text(Path(cli.__file__).read_text()[:1500])
    words = [
        "--text",
        tmp_path / "a.txt",
        "--project",
        7,
        "--sample-tokens",
        0.5,
        "--to",
        tmp_path / "run.zarr",
        "--overflow",
        "truncate",
    ]
    cli.app(["record", "--model", "demo", *map(str, words)], standalone_mode=False)
    run = open_run(tmp_path / "run.zarr")
    assert run["resid_post[3]"].name == "token.sample0.5.seed0/model.layers.3:out|pca7|sample0.5.seed0"
    assert sum(name.startswith("basis.") for name in run.assets) == 6
