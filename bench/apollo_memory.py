"""The state of APOLLO, Muon, SOAP and AdamW for LLaMA-shaped models, and what Muon and SOAP send:
the tables of docs/apollo.md and docs/optimizers.md.

    python -m bench.apollo_memory

Computed from shapes: nothing is allocated. Each number is that of the rank with the most, in MiB.
"""

import sys

import torch
from torch import nn

from harness.optim import Muon, Soap, apollo_param_groups, matrix_param_groups
from harness.optim.apollo.memory import state_bytes
from harness.optim.matrices import memory

SIZES = {"130M": (768, 2048, 12), "1B": (2048, 5461, 24), "7B": (4096, 11008, 32)}
"""Width, hidden width, layers."""

LAYOUTS = {"1 rank": (0, 1), "ZeRO 1/2, 8 ranks": (1, 8), "ZeRO 3, 8 ranks": (3, 8)}
"""ZeRO stage, ranks."""


def llama(width: int, hidden: int, layers: int, vocabulary: int = 32000) -> nn.Module:
    """The parameters of a LLaMA of the paper's sizes, without memory; not a model that runs."""

    def linear(inputs: int, outputs: int) -> nn.Module:
        return nn.Linear(inputs, outputs, bias=False)

    with torch.device("meta"):
        model = nn.ModuleDict({"embedding": nn.Embedding(vocabulary, width)})
        for layer in range(layers):
            block = nn.ModuleDict({n: linear(width, width) for n in ("q", "k", "v", "o")})
            block["gate"], block["up"] = linear(width, hidden), linear(width, hidden)
            block["down"] = linear(hidden, width)
            block["norms"] = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
            model[f"layer{layer}"] = block
        model["norm"], model["lm_head"] = nn.RMSNorm(width), linear(width, vocabulary)
    return model


def main() -> None:
    """Prints the table."""
    rows = [
        "| model | layout | AdamW | APOLLO, r = width / 4 | APOLLO-Mini |",
        "|---|---|--:|--:|--:|",
    ]
    for name, size in SIZES.items():
        model = llama(*size)
        low_rank = apollo_param_groups(model, rank=size[0] // 4)
        dense = [group | {"rank": 0} for group in low_rank]
        optimizers = [dense, low_rank, apollo_param_groups(model, rank=1)]
        for layout, (stage, world) in LAYOUTS.items():
            mib = [max(state_bytes(groups, stage, world)) / 2**20 for groups in optimizers]
            rows.append(f"| {name} | {layout} | " + " | ".join(f"{x:,.0f}" for x in mib) + " |")
    rows += [
        "",
        "| model | layout | AdamW | Muon | SOAP | Muon sends | SOAP sends | gradients |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, size in SIZES.items():
        model = llama(*size)
        dense = [group | {"rank": 0} for group in apollo_param_groups(model, rank=1)]
        muon, soap = (kind(matrix_param_groups(model)).param_groups for kind in (Muon, Soap))
        gradients = 2 * sum(parameter.numel() for parameter in model.parameters()) / 2**20
        for layout, (stage, world) in LAYOUTS.items():
            mib = [
                max(found) / 2**20
                for found in (
                    state_bytes(dense, stage, world),
                    memory.state_bytes(muon, stage, world),
                    memory.state_bytes(soap, stage, world),
                    memory.sent_bytes(muon, stage, world, 2),
                    memory.sent_bytes(soap, stage, world, 4),
                )
            ]
            rows.append(
                f"| {name} | {layout} | "
                + " | ".join(f"{x:,.0f}" for x in [*mib, gradients * (world - 1) / world])
                + " |"
            )
    sys.stdout.write("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
