"""harness: the training harness around your own PyTorch models on DeepSpeed.

    from harness import Config, Task, train
    result = train({"run": {"steps": 500}, "engines": {...}}, Task(...))

`import harness` is light: each name is imported when it is first asked for.

The rooms, from the top floor down: imports point down this list, and down the list of each room
(tests/test_architecture.py).

    cli.py             the command `harness`, a table of subcommands
    dry_run.py         a run is built and takes one step, and nothing is written
    sizing/            what a run would need, before it is started
    doctor.py          what on this machine would stop or slow a run
    report/            what runs have done, as a page to look at
    local_ranks.py     `harness.launch`: ranks on this machine, from a script or a notebook
    api.py             `harness.train`: a run in somebody else's program
    process_state.py   what a run changes in its process, and how it was before
    result.py          what a run has left behind
    run.py             a run from its config to its end, as named steps
    run_control.py     how a run takes commands: which there are, the bus, its fronts
    run_sinks.py       what a run reports to: ledger, metric files, trackers
    startup.py         what is checked before a run starts: the machine, the ranks' software
    run_directory.py   runs/NAME/: its lock, its log, its resolved config
    provenance.py      what a run was started from: commit, versions, command line
    trainer.py         Trainer: the loop; steps, and what happens between them
    command_queue.py   the commands of a run between its steps
    run_view.py        what a callback sees of a run
    rescue.py          what is still reported and saved before an error ends the run
    place.py           in which step and phase an error has reached a rank
    recovery.py        what follows a step that was skipped, or a spike
    execute.py         what each live command does, and what is answered
    epochs.py          the length of a run in passes over its data
    evaluate.py        held-out evaluation, every rank its share
    huggingface/       models of Hugging Face: from a folder to a folder (extra: hf)
    checkpoint/        a run's own commits: save, resume, reshard, retention, export, inspect
    convert/           checkpoints and files into plain weights, streamed without torch
    engine/            Engine: one model under one DeepSpeed engine; Engines: the named set
    task.py            Task: all that harness knows of the user's code
    callbacks/         code of the user's that a run calls at a few moments
    data/              from a dataset to the micro-batches of a rank
    metrics/           each step's numbers: averaged, recorded, shown
    control/           live commands, from where they are typed to all ranks at one step
    health/            non-finite numbers, hangs, restarts: what one rank meets, all decide
    optim/             optimizers, learning-rate schedules, APOLLO, Muon, SOAP
    offload/           activations in host memory until backward
    wrapper/           other modules in a model's place; freezing, growing, compiling, placing
    zero/              what we know of DeepSpeed's insides: layouts, files, live engines
    io/                save and load of whole structures
    formats/           the files that weights are in, read and written without torch
    distributed/       who this rank is, and the small messages between ranks
    launcher/          who this rank is in the environment of what launched it
    config/            the typed config, checked before torch is imported
    memory_files.py    where a run keeps its newest state in host memory
    pattern.py         in which order a model sees the tokens of several codebooks
    logs.py            the log, on the terminal and in log.txt
    files.py           files by atomic rename, or a line at a time; locks
    remote_path.py     files of a store, as paths that are read by ranges
    devices.py         what this process computes on, and what suits that device
    waiting.py         how long this rank has waited for the others
    utils.py           small helpers that need no file of their own
    byte_sizes.py      sizes in bytes, as one types them
    errors.py          errors addressed to the user
    testing/           rank pools, a simulated device, faults on demand; nothing imports it
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.api import train
    from harness.callbacks import Callback, EarlyStopping
    from harness.config import Config
    from harness.control.client import command
    from harness.local_ranks import launch
    from harness.result import Result
    from harness.task import Task

__version__ = "0.1.0"
__all__ = ["Callback", "Config", "EarlyStopping", "Result", "Task", "command", "launch", "train"]

_MODULES = {
    "Callback": "callbacks",
    "EarlyStopping": "callbacks",
    "Config": "config",
    "Result": "result",
    "Task": "task",
    "command": "control.client",
    "launch": "local_ranks",
    "train": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
