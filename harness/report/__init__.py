"""What runs have done, as one page to look at: `harness report`. Does not import torch.

    build.py      from run directories to a page, pictures, or a server
    serve.py      the page of a run that continues, on this machine only
    page.py       one HTML file, with everything that it needs
    pictures.py   the same charts as PNG
    content.py    all that is shown of some runs
    summary.py    the figures above the charts: losses, times, where the time has gone
    charts.py     which of their metrics are drawn, and how
    decimate.py   fewer points of a long curve, without losing its extremes
    marks.py      commands, saves, restarts, faults: what happened, when, at which step
    run_files.py  the files of a run directory, as far as they have been written

The folder static/ has the page's style and script, and uPlot 1.6.32 (MIT), which draws the charts.
"""
