"""A run's checkpoints: committed directories `checkpoints/step-N/` that a run resumes from exactly.

Its files, from the top down:

    resume.py            chooses, verifies and loads one
    verify_ahead.py      checks the files of one while engines are built
    resume_source.py     which directory run.resume means
    downloads.py         from a store onto the disks that a run resumes from
    init_weights.py      weights from files as an engine's starting point
    reshard.py           loads one on another number of ranks, ZeRO stage or other layout
    fit.py               what of one fits a model that has changed
    save.py              Saver: one atomic commit of all engines and ranks, also in the background
    memory.py            the newest state in host memory
    commit.py            stages a checkpoint's files, and commits them on all disks or none
    uploads.py           a store as the place of copies
    neighbours.py        another node as the place of copies
    transfer.py          files of checkpoints from one node to another
    copies.py            committed checkpoints in another place as well, behind the training
    inspect.py           what a run or a checkpoint holds
    remote_store.py      a run's checkpoints in an object store, by fsspec
    export.py            plain weights
    describe_weights.py  what an .sft, a .pt or an engine's files hold
    copy_missing.py      copies files to the nodes that read them
    compatible.py        whether one fits the run: engines, optimizers, models
    completeness.py      whether one is complete over all disks, or cannot be judged
    dropped.py           drops what a rollback leaves, wherever it still is
    disks.py             which ranks share a disk
    written.py           writes its files durably
    best.py              the link to the best one
    retention.py         which checkpoints are kept; cleaning up after a kill
    manifest.py          what makes a directory a checkpoint
    json_record.py       dataclasses from JSON, checked
    files.py             its files' digests, verified without torch
    snapshot.py          copies of live tensors for a save in the background
"""
