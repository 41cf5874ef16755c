"""The arguments of the driver's launch call, under a compiled triton and a stub driver.

Run by ../test_launches.py in a process of its own for each version of triton, because interpreted and compiled kernels
cannot share one. Nothing is compiled: a compiled kernel is an empty object for each key of Triton's own, so a launch of
the wrong kernel is a launch of another object.

    TRITON_INTERPRET=0 python -m pytest -p tests.backends.launches.fixtures tests/backends/launches/replays.py
"""
