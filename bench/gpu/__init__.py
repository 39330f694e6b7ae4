"""Everything that needs a card, by one command: `python -m bench.gpu`.

__main__.py   the sections, each a process with a limit; the report
report.py     the report as a file to send, without paths and names, and as a table
smoke.py      short runs, resumed and compared to the bit
runs.py       which: every stage, dtype, optimizer, attention kernel, replacement of layers
tests.py      the tests marked gpu
waits.py      who waits for the device in a step, and its launches
apollo.py     APOLLO beside AdamW and the authors' own
loop.py       a step of harness beside a bare loop on DeepSpeed
save.py       what a save stalls, and the bandwidth of pinned memory
offload.py    activations in host memory
section.py    what the sections share
"""
