"""Programs around other job queues, and the lock of the environment in which they run (`bench.queue_peers`).

They are run by path with that environment's interpreter, so they import nothing of ours. Each one both holds
the no-op task for the queue's own worker and, started as a program, is a client of it.
"""
