"""What started this process: its rank in the launcher's environment; whether the launcher lives.

Imports no torch.

    environment.py   RANK and so on, translated from the variables of srun and mpirun
    parent.py        the launchers above this rank, and whether one of them has died
"""
