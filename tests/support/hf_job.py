"""What several ranks save as users of Accelerate and of the HF Trainer do.

`main` writes for ZeRO 2 and 3 the checkpoints `accelerate-STAGE/` and `trainer-STAGE/`, and beside
them the weights, gathered from the running engines: `accelerate-STAGE.pt` and `trainer-STAGE.pt`.
"""

from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from torch import nn

from harness import distributed


def main(directory: Path) -> None:
    """Trains two steps with each, and saves. Collective."""
    for stage in (2, 3):
        with_accelerate(directory / f"accelerate-{stage}", stage)
        with_trainer(directory / f"trainer-{stage}", stage)


def settings(stage: int) -> dict[str, Any]:
    """DeepSpeed's config."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def llama() -> nn.Module:
    """A small model of transformers, its embedding tied to its head."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=67,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
    )


def samples() -> list[dict[str, torch.Tensor]]:
    """Eight texts of nine tokens."""
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(67, (8, 9), generator=generator)
    return [{"input_ids": text, "labels": text} for text in texts]


def with_accelerate(directory: Path, stage: int) -> None:
    """`Accelerator.save_state`."""
    plugin = DeepSpeedPlugin(hf_ds_config=settings(stage))
    accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision="bf16")
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(samples(), batch_size=1)  # type: ignore[arg-type]
    engine, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _, batch in zip(range(2), loader, strict=False):
        accelerator.backward(engine(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(directory))
    write_weights(engine, directory)
    AcceleratorState._reset_state(reset_partial_state=True)


def with_trainer(directory: Path, stage: int) -> None:
    """`transformers.Trainer` with `deepspeed=CONFIG`."""
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        deepspeed=settings(stage),
        use_cpu=True,
        bf16=True,
        per_device_train_batch_size=1,
        max_steps=2,
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        optim="adamw_torch",
    )
    trainer = transformers.Trainer(model=llama(), args=arguments, train_dataset=samples())
    trainer.train()
    write_weights(trainer.model_wrapped, directory)
    AcceleratorState._reset_state(reset_partial_state=True)


def write_weights(engine: Any, directory: Path) -> None:
    """Writes the weights of a running engine, as it computes with them. Collective."""
    found = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    if distributed.is_global_leader():
        torch.save(found, directory.with_suffix(".pt"))
