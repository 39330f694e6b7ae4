"""What the HF Trainer computes, on Accelerate's DeepSpeed, of the batches of a run of ours."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import default_collate

from harness import distributed
from harness.config import Config
from harness.huggingface.models import describe, load_tokenizer
from harness.huggingface.rows import read_rows
from harness.huggingface.samples import Collate, Samples
from harness.run import run_in_world
from harness.task import Task, load_task

LENGTH = 32
MEAN_OF_MEANS = ("t5", "bert", "clip")
"""Models whose loss knows nothing of `num_items_in_batch`: the Trainer can only weigh their
micro-batches alike. BERT and CLIP take it and ignore it, with which their loss in the Trainer would
be as many times too large as there are ranks and micro-batches in a step."""


def data_of(folder: Path, rows: Path) -> tuple[Sequence[Any], Callable[[Any], Any]]:
    """Samples in an order, and how they are collated; nothing is random."""
    description = describe(folder, "other" if folder.name == "clip" else None)
    if folder.name == "clip":
        generator = torch.Generator().manual_seed(5)
        images = torch.randn(40, 3, 8, 8, generator=generator)
        words = torch.randint(5, 300, (40, 12), generator=generator)
        pairs = zip(words, images, strict=True)
        return [{"input_ids": w, "pixel_values": i, "return_loss": True} for w, i in pairs], collate
    tokenizer = load_tokenizer(folder)
    samples = Samples(read_rows(rows), tokenizer, description.kind, LENGTH, "text")
    data = [samples[index] for index in range(len(samples))]
    if description.kind != "masked":
        return data, Collate(tokenizer, description.kind, 0.15)
    for sample in data:  # every third token
        sample["labels"] = torch.where(
            torch.arange(len(sample["labels"])) % 3 == 1, sample["labels"], -100
        )
        sample["input_ids"] = sample["input_ids"].masked_fill(
            sample["labels"] >= 0, tokenizer.mask_token_id
        )
    return data, Collate(tokenizer, "seq2seq", 0.15)  # pads


def collate(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    return default_collate(pairs) | {"return_loss": True}


def harness_losses(config: Config, folder: Path, rows: Path) -> None:
    """A run of the task on these samples. Collective."""

    def build(given: Config) -> Task:
        task = load_task(given)
        task.train_data, task.collate = data_of(folder, rows)
        if folder.name in MEAN_OF_MEANS:
            task.weigh = None
        return task

    assert run_in_world(config, build=build) == 0


def trainer_losses(
    folder: Path, rows: Path, settings: dict[str, Any], steps: int, lr: float
) -> list[float]:
    """The loss of each step of the Trainer. Collective. `settings`: DeepSpeed's config."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    import transformers
    from accelerate.state import AcceleratorState

    size = settings["train_micro_batch_size_per_gpu"]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        deepspeed=settings,
        use_cpu=True,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=settings["gradient_accumulation_steps"],
        max_steps=steps,
        learning_rate=lr,
        lr_scheduler_type="constant",
        max_grad_norm=settings["gradient_clipping"],
        logging_steps=1,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        optim="adamw_torch",
        remove_unused_columns=False,
    )
    kinds: dict[str, Any] = {
        "t5": transformers.AutoModelForSeq2SeqLM,
        "bert": transformers.AutoModelForMaskedLM,
        "clip": transformers.AutoModel,
    }
    model = kinds.get(folder.name, transformers.AutoModelForCausalLM).from_pretrained(folder)
    data, collate = data_of(folder, rows)
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=[data[n] for n in dealt(len(data), size)],  # type: ignore[arg-type]
        data_collator=collate,
    )
    if folder.name in MEAN_OF_MEANS:
        trainer.model_accepts_loss_kwargs = False
    trainer.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def dealt(count: int, size: int) -> Iterator[int]:
    """The order in which Accelerate, which deals out whole batches, gives each rank the batches
    that it has in ours, where samples are dealt out."""
    world = distributed.world_size()
    for block in range(0, count, world * size):
        for rank in range(world):
            yield from range(block + rank, block + world * size, world)
