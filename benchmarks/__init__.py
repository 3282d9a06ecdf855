"""Speed and memory against other projects, and against what the machine can do.

`make bench-quick` for the headline figures, `make bench` for everything; `harness` says how.
"""
