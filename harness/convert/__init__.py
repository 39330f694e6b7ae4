"""Checkpoints and files of weights, rewritten as plain weights; without torch.

Its files, from the top down:

    convert.py         a conversion from its options to its end
    verify.py          CRCs of sources and output; whether weights are the rounded masters
    copy.py            copies and casts the planned bytes with several threads
    plan.py            the tensors of the output: names, dtypes, and byte ranges of their sources
    resolve_source.py  from the path that a user gives to an engine's files, or a file of weights
"""
