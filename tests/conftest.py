"""Each of several test processes computes with its share of the processors: with more threads they wait for each other.

On two processors the model tests take 75 s so, and 193 s with a thread for each processor in each process. It is set
before torch is imported, and holds for programs that tests start, too. OMP_NUM_THREADS overrides it.
"""

import os

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
