"""What launched this process: its rank, and whether the launcher is still alive.

Does not import torch.

    leave.py         ends the process at once when a run has ended
    environment.py   RANK and so on, translated from the variables of srun and mpirun
    parent.py        the launchers above this rank, and whether one of them has died
    fork_server.py   signals to the ranks of `harness.launch`, before and after their run
"""
