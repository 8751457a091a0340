"""Pure decisions, one module per question: no clock, randomness, I/O or logging in here.

Everything takes values and returns values. Gateway, loops, worker program and simulator call the same
functions, so what is tested here is what runs everywhere.
"""
