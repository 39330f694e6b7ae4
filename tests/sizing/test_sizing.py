"""A plan's bytes against measured and published ones; what `harness plan` prints and refuses."""

import itertools
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import distributed
from harness.cli import command_line
from harness.config import Config
from harness.config.engine_sections import OptimizerConfig
from harness.errors import ConfigError
from harness.optim.build import build_optimizer
from harness.sizing.activations import DTYPES, Saved, trace
from harness.sizing.changes import changes_that_fit
from harness.sizing.command import plan, run_plan
from harness.sizing.llama import Llama
from harness.sizing.memory import Footprint, adamw_bytes, model_parts
from harness.sizing.setting import OPTIMIZERS, Setting
from harness.sizing.sources import from_folder, from_import_path, from_sizes, from_task, of_task
from harness.sizing.text import lines_of
from harness.sizing.traffic import ring_traffic, traffic_of
from harness.task import load_task
from harness.testing.pool import RankPool
from tests.support.given_gradients import engine_of
from tests.support.helpers import ROOT, tiny_config
from tests.support.quick import quick
from tests.support.sent import Sent

SIZES = {"layers": 3, "hidden": 64, "heads": 4, "ffn": 160, "vocabulary": 256}


WIDE = SIZES | {"layers": 1, "hidden": 320, "ffn": 384}
"""Wider than APOLLO's rank, which is 256 by default: in a narrower model it would be AdamW."""


COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")


def small(optimizer: str = "adamw") -> torch.nn.Module:
    return Llama(**(WIDE if optimizer == "apollo" else SIZES))


def storage_bytes(tensors: Any) -> int:
    """Each storage once."""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def measured_and_planned(name: str, stage: int, precision: str) -> tuple[dict[str, int], ...]:
    """This rank's bytes after two steps, weights, masters and state, and those sent in the second,
    by collective; and what is planned for them."""
    torch.manual_seed(0)
    model = small(name)
    options = {"ns_dtype": "bf16"} if name == "muon" else {}  # as on a GPU
    config = OptimizerConfig.model_validate({"name": name} | options)
    optimizer = build_optimizer(model, config)
    engine = engine_of(model, optimizer, stage, precision, {})
    ids = torch.zeros(1, 16, dtype=torch.long)
    sent = Sent()
    for watch in (nullcontext(), sent):  # stage 3 keeps parameters from the second step on
        with watch:
            engine.backward(engine(ids, ids))
            engine.step()
    own = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    own_ids = {id(p) for p in engine.module.parameters()}
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    stepped = getattr(engine.optimizer, "fp32_partitioned_groups_flat", stepped)  # stage 3
    state = [v for values in optimizer.state.values() for v in values.values()]
    measured = {
        "weights": storage_bytes(own),
        "masters": storage_bytes([p for p in stepped if id(p) not in own_ids]),
        "optimizer": sum(v.nbytes for v in state if isinstance(v, torch.Tensor)),
    }
    engine.destroy()
    setting = Setting(
        ranks=distributed.world_size(), stage=stage, optimizer=name, precision=precision
    )
    footprint = Footprint(small(name).to("meta"), config)
    planned = dict(footprint.memory(setting, None).parts)
    for collective, size in traffic_of(footprint.optimizer(name), setting).items():
        kind = collective.split()[0]
        planned[kind] = planned.get(kind, 0) + size
    return measured | sent.bytes, planned


@pytest.mark.parametrize(
    ("name", "stage", "precision"),
    quick(
        itertools.product(OPTIMIZERS, (0, 1, 2, 3), ("fp32", "bf16")),
        ("adamw", 0, "bf16"),
        ("apollo-mini", 1, "bf16"),
        ("muon", 2, "fp32"),
        ("soap", 3, "bf16"),
    ),
)
def test_a_rank_needs_and_sends_what_is_planned(
    two_ranks: RankPool, name: str, stage: int, precision: str
) -> None:
    ranks = two_ranks.run(measured_and_planned, name, stage, precision)
    for part in ("weights", "masters", "optimizer"):
        most = max(measured[part] for measured, _ in ranks)
        assert ranks[0][1][part] == pytest.approx(most, rel=0.03, abs=64), part
    for collective in COLLECTIVES:
        most = max(measured.get(collective, 0) for measured, _ in ranks)
        assert ranks[0][1].get(collective, 0) == pytest.approx(most, rel=1e-3, abs=64), collective


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_those_of_a_real_forward(precision: str) -> None:
    model, ids = small(), torch.zeros(3, 48, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    traced = trace(model.to("meta"), batch, precision)
    real = small().to(DTYPES[precision])
    saved = Saved(real)
    with saved.counting():
        real(**batch).backward()
    assert traced.total == pytest.approx(saved.bytes, rel=0.15)
    assert traced.checkpointed < traced.total


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_model_states_of_the_zero_paper(stage: int, gigabytes: float) -> None:
    """7.5B parameters on 64 GPUs, mixed-precision Adam: arXiv 1910.02054, figure 1 and, in words,
    sections 5.1 to 5.3."""
    sizes = [{"all": 7_500_000_000}]
    setting = Setting(ranks=64, stage=stage, precision="fp16")
    states = sum(model_parts(sizes, setting).values()) + adamw_bytes(sizes, setting)
    assert states / 1e9 == pytest.approx(gigabytes, abs=0.06)


def test_what_is_not_trained_takes_memory() -> None:
    def weights(model: torch.nn.Module, stage: int) -> int:
        setting = Setting(ranks=2, stage=stage, precision="bf16")
        return Footprint(model).memory(setting, None).parts["weights"]

    layers = [torch.nn.Linear(6, 6, bias=False), torch.nn.Linear(6, 6, bias=False)]
    trained = torch.nn.Sequential(*layers)
    whole = [weights(trained, stage) for stage in range(4)]
    layers[0].requires_grad_(False)
    assert [weights(trained, stage) for stage in range(4)] == whole == [144, 144, 144, 72]
    trained.register_buffer("mean", torch.zeros(10))
    assert weights(trained, 3) == 72 + 40


def test_parameters_of_published_llamas() -> None:
    """Of Llama 2: 6,738,415,616 for 7B, as keras-hub's llama_presets.py has it, and 68,976,648,192
    for 70B, as in the table of together's finetune.py."""
    seven = {"layers": 32, "hidden": 4096, "heads": 32, "ffn": 11008, "vocabulary": 32000}
    seventy = seven | {"layers": 80, "hidden": 8192, "heads": 64, "ffn": 28672, "kv_heads": 8}
    for sizes, published in ((seven, 6_738_415_616), (seventy, 68_976_648_192)):
        parameters = from_sizes(sizes).model.parameters()
        assert sum(p.numel() for p in parameters) == published


def test_what_a_ring_sends() -> None:
    """Section 7 of arXiv 1910.02054: stages 0 to 2 send twice the parameters, stage 3 thrice.
    DeepSpeed's stages 1 and 2 all-reduce, and so send thrice too; its stage 3 keeps the last
    half a billion."""
    size = 10**10
    sent = [sum(ring_traffic(size, Setting(ranks=1000, stage=s)).values()) / size for s in range(4)]
    assert sent == pytest.approx([4, 6, 6, 5.9], rel=0.01)
    assert ring_traffic(1000, Setting(ranks=1)) == {"all-reduce gradients": 0}


def test_matrices_are_exchanged_where_they_are_cut() -> None:
    footprint = Footprint(from_sizes(SIZES).model)

    def exchanged(ranks: int, stage: int, optimizer: str) -> int:
        setting = Setting(ranks=ranks, stage=stage, optimizer=optimizer)
        return traffic_of(footprint.optimizer(optimizer), setting)["all-to-all matrices"]

    assert exchanged(8, 0, "soap") == exchanged(1, 3, "soap") == 0
    assert exchanged(8, 3, "soap") == 2 * exchanged(8, 3, "muon") > 0
    assert exchanged(1000, 3, "muon") == 2 * 64 * 160  # an owner sends a matrix to its holders


def test_changes_fit_and_are_ranked() -> None:
    subject = from_sizes(SIZES)
    footprint = Footprint(subject.model)

    def needs(setting: Setting) -> int:
        return footprint.memory(setting, subject.activations(setting)).device

    setting = Setting(micro_batch=8, ranks=2)
    limit = needs(setting) * 2 // 3
    changes = changes_that_fit(setting, needs, limit)
    assert changes
    assert all(needs(change.setting) == change.bytes <= limit for change in changes)
    assert [c.cost for c in changes] == sorted(c.cost for c in changes)


@pytest.mark.parametrize("ranks", [1, 10_000])
def test_lines_have_80_columns(ranks: int) -> None:
    setting = Setting(ranks=ranks, stage=3, optimizer="soap")
    found = plan(from_sizes(SIZES), setting, limit=1)
    assert max(map(len, lines_of(found))) <= 80
    assert found["fits"] is False


def test_parameters_of_a_small_model_are_counted() -> None:
    subject = from_sizes(SIZES)
    count = sum(parameter.numel() for parameter in subject.model.parameters())
    assert next(iter(lines_of(plan(subject, Setting())))) == f"LLaMA shape: {count:,} parameters"


def with_inputs() -> Any:
    return torch.nn.Linear(4, 2), (torch.zeros(3, 4),)


def test_a_model_by_import_path_and_of_a_task() -> None:
    subject = from_import_path(f"{__name__}:with_inputs")
    assert subject.activations(Setting(precision="fp32")).total == 3 * 4 * 4
    subject, setting = from_task(Path("launch/tasks/byte_lm.toml"), None, {"ranks": 2})
    assert (setting.stage, setting.precision, setting.micro_batch) == (2, "fp32", 8)
    assert len(Footprint(subject.model).sizes(setting)) == 1


def test_a_model_of_a_hugging_face_config(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 256}
    config |= {"hidden_size": 64, "intermediate_size": 160}
    config |= {"num_hidden_layers": 3, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = plan(from_folder(tmp_path), Setting(seq_len=32))
    assert found["parameters"] == sum(p.numel() for p in small().parameters())
    assert found["memory"]["activations"] > 0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ranks": 0}, "ranks = 0: expected at least 1"),
        ({"optimizer": "adamv"}, "did you mean 'adamw'"),
        ({"stage": 4}, "expected 0 to 3"),
        ({"offload": "all", "stage": 2}, "needs ZeRO stage 3"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Setting(**values)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="--ffn"):
        from_sizes({"layers": 1, "hidden": 8, "heads": 2})
    with pytest.raises(ConfigError, match="multiple of 2 x 3"):
        from_sizes({**SIZES, "heads": 3})
    with pytest.raises(ConfigError, match="nothing"):
        from_import_path(f"{__name__}:nothing")


@pytest.mark.slow
def test_the_command_prints_json_and_says_that_it_does_not_fit() -> None:
    sizes = [f"--{name}={value}" for name, value in SIZES.items()]
    command = [sys.executable, "-m", "harness.cli", "plan", *sizes, "--json", "--memory=1MB"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["fits"] is False


def test_a_module_in_the_working_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "of_the_reader.py").write_text(
        "import torch\ndef build():\n return torch.nn.Linear(2, 2)"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    printed: list[str] = []
    words = ["plan", "of_the_reader:build", "--no-activations"]
    run_plan(command_line().parse_args(words), printed.append)
    assert printed[0].startswith("of_the_reader:build: ")


def planned_of(directory: Path, engine: str) -> dict[str, int]:
    """Bytes of the parts of the default task with other keys of its engine."""
    path = directory / "mine.toml"
    task = Path.cwd() / "launch/tasks/byte_lm.toml"
    path.write_text(f'extends = "{task}"\n[engines.lm]\n{engine}')
    subject, setting = from_task(path, None, {})
    footprint = Footprint(subject.model, subject.optimizer, subject.keeps_ema)
    return dict(footprint.memory(setting, None).parts)


def test_a_loss_through_another_engine_is_traced() -> None:
    """As much as a real forward saves, without the weights of either."""
    path = ROOT / "tests/tasks/engines_task.py"
    engine = tiny_config(Path(), 3).engines["net"].model_dump()
    table = tiny_config(Path()).model_dump()
    table |= {"engines": {"G": engine, "D": engine}, "task": {"path": str(path)}}
    config = Config.model_validate(table)
    task = load_task(config)
    models: dict[str, Any] = dict(task.models)
    batch = task.collate([task.train_data[n] for n in range(4)])
    subject = of_task(task, config, "G", "it")
    traced = subject.activations(Setting(precision="fp32", micro_batch=4))
    models["D"].requires_grad_(False)
    saved = Saved(*models.values())
    with saved.counting():
        moved = models["G"](batch[0])
        _ = -models["D"](moved).float().mean() + (moved - batch[0]).square().mean()
    assert traced.total == saved.bytes > 0


def test_options_groups_and_what_is_frozen_are_read(tmp_path: Path) -> None:
    plain = planned_of(tmp_path, "")
    frozen = planned_of(tmp_path, 'frozen = ["blocks"]')
    assert frozen["optimizer"] < plain["optimizer"] / 10
    assert frozen["weights"] == plain["weights"]
    apollo = [
        planned_of(tmp_path, f'optimizer = {{ name = "apollo", rank = {r} }}') for r in (1, 32)
    ]
    assert apollo[0]["optimizer"] < apollo[1]["optimizer"] < plain["optimizer"]
    dense = '[{ name = "all", match = ".*", dense = true }]'
    muon = [
        planned_of(tmp_path, f'optimizer = {{ name = "muon", groups = {groups} }}')
        for groups in ("[]", dense)
    ]
    assert muon[0]["optimizer"] < 0.6 * plain["optimizer"]
    assert muon[1]["optimizer"] == pytest.approx(plain["optimizer"], abs=16)
    ema = planned_of(tmp_path, "ema_decay = 0.9")["optimizer"]
    assert ema == 1.5 * plain["optimizer"]
    (tmp_path / "mine.toml").write_text(
        f'extends = "{Path.cwd()}/launch/tasks/byte_lm.toml"\n'
        '[engines.lm]\noptimizer = { name = "torch.optim:RMSprop" }'
    )
    with pytest.raises(ConfigError, match="--engine lm --optimizer NAME"):
        from_task(tmp_path / "mine.toml", None, {})
    _, setting = from_task(tmp_path / "mine.toml", None, {"optimizer": "muon"})
    assert setting.optimizer == "muon"


@pytest.mark.slow  # imports peft
def test_adapters_are_read(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    plain = planned_of(tmp_path, "")
    adapted = planned_of(tmp_path, "lora = { targets = '.*\\.down', rank = 4 }")
    assert (added := adapted["weights"] - plain["weights"]) > 0
    assert adapted["masters"] == added
    assert adapted["optimizer"] == 2 * added
