"""Locks of the packages that benchmarks compare with (`bench.environments`), and programs that run there.

The programs are those around other job queues (`bench.queue_peers`). They are run by path with that
environment's interpreter, so they import nothing of ours. Each one both holds the no-op task for the queue's
own worker and, started as a program, is a client of it.
"""
