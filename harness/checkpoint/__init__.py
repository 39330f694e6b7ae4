"""A run's checkpoints: committed directories `checkpoints/step-N/` that a run resumes from exactly.

Its files, from the top down:

    resume.py         finding, verifying and loading one
    init_weights.py   weights from files as an engine's starting point
    reshard.py        rewriting one for another number of ranks, ZeRO stage or other layout
    save.py           Saver: one atomic commit of all engines and ranks, also behind the training
    export.py         plain weights
    inspect.py        what a checkpoint, an .sft or a .pt holds
    completeness.py   whether one is complete over all disks; its files where they are read
    disks.py          which ranks share a disk
    retention.py      which checkpoints stay; clearing up after a kill
    manifest.py       what makes a directory a checkpoint
    files.py          durable files and their digests
    snapshot.py       copies of live tensors for a save behind the training
"""
