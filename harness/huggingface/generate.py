"""Text from a model in training, by all ranks together."""

from collections.abc import Callable
from typing import Any

import torch

from harness import distributed
from harness.errors import CommandError
from harness.huggingface.models import Kind, padding_token


def generate_command(
    engine: str, tokenizer: Any, kind: Kind, *, is_chat: bool, options: dict[str, Any]
) -> Callable[..., str]:
    """The live command `generate PROMPT`, for `Task.commands`.

    `is_chat`: the prompt is a user's message. `options`: of transformers' `generate`, like
    {"max_new_tokens": 100, "do_sample": True}.
    """

    def generate(engines: Any, *words: str) -> str:
        """Text that the model makes of a prompt: generate PROMPT."""
        return generated(engines, engine, tokenizer, " ".join(words), kind, is_chat, options)

    return generate


@torch.no_grad()
def generated(
    engines: Any,
    engine: str,
    tokenizer: Any,
    prompt: str,
    kind: Kind,
    is_chat: bool,
    options: dict[str, Any],
) -> str:
    """What the model makes of a prompt. Collective: at ZeRO 3 each token gathers the weights from
    all ranks. They draw the same random numbers, so that all stop at the same token.

    Raises CommandError for a prompt without tokens.
    """
    if is_chat:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=not is_chat)
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    if not inputs["input_ids"].numel():
        raise CommandError("expected a prompt: generate PROMPT")
    device, step = engines[engine].device, engines.global_step
    is_sharded = engines[engine].zero_stage == 3
    devices = [device] if device.type != "cpu" else []
    with engines.lend(engine) as model, torch.random.fork_rng(devices):
        torch.manual_seed(step)
        model.eval()
        (tokens,) = model.generate(
            **{name: tensor.to(device) for name, tensor in inputs.items()},
            pad_token_id=padding_token(tokenizer),
            synced_gpus=is_sharded and distributed.world_size() > 1,
            **options,
        )
    start = inputs["input_ids"].shape[1] if kind == "causal" else 0
    return tokenizer.decode(tokens[start:], skip_special_tokens=True)
