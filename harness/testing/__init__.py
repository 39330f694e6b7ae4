"""Real ranks and real faults for tests, of harness and of tasks.

Its files, from the top down:

    pool.py      worker ranks that are started once and run many test functions
    preload.py   what a pool's fork server imports once
    faults.py    fail_at(phase, step, rank, kind): faults on demand, of a rank or a worker
    sim.py       a simulated device with copy streams
"""
